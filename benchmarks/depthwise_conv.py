"""Times `depthwise_conv2d`, a sum of shifted products, against `jax.lax.conv_general_dilated` with a group per channel.

python benchmarks/depthwise_conv.py [--json FILE]
python benchmarks/depthwise_conv.py --tpu v5e       prints the TPU compiler's numbers for both; needs no TPU
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
import tyro

from benchmarks import measure, tpu_compiler
from sisma_jax.kernels import depthwise_conv2d

SHAPES = ((8, 32, 32, 768), (1, 32, 32, 1536))
DIRECTIONS = ("forward", "gradient")

Convolution: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""(x, kernel) -> y, with x and y of shape (B, H, W, D), kernel (KH, KW, D)."""


class Record(TypedDict):
    """The JSON record of one shape, the (B, H, W, D) of x, and one of `DIRECTIONS`."""

    shape: tuple[int, ...]
    direction: str
    results: list[measure.Result]


def lax_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `depthwise_conv2d` of x and kernel by XLA's convolution, which sums bfloat16 in float32 on a TPU."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None].astype(x.dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision="highest",
    )


def automatic_gradient(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `depthwise_conv2d` of x and kernel as a shifted sum that JAX differentiates, without a custom VJP."""
    height, width = x.shape[1:3]
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    terms = (
        padded[:, i : i + height, j : j + width].astype(jnp.float32) * kernel[i, j][None, None, None]
        for i, j in itertools.product(range(rows), range(columns))
    )
    return functools.reduce(jnp.add, terms).astype(x.dtype)


VARIANTS: dict[str, Convolution] = {
    "depthwise_conv2d": depthwise_conv2d,
    "shifted sum, automatic gradient": automatic_gradient,
    "conv_general_dilated": lax_convolution,
}


def directed(
    function: Convolution, direction: str
) -> Convolution | Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns `function` itself, or the function (x, kernel, cotangent) -> (gradient of x, gradient of kernel).

    Args:
      function: one of `VARIANTS`.
      direction: one of `DIRECTIONS`.
    """
    if direction == "forward":
        return function

    def gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(function, x, kernel)[1](cotangent)

    return gradient


def measure_here(repeats: int) -> list[Record]:
    """Times all variants on this machine, prints a table for each shape and direction, and returns the records.

    Args:
      repeats: number of rounds, as in `measure.measure`.
    """
    records: list[Record] = []
    for shape, direction in itertools.product(SHAPES, DIRECTIONS):
        x, cotangent = jax.random.normal(jax.random.key(0), (2, *shape))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1]))
        arrays = (x, kernel) if direction == "forward" else (x, kernel, cotangent)
        candidates = [
            measure.compiled_candidate(name, directed(function, direction), *arrays, group="convolution")
            for name, function in VARIANTS.items()
        ]
        # The variants sum in float32 in different orders: nine products, or all positions of the images.
        results = measure.measure(candidates, repeats, budget_secs=60.0, tolerance=1e-4)
        rows = [
            [result["name"], *measure.milliseconds(result), measure.mebibytes(result["temporary_bytes"])]
            for result in results
        ]
        measure.print_table(f"{shape} float32, 3x3, {direction}", ["", "ms", "quartiles", "temp MiB"], rows)
        records.append({"shape": shape, "direction": direction, "results": results})
    return records


def compile_for_tpu(chip: str) -> list[tpu_compiler.ProgramsRecord]:
    """Compiles all variants for a TPU, prints a table for each dtype, shape and direction, and returns the records.

    Args:
      chip: as for `tpu_compiler.device`.
    """
    device = tpu_compiler.device(chip)
    records = []
    for dtype, shape, direction in itertools.product(("bfloat16", "float32"), SHAPES, DIRECTIONS):
        x, kernel = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((3, 3, shape[-1]), "float32")
        arguments = (x, kernel) if direction == "forward" else (x, kernel, x)
        programs = {
            name: tpu_compiler.analyse(device, directed(function, direction), *arguments)
            for name, function in VARIANTS.items()
        }
        records.append(tpu_compiler.print_programs(f"{chip}, {shape} {dtype}, 3x3, {direction}", programs))
    return records


def main(tpu: str | None = None, repeats: int = 9, json: Path | None = None) -> None:
    """Times the convolution on this machine or, with --tpu, compiles it for a TPU.

    Args:
      tpu: v5e, v5p or v6e.
      repeats: number of rounds; each round runs every variant once.
      json: file for all samples, or for the compiler's numbers.
    """
    records = compile_for_tpu(tpu) if tpu else measure_here(repeats)
    if json:
        measure.write_json(json, "depthwise_conv", settings={"tpu": tpu, "repeats": repeats}, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
