"""The programs that a run will execute, lowered from shapes alone: one update of the state, and one call of the
sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from sisma_jax.config import AutoencoderConfig, Config
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.factory import init_params
from sisma_jax.parallel import sharding
from sisma_jax.pipeline import TRACED_SETTINGS, jit_sampler
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import Batch, jit_update, make_update

KEY_IMPL = "threefry2x32"
"""JAX's default, and the command line's."""


def for_devices(config: Config, mesh: Mesh) -> Config:
    """Returns the configuration with the scan that `auto` means on these devices, which JAX does not see by itself."""
    if config.model.scan_implementation != "auto":
        return config
    name = "pallas_tpu" if mesh.devices.flat[0].platform == "tpu" else "xla"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, scan_implementation=name))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Returns the state's shapes and how they lie on the mesh."""
    abstract = jax.eval_shape(functools.partial(init_state, config))
    return sharding.place(abstract, sharding.of_state(abstract, mesh))


def abstract_batch(config: Config, mesh: Mesh, batch_size: int) -> Batch:
    """Returns the shapes of a training batch: images or the moments of their latents, and masks."""
    size = config.data.image_size
    shapes = {"mask": jax.ShapeDtypeStruct((batch_size, size, size), jnp.uint8)}
    if config.autoencoder.kind == "kl":
        side = size // config.autoencoder.downsampling
        shape = (batch_size, side, side, 2 * config.autoencoder.channels)
        shapes["moments"] = jax.ShapeDtypeStruct(shape, jnp.float16)
    else:
        shapes["image"] = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)
    return sharding.place(shapes, jax.tree.map(lambda _: sharding.over_batch(mesh), shapes))


def trace_update(config: Config, mesh: Mesh, batch_size: int) -> jax.stages.Traced:
    """Returns one update of the training state, traced for a batch of this size."""
    config = for_devices(config, mesh)
    state = abstract_state(config, mesh)
    with jax.set_mesh(mesh):
        return jit_update(make_update(config), state, mesh).trace(state, abstract_batch(config, mesh, batch_size))


def trace_sampler(config: Config, mesh: Mesh, batch_size: int) -> jax.stages.Traced:
    """Returns one call of the sampler, mask to image, traced for a batch of this size.

    The autoencoder is of the sizes that the configuration gives, whole on every device; weights that are given may be
    of others.
    """
    config = for_devices(config, mesh)
    settings, size = config.sample, config.data.image_size
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    graph, autoencoder_params = nnx.split(nnx.eval_shape(lambda: _autoencoder(config.autoencoder)))
    whole = sharding.replicated(mesh)
    key_data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=KEY_IMPL)))
    masks = jax.ShapeDtypeStruct((batch_size, size, size), jnp.uint8, sharding=sharding.over_batch(mesh))
    with jax.set_mesh(mesh):
        return jit_sampler(config, graph, mesh).trace(
            sharding.place(params, sharding.of_state(params, mesh)),
            jax.tree.map(functools.partial(_placed, sharding=whole), autoencoder_params),
            jax.ShapeDtypeStruct((batch_size, *key_data.shape), key_data.dtype, sharding=whole),
            {"mask": masks},
            {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for name in TRACED_SETTINGS},
            None,
            key_impl=KEY_IMPL,
            steps=settings.steps,
            solver=settings.solver,
            is_guided=settings.guidance != 1 and settings.guidance_low < settings.guidance_high,
        )


def _placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _autoencoder(config: AutoencoderConfig) -> IdentityAutoencoder | KlAutoencoder:
    if config.kind == "identity":
        return IdentityAutoencoder()
    sizes = KlConfig(
        latent_channels=config.latent_channels,
        block_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        norm_groups=config.norm_groups,
    )
    return KlAutoencoder(sizes, decode_tile=config.decode_tile, rngs=nnx.Rngs(0))
