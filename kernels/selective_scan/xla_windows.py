"""Loops over windows of arrays, and reads and writes of windows, for the chunked scan of `xla.py`.

A window is a range of one axis, (start, size), with a traced start and a static size; None is all of the axis. Arrays
stay in the caller's layout and are loop carries that XLA updates in place. All starts are within bounds by construction
and never negative, so `allow_negative_indices=False` omits XLA's select for wrapping them.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from ..typing import Array, Float, Index

# (start, size): the start may be traced, but XLA needs static sizes.
Window = tuple[Index, int]
Carry = TypeVar("Carry")


def for_windows(
    total: int, size: int, body: Callable[[Window, Carry], Carry], carry: Carry, reverse: bool = False
) -> Carry:
    """Returns the carry after `carry = body((start, size), carry)` for each window of an axis of `total` entries.

    Args:
      total: entries of the axis.
      size: entries of a window; it divides total.
      body: computes one window.
      carry: the first carry.
      reverse: visit the windows from the last to the first.
    """
    # fori_loop with a static count becomes a scan without outputs: all results are in the carry.
    count = total // size

    def window(i: Index, carry: Carry) -> Carry:
        return body(((count - 1 - i if reverse else i) * size, size), carry)

    return jax.lax.fori_loop(0, count, window, carry)


def loop_into(
    buffer: Float[Array, "T ..."],
    step: Callable[[Carry, Index], tuple[Carry, Float[Array, "..."]]],
    carry: Carry,
    reverse: bool,
) -> tuple[Carry, Float[Array, "T ..."]]:
    """Returns `jax.lax.scan(step, carry, arange(len(buffer)), reverse=reverse)`, with its outputs written into buffer.

    A scan would allocate and zero a new output array on each call; this function reuses the buffer of the chunk before.

    Args:
      buffer: overwritten with the outputs, which are in the order of t in both directions.
      step: (carry, t) to (carry, output).
      carry: the first carry.
      reverse: go from the last t to the first.
    """
    steps = buffer.shape[0]

    def body(i: Index, loop: tuple[Carry, Float[Array, "T ..."]]) -> tuple[Carry, Float[Array, "T ..."]]:
        carry, buffer = loop
        t = steps - 1 - i if reverse else i
        carry, output = step(carry, t)
        return carry, jax.lax.dynamic_update_index_in_dim(buffer, output, t, 0, allow_negative_indices=False)

    return jax.lax.fori_loop(0, steps, body, (carry, buffer))


def at_step(x: Float[Array, "T ..."], t: Index) -> Float[Array, "..."]:
    """Returns x[t], for a traced t."""
    return jax.lax.dynamic_index_in_dim(x, t, 0, keepdims=False, allow_negative_indices=False)


def pad_to_chunks(steps: int, *sequences: Float[Array, "B L _"]) -> list[Float[Array, "B _ _"]]:
    """Returns the sequences padded with zeros at the end, to a multiple of `steps` time steps."""
    # At the end in both directions. A reversed scan then starts with the padding, which does not change the initial
    # state: Δ = 0 gives a decay of 1 and no input.
    padding = -sequences[0].shape[1] % steps
    return [jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x for x in sequences]


def read(x: Float[Array, "..."], *windows: Window | None) -> Float[Array, "..."]:
    """Returns the part of x within the windows, one window per axis."""
    starts = [window[0] if window else 0 for window in windows]
    sizes = [window[1] if window else size for window, size in zip(windows, x.shape, strict=True)]
    return jax.lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)


def write(x: Float[Array, "*shape"], part: Float[Array, "..."], *windows: Window | None) -> Float[Array, "*shape"]:
    """Returns x with `part`, converted to the dtype of x, in place of the windows; one window per axis."""
    starts = [window[0] if window else 0 for window in windows]
    return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), starts, allow_negative_indices=False)


def read_steps(
    x: Float[Array, "B L _"], steps: Window, channels: Window | None, dtype: jnp.dtype
) -> Float[Array, "T B _"]:
    """Returns a window of steps and channels of a sequence, with steps first, in dtype."""
    # The transpose of a window costs little, because the window is in cache and channels stay the last axis.
    return jnp.swapaxes(read(x, None, steps, channels), 0, 1).astype(dtype)


def write_steps(
    x: Float[Array, "B L E"], part: Float[Array, "T B _"], steps: Window, channels: Window | None
) -> Float[Array, "B L E"]:
    """Returns the sequence x with `part`, which has steps first, in place of a window of steps and channels."""
    return write(x, jnp.swapaxes(part, 0, 1), None, steps, channels)
