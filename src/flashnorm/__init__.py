"""FlashNorm: exact folding of norm weights into the linear layers that read them, for any Transformers model.

Each name is imported when it is first used, so that code that does not run a model does not import what runs models.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from flashnorm.version import __version__ as __version__

if TYPE_CHECKING:
    from flashnorm.convert.adapter import AdapterResult, convert_adapter
    from flashnorm.convert.dry_run import DryRun, dry_run
    from flashnorm.convert.push import push
    from flashnorm.convert.result import ConvertResult
    from flashnorm.convert.whole import convert
    from flashnorm.errors import DifferenceError, InputError
    from flashnorm.models.in_memory import fold_
    from flashnorm.models.load import load
    from flashnorm.models.optimize import optimize
    from flashnorm.models.status import Status, status
    from flashnorm.plan import Fold, FoldPlan, Kept, Kind, Linear
    from flashnorm.planning.planned import plan
    from flashnorm.planning.removable import removable
    from flashnorm.removable import Centring, Division, Removable
    from flashnorm.verify.adapter import AdapterReport, verify_adapter
    from flashnorm.verify.integrity import IntegrityReport
    from flashnorm.verify.report import VerifyReport
    from flashnorm.verify.whole import verify

__all__ = [
    "AdapterReport",
    "AdapterResult",
    "Centring",
    "ConvertResult",
    "DifferenceError",
    "Division",
    "DryRun",
    "Fold",
    "FoldPlan",
    "InputError",
    "IntegrityReport",
    "Kept",
    "Kind",
    "Linear",
    "Removable",
    "Status",
    "VerifyReport",
    "convert",
    "convert_adapter",
    "dry_run",
    "fold_",
    "load",
    "optimize",
    "plan",
    "push",
    "removable",
    "status",
    "verify",
    "verify_adapter",
]

# Public name -> the module that defines it.
_HOMES = {
    "AdapterReport": "flashnorm.verify.adapter",
    "AdapterResult": "flashnorm.convert.adapter",
    "Centring": "flashnorm.removable",
    "ConvertResult": "flashnorm.convert.result",
    "DifferenceError": "flashnorm.errors",
    "Division": "flashnorm.removable",
    "DryRun": "flashnorm.convert.dry_run",
    "Fold": "flashnorm.plan",
    "FoldPlan": "flashnorm.plan",
    "InputError": "flashnorm.errors",
    "IntegrityReport": "flashnorm.verify.integrity",
    "Kept": "flashnorm.plan",
    "Kind": "flashnorm.plan",
    "Linear": "flashnorm.plan",
    "Removable": "flashnorm.removable",
    "Status": "flashnorm.models.status",
    "VerifyReport": "flashnorm.verify.report",
    "convert": "flashnorm.convert.whole",
    "convert_adapter": "flashnorm.convert.adapter",
    "dry_run": "flashnorm.convert.dry_run",
    "fold_": "flashnorm.models.in_memory",
    "load": "flashnorm.models.load",
    "optimize": "flashnorm.models.optimize",
    "plan": "flashnorm.planning.planned",
    "push": "flashnorm.convert.push",
    "removable": "flashnorm.planning.removable",
    "status": "flashnorm.models.status",
    "verify": "flashnorm.verify.whole",
    "verify_adapter": "flashnorm.verify.adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `plan`, `convert` and `verify` functions, which Python would replace by the modules of these names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
