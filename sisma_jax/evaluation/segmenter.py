"""A small U-Net (Ronneberger et al., arXiv 1505.04597) that reads a mask back from an image.

The evaluation trains it on real pairs of the data set that is sampled, because no public face parser comes with the
package. It is small, so what it measures is comparable only within one run: see `mask_agreement`.
"""

import dataclasses
import functools
import os
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from sisma_jax.data.classes import ClassSet
from sisma_jax.data.dataset import DataSet
from sisma_jax.errors import InputError
from sisma_jax.files import on_disk, to_path, write_atomically
from sisma_jax.models.patches import depth_to_space, space_to_depth
from sisma_jax.runs import flat_trees

Params = dict[str, Any]

# Patches of 4x4 pixels enter and leave by linear maps and the convolutions work on what lies between: measured at
# 64 px, a finer first level costs more and reads thin parts no better in the same time. At 64 px the innermost
# feature map is 4x4, so every pixel's label may depend on the whole face (left and right need that).
_PATCH_SIZE = 4
_NUM_HALVINGS = 2
_STRIDE = _PATCH_SIZE * 2**_NUM_HALVINGS

# Brows, eyes and lips together cover about three pixels in a hundred. Weights of 1 / sqrt(frequency) let them be
# learned. A network trained so names them too often, therefore the loss also takes part of the log frequency from the
# logits (Menon et al., arXiv 2007.07314), which adds 0.03 to the mIoU on held-out real faces at 64 px.
_WEIGHT_POWER = -0.5
_LOGIT_ADJUSTMENT = 0.25

_BATCH_SIZE = 16
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 50


class _ResidualBlock(nnx.Module):
    """x + Conv(SiLU(Conv(LN(x)))), 3x3, with the normalisation over channels."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, channels, channels, (3, 3), param_dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.LayerNorm(channels, param_dtype=jnp.float32, rngs=rngs)
        self.conv_in = conv()
        self.conv_out = conv(kernel_init=nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + self.conv_out(jax.nn.silu(self.conv_in(self.norm(x))))


class _Level(nnx.Module):
    """One scale of the U: a block, then everything coarser and a block that joins the two."""

    def __init__(self, channels: int, coarser: nnx.Module, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, param_dtype=jnp.float32, rngs=rngs)
        self.block_in = _ResidualBlock(channels, rngs=rngs)
        self.down = linear(4 * channels, 2 * channels)
        self.coarser = coarser
        self.up = linear(2 * channels, 4 * channels)
        self.block_out = _ResidualBlock(channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = self.block_in(x)
        coarse = self.up(self.coarser(self.down(space_to_depth(x, 2))))
        return self.block_out(x + depth_to_space(coarse, 2))


class _Network(nnx.Module):
    """Fully convolutional: image to class logits, at any image size."""

    def __init__(self, width: int, num_classes: int, *, rngs: nnx.Rngs):
        """Args: width: channels of the first level, which works at a quarter of the image's resolution."""
        linear = functools.partial(nnx.Linear, param_dtype=jnp.float32, rngs=rngs)
        self.stem = linear(_PATCH_SIZE**2 * 3, width)
        levels = _ResidualBlock(width * 2**_NUM_HALVINGS, rngs=rngs)
        for halving in reversed(range(_NUM_HALVINGS)):
            levels = _Level(width * 2**halving, levels, rngs=rngs)
        self.levels = levels
        self.norm = nnx.LayerNorm(width, param_dtype=jnp.float32, rngs=rngs)
        self.head = linear(width, _PATCH_SIZE**2 * num_classes)

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B H W K"]:
        """Returns the logits of each pixel's class.

        Args:
          image: float32 in [-1, 1]. Sides that are not a multiple of 16 are padded with their last row or
            column, and the logits are cropped.
        """
        _, height, width, _ = image.shape
        padded = jnp.pad(image, ((0, 0), (0, -height % _STRIDE), (0, -width % _STRIDE), (0, 0)), mode="edge")
        x = self.levels(self.stem(space_to_depth(padded, _PATCH_SIZE)))
        return depth_to_space(self.head(self.norm(x)), _PATCH_SIZE)[:, :height, :width]


@functools.partial(jax.jit, static_argnames=("width", "num_classes"))
def _init_params(key: Key[Array, ""], width: int, num_classes: int) -> Params:
    return nnx.to_pure_dict(nnx.state(_Network(width, num_classes, rngs=nnx.Rngs(key)), nnx.Param))


def _apply(params: Params, image: Float[Array, "B H W 3"]) -> Float[Array, "B H W K"]:
    width, outputs = params["head"]["kernel"].shape
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: _Network(width, outputs // _PATCH_SIZE**2, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, params)(image)


def _normalize(image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    return image.astype(jnp.float32) / 127.5 - 1.0


def _augment(key: Key[Array, ""], image: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Changes brightness, colours and contrast, and adds noise, so that generated images, too, can be read.

    Photometric only: the mask stays that of the image.
    """
    contrast_key, shift_key, level_key, noise_key = jax.random.split(key, 4)
    batch, dtype = image.shape[0], image.dtype
    contrast = jnp.exp(jax.random.uniform(contrast_key, (batch, 1, 1, 1), dtype, minval=-0.3, maxval=0.3))
    shift = jax.random.uniform(shift_key, (batch, 1, 1, 3), dtype, minval=-0.15, maxval=0.15)
    noise_level = jax.random.uniform(level_key, (batch, 1, 1, 1), dtype, maxval=0.1)
    return contrast * image + shift + noise_level * jax.random.normal(noise_key, image.shape, dtype)


def _loss(
    params: Params,
    image: Float[Array, "B H W 3"],
    mask: UInt8[Array, "B H W"],
    frequencies: Float[Array, " K"],
) -> Float[Array, ""]:
    """Cross-entropy with the balance between frequent and rare classes described at `_WEIGHT_POWER`.

    Pixels of the ignored label, the only one outside the range of classes, have no weight.
    """
    num_classes = frequencies.shape[0]
    adjustment = _LOGIT_ADJUSTMENT * jnp.log(frequencies)
    logits = _apply(params, image) - adjustment[None, None, None, :]
    label = jnp.minimum(mask, num_classes - 1).astype(jnp.int32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    weights = jnp.where(mask < num_classes, (frequencies**_WEIGHT_POWER)[label], 0.0)
    return jnp.sum(weights * nll) / jnp.maximum(jnp.sum(weights), 1.0)


# The step size is applied by `_update`, as an array, so that one compiled step serves any schedule.
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@functools.partial(jax.jit, donate_argnames=("params", "opt_state"))
def _update(
    params: Params,
    opt_state: optax.OptState,
    key: Key[Array, ""],
    image: UInt8[Array, "B H W 3"],
    mask: UInt8[Array, "B H W"],
    frequencies: Float[Array, " K"],
    learning_rate: Float[Array, ""],
) -> tuple[Params, optax.OptState, Float[Array, ""]]:
    loss, grads = jax.value_and_grad(_loss)(params, _augment(key, _normalize(image)), mask, frequencies)
    updates, opt_state = _OPTIMIZER.update(grads, opt_state)
    params = jax.tree.map(lambda param, update: param - learning_rate * update, params, updates)
    return params, opt_state, loss


@jax.jit
def _predict_batch(params: Params, image: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W"]:
    return jnp.argmax(_apply(params, _normalize(image)), axis=-1).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A trained segmenter.

    Attributes:
      params: a dict of dicts of float32 arrays.
      classes: that it reads in images.
    """

    params: Params
    classes: ClassSet

    def predict(self, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
        """Returns the mask that the segmenter reads in each image: uint8 (N, H, W).

        Args:
          images: uint8 (N, H, W, 3).
          batch_size: images per call of the jitted network; the last batch is padded, so that one shape compiles.

        Raises:
          ValueError: `images` has another dtype or shape.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}.")
        masks = np.empty(images.shape[:3], np.uint8)
        batch_size = max(1, min(batch_size, len(images)))
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            filled = np.concatenate([chunk, np.zeros((batch_size - len(chunk), *images.shape[1:]), np.uint8)])
            masks[start : start + len(chunk)] = np.asarray(_predict_batch(self.params, filled))[: len(chunk)]
        return masks


def train(dataset: DataSet, *, steps: int, width: int, seed: int) -> Segmenter:
    """Returns a segmenter trained on the training split.

    Frequencies of the classes, which balance the loss, are counted on the way; ignored pixels do not count.

    Args:
      dataset: of real pairs.
      steps: optimiser steps; Adam with warm-up, and a cosine decay to zero at the last step.
      width: channels of the first level.
      seed: decides the initial parameters, the order of the examples and the augmentation.
    """
    num_classes = len(dataset.classes)
    init_key, augment_key = jax.random.split(jax.random.key(seed))
    params = _init_params(init_key, width=width, num_classes=num_classes)
    opt_state = _OPTIMIZER.init(params)
    schedule = optax.warmup_cosine_decay_schedule(0.0, _LEARNING_RATE, min(_WARMUP_STEPS, steps // 10), steps)
    counts = np.zeros(num_classes, np.int64)
    batches = dataset.train_batches(_BATCH_SIZE, seed)
    progress = tqdm(range(steps), desc="segmenter", unit="step", disable=None)
    for step in progress:
        batch = next(batches)
        counts += np.bincount(batch["mask"].ravel(), minlength=256)[:num_classes]
        frequencies = (np.maximum(counts, 1) / max(counts.sum(), 1)).astype(np.float32)
        params, opt_state, loss = _update(
            params,
            opt_state,
            jax.random.fold_in(augment_key, step),
            batch["image"],
            batch["mask"],
            frequencies,
            np.float32(schedule(step)),
        )
        if step % 20 == 0 and not progress.disable:
            progress.set_postfix(loss=f"{float(loss):.3f}")
    return Segmenter(params, dataset.classes)


def save(segmenter: Segmenter, path: str | os.PathLike) -> None:
    """Writes a segmenter as one safetensors file; a reader sees the whole file or none."""
    arrays = {name: np.asarray(array) for name, array in flat_trees.flatten(segmenter.params).items()}
    metadata = {"classes": segmenter.classes.fingerprint, "crc32": str(_crc32(arrays))}
    write_atomically(path, safetensors.numpy.save(arrays, metadata))


def load(path: str | os.PathLike, classes: ClassSet) -> Segmenter:
    """Reads what `save` wrote.

    Raises:
      InputError: the file is missing, damaged, or holds another network or other classes.
    """
    path = to_path(path)
    try:
        with on_disk(path) as file, safetensors.safe_open(file, framework="numpy") as content:
            metadata = content.metadata() or {}
            arrays = {name: content.get_tensor(name) for name in content.keys()}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged or no segmenter ({error}); delete it to train anew.") from error
    if metadata.get("crc32") != str(_crc32(arrays)):
        raise InputError(f"{path} is damaged or no segmenter (wrong checksum); delete it to train anew.")
    width = max(1, np.size(arrays.get("norm.bias", ())))
    shapes = jax.eval_shape(functools.partial(_init_params, width=width, num_classes=len(classes)), jax.random.key(0))
    is_same_network = flat_trees.forms(arrays) == flat_trees.forms(flat_trees.flatten_abstract(shapes))
    if metadata.get("classes") != classes.fingerprint or not is_same_network:
        raise InputError(f"{path} holds no segmenter of the classes of {classes.title}; delete it to train anew.")
    return Segmenter(flat_trees.unflatten(shapes, arrays), classes)


def _crc32(arrays: dict[str, np.ndarray]) -> int:
    checksum = 0
    for _, array in sorted(arrays.items()):
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum
