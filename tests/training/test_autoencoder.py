"""The autoencoder of a run: trained or given, and what it is to the denoiser."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sisma_jax.data.dataset import DataSet
from sisma_jax.data.latents import LatentDataSet
from sisma_jax.errors import InputError
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig
from sisma_jax.runs.folder import RunFolder
from sisma_jax.runs.metrics import read_metrics
from sisma_jax.training import autoencoder as autoencoders
from tests.tiny import tiny_latent_config

SIZES = KlConfig(block_channels=(4, 8), layers_per_block=1, norm_groups=4, scale=0.7, shift=0.1)


def with_autoencoder(config, **values):
    return dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, **values))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_latent_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dataset(config):
    return DataSet.prepare(config.data)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with weights in the format of diffusers."""
    folder = tmp_path_factory.mktemp("weights") / "vae"
    kl_weights.save(KlAutoencoder(SIZES, rngs=nnx.Rngs(1)), folder)
    return folder


def test_pyramid_difference_sees_edges_that_the_mean_error_does_not():
    flat = np.zeros((1, 16, 16, 3), np.float32)
    assert autoencoders.pyramid_difference(flat, flat) == 0
    shifted, checked = flat + 0.1, flat.copy()
    checked[:, ::2, ::2], checked[:, 1::2, 1::2] = 0.1, 0.1
    checked[:, ::2, 1::2], checked[:, 1::2, ::2] = -0.1, -0.1
    # A constant is all in the coarsest level; the finest pattern all in the finest.
    for image in (shifted, checked):
        np.testing.assert_allclose(autoencoders.pyramid_difference(image, flat), 0.1, rtol=1e-5)
    edge = flat.copy()
    edge[:, :, 6:] = 0.1
    assert autoencoders.pyramid_difference(edge, flat) > 1.2 * np.abs(edge).mean()


def test_divergence_is_that_of_samples():
    mean, log_variance = np.full((1, 2, 2, 1), 0.6, np.float32), np.full((1, 2, 2, 1), -0.4, np.float32)
    x = 0.6 + np.exp(-0.2) * np.random.default_rng(0).normal(size=200_000)
    density_ratio = -0.5 * (x - 0.6) ** 2 / np.exp(-0.4) + 0.2 + 0.5 * x**2
    np.testing.assert_allclose(autoencoders.divergence(mean, log_variance), density_ratio.mean(), atol=0.01)


def test_training_resumes_lowers_the_loss_and_its_latents_have_deviation_one(config, dataset, tmp_path, monkeypatch):
    longer = with_autoencoder(config, num_steps=60, learning_rate=3e-3, checkpoint_every_steps=20)
    measure, steps = autoencoders.psnr, iter([20, 40])

    def interrupted(*arguments):
        if next(steps) == 40:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(autoencoders, "psnr", interrupted)
    with pytest.raises(KeyboardInterrupt), RunFolder.writing(tmp_path, longer) as run:
        autoencoders.prepare(run, dataset)
    monkeypatch.undo()
    assert not run.has_autoencoder()
    with RunFolder.writing(tmp_path, longer) as run:
        autoencoders.prepare(run, dataset)
        lines = read_metrics(run.autoencoder_training.metrics)
        assert [line["step"] for line in lines] == list(range(1, 61))
        assert np.mean([line["pixels"] for line in lines[-5:]]) < 0.7 * lines[0]["pixels"]
        measured = autoencoders.psnr(run.autoencoder, dataset, limit=config.evaluate.num_samples, batch_size=8)
        assert lines[-1]["psnr"] == pytest.approx(measured, abs=0.01)
        statistics = LatentDataSet.prepare(dataset, autoencoders.encoder(run)).statistics
    deviation, mean = np.array(statistics["standard_deviation"]), np.array(statistics["mean"])
    assert np.sqrt((deviation**2 + mean**2).mean()) == pytest.approx(1, abs=0.02)
    assert mean.mean() == pytest.approx(0, abs=0.02)


def test_given_weights_are_copied_into_the_run_and_held_to(config, dataset, given, tmp_path):
    def prepare(weights):
        with RunFolder.writing(tmp_path / "run", with_autoencoder(config, weights=str(weights))) as run:
            autoencoders.prepare(run)
        return run

    fingerprint = kl_weights.fingerprint(kl_weights.load(given))
    assert prepare(given).autoencoder_fingerprint == fingerprint
    # The copy is enough.
    assert prepare(tmp_path / "gone").autoencoder_fingerprint == fingerprint
    kl_weights.save(KlAutoencoder(dataclasses.replace(SIZES, scale=0.8), rngs=nnx.Rngs(1)), tmp_path / "other")
    with pytest.raises(InputError, match=rf"is the autoencoder \w+, but the run started with {fingerprint}"):
        prepare(tmp_path / "other")
    with pytest.raises(InputError, match=rf"no latents of synthetic_faces by this run's autoencoder .{fingerprint}"):
        LatentDataSet.open(dataset, prepare(given).autoencoder_fingerprint)


def test_weights_of_other_sizes_are_refused(config, given, tmp_path):
    def prepare(**values):
        with RunFolder.writing(tmp_path / str(len(runs)), with_autoencoder(config, **values)) as run:
            runs.append(run)
            autoencoders.prepare(run)

    runs = []
    for values in ({"latent_channels": 16}, {"block_channels": (4, 4, 4)}):
        with pytest.raises(
            InputError, match=r"latents of 4 channels and downsamples by 2; set .*channels to 4, and give 2 "
        ):
            prepare(weights=str(given), **values)
    with pytest.raises(InputError, match=r"absent do not exist.*sd-vae-ft-mse"):
        prepare(weights=str(tmp_path / "absent"))
    assert len(runs) == 3
    assert not any(run.has_autoencoder() or run.autoencoder_path.exists() for run in runs)


def test_reconstructing_again_compiles_nothing(dataset, given):
    model = kl_weights.load(given)
    first = list(autoencoders.reconstructions(model, dataset, limit=7, batch_size=4))
    assert [len(image) for image, _ in first] == [4, 3]
    before = autoencoders._reconstruct._cache_size()
    again = list(autoencoders.reconstructions(model, dataset, limit=7, batch_size=4))
    assert autoencoders._reconstruct._cache_size() == before
    for (image, decoded), (_, same) in zip(first, again, strict=True):
        assert decoded.shape == image.shape
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, same)


def test_saved_weights_are_loaded_again_to_the_bit(given, tmp_path):
    model = kl_weights.load(given)
    kl_weights.save(model, tmp_path / "again")
    again = kl_weights.load(tmp_path / "again")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    assert kl_weights.fingerprint(again) == kl_weights.fingerprint(model)
    with pytest.raises(OSError, match=r"exist|empty"):
        kl_weights.save(model, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]
