"""The run's folder: one configuration to a run."""

import dataclasses
import os
from pathlib import Path

import pytest

from sisma_jax.config import Config, ModelConfig, TrainConfig
from sisma_jax.config_files import to_json
from sisma_jax.errors import InputError
from sisma_jax.runs.folder import open_workdir, read_config
from tests.bucket import make_bucket

CONFIG = Config(model=ModelConfig(depth=2, d_model=32), train=TrainConfig(num_steps=10, batch_size=4))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_run_gets_its_folder_and_configuration(tmp_path):
    workdir = tmp_path / "runs" / "first"
    open_workdir(workdir, CONFIG)
    assert names(workdir) == ["config.json"]
    assert read_config(workdir) == CONFIG


def test_same_configuration_resumes(tmp_path):
    open_workdir(tmp_path, CONFIG)
    open_workdir(tmp_path, CONFIG)
    assert read_config(tmp_path) == CONFIG


def test_what_may_change_is_saved_anew(tmp_path):
    open_workdir(tmp_path, CONFIG)
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, num_steps=20))
    open_workdir(tmp_path, longer)
    assert read_config(tmp_path) == longer
    assert names(tmp_path) == ["config.json"]


def test_another_configuration_is_refused_with_every_difference(tmp_path):
    open_workdir(tmp_path, CONFIG)
    other = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, depth=3),
        train=dataclasses.replace(CONFIG.train, batch_size=8, num_steps=20),
    )
    with pytest.raises(InputError) as error:
        open_workdir(tmp_path, other)
    message = str(error.value)
    assert "--model.depth: the run has 2, given 3" in message
    assert "--train.batch_size: the run has 4, given 8" in message
    assert "num_steps" not in message
    assert "--workdir" in message
    assert str(tmp_path) in message
    assert read_config(tmp_path) == CONFIG


def test_run_in_a_bucket(monkeypatch):
    workdir = make_bucket(monkeypatch) / "runs" / "first"
    with pytest.raises(InputError, match="gs://bucket/runs/first holds no run"):
        read_config(workdir)
    for _ in range(2):
        open_workdir(workdir, CONFIG)
        assert read_config(workdir) == CONFIG
    assert names(workdir) == ["config.json"]
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, depth=3))
    with pytest.raises(InputError, match=r"--model.depth: the run has 2, given 3"):
        open_workdir(workdir, other)


def test_folder_without_a_run_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{folder} holds no run"):
            read_config(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": null}',
        b'{"modle": {}}',
        b'{"model": {"detph": 1}}',
        b'{"model": {"depth": -1}}',
        b'{"model": {"depth": "two"}}',
        b"\xff\xfe\x00",
        to_json(CONFIG).encode()[:-20],
    ],
)
def test_damaged_configuration_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    for action in (lambda: read_config(tmp_path), lambda: open_workdir(tmp_path, CONFIG)):
        with pytest.raises(InputError, match=r"config\.json"):
            action()
    assert (tmp_path / "config.json").read_bytes() == content


def test_folder_that_is_or_lies_in_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"file.* cannot be created .*--workdir"):
            open_workdir(workdir, CONFIG)
        with pytest.raises(InputError, match="holds no run"):
            read_config(workdir)


def test_configuration_that_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    for action in (lambda: read_config(tmp_path), lambda: open_workdir(tmp_path, CONFIG)):
        with pytest.raises(InputError, match=r"config\.json cannot be read"):
            action()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"config\.json cannot be written"):
        open_workdir(tmp_path, CONFIG)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    open_workdir(tmp_path, CONFIG)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"config\.json cannot be written .*No space left"):
        open_workdir(tmp_path, CONFIG)
    assert names(tmp_path) == ["config.json"]
    assert read_config(tmp_path) == CONFIG
