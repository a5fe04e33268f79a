"""Reads the tensors in files that PyTorch wrote, without PyTorch and without executing what a pickle asks for.

`torch.save` has written a zip archive since PyTorch 1.6, and before that a sequence of pickles. Public weights exist in
both formats, and as safetensors. The unpickler knows containers, numbers and tensors, and refuses everything else. What
a pickle gets from here is sealed, because a pickle may set the attributes of any object that it refers to.
"""

import collections
import dataclasses
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import safetensors.numpy

from sisma_jax.data.photos import read_bytes
from sisma_jax.errors import InputError

TORCH_SUFFIXES = (".pth", ".pt")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Tensors may share a storage or repeat its numbers, so a small file can describe arrays of any size.
_MAX_BYTES_PER_BYTE_OF_FILE = 16
_MIN_BYTES_ALLOWED = 1 << 20
_MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")
_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Sealed:
    """Base of everything that a pickle can refer to: the pickle cannot set its attributes."""

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("it changes an object that is not its own")


@dataclasses.dataclass
class _Name(_Sealed):
    """A name in a pickle: of a type of storage, with a dtype as its value, or of a function that may be called."""

    value: Any

    def __call__(self, *arguments: Any) -> Any:
        return self.value(*arguments)


class _Dict(collections.OrderedDict[Any, Any]):
    """An OrderedDict without attributes. State dicts have the versions of their modules in an attribute."""

    def __setstate__(self, state: object) -> None:
        del state


@dataclasses.dataclass
class _Storage(_Sealed):
    """The numbers of one or more tensors; the format before 1.6 has them after the pickle that names them."""

    dtype: np.dtype[Any]
    count: int
    values: np.ndarray | None = None


@dataclasses.dataclass
class _Tensor(_Sealed):
    """A view of a storage, as `torch._utils._rebuild_tensor_v2` describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def array(self) -> np.ndarray:
        assert self.storage.values is not None, "the storage has been read"
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.storage.dtype)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if self.offset < 0 or min(self.strides, default=0) < 0 or last >= len(self.storage.values):
            raise ValueError("a tensor exceeds its storage")
        strides = [stride * self.storage.dtype.itemsize for stride in self.strides]
        start = self.storage.values[self.offset :]
        return np.lib.stride_tricks.as_strided(start, self.shape, strides, writeable=False).copy()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    tensor = _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
    if min(tensor.shape, default=0) < 0:
        raise pickle.UnpicklingError("a tensor has a negative size")
    return tensor


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and tensors only."""

    def __init__(self, file: io.BytesIO, load_storage: Callable[[np.dtype[Any], str, int], _Storage]):
        super().__init__(file, encoding="latin1")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _Name(_DTYPES[name])
        if module == "torch" and name.endswith("Storage"):
            raise pickle.UnpicklingError(f"it contains a {name}, which is not read; save the weights as float32")
        try:
            return _Name(_ALLOWED[module, name])
        except KeyError:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not a tensor") from None

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Name):
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        if not isinstance(dtype := pid[1].value, np.dtype):
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it contains views of storages, which are not read")
        return self._load_storage(dtype, str(pid[2]), int(pid[4]))


def _unpickle(file: io.BytesIO, load_storage: Callable[[np.dtype[Any], str, int], _Storage]) -> Any:
    """Returns the content of the pickle at the file's position, and moves the position behind the pickle."""
    start = file.tell()
    for opcode, argument, position in pickletools.genops(file):
        # Python makes its memo as long as the largest index, which one damaged byte turns into gigabytes.
        if opcode.name in _MEMO_OPCODES and isinstance(argument, int) and argument > (position or 0) - start:
            raise pickle.UnpicklingError("its pickle is damaged")
    file.seek(start)
    return _Unpickler(file, load_storage).load()


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict by their names, as arrays.

    Args:
      path: of a file that `torch.save` wrote, or of safetensors, on the disk or in a bucket; the content tells which.
        It contains a state dict, or a dict that has one under the key "state_dict".

    Raises:
      InputError: the file cannot be read, is damaged, or contains something else.
    """
    data = read_bytes(path)
    try:
        return _parse(data)
    except Exception as error:  # unpicklers and archives raise whatever a damaged file makes them
        reason = str(error) if isinstance(error, (ValueError, pickle.UnpicklingError)) else repr(error)
        raise InputError(
            f"{os.fspath(path)} cannot be read as weights of PyTorch: {reason.rstrip('.')}. Download or copy it again, "
            "or give a file with a state dict."
        ) from error


def _parse(data: bytes) -> dict[str, np.ndarray]:
    if data[8:9] == b"{":  # after the length of the header, which is JSON
        return _read_safetensors(data)
    if data.lstrip().startswith(b"<"):
        raise ValueError("it is a web page, as some servers send before the file itself")
    return _state_dict(_read_zip(data) if data.startswith(b"PK") else _read_legacy(data), len(data))


def _state_dict(content: Any, file_size: int) -> dict[str, np.ndarray]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"it contains a {type(content).__name__.lstrip('_')}, and not a state dict")
    if not content:
        raise ValueError("it contains an empty state dict")
    if not all(isinstance(name, str) and isinstance(value, _Tensor) for name, value in content.items()):
        raise ValueError("it contains more than named tensors; save the state dict alone")
    num_bytes = sum(tensor.num_bytes for tensor in content.values())
    if num_bytes > max(_MAX_BYTES_PER_BYTE_OF_FILE * file_size, _MIN_BYTES_ALLOWED):
        raise ValueError(f"its tensors have {num_bytes} bytes, and the file has {file_size}")
    return {name: tensor.array() for name, tensor in content.items()}


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    tensors = safetensors.numpy.load(data)
    if not tensors:
        raise ValueError("it contains no tensors")
    return tensors


def _read_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it is a zip archive with {len(pickles)} files data.pkl, want 1")
        if sum(info.file_size for info in archive.infolist()) > len(data):
            raise ValueError("it is a compressed archive, and those of PyTorch are not")
        folder, storages = pickles[0].removesuffix("data.pkl"), dict[str, _Storage]()
        order = f"{folder}byteorder"
        _check_byte_order(order not in archive.namelist() or archive.read(order) == b"little")

        def load(dtype: np.dtype[Any], key: str, count: int) -> _Storage:
            if key not in storages:
                values = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)
                if len(values) < count:
                    raise ValueError(f"storage {key} is truncated")
                storages[key] = _Storage(dtype, count, values)
            return storages[key]

        return _unpickle(io.BytesIO(archive.read(pickles[0])), load)


def _read_legacy(data: bytes) -> Any:
    file, storages = io.BytesIO(data), dict[str, _Storage]()

    def load(dtype: np.dtype[Any], key: str, count: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, count))

    if _unpickle(file, load) != _LEGACY_MAGIC:
        raise ValueError("it is another kind of file")
    _unpickle(file, load)  # version of the protocol
    machine = _unpickle(file, load)
    _check_byte_order(not isinstance(machine, Mapping) or machine.get("little_endian", True))
    content = _unpickle(file, load)
    for key in map(str, _unpickle(file, load)):
        (count,) = struct.unpack("<q", file.read(8))
        if key not in storages:
            raise ValueError(f"no tensor has the storage {key}")
        storage = storages[key]
        raw = file.read(max(count, 0) * storage.dtype.itemsize)
        if count != storage.count or len(raw) < count * storage.dtype.itemsize:
            raise ValueError(f"storage {key} is truncated")
        storage.values = np.frombuffer(raw, storage.dtype)
    if missing := [key for key, storage in storages.items() if storage.values is None]:
        raise ValueError(f"storage {missing[0]} is missing")
    return content


def _check_byte_order(is_little: bool) -> None:
    if not is_little:
        raise ValueError("it was written on a big-endian machine; save it again on another one")
