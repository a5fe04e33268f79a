"""Reads the tensors in files that PyTorch wrote, without PyTorch and without executing what a pickle asks for.

`torch.save` has written a zip archive since PyTorch 1.6, and before that a sequence of pickles. Public weights exist in
both formats. The unpickler knows containers, numbers and tensors, and refuses everything else.
"""

import collections
import dataclasses
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sisma_jax.data.photos import read_bytes
from sisma_jax.errors import InputError

TORCH_SUFFIXES = (".pth", ".pt")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
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


@dataclasses.dataclass
class _Storage:
    """The numbers of one or more tensors; the format before 1.6 has them after the pickle that names them."""

    dtype: np.dtype[Any]
    count: int
    values: np.ndarray | None = None


@dataclasses.dataclass
class _Tensor:
    """A view of a storage, as `torch._utils._rebuild_tensor_v2` describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

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
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
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
            return _DTYPES[name]
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not a tensor") from None

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], np.dtype):
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it contains views of storages, which are not read")
        return self._load_storage(pid[1], str(pid[2]), int(pid[4]))


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict by their names, as arrays.

    Args:
      path: of a file that `torch.save` wrote, on the disk or in a bucket. It contains a state dict, or a dict that has
        one under the key "state_dict".

    Raises:
      InputError: the file cannot be read, is damaged, or contains something else.
    """
    data = read_bytes(path)
    try:
        return _state_dict(_read_zip(data) if data.startswith(b"PK") else _read_legacy(data))
    except Exception as error:  # unpicklers and archives raise whatever a damaged file makes them
        raise InputError(f"{os.fspath(path)} cannot be read as weights of PyTorch: {error}.") from error


def _state_dict(content: Any) -> dict[str, np.ndarray]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"it contains a {type(content).__name__}, and not a state dict")
    if not all(isinstance(name, str) and isinstance(value, _Tensor) for name, value in content.items()):
        raise ValueError("it contains more than named tensors; save the state dict alone")
    return {str(name): tensor.array() for name, tensor in content.items()}


def _read_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder, storages = pickled.removesuffix("data.pkl"), dict[str, _Storage]()

        def load(dtype: np.dtype[Any], key: str, count: int) -> _Storage:
            if key not in storages:
                values = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)
                if len(values) < count:
                    raise ValueError(f"storage {key} is truncated")
                storages[key] = _Storage(dtype, count, values)
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(pickled)), load).load()


def _read_legacy(data: bytes) -> Any:
    file, storages = io.BytesIO(data), dict[str, _Storage]()

    def load(dtype: np.dtype[Any], key: str, count: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, count))

    if _Unpickler(file, load).load() != _LEGACY_MAGIC:
        raise ValueError("it is another kind of file")
    _Unpickler(file, load).load()  # version of the protocol
    _Unpickler(file, load).load()  # sizes of types on the machine that wrote the file
    content = _Unpickler(file, load).load()
    for key in _Unpickler(file, load).load():
        (count,) = struct.unpack("<q", file.read(8))
        storage = storages[str(key)]
        raw = file.read(count * storage.dtype.itemsize)
        if count != storage.count or len(raw) < count * storage.dtype.itemsize:
            raise ValueError(f"storage {key} is truncated")
        storage.values = np.frombuffer(raw, storage.dtype)
    if missing := [key for key, storage in storages.items() if storage.values is None]:
        raise ValueError(f"storage {missing[0]} is missing")
    return content
