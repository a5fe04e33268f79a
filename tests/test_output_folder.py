"""The folders of results: a command that fails leaves none that it created, and none of the user's is deleted."""

import pytest

from sisma_jax.commands.report import output_folder


@pytest.mark.parametrize("given", ["", "out", "parent/out"])
def test_a_command_that_fails_leaves_no_empty_folder(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError), output_folder(given, tmp_path / "samples"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_user_stays(tmp_path):
    (tmp_path / "samples").mkdir()
    with pytest.raises(KeyError), output_folder("", tmp_path / "samples"):
        raise KeyError
    assert (tmp_path / "samples").is_dir()


def test_results_before_the_failure_stay(tmp_path):
    def write_and_fail(folder):
        (folder / "face.png").touch()
        raise KeyError

    with pytest.raises(KeyError), output_folder(str(tmp_path / "new/out"), tmp_path / "samples") as out:
        write_and_fail(out)
    assert (tmp_path / "new/out/face.png").exists()
