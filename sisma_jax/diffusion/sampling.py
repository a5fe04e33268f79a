"""Sampling as one program: encodes the condition, integrates the guided flow, and decodes images."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8

from sisma_jax.config import Sampling
from sisma_jax.diffusion import editing
from sisma_jax.diffusion.flow import to_velocity
from sisma_jax.diffusion.guidance import guided
from sisma_jax.diffusion.solvers import Point, integrate, time_grid
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, from_uint8, to_uint8
from sisma_jax.models.condition import Condition
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.parallel import sharding

_TRACED = ("shift", "guidance_low", "guidance_high", "guidance_rescale")


def _flatten(settings: Sampling) -> tuple[tuple[Any, ...], tuple[int, str, bool]]:
    names = (*_TRACED, "guidance") if settings.is_guided else _TRACED
    values = (getattr(settings, name) for name in names)
    # `jax.jit` would compile another program for an integer.
    traced = tuple(float(x) if type(x) is int else x for x in values)
    return traced, (settings.steps, settings.solver, settings.is_guided)


def _unflatten(static: tuple[int, str, bool], traced: tuple[Any, ...]) -> Sampling:
    steps, solver, is_guided = static
    names = (*_TRACED, "guidance") if is_guided else _TRACED
    # Every unguided setting has scale 1.
    values = {"steps": steps, "solver": solver, "guidance": 1.0, **dict(zip(names, traced, strict=True))}
    # `__init__` is not called, because tracers do not pass its checks. The other fields keep the class's defaults.
    settings = object.__new__(Sampling)
    for name, value in values.items():
        object.__setattr__(settings, name, value)
    return settings


jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


def sample(
    model: Denoiser,
    keys: Key[Array, " B"],
    inputs: Mapping[str, Array],
    settings: Sampling,
    *,
    autoencoder: IdentityAutoencoder | KlAutoencoder,
    prediction: Literal["velocity", "data"],
    image: UInt8[Array, "#B H W 3"] | None = None,
    region: Bool[Array, "B H W"] | None = None,
) -> UInt8[Array, "B H W 3"]:
    """Samples one image per mask. A pure function for use under `jax.jit`, with `prediction` static.

    Args:
      model: the denoiser with its parameters.
      keys: one random key per image. An image depends only on its own key and inputs, not on its position in the batch.
      inputs: the conditions: "mask", class indices (B, H, W).
      settings: sampling settings; a pytree whose numbers are traced.
      prediction: what the network predicts.
      autoencoder: decodes latents to images; also encodes `image`.
      image: RGB photograph to edit, resized to the resolution of the masks; one for all masks, or one per mask.
      region: pixels to generate, required with `image`. Elsewhere the result is the photograph as the autoencoder
        reconstructs it.

    Returns:
      RGB images.

    Raises:
      ValueError: `image` is given without `region`, or `region` without `image`.
    """
    if (image is None) != (region is None):
        raise ValueError("image and region go together: the photograph, and its pixels to generate.")
    # Python numbers would be float64 under jax_enable_x64.
    shift, low, high, rescale, guidance = (
        jnp.asarray(getattr(settings, name), jnp.float32) for name in (*_TRACED, "guidance")
    )
    side, (_, height, width) = autoencoder.downsampling, inputs["mask"].shape
    shape = (height // side, width // side, autoencoder.channels)
    x0 = sharding.constrain(jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys))
    condition = model.encode(inputs)

    def denoise(x: Point, t: Float[Array, " B"], condition: Condition) -> Point:
        return to_velocity(model(x, t, condition), x, t, prediction)

    if settings.is_guided:
        null = model.null(condition)
        velocity = guided(denoise, condition, null, guidance, interval=(low, high), rescale=rescale)
    else:
        velocity = functools.partial(denoise, condition=condition)
    if image is not None and region is not None:
        kept = autoencoder.encode(from_uint8(image))
        velocity = editing.keeping(velocity, x0, kept, editing.to_latent_grid(region, side))
    x1 = integrate(velocity, x0, time_grid(settings.steps, shift), settings.solver)
    return to_uint8(autoencoder.decode(x1))
