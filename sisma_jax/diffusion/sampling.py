"""From a mask to images in one program: mask features, guided flow, decoder."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key, UInt8

from sisma_jax.diffusion.flow import to_velocity
from sisma_jax.diffusion.solvers import Latent, Velocity, integrate, time_grid
from sisma_jax.models.autoencoder import IdentityAutoencoder
from sisma_jax.models.sisma import Sisma


def guided(
    denoise: Callable[[Latent, Float[Array, " B"], Float[Array, "B h w D"]], Latent],
    features: Float[Array, "B h w D"],
    null_features: Float[Array, "B h w D"],
    scale: float | Float[Array, ""],
) -> Velocity:
    """Returns the classifier-free guided velocity v_null + scale (v_mask - v_null) (arXiv 2207.12598).

    Both evaluations run as one batch of twice the size. A Python `scale` of exactly 1 needs only the one with the mask.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: denoise(x, t, features)
    both_features = jnp.concatenate([features, null_features])

    def velocity(x: Latent, t: Float[Array, " B"]) -> Latent:
        both = denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both_features)
        with_mask, without_mask = jnp.split(both, 2)
        return without_mask + scale * (with_mask - without_mask)

    return velocity


def sample(
    model: Sisma,
    keys: Key[Array, " B"],
    mask: Integer[Array, "B H W"],
    *,
    autoencoder: IdentityAutoencoder,
    prediction: Literal["velocity", "data"],
    steps: int,
    solver: Literal["euler", "heun"] = "euler",
    guidance: float | Float[Array, ""] = 1.0,
) -> UInt8[Array, "B H W 3"]:
    """Paints one image into each mask. Pure: for use under `jax.jit`, all but `keys`, `mask`, `guidance` static.

    Args:
      model: the denoiser, with its parameters.
      keys: one an image. An image depends on its own key and mask alone, not on its place in a batch.
      mask: class indices in 0..18.
      prediction: what the network was trained to predict.
      steps: solver steps.
      guidance: classifier-free guidance scale.

    Returns:
      Images, RGB.
    """
    side = autoencoder.downsampling
    shape = (mask.shape[1] // side, mask.shape[2] // side, autoencoder.channels)
    x0 = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    features = model.encode_mask(mask)

    def denoise(x: Latent, t: Array, features: Array) -> Latent:
        return to_velocity(model(x, t, features), x, t, prediction)

    velocity = guided(denoise, features, model.null_features(features.shape), guidance)
    x1 = integrate(velocity, x0, time_grid(steps), solver)
    return to_uint8(autoencoder.decode(x1))


def from_uint8(image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Returns 8-bit images as float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: Float[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """Returns images in [-1, 1] as 8 bits, values outside clipped."""
    return jnp.round(jnp.clip((image + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)
