"""Converts a checkpoint, by its fold plan, to a FlashNorm checkpoint.

* Streaming: each byte of the source is read once, and each byte of the output is written once. Only a tensor that is
  untied and the weight of a linear layer whose bias takes a norm's bias are read twice; so is everything, if the result
  is verified.
* Only folding shows whether a product is too large for its dtype. If one is, the norm is kept after all, and the shards
  that this changes are written again.
* All or nothing: a source or target is refused before anything is written, and the target appears by one rename.
* A conversion can be verified before the target appears (`verify=True`): the model card then says what was found.
* A run that was interrupted can be continued, and ends with the same bytes as an uninterrupted run.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path

from flashnorm.convert.acceptance import check_config, check_places, check_plan, form_of
from flashnorm.convert.all_shards import write_shards
from flashnorm.convert.job import Job, ProgressCallback
from flashnorm.convert.result import ConvertResult, check_free_space, result_of
from flashnorm.errors import DifferenceError, InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.files.staging import Staging, check_target, disk_errors
from flashnorm.hub import check_login, hub_identity, local_folder
from flashnorm.planning.planned import PlannedCheckpoint, plan_checkpoint
from flashnorm.workers import team

__all__ = ["ConvertResult", "ProgressCallback", "convert", "convert_checkpoint"]


def convert(
    source: str | Path,
    target: str | Path | None = None,
    *,
    revision: str | None = None,
    subfolder: str = "",
    keep_norms: bool = False,
    untie: bool = False,
    keep: Sequence[str] = (),
    center: bool = False,
    cancel: str | None = None,
    force: bool = False,
    verify: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    stream: bool = False,
    trust_remote_code: bool = False,
    executor: Executor | None = None,
    workers: int | None = 1,
    progress: ProgressCallback | None = None,
    stage: Callable[[str], object] = lambda words: None,
) -> ConvertResult:
    """Trace a checkpoint's model and write its FlashNorm version; see `convert_checkpoint`.

    Args:
        source: the checkpoint's folder, or its hub id.
        target: the folder to write. With `stream`, it may be left out: the working folder lies beside it, or in the
            current folder, and nothing appears at it.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the model's folder, relative to the source's.
        keep_norms: keep folded norm tensors, at their identity value, instead of leaving them out.
        untie: give a tied model a head of its own, so that its final norm folds as well.
        keep: shell patterns for norms that are not to be folded, or "final"; see `flashnorm.planning.keep`.
        center: subtract the mean of everything that writes into the inputs of LayerNorms, so that these are RMSNorms,
            where that is possible; see `flashnorm.removable`.
        cancel: "exact" or "drop": norms whose divisions cancel are not computed. The `eps` of the norms behind them
            becomes exact, or stays as it is.
        force: replace a target that exists, if everything in it is what `convert` wrote, unchanged.
        verify: compare the result with the source before it appears at the target, as `flashnorm.verify` does, and put
            a summary into its model card.
        push_to_hub: hub id of the repository to upload the result to; see `flashnorm.push`.
        private: whether that repository is made private, if it does not exist; None for the owner's default.
        stream: convert from hub to hub, for a model that the disk does not hold: a shard is fetched, folded, verified,
            uploaded and dropped while the next one comes, and the repository changes by one commit at the end. Needs
            `push_to_hub` and room for three shards. See `flashnorm.convert.stream`.
        trust_remote_code: whether code in the checkpoint's folder may run.
        executor: any executor of `concurrent.futures`, such as that of dask.distributed, whose workers then write a
            shard each, and verify one each. They need this version of flashnorm, and source and target by the same
            paths.
        workers: how many processes of this machine to start instead (then guard a script's main part with
            `if __name__ == "__main__":`); 1 for this process alone, None for what the machine allows and the model's
            size is worth.
        progress: called while an old target is read, while weights are written, and while they are verified.
        stage: called with a few words when another of these stages begins.

    Raises:
        InputError: the source or the target cannot be used, or the disk is full; or the result cannot be uploaded, and
            then stays at the target.
        DifferenceError: with `verify`, the result is not the same model. The target is then left as it was.
    """
    plan = partial(
        plan_checkpoint,
        untie=untie,
        keep=keep,
        center=center,
        cancel=form_of(cancel),
        trust_remote_code=trust_remote_code,
    )
    if stream:
        from flashnorm.convert.stream import stream as convert_stream

        if push_to_hub is None:
            raise InputError("expected a repository to upload to with --stream, found none; add --push-to-hub")
        if force or verify or executor is not None or workers not in (1, None):
            raise InputError(
                "expected no --force, --verify or workers with --stream, found one of them: there is no folder to "
                "replace, each shard is verified anyway, and one process keeps up with the network"
            )
        return convert_stream(
            source,
            push_to_hub,
            Path(push_to_hub.replace("/", "--") if target is None else target),
            plan,
            revision=revision,
            subfolder=subfolder,
            keep_norms=keep_norms,
            private=private,
            progress=progress or (lambda done, total: None),
            stage=stage,
        )
    if target is None:
        raise InputError(f"{source}: expected a folder to write, found none; only --stream needs none")
    if push_to_hub is not None:
        check_login(push_to_hub)
    checkpoint = Checkpoint.open(local_folder(source, revision, subfolder))
    # The checks that need no model come before a model is built.
    check_config(checkpoint)
    check_places(checkpoint.folder, Path(target))
    check_target(Path(target), force=force)
    report = None

    def proof(staged: Path) -> str:
        nonlocal report
        from flashnorm.verify.summary import card_summary
        from flashnorm.verify.whole import verify as compare

        stage("comparing weights")
        compared = compare(
            checkpoint.folder,
            staged,
            executor=executor,
            progress=progress,
            stage=stage,
            trust_remote_code=trust_remote_code,
        )
        report = replace(compared, source=str(source), converted=str(target))
        if not report.ok:
            raise DifferenceError(report.verdict, report)
        return card_summary(report)

    size, parts = checkpoint.total_size, len(checkpoint.headers)
    with team(executor, workers, parts, size, "flashnorm.convert.part") as executor:
        result = convert_checkpoint(
            plan(checkpoint),
            target,
            keep_norms=keep_norms,
            force=force,
            proof=proof if verify else None,
            executor=executor,
            progress=progress,
            stage=stage,
        )
    result = replace(result, report=report)
    if push_to_hub is None:
        return result
    from flashnorm.convert.push import push

    stage("uploading")
    return replace(result, pushed=push(target, push_to_hub, private=private))


def convert_checkpoint(
    planned: PlannedCheckpoint,
    target: str | Path,
    *,
    keep_norms: bool = False,
    force: bool = False,
    source_id: str | None = None,
    revision: str | None = None,
    proof: Callable[[Path], str] | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
    stage: Callable[[str], object] = lambda words: None,
) -> ConvertResult:
    """Write the FlashNorm version of a checkpoint.

    Args:
        planned: the source. Its plan goes into the manifest; its plan by tensors is carried out.
        target: the folder to write.
        keep_norms: keep folded norm tensors, at their identity value, instead of leaving them out.
        force: replace a target that exists, if everything in it is what `convert` wrote, unchanged.
        source_id, revision: hub id and commit of the source; by default, those that its path in the hub's cache tells.
        proof: called with the folder of the complete result before it is published. The text that it returns goes to
            the end of the model card. If it raises an error, the error is passed on and nothing is published.
        executor: what runs the workers that write the shards, see `convert`; None for this process.
        progress: called while an old target is read, and while weights are written.
        stage: called with a few words when another of these stages begins.

    Raises:
        InputError: the source or the target cannot be used, or the disk is full. Finished shards are left for the next
            run to continue with; if there are none, nothing is left.
    """
    started = time.monotonic()
    target, checkpoint = Path(os.path.abspath(target)), planned.checkpoint
    check_config(checkpoint)
    check_plan(planned)
    check_places(checkpoint.folder, target)
    check_target(target, force=force)
    if source_id is None:
        source_id, revision = hub_identity(checkpoint.folder)
    job = Job(planned, keep_norms, source_id, revision)
    if force:
        stage("reading the old target")
    with disk_errors(target), Staging(target, job.key(), force=force, progress=progress) as staging:
        if force:
            stage("converting")
        copied = sum((checkpoint.folder / name).stat().st_size for name in job.copies)
        check_free_space(target.parent, sum(job.sizes.values()) + copied - staging.resumable_bytes())
        write_shards(job, staging, progress or (lambda done, total: None), executor)
        job.write_small_files(staging)
        if proof is not None:
            try:
                job.add_to_card(staging, proof(staging.model))
            except DifferenceError:
                staging.forget()
                raise
        staging.publish()
    return result_of(job, target, started)
