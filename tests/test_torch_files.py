"""Files of PyTorch are read without PyTorch, and nothing in them is executed."""

import contextlib
import io
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy

from sisma_jax import torch_files
from sisma_jax.errors import InputError
from sisma_jax.torch_files import read_state_dict

GOLDEN = Path(__file__).parent / "models" / "golden"
FILES = {name: (GOLDEN / name).read_bytes() for name in ("tensors.pth", "tensors_legacy.pth")}
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
EXPECTED = {
    "plain": BASE,
    "transposed": BASE.T,
    "part": BASE[1:3, 2:],
    "half": BASE.astype(np.float16),
    "counter": np.int64(7),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": BASE[0],
}


@pytest.mark.parametrize("name", FILES)
def test_tensors_are_read_from_both_formats(name):
    tensors = read_state_dict(GOLDEN / name)
    assert tensors.keys() == EXPECTED.keys()
    for key, expected in EXPECTED.items():
        np.testing.assert_array_equal(tensors[key], expected)
        assert tensors[key].dtype == np.asarray(expected).dtype


def test_safetensors_are_recognized_by_their_content(tmp_path):
    expected = {"plain": BASE, "half": BASE.astype(np.float16)}
    safetensors.numpy.save_file(expected, tmp_path / "weights.pth")
    tensors = read_state_dict(tmp_path / "weights.pth")
    assert tensors.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(tensors[key], array)
        assert tensors[key].dtype == array.dtype


EXECUTED: list[str] = []


def execute(text: str) -> None:
    EXECUTED.append(text)


class Attack:
    def __reduce__(self):
        return execute, ("by a pickle",)


def zipped(content: object) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as weights of PyTorch"),
        (b"text", "cannot be read as weights of PyTorch"),
        (pickle.dumps({"a": 1}), "it is another kind of file"),
        (pickle.dumps(Attack()), r"it contains tests\.test_torch_files\.execute, which is not a tensor"),
        (zipped(Attack()), r"it contains tests\.test_torch_files\.execute, which is not a tensor"),
        (zipped({"weights": {"epoch": 3}}), "it contains more than named tensors; save the state dict alone"),
        (zipped([1, 2]), "it contains a list, and not a state dict"),
        (zipped({}), "it contains an empty state dict"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (safetensors.numpy.save({}), "it contains no tensors"),
        (safetensors.numpy.save({"plain": BASE})[:-4], "cannot be read as weights of PyTorch: SafetensorError"),
        (FILES["tensors.pth"][:-30], "cannot be read"),
        (FILES["tensors_legacy.pth"][:-20], r"storage \d+ is truncated|cannot be read"),
    ],
)
def test_other_files_are_refused_and_nothing_is_executed(tmp_path, data, message):
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(InputError, match=rf"weights\.pth cannot be read as weights of PyTorch: .*{message}|{message}"):
        read_state_dict(tmp_path / "weights.pth")
    assert not EXECUTED
    pickle.loads(pickle.dumps(Attack()))
    assert EXECUTED.pop() == "by a pickle"  # what an ordinary unpickler does


# Parts of pickles that PyTorch does not write, in the opcodes of the module pickletools.


def string(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


def integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def storage(count: int = 4, kind: bytes = b"FloatStorage", key: bytes = b"0") -> bytes:
    count_code = b"J" + struct.pack("<i", count)
    return b"(" + string(b"storage") + b"ctorch\n" + kind + b"\n" + string(key) + string(b"cpu") + count_code + b"tQ"


def tensor(shape: Sequence[int] = (4,), strides: Sequence[int] = (1,), of: bytes = storage(), offset: int = 0) -> bytes:
    arguments = of + b"J" + struct.pack("<i", offset) + integers(shape) + integers(strides) + b"I00\nN"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def archive(
    *tensors: bytes, before: bytes = b"", compression: int = zipfile.ZIP_STORED, size: int = 16, **files: bytes
) -> bytes:
    """A zip archive whose tensors w0, w1, ... share a storage of `size` bytes."""
    named = b"".join(string(b"w%d" % i) + code + b"s" for i, code in enumerate(tensors))
    numbers = np.arange(4, dtype="<f4").tobytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + before + b"}" + named + b".")
        file.writestr("archive/data/0", numbers + bytes(size - len(numbers)))
        for name, content in files.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def changed(object_: bytes, name: bytes, value: bytes) -> bytes:
    """The object after the pickle has set its attribute."""
    return object_ + b"}" + string(name) + value + b"sb"


def test_tensors_that_share_or_repeat_numbers_are_read(tmp_path):
    (tmp_path / "weights.pth").write_bytes(archive(tensor(), tensor((2,), (2,), offset=1), tensor((3, 4), (0, 1))))
    tensors = read_state_dict(tmp_path / "weights.pth")
    np.testing.assert_array_equal(tensors["w0"], [0, 1, 2, 3])
    np.testing.assert_array_equal(tensors["w1"], [1, 3])
    np.testing.assert_array_equal(tensors["w2"], np.tile(np.arange(4), (3, 1)))


HUGE = 1 << 24


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(tensor(), byteorder=b"big"), "big-endian"),
        (archive(tensor((5,))), "a tensor exceeds its storage"),
        (archive(tensor((4,), (-1,), offset=3)), "a tensor exceeds its storage"),
        (archive(tensor(offset=-1)), "a tensor exceeds its storage"),
        (archive(tensor((4,), (1, 1))), "zip"),
        (archive(tensor((-1, HUGE), (1, 1)), tensor()), "a tensor has a negative size"),
        (archive(tensor(of=storage(5))), "storage 0 is truncated"),
        (archive(tensor(of=storage(key=b"1"))), "no item named 'archive/data/1'"),
        (archive(tensor(of=storage(kind=b"BFloat16Storage"))), "a BFloat16Storage, which is not read; .* as float32"),
        (archive(tensor(of=string(b"0"))), "a tensor without a storage"),
        # Small files that would fill the memory.
        (archive(tensor((HUGE,), (0,))), "its tensors have 67108864 bytes, and the file has"),
        (archive(tensor((HUGE,)), size=4 * HUGE, compression=zipfile.ZIP_DEFLATED), "it is a compressed archive"),
        (archive(tensor(), before=b"Nr" + struct.pack("<I", HUGE) + b"0"), "its pickle is damaged"),
        # Numbers behind the end of the storage would be read, and functions would stay changed.
        (archive(tensor(of=changed(storage(), b"dtype", b"ctorch\nDoubleStorage\n"))), "changes an object"),
        (archive(changed(tensor(), b"shape", integers((8,)))), "changes an object"),
        (archive(changed(b"ctorch._utils\n_rebuild_parameter\n", b"name", b"N")), "changes an object"),
        (archive(changed(b"ctorch\nFloatStorage\n", b"value", b"N")), "changes an object"),
    ],
)
def test_pickles_that_pytorch_does_not_write_are_refused(tmp_path, data, message):
    (tmp_path / "weights.pth").write_bytes(data)
    before = dict(vars(torch_files._rebuild_parameter))
    with pytest.raises(InputError, match=rf"weights\.pth cannot be read as weights of PyTorch: .*{message}"):
        read_state_dict(tmp_path / "weights.pth")
    assert vars(torch_files._rebuild_parameter) == before


@hypothesis.given(st.sampled_from(sorted(FILES)), st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=300)
def test_damaged_files_are_read_or_refused(tmp_path, name, position, noise):
    data = bytearray(FILES[name])
    position %= len(data)
    data[position : position + len(noise)] = noise
    (tmp_path / name).write_bytes(data)
    with contextlib.suppress(InputError):
        tensors = read_state_dict(tmp_path / name)
        assert all(isinstance(tensor, np.ndarray) for tensor in tensors.values())
