"""A small U-Net (Ronneberger et al., arXiv 1505.04597) that predicts the mask of an image.

The evaluation trains it on real pairs of the run's data set, because the package contains no public face parser. The
network is small, so its scores are comparable only within one evaluation; see `mask_agreement`.
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
"""Nested dictionaries of float32 arrays, without Flax types."""

# Linear maps convert between patches of 4x4 pixels and the features of the convolutions. Measured at 64 px, a finer
# first level costs more and does not segment thin parts better in the same time. At 64 px the innermost feature map is
# 4x4, so the label of every pixel can depend on the complete face, which is necessary to distinguish left from right.
_PATCH_SIZE = 4
_NUM_HALVINGS = 2
_STRIDE = _PATCH_SIZE * 2**_NUM_HALVINGS

# Brows, eyes and lips together cover about 3% of the pixels. Class weights of 1 / sqrt(frequency) make them learnable,
# but with these weights alone the network predicts them too often. The loss therefore also subtracts a part of the log
# frequency from the logits (Menon et al., arXiv 2007.07314). This increases the mIoU on held-out real faces at 64 px by
# 0.03.
_WEIGHT_POWER = -0.5
_LOGIT_ADJUSTMENT = 0.25

_BATCH_SIZE = 16
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 50


class _ResidualBlock(nnx.Module):
    """Computes x + Conv(SiLU(Conv(LN(x)))) with 3x3 convolutions and normalisation over the channels."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, channels, channels, (3, 3), param_dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.LayerNorm(channels, param_dtype=jnp.float32, rngs=rngs)
        self.conv_in = conv()
        self.conv_out = conv(kernel_init=nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + self.conv_out(jax.nn.silu(self.conv_in(self.norm(x))))


class _Level(nnx.Module):
    """One level of the U: a block, the coarser levels, and a block that merges the results of both."""

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
    """Maps images of any size to class logits; fully convolutional.

    Args:
      width: channels of the first level, whose resolution is a quarter of the image's.
      num_classes: number of classes K.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, width: int, num_classes: int, *, rngs: nnx.Rngs):
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
          image: float32 in [-1, 1]. If a side is not a multiple of 16, the last row or column is repeated as padding,
            and the logits are cropped.
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
    """Returns the images with random contrast, brightness, colours and noise, which prepares for generated images.

    The augmentation is photometric only, so the masks remain valid.
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
    """Returns the cross-entropy, weighted by the frequencies of the classes as described at `_WEIGHT_POWER`.

    Pixels with the ignored label, the only label outside the range of class indices, have weight zero.
    """
    num_classes = frequencies.shape[0]
    adjustment = _LOGIT_ADJUSTMENT * jnp.log(frequencies)
    logits = _apply(params, image) - adjustment[None, None, None, :]
    label = jnp.minimum(mask, num_classes - 1).astype(jnp.int32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    weights = jnp.where(mask < num_classes, (frequencies**_WEIGHT_POWER)[label], 0.0)
    return jnp.sum(weights * nll) / jnp.maximum(jnp.sum(weights), 1.0)


# `_update` applies the learning rate, which is an argument, so that one compiled step works with any schedule.
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
      params: parameters of the network, nested dictionaries of float32 arrays.
      classes: the classes that it predicts.
    """

    params: Params
    classes: ClassSet

    def predict(self, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
        """Returns the predicted mask of each image, uint8 class indices (N, H, W).

        Args:
          images: uint8 (N, H, W, 3), RGB.
          batch_size: images per call of the compiled network. The last batch is padded, so that only one shape is
            compiled.

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
    """Returns a segmenter that is trained on the training split of a data set.

    The optimizer is Adam with warm-up and a cosine decay to zero at the last step. The class frequencies, which weight
    the loss, are counted during training, without ignored pixels.

    Args:
      dataset: pairs of real images and masks.
      steps: number of training steps.
      width: channels of the first level; each of the two coarser levels has twice as many as the level before.
      seed: seed of the initial parameters, the order of the examples and the augmentation.
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
            np.asarray(schedule(step), np.float32),
        )
        if step % 20 == 0 and not progress.disable:
            progress.set_postfix(loss=f"{float(loss):.3f}")
    return Segmenter(params, dataset.classes)


def save(segmenter: Segmenter, path: str | os.PathLike[str]) -> None:
    """Writes a segmenter as one safetensors file, atomically.

    Args:
      segmenter: the trained segmenter.
      path: of the file, on the disk or in a bucket.

    Raises:
      OSError: the file cannot be written.
    """
    arrays = {name: np.asarray(array) for name, array in flat_trees.flatten(segmenter.params).items()}
    metadata = {"classes": segmenter.classes.fingerprint, "crc32": str(_crc32(arrays))}
    write_atomically(path, safetensors.numpy.save(arrays, metadata))


def load(path: str | os.PathLike[str], classes: ClassSet) -> Segmenter:
    """Returns the segmenter that `save` has written.

    Args:
      path: of the file, on the disk or in a bucket.
      classes: the classes that the segmenter must predict.

    Raises:
      InputError: the file does not exist, is damaged, or contains another network or a segmenter of other classes.
    """
    path = to_path(path)
    try:
        with on_disk(path) as file, safetensors.safe_open(file, framework="numpy") as content:
            metadata = content.metadata() or {}
            arrays = {name: content.get_tensor(name) for name in content.keys()}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; train the segmenter first.") from error
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged or not a segmenter ({error}); delete it to train a new one.") from error
    if metadata.get("crc32") != str(_crc32(arrays)):
        raise InputError(f"{path} is damaged or not a segmenter (wrong checksum); delete it to train a new one.")
    width = max(1, np.size(arrays.get("norm.bias", ())))
    shapes = jax.eval_shape(functools.partial(_init_params, width=width, num_classes=len(classes)), jax.random.key(0))
    is_same_network = flat_trees.forms(arrays) == flat_trees.forms(flat_trees.flatten_abstract(shapes))
    if metadata.get("classes") != classes.fingerprint or not is_same_network:
        raise InputError(
            f"{path} does not contain a segmenter of the classes of {classes.title}; delete it to train a new one."
        )
    return Segmenter(flat_trees.unflatten(shapes, arrays), classes)


def _crc32(arrays: dict[str, np.ndarray]) -> int:
    checksum = 0
    for _, array in sorted(arrays.items()):
        checksum = zlib.crc32(array.tobytes(), checksum)
    return checksum
