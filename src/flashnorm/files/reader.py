"""A checkpoint in a folder: config.json and safetensors files, validated before use.

* One file (`model.safetensors`), or shards with an index (`model.safetensors.index.json`).
* Index, headers and files must agree; if they do not, an `InputError` is raised before any work is done.
* Opening a checkpoint maps no file and reads nothing large: a tensor is known by its byte offsets, and read on demand.
* A name in the index must be a plain file name, and a link must stay in the folder (or in the blobs of a snapshot of
  the hub's cache): a checkpoint cannot point out of its folder.
"""

import fnmatch
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashnorm.errors import InputError
from flashnorm.files.header import TORCH_DTYPES, Header, TensorInfo, read_header
from flashnorm.files.source_files import cannot_read, check_inside, check_names_differ, open_file, status_of_file
from flashnorm.files.strict_json import MAX_BYTES, parse_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

# Bytes that are compared at a time.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class FileState:
    """Enough of `stat` to notice that a file was replaced or written to. Times are in nanoseconds.

    A program can set back the time of the last change of a file's content (`mtime`), but not of its status (`ctime`).
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @staticmethod
    def of(path: Path) -> "FileState":
        """The state of a file, or of the file that a link leads to. Raises `InputError` if there is no such file."""
        stat = status_of_file(path)
        return FileState(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; make one with `Checkpoint.open`.

    Attributes:
        folder: the checkpoint's folder.
        config: config.json, parsed.
        headers: file name -> header, for every safetensors file of the model, in order of their names.
        tensors: tensor name -> dtype, shape and place in a file, in the order of the files and of their bytes.
        index: the parsed index, None for a single file.
        states: file name -> its state when it was opened, for config, index and safetensors files.
        absent: tensors that the index names but no file holds.
        remarks: what is odd about the files but does no harm, in words.
    """

    folder: Path
    config: dict[str, Any]
    headers: dict[str, Header]
    tensors: dict[str, TensorInfo]
    index: dict[str, Any] | None
    states: dict[str, FileState]
    absent: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @staticmethod
    def open(folder: str | Path) -> "Checkpoint":
        """Open and validate a checkpoint. Reads config, index and headers only.

        Raises:
            InputError: the folder is no checkpoint in safetensors format, or a damaged or incomplete one.
        """
        folder = Path(folder)
        if not os.path.isdir(folder):
            found = "a file" if os.path.exists(folder) else "nothing"
            raise InputError(f"{folder}: expected a folder with config.json and safetensors files, found {found}")
        check_has_config(folder, folder)
        described = [name for name in (CONFIG_FILE, INDEX_FILE) if os.path.lexists(folder / name)]
        states = _states(folder, described)
        config = read_json(folder / CONFIG_FILE, "a checkpoint has one; fetch the whole repository")
        index = _read_index(folder)
        files = [SINGLE_FILE] if index is None else sorted(set(index["weight_map"].values()))
        if index is None:
            states.pop(INDEX_FILE, None)
        states |= _states(folder, files)
        headers = {name: read_header(folder / name) for name in files}
        weight_map = {} if index is None else index["weight_map"]
        headers, remarks = _without_copies(folder, weight_map, headers)
        tensors = {
            name: info
            for header in headers.values()
            for name, info in header.tensors.items()
            if name not in header.passed_over
        }
        if index is not None:
            _check_index(folder / INDEX_FILE, weight_map, tensors)
        absent = tuple(name for name in weight_map if name not in tensors)
        if absent:
            remarks.append(f"{INDEX_FILE} names tensors that no file holds: {_some(absent)}")
        return Checkpoint(folder, config, headers, tensors, index, states, absent, tuple(remarks))

    @property
    def total_size(self) -> int:
        """Bytes of all safetensors files together."""
        return sum(header.size for header in self.headers.values())

    def read_bytes(self, name: str) -> bytearray:
        """A tensor's bytes as stored, whatever its dtype. Raises `InputError` if it cannot be read."""
        info = self.tensors[name]
        return self._read(info.file, [info.start], info.nbytes)

    def read_tensor(self, name: str) -> Tensor:
        """A whole tensor, in its stored dtype and shape. For small tensors: `convert/shards.py` streams larger ones.

        Raises:
            InputError: PyTorch has no such dtype, or the file cannot be read.
            KeyError: there is no tensor of this name.
        """
        info = self.tensors[name]
        return _as_tensor(self.read_bytes(name), self._torch_dtype(name), info.shape)

    def read_outputs(self, name: str, axis: int, limit: int) -> Iterator[Tensor]:
        """A weight, block by block: a block has all input channels of some output channels.

        Args:
            name: the tensor.
            axis: the axis of the input channels. The others are the output channels, in their order.
            limit: the most bytes of a block, unless one output channel has more.

        Yields:
            `[outputs, inputs]`, in its stored dtype.

        Raises:
            InputError: PyTorch has no such dtype, or the file cannot be read.
        """
        info, dtype = self.tensors[name], self._torch_dtype(name)
        outer, inputs, inner = math.prod(info.shape[:axis]), info.shape[axis], math.prod(info.shape[axis + 1 :])
        size = dtype.itemsize
        step = max(1, limit // max(1, inputs * size))
        if inner == 1:
            for first in range(0, outer, step):
                count = min(step, outer - first)
                data = self._read(info.file, [info.start + first * inputs * size], count * inputs * size)
                yield _as_tensor(data, dtype, (count, inputs))
            return
        for row in range(outer):
            begin, end = (info.start + place * inputs * inner * size for place in (row, row + 1))
            for first in range(0, inner, step):
                count = min(step, inner - first)
                starts = range(begin + first * size, end, inner * size)
                yield _as_tensor(self._read(info.file, starts, count * size), dtype, (inputs, count)).T

    def part(self, shards: Collection[str], more: Collection[str]) -> "Checkpoint":
        """Some files of the checkpoint, and more tensors from any; small, and to be found from any folder."""
        headers = {name: header for name, header in self.headers.items() if name in shards}
        names = {name for header in headers.values() for name in header.tensors} | {*more}
        tensors = {name: self.tensors[name] for name in sorted(names & self.tensors.keys())}
        files = sorted({*headers, *(info.file for info in tensors.values())})
        return replace(
            self,
            folder=Path(os.path.abspath(self.folder)),
            config={},
            headers=headers,
            tensors=tensors,
            index=None,
            states={file: self.states[file] for file in files},
            absent=(),
            remarks=(),
        )

    def with_states_of(self, names: list[str]) -> "Checkpoint":
        """The same checkpoint, watching more files of its folder. Raises `InputError` if one cannot be read."""
        return replace(self, states=self.states | _states(self.folder, names))

    def check_unchanged(self) -> None:
        """Raise `InputError` if one of the files was replaced or written to since it was opened."""
        for name, state in self.states.items():
            if FileState.of(self.folder / name) != state:
                raise InputError(
                    f"{self.folder / name}: expected the file to stay as it was when the run began, found it changed; "
                    "run again when nothing writes to it"
                )

    def _torch_dtype(self, name: str) -> torch.dtype:
        info = self.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            path = self.folder / info.file
            raise InputError(
                f"{path}: expected tensor {name} in a dtype that PyTorch computes with, found {info.dtype}"
            )
        return TORCH_DTYPES[info.dtype]

    def _read(self, file: str, starts: Sequence[int], nbytes: int) -> bytearray:
        return _read(self.folder / file, starts, nbytes)


def _read(path: Path, starts: Sequence[int], nbytes: int) -> bytearray:
    """So many bytes from each of the starts, joined."""
    data = bytearray(len(starts) * nbytes)
    try:
        with open_file(path) as handle:
            for place, start in enumerate(starts):
                handle.seek(start)
                view = memoryview(data)[place * nbytes : (place + 1) * nbytes]
                while view and (count := handle.readinto(view)):
                    view = view[count:]
                if view:
                    raise InputError(f"{path}: expected {start + nbytes} bytes, found the file shorter; fetch it again")
    except OSError as error:
        raise cannot_read(path, error) from error
    return data


def _without_copies(
    folder: Path, weight_map: dict[str, str], headers: dict[str, Header]
) -> tuple[dict[str, Header], list[str]]:
    """The headers with copies of tensors marked as passed over: the index says which file counts. Also remarks.

    Transformers takes a tensor from the last of the files that hold it, whatever the index says. So copies with other
    values are refused, unless the index names the last file.
    """
    headers, remarks = dict(headers), []
    names = Counter(name for header in headers.values() for name in header.tensors)
    for tensor in (name for name, count in names.items() if count > 1):
        files = [file for file, header in headers.items() if tensor in header.tensors]
        listed = weight_map.get(tensor)
        if listed not in files:
            continue  # the check of the index says what is wrong
        named = headers[listed].tensors[tensor]
        for file in files:
            if file == listed:
                continue
            if listed != files[-1] and not _equal(folder, named, headers[file].tensors[tensor]):
                raise InputError(
                    f"{folder / INDEX_FILE}: expected {tensor} once, or the same everywhere, found it in {listed}, "
                    f"which the index names, and with other values in {file}; Transformers loads that of {files[-1]}: "
                    "find out which one is meant, and save the model again with it"
                )
            headers[file] = replace(headers[file], passed_over=headers[file].passed_over | {tensor})
        remarks.append(f"{tensor} is in {' and '.join(files)}; {listed} counts, as {INDEX_FILE} names it")
    return headers, remarks


def _equal(folder: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors are the same, byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    blocks = range(0, one.nbytes, _BLOCK)

    def read(info: TensorInfo, at: int) -> bytearray:
        return _read(folder / info.file, [info.start + at], min(_BLOCK, info.nbytes - at))

    return all(read(one, at) == read(other, at) for at in blocks)


# What a folder may hold instead of config.json, or of weights -> what that is, and what to do.
_SOMETHING_ELSE = {
    "adapter_config.json": "an adapter without its model; give the model that adapter_config.json names as its base",
    "model_index.json": "a diffusers pipeline of several models; give the folder of one of them, such as text_encoder",
    "*.gguf": "a GGUF file; give the checkpoint in safetensors that it was made from",
    "params.json": "weights in their authors' own format; fetch the version for Transformers, which has config.json",
}


def check_has_config(folder: Path, source: str | Path) -> None:
    """Refuse a folder without config.json, and say what it is instead.

    Args:
        folder: the folder.
        source: what the user gave for it, for the message.

    Raises:
        InputError: there is no config.json, or the folder cannot be read.
    """
    if os.path.lexists(folder / CONFIG_FILE):
        return
    other = _something_else(_names_in(folder))
    raise InputError(
        f"{source}: expected a model's folder, found no {CONFIG_FILE} in it"
        + (f", but {other}" if other else "; fetch the whole repository")
    )


def _something_else(names: list[str]) -> str | None:
    return next((found for pattern, found in _SOMETHING_ELSE.items() if fnmatch.filter(names, pattern)), None)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise cannot_read(folder, error) from error


def _states(folder: Path, names: list[str]) -> dict[str, FileState]:
    """The states of files. Raises `InputError` if one is not in the folder."""
    for name in names:
        check_inside(folder, name)
    return {name: FileState.of(folder / name) for name in names}


def read_json(path: Path, remedy: str = "fetch the file again") -> dict[str, Any]:
    """Read a JSON object from a file. Raises `InputError`, which ends with `remedy`, if there is none."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: expected a JSON file, found none; {remedy}")
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise InputError(f"{path}: expected a JSON file of at most {MAX_BYTES} bytes, found {size}; {remedy}")
            return parse_object(file.read(size))
    except OSError as error:
        raise cannot_read(path, error) from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found something else ({error}); {remedy}") from error


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index, with checked file names; None for a single file. As in Transformers, a single file has precedence."""
    path = folder / INDEX_FILE
    single = os.path.lexists(folder / SINGLE_FILE)
    if not os.path.lexists(path):
        if not single:
            raise _no_weights(folder)
        return None
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: expected weight_map (tensor name to file name), found none; fetch the file again")
    if not isinstance(index.get("metadata"), dict | None):
        raise InputError(f"{path}: expected metadata as an object, found something else; fetch the file again")
    if single and set(map(str, weight_map.values())) != {SINGLE_FILE}:
        # The index is left over from shards that were merged into the single file.
        return None
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise InputError(
                f"{path}: expected the name of a safetensors file in the same folder for {tensor}, found "
                f"{repr(name)[:200]}; this index is not to be trusted"
            )
    names = sorted(set(weight_map.values()))
    check_names_differ(folder, names)
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        raise InputError(
            f"{path}: expected {len(names)} files, {len(missing)} missing: {_some(missing)}; fetch what is missing"
        )
    return index


def _no_weights(folder: Path) -> InputError:
    names = _names_in(folder)
    safetensors = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles and not safetensors:
        return InputError(
            f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found weights as pickles only ({pickles[0]}); "
            "convert them first: load the model with Transformers and save_pretrained() it, which writes safetensors"
        )
    if not safetensors and (other := _something_else(names)):
        return InputError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found {other}")
    found = f"{_some(safetensors)} without an index" if safetensors else "no weights"
    return InputError(
        f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found}; fetch the whole repository (by a hub id, no "
        "weights in other formats are fetched: if it has no safetensors, save the model as such first)"
    )


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\:\0") and not name.startswith(".")


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        where = tensors[unlisted[0]].file
        raise InputError(
            f"{path}: expected every tensor of the shards, found {len(unlisted)} missing, in {where} and perhaps "
            f"others: {_some(unlisted)}; fetch index and shards again"
        )
    for name, file in weight_map.items():
        if name in tensors and tensors[name].file != file:
            raise InputError(
                f"{path}: expected {name} in {file}, found it in {tensors[name].file}; fetch index and shards again"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _as_tensor(raw: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # `torch.frombuffer` accepts no empty buffer.
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)
