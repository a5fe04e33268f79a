"""The autoencoder of a run: copied from given weights or trained, and then stored in the run's folder."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from sisma_jax.config import AutoencoderConfig, Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.latents import Encoder
from sisma_jax.diffusion.objectives import Batch, Examples
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig, from_uint8, to_uint8
from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import from_primary, is_primary, together
from sisma_jax.runs.folder import RunFolder
from sisma_jax.training import loop
from sisma_jax.training.state import TrainState
from sisma_jax.training.step import Metrics, build_update

ModuleState = nnx.State[Any, Any]
"""Parameters of a Flax module, by their path."""

_PYRAMID_LEVELS = 3
# Weight of the KL divergence from Normal(0, 1); pixel and pyramid differences have weight 1.
_KL_WEIGHT = 1e-4
_WARMUP_STEPS = 50
_CLIP_NORM = 1.0
# Number of images for measuring scale and shift, and the largest number for the PSNR.
_EXAMPLES_MEASURED = 512
# Images per call of the jitted autoencoder, by default.
_BATCH_SIZE = 16


def prepare(run: RunFolder, dataset: DataSet | None = None) -> None:
    """Puts the configured autoencoder into the run's folder: copies the given weights, or trains it.

    Does nothing if the folder already contains the autoencoder. Every process of a job must call this; the first one
    writes.

    Args:
      run: the run, opened with `RunFolder.writing`.
      dataset: training data; not needed if weights are given.

    Raises:
      InputError: the given weights do not exist, are damaged, have other sizes than configured, or differ from those
        that the run started with; or training fails, as for `loop.run_job`.
      Preempted: SIGTERM arrived during training, and a checkpoint is saved.
    """
    if run.config.autoencoder.weights:
        with together():
            if is_primary():
                _copy(run)
    elif not from_primary(run.has_autoencoder):
        assert dataset is not None, "without given weights, the autoencoder is trained on a data set"
        autoencoder = train(run, dataset)
        with together():
            if is_primary():
                _save(autoencoder, run.autoencoder_path)


def _save(autoencoder: KlAutoencoder, folder: AnyPath) -> None:
    try:
        kl_weights.save(autoencoder, folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); free disk space or fix the folder.") from error


def _copy(run: RunFolder) -> None:
    config = run.config.autoencoder
    if run.has_autoencoder() and not to_path(config.weights).exists():
        return  # the run has its own copy
    given = kl_weights.load(config.weights)
    sizes = given.config
    if sizes.latent_channels != config.latent_channels or sizes.downsampling != config.downsampling:
        raise InputError(
            f"{config.weights} has latents of {sizes.latent_channels} channels and downsamples by {sizes.downsampling}"
            f"; set autoencoder.latent_channels to {sizes.latent_channels}, and give {len(sizes.block_channels)} "
            "autoencoder.block_channels."
        )
    if not run.has_autoencoder():
        _save(given, run.autoencoder_path)
        return
    theirs = kl_weights.fingerprint(given)
    if run.autoencoder_fingerprint != theirs:
        raise InputError(
            f"autoencoder.weights {config.weights} is the autoencoder {theirs}, but the run started with "
            f"{run.autoencoder_fingerprint} (in {run.autoencoder_path}), and its denoiser works only with the latents "
            "of that one. Give those weights, or name another folder."
        )


def encoder(run: RunFolder) -> Encoder:
    """Returns the encoder of the run's KL autoencoder, for the cache of latents.

    Raises:
      InputError: the run has no weights of a KL autoencoder yet, or they are damaged.
    """
    autoencoder = run.kl_autoencoder
    graph, params = nnx.split(autoencoder)

    @jax.jit
    def encode(params: ModuleState, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B h w M"]:
        moments = nnx.merge(graph, params).distribution(from_uint8(image))
        return jnp.concatenate(moments, axis=-1).astype(jnp.float16)

    return Encoder(
        encode=lambda image: np.asarray(encode(params, image)),
        batch_size=run.config.autoencoder.encode_batch_size,
        fingerprint=run.autoencoder_fingerprint,
        scale=autoencoder.config.scale,
        shift=autoencoder.config.shift,
    )


# Training


def pyramid_difference(x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Returns the mean absolute difference of two images' Laplacian pyramids, summed over the levels.

    This loss weighs edges as much as large areas, as a perceptual loss does. It is Lap1 of Bojanowski et al.
    (arXiv 1707.05776), with means over 2 x 2 pixels in place of Gaussian filters.

    Args:
      x: images.
      y: images that are compared with x.
    """
    difference, total = x - y, jnp.zeros((), jnp.float32)  # the pyramid is linear
    for _ in range(_PYRAMID_LEVELS):
        batch, height, width, channels = difference.shape
        if height % 2 or width % 2:
            break
        coarse = difference.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
        total += jnp.abs(difference - coarse.repeat(2, axis=1).repeat(2, axis=2)).mean()
        difference = coarse
    return total + jnp.abs(difference).mean()


def divergence(mean: Float[Array, "B h w C"], log_variance: Float[Array, "B h w C"]) -> Float[Array, ""]:
    """Returns KL(Normal(mean, variance) || Normal(0, 1)) in nats, averaged over all elements.

    KL = (mean^2 + variance - 1 - log(variance)) / 2, as in Kingma and Welling (arXiv 1312.6114, appendix B).

    Args:
      mean: of the latents.
      log_variance: natural logarithm of their variance.
    """
    return 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()


def make_mesh(config: Config) -> Mesh:
    """Returns the device mesh for training the autoencoder.

    Raises:
      InputError: the mesh does not match the number of devices, or the batch cannot be sharded evenly over it.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.require_fit(config, mesh, config.autoencoder.batch_size, name="autoencoder.batch_size")
    return mesh


def train(run: RunFolder, dataset: DataSet) -> KlAutoencoder:
    """Returns an autoencoder trained on a data set, with the scale and shift that standardise its latents.

    Training resumes from the newest undamaged checkpoint, if there is one. Every process of a job must call this.

    Args:
      run: the run, opened with `RunFolder.writing`.
      dataset: training data.

    Raises:
      InputError: the mesh does not match the devices or the batch, or training fails, as for `loop.run_job`.
      Preempted: SIGTERM arrived, and a checkpoint is saved.
    """
    config, settings = run.config, run.config.autoencoder
    mesh = make_mesh(config)
    graph = nnx.split(nnx.eval_shape(lambda: _make(settings, jax.random.key(0))))[0]

    def draw(batch: Batch, key: Key[Array, ""]) -> Examples:
        batch_size, height, width, _ = batch["image"].shape
        side = settings.downsampling
        shape = (batch_size, height // side, width // side, settings.latent_channels)
        return batch | {"noise": jax.random.normal(key, shape, jnp.float32)}

    def loss(params: Params, examples: Examples) -> tuple[Float[Array, ""], Metrics]:
        autoencoder = nnx.merge(graph, params)
        image = from_uint8(examples["image"])
        mean, log_variance = autoencoder.moments(image)
        decoded = autoencoder.decode(mean + jnp.exp(log_variance / 2) * examples["noise"])
        pixels, kl = jnp.abs(decoded - image).mean(), divergence(mean, log_variance)
        total = pixels + pyramid_difference(decoded, image) + _KL_WEIGHT * kl
        return total, {"pixels": pixels, "kl": kl}

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, _WARMUP_STEPS, max(settings.num_steps, _WARMUP_STEPS + 1)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adam(schedule))

    def held_out(_: int, params: Params) -> dict[str, float]:
        limit = min(config.evaluate.num_samples, _EXAMPLES_MEASURED)
        autoencoder = nnx.merge(graph, sharding.fetch(params, mesh))
        return {"psnr": psnr(autoencoder, dataset, limit, settings.encode_batch_size)}

    job = loop.Job(
        mesh=mesh,
        initialize=lambda: TrainState.create(
            lambda key: nnx.to_pure_dict(nnx.split(_make(settings, key))[1]), optimizer, config.train.seed
        ),
        update=build_update(draw, loss, optimizer, settings.ema_decay),
        held_out=held_out,
        iterator=dataset.train_batches(settings.batch_size, config.train.seed, loop.local_share(mesh)),
        batch_size=settings.batch_size,
        num_steps=settings.num_steps,
        log_every_steps=config.train.log_every_steps,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        keep_checkpoints=1,
        max_skipped_steps=config.train.max_skipped_steps,
    )
    state = loop.run_job(job, run.autoencoder_training)
    return _scaled(nnx.merge(graph, sharding.fetch(state.ema, mesh)), dataset, settings.encode_batch_size)


def _make(config: AutoencoderConfig, key: Key[Array, ""]) -> KlAutoencoder:
    sizes = KlConfig(
        latent_channels=config.latent_channels,
        block_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        norm_groups=config.norm_groups,
        scale=1.0,
    )
    return KlAutoencoder(sizes, rngs=nnx.Rngs(key))


def _scaled(autoencoder: KlAutoencoder, dataset: DataSet, batch_size: int) -> KlAutoencoder:
    """Returns the autoencoder with the scale and shift that give its latents mean 0 and standard deviation 1."""
    graph, params = nnx.split(autoencoder)
    moments = jax.jit(lambda params, image: nnx.merge(graph, params).moments(from_uint8(image)))
    batches = dataset.eval_batches("train", batch_size, limit=_EXAMPLES_MEASURED)
    results = [jax.tree.map(np.float64, moments(params, batch["image"])) for batch in batches]
    mean, log_variance = (np.concatenate([result[i] for result in results]) for i in (0, 1))
    sizes = dataclasses.replace(
        autoencoder.config,
        scale=float(1 / np.sqrt(np.exp(log_variance).mean() + mean.var())),
        shift=float(mean.mean()),
    )
    scaled = nnx.eval_shape(lambda: KlAutoencoder(sizes, rngs=nnx.Rngs(0)))
    nnx.update(scaled, params)
    return scaled


def psnr(
    autoencoder: KlAutoencoder, dataset: DataSet, limit: int = _EXAMPLES_MEASURED, batch_size: int = _BATCH_SIZE
) -> float:
    """Returns the mean peak signal-to-noise ratio of reconstructed test images in dB, for 8-bit images.

    PSNR = 10 log10(255^2 / MSE) per image.

    Args:
      autoencoder: to measure.
      dataset: whose test split is reconstructed.
      limit: number of test images; at most 512 are used.
      batch_size: images per call of the jitted autoencoder.
    """
    errors = [
        ((decoded.astype(np.float64) - image) ** 2).mean(axis=(1, 2, 3))
        for image, decoded in reconstructions(autoencoder, dataset, min(limit, _EXAMPLES_MEASURED), batch_size)
    ]
    return float(np.mean(10 * np.log10(255**2 / np.maximum(np.concatenate(errors), 1e-3))))


def reconstructions(
    autoencoder: KlAutoencoder, dataset: DataSet, limit: int, batch_size: int = _BATCH_SIZE
) -> Iterator[tuple[UInt8[np.ndarray, "B H W 3"], UInt8[np.ndarray, "B H W 3"]]]:
    """Yields pairs of test images and their reconstructions, in batches.

    Args:
      autoencoder: encodes and decodes the images.
      dataset: whose test split is read, from its first image on.
      limit: number of images; the last batch may be smaller.
      batch_size: images per call of the jitted autoencoder.
    """
    graph, params = nnx.split(autoencoder)
    size = min(limit, batch_size)
    for batch in dataset.eval_batches("test", size, limit=limit):
        image = batch["image"]
        # The last batch is padded, so that only one shape is compiled.
        decoded = _reconstruct(graph, params, np.resize(image, (size, *image.shape[1:])))
        yield image, np.asarray(decoded)[: len(image)]


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(
    graph: nnx.GraphDef[KlAutoencoder], params: ModuleState, image: UInt8[Array, "B H W 3"]
) -> UInt8[Array, "B H W 3"]:
    autoencoder = nnx.merge(graph, params)
    return to_uint8(autoencoder.decode(autoencoder.encode(from_uint8(image))))
