"""A checkpoint in a folder: config.json and safetensors files, validated before use.

* One file (`model.safetensors`), or shards with an index (`model.safetensors.index.json`).
* What the index, the headers and the files say must agree; what does not is an `InputError` before any work is done.
* Nothing is mapped and nothing large is read: tensors are known by their byte offsets, and read when asked for.
* A name in the index must be a plain file name, and a link must stay in the folder (or in the blobs of a snapshot of
  the hub's cache): a checkpoint cannot point out of its folder.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashnorm.checkpoint.header import TORCH_DTYPES, Header, TensorInfo, read_header
from flashnorm.checkpoint.source_files import cannot_read, check_inside, check_names_differ, open_file, status_of_file
from flashnorm.checkpoint.strict_json import MAX_BYTES, parse_object
from flashnorm.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class FileState:
    """Enough of `stat` to notice that a file was replaced or written to. Times in nanoseconds.

    The time of the last change of the file's status cannot be set back, as that of its content can.
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
        folder: where it is.
        config: config.json, parsed.
        headers: file name -> header, for every safetensors file of the model, in order of their names.
        tensors: tensor name -> dtype, shape and place in a file, in the order of the files and of their bytes.
        index: the parsed index, None for a single file.
        states: file name -> its state when it was opened, for config, index and safetensors files.
    """

    folder: Path
    config: dict[str, Any]
    headers: dict[str, Header]
    tensors: dict[str, TensorInfo]
    index: dict[str, Any] | None
    states: dict[str, FileState]

    @staticmethod
    def open(folder: str | Path) -> "Checkpoint":
        """Open and validate a checkpoint. Reads config, index and headers only.

        Raises:
            InputError: it is no checkpoint in safetensors format, or a damaged or incomplete one.
        """
        folder = Path(folder)
        if not os.path.isdir(folder):
            found = "a file" if os.path.exists(folder) else "nothing"
            raise InputError(f"{folder}: expected a folder with config.json and safetensors files, found {found}")
        described = [name for name in (CONFIG_FILE, INDEX_FILE) if os.path.lexists(folder / name)]
        states = _states(folder, described)
        config = read_json(folder / CONFIG_FILE, "a checkpoint has one; fetch the whole repository")
        index = _read_index(folder)
        files = [SINGLE_FILE] if index is None else sorted(set(index["weight_map"].values()))
        if index is None:
            states.pop(INDEX_FILE, None)
        states |= _states(folder, files)
        headers = {name: read_header(folder / name) for name in files}
        tensors: dict[str, TensorInfo] = {}
        for name, header in headers.items():
            for twice in tensors.keys() & header.tensors.keys():
                raise InputError(
                    f"{folder / name}: expected every tensor once, found {twice} also in {tensors[twice].file}; "
                    "fetch the checkpoint again"
                )
            tensors |= header.tensors
        if index is not None:
            _check_index(folder / INDEX_FILE, index["weight_map"], tensors)
        return Checkpoint(folder, config, headers, tensors, index, states)

    @property
    def total_size(self) -> int:
        """Bytes of all safetensors files together."""
        return sum(header.size for header in self.headers.values())

    def read_bytes(self, name: str) -> bytearray:
        """A tensor's bytes as stored, whatever its dtype. Raises `InputError` if it cannot be read."""
        info = self.tensors[name]
        return self._read(info.file, info.start, info.nbytes)

    def read_tensor(self, name: str) -> Tensor:
        """A whole tensor, in its stored dtype and shape. For small ones: larger ones are streamed, see `shard.py`.

        Raises:
            InputError: PyTorch has no such dtype, or the file cannot be read.
            KeyError: there is no tensor of this name.
        """
        info = self.tensors[name]
        return _as_tensor(self.read_bytes(name), self._torch_dtype(name), info.shape)

    def read_outputs(self, name: str, axis: int, limit: int) -> Iterator[Tensor]:
        """A weight of two axes, block by block: all of `axis`, some of the other.

        Args:
            name: the tensor.
            axis: the input channels'.
            limit: bytes of a block, at most, if one output channel is not more.

        Yields:
            `[outputs, inputs]`, in its stored dtype.

        Raises:
            InputError: PyTorch has no such dtype, or the file cannot be read.
        """
        info, dtype = self.tensors[name], self._torch_dtype(name)
        inputs, outputs, size = info.shape[axis], info.shape[1 - axis], dtype.itemsize
        step = max(1, limit // max(1, inputs * size))
        for first in range(0, outputs, step):
            count = min(step, outputs - first)
            if axis == 1:
                data = self._read(info.file, info.start + first * inputs * size, count * inputs * size)
                yield _as_tensor(data, dtype, (count, inputs))
            else:
                starts = range(info.start + first * size, info.end, outputs * size)
                rows = [self._read(info.file, start, count * size) for start in starts]
                yield _as_tensor(bytearray(b"".join(rows)), dtype, (inputs, count)).T

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

    def _read(self, file: str, start: int, nbytes: int) -> bytearray:
        path = self.folder / file
        data = bytearray(nbytes)
        try:
            with open_file(path) as handle:
                handle.seek(start)
                view = memoryview(data)
                while view and (count := handle.readinto(view)):
                    view = view[count:]
        except OSError as error:
            raise cannot_read(path, error) from error
        if view:
            raise InputError(f"{path}: expected {start + nbytes} bytes, found the file shorter; fetch it again")
        return data


def _states(folder: Path, names: list[str]) -> dict[str, FileState]:
    """The states of files, which must be in the folder."""
    for name in names:
        check_inside(folder, name)
    return {name: FileState.of(folder / name) for name in names}


def read_json(path: Path, remedy: str = "fetch the file again") -> dict[str, Any]:
    """Read a JSON object from a file. Raises `InputError` if there is none; `remedy` says what to do then."""
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
    """The index, its file names checked; None for a single file. As in Transformers, a single file comes first."""
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
        # Left over from shards that were merged into the single file.
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
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise cannot_read(folder, error) from error
    safetensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles and not safetensors:
        return InputError(
            f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found weights as pickles only ({pickles[0]}); "
            "convert them first: load the model with Transformers and save_pretrained() it, which writes safetensors"
        )
    found = f"{_some(safetensors)} without an index" if safetensors else "no weights"
    return InputError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found}; fetch the whole repository")


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\:\0") and not name.startswith(".")


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise InputError(
            f"{path}: expected each tensor of the index in a shard, found {len(absent)} in none: {_some(absent)}; "
            "fetch index and shards again"
        )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        where = tensors[unlisted[0]].file
        raise InputError(
            f"{path}: expected every tensor of the shards, found {len(unlisted)} missing, in {where} and perhaps "
            f"others: {_some(unlisted)}; fetch index and shards again"
        )
    for name, file in weight_map.items():
        if tensors[name].file != file:
            raise InputError(
                f"{path}: expected {name} in {file}, found it in {tensors[name].file}; fetch index and shards again"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _as_tensor(raw: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # frombuffer takes no empty buffers.
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)
