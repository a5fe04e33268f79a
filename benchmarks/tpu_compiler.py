"""Compiles programs for a TPU that need not be present: `libtpu` contains the compiler, and JAX describes the chip.

    make tpu-compiler

The compiler's numbers of bytes, operations and memory are those of the program that a TPU would run. Its time is an
estimate by which it chooses between programs, not a measurement, and it does not cover Pallas kernels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypedDict

import jax

from benchmarks import measure
from sisma_jax.parallel.topology import tpu_devices

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]  jaxlib has no type stubs


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiler's numbers for a program on one chip.

    Attributes:
      bytes_accessed: sum over all operations; an operation in the body of a loop is counted once.
      flops: counted in the same way.
      estimated_secs: None if the compiler has no estimate for one of the operations.
      temporary_bytes: peak memory in addition to arguments and results.
    """

    bytes_accessed: float
    flops: float
    estimated_secs: float | None
    temporary_bytes: int


class ProgramsRecord(TypedDict):
    """The JSON record of a table of programs; `programs` maps names to the fields of `Program`."""

    title: str
    programs: dict[str, dict[str, Any]]


def device(chip: str = "v5e") -> Device:
    """Returns one chip of a TPU that need not be present.

    Args:
      chip: a key of `TOPOLOGIES`.

    Raises:
      InputError: libtpu is not installed.
    """
    return tpu_devices(TOPOLOGIES[chip])[0]


def compile_for(device: Device, function: Callable[..., Any], *shapes: Any) -> jax.stages.Compiled:
    """Returns `function` under `jax.jit`, compiled for one device.

    Args:
      device: as returned by `device`.
      function: maps trees of arrays to a tree of arrays.
      shapes: the arguments, as trees of `jax.ShapeDtypeStruct`.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return jax.jit(function).lower(*arguments).compile()


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the peak memory of a program in addition to its arguments and results.

    Raises:
      RuntimeError: the compiler does not report it.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("the compiler does not report the memory of its programs")
    return memory.temp_size_in_bytes


def analyse(device: Device, function: Callable[..., Any], *shapes: Any) -> Program:
    """Returns the compiler's numbers for a function; arguments and errors as for `compile_for`.

    Raises:
      RuntimeError: the compiler does not report memory or cost.
    """
    compiled = compile_for(device, function, *shapes)
    cost = compiled.cost_analysis()
    if cost is None:
        raise RuntimeError("the compiler does not report the cost of its programs")
    secs = cost.get("optimal_seconds", -1.0)  # the sum over operations; negative if one of them has no estimate
    return Program(
        bytes_accessed=cost.get("bytes accessed", 0.0),
        flops=cost.get("flops", 0.0),
        estimated_secs=secs if secs > 0 else None,
        temporary_bytes=temporary_bytes(compiled),
    )


def print_programs(title: str, programs: Mapping[str, Program]) -> ProgramsRecord:
    """Prints a table with one row per program and returns it as a JSON record.

    Args:
      title: the line above the table.
      programs: by the name in the first column.
    """
    rows = [
        [
            name,
            measure.mebibytes(program.bytes_accessed),
            f"{program.flops / 1e6:.1f}",
            "-" if program.estimated_secs is None else f"{1e6 * program.estimated_secs:.0f}",
            measure.mebibytes(program.temporary_bytes),
        ]
        for name, program in programs.items()
    ]
    measure.print_table(title, ["", "MiB accessed", "MFLOP", "estimated µs", "temp MiB"], rows)
    return {"title": title, "programs": {name: dataclasses.asdict(program) for name, program in programs.items()}}
