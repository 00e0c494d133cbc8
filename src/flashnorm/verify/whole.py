"""Is a converted checkpoint the same model as its source? Compares the weights bit for bit, and the models' outputs.

`integrity.py` checks what can be checked without the source.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import overload

from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.hub import local_folder
from flashnorm.planning.checks import check_dtypes, check_shapes
from flashnorm.planning.planned import plan_checkpoint
from flashnorm.verify.conversion import Conversion
from flashnorm.verify.integrity import IntegrityReport, verify_integrity
from flashnorm.verify.manifest import patterns_to_keep, was_cancelled, was_centred
from flashnorm.verify.outputs import compare_outputs, verify_outputs
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.range import without_too_large
from flashnorm.verify.report import VerifyReport
from flashnorm.verify.returned import ReturnedReport
from flashnorm.verify.text import read_text
from flashnorm.verify.weights import WeightsReport, verify_weights
from flashnorm.workers import team

__all__ = [
    "IntegrityReport",
    "OutputsReport",
    "ReturnedReport",
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
    revision: str | None = ...,
    subfolder: str = ...,
    weights_only: bool = ...,
    text: str | Path | None = ...,
    progress: Callable[[int, int], object] | None = ...,
    stage: Callable[[str], object] | None = ...,
    trust_remote_code: bool = ...,
    executor: Executor | None = ...,
    workers: int | None = ...,
) -> VerifyReport: ...


@overload
def verify(
    model: str | Path,
    out: str | Path | None = None,
    *,
    revision: str | None = ...,
    subfolder: str = ...,
    weights_only: bool = ...,
    text: str | Path | None = ...,
    progress: Callable[[int, int], object] | None = ...,
    stage: Callable[[str], object] | None = ...,
    trust_remote_code: bool = ...,
    executor: Executor | None = ...,
    workers: int | None = ...,
) -> VerifyReport | IntegrityReport: ...


def verify(
    model: str | Path,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    subfolder: str = "",
    weights_only: bool = False,
    text: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    stage: Callable[[str], object] | None = None,
    trust_remote_code: bool = False,
    executor: Executor | None = None,
    workers: int | None = 1,
) -> VerifyReport | IntegrityReport:
    """Compare a converted checkpoint with its source, or check what can be checked without the source.

    Args:
        model: folder or hub id of the source, or of the converted checkpoint if `out` is None.
        out: folder of the converted checkpoint; None to check `model` alone, which requires `weights_only`.
        revision: branch, tag or commit of `model`, if that is a hub id; None for its main branch.
        subfolder: the folder of the model, relative to `model`.
        weights_only: do not run the models.
        text: the text to run the models on, or the path of a file that holds it; None for the package's own text.
        progress: called with the bytes of weights done so far and in total: first while weights are compared, then in
            each run of a model.
        stage: called before each run of a model with a few words that say what is run.
        trust_remote_code: run code that the checkpoints carry.
        executor: any executor of `concurrent.futures`, whose workers then compare the weights of a file each; see
            `flashnorm.convert`. The models run in this process.
        workers: how many processes of this machine to start instead; 1 for this process alone, None for what the
            machine allows and the weights are worth.

    Raises:
        InputError: a checkpoint cannot be read, the source's model cannot be planned, the text file cannot be read, a
            worker failed, or `out` is None without `weights_only`.
    """
    if out is None:
        if not weights_only:
            raise InputError(
                f"{model}: expected a source and its conversion, found one folder; give both, or check the converted "
                "one alone, as far as that goes, with --weights-only (weights_only=True)"
            )
        if executor is not None or workers not in (1, None):
            raise InputError(
                f"{model}: expected one process for a folder without its source, found workers; leave them out"
            )
        return verify_integrity(
            model, revision=revision, subfolder=subfolder, progress=progress, trust_remote_code=trust_remote_code
        )
    if isinstance(text, Path):
        text = read_text(text)
    original, result = Checkpoint.open(local_folder(model, revision, subfolder)), Checkpoint.open(out)
    # The plan is made afresh from the source. Whether the head was untied, which norms were to be kept and whether
    # weights are centred is read from the result, and checked against it.
    untie = _untied(result) and not _untied(original)
    keep = patterns_to_keep(result.folder)
    total = sum(info.nbytes for info in result.tensors.values())
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    parts = len(original.headers.keys() | result.headers.keys())
    size = original.total_size + result.total_size
    with team(executor, workers, parts, size, "flashnorm.verify.part") as executor:
        planned = plan_checkpoint(
            original,
            untie=untie,
            keep=keep,
            center=was_centred(result),
            cancel=was_cancelled(result),
            trust_remote_code=trust_remote_code,
        )
        planned = without_too_large(planned, result)
        check_shapes(original, planned.tensors)
        check_dtypes(original, planned.tensors)
        weights = verify_weights(planned, result, advance=advance, executor=executor)
    outputs = None
    if not weights_only:
        try:
            outputs = compare_outputs(
                original,
                # The plan of the result, not of the source, because everyone who loads the result uses this plan.
                plan_checkpoint(result, trust_remote_code=trust_remote_code),
                text=text,
                trust_remote_code=trust_remote_code,
                stage=stage or (lambda words: None),
                progress=progress or (lambda done, total: None),
            )
        except InputError as error:
            if weights.ok:
                raise
            # The weights are wrong, which is reported already; the failed run follows from that.
            outputs = OutputsReport(skipped=f"a model could not be run ({error})")
    conversion = Conversion.of(planned, result)
    return VerifyReport(str(model), str(Path(out)), conversion, weights, outputs)


def _untied(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("tie_word_embeddings") is False
