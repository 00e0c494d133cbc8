"""Is this checkpoint folded? Told by its config where that says so, else by which norms are absent or at identity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.names import CheckpointPlan
from flashnorm.checkpoint.reader import CONFIG_FILE, Checkpoint
from flashnorm.errors import InputError

CONFIG_KEY = "flashnorm"
CONFIG_VERSION = 1


def weightless_norms(checkpoint: Checkpoint, names: CheckpointPlan) -> dict[str, float] | None:
    """The norm tensors whose gains are folded, with their identity values; None for an ordinary checkpoint.

    A checkpoint whose config has our key says which. Without the key (the plain `flash_norm` flag of other engines, or
    no flag at all, as in the reference's checkpoints) it is folded if exactly the norms that the plan can fold are
    absent, or all of them are at their identity value.

    Args:
        checkpoint: the files.
        names: the plan of the checkpoint's own config, in the names of its tensors.

    Raises:
        InputError: only some of the norms are absent, a norm that is said to be folded has a gain, or the config's key
            cannot be read.
    """
    listed = listed_norms(checkpoint.config, checkpoint.folder / CONFIG_FILE)
    if listed is not None:
        unknown = [name for name in listed if name not in names.norms]
        if unknown:
            raise InputError(
                f"{checkpoint.folder / CONFIG_FILE}: expected {CONFIG_KEY}.weightless to name norms that fold, found "
                f"{', '.join(unknown[:3])}; do config.json and the weights belong together?"
            )
        norms = {name: names.norms[name] for name in listed}
        for name, identity in norms.items():
            if name in checkpoint.tensors and not (checkpoint.read_tensor(name) == identity).all():
                raise InputError(
                    f"{checkpoint.folder}: expected {name} at {identity:g}, because config.json says that it is "
                    "folded, found other values; the checkpoint is damaged: convert it again"
                )
        return norms
    absent = [name for name in names.norms if name not in checkpoint.tensors]
    present = [name for name in names.norms if name in checkpoint.tensors]
    if absent and not set(present) <= set(names.spelled_out):
        raise InputError(
            f"{checkpoint.folder}: expected all of {len(names.norms)} norms that can be folded, or none, found "
            f"{len(absent)} absent ({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}); the checkpoint is "
            "damaged: fetch or convert it again"
        )
    identical = all(bool((checkpoint.read_tensor(name) == names.norms[name]).all()) for name in present)
    return dict(names.norms) if names.norms and identical else None


def listed_norms(config: Mapping[str, Any], where: str | Path) -> list[str] | None:
    """The norm tensors that a config names as weightless; None if it does not have our key.

    Args:
        config: config.json, parsed.
        where: its place, for messages.

    Raises:
        InputError: the key holds something else, or is of another version.
    """
    entry: Any = config.get(CONFIG_KEY)
    if entry is None:
        return None
    names = entry.get("weightless") if isinstance(entry, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f'{where}: expected "{CONFIG_KEY}": {{"version": {CONFIG_VERSION}, "weightless": [...]}}, found something '
            "else; convert the source again"
        )
    if entry.get("version") != CONFIG_VERSION:
        raise InputError(
            f"{where}: expected version {CONFIG_VERSION} of the {CONFIG_KEY} key, found {entry.get('version')!r}; use "
            "the flashnorm release that wrote it"
        )
    return names
