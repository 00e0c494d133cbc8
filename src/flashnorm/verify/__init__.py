"""Is a converted checkpoint the same model as its source? Bit for bit in its weights, and in what it computes.

Without the source, `integrity.py` says what can be said.
"""

from collections.abc import Callable
from pathlib import Path
from typing import overload

from flashnorm.acceptance import check_dtypes, check_shapes
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.checkpoint.source_files import open_file
from flashnorm.errors import InputError
from flashnorm.hub import local_folder
from flashnorm.planning import plan_checkpoint
from flashnorm.verify.conversion import Conversion
from flashnorm.verify.integrity import IntegrityReport, verify_integrity
from flashnorm.verify.outputs import OutputsReport, verify_outputs
from flashnorm.verify.range import without_too_large
from flashnorm.verify.report import VerifyReport
from flashnorm.verify.weights import WeightsReport, verify_weights

__all__ = [
    "IntegrityReport",
    "OutputsReport",
    "VerifyReport",
    "WeightsReport",
    "verify",
    "verify_integrity",
    "verify_outputs",
    "verify_weights",
]


@overload
def verify(
    model: str | Path,
    out: str | Path,
    *,
    weights_only: bool = ...,
    text: str | Path | None = ...,
    progress: Callable[[int, int], object] | None = ...,
    stage: Callable[[str], object] | None = ...,
    trust_remote_code: bool = ...,
) -> VerifyReport: ...


@overload
def verify(
    model: str | Path,
    out: str | Path | None = None,
    *,
    weights_only: bool = ...,
    text: str | Path | None = ...,
    progress: Callable[[int, int], object] | None = ...,
    stage: Callable[[str], object] | None = ...,
    trust_remote_code: bool = ...,
) -> VerifyReport | IntegrityReport: ...


def verify(
    model: str | Path,
    out: str | Path | None = None,
    *,
    weights_only: bool = False,
    text: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    stage: Callable[[str], object] | None = None,
    trust_remote_code: bool = False,
) -> VerifyReport | IntegrityReport:
    """Compare a converted checkpoint with its source; or, given it alone, check what can be checked without one.

    Args:
        model: folder or hub id of the source, or of the converted checkpoint if that is all there is.
        out: folder of the converted checkpoint; None to check `model` alone, with `weights_only`.
        weights_only: do not run the models.
        text: what to run them on: a text, or the path of a file that holds it; None for the one in the package.
        progress: called with the bytes of weights compared so far, and in all; then, in each run, used so far.
        stage: called with a few words on what is being run, before each run of a model.
        trust_remote_code: run code that the checkpoints carry.

    Raises:
        InputError: one of the two is no readable checkpoint, the source's model cannot be planned, the text file
            cannot be read, or outputs are to be compared with those of a source that is not given.
    """
    if out is None:
        if not weights_only:
            raise InputError(
                f"{model}: expected a source and its conversion, found one folder; give both, or check the converted "
                "one alone, as far as that goes, with --weights-only (weights_only=True)"
            )
        return verify_integrity(model, progress=progress, trust_remote_code=trust_remote_code)
    if isinstance(text, Path):
        text = _read_text(text)
    folder, converted = local_folder(model), Path(out)
    original, result = Checkpoint.open(folder), Checkpoint.open(converted)
    # The plan is made afresh; only whether the head was untied is taken from the result, and it is checked against it.
    untie = _untied(result) and not _untied(original)
    plan, names = plan_checkpoint(original, untie=untie, trust_remote_code=trust_remote_code)
    plan, names = without_too_large(original, result, plan, names)
    check_shapes(original, names)
    check_dtypes(original, names)
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
        try:
            outputs = verify_outputs(
                folder,
                converted,
                text=text,
                trust_remote_code=trust_remote_code,
                stage=stage or (lambda words: None),
                progress=progress or (lambda done, total: None),
            )
        except InputError as error:
            if weights.ok:
                raise
            # The weights are other ones than they must be, and this is what comes of it.
            outputs = OutputsReport(skipped=f"a model could not be run ({error})")
    conversion = Conversion.of(original, result, plan, names)
    return VerifyReport(str(model), str(converted), conversion, weights, outputs)


def _read_text(path: Path) -> str:
    try:
        with open_file(path) as file:
            return file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file in UTF-8, cannot read it ({error})") from error


def _untied(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("tie_word_embeddings") is False
