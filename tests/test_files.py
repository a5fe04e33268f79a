import pytest

from sisma_jax.files import write_atomically


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
