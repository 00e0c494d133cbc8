"""Is a converted checkpoint the same model as its source? Bit for bit in its weights, and in what it computes."""

from collections.abc import Callable
from pathlib import Path

from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.errors import InputError
from flashnorm.hub import local_folder
from flashnorm.planning import plan_checkpoint
from flashnorm.verify.outputs import OutputsReport, verify_outputs
from flashnorm.verify.report import VerifyReport
from flashnorm.verify.weights import WeightsReport, verify_weights

__all__ = ["OutputsReport", "VerifyReport", "WeightsReport", "verify", "verify_outputs", "verify_weights"]


def verify(
    source: str | Path,
    converted: str | Path,
    *,
    weights_only: bool = False,
    text: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    stage: Callable[[str], object] | None = None,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Compare a converted checkpoint with its source.

    Args:
        source: folder or hub id of the original.
        converted: folder of the FlashNorm checkpoint.
        weights_only: do not run the models.
        text: what to run them on: a text, or the path of a file that holds it; None for the one in the package.
        progress: called with the bytes of weights compared so far, and in all; then, in each run, used so far.
        stage: called with a few words on what is being run, before each run of a model.
        trust_remote_code: run code that the checkpoints carry.

    Raises:
        InputError: one of the two is no readable checkpoint, the source's model cannot be planned, or the text file
            cannot be read.
    """
    if isinstance(text, Path):
        text = _read_text(text)
    folder, converted = local_folder(source), Path(converted)
    original, result = Checkpoint.open(folder), Checkpoint.open(converted)
    # The plan is made afresh; only whether the head was untied is taken from the result, and it is checked against it.
    untie = _untied(result) and not _untied(original)
    plan, names = plan_checkpoint(original, untie=untie, trust_remote_code=trust_remote_code)
    total = sum(info.nbytes for info in result.tensors.values())
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    weights = verify_weights(folder, converted, names, plan, advance=advance)
    outputs = None
    if not weights_only:
        outputs = verify_outputs(
            folder,
            converted,
            text=text,
            trust_remote_code=trust_remote_code,
            stage=stage or (lambda words: None),
            progress=progress or (lambda done, total: None),
        )
    return VerifyReport(source=str(source), converted=str(converted), weights=weights, outputs=outputs)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file in UTF-8, cannot read it ({error})") from error


def _untied(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("tie_word_embeddings") is False
