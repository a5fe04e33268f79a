"""One update: of the whole batch however it is computed, and of nothing where a value is not finite."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sisma_jax.config import OptimConfig
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import build_update, make_update
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=2, decay_steps=9, weight_decay=0.1, ema_decay=0.9)
    return dataclasses.replace(tiny_config(tmp_path_factory.mktemp("data")), optim=optim)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (8, 16, 16, 3), np.uint8), rng.integers(0, 19, (8, 16, 16), np.uint8)
    return {"image": image, "mask": mask}


def test_gradients_in_parts_make_the_update_of_the_whole_batch(config, batch):
    state = jax.jit(lambda: init_state(config))()
    whole, metrics = jax.jit(make_update(config))(state, batch)
    train = dataclasses.replace(config.train, accumulate_steps=4)
    in_parts, metrics_of_parts = jax.jit(make_update(dataclasses.replace(config, train=train)))(state, batch)
    chex.assert_trees_all_close(metrics_of_parts, metrics, rtol=1e-5)
    # Adam's first step divides by the gradient's own size, so what is compared is the gradient: the first moment.
    chex.assert_trees_all_close(in_parts.opt_state[1][0].mu, whole.opt_state[1][0].mu, rtol=1e-4, atol=1e-7)


# Values that are not finite


def accumulating(factor: float) -> optax.GradientTransformation:
    """An optimizer whose updates are small, and whose state grows by a factor."""

    def update(grads, state, params):
        return jax.tree.map(lambda g: 1e-3 * g, grads), jax.tree.map(lambda x: factor * x, state)

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.ones_like, params), update)


def weighted(params, examples):
    return (examples["weight"] * params["w"]).mean(), {}


# Parameters, an optimizer that makes of finite gradients something that is not finite, and after how many updates.
DIVERGING = {
    "the update is infinite": (1.0, optax.scale(-jnp.inf), 0),
    "the update is NaN": (1.0, optax.chain(optax.scale(0.0), optax.scale(jnp.inf)), 0),
    "parameters overflow": (3e38, optax.chain(optax.scale_by_sign(), optax.scale(1e38)), 0),
    "the optimizer's state overflows": (1.0, accumulating(1e20), 1),
}


@pytest.mark.parametrize("case", DIVERGING)
def test_an_update_that_is_not_finite_changes_nothing_but_the_counts(case):
    value, optimizer, num_good = DIVERGING[case]
    weight = np.full(4, 1e-9, np.float32)
    update = jax.jit(build_update(lambda batch, key: batch, weighted, optimizer, ema_decay=0.9))
    state = TrainState.create(lambda key: {"w": jnp.full(4, value)}, optimizer, seed=0)
    for _ in range(num_good):
        state, metrics = update(state, {"weight": weight})
        assert metrics["skipped"] == 0
    for skipped in (1, 2):
        after, metrics = update(state, {"weight": weight})
        assert np.isfinite(metrics["loss"])
        assert np.isfinite(metrics["grad_norm"])
        assert metrics["skipped"] == after.skipped == skipped
        assert after.step == state.step + 1
        for name in ("params", "ema", "opt_state"):
            chex.assert_trees_all_equal(getattr(after, name), getattr(state, name))
        state = after


def test_a_good_update_ends_the_count():
    optimizer = optax.scale(-0.1)
    update = jax.jit(build_update(lambda batch, key: batch, weighted, optimizer, ema_decay=0.9))
    state = TrainState.create(lambda key: {"w": jnp.ones(4)}, optimizer, seed=0)
    for weight, skipped in ((jnp.nan, 1), (jnp.inf, 2), (1.0, 0), (jnp.nan, 1)):
        before = state
        state, metrics = update(state, {"weight": np.full(4, weight, np.float32)})
        assert metrics["skipped"] == skipped
        assert bool((state.params["w"] == before.params["w"]).all()) == (skipped > 0)
    chex.assert_tree_all_finite((state.params, state.ema))


def test_a_step_with_64_bit_types_is_that_of_32(config, batch):
    def run():
        state, update = jax.jit(lambda: init_state(config))(), jax.jit(make_update(config))
        for _ in range(4):
            state, metrics = update(state, batch)
        return dataclasses.replace(state, key=jax.random.key_data(state.key)), metrics

    expected = run()
    with jax.enable_x64(True):
        actual = run()
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    # The schedule and Adam's bias corrections are computed in the wider type, and rounded.
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
