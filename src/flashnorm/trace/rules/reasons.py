"""The reasons why a gain cannot be folded that several rules share."""

from flashnorm.plan import Kept, Kind
from flashnorm.trace.records import unknown

UNKNOWN_OPERATOR = unknown()
TWICE = unknown("it multiplies the gain by itself")
WITHOUT = Kept("it adds a tensor that does not carry the gain", kind=Kind.STOPPED)
MIXES = Kept("it mixes channels of the gain without a weight that could take it", kind=Kind.STOPPED)
DIFFERENT = Kept("it adds channels that carry different elements of the gain", kind=Kind.STOPPED)
NON_LINEAR = Kept("it is not linear in the gain", kind=Kind.STOPPED)
ANOTHER_USE = Kept("it has another use", kind=Kind.SHARED)
