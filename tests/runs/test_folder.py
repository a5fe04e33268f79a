"""The run's folder: one configuration to a run, which reading leaves as it is."""

import dataclasses
import json
import os
import pathlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sisma_jax.config import AutoencoderConfig, Config, ModelConfig, TrainConfig
from sisma_jax.config_files import to_json
from sisma_jax.errors import InputError
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.factory import init_params
from sisma_jax.parallel import sharding
from sisma_jax.runs import folder as module
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.folder import RunFolder
from tests.bucket import make_bucket
from tests.tiny import tiny_config

CONFIG = Config(model=ModelConfig(depth=2, d_model=32), train=TrainConfig(num_steps=10, batch_size=4))


def begin(path, config: Config = CONFIG) -> Config:
    """Returns the configuration of a run that was held for writing."""
    with RunFolder.writing(path, config) as run:
        assert run.config == config
    return RunFolder.open(path).config


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_run_gets_its_folder_and_configuration(tmp_path):
    path = tmp_path / "runs" / "first"
    assert begin(path) == CONFIG
    assert names(path) == ["config.json"]


def test_same_configuration_resumes(tmp_path):
    begin(tmp_path)
    assert begin(tmp_path) == CONFIG


def test_what_may_change_is_saved_anew(tmp_path):
    begin(tmp_path)
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, num_steps=20))
    assert begin(tmp_path, longer) == longer
    assert names(tmp_path) == ["config.json"]


def test_what_may_change_counts_as_given_and_is_not_saved_by_reading(tmp_path):
    begin(tmp_path)
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, num_steps=20))
    assert RunFolder.open(tmp_path, longer).config == longer
    assert RunFolder.open(tmp_path).config == CONFIG


def test_another_configuration_is_refused_with_every_difference(tmp_path):
    begin(tmp_path)
    other = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, depth=3),
        train=dataclasses.replace(CONFIG.train, batch_size=8, num_steps=20),
    )
    for action in (lambda: begin(tmp_path, other), lambda: RunFolder.open(tmp_path, other)):
        with pytest.raises(InputError) as error:
            action()
        message = str(error.value)
        assert "\n  model.depth: the run has 2, given 3" in message
        assert "\n  train.batch_size: the run has 4, given 8" in message
        assert "num_steps" not in message
        assert "another folder" in message
        assert str(tmp_path) in message
    assert RunFolder.open(tmp_path).config == CONFIG
    assert names(tmp_path) == ["config.json"]


def test_run_in_a_bucket(monkeypatch):
    monkeypatch.setattr(module.lock, "RENEW_SECS", 0.05)
    path = make_bucket(monkeypatch) / "runs" / "first"
    with pytest.raises(InputError, match="gs://bucket/runs/first holds no run"):
        RunFolder.open(path)
    for _ in range(2):
        assert begin(path) == CONFIG
    assert names(path) == ["config.json"]
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, depth=3))
    with pytest.raises(InputError, match=r"model.depth: the run has 2, given 3"):
        begin(path, other)


def test_folder_without_a_run_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{folder} holds no run"):
            RunFolder.open(folder)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2, "model": null}',
        b'{"version": 2, "modle": {}}',
        b'{"version": 2, "model": {"detph": 1}}',
        b'{"version": 2, "model": {"depth": -1}}',
        b'{"version": 2, "model": {"depth": "two"}}',
        b"\xff\xfe\x00",
        to_json(CONFIG).encode()[:-20],
    ],
)
def test_damaged_configuration_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    for action in (lambda: RunFolder.open(tmp_path), lambda: begin(tmp_path)):
        with pytest.raises(InputError, match=r"config\.json"):
            action()
    assert (tmp_path / "config.json").read_bytes() == content
    assert names(tmp_path) == ["config.json"]


def test_run_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    values = json.loads(to_json(CONFIG))
    del values["version"], values["data"]["classes"]
    values["model"]["d_head"] = 0
    (tmp_path / "config.json").write_text(json.dumps(values))
    for action in (lambda: RunFolder.open(tmp_path, CONFIG), lambda: begin(tmp_path)):
        with pytest.raises(InputError, match=r"config\.json is of version 1 .*train again") as error:
            action()
        assert "\n" not in str(error.value)


def test_folder_that_is_or_lies_in_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"file.* cannot be created .*name another folder"):
            begin(path)
        with pytest.raises(InputError, match="holds no run"):
            RunFolder.open(path)


def test_configuration_that_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    for action in (lambda: RunFolder.open(tmp_path), lambda: begin(tmp_path)):
        with pytest.raises(InputError, match=r"config\.json cannot be read"):
            action()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=rf"{tmp_path} cannot be written .*lock\.json"):
        begin(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    begin(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"cannot be written .*No space left.*config\.json"):
            begin(tmp_path)
    assert names(tmp_path) == ["config.json"]
    assert RunFolder.open(tmp_path).config == CONFIG


def test_every_file_of_a_run_has_one_name(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "demo", CONFIG)
    files = (
        *(run.checkpoints, run.metrics, run.tensorboard, run.profile, run.samples, run.evaluations),
        *(
            run.evaluation.result,
            run.loss_curve,
            run.parser_path,
            run.plan("v5e:4x4"),
            run.exported(1200, ".safetensors"),
            run.autoencoder_path,
        ),
        run.autoencoder_training.checkpoints,
    )
    assert [str(file.relative_to(run.path)) for file in files] == [
        *("checkpoints", "metrics.jsonl", "tensorboard", "profile", "samples", "evaluations", "evaluation.json"),
        *("loss.png", "parser.safetensors", "plan_v5e-4x4.json", "demo_0001200.safetensors", "autoencoder"),
        "autoencoder_training/checkpoints",
    ]
    assert not run.path.exists()
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path / "demo")
    assert RunFolder(".", CONFIG).exported(7, ".safetensors").name == "demo_0000007.safetensors"


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert begin("~/run") == CONFIG
    assert names(tmp_path / "run") == ["config.json"]


def test_a_run_is_written_by_one_job_and_read_meanwhile(tmp_path):
    with RunFolder.writing(tmp_path, CONFIG) as run:
        run.require_lock()
        with pytest.raises(InputError, match=rf"{tmp_path} is being written by process {os.getpid()} on host"):
            begin(tmp_path)
        assert RunFolder.open(tmp_path).config == CONFIG
        RunFolder.open(tmp_path).require_lock()  # who only reads needs none
    assert begin(tmp_path) == CONFIG


def test_a_run_that_another_job_has_taken_over_is_told(monkeypatch):
    monkeypatch.setattr(module.lock, "RENEW_SECS", 0.05)
    path = make_bucket(monkeypatch) / "run"
    with RunFolder.writing(path, CONFIG) as run:
        run.require_lock()
        (path / "lock.json").write_bytes(b'{"token": "other"}')
        for folder in (run, run.autoencoder_training):
            with pytest.raises(InputError, match="gs://bucket/run was taken over by another process"):
                folder.require_lock()


# What a run holds


@pytest.fixture
def finished(tmp_path):
    """A run with a checkpoint and a KL autoencoder, and its parameters."""
    config = dataclasses.replace(
        tiny_config(tmp_path / "data"),
        autoencoder=AutoencoderConfig(kind="kl", block_channels=(4, 8), layers_per_block=1, norm_groups=4),
    )
    params = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape),
        jax.eval_shape(lambda: init_params(config, jax.random.key(0))),
    )
    sizes = KlConfig(block_channels=(4, 8), layers_per_block=1, norm_groups=4)
    with RunFolder.writing(tmp_path / "run", config) as run:
        kl_weights.save(KlAutoencoder(sizes, rngs=nnx.Rngs(0)), run.autoencoder_path)
        with Checkpoints(run.checkpoints, keep=3) as checkpoints:
            for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
                ema = jax.tree.map(lambda x, step=step: x + step, params)
                metrics = {"held_out_loss": loss}
                checkpoints.save(step, state={"step": jnp.int32(step)}, ema=ema, iterator=None, metrics=metrics)
    return run.path, config, params


def test_ema_of_the_newest_of_the_best_and_of_a_step_is_restored_on_a_mesh(finished):
    path, config, params = finished
    mesh = sharding.make_mesh(config.mesh)
    run = RunFolder.open(path)
    for checkpoint, expected in (("newest", 3), ("best", 1), (2, 2)):
        step, ema = run.restore_ema(mesh, checkpoint)
        assert step == expected
        assert jax.tree.all(jax.tree.map(lambda x, y, step=step: bool((x == y + step).all()), ema, params))
        assert all(len(x.devices()) == 8 for x in jax.tree.leaves(ema))
    with pytest.raises(InputError, match=r"no checkpoint of step 4 in .*; it has the steps 1, 2, 3\."):
        run.restore_ema(mesh, 4)


def test_the_autoencoder_is_read_once(finished, monkeypatch):
    path, _, _ = finished
    loaded, load = [], kl_weights.load
    monkeypatch.setattr(kl_weights, "load", lambda path: loaded.append(path) or load(path))
    run = RunFolder.open(path)
    assert not loaded
    assert run.has_autoencoder()
    assert run.autoencoder is run.autoencoder
    assert run.autoencoder_fingerprint == kl_weights.fingerprint(run.autoencoder) == run.autoencoder_fingerprint
    assert loaded == [run.autoencoder_path]


def test_a_run_without_its_autoencoder_is_refused_and_of_pixels_needs_none(tmp_path):
    config = dataclasses.replace(CONFIG, autoencoder=AutoencoderConfig(kind="kl"))
    run = RunFolder(tmp_path, config)
    assert not run.has_autoencoder()
    with pytest.raises(InputError, match="has no autoencoder yet; run the `autoencoder` command"):
        run.autoencoder  # noqa: B018
    assert isinstance(RunFolder(tmp_path, CONFIG).autoencoder, IdentityAutoencoder)


def listing(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Returns, of everything below a folder, what writing would change."""
    return {
        path: (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for path in (folder, *folder.rglob("*"))
        for status in [path.stat()]
    }


def test_reading_works_where_nothing_may_be_written(finished, monkeypatch):
    """Tests may run as root, whom no mode stops: what would change the disk is refused by hand."""
    path, config, _ = finished
    before = listing(path)

    def refuse(self, *_: object, **__: object) -> None:
        if path in (self, *Path(self).parents):
            raise PermissionError(13, "Read-only file system", str(self))

    for name in ("mkdir", "unlink", "rename", "replace", "rmdir", "touch", "chmod", "write_bytes", "write_text"):
        monkeypatch.setattr(pathlib.Path, name, refuse)
    opened = open

    def read_only(self, mode="r", *arguments, **options):
        if set(mode) & set("wax+"):
            refuse(self)
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", read_only)
    run = RunFolder.open(path, config)
    assert run.restore_ema(sharding.make_mesh(config.mesh))[0] == 3
    assert run.autoencoder_fingerprint
    monkeypatch.undo()
    assert listing(path) == before
