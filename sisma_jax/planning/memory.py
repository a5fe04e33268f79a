"""Bytes per device: of the training state, exactly, and of a compiled program, as its compiler counts them."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from sisma_jax.parallel.topology import read_shortage
from sisma_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """The training state on each device; `optimizer` is mostly Adam's two moments."""

    parameters: int
    ema: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.ema + self.optimizer


def state_bytes(state: TrainState) -> StateBytes:
    """Returns the bytes on a device, of arrays or of shapes with shardings."""
    return StateBytes(*(bytes_per_device(part) for part in (state.params, state.ema, state.opt_state)))


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of the arrays' shards on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a program runs.

    Attributes:
      arguments: among them the state, which is donated: results reuse its buffers.
      outputs: results in buffers of their own.
      temporaries: all that lives in between, activations foremost.
      code: the program itself; on TPUs it is in the same memory.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


def read_memory(compiled: jax.stages.Compiled) -> Memory:
    """Returns the compiler's account of a program."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Shortage:
    """A program that the compiler refuses for want of memory; `needed` is what it says that it would take at least."""

    needed: int | None


@contextlib.contextmanager
def _nothing_cached() -> Iterator[None]:
    """JAX's cache of compiled programs would keep those for absent chips, and fail to read them."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile_or_shortage(traced: jax.stages.Traced, device: jax.Device) -> jax.stages.Compiled | Shortage:
    """Returns the program compiled for devices of this kind, or that there is not the memory for it."""
    try:
        with contextlib.nullcontext() if device.platform == "cpu" else _nothing_cached():
            return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Shortage(read_shortage(str(error))[0])
