"""The programs that a run will execute, traced from shapes alone: one update of the state, and one call of the
sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sisma_jax.config import AutoencoderConfig, Config
from sisma_jax.errors import InputError
from sisma_jax.kernels.selective_scan.api import PREFERENCE, SUPPORT_CHECKS
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.condition import ConditionEncoder
from sisma_jax.models.factory import init_params
from sisma_jax.parallel import sharding
from sisma_jax.pipeline import jit_sampler
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import jit_update, make_update

KEY_IMPL = "threefry2x32"
"""JAX's default, and the command line's."""


def for_devices(config: Config, mesh: Mesh) -> Config:
    """Returns the configuration with the scan that `auto` means on these devices, which JAX does not see by itself.

    Raises:
      InputError: the configured scan is a kernel for other devices.
    """
    platform, name = mesh.devices.flat[0].platform, config.model.scan_implementation
    if name == "auto":
        name = PREFERENCE[platform][0]
    elif name in SUPPORT_CHECKS and name not in PREFERENCE[platform]:
        raise InputError(f"model.scan_implementation {name} does not run on a {platform}; leave it at auto.")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, scan_implementation=name))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Returns the state's shapes and shardings."""
    abstract = jax.eval_shape(functools.partial(init_state, config))
    return sharding.place(abstract, sharding.of_state(abstract, mesh))


def abstract_batch(config: Config, mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a training batch: what conditions, and images or the moments of their latents."""
    size = config.data.image_size
    if config.autoencoder.kind == "identity":
        examples = {"image": jax.ShapeDtypeStruct((size, size, 3), jnp.uint8)}
    else:
        side = size // config.autoencoder.downsampling
        examples = {"moments": jax.ShapeDtypeStruct((side, side, 2 * config.autoencoder.channels), jnp.float16)}
    return _batched(ConditionEncoder.input_shapes(size) | examples, mesh, batch_size)


def _batched(shapes: dict[str, jax.ShapeDtypeStruct], mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of examples, sharded over the mesh."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype, sharding=sharding.over_batch(mesh, 1 + x.ndim))
        for name, x in shapes.items()
    }


def trace_update(config: Config, mesh: Mesh, batch_size: int) -> jax.stages.Traced:
    """Returns one update of the training state, traced for a batch of this size."""
    state = abstract_state(config, mesh)
    with jax.set_mesh(mesh):
        return jit_update(make_update(config), state, mesh).trace(state, abstract_batch(config, mesh, batch_size))


def trace_sampler(config: Config, mesh: Mesh, batch_size: int) -> jax.stages.Traced:
    """Returns one call of the sampler, mask to image, traced for a batch of this size.

    The autoencoder is replicated and has the sizes that the configuration gives; given weights may have others.
    """
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    graph, autoencoder_params = nnx.split(nnx.eval_shape(lambda: _autoencoder(config.autoencoder)))
    keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0, impl=KEY_IMPL), batch_size)))
    replicated = jax.tree.map(lambda _: sharding.replicated(mesh), (autoencoder_params, keys))
    with jax.set_mesh(mesh):
        return jit_sampler(config, graph, mesh).trace(
            sharding.place(params, sharding.of_state(params, mesh)),
            *sharding.place((autoencoder_params, keys), replicated),
            _batched(ConditionEncoder.input_shapes(config.data.image_size), mesh, batch_size),
            config.sample,
            None,
            None,
            key_impl=KEY_IMPL,
        )


def _autoencoder(config: AutoencoderConfig) -> IdentityAutoencoder | KlAutoencoder:
    if config.kind == "identity":
        return IdentityAutoencoder()
    sizes = ("latent_channels", "block_channels", "layers_per_block", "norm_groups")
    return KlAutoencoder(KlConfig(**{name: getattr(config, name) for name in sizes}), rngs=nnx.Rngs(0))
