"""BiSeNet (Yu et al., arXiv 1808.00897) as in the public face parser face-parsing.PyTorch, with its weights.

The network has a ResNet-18 and two heads of attention on its coarse features. Modules have the names of the original,
and batch normalisation is folded into the convolutions. Of the three outputs, inference uses the first.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.data.classes import ClassSet
from sisma_jax.errors import InputError

Features = Float[Array, "B _ _ _"]
Weights = Mapping[str, np.ndarray]

CLASSES = ClassSet.load("face_parsing_pytorch")
"""The classes of the public weights."""
IMAGE_SIZE = 512
"""Side in pixels of the images for which they were trained."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values in [0, 1]
_NORM_EPSILON = 1e-5  # PyTorch's default
_HEAD = "conv_out.conv_out.weight"
# The outputs that only training uses, and counters of batch normalisation.
_UNUSED = re.compile(r"conv_out(16|32)\..*|.*\.num_batches_tracked")
_OBTAIN = "download 79999_iter.pth, to which https://github.com/zllrunning/face-parsing.PyTorch links"


class _Conv(nnx.Module):
    """A convolution with "same" padding of an odd kernel, in PyTorch's sense: a stride keeps the first position."""

    def __init__(self, kernel: jax.Array, bias: jax.Array | None, stride: int = 1):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)
        self.stride = stride

    def __call__(self, x: Features) -> Features:
        kernel = self.kernel[...]
        half = kernel.shape[0] // 2
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,) * 2, ((half, half),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if self.bias is None else y + self.bias[...][None, None, None]


class Convolutions:
    """Makes the convolutions of the network from the weights of the original, and checks every weight.

    Args:
      weights: the state dict of the original.
      source: where the weights come from, for error messages.
    """

    def __init__(self, weights: Weights, source: str):
        self._weights = weights
        self._source = source
        self.unread = {name for name in weights if not _UNUSED.fullmatch(name)}

    def __call__(
        self, name: str, channels_in: int, channels_out: int, size: int = 1, *, norm: str = "", stride: int = 1
    ) -> _Conv:
        """Returns a convolution with a square kernel.

        Args:
          name: of the convolution in the original.
          channels_in: number of channels of its input.
          channels_out: number of channels of its output.
          size: side of the kernel.
          norm: name of the batch normalisation that is folded into it; "" if none follows.
          stride: distance of neighbouring output positions, in input positions.

        Raises:
          InputError: a weight is missing, has another shape or is not finite, or a variance is negative.
        """
        kernel = self._get(f"{name}.weight", channels_out, channels_in, size, size).transpose(2, 3, 1, 0)
        if not norm:
            return _Conv(jnp.asarray(kernel, jnp.float32), None, stride)
        scale, shift, mean, variance = (
            self._get(f"{norm}.{part}", channels_out) for part in ("weight", "bias", "running_mean", "running_var")
        )
        if variance.min() < 0:
            raise InputError(f"{self._source} cannot be used: {norm}.running_var is negative; {_OBTAIN}.")
        scale = scale / np.sqrt(variance + _NORM_EPSILON)
        bias = shift - mean * scale
        return _Conv(jnp.asarray(kernel * scale, jnp.float32), jnp.asarray(bias, jnp.float32), stride)

    def _get(self, name: str, *shape: int) -> np.ndarray:
        """Returns a weight in double precision, in which batch normalisation is folded."""
        if name not in self._weights:
            raise InputError(f"{self._source} has no {name}, so it does not hold face-parsing.PyTorch; {_OBTAIN}.")
        self.unread.discard(name)
        array = np.asarray(self._weights[name], np.float64)
        if array.shape != shape:
            raise InputError(f"{self._source}: {name} has the shape {array.shape}, want {shape}; {_OBTAIN}.")
        if not np.isfinite(array).all():
            raise InputError(f"{self._source} cannot be used: {name} is not finite; {_OBTAIN}.")
        return array


class _ConvReLU(nnx.Module):
    def __init__(self, take: Convolutions, name: str, channels_in: int, channels_out: int, size: int = 3):
        self.conv = take(f"{name}.conv", channels_in, channels_out, size, norm=f"{name}.bn")

    def __call__(self, x: Features) -> Features:
        return jax.nn.relu(self.conv(x))


class _BasicBlock(nnx.Module):
    """A block of ResNet-18 (He et al., arXiv 1512.03385)."""

    def __init__(self, take: Convolutions, name: str, channels_in: int, channels: int, stride: int):
        self.conv1 = take(f"{name}.conv1", channels_in, channels, 3, norm=f"{name}.bn1", stride=stride)
        self.conv2 = take(f"{name}.conv2", channels, channels, 3, norm=f"{name}.bn2")
        down, is_same = f"{name}.downsample", stride == 1
        self.downsample = None if is_same else take(f"{down}.0", channels_in, channels, norm=f"{down}.1", stride=stride)

    def __call__(self, x: Features) -> Features:
        shortcut = x if self.downsample is None else self.downsample(x)
        return jax.nn.relu(shortcut + self.conv2(jax.nn.relu(self.conv1(x))))


class _Stage(nnx.Module):
    def __init__(self, take: Convolutions, name: str, channels_in: int, channels: int, stride: int):
        self.first = _BasicBlock(take, f"{name}.0", channels_in, channels, stride)
        self.second = _BasicBlock(take, f"{name}.1", channels, channels, 1)

    def __call__(self, x: Features) -> Features:
        return self.second(self.first(x))


class _ResNet(nnx.Module):
    def __init__(self, take: Convolutions, name: str):
        self.conv1 = take(f"{name}.conv1", 3, 64, 7, norm=f"{name}.bn1", stride=2)
        self.layer1 = _Stage(take, f"{name}.layer1", 64, 64, 1)
        self.layer2 = _Stage(take, f"{name}.layer2", 64, 128, 2)
        self.layer3 = _Stage(take, f"{name}.layer3", 128, 256, 2)
        self.layer4 = _Stage(take, f"{name}.layer4", 256, 512, 2)

    def __call__(self, x: Features) -> tuple[Features, Features, Features]:
        """Returns the features at 1/8, 1/16 and 1/32 of the resolution."""
        x = jax.nn.relu(self.conv1(x))
        padding = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
        at_8 = self.layer2(self.layer1(x))
        at_16 = self.layer3(at_8)
        return at_8, at_16, self.layer4(at_16)


class _Refinement(nnx.Module):
    """Scales features by attention over channels."""

    def __init__(self, take: Convolutions, name: str, channels_in: int):
        self.conv = _ConvReLU(take, f"{name}.conv", channels_in, 128)
        self.conv_atten = take(f"{name}.conv_atten", 128, 128, norm=f"{name}.bn_atten")

    def __call__(self, x: Features) -> Features:
        x = self.conv(x)
        return x * jax.nn.sigmoid(self.conv_atten(x.mean(axis=(1, 2), keepdims=True)))


class _ContextPath(nnx.Module):
    def __init__(self, take: Convolutions, name: str):
        self.resnet = _ResNet(take, f"{name}.resnet")
        self.arm16 = _Refinement(take, f"{name}.arm16", 256)
        self.arm32 = _Refinement(take, f"{name}.arm32", 512)
        self.conv_head32 = _ConvReLU(take, f"{name}.conv_head32", 128, 128)
        self.conv_head16 = _ConvReLU(take, f"{name}.conv_head16", 128, 128)
        self.conv_avg = _ConvReLU(take, f"{name}.conv_avg", 512, 128, size=1)

    def __call__(self, x: Features) -> tuple[Features, Features]:
        at_8, at_16, at_32 = self.resnet(x)
        mean = self.conv_avg(at_32.mean(axis=(1, 2), keepdims=True))
        coarse = self.conv_head32(_nearest(self.arm32(at_32) + mean, at_16))
        return at_8, self.conv_head16(_nearest(self.arm16(at_16) + coarse, at_8))


class _Fusion(nnx.Module):
    def __init__(self, take: Convolutions, name: str):
        self.convblk = _ConvReLU(take, f"{name}.convblk", 256, 256, size=1)
        self.conv1 = take(f"{name}.conv1", 256, 64)
        self.conv2 = take(f"{name}.conv2", 64, 256)

    def __call__(self, fine: Features, context: Features) -> Features:
        x = self.convblk(jnp.concatenate([fine, context], axis=-1))
        hidden = jax.nn.relu(self.conv1(x.mean(axis=(1, 2), keepdims=True)))
        return x + x * jax.nn.sigmoid(self.conv2(hidden))


class _Output(nnx.Module):
    def __init__(self, take: Convolutions, name: str):
        self.conv = _ConvReLU(take, f"{name}.conv", 256, 256)
        self.conv_out = take(f"{name}.conv_out", 256, len(CLASSES))

    def __call__(self, x: Features) -> Features:
        return self.conv_out(self.conv(x))


class BiSeNet(nnx.Module):
    """Maps images to class logits.

    Args:
      take: makes the convolutions.
    """

    def __init__(self, take: Convolutions):
        self.cp = _ContextPath(take, "cp")
        self.ffm = _Fusion(take, "ffm")
        self.conv_out = _Output(take, "conv_out")

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B H W K"]:
        """Returns the logits of each pixel's class.

        Args:
          image: float32 in [-1, 1]; height and width are multiples of 32.
        """
        mean, std = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (_MEAN, _STD))
        fine, context = self.cp(((image + 1) / 2 - mean) / std)
        logits = self.conv_out(self.ffm(fine, context))
        rows, columns = (
            jnp.asarray(_interpolation(logits.shape[axis], image.shape[axis]), logits.dtype) for axis in (1, 2)
        )
        return jnp.einsum("hi,bijk,wj->bhwk", rows, logits, columns)


def _nearest(x: Features, target: Features) -> Features:
    """Returns x at the resolution of `target`, by nearest-neighbour sampling as in PyTorch."""
    rows, columns = (np.arange(target.shape[axis]) * x.shape[axis] // target.shape[axis] for axis in (1, 2))
    return x[:, rows][:, :, columns]


def _interpolation(size: int, new_size: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix of linear interpolation that maps the first and the last position to themselves."""
    position = np.arange(new_size) * ((size - 1) / max(new_size - 1, 1))
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size)[None]))


def from_weights(weights: Weights, classes: ClassSet, source: str) -> BiSeNet:
    """Returns the network with public weights, whose logits are in the order of `classes`.

    The outputs of the original that only training uses may be absent.

    Args:
      weights: the state dict of the original, for the classes of face-parsing.PyTorch.
      classes: a class set with the names of these classes.
      source: where the weights come from, for the error message.

    Raises:
      InputError: a weight is missing, unknown or of another shape, a value is not finite, a variance is negative, or
        `classes` has other names.
    """
    table = CLASSES.table_to(classes)
    if table is None or len(classes) != len(CLASSES):
        raise InputError(
            f"{source} predicts the classes of {CLASSES.title}, and those of {classes.title} are not the same; give a "
            "face parser that was trained for them."
        )
    head = np.shape(weights.get(_HEAD, ()))
    if len(head) == 4 and head[0] != len(CLASSES):
        raise InputError(f"{source} predicts {head[0]} classes; wanted are {len(CLASSES)}.")
    take = Convolutions(weights, source)
    network = BiSeNet(take)
    if take.unread:
        names = ", ".join(sorted(take.unread)[:3])
        raise InputError(f"{source} has weights that face-parsing.PyTorch does not, such as {names}; {_OBTAIN}.")
    kernel = network.conv_out.conv_out.kernel
    kernel[...] = kernel[...][..., np.argsort(table[: len(CLASSES)])]
    return network
