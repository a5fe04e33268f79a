"""Arrays that are not finite are neither saved nor exported, and what holds them is not loaded."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.runs import checkpoints as module
from sisma_jax.runs import flat_trees
from sisma_jax.runs.checkpoints import Checkpoints
from tests.runs.checkpoint_cases import (
    abstract,
    assert_same,
    make_ema,
    make_iterator,
    make_large_state,
    make_state,
    place_large_state,
    placed_large_state,
    save,
    steps_on_disk,
)


def poisoned(state, value=jnp.nan):
    kernel = state["params"]["kernel"].at[-1, -1].set(value)
    return state | {"params": state["params"] | {"kernel": kernel}}


@contextlib.contextmanager
def unchecked(monkeypatch):
    """Saves what would be refused."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_first_not_finite", lambda trees: None)
        yield


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_first_bad_array_is_found(value, dtype):
    good = {"a": jnp.arange(6, dtype=dtype), "b": jnp.float32(3), "c": jnp.int32(2**31 - 1), "d": jax.random.key(0)}
    assert flat_trees.first_not_finite(good) is None
    bad = good | {name: jnp.full((2, 3), value, dtype) for name in ("z", "x.y")}  # in the order of the dictionary
    assert flat_trees.first_not_finite(bad) == "z"


def test_arrays_on_several_devices_are_looked_at_where_they_are():
    state = place_large_state(placed_large_state(jax.devices()))
    flat = flat_trees.flatten(state) | {"alone": jnp.ones(3)}
    assert flat_trees.first_not_finite(flat) is None
    kernel = flat["params.kernel"]
    bad = kernel.at[-1, 0].set(jnp.inf)  # in the part of the last device
    assert bad.sharding == kernel.sharding
    assert flat_trees.first_not_finite(flat | {"params.kernel": bad}) == "params.kernel"
    assert flat_trees.first_not_finite(flat | {"alone": jnp.full(3, jnp.nan)}) == "alone"


def test_a_checkpoint_that_is_not_finite_is_not_saved(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(InputError, match=r"step 1 is not saved: ema/kernel is not finite. There is no checkpoint"):
            checkpoints.save(1, state=make_state(), ema={"kernel": jnp.full((64, 48), jnp.inf)}, iterator=None)
        save(checkpoints, 2)
        with pytest.raises(InputError, match=r"state/params.kernel is not finite. The last good .* step 2\."):
            checkpoints.save(3, state=poisoned(make_state()), ema=make_ema(), iterator=None)
        assert checkpoints.steps() == [2]
        save(checkpoints, 3)
    assert steps_on_disk(tmp_path) == [2, 3]


def test_a_checkpoint_that_is_not_finite_is_stepped_over_and_set_aside(tmp_path, monkeypatch, caplog):
    iterator = make_iterator()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        next(iterator)
        save(checkpoints, 1, iterator)
        next(iterator)
        with unchecked(monkeypatch):
            checkpoints.save(2, state=poisoned(make_state()), ema=make_ema(2), iterator=iterator)
            checkpoints.wait()
        resumed = make_iterator()
        restored = checkpoints.restore(*abstract(), resumed)
        assert restored is not None
        assert restored.step == 1
        assert_same(restored.state, make_state(1))
        assert resumed.get_state() == {"next_index": 1}
        assert f"step 2 is damaged: state/params.kernel in {tmp_path / '2'} is not finite" in caplog.messages[0]
        assert (tmp_path / "damaged-2").is_dir()
        save(checkpoints, 2)


def test_ema_that_is_not_finite_is_stepped_over_and_left(tmp_path, monkeypatch, caplog):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        save(checkpoints, 1)
        with unchecked(monkeypatch):
            bad = {"kernel": make_ema()["kernel"].at[0, 0].set(jnp.nan)}
            checkpoints.save(2, state=make_state(), ema=bad, iterator=None)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        step, ema = checkpoints.restore_ema(jax.eval_shape(make_ema))
        assert step == 1
        assert_same(ema, make_ema(1))
        assert "ema/kernel" in caplog.messages[0]
        with pytest.raises(InputError, match=r"None of the checkpoints .* can be read \(steps \[2\]\)"):
            checkpoints.restore_ema(jax.eval_shape(make_ema), 2)
    assert steps_on_disk(tmp_path) == [1, 2]


def test_looking_compiles_once(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = make_large_state()
        checkpoints.save(1, state=state, ema=state["params"], iterator=None)
        before = flat_trees._are_finite._cache_size()
        checkpoints.save(2, state=jax.tree.map(jnp.copy, state), ema=state["params"], iterator=None)
        assert flat_trees._are_finite._cache_size() == before
    assert np.isfinite(state["params"]["kernel"]).all()
