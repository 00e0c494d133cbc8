"""Some tensors of a converted checkpoint, compared as a task of its own: by this process or by any other.

* A task is plain data, and so is what comes of it. Results add up to the same, whoever found them and in which order.
* One process has one task. Workers have a task for each file, as a file is hashed from its first byte to its last.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flashnorm.files.reader import Checkpoint
from flashnorm.files.shared import check_shared
from flashnorm.planning.tensors import TensorPlan
from flashnorm.verify.biases import check_biases
from flashnorm.verify.findings import Finding
from flashnorm.verify.one_tensor import Pair
from flashnorm.verify.range import NO_UNDERFLOW, Underflow
from flashnorm.verify.rounding import RoundingSample
from flashnorm.verify.tensors import compare_tensors


@dataclass(frozen=True)
class Part:
    """What is to be compared.

    Attributes:
        source: the files of the source that are to be hashed, and the tensors that the comparison needs.
        converted: the files of the converted checkpoint that are to be hashed, and their tensors.
        pairs: the tensors to compare, in the order of the files' bytes.
        tensors: the plan in the names of tensors, with the changed biases that are to be checked.
    """

    source: Checkpoint
    converted: Checkpoint
    pairs: tuple[Pair, ...]
    tensors: TensorPlan

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors to compare."""
        return sum(pair.stored.nbytes for pair in self.pairs)


@dataclass(frozen=True)
class Compared:
    """What came of it.

    Attributes:
        tensors, biases: what is wrong with the pairs, and with the changed biases.
        right_biases: how many changed biases are right.
        of_source, of_converted: SHA-256 of the files that were hashed, by name.
        sample: a sample of the rounding errors.
        underflow: the folded weights that lost bits.
    """

    tensors: tuple[Finding, ...] = ()
    biases: tuple[Finding, ...] = ()
    right_biases: int = 0
    of_source: dict[str, str] = field(default_factory=dict)
    of_converted: dict[str, str] = field(default_factory=dict)
    sample: RoundingSample = field(default_factory=RoundingSample)
    underflow: Underflow = NO_UNDERFLOW

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; for a part in which nothing is wrong."""
        assert not self.tensors
        assert not self.biases
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Compared":
        """What `to_dict` gave. Raises `KeyError` or `TypeError` for anything else."""
        sample, underflow = RoundingSample(**data["sample"]), Underflow(**data["underflow"])
        return Compared((), (), data["right_biases"], data["of_source"], data["of_converted"], sample, underflow)

    def __add__(self, other: "Compared") -> "Compared":
        return Compared(
            self.tensors + other.tensors,
            self.biases + other.biases,
            self.right_biases + other.right_biases,
            self.of_source | other.of_source,
            self.of_converted | other.of_converted,
            self.sample + other.sample,
            self.underflow + other.underflow,
        )


def parts_by_file(
    source: Checkpoint, converted: Checkpoint, pairs: Sequence[Pair], tensors: TensorPlan
) -> dict[str, Part]:
    """The comparison of two checkpoints in parts, one for each name of a safetensors file that either of them has."""
    return {
        file: part_of_file(source, converted, pairs, tensors, file)
        for file in dict.fromkeys([*converted.headers, *source.headers])
    }


def part_of_file(
    source: Checkpoint, converted: Checkpoint, pairs: Sequence[Pair], tensors: TensorPlan, file: str
) -> Part:
    """The part that hashes the files of one name, and compares the tensors that the converted checkpoint has in it."""
    stored = [name for name, info in converted.tensors.items() if info.file == file]
    originals = [tensors.untied.get(name, name) for name in stored]
    about = tensors.about(originals)
    # A source tensor in a file of another name is read, and the file is hashed in the part of that name.
    return Part(
        source.part([file], {*originals, *about.read}),
        converted.part([file], ()),
        tuple(pair for pair in pairs if pair.stored.file == file),
        about,
    )


def compare_part(part: Part, advance: Callable[[int], None] = lambda nbytes: None) -> Compared:
    """Compare the tensors of a part, check its biases, and hash its files.

    Args:
        part: the task.
        advance: called with the number of bytes of the converted tensors done since the last call.

    Raises:
        InputError: a file cannot be read.
    """
    tensors: list[Finding] = []
    biases: list[Finding] = []
    sample = RoundingSample()
    of_source, of_converted, underflow = compare_tensors(
        part.source, part.converted, part.pairs, tensors.append, advance, sample
    )
    right = check_biases(part.source, part.converted, part.tensors, biases.append)
    return Compared(tuple(tensors), tuple(biases), right, of_source, of_converted, sample, underflow)


def compare_part_elsewhere(part: Part) -> Compared:
    """`compare_part` in another process, perhaps on another host.

    Raises:
        InputError: as `compare_part`; or the files are not on this host.
    """
    check_shared(part.source)
    check_shared(part.converted)
    return compare_part(part)


def total(parts: Iterable[Compared]) -> Compared:
    """What came of several parts together."""
    return sum(parts, start=Compared())
