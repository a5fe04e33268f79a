"""Compiles for a TPU without one: `libtpu` brings the compiler, and JAX describes the chip to it.

    make tpu-compiler

What the compiler says of bytes, operations and memory is about the program that would run. Its seconds are an estimate
by which it chooses among programs, not a measurement, and it does not see inside Pallas kernels.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax

from benchmarks import measure
from sisma_jax.parallel.topology import tpu_devices

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of a program for one chip.

    Attributes:
      bytes_accessed: by all operations, each counted alone; those in a loop's body once.
      estimated_secs: None where an operation has no estimate.
    """

    bytes_accessed: float
    flops: float
    estimated_secs: float | None
    temporary_bytes: int


def device(chip: str = "v5e"):
    """Returns one chip of a TPU that need not be present; raises InputError without libtpu."""
    return tpu_devices(TOPOLOGIES[chip])[0]


def compile_for(device, function: Callable, *shapes: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """`function` under `jax.jit`, compiled for one chip and arguments of these shapes."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return jax.jit(function).lower(*arguments).compile()


def analyse(device, function: Callable, *shapes: jax.ShapeDtypeStruct) -> Program:
    """Returns the compiler's account of `function` at these shapes."""
    compiled = compile_for(device, function, *shapes)
    cost = compiled.cost_analysis()
    secs = cost.get("optimal_seconds", -1.0)  # the sum over operations, -1 for one without an estimate
    return Program(
        bytes_accessed=cost.get("bytes accessed", 0.0),
        flops=cost.get("flops", 0.0),
        estimated_secs=secs if secs > 0 else None,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )


def print_programs(title: str, programs: Mapping[str, Program]) -> dict:
    """Prints a row for each program, and returns them as a JSON record."""
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
