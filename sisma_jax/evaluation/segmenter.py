"""A small U-Net (Ronneberger et al., arXiv 1505.04597) that reads a mask back from an image.

The evaluation trains it on real pairs of the data set that is being painted, because no public face parser
comes with the package. It is small, so what it measures is comparable only within one run: see `mask_agreement`.
"""

import functools
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from sisma_jax.data import labels
from sisma_jax.errors import InputError
from sisma_jax.files import bucket_errors, to_path, write_atomically
from sisma_jax.models.patches import depth_to_space, space_to_depth

Params = dict[str, Any]

# Patches of 4x4 pixels enter and leave by linear maps and the convolutions work on what lies between: measured at
# 64 px, a finer first level costs more and reads thin parts no better in the same time. At 64 px the innermost
# feature map is 4x4, so every pixel's label may depend on the whole face (left and right need that).
_PATCH_SIZE = 4
_NUM_HALVINGS = 2
_STRIDE = _PATCH_SIZE * 2**_NUM_HALVINGS

# Brows, eyes and lips together cover about three pixels in a hundred. Weights of 1 / sqrt(frequency) let them be
# learned. A network trained so names them too often, therefore the loss also takes part of the log frequency from the
# logits (Menon et al., arXiv 2007.07314), which adds 0.03 to the mIoU on held-out faces of CelebAMask-HQ at 64 px.
_WEIGHT_POWER = -0.5
_LOGIT_ADJUSTMENT = 0.25

# What NumPy, zipfile and the checks of `load` raise for a truncated, overwritten or foreign file.
_UNREADABLE = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class _ResidualBlock(nnx.Module):
    """x + Conv(SiLU(Conv(LN(x)))), 3x3, with the normalisation over channels."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(channels, rngs=rngs)
        self.conv_in = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
        self.conv_out = nnx.Conv(channels, channels, (3, 3), kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + self.conv_out(jax.nn.silu(self.conv_in(self.norm(x))))


class _Level(nnx.Module):
    """One scale of the U: a block, then everything coarser and a block that joins the two."""

    def __init__(self, channels: int, num_halvings: int, *, rngs: nnx.Rngs):
        self.block_in = _ResidualBlock(channels, rngs=rngs)
        self.is_innermost = num_halvings == 0
        if not self.is_innermost:
            self.down = nnx.Linear(4 * channels, 2 * channels, rngs=rngs)
            self.coarser = _Level(2 * channels, num_halvings - 1, rngs=rngs)
            self.up = nnx.Linear(2 * channels, 4 * channels, rngs=rngs)
            self.block_out = _ResidualBlock(channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = self.block_in(x)
        if self.is_innermost:
            return x
        coarse = self.up(self.coarser(self.down(space_to_depth(x, 2))))
        return self.block_out(x + depth_to_space(coarse, 2))


class Segmenter(nnx.Module):
    """Fully convolutional: image to class logits, at any image size."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        """Args: width: channels of the first level, which works at a quarter of the image's resolution."""
        self.stem = nnx.Linear(_PATCH_SIZE**2 * 3, width, rngs=rngs)
        self.levels = _Level(width, _NUM_HALVINGS, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, _PATCH_SIZE**2 * labels.NUM_CLASSES, rngs=rngs)

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B H W K"]:
        """Returns the logits of each pixel's class.

        Args:
          image: float32 in [-1, 1]. Sides that are no multiple of 16 are continued by their last row or column
            and the logits are cut back.
        """
        _, height, width, _ = image.shape
        padded = jnp.pad(image, ((0, 0), (0, -height % _STRIDE), (0, -width % _STRIDE), (0, 0)), mode="edge")
        x = self.levels(self.stem(space_to_depth(padded, _PATCH_SIZE)))
        return depth_to_space(self.head(self.norm(x)), _PATCH_SIZE)[:, :height, :width]


@functools.partial(jax.jit, static_argnames="width")
def _initial_params(key: Key[Array, ""], width: int) -> Params:
    return nnx.to_pure_dict(nnx.state(Segmenter(width, rngs=nnx.Rngs(key)), nnx.Param))


def _abstract_params(width: int) -> Params:
    return jax.eval_shape(functools.partial(_initial_params, width=width), jax.random.key(0))


def _apply(params: Params, image: Float[Array, "B H W 3"]) -> Float[Array, "B H W K"]:
    width = params["stem"]["kernel"].shape[-1]
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Segmenter(width, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, params)(image)


def _normalize(image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    return image.astype(jnp.float32) / 127.5 - 1.0


def _augment(key: Key[Array, ""], image: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Changes brightness, colours and contrast, and adds noise, so that painted images, too, can be read.

    Photometric only: the mask stays that of the image.
    """
    contrast_key, shift_key, level_key, noise_key = jax.random.split(key, 4)
    batch = image.shape[0]
    contrast = jnp.exp(jax.random.uniform(contrast_key, (batch, 1, 1, 1), minval=-0.3, maxval=0.3))
    shift = jax.random.uniform(shift_key, (batch, 1, 1, 3), minval=-0.15, maxval=0.15)
    noise_level = jax.random.uniform(level_key, (batch, 1, 1, 1), maxval=0.1)
    return contrast * image + shift + noise_level * jax.random.normal(noise_key, image.shape)


def _loss(
    params: Params,
    image: Float[Array, "B H W 3"],
    mask: UInt8[Array, "B H W"],
    frequencies: Float[Array, " K"],
) -> Float[Array, ""]:
    """Cross-entropy with the balance between frequent and rare classes described at `_WEIGHT_POWER`."""
    adjustment = _LOGIT_ADJUSTMENT * jnp.log(frequencies)
    logits = _apply(params, image) - adjustment[None, None, None, :]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, mask.astype(jnp.int32))
    weights = (frequencies**_WEIGHT_POWER)[mask]
    return jnp.sum(weights * nll) / jnp.sum(weights)


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


def train_segmenter(
    batches: Iterator[dict[str, np.ndarray]],
    *,
    num_steps: int,
    width: int,
    key: Key[Array, ""],
    learning_rate: float = 2e-3,
) -> Params:
    """Returns the parameters of a segmenter trained on real pairs.

    Frequencies of the classes, which balance the loss, are counted on the way.

    Args:
      batches: yields {"image": uint8 (B, H, W, 3), "mask": uint8 (B, H, W)}, always of one shape; `num_steps` of them
        are drawn.
      num_steps: optimiser steps; Adam with warm-up, and a cosine decay to zero at the last step.
      width: channels of the first level.
      key: decides the initial parameters and the augmentation.
      learning_rate: peak of the schedule.

    Returns:
      A dict of dicts of float32 arrays, which `predict` and `save` take.
    """
    init_key, augment_key = jax.random.split(key)
    params = _initial_params(init_key, width=width)
    opt_state = _OPTIMIZER.init(params)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(50, num_steps // 10), num_steps)
    counts = np.zeros(labels.NUM_CLASSES, np.int64)
    progress = tqdm(range(num_steps), desc="segmenter", unit="step", disable=None)
    for step in progress:
        batch = next(batches)
        counts += np.bincount(batch["mask"].ravel(), minlength=labels.NUM_CLASSES)
        frequencies = (np.maximum(counts, 1) / counts.sum()).astype(np.float32)
        params, opt_state, loss = _update(
            params,
            opt_state,
            jax.random.fold_in(augment_key, step),
            batch["image"],
            batch["mask"],
            frequencies,
            schedule(step),
        )
        if step % 20 == 0 and not progress.disable:
            progress.set_postfix(loss=f"{float(loss):.3f}")
    return params


@jax.jit
def _predict_batch(params: Params, image: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W"]:
    return jnp.argmax(_apply(params, _normalize(image)), axis=-1).astype(jnp.uint8)


def predict(params: Params, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
    """Returns the mask that the segmenter reads in each image: uint8 (N, H, W).

    Args:
      params: what `train_segmenter` or `load` returned.
      images: uint8 (N, H, W, 3).
      batch_size: images that one call of the jit-ed network reads; the last batch is filled up, so one shape compiles.

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
        masks[start : start + len(chunk)] = np.asarray(_predict_batch(params, filled))[: len(chunk)]
    return masks


def save(params: Params, path: str | os.PathLike) -> None:
    """Writes the parameters as one .npz file; a reader sees the whole file or none."""
    buffer = io.BytesIO()
    np.savez(buffer, **flatten_dict(params, sep="/"))
    write_atomically(path, buffer.getvalue())


def load(path: str | os.PathLike) -> Params:
    """Reads what `save` wrote.

    Raises:
      InputError: the file is missing, damaged, or holds another network's parameters.
    """
    path = to_path(path)
    try:
        with bucket_errors(path):
            content = path.read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            damaged = file.zip.testzip()  # NumPy itself does not look at the checksums.
            if damaged is not None:
                raise ValueError(f"wrong checksum of {damaged}")
            arrays = {name: file[name] for name in file.files}
        expected = flatten_dict(_abstract_params(arrays["stem/kernel"].shape[-1]), sep="/")
        if jax.eval_shape(lambda: arrays) != expected:
            raise ValueError("other arrays than this network's")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path} is damaged or not a segmenter's parameters ({error}); delete it to train anew."
        ) from error
    return unflatten_dict(arrays, sep="/")
