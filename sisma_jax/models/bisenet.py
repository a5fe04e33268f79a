"""BiSeNet (Yu et al., arXiv 1808.00897) as in the public face parser face-parsing.PyTorch, with its weights.

The network has a ResNet-18 and two heads of attention on its coarse features. Modules have the names of the original,
and batch normalisation is folded into the convolutions. Of the three outputs, inference uses the first.
"""

from collections.abc import Callable, Mapping

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


Take = Callable[[str, str, int], _Conv]
"""Returns a convolution: (its name, the name of its batch normalisation or "", its stride) -> convolution."""


class _ConvReLU(nnx.Module):
    def __init__(self, take: Take, name: str):
        self.conv = take(f"{name}.conv", f"{name}.bn", 1)

    def __call__(self, x: Features) -> Features:
        return jax.nn.relu(self.conv(x))


class _BasicBlock(nnx.Module):
    """A block of ResNet-18 (He et al., arXiv 1512.03385)."""

    def __init__(self, take: Take, name: str, stride: int):
        self.conv1 = take(f"{name}.conv1", f"{name}.bn1", stride)
        self.conv2 = take(f"{name}.conv2", f"{name}.bn2", 1)
        self.downsample = None if stride == 1 else take(f"{name}.downsample.0", f"{name}.downsample.1", stride)

    def __call__(self, x: Features) -> Features:
        shortcut = x if self.downsample is None else self.downsample(x)
        return jax.nn.relu(shortcut + self.conv2(jax.nn.relu(self.conv1(x))))


class _Stage(nnx.Module):
    def __init__(self, take: Take, name: str, stride: int):
        self.first = _BasicBlock(take, f"{name}.0", stride)
        self.second = _BasicBlock(take, f"{name}.1", 1)

    def __call__(self, x: Features) -> Features:
        return self.second(self.first(x))


class _ResNet(nnx.Module):
    def __init__(self, take: Take, name: str):
        self.conv1 = take(f"{name}.conv1", f"{name}.bn1", 2)
        self.layer1 = _Stage(take, f"{name}.layer1", 1)
        self.layer2 = _Stage(take, f"{name}.layer2", 2)
        self.layer3 = _Stage(take, f"{name}.layer3", 2)
        self.layer4 = _Stage(take, f"{name}.layer4", 2)

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

    def __init__(self, take: Take, name: str):
        self.conv = _ConvReLU(take, f"{name}.conv")
        self.conv_atten = take(f"{name}.conv_atten", f"{name}.bn_atten", 1)

    def __call__(self, x: Features) -> Features:
        x = self.conv(x)
        return x * jax.nn.sigmoid(self.conv_atten(x.mean(axis=(1, 2), keepdims=True)))


class _ContextPath(nnx.Module):
    def __init__(self, take: Take, name: str):
        self.resnet = _ResNet(take, f"{name}.resnet")
        self.arm16 = _Refinement(take, f"{name}.arm16")
        self.arm32 = _Refinement(take, f"{name}.arm32")
        self.conv_head32 = _ConvReLU(take, f"{name}.conv_head32")
        self.conv_head16 = _ConvReLU(take, f"{name}.conv_head16")
        self.conv_avg = _ConvReLU(take, f"{name}.conv_avg")

    def __call__(self, x: Features) -> tuple[Features, Features]:
        at_8, at_16, at_32 = self.resnet(x)
        mean = self.conv_avg(at_32.mean(axis=(1, 2), keepdims=True))
        coarse = self.conv_head32(_nearest(self.arm32(at_32) + mean, at_16))
        return at_8, self.conv_head16(_nearest(self.arm16(at_16) + coarse, at_8))


class _Fusion(nnx.Module):
    def __init__(self, take: Take, name: str):
        self.convblk = _ConvReLU(take, f"{name}.convblk")
        self.conv1 = take(f"{name}.conv1", "", 1)
        self.conv2 = take(f"{name}.conv2", "", 1)

    def __call__(self, fine: Features, context: Features) -> Features:
        x = self.convblk(jnp.concatenate([fine, context], axis=-1))
        hidden = jax.nn.relu(self.conv1(x.mean(axis=(1, 2), keepdims=True)))
        return x + x * jax.nn.sigmoid(self.conv2(hidden))


class _Output(nnx.Module):
    def __init__(self, take: Take, name: str):
        self.conv = _ConvReLU(take, f"{name}.conv")
        self.conv_out = take(f"{name}.conv_out", "", 1)

    def __call__(self, x: Features) -> Features:
        return self.conv_out(self.conv(x))


class BiSeNet(nnx.Module):
    """Maps images to class logits.

    Args:
      take: returns the convolutions by name.
    """

    def __init__(self, take: Take):
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

    Args:
      weights: the state dict of the original, for the classes of face-parsing.PyTorch.
      classes: a class set with the names of these classes.
      source: where the weights come from, for the error message.

    Raises:
      InputError: a weight is missing or has another shape, a value is not finite, or `classes` has other names.
    """
    table = CLASSES.table_to(classes)
    if table is None or len(classes) != len(CLASSES):
        raise InputError(
            f"{source} predicts the classes of {CLASSES.title}, and those of {classes.title} are not the same; give a "
            "face parser that was trained for them."
        )

    def get(name: str) -> np.ndarray:
        if name not in weights:
            raise InputError(
                f"{source} has no {name}, so it does not hold the weights of face-parsing.PyTorch; download its file "
                "79999_iter.pth from https://github.com/zllrunning/face-parsing.PyTorch."
            )
        array = np.asarray(weights[name], np.float64)
        if not np.isfinite(array).all():
            raise InputError(f"{source} cannot be used: {name} is not finite.")
        return array

    def take(name: str, norm: str, stride: int) -> _Conv:
        kernel, bias = get(f"{name}.weight").transpose(2, 3, 1, 0), None
        if norm:
            scale = get(f"{norm}.weight") / np.sqrt(get(f"{norm}.running_var") + _NORM_EPSILON)
            kernel, bias = kernel * scale, get(f"{norm}.bias") - get(f"{norm}.running_mean") * scale
        if name == "conv_out.conv_out":
            if kernel.shape[-1] != len(CLASSES):
                raise InputError(f"{source} predicts {kernel.shape[-1]} classes; wanted are {len(CLASSES)}.")
            kernel = kernel[..., np.argsort(table[: len(CLASSES)])]
        as_float32 = jnp.asarray(kernel, jnp.float32)
        return _Conv(as_float32, None if bias is None else jnp.asarray(bias, jnp.float32), stride)

    try:
        network = BiSeNet(take)
        nnx.eval_shape(lambda: network(jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)))
    except (TypeError, ValueError) as error:  # shapes that do not fit together
        if isinstance(error, InputError):
            raise
        first_line = str(error).partition("\n")[0]
        raise InputError(f"{source} has weights of other shapes than face-parsing.PyTorch ({first_line}).") from error
    return network
