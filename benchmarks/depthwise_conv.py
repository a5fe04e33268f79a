"""Times `depthwise_conv2d`, a sum of shifted products, against `jax.lax.conv_general_dilated` with a group per channel.

python benchmarks/depthwise_conv.py [--json FILE]
python benchmarks/depthwise_conv.py --tpu v5e       what the TPU's compiler says of both, without a TPU
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import tyro

from benchmarks import measure, tpu_compiler
from sisma_jax.kernels import depthwise_conv2d

SHAPES = ((8, 32, 32, 768), (1, 32, 32, 1536))
DIRECTIONS = ("forward", "gradient")


def lax_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same by XLA's convolution, which on a TPU adds bfloat16 products in float32 by itself."""
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
    """The shifted sum of `depthwise_conv2d` with the gradient that JAX derives, in place of a loop over rows."""
    height, width = x.shape[1:3]
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    terms = (
        padded[:, i : i + height, j : j + width].astype(jnp.float32) * kernel[i, j][None, None, None]
        for i, j in itertools.product(range(rows), range(columns))
    )
    return functools.reduce(jnp.add, terms).astype(x.dtype)


VARIANTS = {
    "depthwise_conv2d": depthwise_conv2d,
    "shifted sum, automatic gradient": automatic_gradient,
    "conv_general_dilated": lax_convolution,
}


def directed(function: Callable, direction: str) -> Callable:
    """`function` of (x, kernel) or, of those and a cotangent, its two gradients."""
    if direction == "forward":
        return function
    return lambda x, kernel, cotangent: jax.vjp(function, x, kernel)[1](cotangent)


def measure_here(repeats: int) -> list[dict]:
    records = []
    for shape, direction in itertools.product(SHAPES, DIRECTIONS):
        x, cotangent = jax.random.normal(jax.random.key(0), (2, *shape))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1]))
        arrays = (x, kernel) if direction == "forward" else (x, kernel, cotangent)
        candidates = [
            measure.compiled_candidate(name, directed(function, direction), *arrays, group="convolution")
            for name, function in VARIANTS.items()
        ]
        # Float32 sums of nine products, or of all positions of the images, in another order.
        results = measure.measure(candidates, repeats, budget_secs=60.0, tolerance=1e-4)
        rows = [
            [result["name"], *measure.milliseconds(result), measure.mebibytes(result["temporary_bytes"])]
            for result in results
        ]
        measure.print_table(f"{shape} float32, 3x3, {direction}", ["", "ms", "quartiles", "temp MiB"], rows)
        records.append({"shape": shape, "direction": direction, "results": results})
    return records


def compile_for_tpu(chip: str) -> list[dict]:
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


def main(tpu: str | None = None, repeats: int = 9, json: Path | None = None):
    """Times the convolution here or, with --tpu, compiles it.

    Args:
      tpu: v5e, v5p or v6e.
      repeats: rounds in which every variant has a turn.
      json: the file for all samples, or all the compiler says.
    """
    records = compile_for_tpu(tpu) if tpu else measure_here(repeats)
    if json:
        measure.write_json(json, "depthwise_conv", settings={"tpu": tpu, "repeats": repeats}, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
