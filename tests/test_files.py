import json
from pathlib import Path

import pytest
from etils import epath

from sisma_jax import files
from sisma_jax.errors import InputError
from sisma_jax.files import is_bucket, on_disk, to_path, write_atomically
from tests.bucket import make_bucket


@pytest.fixture
def bucket(monkeypatch):
    return make_bucket(monkeypatch)


@pytest.mark.parametrize("contents", [("one\n", "zwei ä\n"), (b"\x00\x01", b"")])
def test_the_file_is_replaced_and_nothing_else_is_left(tmp_path, contents):
    path = tmp_path / "file"
    for content in contents:
        write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failure_names_the_file_and_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_paths_are_of_the_disk_or_of_a_bucket(bucket):
    for path in ("runs/demo", Path("runs/demo"), epath.Path("runs/demo")):
        assert to_path(path) == Path("runs/demo")
        assert isinstance(to_path(path), Path)
        assert not is_bucket(to_path(path))
    for path in ("gs://bucket/run", epath.Path("gs://bucket/run"), Path("gs://bucket/run"), bucket / "run"):
        assert str(to_path(path)) == "gs://bucket/run"
        assert is_bucket(to_path(path))


def test_what_buckets_need_is_named(monkeypatch):
    monkeypatch.setattr(files, "_reaches_buckets", lambda: False)
    with pytest.raises(InputError, match="pip install gcsfs"):
        to_path("gs://bucket/run")


@pytest.mark.parametrize("contents", [("one\n", "zwei ä\n"), (b"\x00\x01", b"")])
def test_the_object_in_a_bucket_is_replaced(bucket, contents):
    path = bucket / "run" / "object"
    for content in contents:
        write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [entry.name for entry in (bucket / "run").iterdir()] == ["object"]


def test_whatever_a_bucket_raises_is_an_os_error(bucket, monkeypatch):
    class HttpError(Exception):
        pass

    def fail(*_):
        raise HttpError("503")

    monkeypatch.setattr(type(bucket), "write_bytes", fail)
    with pytest.raises(OSError, match=r"gs://bucket/object: HttpError: 503"):
        write_atomically(bucket / "object", "new")


def test_an_object_in_a_bucket_can_be_read_as_a_file_on_the_disk(bucket, tmp_path):
    write_atomically(bucket / "values.json", "[1, 2]")
    with on_disk(bucket / "values.json") as path:
        assert json.loads(Path(path).read_text()) == [1, 2]
    with on_disk(tmp_path / "here") as path:
        assert path == tmp_path / "here"
    with pytest.raises(FileNotFoundError), on_disk(bucket / "missing"):
        pass
