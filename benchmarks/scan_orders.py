"""Times the eight serpentine orders, from grid to sequence and back, as index gathers and as flips and transposes.

    python benchmarks/scan_orders.py [--json FILE]
    python benchmarks/scan_orders.py --tpu v5e          prints the TPU compiler's numbers for all variants; needs no TPU

The variants with flips do not reverse a path, since the scan itself can run backwards. An optimization barrier between
the two directions makes XLA write the sequence to memory, as a scan requires.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import measure, tpu_compiler
from sisma_jax.models.scan_orders import ORDERS, ScanOrder

SHAPES = ((8, 32, 32, 768), (1, 32, 32, 1536))
LINES = ("rows", "columns")
DIRECTIONS = ("forward", "gradient")

RoundTrip: TypeAlias = Callable[[ScanOrder, jax.Array], jax.Array]
"""(order, x) -> x, by way of the sequence; x has the shape (B, H, W, D)."""


class Record(TypedDict):
    """The JSON record of one shape, the (B, H, W, D) of x, with one of `LINES` and one of `DIRECTIONS`."""

    shape: tuple[int, ...]
    lines: str
    direction: str
    results: list[measure.Result]


def project(order: ScanOrder, x: jax.Array) -> jax.Array:
    """Returns x after the round trip as the model does it: gathers whose gradients are the inverse gathers."""
    height, width = x.shape[1:3]
    path = order.path(height, width)
    return path.to_grid(jax.lax.optimization_barrier(path.to_sequence(x)), height, width)


def flips(order: ScanOrder, x: jax.Array) -> jax.Array:
    """Returns x after a round trip that selects, for each line, the line or its flip."""

    def serpentine(x: jax.Array) -> jax.Array:
        flipped = np.arange(x.shape[1]) % 2 == (order.flip == "odd")
        return jnp.where(flipped[None, :, None, None], x[:, :, ::-1], x)

    return _round_trip(order, serpentine, x)


def split(order: ScanOrder, x: jax.Array) -> jax.Array:
    """Returns x after a round trip that flips every other line, without computing the flips of the others."""

    def serpentine(x: jax.Array) -> jax.Array:
        batch, lines, length, channels = x.shape
        even, odd = jnp.unstack(x.reshape(batch, lines // 2, 2, length, channels), axis=2)
        if order.flip == "odd":
            odd = odd[:, :, ::-1]
        else:
            even = even[:, :, ::-1]
        return jnp.stack([even, odd], axis=2).reshape(x.shape)

    return _round_trip(order, serpentine, x)


def product(order: ScanOrder, x: jax.Array) -> jax.Array:
    """Returns x after a round trip that multiplies each line by the identity or its mirror image, on matrix units."""

    def serpentine(x: jax.Array) -> jax.Array:
        lines, length = x.shape[1:3]
        flipped = np.arange(lines) % 2 == (order.flip == "odd")
        mirrors = np.where(flipped[:, None, None], np.eye(length)[::-1], np.eye(length))
        # The sum of one value and zeros is exact, if the product does not truncate float32.
        return jnp.einsum("lij,bljd->blid", jnp.asarray(mirrors, x.dtype), x, precision="highest")

    return _round_trip(order, serpentine, x)


def _round_trip(order: ScanOrder, serpentine: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    turned = x if order.lines == "rows" else x.swapaxes(1, 2)
    sequence = serpentine(turned).reshape(x.shape[0], -1, x.shape[3])
    back = serpentine(jax.lax.optimization_barrier(sequence).reshape(turned.shape))
    return back if order.lines == "rows" else back.swapaxes(1, 2)


def take(order: ScanOrder, x: jax.Array) -> jax.Array:
    """Returns x after a round trip by `jnp.take`, whose gradient is a scatter-add."""
    path = order.path(*x.shape[1:3])
    sequence = jnp.take(x.reshape(x.shape[0], -1, x.shape[3]), path.tokens, axis=1)
    return jnp.take(jax.lax.optimization_barrier(sequence), path.places, axis=1).reshape(x.shape)


VARIANTS: dict[str, RoundTrip] = {
    "gathers both ways (the model's)": project,
    "flips and transposes": flips,
    "every other line flipped": split,
    "product with mirror matrices": product,
    "jnp.take": take,
}


def directed(function: RoundTrip, order: ScanOrder, direction: str) -> Callable[..., jax.Array]:
    """Returns the function x -> y for one order, or the function (x, cotangent) -> gradient of x.

    Args:
      function: one of `VARIANTS`.
      order: the path over the grid.
      direction: one of `DIRECTIONS`.
    """
    if direction == "forward":
        return functools.partial(function, order)

    def gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.vjp(functools.partial(function, order), x)[1](cotangent)[0]

    return gradient


def all_orders(function: RoundTrip, lines: str, direction: str, *arrays: jax.Array) -> Callable[[], list[jax.Array]]:
    """Returns a run of `function` with the four orders along `lines`, one after another.

    Args:
      function: one of `VARIANTS`.
      lines: one of `LINES`.
      direction: one of `DIRECTIONS`.
      arrays: arguments of `directed(function, ...)`.
    """
    orders = [order for order in ORDERS["interleaved"] if order.lines == lines]
    compiled = [jax.jit(directed(function, order, direction)).lower(*arrays).compile() for order in orders]
    return lambda: [jax.block_until_ready(run(*arrays)) for run in compiled]


def measure_here(repeats: int) -> list[Record]:
    """Times all variants on this machine, prints a table for each shape, direction and axis, and returns the records.

    Args:
      repeats: number of rounds, as in `measure.measure`.
    """
    records: list[Record] = []
    for shape, direction, lines in itertools.product(SHAPES, DIRECTIONS, LINES):
        arrays = jax.random.normal(jax.random.key(0), (1 if direction == "forward" else 2, *shape))
        candidates = [
            measure.Candidate(name, all_orders(function, lines, direction, *arrays), group="round trip")
            for name, function in VARIANTS.items()
        ]
        results = measure.measure(candidates, repeats, budget_secs=60.0, tolerance=0.0)
        rows = [[result["name"], *measure.milliseconds(result)] for result in results]
        title = f"{shape} float32, the four orders along {lines}, {direction}"
        measure.print_table(title, ["", "ms", "quartiles"], rows)
        records.append({"shape": shape, "lines": lines, "direction": direction, "results": results})
    return records


def compile_for_tpu(chip: str) -> list[tpu_compiler.ProgramsRecord]:
    """Compiles all variants for a TPU, prints a table for each dtype, shape, direction and axis; returns the records.

    Args:
      chip: as for `tpu_compiler.device`.
    """
    device = tpu_compiler.device(chip)
    records = []
    for dtype, shape, direction, lines in itertools.product(("bfloat16", "float32"), SHAPES, DIRECTIONS, LINES):
        order = next(order for order in ORDERS["interleaved"] if order.lines == lines)
        x = jax.ShapeDtypeStruct(shape, dtype)
        programs = {
            name: tpu_compiler.analyse(
                device, directed(function, order, direction), *[x] * (1 if direction == "forward" else 2)
            )
            for name, function in VARIANTS.items()
        }
        title = f"{chip}, {shape} {dtype}, one order along {lines}, {direction}"
        records.append(tpu_compiler.print_programs(title, programs))
    return records


def main(tpu: str | None = None, repeats: int = 9, json: Path | None = None) -> None:
    """Times the orders on this machine or, with --tpu, compiles them for a TPU.

    Args:
      tpu: v5e, v5p or v6e.
      repeats: number of rounds; each round runs every variant once.
      json: file for all samples, or for the compiler's numbers.
    """
    records = compile_for_tpu(tpu) if tpu else measure_here(repeats)
    if json:
        measure.write_json(json, "scan_orders", settings={"tpu": tpu, "repeats": repeats}, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
