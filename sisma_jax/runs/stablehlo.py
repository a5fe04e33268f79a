"""Exported samplers: one file of `jax.export` that maps keys and masks to faces, and needs nothing but JAX to run.

The file contains the sampler as StableHLO for several platforms, for batches of any size, with the parameters and the
sampling settings as constants. docs/export.md shows how a program runs it.
"""

import dataclasses
from collections.abc import Sequence
from os import PathLike

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, UInt8, UInt32

from sisma_jax.config import Config, ModelConfig
from sisma_jax.diffusion import sampling
from sisma_jax.errors import InputError
from sisma_jax.files import to_path
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder
from sisma_jax.models.factory import Params, make_graph
from sisma_jax.runs.export import write_exported

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "tpu", "cuda")

_PORTABLE = ("xla", "associative", "reference")
# A file is a flatbuffer, whose offsets have 31 bits.
_MAX_BYTES = 2**31 - 2**24


def export_sampler(
    path: str | PathLike[str],
    config: Config,
    params: Params,
    autoencoder: IdentityAutoencoder | KlAutoencoder,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the sampler of a model atomically.

    The function in the file takes the data of threefry keys, uint32 (B, 2), and masks, uint8 class indices (B, S, S),
    and returns RGB images, uint8 (B, S, S, 3). Image i depends on key i and mask i alone, up to rounding.

    Args:
      path: file on a disk or in a bucket. Its folder is created, and an existing file is replaced.
      config: configuration of the run; `sample` has the settings. The scan is "xla" if `model.scan_implementation` is
        "auto". Kernels are compiled for a size of the batch, and are therefore not possible.
      params: EMA parameters of the denoiser.
      autoencoder: of the run.
      platforms: on which the file runs.

    Raises:
      InputError: flatbuffers is not installed, the scan's implementation is a kernel, the parameters take more than
        2 GiB, or the file cannot be written.
    """
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportUnusedImport]  jax.export needs it
    except ModuleNotFoundError as error:
        raise InputError("StableHLO needs the package flatbuffers; install with: pip install flatbuffers") from error
    num_bytes = sum(x.nbytes for x in jax.tree.leaves((params, nnx.state(autoencoder))))
    if num_bytes > _MAX_BYTES:
        raise InputError(
            f"the parameters take {num_bytes / 2**30:.1f} GiB, and a file of StableHLO at most 2; use safetensors."
        )
    graph = make_graph(dataclasses.replace(config, model=_portable(config.model)))

    def sample(key_data: UInt32[Array, "B 2"], mask: UInt8[Array, "B S S"]) -> UInt8[Array, "B S S 3"]:
        model = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
        keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        return sampling.sample(model, keys, {"mask": mask}, config.sample, autoencoder=autoencoder, flow=config.flow)

    (batch,), side = jax.export.symbolic_shape("B"), config.data.image_size
    arguments = (
        jax.ShapeDtypeStruct((batch, 2), jnp.uint32),
        jax.ShapeDtypeStruct((batch, side, side), jnp.uint8),
    )
    content = jax.export.export(jax.jit(sample), platforms=platforms)(*arguments).serialize()
    write_exported(to_path(path), bytes(content))


def _portable(model: ModelConfig) -> ModelConfig:
    """Returns the model with a scan that all platforms compile."""
    if model.scan_implementation in _PORTABLE or model.mixer == "ssd":
        return model
    if model.scan_implementation != "auto":
        raise InputError(
            f"model.scan_implementation {model.scan_implementation} has no batches of any size; leave it at auto."
        )
    return dataclasses.replace(model, scan_implementation="xla")
