"""The autoencoder of a run: copied from given weights, or trained; then it lies in the run's folder for good.

workdir/
  autoencoder/            weights and sizes as diffusers saves them
  autoencoder_training/   checkpoints and metrics, where the run trains its own
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from sisma_jax.config import AutoencoderConfig, Config
from sisma_jax.data import latents, loading
from sisma_jax.diffusion.sampling import from_uint8, to_uint8
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import from_primary, is_primary, together
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.folder import autoencoder_folder
from sisma_jax.training import loop
from sisma_jax.training.state import init_state_of
from sisma_jax.training.step import Batch, Examples, Metrics, make_update_of

TRAINING_NAME = "autoencoder_training"

_PYRAMID_LEVELS = 3
_WARMUP_STEPS = 50
_CLIP_NORM = 1.0
# Images on which scale and shift are measured, and at most the PSNR.
_EXAMPLES_MEASURED = 512


def load(config: Config, workdir: AnyPath) -> IdentityAutoencoder | KlAutoencoder:
    """Returns the autoencoder of a run.

    Raises:
      InputError: the run has none yet, or its files are damaged.
    """
    if config.autoencoder.kind == "identity":
        return IdentityAutoencoder()
    folder = autoencoder_folder(workdir)
    if not kl_weights.exist(folder):
        raise InputError(f"{workdir} has no autoencoder yet; run the `autoencoder` command, or `train`.")
    return kl_weights.load(folder, decode_tile=config.autoencoder.decode_tile)


def prepare(config: Config, workdir: AnyPath) -> None:
    """Puts the autoencoder that the configuration wants into the run's folder, unless it is there.

    Every process of a job calls this; the first one writes.

    Raises:
      InputError: the weights do not exist, are damaged, of other sizes than configured or not those that the run began
        with, or as `loop.run`.
    """
    folder = autoencoder_folder(workdir)
    if config.autoencoder.weights:
        with together():
            if is_primary():
                _copy(config.autoencoder, folder)
    elif not from_primary(lambda: kl_weights.exist(folder)):
        autoencoder = train(config, workdir)
        with together():
            if is_primary():
                _save(autoencoder, folder)


def _save(autoencoder: KlAutoencoder, folder: AnyPath) -> None:
    try:
        kl_weights.save(autoencoder, folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); free disk space or mend the folder.") from error


def _copy(config: AutoencoderConfig, folder: AnyPath) -> None:
    weights = to_path(config.weights).expanduser()
    if kl_weights.exist(folder) and not weights.exists():
        return  # the run has what it began with
    given = kl_weights.load(weights)
    sizes = given.config
    if sizes.latent_channels != config.latent_channels or sizes.downsampling != config.downsampling:
        raise InputError(
            f"{config.weights} has latents of {sizes.latent_channels} channels, a {sizes.downsampling}th in size; give "
            f"--autoencoder.latent_channels={sizes.latent_channels} and {len(sizes.block_channels)} "
            "--autoencoder.block_channels."
        )
    if not kl_weights.exist(folder):
        _save(given, folder)
        return
    ours, theirs = kl_weights.fingerprint(kl_weights.load(folder)), kl_weights.fingerprint(given)
    if ours != theirs:
        raise InputError(
            f"--autoencoder.weights {config.weights} is the autoencoder {theirs}, the run began with {ours} (in "
            f"{folder}): a denoiser knows the latents of one alone. Give those weights, or another --workdir."
        )


def encoder_of(autoencoder: KlAutoencoder, batch_size: int) -> latents.Encoder:
    """Returns what the cache of latents needs of an autoencoder."""
    graph, params = nnx.split(autoencoder)

    @jax.jit
    def encode(params: nnx.State, image: Array) -> Array:
        moments = nnx.merge(graph, params).distribution(from_uint8(image))
        return jnp.concatenate(moments, axis=-1).astype(jnp.float16)

    return latents.Encoder(
        encode=lambda image: np.asarray(encode(params, image)),
        batch_size=batch_size,
        fingerprint=kl_weights.fingerprint(autoencoder),
        scale=autoencoder.config.scale,
        shift=autoencoder.config.shift,
    )


# Training


def pyramid_difference(x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Returns the mean absolute difference of two images at each level of their Laplacian pyramids, summed.

    Edges weigh as much as areas, as in a perceptual loss (Lap1 of Bojanowski et al., arXiv 1707.05776; with means of
    2 x 2 pixels in place of Gaussians).
    """
    difference, total = x - y, jnp.zeros(())  # the pyramid is linear
    for _ in range(_PYRAMID_LEVELS):
        batch, height, width, channels = difference.shape
        if height % 2 or width % 2:
            break
        coarse = difference.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
        total += jnp.abs(difference - coarse.repeat(2, axis=1).repeat(2, axis=2)).mean()
        difference = coarse
    return total + jnp.abs(difference).mean()


def divergence(mean: Float[Array, "B h w C"], log_variance: Float[Array, "B h w C"]) -> Float[Array, ""]:
    """Returns KL(Normal(mean, variance) || Normal(0, 1)) in nats, averaged over the values of the latents."""
    return 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()


def _trained_sizes(config: AutoencoderConfig) -> KlConfig:
    return KlConfig(
        latent_channels=config.latent_channels,
        block_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        norm_groups=config.norm_groups,
        scale=1.0,
    )


def _make(config: AutoencoderConfig, key: Key[Array, ""]) -> KlAutoencoder:
    return KlAutoencoder(_trained_sizes(config), rngs=nnx.Rngs(key))


def mesh_of(config: Config) -> Mesh:
    """Returns the mesh on which an autoencoder is trained.

    Raises:
      InputError: it does not fit the devices, or the batch the mesh.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.require_fit(config, mesh, config.autoencoder.batch_size, name="--autoencoder.batch_size")
    return mesh


def train(config: Config, workdir: AnyPath) -> KlAutoencoder:
    """Returns an autoencoder trained on the prepared data set, its latents scaled to a deviation of one.

    Raises:
      InputError: the data are not prepared, the devices cannot share a batch, or as `loop.run`.
      Preempted: as `loop.run`.
    """
    settings = config.autoencoder
    mesh = mesh_of(config)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: _make(settings, jax.random.key(0))))

    def draw(batch: Batch, key: Key[Array, ""]) -> Examples:
        batch_size, height, width, _ = batch["image"].shape
        side = settings.downsampling
        shape = (batch_size, height // side, width // side, settings.latent_channels)
        return batch | {"noise": jax.random.normal(key, shape)}

    def loss(params: Params, examples: Examples) -> tuple[Float[Array, ""], Metrics]:
        autoencoder = nnx.merge(graph, params)
        image = from_uint8(examples["image"])
        mean, log_variance = autoencoder.moments(image)
        painted = autoencoder.decode(mean + jnp.exp(log_variance / 2) * examples["noise"])
        pixels, kl = jnp.abs(painted - image).mean(), divergence(mean, log_variance)
        total = pixels + settings.perceptual_weight * pyramid_difference(painted, image) + settings.kl_weight * kl
        return total, {"pixels": pixels, "kl": kl}

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, _WARMUP_STEPS, max(settings.num_steps, _WARMUP_STEPS + 1)
    )
    transformation = optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adam(schedule))

    def held_out(params: Params) -> dict[str, float]:
        return {"psnr": psnr(nnx.merge(graph, sharding.fetch(params, mesh)), config)}

    job = loop.Job(
        mesh=mesh,
        initialize=lambda: init_state_of(
            lambda key: nnx.to_pure_dict(nnx.split(_make(settings, key))[1]), transformation, config.train.seed
        ),
        update=make_update_of(draw, loss, transformation, settings.ema_decay),
        held_out=held_out,
        iterator=loading.train_iterator(
            config.data, batch_size=settings.batch_size, seed=config.train.seed, share=loop.share_of(mesh)
        ),
        keys=("image",),
        batch_size=settings.batch_size,
        num_steps=settings.num_steps,
        log_every_steps=config.train.log_every_steps,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        keep_checkpoints=1,
        max_skipped_steps=config.train.max_skipped_steps,
    )
    folder = workdir / TRAINING_NAME
    loop.run(job, folder)
    whole = nnx.to_pure_dict(abstract)
    whole = sharding.place(whole, jax.tree.map(lambda _: sharding.replicated(mesh), whole))
    with Checkpoints(folder / loop.CHECKPOINTS_NAME, read_only=True) as checkpoints:
        _, params = checkpoints.restore_ema(whole)
    return _scaled(nnx.merge(graph, sharding.fetch(params, mesh)), config)


def _scaled(autoencoder: KlAutoencoder, config: Config) -> KlAutoencoder:
    """Returns the autoencoder with the scale and shift that bring its latents to mean 0 and deviation 1."""
    size = config.autoencoder.encode_batch_size
    graph, params = nnx.split(autoencoder)
    moments = jax.jit(lambda params, image: nnx.merge(graph, params).moments(from_uint8(image)))
    batches = loading.eval_batches(config.data, "train", batch_size=size, limit=_EXAMPLES_MEASURED)
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


def psnr(autoencoder: KlAutoencoder, config: Config) -> float:
    """Returns the peak signal-to-noise ratio of reconstructed test images in decibels: 8 bits, the mean over images."""
    limit = min(config.evaluate.num_samples, _EXAMPLES_MEASURED)
    errors = [
        ((painted.astype(np.float64) - image) ** 2).mean(axis=(1, 2, 3))
        for image, painted in reconstructions(autoencoder, config, limit)
    ]
    return float(np.mean(10 * np.log10(255**2 / np.maximum(np.concatenate(errors), 1e-3))))


def reconstructions(autoencoder: KlAutoencoder, config: Config, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of the first test images and what the autoencoder makes of them, uint8."""
    graph, params = nnx.split(autoencoder)

    @jax.jit
    def reconstruct(params: nnx.State, image: Array) -> Array:
        model = nnx.merge(graph, params)
        return to_uint8(model.decode(model.encode(from_uint8(image))))

    size = min(limit, config.autoencoder.encode_batch_size)
    for batch in loading.eval_batches(config.data, "test", batch_size=size, limit=limit):
        image = batch["image"]
        painted = reconstruct(params, np.resize(image, (size, *image.shape[1:])))
        yield image, np.asarray(painted)[: len(image)]
