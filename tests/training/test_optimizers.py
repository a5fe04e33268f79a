"""Optimizers: their learning rate, and what weight decay touches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.config import Config, OptimConfig, TrainConfig
from sisma_jax.training.optimizers import learning_rate, make_optimizer
from sisma_jax.training.state import init_state
from tests.tiny import tiny_config


def test_learning_rate_warms_up_and_decays():
    optim = OptimConfig(learning_rate=1.0, warmup_steps=10, decay_steps=110)
    schedule = learning_rate(Config(optim=optim))
    assert [float(schedule(step)) for step in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)
    constant = learning_rate(Config(optim=OptimConfig(learning_rate=0.3)))
    assert [float(constant(step)) for step in (0, 1, 1000)] == pytest.approx([0.3] * 3)


@pytest.mark.parametrize(("rule", "rate"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_a_scaling_rule_raises_the_rate_with_the_batch(rule, rate):
    optim = OptimConfig(learning_rate=0.1, scaling_rule=rule, base_batch_size=32)
    config = Config(optim=optim, train=TrainConfig(batch_size=128))
    assert float(learning_rate(config)(0)) == pytest.approx(rate)


def test_muon_takes_the_matrices_of_each_layer_apart(tmp_path):
    config = tiny_config(tmp_path)
    model = dataclasses.replace(config.model, depth=2)
    optim = OptimConfig(name="muon", learning_rate=0.5, clip_norm=1e9)
    config = dataclasses.replace(config, model=model, optim=optim)
    state = jax.jit(lambda: init_state(config))()
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), state.params)
    # A layer whose gradients are a thousand times as large gets an update of the same size.
    kernel = grads["layers"]["stacked"]["mixer"]["in_proj"]["kernel"]
    grads["layers"]["stacked"]["mixer"]["in_proj"]["kernel"] = kernel * jnp.asarray([1.0, 1000.0])[:, None, None]
    updates, _ = jax.jit(make_optimizer(config).update)(grads, state.opt_state, state.params)
    layer = updates["layers"]["stacked"]
    for kernel in layer["mixer"]["in_proj"]["kernel"]:
        singular = np.linalg.svd(np.asarray(kernel), compute_uv=False)
        # Newton-Schulz iterations bring singular values near 1, not to 1. The factor is 0.2 sqrt(64), the larger side.
        assert singular.min() > 0.5 * 0.5 * 0.2 * 8
        assert singular.max() < 1.3 * 0.5 * 0.2 * 8
    # AdamW's first update is the rate times the sign of the gradient, with Nesterov's factor of 1 + 0.9.
    for update in (layer["mixer"]["scans"][0]["A_log"], updates["embed"]["kernel"], layer["mixer"]["conv"]["kernel"]):
        values = np.abs(np.asarray(update))
        np.testing.assert_allclose(values, values.flat[0], rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_leaves_norms_biases_and_the_scan_alone(tmp_path, name):
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=name, weight_decay=10.0))
    state = jax.jit(lambda: init_state(config))()
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = make_optimizer(config).update(zeros, state.opt_state, state.params)
    layer = updates["layers"]["stacked"]
    mixer = layer["mixer"]
    scan = mixer["scans"][0]
    assert all(np.all(np.asarray(scan[name]) == 0) for name in ("A_log", "D", "dt_bias"))
    assert np.all(np.asarray(mixer["out_norm"]["scale"]) == 0)
    assert np.all(np.asarray(layer["feed_forward"]["up"]["bias"]) == 0)
    assert np.any(np.asarray(mixer["in_proj"]["kernel"]) != 0)
    assert np.all(np.asarray(updates["time"]["up"]["bias"]) == 0)
