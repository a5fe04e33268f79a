import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sisma_jax.commands.parser import prepare_parser
from sisma_jax.config import ParserConfig
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.drawing.portrait import draw_face
from sisma_jax.models.autoencoder import from_uint8
from sisma_jax.models.face_parser import FaceParser, init_params, make_graph
from sisma_jax.runs import parser_file
from sisma_jax.runs.folder import RunFolder
from sisma_jax.training import face_parser
from sisma_jax.training.face_parser import augment, balanced_cross_entropy, class_frequencies
from tests.tiny import tiny_config

PARSER = ParserConfig(width=8, num_steps=4, batch_size=8, checkpoint_every_steps=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return dataclasses.replace(tiny_config(tmp_path_factory.mktemp("data")), parser=PARSER)


@pytest.fixture(scope="module")
def dataset(config):
    return DataSet.prepare(config.data)


def train(config, dataset, workdir):
    with RunFolder.writing(workdir, config) as run:
        return face_parser.train(run, dataset)


def test_the_network_learns_a_batch_of_faces():
    faces = [draw_face(seed, 32) for seed in range(4)]
    image = from_uint8(jnp.stack([face[0] for face in faces]))
    mask = np.stack([face[1] for face in faces])
    frequencies = np.full(19, 1 / 19, np.float32)  # so that all pixels have the same weight
    graph, params = make_graph(16, 19), init_params(jax.random.key(0), 16, 19)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def update(params, opt_state):
        def loss(params):
            return balanced_cross_entropy(nnx.merge(graph, params)(image), mask, frequencies)

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for _ in range(150):
        params, opt_state = update(params, opt_state)
    predicted = FaceParser(graph, params, CELEBAMASK_HQ, 32).predict(np.stack([face[0] for face in faces]))
    assert np.mean(predicted == mask) > 0.9


def test_a_resumed_training_is_bit_identical_to_an_uninterrupted_one(config, dataset, tmp_path, monkeypatch):
    unbroken = train(config, dataset, tmp_path / "unbroken")
    measure, calls = face_parser.held_out_agreement, []

    def stop_at_the_second_checkpoint(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(face_parser, "held_out_agreement", stop_at_the_second_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        train(config, dataset, tmp_path / "broken")
    monkeypatch.undo()
    resumed = train(config, dataset, tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, resumed.params, unbroken.params)


def test_a_run_trains_its_parser_once(config, dataset, tmp_path, monkeypatch):
    with RunFolder.writing(tmp_path / "run", config) as run:
        prepare_parser(run, dataset)
        trained = parser_file.load(run.parser_path, CELEBAMASK_HQ)
        monkeypatch.setattr(face_parser, "train", None)
        prepare_parser(run, dataset)
        assert run.parser.image_size == trained.image_size == 16
    named = dataclasses.replace(
        config, parser=dataclasses.replace(PARSER, weights=str(tmp_path / "run/parser.safetensors"))
    )
    with RunFolder.writing(tmp_path / "other", named) as run:
        prepare_parser(run, dataset)
        assert not run.parser_path.exists()
        jax.tree.map(np.testing.assert_array_equal, run.parser.params, trained.params)


def test_the_loss_is_that_of_a_float64_sum():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4, 5))
    mask = rng.integers(0, 5, (2, 3, 4)).astype(np.uint8)
    frequencies = rng.dirichlet(np.ones(5))
    adjusted = logits - 0.5 * np.log(frequencies)
    log_probabilities = adjusted - np.log(np.exp(adjusted).sum(axis=-1, keepdims=True))
    weights = frequencies[mask] ** -0.5
    picked = np.take_along_axis(log_probabilities, mask[..., None].astype(int), axis=-1)[..., 0]
    expected = -(weights * picked).sum() / weights.sum()
    value = balanced_cross_entropy(jnp.asarray(logits, jnp.float32), mask, jnp.asarray(frequencies, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5)  # float32


def test_ignored_pixels_are_not_learned_from():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, 4, 4, 5)), jnp.float32)
    mask = rng.integers(0, 5, (1, 4, 4)).astype(np.uint8)
    hidden = np.where(np.arange(4) < 2, 255, mask).astype(np.uint8)
    frequencies = jnp.full((5,), 0.2, jnp.float32)
    loss, gradient = jax.value_and_grad(balanced_cross_entropy)(logits, hidden, frequencies)
    assert (gradient[:, :, :2] == 0).all()
    assert (gradient[:, :, 2:] != 0).all()
    np.testing.assert_allclose(loss, balanced_cross_entropy(logits[:, :, 2:], mask[:, :, 2:], frequencies), rtol=1e-6)
    assert balanced_cross_entropy(logits, np.full_like(mask, 255), frequencies) == 0


def test_image_and_mask_move_together():
    # Each class covers a quarter of the image, whose brightness is the class. The border repeats.
    mask = np.kron(np.arange(4).reshape(2, 2), np.ones((16, 16))).astype(np.uint8)
    masks = np.stack([mask] * 8)
    image = np.stack([masks * 60] * 3, axis=-1).astype(np.uint8)
    moved, labels = face_parser._warp(jax.random.key(0), from_uint8(jnp.asarray(image)), jnp.asarray(masks))
    brightness = (np.asarray(moved)[..., 0] + 1) * 127.5 / 60
    is_inside = np.abs(brightness - np.round(brightness)) < 0.01  # and not an interpolated edge
    assert is_inside.mean() > 0.8
    # Where the four classes meet, a mixture may be as bright as another class.
    assert (np.round(brightness) == labels)[is_inside].mean() > 0.998
    assert len({one.tobytes() for one in np.asarray(labels)}) == 8
    augmented = augment({"image": jnp.asarray(image), "mask": jnp.asarray(masks)}, jax.random.key(0))
    assert augmented["image"].dtype == np.float32
    assert augmented["mask"].dtype == np.uint8


def test_nothing_moves_without_zoom_rotation_and_shift(monkeypatch):
    for name in ("_LOG_ZOOM", "_ANGLE", "_SHIFT"):
        monkeypatch.setattr(face_parser, name, 0.0)
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 7, 9, 3)).astype(np.float32)
    mask = rng.integers(0, 19, (2, 7, 9)).astype(np.uint8)
    moved, labels = face_parser._warp(jax.random.key(0), jnp.asarray(image), jnp.asarray(mask))
    np.testing.assert_allclose(moved, image, atol=1e-5)
    np.testing.assert_array_equal(labels, mask)


def test_frequencies_are_those_of_the_training_masks(dataset):
    masks = np.stack(list(dataset.training_masks(500)))
    frequencies = class_frequencies(dataset)
    np.testing.assert_allclose(
        frequencies, np.maximum([(masks == label).mean() for label in range(19)], 1e-6), rtol=1e-6
    )
