"""Times the eight serpentine orders, to a sequence and back, as index gathers and as flips and transposes.

    python benchmarks/scan_orders.py [--json FILE]
    python benchmarks/scan_orders.py --tpu v5e          what the TPU's compiler says of both, without a TPU

Flips leave out the reverse of a path, since the scan itself can run backwards.
Between there and back the sequence is held in memory, as a scan would want it.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

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


def project(order: ScanOrder, x: jax.Array) -> jax.Array:
    """There and back as the project does it: gathers whose gradients are the inverse gathers."""
    height, width = x.shape[1:3]
    path = order.path(height, width)
    return path.to_grid(jax.lax.optimization_barrier(path.to_sequence(x)), height, width)


def flips(order: ScanOrder, x: jax.Array) -> jax.Array:
    """There and back by choosing, in each line, between the line and its flip."""

    def serpentine(x):
        flipped = np.arange(x.shape[1]) % 2 == (order.flip == "odd")
        return jnp.where(flipped[None, :, None, None], x[:, :, ::-1], x)

    return _there_and_back(order, serpentine, x)


def split(order: ScanOrder, x: jax.Array) -> jax.Array:
    """There and back by flipping every other line alone, in place of choosing between a line and its flip."""

    def serpentine(x):
        batch, lines, length, channels = x.shape
        even, odd = jnp.unstack(x.reshape(batch, lines // 2, 2, length, channels), axis=2)
        if order.flip == "odd":
            odd = odd[:, :, ::-1]
        else:
            even = even[:, :, ::-1]
        return jnp.stack([even, odd], axis=2).reshape(x.shape)

    return _there_and_back(order, serpentine, x)


def product(order: ScanOrder, x: jax.Array) -> jax.Array:
    """There and back by a matrix product of each line with the identity or its mirror image, for the matrix units."""

    def serpentine(x):
        lines, length = x.shape[1:3]
        flipped = np.arange(lines) % 2 == (order.flip == "odd")
        mirrors = np.where(flipped[:, None, None], np.eye(length)[::-1], np.eye(length))
        # Exact: a sum of one value and zeros, if the product takes all of a float32.
        return jnp.einsum("lij,bljd->blid", jnp.asarray(mirrors, x.dtype), x, precision="highest")

    return _there_and_back(order, serpentine, x)


def _there_and_back(order: ScanOrder, serpentine: Callable, x: jax.Array) -> jax.Array:
    turned = x if order.lines == "rows" else x.swapaxes(1, 2)
    sequence = serpentine(turned).reshape(x.shape[0], -1, x.shape[3])
    back = serpentine(jax.lax.optimization_barrier(sequence).reshape(turned.shape))
    return back if order.lines == "rows" else back.swapaxes(1, 2)


def take(order: ScanOrder, x: jax.Array) -> jax.Array:
    """There and back by `jnp.take`, whose gradient is a scatter-add."""
    path = order.path(*x.shape[1:3])
    sequence = jnp.take(x.reshape(x.shape[0], -1, x.shape[3]), path.tokens, axis=1)
    return jnp.take(jax.lax.optimization_barrier(sequence), path.places, axis=1).reshape(x.shape)


VARIANTS = {
    "gathers both ways (the project)": project,
    "flips and transposes": flips,
    "every other line flipped": split,
    "product with mirror matrices": product,
    "jnp.take": take,
}


def directed(function: Callable, order: ScanOrder, direction: str) -> Callable:
    """`function` of x in one order or, of x and a cotangent, its gradient."""
    if direction == "forward":
        return functools.partial(function, order)
    return lambda x, cotangent: jax.vjp(functools.partial(function, order), x)[1](cotangent)[0]


def all_orders(function: Callable, lines: str, direction: str, *arrays: jax.Array) -> Callable:
    """A run of `function` in the four orders along `lines`, one after another."""
    orders = [order for order in ORDERS["interleaved"] if order.lines == lines]
    compiled = [jax.jit(directed(function, order, direction)).lower(*arrays).compile() for order in orders]
    return lambda: [jax.block_until_ready(run(*arrays)) for run in compiled]


def measure_here(repeats: int) -> list[dict]:
    records = []
    for shape, direction, lines in itertools.product(SHAPES, DIRECTIONS, LINES):
        arrays = jax.random.normal(jax.random.key(0), (1 if direction == "forward" else 2, *shape))
        candidates = [
            measure.Candidate(name, all_orders(function, lines, direction, *arrays), group="there and back")
            for name, function in VARIANTS.items()
        ]
        results = measure.measure(candidates, repeats, budget_secs=60.0, tolerance=0.0)
        rows = [[result["name"], *measure.milliseconds(result)] for result in results]
        title = f"{shape} float32, the four orders along {lines}, {direction}"
        measure.print_table(title, ["", "ms", "quartiles"], rows)
        records.append({"shape": shape, "lines": lines, "direction": direction, "results": results})
    return records


def compile_for_tpu(chip: str) -> list[dict]:
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


def main(tpu: str | None = None, repeats: int = 9, json: Path | None = None):
    """Times the orders here or, with --tpu, compiles them.

    Args:
      tpu: v5e, v5p or v6e.
      repeats: rounds in which every variant has a turn.
      json: the file for all samples, or all the compiler says.
    """
    records = compile_for_tpu(tpu) if tpu else measure_here(repeats)
    if json:
        measure.write_json(json, "scan_orders", settings={"tpu": tpu, "repeats": repeats}, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
