"""The header of a safetensors file: where each tensor lies. Everything in it is checked before it is used.

* A file is 8 bytes of header length (little endian), the header as JSON, then the tensors' bytes without holes.
* Streaming needs byte offsets. The `safe_open` of safetensors does not tell them, and of two tensors with one name it
  takes the last. The parser of huggingface_hub tells offsets but does not check them: it accepts overlaps, holes,
  negative numbers, truncated files and shapes that do not fit.
* A tensor of any dtype can be read as bytes. A dtype with which PyTorch or we cannot compute matters only if the tensor
  is to be folded.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashnorm.errors import InputError
from flashnorm.files.source_files import cannot_read, open_file
from flashnorm.files.strict_json import MAX_BYTES, parse_object

# Bits of one element. F4 and F6 are packed: a tensor of them must still fill whole bytes.
DTYPE_BITS = {
    dtype: bits
    for bits, dtypes in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "I64 U64 F64 C64",
    }.items()
    for dtype in dtypes.split()
}

# The dtypes that `Checkpoint.read_tensor` can return; only weights in floating-point dtypes can be folded.
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "C64": torch.complex64,
}

_DAMAGED = "the file is damaged or its download is incomplete: fetch it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file.

    Attributes:
        file: the name of the file in the checkpoint's folder.
        dtype: safetensors' name of the dtype, a key of `DTYPE_BITS`.
        shape: number of elements along each axis.
        start, end: where the tensor's bytes lie, counted from the beginning of the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        tensors: tensor name -> dtype, shape and place of the tensor, in the order of the bytes.
        metadata: the file's `__metadata__`, None if it has none.
        data_start: where the first tensor begins.
        size: the size of the file, in bytes.
        passed_over: the tensors that are not the model's, because the index names another file for them.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] | None
    data_start: int
    size: int
    passed_over: frozenset[str] = frozenset()


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        InputError: the file cannot be read, is truncated, or is not a valid safetensors file.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise _invalid(path, "a safetensors file of at least 8 bytes", f"{size} bytes", _DAMAGED)
            if length > MAX_BYTES:
                raise _invalid(path, f"a header of at most {MAX_BYTES} bytes", f"{length}", _DAMAGED)
            if 8 + length > size:
                raise _invalid(path, f"a header of {length} bytes", f"a file of {size} bytes", _DAMAGED)
            raw = file.read(length)
    except OSError as error:
        raise cannot_read(path, error) from error
    return parse_header(raw, size, path)


def parse_header(raw: bytes, size: int, path: Path) -> Header:
    """Check the JSON of a header against the size of its file.

    Args:
        raw: the header, without the 8 bytes that give its length.
        size: the size of the whole file, in bytes.
        path: the path of the file, for messages; its last part becomes `TensorInfo.file`.

    Raises:
        InputError: the header is not valid.
    """
    data_start = 8 + len(raw)
    entries = _parse_json(raw, path)
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise _invalid(path, "__metadata__ that maps text to text", f"{_short(metadata)}", _DAMAGED)
    tensors = {name: _parse_entry(name, entry, data_start, path) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = data_start
    for name, info in tensors.items():
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            found = f"{info.start - data_start}: it {what}"
            raise _invalid(path, f"tensor {name} to begin at data offset {position - data_start}", found, _DAMAGED)
        position = info.end
    if position != size:
        state = "truncated" if size < position else "longer than its header says"
        raise _invalid(path, f"a file of {position} bytes", f"{size}: it is {state}", _DAMAGED)
    return Header(tensors, metadata, data_start, size)


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None
) -> bytes:
    """The beginning of a safetensors file, written as the safetensors library writes it.

    Args:
        tensors: name, dtype, shape and size in bytes of each tensor, in the order of the bytes.
        metadata: `__metadata__`, or None.

    Returns:
        The length, the JSON, and spaces up to a multiple of 8 bytes.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        return parse_object(raw)
    except ValueError as error:
        found = f"something else ({type(error).__name__}: {error})"
        raise _invalid(path, "a header in JSON", found, f"is it a safetensors file? If it is, {_DAMAGED}") from error


def _parse_entry(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if not rest:
            pass
        case _:
            raise _invalid(path, f"dtype, shape and data_offsets of tensor {name}", _short(entry), _DAMAGED)
    if dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        raise _invalid(path, f"tensor {name} to be one of {known}", _short(dtype), "a newer format is not supported")
    # `bool` is a subclass of `int` in Python, but `true` is no number in a shape.
    numbers = [*shape, start, end]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _invalid(path, f"non-negative integers in shape and offsets of tensor {name}", _short(entry), _DAMAGED)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - start):
        found = f"{end - start} between its offsets"
        raise _invalid(path, f"{bits / 8:g} bytes for tensor {name} of {dtype} {_short(shape)}", found, _DAMAGED)
    return TensorInfo(path.name, dtype, tuple(shape), data_start + start, data_start + end)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _invalid(path: Path, expected: str, found: str, remedy: str) -> InputError:
    return InputError(f"{path}: expected {expected}, found {found}; {remedy}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
