"""The plan that a conversion has followed, made again from its source: what belongs to the folded model needs it.

The folded model's own config says which norms it has folded. Without it, the plan is that of `convert` with the same
options. Then it is unknown which products would be too large for float16, as only the conversion finds that out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashnorm.arithmetic import exceeds_one, gain_of
from flashnorm.errors import InputError
from flashnorm.files.header import TORCH_DTYPES
from flashnorm.files.reader import Checkpoint
from flashnorm.format import listed_centred, listed_norms
from flashnorm.plan import Kept, Kind
from flashnorm.planning.planned import PlannedCheckpoint, plan_checkpoint


def plan_as_folded(
    checkpoint: Checkpoint,
    folded: tuple[Mapping[str, Any], str | Path] | None = None,
    *,
    untie: bool = False,
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> PlannedCheckpoint:
    """Plan a source as its conversion did.

    Args:
        checkpoint: the source.
        folded: the config of the FlashNorm version, and its path for messages; None if only the options are known.
        untie, keep: the options of the conversion, see `convert`; not used if `folded` is given.
        trust_remote_code: whether code that comes with the source may run.

    Raises:
        InputError: the source cannot be planned, or `folded` is no conversion of it.
    """
    if folded is None:
        return plan_checkpoint(checkpoint, untie=untie, keep=keep, trust_remote_code=trust_remote_code)
    config, where = folded
    listed = listed_norms(config, where)
    if listed is None:
        raise InputError(
            f"{where}: expected the config of a FlashNorm version, which lists its folded norms, found an ordinary one"
        )
    if listed_centred(config, where).norms:
        raise InputError(
            f"{where}: expected a FlashNorm version that has the means of its source, found one whose weights are "
            "centred (--center), which what belongs to the source does not fit; convert the source without --center"
        )
    untie = _untied(config) and not _untied(checkpoint.config)
    planned = plan_checkpoint(checkpoint, untie=untie, trust_remote_code=trust_remote_code)
    if unknown := sorted(set(listed) - planned.tensors.norms.keys()):
        raise InputError(
            f"{where}: expected a conversion of {checkpoint.folder}, found folded norms that this model does not fold: "
            f"{', '.join(unknown[:3])}; name the source that it was made from"
        )
    return planned.keep_all_but(listed, Kept("the FlashNorm version keeps it", kind=Kind.ASKED))


def undecided(planned: PlannedCheckpoint) -> dict[str, str]:
    """The norms whose products may be too large for float16: norm tensor -> why, in words.

    In wider dtypes no known model comes near the end.
    """
    checkpoint, tensors = planned.checkpoint, planned.tensors
    found: dict[str, str] = {}
    for tensor, fold in tensors.folds.items():
        if TORCH_DTYPES.get(checkpoint.tensors[tensors.untied.get(tensor, tensor)].dtype) is not TORCH_DTYPES["F16"]:
            continue
        for use in fold.gains:
            gain = gain_of(checkpoint.read_tensor(use.norm).flatten(), use.offset)
            if exceeds_one(gain).any():
                largest = float(gain.high.abs().max())
                words = f"its largest gain is {largest:g}, and a product in {tensor} may be too large for float16"
                found.setdefault(use.norm, words)
    return found


def _untied(config: Mapping[str, Any]) -> bool:
    return config.get("tie_word_embeddings") is False
