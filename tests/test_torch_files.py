"""Files of PyTorch are read without PyTorch, and nothing in them is executed."""

import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

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


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/executed"),)


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
        (pickle.dumps(Attack()), r"it contains pathlib\S*, which is not a tensor"),
        (zipped(Attack()), r"it contains pathlib\S*, which is not a tensor"),
        (zipped({"weights": {"epoch": 3}}), "it contains more than named tensors; save the state dict alone"),
        (zipped([1, 2]), "it contains a list, and not a state dict"),
        (zipped({}), "it contains a dict, and not a state dict"),
        (FILES["tensors.pth"][:-30], "cannot be read"),
        (FILES["tensors_legacy.pth"][:-20], r"storage \d+ is truncated|cannot be read"),
    ],
)
def test_other_files_are_refused_and_nothing_is_executed(tmp_path, data, message):
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(InputError, match=rf"weights\.pth cannot be read as weights of PyTorch: .*{message}|{message}"):
        read_state_dict(tmp_path / "weights.pth")
    assert not Path("/tmp/executed").exists()


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
