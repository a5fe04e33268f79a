"""What flow matching draws for a batch, and the loss that it makes of it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import Config, DataConfig, FlowConfig
from sisma_jax.diffusion import flow
from sisma_jax.diffusion.objectives import make_objective
from sisma_jax.models.autoencoder import from_uint8
from sisma_jax.models.factory import make_denoiser, make_graph
from tests.models.test_denoiser import NUM_CLASSES, TINY, random_params

CONFIG = Config(data=DataConfig(image_size=8), model=TINY, flow=FlowConfig(time_mean=0.5, time_std=0.8))
KEY = jax.random.key(0)


def make_batch(batch_size: int = 4) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (batch_size, 8, 8, 3), np.uint8)),
        "mask": jnp.asarray(rng.integers(0, NUM_CLASSES, (batch_size, 8, 8), np.uint8)),
    }


def test_examples_have_what_a_loss_needs():
    batch = make_batch() | {"style": jnp.arange(4)}
    examples = make_objective(CONFIG).draw(batch, KEY, 0.5)
    assert set(examples) == {"x0", "x1", "t", "mask", "style", "is_dropped"}
    np.testing.assert_array_equal(examples["x1"], from_uint8(batch["image"]))
    np.testing.assert_array_equal(examples["mask"], batch["mask"])
    assert examples["x0"].shape == examples["x1"].shape
    assert all(len(x) == 4 for x in examples.values())


def test_latents_are_drawn_from_their_moments():
    mean, log_variance = np.full((2, 64, 64, 3), 2.0), np.full((2, 64, 64, 3), -2.0)
    moments = np.concatenate([mean, log_variance], axis=-1).astype(np.float16)
    x1 = make_objective(CONFIG).draw({"moments": moments, "mask": np.zeros((2, 64, 64))}, KEY, 0.0)["x1"]
    assert x1.dtype == jnp.float32
    # 24,576 values of standard deviation exp(-1): standard errors of 0.0023 and 0.0017.
    assert x1.mean() == pytest.approx(2.0, abs=0.01)
    assert x1.std() == pytest.approx(np.exp(-1), abs=0.01)


def test_draws_follow_the_key_and_the_configuration():
    objective, batch = make_objective(CONFIG), make_batch(2000)
    examples = objective.draw(batch, KEY, 0.25)
    chex.assert_trees_all_equal(examples, objective.draw(batch, KEY, 0.25))
    assert (examples["x0"] != objective.draw(batch, jax.random.key(1), 0.25)["x0"]).mean() > 0.99
    # Standard errors: 0.01 of the share, 0.018 and 0.013 of the logits' mean and deviation, 0.002 of the noise's.
    assert examples["is_dropped"].mean() == pytest.approx(0.25, abs=0.05)
    logits = jax.scipy.special.logit(examples["t"])
    assert logits.mean() == pytest.approx(0.5, abs=0.08)
    assert logits.std() == pytest.approx(0.8, abs=0.06)
    assert examples["x0"].std() == pytest.approx(1.0, abs=0.01)
    assert not objective.draw(batch, KEY, 0.0)["is_dropped"].any()


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_the_loss_is_that_of_the_denoisers_output(prediction):
    config = dataclasses.replace(CONFIG, flow=FlowConfig(prediction=prediction))
    objective, graph = make_objective(config), make_graph(config)
    abstract = nnx.split(nnx.eval_shape(lambda: make_denoiser(config, KEY)))[1]
    params = nnx.to_pure_dict(random_params(abstract))
    examples = objective.draw(make_batch(), KEY, 0.5)

    @jax.jit
    def expected(params, examples):
        model = nnx.merge(graph, params)
        given = model.encode({"mask": examples["mask"]})
        mask = jnp.where(examples["is_dropped"][:, None, None, None], model.null(given).mask, given.mask)
        x0, x1, t = (examples[name] for name in ("x0", "x1", "t"))
        output = model(flow.interpolate(x0, x1, t), t, dataclasses.replace(given, mask=mask))
        return flow.loss_per_example(output, x0, x1, t, prediction)

    assert set(np.asarray(examples["is_dropped"])) == {False, True}
    losses = jax.jit(objective.held_out_losses)(params, examples)
    assert losses.shape == (4,)
    np.testing.assert_allclose(losses, expected(params, examples), rtol=1e-5)


def test_examples_are_the_same_under_x64():
    objective, batch = make_objective(CONFIG), make_batch()
    draw = jax.jit(lambda batch, key: objective.draw(batch, key, 0.1))
    plain = draw(batch, KEY)
    with jax.enable_x64(True):
        wide = draw(batch, KEY)
    assert jax.tree.map(lambda x: x.dtype, wide) == jax.tree.map(lambda x: x.dtype, plain)
    chex.assert_trees_all_equal(*(jax.device_get(tree) for tree in (wide, plain)))


def test_adaptive_weights_divide_the_gradient_of_each_example_by_its_error(monkeypatch):
    config = dataclasses.replace(CONFIG, flow=dataclasses.replace(CONFIG.flow, adaptive_weights=True))
    objective, errors = make_objective(config), jnp.asarray([0.01, 0.1, 2.0])
    monkeypatch.setattr(objective, "held_out_losses", lambda params, examples: params["errors"])
    (loss, metrics), gradient = jax.value_and_grad(objective.loss, has_aux=True)({"errors": errors}, {})
    np.testing.assert_allclose(loss, (errors / (errors + 1e-3)).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["velocity_error"], errors.mean(), rtol=1e-6)
    np.testing.assert_allclose(gradient["errors"], 1 / (errors + 1e-3) / 3, rtol=1e-6)
