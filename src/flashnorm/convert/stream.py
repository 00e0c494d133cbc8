"""Converts a checkpoint from hub to hub, shard by shard, on a disk that need not hold the model.

* A shard is fetched, folded, verified, uploaded and dropped. While one is uploaded, the next is folded, and one more is
  fetched, as far as there is room: the disk never holds more than `_SHARDS` shards.
* A shard is verified before it is uploaded, by the code of `flashnorm verify` and as the disk has it: later, neither it
  nor its source is here. What is uploaded must have the hash of what was verified.
* The repository changes by one commit at the end. Until then, the hub has the shards under their hashes alone.
* A journal says which shards are uploaded, and what was found in them, so that a repeated run continues. In place of a
  dropped shard, a stand-in of its size has its header and its norms, and takes no room.
"""

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flashnorm.convert.acceptance import check_config, check_plan
from flashnorm.convert.job import Job, ProgressCallback
from flashnorm.convert.on_hub import HubCheckpoint, open_whole
from flashnorm.convert.part import Done, write_part
from flashnorm.convert.result import ConvertResult, check_free_space, result_of
from flashnorm.errors import DifferenceError, InputError
from flashnorm.files.ahead import ahead
from flashnorm.files.header import read_header
from flashnorm.files.reader import Checkpoint, FileState
from flashnorm.files.staging import ShardRecord, Staging, disk_errors, write_file
from flashnorm.hub import Publication, check_login, commit_of, download, on_hub
from flashnorm.plan import Kept
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.verify.conversion import Conversion, Size
from flashnorm.verify.findings import Findings
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.part import Compared, Part, compare_part, total
from flashnorm.verify.report import VerifyReport
from flashnorm.verify.summary import card_summary
from flashnorm.verify.weights import PROBLEMS_IN_FULL, WeightsReport, check_norms, pairs_of, weights_report

_SHARDS = 3  # one that is uploaded and two for one that is folded; or for one that is folded, and the next one

_LOG = logging.getLogger(__name__)

_NOT_RUN = (
    "the weights were verified shard by shard as they passed, so there was no whole model to run; "
    "`flashnorm verify SOURCE THIS_FOLDER` runs both"
)


def stream(
    source: str | Path,
    repository: str,
    place: Path,
    plan: Callable[[Checkpoint], PlannedCheckpoint],
    *,
    revision: str | None = None,
    subfolder: str = "",
    keep_norms: bool = False,
    private: bool | None = None,
    progress: ProgressCallback = lambda done, total: None,
    stage: Callable[[str], object] = lambda words: None,
) -> ConvertResult:
    """Convert a checkpoint on the hub into another repository, on a disk with room for three shards.

    Args:
        source: the checkpoint's hub id.
        repository: hub id of the repository to upload to, which is made if it does not exist.
        place: the working folder lies beside this path, at which nothing appears.
        plan: plans the source: `plan_checkpoint` with its options.
        revision, subfolder, keep_norms, private: as for `convert`.
        progress: called with the bytes of the shards that are uploaded, and of all shards.
        stage: called with a few words when another stage begins.

    Raises:
        InputError: the source cannot be used, the disk has no room, or the hub fails. A repeated run continues with the
            shards that are uploaded.
        DifferenceError: the result is not what source and plan make of it. The repository stays as it was.
    """
    started = time.monotonic()
    if not on_hub(source):
        raise InputError(
            f"{source}: expected the hub id of a repository, whose shards are fetched one at a time, found a folder or "
            "nothing; a folder is converted without --stream"
        )
    if os.path.lexists(place):
        raise InputError(
            f"{place}: expected nothing there, as with --stream a working folder beside it is all that is written, "
            "found it exists; name another OUT"
        )
    check_login(repository)
    commit = commit_of(str(source), revision)
    with tempfile.TemporaryDirectory(prefix="flashnorm-") as folder, _errors_about(str(source), folder):
        checkpoint = open_whole(str(source), commit, subfolder, Path(folder))
        check_config(checkpoint)
        planned = plan(checkpoint)
        check_plan(planned)
        job = Job(planned, keep_norms, str(source), commit)
        place = Path(os.path.abspath(place))
        key = job.key() | {"from": checkpoint.place, "to": repository}
        with disk_errors(place), Staging(place, key) as staging:
            prefix = f"{subfolder}/" if subfolder else ""

            def fetch(name: str, folder: Path, advance: Callable[[float | None], object]) -> Path:
                return download(str(source), commit, prefix + name, folder, advance)

            publication = Publication(repository, private)
            publication.make()
            work = _Stream(str(source), job, staging, checkpoint, fetch, publication)
            work.shards(progress)
            stage("comparing")
            report = work.finish()
            if not report.ok:
                raise DifferenceError(report.verdict, report)
            job.add_to_card(staging, card_summary(report))
            stage("uploading")
            pushed = work.publish()
            staging.discard()
    return result_of(job, None, started, report=report, pushed=pushed)


@contextmanager
def _errors_about(source: str, folder: str) -> Iterator[None]:
    """Errors name the source, and not the folder that stands for it."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(folder, source)) from error


@dataclass(frozen=True)
class _Folded:
    """A shard that is folded and verified, or must be folded again as `done` says."""

    name: str
    done: Done
    compared: Compared


@dataclass
class _Stream:
    name: str
    job: Job
    staging: Staging
    source: HubCheckpoint
    download: Callable[[str, Path, Callable[[float | None], object]], Path]
    publication: Publication

    def __post_init__(self) -> None:
        self._fetched = self.staging.folder / "fetched"
        self._verified = self.staging.folder / "verified"
        self._compared: dict[str, Compared] = {}

    def shards(self, progress: ProgressCallback) -> None:
        """Fetch, fold, verify and upload the shards that an earlier run has not uploaded."""
        job, staging = self.job, self.staging
        self._verified.mkdir(exist_ok=True)
        job.keep({norm: Kept.from_dict(kept) for norm, kept in staging.notes.items()})
        for name in job.headers:
            self._take_up(name)
        largest = max(*(header.size for header in job.checkpoint.headers.values()), *job.sizes.values())
        small = sum((job.checkpoint.folder / name).stat().st_size for name in job.copies)
        missing = [name for name in job.headers if name not in job.written]
        check_free_space(staging.target.parent, min(_SHARDS, 2 * len(missing)) * largest + small)
        while missing:
            progress(sum(job.sizes[name] for name in job.written), sum(job.sizes.values()))
            self._make_room(missing)
            with _pipeline(self, missing, _Room(_SHARDS * largest)) as folded:
                for one in folded:
                    if one.done.too_large:
                        # The shards before it are uploaded, as in one process they would be written.
                        job.keep_too_large(one.done, staging)
                        break
                    self._check(one)
                    with _logged("upload", one.name):
                        self.publication.upload(one.name, staging.model / one.name, one.done.record.output)
                    self._finish(one)
                    progress(sum(job.sizes[name] for name in job.written), sum(job.sizes.values()))
            missing = [name for name in job.headers if name not in job.written]

    def _make_room(self, missing: Sequence[str]) -> None:
        """Remove what an earlier pipeline has left, but what it has fetched of the shard that comes first."""
        keep = (missing[0], self.source.sha256.get(missing[0], missing[0]))
        for path in self._fetched.rglob("*"):
            if path.is_file() and not any(part in path.name for part in keep):
                path.unlink()
        for name in missing:
            (self.staging.model / name).unlink(missing_ok=True)
        for path in self.staging.attempts.iterdir():
            path.unlink()

    def fetch(self, name: str, advance: Callable[[float | None], object]) -> None:
        """Fetch a shard of the source, in the place of its stand-in."""
        with _logged("fetch", name):
            path = self.download(name, self._fetched, advance)
        stand_in = self.source.folder / name
        stand_in.unlink(missing_ok=True)
        stand_in.symlink_to(path)
        self.source.whole.add(name)

    def fold(self, name: str) -> _Folded:
        """Fold and verify a shard that is fetched, and drop its source."""
        with _logged("fold", name):
            done = write_part(self.job.part(name, self.staging), lambda path, nbytes: None)
        path = self.source.folder / name
        if (expected := self.source.sha256.get(name)) not in (None, done.record.source.sha256):
            path.resolve().unlink()
            raise InputError(
                f"{self.source.place}/{name}: expected a file with the SHA-256 {expected}, as the hub says, found "
                f"{done.record.source.sha256}; run the same command again, which fetches it again"
            )
        compared = Compared()
        if not done.too_large:
            assert done.attempt is not None
            self.staging.take(done.attempt, name)
            with _logged("verify", name):
                compared = self._verify(name)
        self.source.whole.discard(name)
        path.resolve().unlink()
        path.unlink()
        return _Folded(name, done, compared)

    def _verify(self, name: str) -> Compared:
        """Compare a shard, as the disk has it, with its source."""
        path = self.staging.model / name
        header = read_header(path)
        written = Checkpoint(path.parent, {}, {name: header}, header.tensors, None, {name: FileState.of(path)})
        tensors = self.job.tensors.about(self.job.checkpoint.headers[name].tensors)
        source = self.job.checkpoint.part([name], tensors.read)
        findings = Findings(PROBLEMS_IN_FULL)
        pairs = pairs_of(source, written, tensors, findings)
        check_norms(written, tensors, findings, source)
        compared = compare_part(Part(source, written, tuple(pairs), tensors))
        return compared + Compared(tensors=tuple(findings.kept))

    def _check(self, one: _Folded) -> None:
        """Refuse to upload a shard that is not what its source and the plan make of it."""
        findings = (*one.compared.tensors, *one.compared.biases)
        if findings:
            weights = WeightsReport(0, 0, 0, 0, 0, 0, 0.0, findings[:PROBLEMS_IN_FULL], len(findings))
            report = self.report(weights)
            raise DifferenceError(report.verdict, report)

    def _finish(self, one: _Folded) -> None:
        """Note that a shard is uploaded, and drop it."""
        name, record = one.name, one.done.record
        noted = {"output": asdict(record.output), "compared": one.compared.to_dict()}
        write_file(self._verified / f"{name}.json", json.dumps(noted).encode())
        self.staging.record(name, record)
        self._take(name, record, one.compared)

    def _take_up(self, name: str) -> None:
        """Take over a shard that an earlier run has uploaded."""
        record = self.staging.earlier(name)
        if record is None:
            return
        # What is not there, or is damaged, is done again.
        with suppress(InputError, OSError, ValueError, KeyError, TypeError):
            noted = json.loads((self._verified / f"{name}.json").read_bytes())
            if noted["output"] == asdict(record.output):
                self._take(name, record, Compared.from_dict(noted["compared"]))
                self.job.resumed.add(name)

    def _take(self, name: str, record: ShardRecord, compared: Compared) -> None:
        _leave_stand_in(self.staging.model / name, self.job.tensors.norms.keys())
        self._compared[name] = compared
        self.job.read[name], self.job.written[name] = record.source, record.output

    def finish(self) -> VerifyReport:
        """Write the small files, and put together what was found of all shards and is found of these files."""
        started = time.monotonic()
        self.job.write_small_files(self.staging)
        result = Checkpoint.open(self.staging.model)
        planned = self.job.planned
        findings = Findings(PROBLEMS_IN_FULL)
        pairs = pairs_of(planned.checkpoint, result, planned.tensors, findings)
        compared = total(self._compared[name] for name in self.job.headers)
        return self.report(weights_report(planned, result, pairs, findings, compared, started), result)

    def report(self, weights: WeightsReport, result: Checkpoint | None = None) -> VerifyReport:
        """The whole report; `result` is what was written, if it is complete. The models were not run."""
        planned = self.job.planned
        before, nothing = Size.of(planned.checkpoint, planned.tensors), Size(0, 0, 0, 0)
        whole = Conversion(planned.plan, before, nothing) if result is None else Conversion.of(planned, result)
        outputs = OutputsReport(skipped=_NOT_RUN)
        return VerifyReport(self.name, self.publication.repository, whole, weights, outputs)

    def publish(self) -> str:
        """Make the one commit. Returns the address of the repository."""
        small = {name: self.staging.model / name for name in self.job.written if name not in self.job.headers}
        shards = {name: self.job.written[name] for name in self.job.headers}
        try:
            return self.publication.commit(small, shards)
        except InputError as error:
            raise InputError(
                f"{error}; all shards are uploaded, and the same command commits them; if the hub says that it does "
                f"not have them any more, remove {self.staging.folder} to upload them again"
            ) from error


class _Room:
    """Room on the disk, in bytes."""

    def __init__(self, nbytes: int) -> None:
        self._free = nbytes
        self._changed = threading.Condition()
        self._closed = False

    def take(self, nbytes: int) -> None:
        """Wait until there is so much room. Raises `InputError` if there will be none, as the work has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free >= nbytes)
            self.check_open()
            self._free -= nbytes

    def check_open(self) -> None:
        """Raise `InputError` if the work has ended."""
        if self._closed:
            raise InputError("the conversion has ended")

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._free += nbytes
            self._changed.notify_all()

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Whoever waits for room that this block was to give must not wait for ever, nor fetch what nobody needs."""
        try:
            yield
        except BaseException:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            raise


@contextmanager
def _pipeline(work: _Stream, names: Sequence[str], room: _Room) -> Iterator[Iterator[_Folded]]:
    """The shards, folded and verified, in their order; the consumer uploads one before it asks for the next.

    All room is taken in the order of the shards, by one thread, so that a shard never waits for one after it. A folded
    shard gives its room back when the consumer asks for the next one.
    """
    sizes = {name: (work.job.checkpoint.headers[name].size, work.job.sizes[name]) for name in names}

    def fetched() -> Generator[str, None, None]:
        with room.closed_on_error():
            for name in names:
                source, output = sizes[name]
                room.take(source)
                work.fetch(name, lambda nbytes: room.check_open())
                room.take(output)
                yield name

    def folded() -> Generator[_Folded, None, None]:
        with closing(ahead(fetched(), 2)) as ready, room.closed_on_error():
            for name in ready:
                one = work.fold(name)
                room.give(sizes[name][0])
                yield one

    def uploaded() -> Generator[_Folded, None, None]:
        with closing(ahead(folded(), 2)) as ready, room.closed_on_error():
            for one in ready:
                yield one
                room.give(sizes[one.name][1])

    with closing(uploaded()) as shards, room.closed_on_error():
        yield shards


def _leave_stand_in(path: Path, norms: Set[str]) -> None:
    """Replace a shard by a file of its size that has its header and its norms, and takes no other room."""
    header = read_header(path)
    new = path.with_name(f".{path.name}.stand-in")
    with path.open("rb") as shard, new.open("wb") as file:
        file.write(shard.read(header.data_start))
        for name in norms & header.tensors.keys():
            info = header.tensors[name]
            shard.seek(info.start)
            file.seek(info.start)
            file.write(shard.read(info.nbytes))
        file.truncate(header.size)
    new.replace(path)


@contextmanager
def _logged(what: str, name: str) -> Iterator[None]:
    """Say when a stage of a shard begins and ends."""
    _LOG.debug("%s %s begins", what, name)
    try:
        yield
    finally:
        _LOG.debug("%s %s ends", what, name)
