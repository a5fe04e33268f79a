"""Traces the programs that a run executes, one training step and one call of the sampler, from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, UInt8, UInt32

from sisma_jax.config import AutoencoderConfig, Config, FlowConfig, Sampling
from sisma_jax.diffusion.sampling import sample
from sisma_jax.errors import InputError
from sisma_jax.kernels.selective_scan.api import PREFERENCE, SUPPORT_CHECKS
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.condition import ConditionEncoder
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.factory import Params, init_params, make_graph
from sisma_jax.parallel import sharding
from sisma_jax.sampler import Autoencoder
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import jit_update, make_update

KEY_IMPL = "threefry2x32"
"""The implementation of random keys: the default of JAX and of the command line."""


def for_devices(config: Config, mesh: Mesh) -> Config:
    """Returns the configuration with the choices that `auto` means on the devices of the mesh.

    Otherwise `auto` would choose for the devices of this machine.

    Args:
      config: configuration of the run.
      mesh: of the devices, which need not be present.

    Raises:
      InputError: the configured scan implementation is a kernel for another platform.
    """
    platform, name = mesh.devices.flat[0].platform, config.model.scan_implementation
    if config.model.mixer == "ssd":
        return config  # one implementation for all devices
    if name == "auto":
        name = PREFERENCE[platform][0]
    elif name in SUPPORT_CHECKS and name not in PREFERENCE[platform]:
        raise InputError(f"model.scan_implementation {name} does not run on platform {platform}; leave it at auto.")
    model = dataclasses.replace(config.model, scan_implementation=name)
    if platform == "cpu" or config.train.unroll_layers != "auto":
        return dataclasses.replace(config, model=model)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, unroll_layers="off"))


def abstract_state(config: Config, mesh: Mesh | jax.sharding.AbstractMesh) -> TrainState:
    """Returns the training state as `jax.ShapeDtypeStruct`s with shardings."""
    abstract = jax.eval_shape(functools.partial(init_state, config))
    return sharding.place(abstract, sharding.of_state(abstract, mesh))


def abstract_batch(config: Config, mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a training batch as `jax.ShapeDtypeStruct`s: the condition, and images or the moments of their latents.

    Args:
      config: configuration of the run.
      mesh: over which the batch is sharded.
      batch_size: total over all devices.
    """
    size = config.data.image_size
    if config.autoencoder.kind == "identity":
        examples = {"image": jax.ShapeDtypeStruct((size, size, 3), jnp.uint8)}
    else:
        side = size // config.autoencoder.downsampling
        examples = {"moments": jax.ShapeDtypeStruct((side, side, 2 * config.autoencoder.channels), jnp.float16)}
    return _batched(ConditionEncoder.input_shapes(size) | examples, mesh, batch_size)


def _batched(shapes: dict[str, jax.ShapeDtypeStruct], mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of single examples with a batch axis, sharded over the mesh."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype, sharding=sharding.over_batch(mesh, 1 + x.ndim))
        for name, x in shapes.items()
    }


def trace_update(config: Config, mesh: Mesh, batch_size: int) -> jax.stages.Traced:
    """Returns the traced training step.

    Args:
      config: configuration of the run, after `for_devices`.
      mesh: of the devices, which need not be present.
      batch_size: total over all devices.
    """
    state = abstract_state(config, mesh)
    with jax.set_mesh(mesh):
        update = jit_update(make_update(config), state, mesh)
        assert isinstance(update, jax.stages.Wrapped), "jit_update returns the result of jax.jit"
        return update.trace(state, abstract_batch(config, mesh, batch_size))


def trace_sampler(config: Config, mesh: Mesh, batch_size: int) -> jax.stages.Traced:
    """Returns the traced sampler, from masks to images.

    The autoencoder is replicated. It has the sizes of the configuration; the weights of a run may have other sizes.

    Args:
      config: configuration of the run, after `for_devices`.
      mesh: of the devices, which need not be present.
      batch_size: number of masks, as a total over all devices.
    """
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    graph, autoencoder_params = nnx.split(nnx.eval_shape(lambda: _autoencoder(config.autoencoder)))
    keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0, impl=KEY_IMPL), batch_size)))
    replicated = jax.tree.map(lambda _: sharding.replicated(mesh), (autoencoder_params, keys))
    with jax.set_mesh(mesh):
        sample = _jit_sampler(config, graph, mesh)
        assert isinstance(sample, jax.stages.Wrapped), "_jit_sampler returns the result of jax.jit"
        return sample.trace(
            sharding.place(params, sharding.of_state(params, mesh)),
            *sharding.place((autoencoder_params, keys), replicated),
            _batched(ConditionEncoder.input_shapes(config.data.image_size), mesh, batch_size),
            config.sample,
            key_impl=KEY_IMPL,
        )


def _autoencoder(config: AutoencoderConfig) -> IdentityAutoencoder | KlAutoencoder:
    if config.kind == "identity":
        return IdentityAutoencoder()
    sizes = ("latent_channels", "block_channels", "layers_per_block", "norm_groups")
    return KlAutoencoder(KlConfig(**{name: getattr(config, name) for name in sizes}), rngs=nnx.Rngs(0))


def _jit_sampler(
    config: Config, autoencoder_graph: nnx.GraphDef[Autoencoder], mesh: Mesh
) -> Callable[..., UInt8[Array, "B S S 3"]]:
    """Returns the jitted function from parameters, keys and masks to faces, which are replicated.

    Its computation is that of `sampler.Sampler` in one program with a static number of steps, which a plan needs.
    """
    return jax.jit(
        functools.partial(_sample, make_graph(config), autoencoder_graph, config.flow),
        static_argnames="key_impl",
        out_shardings=sharding.replicated(mesh),
    )


def _sample(
    graph: nnx.GraphDef[Denoiser],
    autoencoder_graph: nnx.GraphDef[Autoencoder],
    flow: FlowConfig,
    params: Params,
    autoencoder_params: nnx.State[Any, Any],
    key_data: UInt32[Array, "B words"],
    inputs: Mapping[str, Array],
    settings: Sampling,
    *,
    key_impl: str,
) -> UInt8[Array, "B S S 3"]:
    return sample(
        nnx.merge(graph, params),
        jax.random.wrap_key_data(key_data, impl=key_impl),
        inputs,
        settings,
        autoencoder=nnx.merge(autoencoder_graph, autoencoder_params),
        flow=flow,
    )
