"""Depthwise 2-D convolution as shifted multiply-adds.

A depthwise kernel has no matrix product in it, so `lax.conv_general_dilated` with one feature group a
channel gains nothing from the hardware's matrix units: on a CPU the shifted sum is an order of magnitude
faster, and its transpose is another shifted sum.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
    return _shifted_sum(x, kernel)


def _pad(x: Array, kernel_shape: tuple[int, ...]) -> Array:
    rows, columns = kernel_shape[0] // 2, kernel_shape[1] // 2
    return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


def _correlate(x: Array, kernel: Array) -> Array:
    height, width = x.shape[1:3]
    padded = _pad(x, kernel.shape)
    terms = (
        padded[:, i : i + height, j : j + width].astype(jnp.float32)
        * kernel[i, j][None, None, None].astype(jnp.float32)
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    return functools.reduce(jnp.add, terms).astype(x.dtype)


@jax.custom_vjp
def _shifted_sum(x: Array, kernel: Array) -> Array:
    return _correlate(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _correlate(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    height, width = x.shape[1:3]
    kernel_height, kernel_width = kernel.shape[:2]
    padded = _pad(x, kernel.shape)

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
    return _correlate(grad, kernel[::-1, ::-1]), grad_kernel


_shifted_sum.defvjp(_forward, _backward)
