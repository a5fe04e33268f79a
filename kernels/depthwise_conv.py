"""Depthwise 2-D convolution as a sum of shifted products, with its own gradient. Models use it before each scan.

A depthwise kernel contains no matrix product, so `jax.lax.conv_general_dilated` with one feature group per channel
gains nothing from the hardware's matrix units. On a CPU the shifted sum is an order of magnitude faster, and its
transpose is another shifted sum.

If an image's rows are sharded over devices, the devices exchange the few rows that the kernel reaches across the border
(a halo exchange with `jax.lax.ppermute`).
"""

import functools

import jax
import jax.numpy as jnp

from .derivatives import with_gradient
from .partition import SEQUENCE_AXIS, batch_axes, channel_axes, map_parts, row_parts
from .typing import Array, Float, Index

Inputs = tuple[Float[Array, "B H W D"], Float[Array, "KH KW D"]]
"""Image and kernel, or their gradients."""


def depthwise_conv2d(x: Float[Array, "B H W D"], kernel: Float[Array, "KH KW D"]) -> Float[Array, "B H W D"]:
    """Returns each channel of `x` correlated with its own kernel, zero-padded to the same size.

        y[b, h, w, d] = Σ_ij kernel[i, j, d] x[b, h + i - KH // 2, w + j - KW // 2, d]

    The sum is accumulated in float32, or in float64 if an argument is float64, and returned in the dtype of `x`. If the
    mesh in context (`jax.set_mesh`) has an automatic axis `seq` that divides the rows, each device convolves its rows.

    Args:
      x: images, floating-point, channels last.
      kernel: floating-point, with odd height and width.

    Raises:
      ValueError: the numbers of channels differ, or a side of the kernel is even.
    """
    if x.shape[-1] != kernel.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} channels, kernel has {kernel.shape[-1]}; they must be equal")
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel is {kernel.shape[0]}x{kernel.shape[1]}; both sides must be odd")
    if row_parts(x.shape[1]) == 1:
        return _shifted_sum(None, x, kernel)
    mesh = jax.sharding.get_abstract_mesh()
    batch = batch_axes(x, mesh)
    channels = channel_axes(x, mesh, taken=(*batch, SEQUENCE_AXIS))
    by_row = jax.P(batch, SEQUENCE_AXIS, None, channels)
    # shard_map sums the devices' parts of the kernel's gradient in the dtype in which the kernel enters it. It enters
    # in float32, so that a bfloat16 gradient is rounded once, after the sum.
    exact = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    convolve = map_parts(
        lambda x, exact: depthwise_conv2d_of_rows(x, exact.astype(kernel.dtype)),
        in_specs=(by_row, jax.P(None, None, channels)),
        out_specs=by_row,
    )
    return convolve(x, exact)


def depthwise_conv2d_of_rows(
    x: Float[Array, "B H W D"], kernel: Float[Array, "KH KW D"], axis_name: str = SEQUENCE_AXIS
) -> Float[Array, "B H W D"]:
    """Returns this device's rows of `depthwise_conv2d` of the complete image; for use inside `jax.shard_map`.

    Args:
      x: this device's rows; every device of the axis has the same number.
      kernel: replicated; `jax.shard_map` sums its gradient over the devices.
      axis_name: the manual mesh axis over which the rows are sharded.
    """
    return _shifted_sum(axis_name, x, kernel)


def _pad(axis_name: str | None, x: Float[Array, "B H W D"], kernel_shape: tuple[int, ...]) -> Float[Array, "B HP WP D"]:
    """x with as many rows and columns around it as the kernel reaches, zero beyond the edges of the image."""
    rows, columns = kernel_shape[0] // 2, kernel_shape[1] // 2
    if axis_name is None:
        return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    # Only rows are sharded: their padding comes from other devices, that of columns is zero as above.
    x = jnp.concatenate([*_rows_above(axis_name, x, rows), x, *_rows_below(axis_name, x, rows)], axis=1)
    return jnp.pad(x, ((0, 0), (0, 0), (columns, columns), (0, 0)))


def _rows_above(axis_name: str, x: Float[Array, "B H W D"], count: int) -> list[Float[Array, "B _ W D"]]:
    """The `count` rows of the image before this device's, as one array per device, the farthest device first."""
    return [
        _received(axis_name, x[:, x.shape[1] - rows :], distance) for distance, rows in _neighbours(x.shape[1], count)
    ][::-1]


def _rows_below(axis_name: str, x: Float[Array, "B H W D"], count: int) -> list[Float[Array, "B _ W D"]]:
    """The `count` rows of the image after this device's, as one array per device, the nearest device first."""
    return [_received(axis_name, x[:, :rows], -distance) for distance, rows in _neighbours(x.shape[1], count)]


def _neighbours(height: int, count: int) -> list[tuple[int, int]]:
    """(distance, rows) for each device that has some of the next `count` rows, if every device has `height` rows.

    There is more than one if the kernel reaches past the rows of the nearest device.
    """
    return [(i // height + 1, min(height, count - i)) for i in range(0, count, height)]


def _received(axis_name: str, x: Float[Array, "B H W D"], distance: int) -> Float[Array, "B H W D"]:
    """The x of the device that lies `distance` before this one, or after it if negative; zeros beyond the image."""
    devices = range(jax.lax.axis_size(axis_name))
    # A device that receives from nobody gets zeros from ppermute: exactly the padding at the edge of the image.
    pairs = [(source, source + distance) for source in devices if source + distance in devices]
    return jax.lax.ppermute(x, axis_name, pairs) if pairs else jnp.zeros_like(x)


def _correlate(padded: Float[Array, "B HP WP D"], kernel: Float[Array, "KH KW D"]) -> Float[Array, "B H W D"]:
    """The sum over kernel positions of the padded image, shifted by the position, times the position's weights."""
    height, width = (padded.shape[i + 1] - kernel.shape[i] + 1 for i in range(2))
    # Products and sum have the wider dtype and are rounded to the image's dtype once. XLA fuses all terms into one loop
    # over the output. The singleton axes make the broadcast explicit, since the tests forbid implicit rank promotion.
    dtype = _sum_dtype(padded, kernel)
    terms = (
        padded[:, i : i + height, j : j + width].astype(dtype) * kernel[i, j][None, None, None].astype(dtype)
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    return functools.reduce(jnp.add, terms).astype(padded.dtype)


def _shifted_sum(
    axis_name: str | None, x: Float[Array, "B H W D"], kernel: Float[Array, "KH KW D"]
) -> Float[Array, "B H W D"]:
    """The convolution; with an axis_name, of the device's rows of an image whose rows are sharded over that axis."""

    def evaluate(inputs: Inputs) -> Float[Array, "B H W D"]:
        x, kernel = inputs
        return _correlate(_pad(axis_name, x, kernel.shape), kernel)

    # The gradient needs only the inputs, which are alive anyway. It pads the image again: exchanging a few rows again
    # costs less than keeping a copy of the image that contains them.
    convolve = with_gradient(
        evaluate,
        save=lambda inputs: (evaluate(inputs), ()),
        gradient=lambda inputs, _, grad: _gradient(axis_name, inputs, grad),
    )
    return convolve((x, kernel))


def _gradient(axis_name: str | None, inputs: Inputs, grad: Float[Array, "B H W D"]) -> Inputs:
    """The gradients of the image and of the kernel, in their dtypes."""
    x, kernel = inputs
    height, width = x.shape[1:3]
    kernel_height, kernel_width = kernel.shape[:2]
    padded = _pad(axis_name, x, kernel.shape)
    dtype = _sum_dtype(x, kernel)

    # d kernel[i, j, d] = Σ_bhw padded[b, h + i, w + j, d] grad[b, h, w, d]
    # The loop goes over rows h. All products of a row stay in cache while they are added; one reduction over the
    # complete array per kernel position would read the array KH x KW times. A step takes all images at once, because
    # the batch may be sharded, and keeps a sum per image and column, which is reduced after the loop.
    def add_row(row: Index, sums: tuple[Float[Array, "B W D"], ...]) -> tuple[Float[Array, "B W D"], ...]:
        grad_row = jax.lax.dynamic_slice_in_dim(grad, row, 1, axis=1)[:, 0]
        rows = jax.lax.dynamic_slice_in_dim(padded, row, kernel_height, axis=1)
        products = (
            rows[:, i, j : j + width].astype(dtype) * grad_row.astype(dtype)
            for i in range(kernel_height)
            for j in range(kernel_width)
        )
        return tuple(total + product for total, product in zip(sums, products, strict=True))

    # Not in bfloat16, because the sums have B x H x W terms.
    zeros = jnp.zeros_like(grad[:, 0], dtype)
    sums = jax.lax.fori_loop(0, height, add_row, (zeros,) * (kernel_height * kernel_width))
    grad_kernel = jnp.stack([x.sum(axis=(0, 1)) for x in sums]).reshape(kernel.shape).astype(kernel.dtype)
    # The gradient of x is the correlation of grad with the kernel rotated by 180 degrees. Its padding is that of the
    # forward pass, because the sides are odd.
    return _correlate(_pad(axis_name, grad, kernel.shape), kernel[::-1, ::-1]), grad_kernel


def _sum_dtype(x: Array, kernel: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.promote_types(x.dtype, kernel.dtype), jnp.float32)
