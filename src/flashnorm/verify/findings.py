"""What a verification found wrong: one record for each problem, and a bounded list of records."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it must be.

    Attributes:
        kind: "tensor", "file", "config", "index", "manifest" or "checkpoint".
        name: name of the tensor, file or folder.
        problem: what is wrong, in a few words.
        index: index of the first differing element of a tensor, one number for each axis.
        stored, expected: what was found and what should be there, as text.
        differing, elements: how many of the tensor's elements differ, and how many it has.
    """

    kind: str
    name: str
    problem: str
    index: tuple[int, ...] | None = None
    stored: str | None = None
    expected: str | None = None
    differing: int | None = None
    elements: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain JSON values, without the attributes that are None."""
        data = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return data | ({"index": list(self.index)} if self.index is not None else {})

    def __str__(self) -> str:
        text = f"{self.kind} {self.name}: {self.problem}"
        if self.index is not None:
            text += f"; {self.differing} of {self.elements} elements, the first at {list(self.index)}"
        if self.stored is not None or self.expected is not None:
            text += f": found {self.stored}, expected {self.expected}"
        return text


@dataclass
class Findings:
    """The first `limit` findings, and how many there were in total."""

    limit: int = 100
    kept: list[Finding] = field(default_factory=list)
    total: int = 0

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it if there is room."""
        self.total += 1
        if len(self.kept) < self.limit:
            self.kept.append(finding)
