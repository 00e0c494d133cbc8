"""One accepted conversion: its plan, what it has read and written, and which shards it must write again."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from flashnorm.convert.acceptance import check_plan
from flashnorm.convert.card import is_causal, updated_card
from flashnorm.convert.part import Done, Part, part_of
from flashnorm.convert.shards import output_header, output_tensors
from flashnorm.convert.small_files import updated_config, updated_index
from flashnorm.errors import InputError
from flashnorm.files.header import TensorInfo
from flashnorm.files.others import other_files
from flashnorm.files.reader import CONFIG_FILE, INDEX_FILE, Checkpoint, read_json
from flashnorm.files.records import file_record
from flashnorm.files.source_files import check_names_differ, open_file
from flashnorm.files.staging import ShardRecord, Staging, copy_file, write_file
from flashnorm.format import CARD_FILE, MANIFEST_FILE, Earlier, FileRecord, Manifest, is_marked, options
from flashnorm.plan import FoldPlan, Kept
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import TensorPlan
from flashnorm.version import __version__

# Called with the number of bytes that are done so far, and of all bytes.
ProgressCallback = Callable[[int, int], object]


@dataclass
class Job:
    """An accepted conversion: what it reads and writes, and the records of the files that it has read and written."""

    planned: PlannedCheckpoint
    keep_norms: bool
    source_id: str | None
    revision: str | None
    read: dict[str, FileRecord] = field(default_factory=dict)
    written: dict[str, FileRecord] = field(default_factory=dict)
    resumed: set[str] = field(default_factory=set)
    replaced: list[ShardRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lay_out()
        others = other_files(self.checkpoint)
        self.copies, self.left_out = list(others.belonging), others.left_out
        self.earlier = _earlier(self.checkpoint)
        card = [CARD_FILE] if os.path.lexists(self.checkpoint.folder / CARD_FILE) else []
        self.planned = replace(self.planned, checkpoint=self.checkpoint.with_states_of([*self.copies, *card]))
        made = [CONFIG_FILE, INDEX_FILE, CARD_FILE, MANIFEST_FILE, *self.headers]
        check_names_differ(self.checkpoint.folder, [*made, *self.copies])
        self.options = options(
            self.keep_norms,
            self.tensors.unties,
            self.planned.asked,
            bool(self.plan.centred.norms),
            self.plan.cancelled.form,
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""
        return self.planned.checkpoint

    @property
    def plan(self) -> FoldPlan:
        """What is folded. A product that is too large for its dtype may change the plan during the conversion."""
        return self.planned.plan

    @property
    def tensors(self) -> TensorPlan:
        """The same plan in the names of the source's tensors."""
        return self.planned.tensors

    def key(self) -> dict[str, object]:
        """What must be the same in an earlier run for its shards to be of use."""
        return {
            "flashnorm_version": __version__,
            "plan": self.plan.to_dict(),
            "names": asdict(self.tensors),
            "options": self.options,
            "source": {name: asdict(state) for name, state in self.checkpoint.states.items()},
        }

    def part(self, name: str, staging: Staging) -> Part:
        """The task of writing a shard, by the plan as it is now."""
        if name not in self._parts:
            self._parts[name] = part_of(self.checkpoint, self.tensors, name, self.keep_norms, staging)
        return self._parts[name]

    def take(self, name: str, done: Done, staging: Staging) -> None:
        """Take a written shard into the output."""
        if done.attempt is None:
            self.resumed.add(name)
        else:
            staging.take(done.attempt, name)
            staging.record(name, done.record)
        self.read[name], self.written[name] = done.record.source, done.record.output

    def keep_too_large(self, done: Done, staging: Staging) -> None:
        """Keep the norms that a shard cannot take, and forget the shards that this changes."""
        reasons = {self.tensors.parameters.get(norm, norm): kept for norm, kept in done.too_large.items()}
        self.replaced.append(done.record)
        try:
            outdated = self.keep(reasons)
        except InputError:
            staging.forget()
            raise
        staging.note({norm: kept.to_dict() for norm, kept in reasons.items()}, outdated)

    def keep(self, reasons: Mapping[str, Kept]) -> set[str]:
        """Keep norms (parameters) after all. Returns the shards whose contents this changes.

        Raises:
            InputError: nothing is left to fold.
        """
        before, self.planned = self.tensors, self.planned.keep(reasons)
        check_plan(self.planned)
        self._lay_out()
        outdated = {
            self.checkpoint.tensors[before.untied.get(name, name)].file for name in before.changed(self.tensors)
        }
        for shard in outdated & self.written.keys():
            record = ShardRecord(self.read.pop(shard), self.written.pop(shard))
            if shard in self.resumed:
                self.resumed.remove(shard)
            else:
                self.replaced.append(record)
        return outdated

    def _lay_out(self) -> None:
        """Find out what the output's shards hold, by the plan as it is now."""
        self._parts: dict[str, Part] = {}
        headers = self.checkpoint.headers.items()
        self.headers = {name: output_header(head, self.tensors, keep_norms=self.keep_norms) for name, head in headers}
        self.outputs = {name: output_tensors(head, self.tensors, keep_norms=self.keep_norms) for name, head in headers}
        self.sizes = {name: len(self.headers[name]) + _nbytes(self.outputs[name]) for name in self.headers}

    def write_small_files(self, staging: Staging) -> None:
        """Write everything but the weights. config.json comes last, as it makes a model of the folder."""
        folder = self.checkpoint.folder
        for name in self.copies:
            path = staging.model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.read[name] = self.written[name] = copy_file(folder / name, path)
        self._write(staging, CARD_FILE, self._card(summary=""))
        if self.checkpoint.index is not None:
            self._write(staging, INDEX_FILE, updated_index(self.checkpoint, self.outputs))
        self.read[CONFIG_FILE] = file_record(folder / CONFIG_FILE)
        config = updated_config(self.checkpoint, self.tensors, self.plan)
        self.written[CONFIG_FILE] = FileRecord.of(config)
        self.written[MANIFEST_FILE] = write_file(staging.model / MANIFEST_FILE, self._manifest())
        self.checkpoint.check_unchanged()
        write_file(staging.model / CONFIG_FILE, config)

    def add_to_card(self, staging: Staging, summary: str) -> None:
        """Put the summary of a verification into the model card."""
        self._write(staging, CARD_FILE, self._card(summary))
        self.written[MANIFEST_FILE] = write_file(staging.model / MANIFEST_FILE, self._manifest())

    def _write(self, staging: Staging, name: str, data: bytes) -> None:
        if name in self.checkpoint.states:
            self.read[name] = file_record(self.checkpoint.folder / name)
        self.written[name] = write_file(staging.model / name, data)

    def _card(self, summary: str) -> bytes:
        card = None
        if CARD_FILE in self.checkpoint.states:
            with open_file(self.checkpoint.folder / CARD_FILE) as file:
                card = file.read().decode("utf-8", "surrogateescape")
        card = updated_card(
            card,
            base_model=self.source_id,
            version=__version__,
            norms=len(self.plan.folds),
            linears=len(self.tensors.folds),
            centred=len(self.plan.centred.norms),
            cancelled=len(self.plan.cancelled.norms),
            keep_norms=self.keep_norms,
            generates=is_causal(self.checkpoint.config),
            summary=summary,
        )
        return card.encode("utf-8", "surrogateescape")

    def _manifest(self) -> bytes:
        written = {name: record for name, record in self.written.items() if name != MANIFEST_FILE}
        return Manifest(
            flashnorm_version=__version__,
            source_id=self.source_id,
            revision=self.revision,
            source_files=self.read,
            left_out=self.left_out,
            earlier=self.earlier,
            options=self.options,
            plan=self.plan,
            files=written,
        ).to_json()


def _earlier(source: Checkpoint) -> Earlier | None:
    """What the manifest of a source that was converted before says of that conversion; None without such a manifest."""
    path = source.folder / MANIFEST_FILE
    if not (is_marked(source.config) and os.path.lexists(path)):
        return None
    manifest = Manifest.from_dict(read_json(path, "remove it"), path)
    return manifest.earlier or Earlier(manifest.flashnorm_version, manifest.source_id, manifest.revision)


def _nbytes(tensors: list[tuple[str, TensorInfo]]) -> int:
    return sum(info.nbytes for _, info in tensors)
