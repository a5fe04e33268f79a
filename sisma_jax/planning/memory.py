"""Memory per device: the exact bytes of a training state, and the compiler's count for a compiled program."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from sisma_jax.parallel.topology import Device, read_shortage
from sisma_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of the training state on each device.

    Attributes:
      parameters: the trained parameters.
      ema: the EMA parameters.
      optimizer: the optimizer state, mainly Adam's two moments.
    """

    parameters: int
    ema: int
    optimizer: int

    @property
    def total(self) -> int:
        """The bytes of the complete training state on each device."""
        return self.parameters + self.ema + self.optimizer


def state_bytes(state: TrainState) -> StateBytes:
    """Returns the bytes on each device of a training state of arrays, or of `jax.ShapeDtypeStruct`s with shardings."""
    return StateBytes(*(bytes_per_device(part) for part in (state.params, state.ema, state.opt_state)))


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes of a pytree on one device, where each device holds one shard of each array.

    Args:
      tree: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a program runs.

    Attributes:
      arguments: arguments of the program, including donated ones, whose buffers results reuse.
      outputs: results that do not reuse the buffer of an argument.
      temporaries: intermediate results, mainly activations.
      code: the program itself, which on TPUs is stored in the same memory.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The bytes that the program needs on each device."""
        return self.arguments + self.outputs + self.temporaries + self.code


def read_memory(compiled: jax.stages.Compiled) -> Memory:
    """Returns the memory of a program, from the compiler's memory analysis.

    Raises:
      NotImplementedError: the compiler of this platform has no memory analysis.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise NotImplementedError("the compiler of this platform has no memory analysis; plan for a TPU or cpu:N")
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Shortage:
    """A program that the compiler refuses because it needs more memory than a device has.

    Attributes:
      needed: bytes that the program needs at least, according to the compiler; None if the compiler does not say.
    """

    needed: int | None


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Keeps programs out of JAX's persistent compilation cache, which cannot read those for absent devices back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile_or_shortage(traced: jax.stages.Traced, device: Device) -> jax.stages.Compiled | Shortage:
    """Returns the compiled program, or a `Shortage` if the devices have too little memory for it.

    Args:
      traced: program whose arguments have shardings, or whose mesh is in context.
      device: one of the devices for which it is traced.

    Raises:
      JaxRuntimeError: compilation fails for another reason.
    """
    try:
        with contextlib.nullcontext() if device.platform == "cpu" else _without_compilation_cache():
            return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Shortage(read_shortage(str(error))[0])
