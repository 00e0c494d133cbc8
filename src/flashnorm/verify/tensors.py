"""Compares the tensors of two checkpoints, streaming: memory does not grow with size, and every byte is read once.

* Three threads read, hash and compare at the same time, one piece each. Only one of them compares, because many short
  NumPy operations in several threads would wait for the interpreter lock.
* The files are hashed in the same pass, each from its first byte to its last. What the comparison skips (headers,
  removed norms) is read for the hash only.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import reduce
from operator import mul

import numpy as np

from flashnorm.files.ahead import ahead
from flashnorm.files.direct_io import buffers
from flashnorm.files.reader import Checkpoint
from flashnorm.verify.findings import Finding
from flashnorm.verify.formats import FORMATS, Array, Scratch, decode
from flashnorm.verify.gains import ExactGain
from flashnorm.verify.hashed_file import HashedFile
from flashnorm.verify.means import sums_of
from flashnorm.verify.one_tensor import Pair, Piece, TensorCheck, line_of
from flashnorm.verify.range import NO_UNDERFLOW, Underflow
from flashnorm.verify.rounding import RoundingSample

PIECE = 8 << 20  # bytes
_PIECES = 3  # one is read, one waits, one is compared


def compare_tensors(
    source: Checkpoint,
    converted: Checkpoint,
    pairs: Sequence[Pair],
    report: Callable[[Finding], None],
    advance: Callable[[int], None],
    sample: RoundingSample,
) -> tuple[dict[str, str], dict[str, str], Underflow]:
    """Compare tensors bit for bit, and hash the files in the headers of both checkpoints.

    Args:
        source: the checkpoint with the source tensors and the norms. Tensors may be in files beside its headers.
        converted: the checkpoint with the tensors to check.
        pairs: what to compare; it is fastest in the order of the converted files' bytes.
        report: called with a `Finding` for each tensor that differs, and for each that became infinite.
        advance: called with the number of bytes of the converted checkpoint done since the last call.
        sample: collects a sample of the rounding errors.

    Returns:
        The SHA-256 of the files of the source and of the converted checkpoint, by name; and the folded weights that
        lost bits because they are too small for their dtype.

    Raises:
        InputError: a file cannot be read, or it changed while it was read.
    """
    scratch = Scratch()
    gains, underflow = _Gains(source), NO_UNDERFLOW
    with ExitStack() as stack:

        def opened(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, HashedFile]:
            return {
                name: stack.enter_context(HashedFile(checkpoint.folder / name, wanted=name in checkpoint.headers))
                for name in dict.fromkeys([*checkpoint.headers, *names])
            }

        sources = opened(source, (pair.source.file for pair in pairs))
        stored = opened(converted, (pair.stored.file for pair in pairs))
        hasher = stack.enter_context(ThreadPoolExecutor(1, "hash"))
        check = None
        for piece in ahead(_read(pairs, sources, stored), _PIECES):
            pair = piece.pair
            hashing = hasher.submit(_hash, piece, sources[pair.source.file], stored[pair.stored.file])
            if check is None or check.pair is not pair:
                _finish(check, report)
                gain = None if pair.fold is None else gains.of(pair)
                sums = None if pair.centre is None else sums_of(source, *pair.centre)
                check = TensorCheck(pair, gain, sums, scratch, sample)
            underflow += check.look_at(piece)
            hashing.result()
            advance(piece.stored.nbytes)
        _finish(check, report)
        rest = [hasher.submit(sources[name].digest) for name in source.headers]
        of_stored = {name: stored[name].digest() for name in converted.headers}
        of_source = {name: future.result() for name, future in zip(source.headers, rest, strict=True)}
    return of_source, of_stored, underflow


def _read(
    pairs: Sequence[Pair], sources: dict[str, HashedFile], stored: dict[str, HashedFile]
) -> Generator[Piece, None, None]:
    largest = max((min(_piece_bytes(pair), pair.stored.nbytes) for pair in pairs), default=0)
    originals, results = buffers(_PIECES, largest), buffers(_PIECES, largest)
    open_files: tuple[HashedFile, ...] = ()
    for pair in pairs:
        step = _piece_bytes(pair)
        files = sources[pair.source.file], stored[pair.stored.file]
        for file in open_files:
            if file not in files:
                file.close()
        open_files = files
        for first in range(0, pair.stored.nbytes, step):
            count = min(step, pair.stored.nbytes - first)
            original = files[0].read(pair.source.start + first, count, next(originals))
            result = files[1].read(pair.stored.start + first, count, next(results))
            yield Piece(pair, first, original, result)


def _piece_bytes(pair: Pair) -> int:
    """About `PIECE` bytes; for a folded tensor, a whole number of lines."""
    if pair.fold is None:
        return PIECE
    line = max(1, line_of(pair)) * np.dtype(FORMATS[pair.stored.dtype].bits).itemsize
    return max(1, PIECE // line) * line


def _hash(piece: Piece, source: HashedFile, stored: HashedFile) -> None:
    source.hash(piece.pair.source.start + piece.first, piece.source)
    stored.hash(piece.pair.stored.start + piece.first, piece.stored)


class _Gains:
    """The exact gains of the folds. Recent ones are cached, because a norm's weights follow one another."""

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


def _finish(check: TensorCheck | None, report: Callable[[Finding], None]) -> None:
    for finding in check.findings() if check is not None else ():
        report(finding)
