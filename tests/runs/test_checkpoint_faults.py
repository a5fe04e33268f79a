"""Checkpoints: a disk that fails and a process that is killed leave what was saved before."""

import os
import resource
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.runs.checkpoints import Checkpoints


@pytest.fixture
def limit_file_size():
    """Makes writes beyond a size fail, as a full disk does; Python ignores the signal that goes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


BIG = {"w": jax.random.normal(jax.random.key(0), (256, 1024))}


@pytest.mark.parametrize("surfaces_at", ["wait", "save", "close"])
def test_failed_write_surfaces_and_leaves_the_older_checkpoint(surfaces_at, tmp_path, limit_file_size):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state=BIG, ema=BIG, iterator=None)
    checkpoints.wait()
    limit_file_size(50_000)
    checkpoints.save(2, state=BIG, ema=BIG, iterator=None)
    with pytest.raises(InputError, match=r"File too large.*last good checkpoint is step 1\.") as error:
        {
            "wait": checkpoints.wait,
            "save": lambda: checkpoints.save(3, state=BIG, ema=BIG, iterator=None),
            "close": checkpoints.close,
        }[surfaces_at]()
    assert str(tmp_path) in str(error.value)
    limit_file_size(None)
    restored = checkpoints.restore(BIG, BIG, None)
    assert restored is not None
    assert restored.step == 1
    # The same object can save again, the failed step too, and cleans up.
    checkpoints.save(2, state=BIG, ema=BIG, iterator=None)
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_failed_write_does_not_hide_the_error_that_ends_the_block(tmp_path, limit_file_size, caplog):
    def train() -> None:
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            limit_file_size(50_000)
            checkpoints.save(2, state=BIG, ema=BIG, iterator=None)
            raise ZeroDivisionError("the error of the block")

    with pytest.raises(ZeroDivisionError):
        train()
    assert any("could not be written" in message for message in caplog.messages)


def test_misuse_is_not_reported_as_a_full_disk(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(TypeError):
        checkpoints.save(1, state={"w": "no array"}, ema=BIG, iterator=None)


def test_folder_that_cannot_be_made_is_found_at_construction(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(InputError, match=r"file.* cannot be written .*name another folder"):
            Checkpoints(folder, keep=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_found_at_construction(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot be written .*name another folder"):
        Checkpoints(tmp_path, keep=1)


KILLED = textwrap.dedent(
    """
    import os, pathlib, signal, sys, time
    import jax, jax.numpy as jnp
    from sisma_jax.runs.checkpoints import Checkpoints

    folder, delay = pathlib.Path(sys.argv[1]), float(sys.argv[2])
    noise = jax.random.normal(jax.random.key(0), (1000, 1000))
    checkpoints = Checkpoints(folder, keep=2)
    restored = checkpoints.restore({"w": noise, "step": jnp.int32(0)}, {"w": noise[0]}, None)
    first = 1 if restored is None else restored.step + 1
    for step in range(first, first + 100):
        checkpoints.save(step, state={"w": noise + step, "step": jnp.int32(step)}, ema={"w": noise[0] + step},
                         iterator=None)
        if step > first:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.wait()
    """
)


@pytest.mark.slow
def test_killed_save_is_never_taken_for_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    noise = jax.random.normal(jax.random.key(0), (1000, 1000))
    newest = 0
    for delay in (0.0, 0.1):
        process = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), str(delay)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )
        assert process.returncode == -9, process.stderr
        if delay == 0.0:
            assert any("tmp" in path.name for path in folder.iterdir()), "the save was not interrupted"
        with Checkpoints(folder, read_only=True) as checkpoints:
            target = {"w": noise, "step": jnp.int32(0)}, {"w": noise[0]}
            restored = checkpoints.restore(*target, None)
        assert restored is not None
        assert restored.step > newest
        newest = restored.step
        assert restored.state["step"] == newest
        np.testing.assert_array_equal(restored.state["w"], noise + newest)
    # What was cut off is cleaned up by the next run that saves.
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(newest + 1, state=target[0], ema=target[1], iterator=None)
    assert all(path.name.isdigit() for path in folder.iterdir())
