"""From a mask to images in one program: mask features, guided flow, decoder."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Key, UInt8

from sisma_jax.diffusion import editing
from sisma_jax.diffusion.flow import MIN_REMAINING, to_velocity
from sisma_jax.diffusion.solvers import Latent, Velocity, integrate, time_grid
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder
from sisma_jax.models.sisma import Sisma
from sisma_jax.parallel import sharding

# Standard deviations of a data estimate below this count as this, so that a constant estimate is not divided by zero.
MIN_DEVIATION = 1e-6


def guided(
    denoise: Callable[[Latent, Float[Array, " B"], Float[Array, "B h w D"]], Latent],
    features: Float[Array, "B h w D"],
    null_features: Float[Array, "B h w D"],
    scale: float | Float[Array, ""],
    *,
    interval: tuple[float | Float[Array, ""], float | Float[Array, ""]] = (0.0, 1.0),
    rescale: float | Float[Array, ""] = 0.0,
) -> Velocity:
    """Returns the classifier-free guided velocity v_null + scale (v_mask - v_null) (arXiv 2207.12598).

    Both evaluations run as one batch of twice the size. A Python `scale` of exactly 1 needs only the one with the mask.

    Args:
      denoise: (x, t, features) -> velocity.
      interval: times [low, high) that are guided; at others the velocity is v_mask to the last bit. Noise levels
        (s_low, s_high] of the paper (arXiv 2404.07724, noise over signal, so s = (1 - t) / t) are the times
        [1 / (1 + s_high), 1 / (1 + s_low)). Both evaluations are made at all times: to skip one would put the network
        into the program twice.
      rescale: in [0, 1]; how far the guided estimate of the data is brought to the standard deviation that it has
        without guidance, against over-exposure (see `_rescaled`).
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: denoise(x, t, features)
    both_features = _in_turn(features, null_features)

    def velocity(x: Latent, t: Float[Array, " B"]) -> Latent:
        both = denoise(_in_turn(x, x), _in_turn(t, t), both_features)
        pairs = both.reshape(-1, 2, *x.shape[1:])
        with_mask, without_mask = pairs[:, 0], pairs[:, 1]
        extrapolated = without_mask + scale * (with_mask - without_mask)
        low, high = interval
        is_guided = (low <= t) & (t < high)
        # Chosen at the end, and not by a scale of 1, which would leave rounding and the rescaling in.
        return jnp.where(is_guided[:, None, None, None], _rescaled(extrapolated, with_mask, x, t, rescale), with_mask)

    return velocity


def _in_turn(x: Array, y: Array) -> Array:
    """Returns rows of x and y in turn, so that a device that has some of both has their pairs, and none has to move."""
    return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])


def _rescaled(
    extrapolated: Latent, with_mask: Latent, x: Latent, t: Float[Array, " B"], rescale: float | Float[Array, ""]
) -> Latent:
    """Returns the guided velocity with its over-exposure taken back (arXiv 2305.08891, eq. 15 and 16).

    The paper multiplies the guided output by rescale std(with mask) / std(guided) + 1 - rescale, with the deviations
    of each image over pixels and channels. Its output predicts the velocity of a variance-preserving path, which at
    pure noise is the data estimate but for its sign. Our velocity x1 - x0 has all of the noise in it there, whose
    deviation would hide that of the image; so what is multiplied is the data estimate, x + (1 - t) v.
    """
    remaining = (1 - t)[:, None, None, None]
    data, data_with_mask = x + remaining * extrapolated, x + remaining * with_mask
    deviation, wanted = (jnp.std(estimate, axis=(1, 2, 3), keepdims=True) for estimate in (data, data_with_mask))
    factor = rescale * wanted / jnp.maximum(deviation, MIN_DEVIATION) + (1 - rescale)
    # As a difference, so that no rescaling leaves the velocity as it was, bit for bit.
    return extrapolated + (factor - 1) * data / jnp.maximum(remaining, MIN_REMAINING)


def sample(
    model: Sisma,
    keys: Key[Array, " B"],
    mask: Integer[Array, "B H W"],
    *,
    autoencoder: IdentityAutoencoder | KlAutoencoder,
    prediction: Literal["velocity", "data"],
    steps: int,
    solver: str = "euler",
    shift: float | Float[Array, ""] = 1.0,
    guidance: float | Float[Array, ""] = 1.0,
    guidance_interval: tuple[float | Float[Array, ""], float | Float[Array, ""]] = (0.0, 1.0),
    guidance_rescale: float | Float[Array, ""] = 0.0,
    image: UInt8[Array, "#B H W 3"] | None = None,
    region: Bool[Array, "B H W"] | None = None,
) -> UInt8[Array, "B H W 3"]:
    """Paints one image into each mask. Pure: for use under `jax.jit`, with `prediction`, `steps` and `solver` static.

    Args:
      model: the denoiser, with its parameters.
      keys: one an image. An image depends on its own key and mask alone, not on its place in a batch.
      mask: class indices in 0..18.
      prediction: what the network was trained to predict.
      steps: solver steps.
      solver: a key of `solvers.SOLVERS`.
      shift: above 1, more steps near noise; see `solvers.time_grid`.
      guidance: classifier-free guidance scale.
      guidance_interval, guidance_rescale: `interval` and `rescale` of `guided`.
      image, region: paint in this region alone; elsewhere the result is the photograph, as the autoencoder renders it.

    Returns:
      Images, RGB.
    """
    side = autoencoder.downsampling
    shape = (mask.shape[1] // side, mask.shape[2] // side, autoencoder.channels)
    x0 = sharding.constrain(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))
    features = model.encode_mask(mask)

    def denoise(x: Latent, t: Array, features: Array) -> Latent:
        return to_velocity(model(x, t, features), x, t, prediction)

    velocity = guided(
        denoise,
        features,
        model.null_features(features.shape),
        guidance,
        interval=guidance_interval,
        rescale=guidance_rescale,
    )
    if image is not None:
        kept = autoencoder.encode(from_uint8(image))
        velocity = editing.keeping(velocity, x0, kept, editing.to_latent_grid(region, side))
    x1 = integrate(velocity, x0, time_grid(steps, shift), solver)
    return to_uint8(autoencoder.decode(x1))


def from_uint8(image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Returns 8-bit images as float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: Float[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """Returns images in [-1, 1] as 8 bits, values outside clipped."""
    return jnp.round(jnp.clip((image + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)
