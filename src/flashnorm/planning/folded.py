"""Whether a checkpoint is folded: its config says so, or all norms that can fold are absent or at identity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashnorm.errors import InputError
from flashnorm.files.adapter import ADAPTER_CONFIG
from flashnorm.files.reader import CONFIG_FILE, Checkpoint, read_json
from flashnorm.format import ADAPTER_MARK, CONFIG_KEY, is_marked, listed_norms, names_folds
from flashnorm.planning.tensors import TensorPlan

_REMEDY = (
    "the model was trained since it was converted; `flashnorm convert` folds these norms, too (plain Transformers "
    "loads the checkpoint as it is)"
)


def weightless_norms(checkpoint: Checkpoint, tensors: TensorPlan) -> dict[str, float] | None:
    """The norm tensors whose gains are folded, with their identity values; None for an ordinary checkpoint.

    If the config has our key, it lists these norms. Without the key (with only the `flash_norm` flag of other engines,
    or with no flag, as in the reference's checkpoints), a checkpoint is folded if exactly the norms that the plan can
    fold are absent, or if all of them are at their identity value.

    Args:
        checkpoint: the files.
        tensors: the plan of the checkpoint's own config, in the names of its tensors.

    Raises:
        InputError: only some of the norms are absent, a norm that the config lists is not at its identity value, or the
            config's key cannot be read.
    """
    listed = listed_norms(checkpoint.config, checkpoint.folder / CONFIG_FILE)
    if listed is not None:
        unknown = [name for name in listed if name not in tensors.norms]
        if unknown:
            raise InputError(
                f"{checkpoint.folder / CONFIG_FILE}: expected {CONFIG_KEY}.weightless to name norms that fold, found "
                f"{', '.join(unknown[:3])}; do config.json and the weights belong together?"
            )
        norms = {name: tensors.norms[name] for name in listed}
        if trained := _trained(checkpoint, norms):
            raise InputError(
                f"{checkpoint.folder}: expected {trained[0]} at {norms[trained[0]]:g}, because config.json says that "
                f"it is folded, found other values in {len(trained)} such norms: {_REMEDY}"
            )
        return norms
    absent = [name for name in tensors.norms if name not in checkpoint.tensors]
    present = [name for name in tensors.norms if name in checkpoint.tensors]
    if absent and not set(present) <= set(tensors.spelled_out):
        raise InputError(
            f"{checkpoint.folder}: expected all of {len(tensors.norms)} norms that can be folded, or none, found "
            f"{len(absent)} absent ({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}); the checkpoint is "
            "damaged: fetch or convert it again"
        )
    identical = not _trained(checkpoint, tensors.norms)
    return dict(tensors.norms) if tensors.norms and identical else None


def trained_norms(checkpoint: Checkpoint, tensors: TensorPlan) -> list[str]:
    """The norm tensors that the config says are folded, but that have other values: the model was trained since.

    Plain Transformers gives each absent norm a weight at its identity value, which then can be trained, and is stored.

    Returns:
        The names; none if the config says nothing of the kind, or if one of these norms is absent.

    Raises:
        InputError: the config's key cannot be read.
    """
    if not is_marked(checkpoint.config):
        return []
    listed = listed_norms(checkpoint.config, checkpoint.folder / CONFIG_FILE)
    named = tensors.norms if listed is None else listed
    norms = {name: tensors.norms[name] for name in named if name in tensors.norms}
    return _trained(checkpoint, norms) if norms.keys() <= checkpoint.tensors.keys() else []


def of_folded_model(adapter: Mapping[str, Any]) -> str | None:
    """What shows that an adapter belongs to a folded model, in words; None if nothing does.

    Args:
        adapter: its adapter_config.json.

    Raises:
        InputError: the config of the folder that the adapter names as its base cannot be read.
    """
    if adapter.get(ADAPTER_MARK):
        return "one that is converted already"
    base = adapter.get("base_model_name_or_path")
    config = Path(base) / CONFIG_FILE if isinstance(base, str) else None
    if names_folds(adapter) or (config is not None and config.is_file() and is_marked(read_json(config))):
        return f"one of a folded model ({base!r})"
    return None


def check_unconverted(adapter: Checkpoint) -> None:
    """Refuse an adapter that belongs to a folded model already. Raises `InputError` if it does."""
    if (found := of_folded_model(adapter.config)) is not None:
        where = adapter.folder / ADAPTER_CONFIG
        raise InputError(f"{where}: expected an adapter of an ordinary model, found {found}; use it as it is")


def _trained(checkpoint: Checkpoint, norms: Mapping[str, float]) -> list[str]:
    """Those of some norm tensors that are stored with another value than the identity value that is given for them."""
    stored = (name for name in norms if name in checkpoint.tensors)
    return [name for name in stored if not bool((checkpoint.read_tensor(name) == norms[name]).all())]
