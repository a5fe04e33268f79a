"""Options of XLA for the programs that take most of the time: the training step and the sampler."""

from jax.sharding import Mesh


def options(mesh: Mesh) -> dict[str, int] | None:
    """Returns the `compiler_options` of `jax.jit` for the devices of a mesh; None for the defaults.

    By default, XLA uses vectors of 256 bits on CPUs, because the first ones with 512 bits became slower by using them.
    On present ones, a training step and an evaluation of the demo's model take 7 % less time with 512 bits. CPUs
    without such vectors still use their own.

    Args:
      mesh: of all devices.
    """
    return {"xla_cpu_prefer_vector_width": 512} if mesh.devices.flat[0].platform == "cpu" else None
