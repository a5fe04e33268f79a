"""Mean flows: the loss against flows that are known in closed form, and sampling in one step or a few."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import Config, DataConfig, FlowConfig, Sampling, TrainConfig
from sisma_jax.diffusion import flow, objectives, sampling
from sisma_jax.diffusion.objectives import make_objective
from sisma_jax.diffusion.solvers import jump, time_grid
from sisma_jax.errors import InputError
from sisma_jax.models.autoencoder import IdentityAutoencoder
from sisma_jax.models.condition import Condition
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.factory import make_denoiser
from tests.models.test_denoiser import NUM_CLASSES, TINY, random_params

FLOW = FlowConfig(objective="mean_flow", prediction="data")
CONFIG = Config(data=DataConfig(image_size=8), model=TINY, flow=FLOW, sample=Sampling(steps=1))
KEY = jax.random.key(0)
GRAPH, ABSTRACT = nnx.split(nnx.eval_shape(lambda: make_denoiser(CONFIG, KEY)))
PARAMS = random_params(ABSTRACT)
DEVIATION = 0.5
UNGUIDED = {"guidance": jnp.tile(jnp.asarray([[1.0, 0.0, 1.0]]), (64, 1))}


class Known(nnx.Module):
    """A network that predicts the average velocity of a flow that is known, in place of the denoiser."""

    def __init__(self, average):
        self.average = average

    def encode(self, inputs, is_dropped=None):
        batch = len(inputs["mask"])
        is_mask = jnp.ones(batch) if is_dropped is None else 1.0 - is_dropped
        guidance = inputs.get("guidance", jnp.tile(jnp.asarray([[1.0, 0.0, 1.0]]), (batch, 1)))
        return Condition(is_mask, guidance)

    def null(self, condition):
        return Condition(jnp.zeros_like(condition.mask), condition.guidance)

    def __call__(self, xt, t, condition, duration=None):
        return self.average(xt, t, condition, jnp.zeros_like(t) if duration is None else duration)


def known_objective(average, monkeypatch, **values):
    """The objective of mean flows for velocities of a known network."""
    graph, _ = nnx.split(Known(average))
    monkeypatch.setattr(objectives, "make_graph", lambda config, **_: graph)
    config = dataclasses.replace(FLOW, prediction="velocity", **values)
    return make_objective(dataclasses.replace(CONFIG, flow=config)), {}


def make_batch(batch_size=64):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (batch_size, 8, 8, 3), np.uint8)),
        "mask": jnp.asarray(rng.integers(0, NUM_CLASSES, (batch_size, 8, 8), np.uint8)),
    }


def column(x):
    return x[:, None, None, None]


def deviation(t):
    """Standard deviation of xt for independent normal data: sqrt((t s)^2 + (1 - t)^2)."""
    return jnp.sqrt((t * DEVIATION) ** 2 + (1 - t) ** 2)


def gaussian_velocity(x, t):
    """E[x1 - x0 | xt], which for normal data is linear in xt: the logarithmic derivative of the deviation times xt."""
    return column((t * DEVIATION**2 - (1 - t)) / deviation(t) ** 2) * x


def gaussian_average(x, t, condition, duration):
    """The exact average velocity: a path through x at t is proportional to the deviation."""
    is_empty = duration < 1e-6
    length = jnp.where(is_empty, 1.0, duration)
    moved = column((deviation(t + length) / deviation(t) - 1) / length) * x
    return jnp.where(column(is_empty), gaussian_velocity(x, t), moved)


def test_the_velocity_of_exact_averages_is_exact(monkeypatch):
    objective, params = known_objective(gaussian_average, monkeypatch)
    examples = objective.draw(make_batch(), KEY, 0.0)
    noise = jax.random.normal(jax.random.key(1), examples["x0"].shape)
    examples |= UNGUIDED | {"x1": DEVIATION * noise}
    xt = flow.interpolate(examples["x0"], examples["x1"], examples["t"])
    exact = gaussian_velocity(xt, examples["t"])
    want = jnp.mean((exact - (examples["x1"] - examples["x0"])) ** 2)
    loss, metrics = jax.jit(objective.loss)(params, examples)
    assert (examples["duration"] > 0.1).any()
    np.testing.assert_allclose(metrics["velocity_error"], want, rtol=1e-4)
    assert 0 < loss < 1


def test_a_wrong_average_has_a_larger_error_although_its_velocity_is_right(monkeypatch):
    def velocity(x, t, condition, duration):
        return gaussian_velocity(x, t)

    errors = []
    for average in (gaussian_average, velocity):
        objective, params = known_objective(average, monkeypatch, same_time=0.0)
        examples = objective.draw(make_batch(), KEY, 0.0)
        examples |= UNGUIDED | {"x1": DEVIATION * jax.random.normal(jax.random.key(1), examples["x0"].shape)}
        errors.append(float(objective.loss(params, examples)[1]["velocity_error"]))
    assert errors[1] > 1.02 * errors[0]


def test_the_fixed_point_of_the_target_is_the_guided_velocity(monkeypatch):
    with_mask, without = 2.0, 0.5

    def guided(x, t, condition, duration):
        scale, low, high = condition.guidance.T
        extrapolated = without + jnp.where((low <= t) & (t < high), scale, 1.0) * (with_mask - without)
        return column(jnp.where(condition.mask > 0, extrapolated, without)) * jnp.ones_like(x)

    objective, params = known_objective(guided, monkeypatch, same_time=1.0)
    examples = objective.draw(make_batch(256), KEY, 0.5)
    # Every example moves with the velocity that belongs to its condition.
    velocity = jnp.where(examples["is_dropped"], without, with_mask)
    examples |= {"x1": examples["x0"] + column(velocity)}
    _scale, low, high = examples["guidance"].T
    is_inside = (low <= examples["t"]) & (examples["t"] < high)
    assert set(np.asarray(is_inside & ~examples["is_dropped"])) == {False, True}
    _, metrics = objective.loss(params, examples)
    assert metrics["velocity_error"] < 1e-9
    # And no other velocity is: without guidance, the error is that of its absence.
    plain, params = known_objective(
        lambda x, t, c, h: column(jnp.where(c.mask > 0, with_mask, without)) * jnp.ones_like(x), monkeypatch
    )
    assert plain.loss(params, examples)[1]["velocity_error"] > 0.1


def test_draws_of_times_and_guidance():
    objective = make_objective(dataclasses.replace(CONFIG, flow=dataclasses.replace(FLOW, same_time=0.25)))
    examples = objective.draw(make_batch(4000), KEY, 0.1)
    t, duration = examples["t"], examples["duration"]
    assert bool((t > 0).all())
    assert bool((t + duration < 1).all())
    assert bool((duration >= 0).all())
    # Standard errors: 0.007 of a share, 0.0033 of the mean.
    assert (duration == 0).mean() == pytest.approx(0.25, abs=0.03)
    scale, low, high = examples["guidance"].T
    assert bool((scale >= 1).all())
    assert bool((scale <= FLOW.max_guidance + 1e-5).all())
    assert (1 / scale).mean() == pytest.approx(2 / 3, abs=0.015)
    assert (low == 0).mean() == pytest.approx(0.5, abs=0.04)
    assert (high == 1).mean() == pytest.approx(0.5, abs=0.04)
    assert bool((low < 0.5).all())
    assert bool((high >= 0.5).all())
    later = jax.scipy.special.logit((t + duration)[duration > 0])
    assert later.mean() > 0.4  # the mean of the larger of two standard normal numbers is 0.56


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_the_gradient_is_finite_and_reaches_what_is_new(prediction):
    config = dataclasses.replace(CONFIG, flow=dataclasses.replace(FLOW, prediction=prediction))
    objective = make_objective(config)
    params = nnx.to_pure_dict(PARAMS)
    examples = objective.draw(make_batch(4), KEY, 0.5)
    grads, metrics = jax.jit(jax.grad(objective.loss, has_aux=True))(params, examples)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grads))
    for part in (grads["duration"], grads["condition_encoder"]["guidance"]):
        assert float(jnp.abs(part["down"]["kernel"]).max()) > 0
    assert np.isfinite(metrics["velocity_error"])


@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize("same_time", [0.5, 0.75, 1.0])
def test_the_first_of_every_two_examples_has_no_duration(same_time, accumulate_steps):
    config = dataclasses.replace(
        CONFIG,
        flow=dataclasses.replace(FLOW, same_time=same_time),
        train=TrainConfig(batch_size=4000, accumulate_steps=accumulate_steps),
    )
    duration = make_objective(config).draw(make_batch(4000), KEY, 0.1)["duration"]
    for part in range(accumulate_steps):
        pairs = duration[part::accumulate_steps].reshape(-1, 2)
        assert not pairs[:, 0].any()
        assert (pairs[:, 1] == 0).mean() == pytest.approx(2 * same_time - 1, abs=0.06)


def test_examples_without_duration_cost_less_and_learn_the_same():
    """With a smaller share of them, the loss is the same for any examples, but it treats all alike."""
    params = nnx.to_pure_dict(PARAMS)
    examples = make_objective(CONFIG).draw(make_batch(6), KEY, 0.3)
    results, flops = [], []
    for same_time in (0.5, 0.25):
        config = dataclasses.replace(CONFIG, flow=dataclasses.replace(FLOW, same_time=same_time))
        gradient = jax.jit(jax.value_and_grad(make_objective(config).loss, has_aux=True))
        compiled = gradient.lower(params, examples).compile()
        results.append(compiled(params, examples))
        flops.append(compiled.cost_analysis()["flops"])
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-5)
    assert flops[0] < 0.9 * flops[1]


def test_an_odd_number_of_examples_has_a_loss():
    objective = make_objective(CONFIG)
    examples = objective.draw(make_batch(3), KEY, 0.3)
    _, metrics = jax.eval_shape(objective.loss, nnx.to_pure_dict(PARAMS), examples)
    assert metrics["velocity_error"].shape == ()


def test_the_derivative_is_that_of_differences():
    model = nnx.merge(GRAPH, PARAMS)
    with jax.enable_x64(True):
        wide = nnx.merge(GRAPH, jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS))
        rng = np.random.default_rng(0)
        x, v = (jnp.asarray(rng.standard_normal((2, 8, 8, 3))) for _ in range(2))
        t, h = jnp.asarray([0.2, 0.6]), jnp.asarray([0.5, 0.3])
        condition = wide.encode({"mask": jnp.zeros((2, 8, 8), jnp.uint8)})

        def average(x, t, h):
            return flow.to_velocity(wide(x, t, condition, h), x, t, "data", flow.MIN_REMAINING_IN_LOSS)

        change = jax.jvp(average, (x, t, h), (v, jnp.ones(2), -jnp.ones(2)))[1]
        step = 1e-2
        difference = average(x + step * v, t + step, h - step) - average(x - step * v, t - step, h + step)
        difference = difference / (2 * step)
        cosine = (change * difference).sum() / jnp.linalg.norm(change) / jnp.linalg.norm(difference)
    # Frequencies of the time features that are too high make the two unrelated, at a step as long as that of a sampler.
    assert cosine > 0.99
    assert model.duration is not None


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_jumps_with_exact_averages_are_exact(steps, shift):
    x0 = jax.random.normal(KEY, (3, 4, 4, 2))
    x1 = jump(lambda x, t, h: gaussian_average(x, t, None, h), x0, time_grid(steps, shift))
    np.testing.assert_allclose(x1, DEVIATION * x0, rtol=1e-4, atol=1e-5)


def paint(settings, *, image=None, region=None, model=None):
    mask = jax.random.randint(jax.random.key(3), (3, 8, 8), 0, NUM_CLASSES).astype(jnp.uint8)
    return sampling.sample(
        model or nnx.merge(GRAPH, PARAMS),
        jax.random.split(KEY, 3),
        {"mask": mask},
        settings,
        autoencoder=IdentityAutoencoder(),
        flow=FLOW,
        image=image,
        region=region,
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_evaluation_per_step_with_guidance_inside(steps, monkeypatch):
    calls = []
    call = Denoiser.__call__

    def counted(self, xt, t, condition, duration=None):
        calls.append(len(xt))
        return call(self, xt, t, condition, duration)

    monkeypatch.setattr(Denoiser, "__call__", counted)
    faces = [np.asarray(paint(Sampling(steps=steps, guidance=scale))) for scale in (1.5, 2.5)]
    assert set(calls) == {3}
    assert faces[0].shape == (3, 8, 8, 3)
    assert (faces[0] != faces[1]).any()


def test_guidance_interval_and_shift_change_the_samples():
    plain = np.asarray(paint(Sampling(steps=2, guidance=2.0)))
    for changed in ({"shift": 4.0}, {"guidance_high": 0.5}, {"guidance_low": 0.4}):
        assert (plain != np.asarray(paint(Sampling(steps=2, guidance=2.0, **changed)))).any(), changed


def test_an_edit_takes_two_steps_and_keeps_the_rest():
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    region = np.zeros((3, 8, 8), bool)
    region[:, 2:6, 2:6] = True
    one, two, four = (
        np.asarray(paint(Sampling(steps=steps), image=jnp.asarray(image), region=jnp.asarray(region)))
        for steps in (1, 2, 4)
    )
    np.testing.assert_array_equal(one, two)
    assert (two != four).any()
    outside = np.broadcast_to(image, one.shape)[~region].astype(int)
    assert np.abs(one[~region] - outside).max() <= 1
    assert (one[region] != np.broadcast_to(image, one.shape)[region]).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver": "heun"}, "sample.solver must be euler for a mean flow, got 'heun'"),
        ({"guidance": 4.0}, r"sample.guidance must be in \[1, 3.0\].*got 4.0"),
        ({"guidance": 0.5}, r"sample.guidance must be in \[1, 3.0\].*got 0.5"),
        ({"guidance_rescale": 0.5}, "sample.guidance_rescale must be 0 for a mean flow, got 0.5"),
    ],
)
def test_settings_that_a_mean_flow_does_not_have_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, sample=Sampling(**values))
    assert dataclasses.replace(CONFIG, flow=FlowConfig(), sample=Sampling(**values)).sample.steps == 25


def test_a_mean_flow_needs_smooth_time_features():
    model = dataclasses.replace(CONFIG.model, time_frequencies="dit")
    with pytest.raises(InputError, match=r"model.time_frequencies dit varies too fast.*set it to smooth"):
        dataclasses.replace(CONFIG, model=model)
    assert dataclasses.replace(CONFIG, model=model, flow=FlowConfig()).model.time_frequencies == "dit"


def test_only_mean_flows_take_a_duration():
    plain = make_denoiser(dataclasses.replace(CONFIG, flow=FlowConfig()), KEY)
    xt, t = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2)
    condition = plain.encode({"mask": jnp.zeros((2, 8, 8), jnp.uint8)})
    with pytest.raises(ValueError, match="only mean flows predict for intervals"):
        plain(xt, t, condition, t)


def test_a_new_mean_flow_is_the_model_of_flow_matching():
    own = make_denoiser(CONFIG, KEY)
    xt, t = jax.random.normal(KEY, (2, 8, 8, 3)), jnp.asarray([0.2, 0.7])
    mask = jnp.ones((2, 8, 8), jnp.uint8)
    guided = own.encode({"mask": mask, "guidance": jnp.asarray([[2.0, 0.1, 0.9]] * 2)})
    np.testing.assert_array_equal(own(xt, t, guided, 1 - t), own(xt, t, own.encode({"mask": mask})))
