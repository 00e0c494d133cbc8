"""Loads a FlashNorm checkpoint into an ordinary Transformers model.

* The model is built without the folded norms' weights, so Transformers does not miss them; every other weight is
  required as usual.
* Checkpoints by other tools carry no flag; they are recognised by the norm weights that they lack.
"""

import errno
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from flashnorm.compat.transformers import ignore_stored
from flashnorm.errors import InputError, brief
from flashnorm.files.header import TORCH_DTYPES
from flashnorm.files.reader import CONFIG_FILE, Checkpoint
from flashnorm.format import CONFIG_KEY, listed_cancelled, listed_centred
from flashnorm.hub import local_folder
from flashnorm.models.adapters import guard_adapters
from flashnorm.models.cancelled import cancel_norms
from flashnorm.models.centred import put_rms_norms
from flashnorm.models.in_memory import mark_config
from flashnorm.models.weightless import make_weightless, under_all_names
from flashnorm.plan import Cancelled, Centred, FoldPlan, Kept
from flashnorm.planning import cancelled as cancelling
from flashnorm.planning import centred as centring
from flashnorm.planning.checks import check_shapes
from flashnorm.planning.folded import weightless_norms
from flashnorm.planning.names import tensor_plan
from flashnorm.planning.planned import PlannedCheckpoint, plan_checkpoint

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.*", "spiece.model", "tekken.json")


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    optimize: bool = True,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a FlashNorm checkpoint: one that `flashnorm convert` wrote, or one of the reference implementation's.

    Args:
        source: a folder or a hub id.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the model's folder, relative to the source's.
        dtype: dtype of the loaded weights; "auto" is the checkpoint's own.
        device: device to move the model to; None leaves it where Transformers puts it.
        optimize: whether to call `flashnorm.optimize` if the kernels support the model where it is.
        trust_remote_code: whether code that comes with the checkpoint may run.
        kwargs: further arguments of Transformers' `from_pretrained`.

    Returns:
        An ordinary Transformers model in evaluation mode, whose folded norms hold no parameter.

    Raises:
        InputError: `source` is no FlashNorm checkpoint, or a damaged one.
    """
    checkpoint = Checkpoint.open(local_folder(source, revision, subfolder))
    planned = plan_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    for remark in planned.checkpoint.remarks:
        warnings.warn(f"{source}: {remark}", stacklevel=2)
    model = Loading.of(planned).load(dtype=dtype, **kwargs)
    # Adapters made from this model will name it as their base: as the hub id, not as a folder in the cache.
    model.name_or_path = model.config.name_or_path = str(Path(source) / subfolder)
    model = model if device is None else model.to(device)  # type: ignore[arg-type]
    if optimize:
        warn_of_plain(use_kernels(model))
    return model


@dataclass(frozen=True)
class Loading:
    """What is known about a FlashNorm checkpoint before it is loaded; one `Loading` can load it several times.

    Attributes:
        planned: the checkpoint with its plan.
        tensors: names of the folded norm tensors; the files may hold them all the same, at their identity value.
        parameters: the folded norms' parameters, under all their names -> their identity value.
        readable: those of the names in `parameters` that the model's code reads from outside of the norm.
        centred: the LayerNorms that become RMSNorms.
        cancelled: the norms that are not computed.
        options: arguments of `from_pretrained` for each loading.
    """

    planned: PlannedCheckpoint
    tensors: tuple[str, ...]
    parameters: dict[str, float]
    readable: frozenset[str]
    centred: Centred = field(default_factory=Centred)
    cancelled: Cancelled = field(default_factory=Cancelled)
    options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(planned: PlannedCheckpoint) -> "Loading":
        """Examine a planned checkpoint.

        Raises:
            InputError: `planned` is no FlashNorm checkpoint, or a damaged one.
        """
        checkpoint, tensors = planned.checkpoint, planned.tensors
        # Checked now, because Transformers reserves as much memory as the config asks for.
        check_shapes(checkpoint, tensors)
        norms = weightless_norms(checkpoint, tensors)
        if norms is None:
            raise InputError(
                f"{checkpoint.folder}: expected a FlashNorm checkpoint, found an ordinary one, with the weights of all "
                "its norms; convert it with `flashnorm convert`, or load it with Transformers and call "
                "flashnorm.fold_(model)"
            )
        parameters = {tensors.parameters[tensor]: identity for tensor, identity in norms.items()}
        parameters = under_all_names(planned.model, parameters)
        readable = planned.read_outside & parameters.keys()
        return Loading(planned, tuple(norms), parameters, readable, _centred(planned), _cancelled(planned))

    @property
    def plan(self) -> FoldPlan:
        """The folds that the checkpoint was converted with."""
        return self.planned.keep_all_but(self.tensors, Kept("it has its weight")).plan

    def load(self, **options: Any) -> PreTrainedModel:
        """The model in evaluation mode, running its own code; `options` are further ones of `from_pretrained`."""
        planned, plan = self.planned, self.plan
        base, folder = type(planned.model), planned.checkpoint.folder
        model = _load(folder, base, self.parameters, self.tensors, self.readable, **self.options, **options)
        mark_config(model.config, tensor_plan(plan, planned.stored.in_new_files()).norms, self.centred, self.cancelled)
        stored = {one.name: self._stored_dtype(one.name) for one in self.centred.writers}
        put_rms_norms(model, self.centred, stored, self.readable)
        cancel_norms(model, self.cancelled)
        guard_adapters(model, plan, self.parameters, planned.plan)
        return model

    def _stored_dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which the files hold a parameter, or float64 if they hold none."""
        tensors = self.planned.checkpoint.tensors
        found = [tensors[name].dtype for name in self.planned.stored.views(parameter) if name in tensors]
        return TORCH_DTYPES.get(found[0], torch.float64) if found else torch.float64


def _centred(planned: PlannedCheckpoint) -> Centred:
    """What the config says is centred. Raises `InputError` if that is not in the model."""
    where = planned.checkpoint.folder / CONFIG_FILE
    centred = listed_centred(planned.checkpoint.config, where)
    modules, parameters = dict(planned.model.named_modules()), dict(planned.model.named_parameters())
    unknown = [name for name in centred.norms if name not in modules]
    unknown += [
        one.name
        for one in centred.writers
        if one.name not in parameters or not 0 <= one.axis < parameters[one.name].dim()
    ]
    if unknown:
        raise InputError(
            f"{where}: expected {CONFIG_KEY}.centred to name norms and weights of the model, found "
            f"{', '.join(unknown[:3])}; do config.json and the weights belong together?"
        )
    if not centred.norms:
        return centred
    found = centring.confirmed(planned.model, centred)
    _warn_of_code(len(centred.norms) - len(found.norms), "LayerNorms subtract the mean")
    return found


def _cancelled(planned: PlannedCheckpoint) -> Cancelled:
    """What the config says is not computed. Raises `InputError` if that is not in the model."""
    where = planned.checkpoint.folder / CONFIG_FILE
    cancelled = listed_cancelled(planned.checkpoint.config, where)
    modules = dict(planned.model.named_modules())
    named = [*cancelled.norms, *(one.norm for ends in cancelled.norms.values() for one in ends)]
    if unknown := [name for name in named if name not in modules]:
        raise InputError(
            f"{where}: expected {CONFIG_KEY}.cancelled to name norms of the model, found {', '.join(unknown[:3])}; do "
            "config.json and the weights belong together?"
        )
    if not cancelled.norms:
        return cancelled
    found = cancelling.confirmed(planned.model, cancelled)
    _warn_of_code(len(cancelled.norms) - len(found.norms), "norms are computed")
    return found


def _warn_of_code(count: int, consequence: str) -> None:
    if count:
        warnings.warn(
            f"{count} {consequence}, although config.json says that they need not: the model's code is another one "
            f"than when it was converted, or config.json was changed (transformers {transformers.__version__})",
            stacklevel=2,
        )


def use_kernels(model: PreTrainedModel) -> str | None:
    """Put the fused kernels into a model that they support.

    Returns:
        Why not, if the machine or an installed package lacks what the kernels need; None if they run the model or do
        not support it.
    """
    try:
        from flashnorm.cpu.fused import NoKernelsError
        from flashnorm.models.optimize import optimize_if_supported
    except ImportError as error:  # a name that the kernels' runtime imports from another package is gone
        return f"the fused kernels do not fit transformers {transformers.__version__} ({error})"
    refusal = optimize_if_supported(model)
    return str(refusal) if isinstance(refusal, NoKernelsError) else None


def warn_of_plain(reason: str | None) -> None:
    """Warn the caller's caller that a model runs in plain PyTorch, if `use_kernels` returned a reason."""
    if reason is not None:
        warnings.warn(f"the model runs in plain PyTorch: {reason}", stacklevel=3)


def _load(
    folder: Path, base: Any, norms: dict[str, float], tensors: Sequence[str], readable: Collection[str], **kwargs: Any
) -> PreTrainedModel:
    constants: dict[str, float] = {}

    class WithoutNormWeights(base):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            constants.update(make_weightless(self, norms, readable))

    # With --keep-norms the files hold the folded norms' identity values, for which the model has no parameter any more.
    ignore_stored(WithoutNormWeights, tensors)
    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(WithoutNormWeights, attribute, getattr(base, attribute))
    model = load_all(WithoutNormWeights, folder, **kwargs)
    model.__class__ = base
    for name, value in constants.items():
        model.get_buffer(name).fill_(value)
    return model


def load_all(base: Any, folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Load a folder by a class's `from_pretrained`, and require every weight that the class has.

    Raises:
        InputError: weights are absent, or Transformers cannot load them.
        OSError: the disk is full to which weights are offloaded.
    """
    try:
        model, info = base.from_pretrained(folder, output_loading_info=True, **kwargs)
    except Exception as error:  # a config and weights that do not fit each other can raise anything
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # the caller knows where weights are offloaded to
        raise InputError(
            f"{folder}: expected a checkpoint that Transformers loads, found that it fails: {type(error).__name__}: "
            f"{brief(error)}"
        ) from error
    if absent := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder}: expected every weight but those of folded norms, found {len(absent)} absent: "
            f"{', '.join(absent[:3])}; the checkpoint is damaged: fetch or convert it again"
        )
    return model


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, subfolder: str = "", trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a checkpoint.

    Args:
        source: a folder or a hub id.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the model's folder, relative to the source's.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        InputError: the checkpoint has no tokenizer that Transformers can read.
    """
    folder = local_folder(source, revision, subfolder)
    # Checked here, because Transformers makes an empty tokenizer of the model's type if there are no files.
    if not any(file.match(pattern) for file in folder.iterdir() for pattern in _TOKENIZER_FILES):
        raise InputError(f"{folder}: expected a tokenizer, found none; copy its files from the source")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files can raise anything
        raise InputError(
            f"{folder}: expected a tokenizer, found none that can be read ({brief(error)}); code that comes with the "
            "checkpoint is run with --trust-remote-code only"
        ) from error
