"""Edits of a photograph: the path of the kept latents. `data/regions.py` owns the region and the blended result."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sisma_jax.diffusion.solvers import Point

LEAST_STEPS = 2
"""Least steps of a mean flow in an edit, because the first evaluation sees only noise of the photograph."""


def keeping(
    velocity: Callable[..., Point], noise: Point, kept: Float[Array, "#B H W C"], is_generated: Bool[Array, "#B H W 1"]
) -> Callable[..., Point]:
    """Returns a velocity that equals `velocity` where `is_generated`, and elsewhere leads from `noise` to `kept`.

    The kept part follows its straight path t kept + (1 - t) noise, whose velocity is constant. Every solver follows
    this path exactly, and at every time the network sees the kept part at the right noise level. The generated part
    is therefore consistent with its surroundings. At t = 0 it sees noise only, so an edit takes two steps or more.

    Args:
      velocity: velocity, or average velocity, of the generated part; the result takes the same arguments.
      noise: point at t = 0, where the integration starts.
      kept: latent of the photograph; one for all examples, or one per example.
      is_generated: latent positions where `velocity` applies.
    """
    of_kept = kept - noise
    return lambda *at: jnp.where(is_generated, velocity(*at), of_kept)


def to_latent_grid(region: Bool[Array, "B H W"], downsampling: int) -> Bool[Array, "B h w 1"]:
    """Returns the latent positions that contain any pixel of the region.

    Args:
      region: pixels; height and width are multiples of `downsampling`.
      downsampling: pixels per latent position in each direction.
    """
    batch, height, width = region.shape
    squares = region.reshape(batch, height // downsampling, downsampling, width // downsampling, downsampling)
    return squares.any(axis=(2, 4))[..., None]
