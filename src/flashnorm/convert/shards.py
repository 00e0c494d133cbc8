"""Converts one shard in one pass over the source's bytes and the output's.

* A shard is a list of pieces: a piece is a run of a few MB of the source file's bytes, with what becomes of them.
* Reading, folding and writing run side by side in three threads, in reused buffers: memory does not depend on the size
  of a shard or a tensor.
* One core folds faster than any disk reads, and further threads would wait for each other and slow down the hashing. So
  PyTorch uses one core in each of these threads.
* The bytes of source and output are hashed as they pass.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flashnorm.arithmetic import Gain, exceeds_one, fold_weight, overflowed
from flashnorm.compat.torch import compute_alone
from flashnorm.errors import InputError
from flashnorm.files.ahead import ahead
from flashnorm.files.direct_io import DirectReader, DirectWriter, buffers
from flashnorm.files.header import TORCH_DTYPES, Header, TensorInfo, encode_header
from flashnorm.files.staging import ShardRecord
from flashnorm.format import FileRecord
from flashnorm.means import centre, exact_sums
from flashnorm.planning.tensors import TensorFold, TensorPlan

# Bytes of a piece. Smaller pieces cost more system calls, larger ones fall out of the processor's caches.
PIECE_BYTES = 1 << 23

# How many pieces may wait between two stages.
_DEPTH = 4

# Makes the output bytes of a piece (second argument) from its source bytes (first). Both are `[nbytes]`, uint8.
Transform = Callable[[Tensor, Tensor], object]

# Called if finite weights became infinite, with channels of the folded axis and the result of `overflowed` for them.
ReportOverflow = Callable[[slice, Tensor], object]


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a source file, and what becomes of it.

    Attributes:
        start, end: the run, counted from the beginning of the file.
        transform: writes the same number of output bytes; None if there are none (header, removed norms).
        again: the bytes have been read before (for a tensor that is written twice), so they are not hashed again.
    """

    start: int
    end: int
    transform: Transform | None = None
    again: bool = False


def output_tensors(header: Header, tensors: TensorPlan, *, keep_norms: bool) -> list[tuple[str, TensorInfo]]:
    """The tensors that the output shard holds, each with the source tensor that it comes from, in order.

    An untied tensor follows its source tensor; it replaces a tensor of the same name in the source.
    """
    outputs = []
    for name, info in header.tensors.items():
        if name in header.passed_over:
            continue
        if not _is_absent(name, tensors, keep_norms):
            outputs.append((name, info))
        outputs += [(new, info) for new, source in tensors.untied.items() if source == name]
    return outputs


def output_header(header: Header, tensors: TensorPlan, *, keep_norms: bool) -> bytes:
    """The beginning of the output shard, up to its first tensor."""
    outputs = output_tensors(header, tensors, keep_norms=keep_norms)
    return encode_header(((name, info.dtype, info.shape, info.nbytes) for name, info in outputs), header.metadata)


def shard_pieces(
    header: Header,
    tensors: TensorPlan,
    norms: Mapping[str, Tensor],
    bias: Callable[[str], Tensor],
    sums: Callable[[str, int], Tensor],
    overflow: Callable[[str, slice, Tensor], object],
    *,
    keep_norms: bool,
) -> Iterator[Piece]:
    """What becomes of each byte of a source shard, in the order of the output's bytes.

    Args:
        norms: the stored weight of every norm that folds, `[n]`.
        bias: computes the new value of a bias in `tensors.biases` or `tensors.divided`.
        sums: computes the exact sums of a source tensor over an axis, as `exact_sums` gives them.
        overflow: called while pieces are folded, with the tensor's name and the arguments of `ReportOverflow`.
    """

    def changed(name: str, source: str, info: TensorInfo, *, again: bool = False) -> Iterator[Piece]:
        if name in tensors.biases or name in tensors.divided:
            return _replaced(info, bias(name), again=again)
        if name in tensors.centred:
            return _centred_pieces(source, info, tensors.centred[name], sums, again=again)
        return _tensor_pieces(info, tensors.folds.get(name), norms, partial(overflow, name), again=again)

    yield from _runs(0, header.data_start)
    for name, info in header.tensors.items():
        if name in header.passed_over:
            yield from _runs(info.start, info.end)
            continue
        if _is_absent(name, tensors, keep_norms):
            yield from _runs(info.start, info.end)
        elif name in tensors.norms:
            yield from _runs(info.start, info.end, _fill(TORCH_DTYPES[info.dtype], tensors.norms[name]))
        else:
            yield from changed(name, name, info)
        for new, source in tensors.untied.items():
            if source == name:
                yield from changed(new, source, info, again=True)


def write_shard(
    source: Path, output: Path, header: bytes, pieces: Iterator[Piece], advance: Callable[[int], object]
) -> ShardRecord:
    """Write a shard and wait until the disk has it.

    Args:
        source: the source shard.
        output: the file to write.
        header: the beginning of the output, see `output_header`.
        pieces: see `shard_pieces`.
        advance: called with the number of bytes written since the last call.

    Raises:
        InputError: the source cannot be read.
        OSError: the output cannot be written.
    """
    source_hash, output_hash = hashlib.sha256(), hashlib.sha256()
    with DirectReader(source) as reader, DirectWriter(output) as writer:

        def read() -> Generator[tuple[Piece, memoryview], None, None]:
            compute_alone()
            ring = buffers(_DEPTH, PIECE_BYTES)
            for piece in pieces:
                yield piece, reader.read(piece.start, piece.end - piece.start, next(ring))

        def transform() -> Generator[tuple[memoryview, memoryview], None, None]:
            compute_alone()
            ring = buffers(_DEPTH, PIECE_BYTES)
            for start in range(0, len(header), PIECE_BYTES):
                part = header[start : start + PIECE_BYTES]
                buffer = next(ring)
                window = writer.window(len(part), buffer)
                window[:] = part
                yield window, buffer
            with closing(ahead(read(), _DEPTH)) as read_pieces:
                for piece, data in read_pieces:
                    if not piece.again:
                        source_hash.update(data)
                    if piece.transform is not None:
                        buffer = next(ring)
                        window = writer.window(len(data), buffer)
                        piece.transform(_as_tensor(data), _as_tensor(window))
                        yield window, buffer

        size = 0
        with closing(ahead(transform(), _DEPTH)) as windows:
            for window, buffer in windows:
                output_hash.update(window)
                writer.write(len(window), buffer)
                size += len(window)
                advance(len(window))
        writer.finish()
    return ShardRecord(
        source=FileRecord(source_hash.hexdigest(), source.stat().st_size),
        output=FileRecord(output_hash.hexdigest(), size),
    )


def fold_slices(shape: tuple[int, ...], axis: int, limit: int) -> Iterator[tuple[int, tuple[int, int, int], slice]]:
    """A tensor as consecutive runs of at most `limit` elements, each a block whose middle axis is the one to fold.

    Yields:
        The first element of the run, counted over the whole tensor; the run's shape `[outer, channels, inner]`; and
        which channels of the axis it holds.
    """
    outer, channels, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    if channels * inner <= limit:
        rows = max(1, limit // max(1, channels * inner))
        for row in range(0, outer, rows):
            yield row * channels * inner, (min(rows, outer - row), channels, inner), slice(0, channels)
        return
    # A row is larger than the limit, so it is split by channels; a channel that is still larger is split as well.
    step, width = max(1, limit // inner), min(inner, limit)
    for row in range(outer):
        for channel in range(0, channels, step):
            count = min(step, channels - channel)
            for column in range(0, inner, width):
                first = (row * channels + channel) * inner + column
                yield first, (1, count, min(width, inner - column)), slice(channel, channel + count)


def _tensor_pieces(
    info: TensorInfo,
    fold: TensorFold | None,
    norms: Mapping[str, Tensor],
    overflow: ReportOverflow,
    *,
    again: bool = False,
) -> Iterator[Piece]:
    if fold is None or not info.nbytes:
        yield from _runs(info.start, info.end, _copy, again=again)
        return
    dtype = TORCH_DTYPES[info.dtype]
    gain = fold.gain(info.shape[fold.axis], norms)
    for first, shape, channels in fold_slices(info.shape, fold.axis, PIECE_BYTES // dtype.itemsize):
        start = info.start + first * dtype.itemsize
        part = Gain(gain.high[channels], gain.low[channels])
        transform = _fold(dtype, shape, part, partial(overflow, channels))
        yield Piece(start, start + math.prod(shape) * dtype.itemsize, transform, again)


def _centred_pieces(
    name: str, info: TensorInfo, axis: int, sums: Callable[[str, int], Tensor], *, again: bool
) -> Iterator[Piece]:
    if not info.nbytes:
        return
    dtype = TORCH_DTYPES[info.dtype]
    channels, inner = info.shape[axis], math.prod(info.shape[axis + 1 :])
    # If a piece holds whole lines, their sums are at hand.
    whole = channels * inner <= PIECE_BYTES // dtype.itemsize
    of_lines = None if whole else sums(name, axis)
    for first, shape, _ in fold_slices(info.shape, axis, PIECE_BYTES // dtype.itemsize):
        line = first // (channels * inner) * inner + first % inner
        part = None if of_lines is None else of_lines[line : line + shape[0] * shape[2]]
        start = info.start + first * dtype.itemsize
        transform = _centre(name, dtype, shape, part, channels)
        yield Piece(start, start + math.prod(shape) * dtype.itemsize, transform, again)


def _runs(start: int, end: int, transform: Transform | None = None, *, again: bool = False) -> Iterator[Piece]:
    for first in range(start, end, PIECE_BYTES):
        yield Piece(first, min(first + PIECE_BYTES, end), transform, again)


def _replaced(info: TensorInfo, value: Tensor, *, again: bool) -> Iterator[Piece]:
    data = value.contiguous().flatten().view(torch.uint8)
    for piece in _runs(info.start, info.end, again=again):
        part = data[piece.start - info.start : piece.end - info.start]
        yield replace(piece, transform=lambda source, output, part=part: output.copy_(part))


def _copy(source: Tensor, output: Tensor) -> None:
    output.copy_(source)


def _fill(dtype: torch.dtype, value: float) -> Transform:
    return lambda source, output: output.view(dtype).fill_(value)


def _fold(
    dtype: torch.dtype, shape: tuple[int, int, int], gain: Gain, overflow: Callable[[Tensor], object]
) -> Transform:
    larger = bool(exceeds_one(gain).any())  # else no product can overflow

    def transform(source: Tensor, output: Tensor) -> None:
        weight, folded = source.view(dtype).view(shape), output.view(dtype).view(shape)
        fold_weight(weight, gain, axis=1, out=folded)
        if larger and not all(bound.isfinite() for bound in folded.aminmax()):  # takes 1/20 of the time of folding
            overflow(overflowed(weight, folded, gain, axis=1))

    return transform


def _centre(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int], sums: Tensor | None, channels: int
) -> Transform:
    def transform(source: Tensor, output: Tensor) -> None:
        # `[outer, channels, inner]`, as lines of channels.
        lines = source.view(dtype).view(shape).movedim(1, 2).flatten(0, 1)
        try:
            result = centre(lines, exact_sums(lines) if sums is None else sums, channels)
        except ValueError as error:
            raise not_centred(name, error) from error
        output.view(dtype).view(shape).copy_(result.unflatten(0, (shape[0], shape[2])).movedim(2, 1))

    return transform


def not_centred(name: str, error: ValueError) -> InputError:
    """The error for a weight that cannot be centred."""
    return InputError(f"expected {name} to be centred, found {error}; leave out --center")


def _as_tensor(window: memoryview) -> Tensor:
    return torch.frombuffer(window, dtype=torch.uint8)


def _is_absent(name: str, tensors: TensorPlan, keep_norms: bool) -> bool:
    """Whether the output lacks a source tensor (under its own name and with its own values)."""
    leaves = name in tensors.norms and name not in tensors.spelled_out
    return name in tensors.untied or (leaves and not keep_norms)
