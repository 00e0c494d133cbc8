"""FlashNorm: exact folding of norm weights into the linears that read them, for any transformers model."""

__version__ = "0.1.0"

from flashnorm.convert import ConvertResult, convert
from flashnorm.errors import DifferenceError, InputError
from flashnorm.plan import Fold, FoldPlan, Kept, Linear
from flashnorm.planning import plan
from flashnorm.runtime.in_memory import fold_
from flashnorm.runtime.load import load
from flashnorm.runtime.optimize import optimize
from flashnorm.verify import IntegrityReport, VerifyReport, verify

__all__ = [
    "ConvertResult",
    "DifferenceError",
    "Fold",
    "FoldPlan",
    "InputError",
    "IntegrityReport",
    "Kept",
    "Linear",
    "VerifyReport",
    "convert",
    "fold_",
    "load",
    "optimize",
    "plan",
    "verify",
]
