"""From masks to images: what changes them and what does not, and how the settings pass through `jax.jit`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import FlowConfig, Sampling
from sisma_jax.diffusion import sampling
from sisma_jax.diffusion.solvers import SOLVERS
from sisma_jax.models.autoencoder import IdentityAutoencoder, to_uint8
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.mamba import CrossMamba
from tests.models.test_denoiser import NUM_CLASSES, make_model

MASK = jax.random.randint(jax.random.key(3), (3, 8, 8), 0, NUM_CLASSES).astype(jnp.uint8)
KEYS = jax.random.split(jax.random.key(0), 3)


FLOW = FlowConfig(prediction="data")
GRAPH, PARAMS = nnx.split(make_model())


def sample(params, keys, mask, settings, *, flow=FLOW, image=None, region=None):
    return sampling.sample(
        nnx.merge(GRAPH, params),
        keys,
        {"mask": mask},
        settings,
        autoencoder=IdentityAutoencoder(),
        flow=flow,
        image=image,
        region=region,
    )


jit_sample = jax.jit(sample, static_argnames="flow")


def paint(keys=KEYS, mask=MASK, settings=None, flow=FLOW, image=None, region=None, **values):
    settings = settings or Sampling(**({"steps": 3, "guidance": 1.0} | values))
    return np.asarray(jit_sample(PARAMS, keys, mask, settings, flow=flow, image=image, region=region))


def traced_guidance(scale: float, **values) -> Sampling:
    """Settings that are guided whatever the scale."""
    guided = Sampling(**({"steps": 3, "guidance": 2.0} | values))
    return jax.tree.map(lambda x: scale if x == 2.0 else x, guided)


@pytest.mark.parametrize(("prediction", "solver"), [("velocity", "euler"), *(("data", solver) for solver in SOLVERS)])
def test_samples_are_images_and_depend_on_key_and_mask(prediction, solver):
    flow = FlowConfig(prediction=prediction)
    base = paint(flow=flow, solver=solver)
    assert base.shape == (3, 8, 8, 3)
    assert base.dtype == np.uint8
    np.testing.assert_array_equal(base, paint(flow=flow, solver=solver))
    assert (base != paint(keys=KEYS[::-1], flow=flow, solver=solver)).any()
    assert (base != paint(mask=(MASK + 1) % NUM_CLASSES, flow=flow, solver=solver)).any()


def test_an_image_does_not_depend_on_its_batch():
    together = paint().astype(int)
    alone = paint(keys=KEYS[1:2], mask=MASK[1:2]).astype(int)
    # One level of 255: rounding of sums in another order.
    assert np.abs(together[1:2] - alone).max() <= 1


def test_guidance_one_as_number_and_as_array_agree():
    one = paint(guidance=1.0).astype(int)
    traced = traced_guidance(jnp.float32(1.0))
    assert traced.is_guided
    assert np.abs(one - paint(settings=traced)).max() <= 1


def test_guidance_zero_ignores_the_mask_and_more_guidance_moves_away():
    np.testing.assert_array_equal(paint(guidance=0.0), paint(guidance=0.0, mask=(MASK + 1) % NUM_CLASSES))
    assert (paint(guidance=1.0) != paint(guidance=4.0)).any()


def test_every_setting_changes_the_samples():
    neutral = paint(guidance=4.0)
    for changed in ({"shift": 4.0}, {"guidance_high": 0.5}, {"guidance_low": 0.5}, {"guidance_rescale": 1.0}):
        assert (neutral != paint(guidance=4.0, **changed)).any(), changed


def test_an_empty_interval_paints_the_conditional_samples():
    empty = {"guidance_low": 0.5, "guidance_high": 0.5, "guidance_rescale": 0.7}
    np.testing.assert_array_equal(paint(guidance=4.0, **empty), paint(guidance=1.0))
    # Where the program does not know, to rounding.
    guided = traced_guidance(jnp.float32(4.0), guidance_low=0.25, guidance_high=0.75)
    emptied = jax.tree.map(lambda x: 0.5 if x in (0.25, 0.75) else x, guided)
    assert emptied.is_guided
    assert np.abs(paint(guidance=1.0).astype(int) - paint(settings=emptied)).max() <= 1


GUIDED = Sampling(
    steps=7, solver="heun", shift=3.0, guidance=2.5, guidance_low=0.1, guidance_high=0.8, guidance_rescale=0.3
)


@pytest.mark.parametrize("settings", [Sampling(), GUIDED, Sampling(guidance=1.0, shift=2.0, guidance_rescale=0.5)])
def test_settings_are_a_pytree(settings):
    mapped = jax.tree.map(lambda x: x, settings)
    assert mapped == settings
    assert jax.tree.structure(mapped) == jax.tree.structure(settings)
    of_guidance = 0 if not settings.is_guided else 1 if settings.is_always_guided else 3
    assert len(jax.tree.leaves(settings)) == 2 + of_guidance
    seen = jax.eval_shape(lambda settings: settings, settings)
    assert (seen.steps, seen.solver, seen.is_guided) == (settings.steps, settings.solver, settings.is_guided)
    assert seen.is_always_guided == settings.is_always_guided


def test_what_concerns_the_caller_alone_is_no_part_of_the_pytree():
    one, other = (dataclasses.replace(GUIDED, batch_size=n, seed=n) for n in (3, 5))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    mapped = jax.tree.map(lambda x: x, one)
    assert (mapped.batch_size, mapped.seed) == (Sampling().batch_size, Sampling().seed)


def test_any_leaf_passes_through_the_pytree():
    for leaf in (object(), None, jnp.zeros(3), "a", 1e9, float("nan")):
        leaves, structure = jax.tree.flatten(GUIDED)
        settings = jax.tree.unflatten(structure, [leaf] * len(leaves))
        assert settings.guidance is leaf
        assert settings.steps == 7
    batched = jax.vmap(lambda settings: settings.shift + settings.guidance, in_axes=0)
    np.testing.assert_array_equal(batched(jax.tree.map(lambda x: jnp.full(2, x), GUIDED)), [5.5, 5.5])


def test_unguided_settings_are_those_of_scale_one():
    empty = Sampling(guidance=4.0, guidance_low=0.5, guidance_high=0.5)
    assert jax.tree.structure(empty) == jax.tree.structure(Sampling(guidance=1.0))
    assert jax.tree.map(lambda x: x, empty) == Sampling(guidance=1.0)


def test_other_values_need_no_other_program_and_other_structures_do():
    traces = []

    @jax.jit
    def run(settings):
        traces.append(settings)
        return settings.shift + settings.guidance

    one = [{}, {"shift": 4.0}, {"guidance": 3.0}, {"guidance_low": 0.2}, {"guidance_high": 0.7}]
    one += [{"guidance_rescale": 0.5}, {"guidance": 3, "shift": 2}, {"seed": 1}, {"batch_size": 3}]
    others = [{"steps": 3}, {"solver": "euler"}, {"guidance": 1.0}, {"guidance_low": 0.0, "guidance_high": 1.0}]
    for values in one:
        run(dataclasses.replace(GUIDED, **values))
        assert len(traces) == 1, values
    for count, values in enumerate(others, start=2):
        run(dataclasses.replace(GUIDED, **values))
        assert len(traces) == count, values
    # Not guided either, and of the same structure.
    run(dataclasses.replace(GUIDED, guidance=1.0, shift=2.0))
    run(dataclasses.replace(GUIDED, guidance_low=0.8))
    assert len(traces) == 5


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_what_the_layers_read_is_kept_only_if_memory_allows(guidance, monkeypatch):
    settings = dataclasses.replace(GUIDED, steps=2, guidance=guidance)
    kept = paint(settings=settings)
    reads = []
    read = CrossMamba.read
    monkeypatch.setattr(CrossMamba, "read", lambda *args: reads.append(args) or read(*args))
    jax.eval_shape(lambda: sample(PARAMS, KEYS, MASK, settings))
    # Once to know the size, then for the masks, and for the null condition of one image.
    assert len(reads) == (3 if guidance > 1 else 2)
    if guidance > 1:
        assert reads[-1][1].mask.shape[0] == 1
    monkeypatch.setattr(sampling, "MOST_READ_BYTES", 0)
    plain = jax.jit(sample)(PARAMS, KEYS, MASK, settings)
    assert np.abs(kept.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_jitted_samples_are_those_without_jit(guidance):
    settings = dataclasses.replace(GUIDED, steps=2, guidance=guidance)
    plain = sample(PARAMS, KEYS, MASK, settings)
    assert np.abs(paint(settings=settings).astype(int) - plain).max() <= 1


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (2.0, 6)])
def test_unguided_steps_evaluate_the_network_with_the_mask_alone(guidance, rows, monkeypatch):
    batches = []
    call = Denoiser.__call__

    def counted(self, xt, t, condition):
        batches.append(len(xt))
        return call(self, xt, t, condition)

    monkeypatch.setattr(Denoiser, "__call__", counted)
    jax.eval_shape(lambda settings: sample(PARAMS, KEYS, MASK, settings), Sampling(guidance=guidance))
    assert set(batches) == {rows}


def test_samples_are_the_same_under_x64():
    plain = paint(settings=GUIDED)
    with jax.enable_x64(True):
        # Whatever the type of numbers that reach it.
        wide = jit_sample(PARAMS, KEYS, MASK, GUIDED)
        as_arrays = jit_sample(PARAMS, KEYS, MASK, jax.tree.map(jnp.float32, GUIDED))
    assert wide.dtype == np.uint8
    np.testing.assert_array_equal(wide, plain)
    np.testing.assert_array_equal(as_arrays, plain)


def test_latents_stay_float32_under_x64(monkeypatch):
    seen = []
    monkeypatch.setattr(sampling, "to_uint8", lambda image: seen.append(image.dtype) or to_uint8(image))
    with jax.enable_x64(True):
        jax.eval_shape(lambda settings: sample(PARAMS, KEYS, MASK, settings), GUIDED)
    assert seen == [jnp.float32]
