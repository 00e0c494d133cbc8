"""Compares the tensors of two checkpoints, streaming: the same memory for any size, every byte read once.

* Reading (a thread), hashing (a thread) and comparing (this thread) go on at the same time, a piece at a time: NumPy's
  many short operations do not share the interpreter lock well, three long ones do.
* Both files of a pair are hashed on the way, each from its first byte to its last; what the comparison skips (headers,
  norms that left) is read for the hash alone.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from operator import mul
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from flashnorm.checkpoint.ahead import ahead
from flashnorm.checkpoint.direct_io import DirectReader, buffers
from flashnorm.checkpoint.header import TensorInfo
from flashnorm.checkpoint.names import TensorFold
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.verify.findings import Finding
from flashnorm.verify.products import FORMATS, Array, ExactGain, Scratch, correct, decode, differing
from flashnorm.verify.range import NO_UNDERFLOW, Underflow, out_of_range
from flashnorm.verify.rounding import RoundingSample

PIECE = 8 << 20  # bytes
_PIECES = 3  # one is read, one waits, one is compared


@dataclass(frozen=True)
class Pair:
    """A tensor of the converted checkpoint and what it must come from.

    Attributes:
        name: in the converted checkpoint.
        source: where the original lies.
        stored: where the tensor lies; of the same dtype and shape.
        fold: the gains that it must have taken, or None if it must be unchanged.
    """

    name: str
    source: TensorInfo
    stored: TensorInfo
    fold: TensorFold | None = None


class HashedFile:
    """A file that is hashed while parts of it are read, in the order of its bytes. A context manager."""

    def __init__(self, path: Path) -> None:
        self._reader = DirectReader(path)
        self._skipped = DirectReader(path)  # of the hashing thread
        self._size = path.stat().st_size
        self._sha256 = hashlib.sha256()
        self._position = 0

    def read(self, start: int, nbytes: int, buffer: memoryview) -> memoryview:
        """`nbytes` from offset `start`, as a part of `buffer` (see `DirectReader.read`)."""
        return self._reader.read(start, nbytes, buffer)

    def hash(self, start: int, data: memoryview) -> None:
        """Take `data`, the file's bytes from offset `start`, and the bytes before it if they are still missing."""
        if start >= self._position:  # else it is read a second time
            self._catch_up(start)
            self._sha256.update(data)
            self._position += data.nbytes

    def digest(self) -> str:
        """The SHA-256 of the whole file, in hexadecimal."""
        self._catch_up(self._size)
        return self._sha256.hexdigest()

    def _catch_up(self, end: int) -> None:
        if self._position >= end:
            return
        limit = min(PIECE, end - self._position)
        ring = buffers(1, limit)
        while self._position < end:
            part = self._skipped.read(self._position, min(limit, end - self._position), next(ring))
            self._sha256.update(part)
            self._position += part.nbytes

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for reader in (self._reader, self._skipped):
            reader.__exit__(kind, error, at)


class _Piece(NamedTuple):
    pair: Pair
    first: int  # byte within the tensor
    source: memoryview
    stored: memoryview


def compare_tensors(
    source: Checkpoint,
    converted: Checkpoint,
    pairs: Sequence[Pair],
    report: Callable[[Finding], None],
    advance: Callable[[int], None],
    sample: RoundingSample,
) -> tuple[dict[str, str], dict[str, str], Underflow]:
    """Compare tensors bit for bit, and hash all safetensors files of both checkpoints.

    Args:
        source: holds the originals and the norms.
        converted: holds the tensors to check.
        pairs: what to compare; quickest in the order of the converted files' bytes.
        report: takes one `Finding` for each tensor that differs, or that became infinite.
        advance: called with the number of bytes of the converted checkpoint done since the last call.
        sample: takes a sample of the rounding errors.

    Returns:
        The SHA-256 of every safetensors file of the source and of the converted checkpoint, by name; and what the
        folded weights lost at the small end of their dtype's range.

    Raises:
        InputError: a file cannot be read, or changed meanwhile.
    """
    scratch = Scratch()
    gains, underflow = _Gains(source), NO_UNDERFLOW
    with ExitStack() as stack:
        sources = {name: stack.enter_context(HashedFile(source.folder / name)) for name in source.headers}
        stored = {name: stack.enter_context(HashedFile(converted.folder / name)) for name in converted.headers}
        hasher = stack.enter_context(ThreadPoolExecutor(1, "hash"))
        check = None
        for piece in ahead(_read(pairs, sources, stored), _PIECES):
            pair = piece.pair
            hashing = hasher.submit(_hash, piece, sources[pair.source.file], stored[pair.stored.file])
            if check is None or check.pair is not pair:
                _finish(check, report)
                check = _Check(pair, None if pair.fold is None else gains.of(pair), scratch, sample)
            underflow += check.look_at(piece)
            hashing.result()
            advance(piece.stored.nbytes)
        _finish(check, report)
        rest = [hasher.submit(file.digest) for file in sources.values()]
        of_stored = {name: file.digest() for name, file in stored.items()}
        of_source = {name: future.result() for name, future in zip(sources, rest, strict=True)}
    return of_source, of_stored, underflow


def _read(
    pairs: Sequence[Pair], sources: dict[str, HashedFile], stored: dict[str, HashedFile]
) -> Generator[_Piece, None, None]:
    largest = max((min(_piece_bytes(pair), pair.stored.nbytes) for pair in pairs), default=0)
    originals, results = buffers(_PIECES, largest), buffers(_PIECES, largest)
    for pair in pairs:
        step = _piece_bytes(pair)
        for first in range(0, pair.stored.nbytes, step):
            count = min(step, pair.stored.nbytes - first)
            original = sources[pair.source.file].read(pair.source.start + first, count, next(originals))
            result = stored[pair.stored.file].read(pair.stored.start + first, count, next(results))
            yield _Piece(pair, first, original, result)


def _piece_bytes(pair: Pair) -> int:
    """About `PIECE`, in whole lines of a folded tensor."""
    if pair.fold is None:
        return PIECE
    line = max(1, _line(pair)) * np.dtype(FORMATS[pair.stored.dtype].bits).itemsize
    return max(1, PIECE // line) * line


def _trailing(pair: Pair) -> int:
    """The product of the sizes of the axes that follow the folded one."""
    assert pair.fold is not None
    return math.prod(pair.stored.shape[pair.fold.axis + 1 :])


def _line(pair: Pair) -> int:
    """Elements in a line, as `products.differing` understands it."""
    assert pair.fold is not None
    trailing = _trailing(pair)
    return pair.stored.shape[pair.fold.axis] if trailing == 1 else trailing


def _hash(piece: _Piece, source: HashedFile, stored: HashedFile) -> None:
    source.hash(piece.pair.source.start + piece.first, piece.source)
    stored.hash(piece.pair.stored.start + piece.first, piece.stored)


class _Gains:
    """The exact gains of the folds; those of the norm just used are kept, as its other weights come next."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._recent: dict[tuple[object, ...], ExactGain] = {}

    def of(self, pair: Pair) -> ExactGain:
        assert pair.fold is not None
        length = pair.stored.shape[pair.fold.axis]
        key = (pair.fold.gains, length)
        if key not in self._recent:
            if len(self._recent) >= 8:
                self._recent.pop(next(iter(self._recent)))
            parts = [ExactGain.of(self._norm(use.norm), use.offset, length, use.segments) for use in pair.fold.gains]
            self._recent[key] = reduce(mul, parts)
        return self._recent[key]

    def _norm(self, name: str) -> Array:
        tag = self._source.tensors[name].dtype
        return decode(tag, np.frombuffer(self._source.read_bytes(name), FORMATS[tag].bits))


class _Check:
    """The comparison of one tensor, over its pieces."""

    def __init__(self, pair: Pair, gain: ExactGain | None, scratch: Scratch, sample: RoundingSample) -> None:
        self.pair = pair
        self.differing = 0
        self._gain = gain
        self._scratch = scratch
        self._sample = sample
        self._first: tuple[int, str, str] | None = None
        self._infinite = 0
        self._first_infinite: tuple[int, str, str] | None = None

    def look_at(self, piece: _Piece) -> Underflow:
        if self._gain is None:
            self._look_for_changes(piece)
            return NO_UNDERFLOW
        return self._look_for_wrong_products(piece, self._gain)

    def _look_for_changes(self, piece: _Piece) -> None:
        source, stored = (np.frombuffer(data, np.uint8) for data in (piece.source, piece.stored))
        whole = source.size // 8 * 8
        a, b = source[:whole].view(np.uint64), stored[:whole].view(np.uint64)
        same = np.equal(a, b, out=self._scratch.take("same", a.shape, np.bool_))
        if same.all() and np.array_equal(source[whole:], stored[whole:]):
            return
        elements = math.prod(self.pair.stored.shape)
        size = self.pair.stored.nbytes // elements or 1  # packed 4-bit numbers are compared as bytes
        unequal = (source != stored).reshape(-1, size).any(1)
        places = np.flatnonzero(unequal)

        def pattern(data: Array) -> int:
            return int.from_bytes(data[places[0] * size :][:size].tobytes(), "little")

        self._note(piece.first // size, places, pattern(stored), pattern(source), size)

    def _look_for_wrong_products(self, piece: _Piece, gain: ExactGain) -> Underflow:
        tag = self.pair.stored.dtype
        bits, width = FORMATS[tag].bits, _line(self.pair)
        source, stored = (np.frombuffer(data, bits) for data in (piece.source, piece.stored))
        first = piece.first // source.itemsize
        trailing = _trailing(self.pair)
        self._sample.take(tag, source, stored, gain.high, first, trailing)
        lines = (-1, width)
        places = differing(
            tag, source.reshape(lines), stored.reshape(lines), gain, first // width, trailing, self._scratch
        )
        if places.size:
            at = int(places[0])
            channel = (first + at) // trailing % len(gain.values)
            expected = correct(tag, int(source[at]), gain.values[channel])
            self._note(first, places, int(stored[at]), expected, source.itemsize)
        places, underflow = out_of_range(tag, source, stored, gain, first, trailing)
        if places.size:
            self._infinite += places.size
            if self._first_infinite is None:
                at = int(places[0])
                value = gain.high[(first + at) // trailing % len(gain.values)]
                factor = self._text(int(source[at]), source.itemsize)
                infinity = self._text(int(stored[at]), source.itemsize)
                self._first_infinite = first + at, infinity, f"{factor} times a gain of {value:.9g}"
        return underflow

    def _note(self, first: int, places: Array, stored: int, expected: int, size: int) -> None:
        self.differing += places.size
        if self._first is None:
            self._first = (first + int(places[0]), self._text(stored, size), self._text(expected, size))

    def _text(self, pattern: int, size: int) -> str:
        return number_text(self.pair.stored.dtype, pattern, size)

    def findings(self) -> Iterator[Finding]:
        changed = "was to be copied and differs" if self._gain is None else "is not the rounded product"
        infinite = f"became infinite, as the product does not fit {self.pair.stored.dtype}: its norm must be kept"
        for problem, first, count in (
            (changed, self._first, self.differing),
            (infinite, self._first_infinite, self._infinite),
        ):
            if first is not None:
                at, stored, expected = first
                shape = self.pair.stored.shape
                yield Finding(
                    kind="tensor",
                    name=self.pair.name,
                    problem=problem,
                    index=tuple(int(i) for i in np.unravel_index(at, shape)) if math.prod(shape) > at else (at,),
                    stored=stored,
                    expected=expected,
                    differing=count,
                    elements=math.prod(shape),
                )


def _finish(check: _Check | None, report: Callable[[Finding], None]) -> None:
    for finding in check.findings() if check is not None else ():
        report(finding)


def number_text(tag: str, pattern: int, size: int) -> str:
    """A stored number for the reader: its value if its format has one, and its bit pattern of `size` bytes."""
    bits = f"0x{pattern:0{2 * size}x}"
    if tag not in FORMATS:
        return bits
    value = float(decode(tag, np.array([pattern], FORMATS[tag].bits))[0])
    return f"{value:.9g} ({bits})"
