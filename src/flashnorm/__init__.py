"""FlashNorm: exact folding of norm weights into the linears that read them, for any transformers model.

Every name is imported when it is first asked for: what does not run a model does not need what runs models.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashnorm.convert import ConvertResult, convert
    from flashnorm.errors import DifferenceError, InputError
    from flashnorm.plan import Fold, FoldPlan, Kept, Linear
    from flashnorm.planning import plan
    from flashnorm.runtime.in_memory import fold_
    from flashnorm.runtime.load import load
    from flashnorm.runtime.optimize import optimize
    from flashnorm.runtime.status import Status, status
    from flashnorm.verify import IntegrityReport, VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "ConvertResult",
    "DifferenceError",
    "Fold",
    "FoldPlan",
    "InputError",
    "IntegrityReport",
    "Kept",
    "Linear",
    "Status",
    "VerifyReport",
    "convert",
    "fold_",
    "load",
    "optimize",
    "plan",
    "status",
    "verify",
]

# Where each of them is.
_HOMES = {
    "ConvertResult": "flashnorm.convert",
    "DifferenceError": "flashnorm.errors",
    "Fold": "flashnorm.plan",
    "FoldPlan": "flashnorm.plan",
    "InputError": "flashnorm.errors",
    "IntegrityReport": "flashnorm.verify",
    "Kept": "flashnorm.plan",
    "Linear": "flashnorm.plan",
    "Status": "flashnorm.runtime.status",
    "VerifyReport": "flashnorm.verify",
    "convert": "flashnorm.convert",
    "fold_": "flashnorm.runtime.in_memory",
    "load": "flashnorm.runtime.load",
    "optimize": "flashnorm.runtime.optimize",
    "plan": "flashnorm.planning",
    "status": "flashnorm.runtime.status",
    "verify": "flashnorm.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """`plan`, `convert` and `verify` are functions; Python would put the modules of these names in their places."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
