"""Sampling as one program: encodes the condition, integrates the guided flow, and decodes images."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8

from sisma_jax.config import FlowConfig, Sampling
from sisma_jax.diffusion import editing
from sisma_jax.diffusion.flow import MIN_REMAINING_IN_LOSS, to_velocity
from sisma_jax.diffusion.guidance import guided
from sisma_jax.diffusion.solvers import Point, integrate, jump, time_grid
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, from_uint8, to_uint8
from sisma_jax.models.condition import Condition
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.parallel import sharding

MOST_READ_BYTES = 2**30
"""Largest size per device of what the layers read from the masks, if it is to be computed once per image.

For SISMA-B in bfloat16, an image of 1,024 tokens takes 75 MB. With guidance, twice this size is kept.
"""

_TRACED = ("shift", "guidance_rescale")
_INTERVAL = ("guidance_low", "guidance_high")


def _traced(is_guided: bool, is_always_guided: bool) -> tuple[str, ...]:
    """Returns the names of the settings that are traced."""
    if not is_guided:
        return _TRACED
    return (*_TRACED, "guidance") if is_always_guided else (*_TRACED, "guidance", *_INTERVAL)


def _flatten(settings: Sampling) -> tuple[tuple[Any, ...], tuple[int, str, bool, bool]]:
    values = (getattr(settings, name) for name in _traced(settings.is_guided, settings.is_always_guided))
    # `jax.jit` would compile another program for an integer.
    traced = tuple(float(x) if type(x) is int else x for x in values)
    is_always_guided = settings.is_guided and settings.is_always_guided
    return traced, (settings.steps, settings.solver, settings.is_guided, is_always_guided)


def _unflatten(static: tuple[int, str, bool, bool], traced: tuple[Any, ...]) -> Sampling:
    steps, solver, is_guided, is_always_guided = static
    values = {
        **{"steps": steps, "solver": solver},
        # An unguided setting has scale 1, and an interval that is not traced contains all times.
        **{"guidance": 1.0, "guidance_low": 0.0, "guidance_high": 1.0},
        **dict(zip(_traced(is_guided, is_always_guided), traced, strict=True)),
    }
    # `__init__` is not called, because tracers do not pass its checks. The other fields keep the class's defaults.
    settings = object.__new__(Sampling)
    for name, value in values.items():
        object.__setattr__(settings, name, value)
    return settings


jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


def read_once(model: Denoiser, condition: Condition) -> Condition:
    """Returns the condition with what the layers read from it, unless that takes too much memory.

    For a batch of unknown size (`jax.export`), one image must not take too much.

    Args:
      model: the denoiser.
      condition: the encoded inputs.
    """
    read = jax.eval_shape(model.read, condition).read
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    num_images = condition.mask.shape[0]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read)) // num_images
    if not jax.export.is_symbolic_dim(num_images):
        size *= num_images
    return model.read(condition) if size <= MOST_READ_BYTES * devices else condition


def sample(
    model: Denoiser,
    keys: Key[Array, " B"],
    inputs: Mapping[str, Array],
    settings: Sampling,
    *,
    autoencoder: IdentityAutoencoder | KlAutoencoder,
    flow: FlowConfig,
    image: UInt8[Array, "#B H W 3"] | None = None,
    region: Bool[Array, "B H W"] | None = None,
) -> UInt8[Array, "B H W 3"]:
    """Samples one image per mask. A pure function for use under `jax.jit`, with `flow` static.

    Args:
      model: the denoiser with its parameters.
      keys: one random key per image. An image depends only on its own key and inputs, not on its position in the batch.
      inputs: the conditions: "mask", class indices (B, H, W).
      settings: sampling settings; a pytree whose numbers are traced.
      autoencoder: decodes latents to images; also encodes `image`.
      flow: the objective with which the model was trained, and what the network predicts.
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
    shift, rescale, low, high, guidance = (
        jnp.asarray(getattr(settings, name), jnp.float32) for name in (*_TRACED, *_INTERVAL, "guidance")
    )
    side, (_, height, width) = autoencoder.downsampling, inputs["mask"].shape
    shape = (height // side, width // side, autoencoder.channels)
    x0 = sharding.constrain(jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys))

    def keeping(velocity: Callable[..., Point]) -> Callable[..., Point]:
        if image is None or region is None:
            return velocity
        kept = autoencoder.encode(from_uint8(image))
        return editing.keeping(velocity, x0, kept, editing.to_latent_grid(region, side))

    if flow.objective == "mean_flow":
        one = jnp.stack([guidance, low, high])[None]
        condition = read_once(model, model.encode({**inputs, "guidance": jnp.broadcast_to(one, (x0.shape[0], 3))}))

        def average(x: Point, t: Float[Array, " #B"], duration: Float[Array, " #B"]) -> Point:
            # With the divisor of the loss, which is part of what the network was trained to predict.
            return to_velocity(model(x, t, condition, duration), x, t, flow.prediction, MIN_REMAINING_IN_LOSS)

        steps = settings.steps if image is None else max(settings.steps, editing.LEAST_STEPS)
        x1 = jump(keeping(average), x0, time_grid(steps, shift))
        return to_uint8(autoencoder.decode(x1))

    condition = model.encode(inputs)
    # That of one image, because all have the same.
    null = model.null(jax.tree.map(lambda x: x[:1], condition)) if settings.is_guided else None
    condition = read_once(model, condition)

    def denoise(x: Point, t: Float[Array, " #B"], condition: Condition) -> Point:
        return to_velocity(model(x, t, condition), x, t, flow.prediction)

    if null is not None:
        null = null if condition.read is None else model.read(null)
        skips = not settings.is_always_guided
        velocity = guided(denoise, condition, null, guidance, interval=(low, high), rescale=rescale, skips=skips)
    else:
        velocity = functools.partial(denoise, condition=condition)
    x1 = integrate(keeping(velocity), x0, time_grid(settings.steps, shift), settings.solver)
    return to_uint8(autoencoder.decode(x1))
