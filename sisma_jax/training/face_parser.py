"""Trains the face parser of a run on the training split of its data set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.diffusion.objectives import Batch, Examples
from sisma_jax.evaluation import mask_agreement
from sisma_jax.models.autoencoder import from_uint8
from sisma_jax.models.face_parser import FaceParser, init_params, make_graph
from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding
from sisma_jax.runs.folder import RunFolder
from sisma_jax.training import loop
from sisma_jax.training.state import TrainState
from sisma_jax.training.step import Metrics, build_update

# Masks by which the class frequencies are estimated.
_MASKS_COUNTED = 500

# Brows, eyes and lips together cover about 3 % of the pixels. Class weights of 1 / sqrt(frequency) make them learnable,
# but with these weights alone the network predicts them too often. The loss therefore subtracts the same power of the
# frequency from the logits (Menon et al., arXiv 2007.07314), so that its minimum is the probability of each class. On
# held-out real faces at 128 px, half of this adjustment gave a mIoU of 0.601 and an accuracy of 0.891, and all of it
# 0.614 and 0.896.
_WEIGHT_POWER = -0.5
_LOGIT_ADJUSTMENT = -_WEIGHT_POWER

_WARMUP_STEPS = 100
_CLIP_NORM = 1.0
_WEIGHT_DECAY = 1e-3

# Ranges of the random similarity transforms, which prepare for photographs that are framed differently.
_LOG_ZOOM = 0.25
_ANGLE = 0.3  # radians
_SHIFT = 0.1  # of the side


def make_mesh(config: Config) -> Mesh:
    """Returns the device mesh for training the face parser.

    Raises:
      InputError: the mesh does not match the number of devices, or the batch cannot be sharded evenly over it.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.require_fit(config, mesh, config.parser.batch_size, name="parser.batch_size")
    return mesh


def train(run: RunFolder, dataset: DataSet) -> FaceParser:
    """Returns a face parser trained on a data set.

    Training resumes from the newest undamaged checkpoint, if there is one. Every process of a job must call this.

    Args:
      run: the run, opened with `RunFolder.writing`.
      dataset: training data.

    Raises:
      InputError: the mesh does not match the devices or the batch, or training fails, as for `loop.run_job`.
      Preempted: SIGTERM arrived, and a checkpoint is saved.
    """
    config, settings = run.config, run.config.parser
    mesh, num_classes = make_mesh(config), len(dataset.classes)
    graph = make_graph(settings.width, num_classes)
    frequencies = class_frequencies(dataset)

    def loss(params: Params, examples: Examples) -> tuple[Float[Array, ""], Metrics]:
        logits = nnx.merge(graph, params)(examples["image"])
        return balanced_cross_entropy(logits, examples["mask"], frequencies), {}

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, min(_WARMUP_STEPS, settings.num_steps // 10), settings.num_steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adamw(schedule, weight_decay=_WEIGHT_DECAY))

    def held_out(_: int, params: Params) -> dict[str, float]:
        parser = FaceParser(graph, sharding.fetch(params, mesh), dataset.classes, config.data.image_size)
        agreement = held_out_agreement(parser, dataset, config.evaluate.num_samples)
        return {"miou": agreement.miou, "pixel_accuracy": agreement.pixel_accuracy}

    job = loop.Job(
        mesh=mesh,
        initialize=lambda: TrainState.create(
            functools.partial(init_params, width=settings.width, num_classes=num_classes), optimizer, config.train.seed
        ),
        update=build_update(augment, loss, optimizer, settings.ema_decay),
        held_out=held_out,
        iterator=dataset.train_batches(settings.batch_size, config.train.seed, loop.local_share(mesh)),
        batch_size=settings.batch_size,
        num_steps=settings.num_steps,
        log_every_steps=config.train.log_every_steps,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        keep_checkpoints=1,
        max_skipped_steps=config.train.max_skipped_steps,
    )
    state = loop.run_job(job, run.parser_training)
    return FaceParser(graph, sharding.fetch(state.ema, mesh), dataset.classes, config.data.image_size)


def held_out_agreement(parser: FaceParser, dataset: DataSet, limit: int) -> mask_agreement.MaskAgreement:
    """Returns the agreement of the predicted masks of test images with their masks.

    Args:
      parser: to measure.
      dataset: whose test split is read.
      limit: number of test images.
    """
    confusion = np.zeros((len(dataset.classes),) * 2, np.int64)
    for batch in dataset.eval_batches("test", 32, limit=limit):
        predicted = parser.predict(batch["image"])
        confusion += mask_agreement.confusion_matrices(predicted, batch["mask"], dataset.classes).sum(axis=0)
    return mask_agreement.agreement_from_confusion(confusion, dataset.classes)


def class_frequencies(dataset: DataSet) -> Float[np.ndarray, " K"]:
    """Returns the fraction of the pixels of each class in masks of the training split, float32, at least 1e-6."""
    counts = np.zeros(256, np.int64)
    for mask in dataset.training_masks(_MASKS_COUNTED):
        counts += np.bincount(mask.ravel(), minlength=256)
    counts = counts[: len(dataset.classes)]
    return np.maximum(counts / max(counts.sum(), 1), 1e-6).astype(np.float32)


def balanced_cross_entropy(
    logits: Float[Array, "B H W K"],
    mask: UInt8[Array | np.ndarray, "B H W"],
    frequencies: Float[Array | np.ndarray, " K"],
) -> Float[Array, ""]:
    """Returns the cross-entropy in nats, weighted by the frequencies of the classes as described at `_WEIGHT_POWER`.

    Args:
      logits: of the network.
      mask: class indices. Pixels with the ignored label, the only label outside the range of class indices, have weight
        zero.
      frequencies: of the classes, in (0, 1].
    """
    num_classes = logits.shape[-1]
    adjusted = logits - _LOGIT_ADJUSTMENT * jnp.log(frequencies)[None, None, None, :]
    label = jnp.minimum(mask, num_classes - 1).astype(jnp.int32)
    nll = optax.softmax_cross_entropy_with_integer_labels(adjusted, label)
    weights = jnp.where(mask < num_classes, jnp.asarray(frequencies**_WEIGHT_POWER)[label], 0.0)
    return jnp.sum(weights * nll) / jnp.maximum(jnp.sum(weights), 1.0)


def augment(batch: Batch, key: Key[Array, ""]) -> Examples:
    """Returns a batch with images, float32 and nominally in [-1, 1], under random transforms.

    Image and mask are zoomed, rotated and shifted, and the image's border is repeated outside of it. Contrast,
    brightness, colours and noise of the image change, which prepares for generated images.

    Args:
      batch: "image", uint8 (B, H, W, 3), and "mask", uint8 (B, H, W).
      key: randomness of the transforms.
    """
    warp_key, contrast_key, shift_key, level_key, noise_key = jax.random.split(key, 5)
    image, mask = _warp(warp_key, from_uint8(batch["image"]), batch["mask"])
    size, dtype = image.shape[0], image.dtype
    contrast = jnp.exp(jax.random.uniform(contrast_key, (size, 1, 1, 1), dtype, minval=-0.3, maxval=0.3))
    shift = jax.random.uniform(shift_key, (size, 1, 1, 3), dtype, minval=-0.15, maxval=0.15)
    noise_level = jax.random.uniform(level_key, (size, 1, 1, 1), dtype, maxval=0.1)
    noise = noise_level * jax.random.normal(noise_key, image.shape, dtype)
    return {"image": contrast * image + shift + noise, "mask": mask}


def _warp(
    key: Key[Array, ""], image: Float[Array, "B H W 3"], mask: UInt8[Array, "B H W"]
) -> tuple[Float[Array, "B H W 3"], UInt8[Array, "B H W"]]:
    zoom_key, angle_key, shift_key = jax.random.split(key, 3)
    (batch, height, width, _), dtype = image.shape, image.dtype
    zoom = jnp.exp(jax.random.uniform(zoom_key, (batch,), dtype, minval=-_LOG_ZOOM, maxval=_LOG_ZOOM))
    angle = jax.random.uniform(angle_key, (batch,), dtype, minval=-_ANGLE, maxval=_ANGLE)
    shift = jax.random.uniform(shift_key, (batch, 2), dtype, minval=-_SHIFT, maxval=_SHIFT)
    # Positions of the pixels relative to the centre, in pixels.
    y, x = jnp.meshgrid(
        *(jnp.arange(length, dtype=dtype) - (length - 1) / 2 for length in (height, width)), indexing="ij", sparse=True
    )

    def warp_one(
        image: Float[Array, "H W 3"],
        mask: UInt8[Array, "H W"],
        zoom: Float[Array, ""],
        angle: Float[Array, ""],
        shift: Float[Array, " 2"],
    ) -> tuple[Float[Array, "H W 3"], UInt8[Array, "H W"]]:
        sin, cos = zoom * jnp.sin(angle), zoom * jnp.cos(angle)
        rows = jnp.clip(cos * y + sin * x + (height - 1) / 2 + shift[0] * height, 0, height - 1)
        columns = jnp.clip(cos * x - sin * y + (width - 1) / 2 + shift[1] * width, 0, width - 1)
        top, left = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
        bottom, right = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
        down, along = (rows - top)[..., None], (columns - left)[..., None]
        upper = image[top, left] * (1 - along) + image[top, right] * along
        lower = image[bottom, left] * (1 - along) + image[bottom, right] * along
        nearest = mask[jnp.round(rows).astype(jnp.int32), jnp.round(columns).astype(jnp.int32)]
        return upper * (1 - down) + lower * down, nearest

    return jax.vmap(warp_one)(image, mask, zoom, angle, shift)
