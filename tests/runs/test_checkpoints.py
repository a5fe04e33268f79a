"""Checkpoints: what is saved comes back bit for bit, and the newest and the best are kept."""

import logging
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sisma_jax.errors import InputError
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.ranking import BestMetric
from tests.runs.checkpoint_cases import (
    abstract,
    assert_same,
    flip_a_bit,
    largest_file,
    make_ema,
    make_iterator,
    make_state,
    save,
    steps_on_disk,
)


def test_nothing_saved_restores_none(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(*abstract(), make_iterator()) is None


def test_values_structure_and_iterator_come_back_exactly(tmp_path):
    iterator = make_iterator()
    for _ in range(3):
        next(iterator)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, state=make_state(7), ema=make_ema(7), iterator=iterator)
        expected = [next(iterator) for _ in range(30)]  # also: the position is that of the call, not of the write
    resumed = make_iterator()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(*abstract(), resumed)
    assert restored is not None
    assert restored.step == 7
    assert_same(restored.state, make_state(7))
    assert_same(restored.ema, make_ema(7))
    np.testing.assert_array_equal([next(resumed) for _ in range(30)], expected)


def test_restored_key_and_optimiser_state_work(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1)
        restored = checkpoints.restore(*abstract(), None)
    assert restored is not None
    assert jax.random.key_impl(restored.state["key"]) == jax.random.key_impl(jax.random.key(0))
    np.testing.assert_array_equal(
        jax.random.normal(restored.state["key"], (3,)), jax.random.normal(make_state(1)["key"], (3,))
    )
    adam = restored.state["opt_state"][1].inner_state[0]
    assert isinstance(adam, optax.ScaleByAdamState)
    assert isinstance(adam.mu["order"], optax.MaskedNode)


def test_concrete_arrays_numbers_and_numpy_are_accepted(tmp_path):
    state = {"array": np.arange(3, dtype=np.float32), "number": 5}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state=state, ema=make_ema(), iterator=None)
        state["array"][:] = -1  # the copy was made before `save` returned
        restored = checkpoints.restore(state, make_ema(), None)
    assert restored is not None
    np.testing.assert_array_equal(restored.state["array"], [0.0, 1.0, 2.0])
    assert restored.state["number"] == 5


def test_caller_may_donate_its_arrays_while_the_save_runs(tmp_path):
    big = jax.random.normal(jax.random.key(0), (1024, 1024))
    expected = np.array(big)  # a copy of our own
    # Where Orbax still reads the array, as it may on a CPU, JAX leaves its memory alone.
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * -2 + 1, tree), donate_argnums=0)
    state = {"w": big}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state=state, ema={"w": jnp.zeros(3)}, iterator=None)
        for _ in range(20):
            state = update(state)
        restored = checkpoints.restore(jax.eval_shape(lambda: {"w": jnp.array(expected)}), {"w": jnp.zeros(3)}, None)
    assert restored is not None
    np.testing.assert_array_equal(restored.state["w"], expected)


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            save(checkpoints, step)
        assert checkpoints.latest_step() == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


LOSS = BestMetric("loss", "min")


@pytest.mark.parametrize(
    ("best", "losses", "kept"),
    [
        (LOSS, [3.0, 1.0, 2.0, 2.5, 4.0], [2, 4, 5]),
        (BestMetric("loss", "max"), [3.0, 1.0, 2.0, 2.5, 0.0], [1, 4, 5]),
        (LOSS, [5.0, 4.0, 3.0, 2.0, 1.0], [4, 5]),
        (LOSS, [1.0, 1.0, 1.0, 2.0, 2.0], [3, 4, 5]),  # of equals the newest
        (LOSS, [2.0, math.nan, -math.inf, 3.0, 4.0], [1, 4, 5]),
        (LOSS, [None, 2.0, None, None, 3.0], [2, 4, 5]),
        (BestMetric("psnr", "max"), [1.0, 2.0, 3.0, 4.0, 5.0], [4, 5]),
        (None, [1.0, 2.0, 3.0, 4.0, 5.0], [4, 5]),
    ],
)
@pytest.mark.parametrize("reopen", [False, True])
def test_newest_and_best_are_kept(best, losses, kept, reopen, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best=best)
    for step, loss in enumerate(losses, start=1):
        save(checkpoints, step, **({} if loss is None else {"loss": loss}))
        if reopen:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, keep=2, best=best)
    assert checkpoints.steps() == steps_on_disk(tmp_path) == kept
    checkpoints.close()


def test_several_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1, best=LOSS, keep_best=2) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
            save(checkpoints, step, loss=loss)
        assert checkpoints.best_step() == 2
    assert steps_on_disk(tmp_path) == [2, 3, 5]


def test_ema_of_any_step_or_of_the_best_is_restored(tmp_path):
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0], start=1):
            save(checkpoints, step, loss=loss)
        save(checkpoints, 4)
    with Checkpoints(tmp_path, read_only=True, best=LOSS) as checkpoints:
        for wanted, expected in (("newest", 4), ("best", 2), (1, 1)):
            step, ema = checkpoints.restore_ema(jax.eval_shape(make_ema), wanted)
            assert step == expected
            assert_same(ema, make_ema(expected))
        with pytest.raises(InputError, match=r"no checkpoint of step 5 in .*; it has the steps 1, 2, 3, 4\."):
            checkpoints.restore_ema(jax.eval_shape(make_ema), 5)


def test_best_of_checkpoints_without_the_metric_is_refused(tmp_path):
    with Checkpoints(tmp_path, best=LOSS) as checkpoints:
        save(checkpoints, 1, accuracy=1.0)
        assert checkpoints.best_step() is None
        with pytest.raises(InputError, match=r"no checkpoint whose loss is known in .*; it has the steps 1\."):
            checkpoints.restore_ema(jax.eval_shape(make_ema), "best")


def test_a_step_saved_twice_is_left_as_it_is(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        checkpoints.save(1, state=make_state(9), ema=make_ema(9), iterator=None)
        restored = checkpoints.restore(*abstract(), None)
    assert restored is not None
    assert_same(restored.state, make_state(1))


def test_ema_is_restored_alone(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    shutil.rmtree(tmp_path / "2" / "state")  # not needed for sampling
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        step, ema = checkpoints.restore_ema(jax.eval_shape(make_ema))
    assert step == 2
    assert_same(ema, make_ema(2))


@pytest.mark.parametrize("read_only", [True, False])
def test_ema_without_checkpoint_says_train_first(tmp_path, read_only):
    with (
        Checkpoints(tmp_path / "checkpoints", keep=1, read_only=read_only) as checkpoints,
        pytest.raises(InputError, match=r"no checkpoint in .*checkpoints; train first"),
    ):
        checkpoints.restore_ema(jax.eval_shape(make_ema))


def test_reading_only_leaves_the_folder_alone(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    flip_a_bit(largest_file(tmp_path / "2" / "ema"))
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # a training is at work
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        step, ema = checkpoints.restore_ema(jax.eval_shape(make_ema))
    assert step == 1
    assert_same(ema, make_ema(1))
    assert sorted(tmp_path.rglob("*")) == before
    with Checkpoints(tmp_path / "missing", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
    assert not (tmp_path / "missing").exists()


def test_reader_finds_the_newer_checkpoint_when_its_own_is_deleted_meanwhile(tmp_path, monkeypatch, caplog):
    with Checkpoints(tmp_path, keep=1) as writer, Checkpoints(tmp_path, read_only=True) as reader:
        save(writer, 1)
        verify = Checkpoints._verify

        def delete_first(self: Checkpoints, step: int, items: list[str]) -> None:
            if step == 1:
                save(writer, 2)
            verify(self, step, items)

        monkeypatch.setattr(Checkpoints, "_verify", delete_first)
        step, ema = reader.restore_ema(jax.eval_shape(make_ema))
    assert step == 2
    assert_same(ema, make_ema(2))
    assert not caplog.records


def test_what_others_log_through_absl_is_heard_again_afterwards(tmp_path):
    before = list(logging.getLogger("absl").filters)
    with Checkpoints(tmp_path, keep=1) as checkpoints, Checkpoints(tmp_path, read_only=True):
        save(checkpoints, 1)
        assert len(logging.getLogger("absl").filters) == len(before) + 2
    assert logging.getLogger("absl").filters == before


def test_nothing_is_printed(tmp_path, capfd):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, make_iterator())
        save(checkpoints, 2, make_iterator())
        checkpoints.restore(*abstract(), make_iterator())
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        checkpoints.restore_ema(jax.eval_shape(make_ema))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
