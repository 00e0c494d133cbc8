"""One shard, from the source's bytes to the output's, in one pass over both.

* A shard is a list of pieces: consecutive runs of the source file's bytes, a few MB each, with what becomes of each.
* Reading, folding and writing run side by side in three threads, in reused buffers; memory does not depend on the size
  of a shard or a tensor.
* Source and output are hashed as they pass.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flashnorm.checkpoint.ahead import ahead
from flashnorm.checkpoint.direct_io import DirectReader, DirectWriter, buffers
from flashnorm.checkpoint.header import TORCH_DTYPES, Header, TensorInfo, encode_header
from flashnorm.checkpoint.names import CheckpointPlan, GainUse, TensorFold
from flashnorm.checkpoint.records import FileRecord
from flashnorm.checkpoint.writer import ShardRecord
from flashnorm.fold import Gain, exceeds_one, fold_weight, gain_of, overflowed, product_of

# Bytes of a piece. Smaller ones cost system calls, larger ones fall out of the processor's caches.
PIECE_BYTES = 1 << 23

# How many pieces may wait between two stages.
_DEPTH = 4

# From the bytes of a piece in the source to its bytes in the output. Both `[nbytes]`, uint8.
Transform = Callable[[Tensor, Tensor], object]

# Called where finite weights became infinite: the channels of the folded axis, and what `overflowed` gives for them.
ReportOverflow = Callable[[slice, Tensor], object]


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a source file, and what becomes of it.

    Attributes:
        start, end: the run, counted from the beginning of the file.
        transform: writes the output bytes, as many; None if there are none (header, absent norms).
        again: the bytes have passed before (a tensor that is written twice), so they are not hashed.
    """

    start: int
    end: int
    transform: Transform | None = None
    again: bool = False


def output_tensors(header: Header, names: CheckpointPlan, *, keep_norms: bool) -> list[tuple[str, TensorInfo]]:
    """The tensors that the output shard holds, each with the source tensor that it comes from, in order.

    An untied tensor follows its source tensor; one of the same name in the source gives way to it.
    """
    outputs = []
    for name, info in header.tensors.items():
        if not _is_absent(name, names, keep_norms):
            outputs.append((name, info))
        outputs += [(new, info) for new, source in names.untied.items() if source == name]
    return outputs


def output_header(header: Header, names: CheckpointPlan, *, keep_norms: bool) -> bytes:
    """The beginning of the output shard, up to its first tensor."""
    outputs = output_tensors(header, names, keep_norms=keep_norms)
    return encode_header(((name, info.dtype, info.shape, info.nbytes) for name, info in outputs), header.metadata)


def shard_pieces(
    header: Header,
    names: CheckpointPlan,
    norms: Mapping[str, Tensor],
    bias: Callable[[str], Tensor],
    overflow: Callable[[str, slice, Tensor], object],
    *,
    keep_norms: bool,
) -> Iterator[Piece]:
    """What becomes of each byte of a source shard, in order of the output's bytes.

    Args:
        norms: the stored weight of every norm that folds, `[n]`.
        bias: computes the new value of a bias in `names.biases` or `names.divided`.
        overflow: called while pieces are folded, as `ReportOverflow`, with the tensor's name first.
    """
    yield from _runs(0, header.data_start)
    for name, info in header.tensors.items():
        if _is_absent(name, names, keep_norms):
            yield from _runs(info.start, info.end)
        elif name in names.norms:
            yield from _runs(info.start, info.end, _fill(TORCH_DTYPES[info.dtype], names.norms[name]))
        elif name in names.biases or name in names.divided:
            yield from _replaced(info, bias(name))
        else:
            yield from _tensor_pieces(info, names.folds.get(name), norms, partial(overflow, name))
        for new, source in names.untied.items():
            if source == name:
                yield from _tensor_pieces(info, names.folds.get(new), norms, partial(overflow, new), again=True)


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
    with _one_thread_for_folding(), DirectReader(source) as reader, DirectWriter(output) as writer:

        def read() -> Generator[tuple[Piece, memoryview], None, None]:
            ring = buffers(_DEPTH, PIECE_BYTES)
            for piece in pieces:
                yield piece, reader.read(piece.start, piece.end - piece.start, next(ring))

        def transform() -> Generator[tuple[memoryview, memoryview], None, None]:
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


@contextmanager
def _one_thread_for_folding() -> Iterator[None]:
    """One core folds faster than any disk; threads that wait for each other would slow down those that hash."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def axis_gain(length: int, uses: tuple[GainUse, ...], norms: Mapping[str, Tensor]) -> Gain:
    """The gain of each channel of an axis, put together from norm weights.

    Args:
        length: of the axis.
        uses: which norm multiplies which channels. Channels in none have gain 1.
        norms: the stored weight of each norm, `[n]`.

    Returns:
        `length` gains, without rounding.

    Raises:
        ValueError: several norms multiply one channel, and their product cannot be held without rounding.
    """
    total = Gain(torch.ones(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64))
    taken = torch.zeros(length, dtype=torch.bool)
    for use in uses:
        gain = gain_of(norms[use.norm].flatten(), use.offset)
        for axis_start, gain_start, count in use.segments or ((0, 0, length),):
            here = slice(axis_start, axis_start + count)
            part = Gain(*(half[gain_start : gain_start + count] for half in gain))
            if taken[here].any():
                part = product_of(Gain(total.high[here], total.low[here]), part)
            total.high[here], total.low[here] = part
            taken[here] = True
    return total


def fold_slices(shape: tuple[int, ...], axis: int, limit: int) -> Iterator[tuple[int, tuple[int, int, int], slice]]:
    """A tensor in consecutive runs of at most `limit` elements, each a block with the axis to fold in the middle.

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
    # One row is too much: channel by channel, and if even one channel is too much, in parts.
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
    gain = axis_gain(info.shape[fold.axis], fold.gains, norms)
    for first, shape, channels in fold_slices(info.shape, fold.axis, PIECE_BYTES // dtype.itemsize):
        start = info.start + first * dtype.itemsize
        part = Gain(gain.high[channels], gain.low[channels])
        transform = _fold(dtype, shape, part, partial(overflow, channels))
        yield Piece(start, start + math.prod(shape) * dtype.itemsize, transform, again)


def _runs(start: int, end: int, transform: Transform | None = None, *, again: bool = False) -> Iterator[Piece]:
    for first in range(start, end, PIECE_BYTES):
        yield Piece(first, min(first + PIECE_BYTES, end), transform, again)


def _replaced(info: TensorInfo, value: Tensor) -> Iterator[Piece]:
    data = value.contiguous().flatten().view(torch.uint8)
    for piece in _runs(info.start, info.end):
        part = data[piece.start - info.start : piece.end - info.start]
        yield replace(piece, transform=lambda source, output, part=part: output.copy_(part))


def _copy(source: Tensor, output: Tensor) -> None:
    output.copy_(source)


def _fill(dtype: torch.dtype, value: float) -> Transform:
    return lambda source, output: output.view(dtype).fill_(value)


def _fold(
    dtype: torch.dtype, shape: tuple[int, int, int], gain: Gain, overflow: Callable[[Tensor], object]
) -> Transform:
    larger = bool(exceeds_one(gain).any())  # else no product can leave the range

    def transform(source: Tensor, output: Tensor) -> None:
        weight, folded = source.view(dtype).view(shape), output.view(dtype).view(shape)
        fold_weight(weight, gain, axis=1, out=folded)
        if larger and not all(bound.isfinite() for bound in folded.aminmax()):  # a twentieth of the time of folding
            overflow(overflowed(weight, folded, gain, axis=1))

    return transform


def _as_tensor(window: memoryview) -> Tensor:
    return torch.frombuffer(window, dtype=torch.uint8)


def _is_absent(name: str, names: CheckpointPlan, keep_norms: bool) -> bool:
    """Whether a source tensor does not pass to the output (under its name and from its own values)."""
    leaves = name in names.norms and name not in names.spelled_out
    return name in names.untied or (leaves and not keep_norms)
