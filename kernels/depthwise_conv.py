"""Depthwise 2-D convolution as shifted multiply-adds.

A depthwise kernel has no matrix product in it, so `lax.conv_general_dilated` with one feature group a
channel gains nothing from the hardware's matrix units: on a CPU the shifted sum is an order of magnitude
faster, and its transpose is another shifted sum.

Where devices have some rows of an image each, they exchange the few at their borders that the kernel reaches.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.partition import SEQUENCE_AXIS, batch_axes, channel_axes, map_parts, row_parts, vary_as
from kernels.typing import Array, Float


def depthwise_conv2d(x: Float[Array, "B H W D"], kernel: Float[Array, "KH KW D"]) -> Float[Array, "B H W D"]:
    """Returns each channel of `x` correlated with its own kernel, zero-padded to the same size.

    y[b, h, w, d] = sum_ij kernel[i, j, d] x[b, h + i - KH // 2, w + j - KW // 2, d], accumulated in float32
    and returned in `x.dtype`.

    Args:
      x: floating point, channels last.
      kernel: floating point, odd height and width.

    Raises:
      ValueError: the channels differ, or a side of the kernel is even.
    """
    if x.shape[-1] != kernel.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} channels, kernel has {kernel.shape[-1]}; they must be equal.")
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel is {kernel.shape[0]}x{kernel.shape[1]}; both sides must be odd.")
    if row_parts(x.shape[1]) == 1:
        return _shifted_sum(None, x, kernel)
    mesh = jax.sharding.get_abstract_mesh()
    batch = batch_axes(x, mesh)
    channels = channel_axes(x, mesh, taken=(*batch, SEQUENCE_AXIS))
    by_row = jax.P(batch, SEQUENCE_AXIS, None, channels)
    # Devices' parts of the kernel's gradient are added up as they come here: in float32.
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
    """Returns this device's rows of what `depthwise_conv2d` is of the whole image; for use inside `jax.shard_map`.

    Args:
      x: the device's rows, as many on all devices of the axis.
      kernel: the same on all devices; `jax.shard_map` sums its gradient over them.
      axis_name: of the mesh, of type manual.
    """
    return _shifted_sum(axis_name, x, vary_as(x, kernel))


def _pad(axis_name: str | None, x: Array, kernel_shape: tuple[int, ...]) -> Array:
    """x with as many rows and columns at its borders as the kernel reaches, zeros beyond the image's edges."""
    rows, columns = kernel_shape[0] // 2, kernel_shape[1] // 2
    if axis_name is None:
        return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    x = jnp.concatenate([*_rows_above(axis_name, x, rows), x, *_rows_below(axis_name, x, rows)], axis=1)
    return jnp.pad(x, ((0, 0), (0, 0), (columns, columns), (0, 0)))


def _rows_above(axis_name: str, x: Array, count: int) -> list[Array]:
    """The last `count` rows before this device's, from the farthest device to the next."""
    return [_sent(axis_name, x[:, x.shape[1] - rows :], distance) for distance, rows in _neighbours(x.shape[1], count)][
        ::-1
    ]


def _rows_below(axis_name: str, x: Array, count: int) -> list[Array]:
    """The first `count` rows after this device's, from the next device to the farthest."""
    return [_sent(axis_name, x[:, :rows], -distance) for distance, rows in _neighbours(x.shape[1], count)]


def _neighbours(height: int, count: int) -> list[tuple[int, int]]:
    """How far each device is, of `height` rows, that has some of the next `count` rows, and how many."""
    return [(i // height + 1, min(height, count - i)) for i in range(0, count, height)]


def _sent(axis_name: str, x: Array, distance: int) -> Array:
    """What the device has that comes so many before this one; zeros where there is none, which is beyond the edge."""
    devices = range(jax.lax.axis_size(axis_name))
    pairs = [(source, source + distance) for source in devices if source + distance in devices]
    return jax.lax.ppermute(x, axis_name, pairs) if pairs else jnp.zeros_like(x)


def _correlate(padded: Array, kernel: Array) -> Array:
    height, width = (padded.shape[i + 1] - kernel.shape[i] + 1 for i in range(2))
    terms = (
        padded[:, i : i + height, j : j + width].astype(jnp.float32)
        * kernel[i, j][None, None, None].astype(jnp.float32)
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    return functools.reduce(jnp.add, terms).astype(padded.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shifted_sum(axis_name: str | None, x: Array, kernel: Array) -> Array:
    return _correlate(_pad(axis_name, x, kernel.shape), kernel)


def _forward(axis_name: str | None, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # Kept: the inputs alone. To exchange rows again costs less than an image with them.
    return _shifted_sum(axis_name, x, kernel), (x, kernel)


def _backward(axis_name: str | None, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    height, width = x.shape[1:3]
    kernel_height, kernel_width = kernel.shape[:2]
    padded = _pad(axis_name, x, kernel.shape)

    # Row by row: all products of a row stay in cache while they are added, where one reduction over the whole array for
    # each of the kernel's positions would read it KH x KW times. All images at once, since the batch may be sharded.
    def add_row(row: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        grad_row = jax.lax.dynamic_slice_in_dim(grad, row, 1, axis=1)[:, 0]
        rows = jax.lax.dynamic_slice_in_dim(padded, row, kernel_height, axis=1)
        products = (
            rows[:, i, j : j + width].astype(jnp.float32) * grad_row.astype(jnp.float32)
            for i in range(kernel_height)
            for j in range(kernel_width)
        )
        return tuple(total + product for total, product in zip(sums, products, strict=True))

    zeros = jnp.zeros_like(grad[:, 0], jnp.float32)
    sums = jax.lax.fori_loop(0, height, add_row, (zeros,) * (kernel_height * kernel_width))
    grad_kernel = jnp.stack([x.sum(axis=(0, 1)) for x in sums]).reshape(kernel.shape).astype(kernel.dtype)
    return _correlate(_pad(axis_name, grad, kernel.shape), kernel[::-1, ::-1]), grad_kernel


_shifted_sum.defvjp(_forward, _backward)
