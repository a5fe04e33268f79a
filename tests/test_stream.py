"""`pipe.stream`, and that a face is the same in a stream, in parts, and in a larger batch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import FlowConfig, Sampling
from sisma_jax.data.drawing import draw_face
from sisma_jax.diffusion import solvers
from sisma_jax.diffusion.sampling import sample
from sisma_jax.diffusion.stepping import MAX_EVALUATIONS
from sisma_jax.errors import InputError
from sisma_jax.models.autoencoder import IdentityAutoencoder
from sisma_jax.models.factory import init_params, make_graph
from sisma_jax.pipeline import Pipeline
from tests.tiny import tiny_config

KEY = jax.random.key(5)
MASKS = np.stack([draw_face(np.random.default_rng(seed), 16)[1] for seed in range(3)])


CONFIG = tiny_config(Path("data"))
MEAN_FLOW = dataclasses.replace(CONFIG, flow=FlowConfig(objective="mean_flow", prediction="data"))


def _noisy(params, scale=0.1):
    """Parameters of a new model are zero where its layers begin as the identity; these are not."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


PARAMS = _noisy(init_params(CONFIG, jax.random.key(0)))
MEAN_FLOW_PARAMS = _noisy(init_params(MEAN_FLOW, jax.random.key(0)))


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(CONFIG, PARAMS, 0)


@pytest.fixture(scope="module")
def mean_flow():
    return Pipeline(MEAN_FLOW, MEAN_FLOW_PARAMS, 0)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_last_item_of_a_stream_is_the_result_of_the_call(pipe, solver, guidance):
    settings = {"steps": 5, "solver": solver, "guidance": guidance, "num_samples": 2}
    items = list(pipe.stream(MASKS, key=KEY, **settings))
    assert [step for step, _ in items] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(items[-1][1], pipe(MASKS, key=KEY, **settings))
    assert all(images.shape == (6, 16, 16, 3) and images.dtype == np.uint8 for _, images in items)
    assert (items[0][1] != items[-1][1]).any()


def test_every_selects_the_steps_and_does_not_change_the_result(pipe):
    seldom = list(pipe.stream(MASKS[0], key=KEY, steps=5, every=2))
    always = dict(pipe.stream(MASKS[0], key=KEY, steps=5))
    assert [step for step, _ in seldom] == [2, 4, 5]
    for step, images in seldom:
        np.testing.assert_array_equal(images, always[step])


@pytest.mark.parametrize("every", [0, -1, 1.5, "2"])
def test_a_wrong_every_is_refused_before_the_first_item(pipe, every):
    with pytest.raises(InputError, match="every must be a whole number"):
        pipe.stream(MASKS[0], key=KEY, every=every)


def test_a_stream_of_several_batches_yields_all_faces_together(pipe):
    items = list(pipe.stream(MASKS, key=KEY, num_samples=4, steps=2, batch_size=8))
    assert [images.shape[0] for _, images in items] == [12, 12]
    np.testing.assert_array_equal(items[-1][1], pipe(MASKS, key=KEY, num_samples=4, steps=2, batch_size=8))


def as_one_program(keys, masks, settings, config=CONFIG, params=PARAMS, **edit):
    """The images that `sample` computes."""
    model = nnx.merge(make_graph(config), params)
    inputs = {"mask": jnp.asarray(masks)}
    images = sample(model, keys, inputs, settings, autoencoder=IdentityAutoencoder(), flow=config.flow, **edit)
    return np.asarray(images).astype(int)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_parts_compute_what_the_one_program_computes(pipe, solver, guidance):
    settings = Sampling(steps=4, solver=solver, guidance=guidance, shift=2.0, guidance_low=0.2, guidance_rescale=0.5)
    keys = jax.random.split(KEY, 3)
    # One level of 255: the solver's table is computed by NumPy, which rounds otherwise.
    whole = as_one_program(keys, MASKS, settings)
    assert np.abs(whole - pipe(MASKS, key=keys, sampling=settings)).max() <= 1


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_end_where_the_table_reaches_their_times(solver, steps):
    times = solvers.time_grid(steps, 2.0)
    ends = solvers.step_ends(steps, solver)
    table = solvers.evaluations(steps, 2.0, solver)
    assert table.shape == (3, ends[-1])
    assert len(ends) == steps
    # dx/dt = 1 moves x by the time that has passed: at the end of a step the point is at the next evaluation's time.
    point = base = 0.0
    for i, (_, to_point, to_base) in enumerate(table.T, start=1):
        point, base = base + to_point, base + to_base
        if i in ends[:-1]:
            assert point == pytest.approx(table[0, i], abs=1e-6)
            if solver != "heun" or i < len(table.T):
                assert point == pytest.approx(float(times[ends.index(i) + 1]), abs=1e-6)
    assert point == pytest.approx(1.0, abs=1e-6)


def test_a_trajectory_longer_than_the_table_is_computed_in_several_calls(pipe):
    settings = Sampling(steps=MAX_EVALUATIONS // 2 + 3, solver="midpoint", guidance=1.0)
    keys = jax.random.split(KEY, 1)
    items = list(pipe.stream(MASKS[0], key=keys, sampling=settings, every=settings.steps - 1))
    assert [step for step, _ in items] == [settings.steps - 1, settings.steps]
    np.testing.assert_array_equal(items[-1][1], pipe(MASKS[0], key=keys, sampling=settings))
    assert np.abs(as_one_program(keys, MASKS[:1], settings) - items[-1][1]).max() <= 1


def test_other_steps_and_solvers_need_no_other_program(pipe):
    pipe(MASKS[0], key=KEY, steps=3)
    count = pipe.sampler.num_programs()
    for settings in ({"steps": 4}, {"solver": "heun"}, {"shift": 3.0}, {"guidance": 2.5}, {"guidance_low": 0.1}):
        pipe(MASKS[0], key=KEY, **settings)
    assert pipe.sampler.num_programs() == count


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_mean_flow_streams_what_the_one_program_computes(mean_flow, steps):
    settings = Sampling(steps=steps, guidance=3.0, guidance_low=0.1, guidance_high=0.8, shift=2.0)
    keys = jax.random.split(KEY, 3)
    items = list(mean_flow.stream(MASKS, key=keys, sampling=settings))
    assert [step for step, _ in items] == list(range(1, steps + 1))
    np.testing.assert_array_equal(items[-1][1], mean_flow(MASKS, key=keys, sampling=settings))
    whole = as_one_program(keys, MASKS, settings, MEAN_FLOW, MEAN_FLOW_PARAMS)
    assert np.abs(whole - items[-1][1]).max() <= 1


def test_a_mean_flow_reads_the_guidance_and_needs_no_other_program_for_it(mean_flow):
    first = mean_flow(MASKS[0], key=KEY, steps=1, guidance=1.0)
    count = mean_flow.sampler.num_programs()
    for settings in ({"guidance": 3.0}, {"guidance": 3.0, "guidance_high": 0.0}, {"steps": 2, "guidance": 1.0}):
        assert (mean_flow(MASKS[0], key=KEY, **({"steps": 1} | settings)) != first).any()
    assert mean_flow.sampler.num_programs() == count


def test_an_edit_by_a_mean_flow_takes_two_evaluations_or_more(mean_flow):
    photo = draw_face(np.random.default_rng(9), 16)[0]
    region = np.zeros((1, 16, 16), bool)
    region[:, 4:12, 4:12] = True
    keys = jax.random.split(KEY, 1)
    edits = []
    for steps in (1, 2, 3):
        settings = Sampling(steps=steps, guidance=2.0)
        faces = mean_flow.faces(mean_flow.masks(MASKS[0]), keys, 1, photo, region)
        [(step, images)] = mean_flow.sampler.steps(faces, settings, mean_flow.sampler.batch_size(1, 1))
        assert step == steps
        edit = {"image": jnp.asarray(photo)[None], "region": jnp.asarray(region)}
        whole = as_one_program(keys, MASKS[:1], settings, MEAN_FLOW, MEAN_FLOW_PARAMS, **edit)
        assert np.abs(whole - images).max() <= 1
        assert np.abs(photo.astype(int) - images[0])[~region[0]].max() <= 1
        edits.append(images)
    np.testing.assert_array_equal(edits[0], edits[1])
    assert (edits[1] != edits[2]).any()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["CONFIG, PARAMS", "MEAN_FLOW, MEAN_FLOW_PARAMS"])
def test_a_face_is_the_same_in_batches_of_all_sizes_on_one_device(model):
    """In a process of its own, which has one device and all of XLA's optimisations, as users have.

    A matrix product may round otherwise where it has more rows: a few values differ by one level of 255.
    """
    code = (
        "import os; os.environ.update(JAX_PLATFORMS='cpu', XLA_FLAGS='')\n"
        "os.environ.pop('JAX_DISABLE_MOST_OPTIMIZATIONS', None)\n"
        "import numpy as np, jax\n"
        "from tests.test_stream import CONFIG, MASKS, MEAN_FLOW, MEAN_FLOW_PARAMS, PARAMS\n"
        "jax.config.update('jax_disable_most_optimizations', False)\n"
        "from sisma_jax.pipeline import Pipeline\n"
        f"pipe = Pipeline({model}, 0)\n"
        "assert pipe.mesh.size == 1\n"
        "keys = jax.random.split(jax.random.key(2), 16)\n"
        "masks = MASKS[np.arange(16) % 3]\n"
        "alone = np.concatenate([pipe(masks[i], key=keys[i:i+1], guidance=2.0) for i in range(16)])\n"
        "for size in (2, 16):\n"
        "    together = pipe(masks, key=keys, guidance=2.0, batch_size=size)\n"
        "    difference = np.abs(alone.astype(int) - together)\n"
        "    assert difference.max() <= 1 and (difference > 0).mean() < 0.001, difference.max()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
