"""Checks that the kernels compute what they should at the sizes of the models, forward and backward."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device_checks import scan_cases
from benchmarks.device_checks.rows import Row, reason
from benchmarks.device_checks.scan_cases import DTYPES, Arrays, ScanCase
from sisma_jax.kernels import depthwise_conv2d, selective_scan
from sisma_jax.kernels.selective_scan import api
from sisma_jax.models.scan_orders import ORDERS, ScanPath

VALUES, GRADIENTS = "values", "gradients"
TOLERANCES = {
    # Everything is computed in float32, which rounds to 6e-8. A state sums a few hundred steps, because the initial
    # step sizes are small; gradients of parameters sum over all tokens. Hardware exponentials add two units in the last
    # place per step.
    ("float32", VALUES): 2e-5,
    ("float32", GRADIENTS): 1e-4,
    # The same, and results are rounded to bfloat16, to 2^-8 of themselves. The gradient of u is rounded up to three
    # times, as it adds those of the recurrence and of the skip.
    ("bfloat16", VALUES): 2**-8 + 2e-5,
    ("bfloat16", GRADIENTS): 3 * 2**-8 + 1e-4,
}
"""By dtype of the sequences: the largest accepted error of an array, relative to its largest magnitude."""


def relative_errors(computed: Mapping[str, jax.Array], wanted: Arrays) -> dict[str, float]:
    """Returns the largest error of each array relative to the array's largest magnitude; infinity for NaN.

    Args:
      computed: arrays by name.
      wanted: the right values by the same names.

    Raises:
      ValueError: an array is missing or has another shape.
    """
    errors = {}
    for name, right in wanted.items():
        got = np.asarray(computed[name], np.float64) if name in computed else None
        if got is None or got.shape != right.shape:
            raise ValueError(f"{name}: got shape {None if got is None else got.shape}, want {right.shape}")
        scale = max(float(np.max(np.abs(right))), float(np.finfo(np.float32).tiny))
        error = float(np.max(np.abs(got - right))) / scale
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def judged(
    name: str, implementation: str, dtype: str, run: Callable[[], Mapping[str, jax.Array]], wanted: Arrays
) -> Row:
    """Returns the row of one comparison; an error of `run` is a failure.

    Args:
      name: of the row.
      implementation: what is checked.
      dtype: of the sequences, which selects the tolerances.
      run: computes the results.
      wanted: the right values.
    """
    cells = {"implementation": implementation, "dtype": dtype}
    try:
        computed = run()
        errors = relative_errors(computed, wanted)
        repeats = run()
    except Exception as error:  # a kernel that does not compile is a result, too
        return Row(name, "FAIL", cells, reason(error), {**cells, "errors": None})
    tolerances = {array: TOLERANCES[dtype, GRADIENTS if array.startswith("d ") else VALUES] for array in errors}
    worst = max(errors, key=lambda array: errors[array] / tolerances[array])
    cells |= {"error": f"{errors[worst]:.1e}", "tolerance": f"{tolerances[worst]:.1e}", "worst": worst}
    same_bits = all(np.array_equal(np.asarray(computed[array]), np.asarray(repeats[array])) for array in errors)
    note = "" if same_bits else "a second run gave other bits"
    # The Pallas kernels promise the same bits. XLA's reductions need not give them on every platform.
    is_right = errors[worst] <= tolerances[worst] and (same_bits or implementation not in api.SUPPORT_CHECKS)
    record = {"implementation": implementation, "dtype": dtype, "errors": errors, "tolerances": tolerances}
    return Row(name, "pass" if is_right else "FAIL", cells, note, record | {"same_bits": same_bits})


def scan_rows(case: ScanCase, implementations: Sequence[str], dtypes: Sequence[str] = DTYPES) -> Iterator[Row]:
    """Yields a row per implementation and dtype for the values and every gradient of a scan.

    Args:
      case: the problem.
      implementations: names for `selective_scan`.
      dtypes: of the sequences.
    """
    inputs, cotangents = case.inputs(), case.cotangents()
    wanted = scan_cases.expected(inputs, cotangents, case.reverse)
    for dtype in dtypes:
        arguments = scan_cases.on_device(inputs, dtype), scan_cases.on_device(cotangents, dtype)
        for implementation in implementations:
            compute = functools.partial(scan_cases.results, reverse=case.reverse, implementation=implementation)
            yield judged(str(case), implementation, dtype, functools.partial(jax.jit(compute), *arguments), wanted)


def order_rows(side: int, d_inner: int, implementation: str) -> Iterator[Row]:
    """Yields a row for each scan order of the denoiser: tokens of a grid are reordered, scanned, and put back.

    Args:
      side: of the token grid.
      d_inner: channels.
      implementation: name for `selective_scan`.
    """
    case, dtype = ScanCase(1, side * side, d_inner), "float32"
    inputs, cotangents = case.inputs(), case.cotangents()
    tokenwise = ("u", "delta", "B", "C")

    def grid(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x.reshape(1, side, side, -1), dtype)

    @jax.jit
    def ordered(path: ScanPath, grids: dict[str, jax.Array], dy: jax.Array) -> dict[str, jax.Array]:
        def scan(grids: dict[str, jax.Array]) -> jax.Array:
            sequences: dict[str, Any] = {name: path.to_sequence(x) for name, x in grids.items()}
            y = selective_scan(**sequences, **parameters, delta_softplus=True, implementation=implementation)
            return path.to_grid(y, side, side)

        y, vjp = jax.vjp(scan, grids)
        return {"y": y} | {f"d {name}": x for name, x in vjp(dy)[0].items()}

    parameters: dict[str, Any] = {name: jnp.asarray(x, dtype) for name, x in inputs.items() if name not in tokenwise}
    grids = {name: grid(inputs[name]) for name in tokenwise}
    for order in ORDERS["interleaved"]:
        path = order.path(side, side)
        # NumPy reorders the tokens for the reference, whose final state has no cotangent here.
        ordered_inputs = inputs | {name: inputs[name][:, path.tokens] for name in tokenwise}
        ordered_cotangents = {"y": cotangents["y"][:, path.tokens], "final_state": 0 * cotangents["final_state"]}
        right = scan_cases.expected(ordered_inputs, ordered_cotangents, reverse=False)
        names = ("y", *(f"d {name}" for name in tokenwise))
        wanted = {name: right[name][:, path.places].reshape(1, side, side, -1) for name in names}
        direction = "backwards" if order.reverse else "forwards"
        name = f"order {side}x{side}x{d_inner}: {order.lines}, {order.flip} flipped, {direction}"
        device_path = jax.tree.map(jnp.asarray, path)
        yield judged(
            name, implementation, dtype, functools.partial(ordered, device_path, grids, grid(cotangents["y"])), wanted
        )


def convolution_rows(batch: int, side: int, channels: int) -> Iterator[Row]:
    """Yields a row per dtype for the values and gradients of the depthwise 3x3 convolution.

    Args:
      batch: number of images.
      side: of the token grid.
      channels: of the image.
    """
    rng = np.random.default_rng(0)
    shape = (batch, side, side, channels)
    x, dy = (scan_cases.rounded(rng.standard_normal(shape), "bfloat16") for _ in range(2))
    kernel = scan_cases.rounded(rng.uniform(-1 / 3, 1 / 3, (3, 3, channels)), "bfloat16")
    wanted = {"y": _correlate(x, kernel), "d x": _correlate(dy, kernel[::-1, ::-1])}
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    gradients = [(padded[:, i : i + side, j : j + side] * dy).sum(axis=(0, 1, 2)) for i in range(3) for j in range(3)]
    wanted["d kernel"] = np.reshape(gradients, kernel.shape)

    @jax.jit
    def compute(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> dict[str, jax.Array]:
        y, vjp = jax.vjp(depthwise_conv2d, x, kernel)
        return {"y": y} | dict(zip(("d x", "d kernel"), vjp(dy), strict=True))

    for dtype in DTYPES:
        arguments = (jnp.asarray(array, dtype) for array in (x, kernel, dy))
        name = f"convolution {batch}x{side}x{side}x{channels}"
        yield judged(name, "depthwise_conv2d", dtype, functools.partial(compute, *arguments), wanted)


def _correlate(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The correlation with a 3x3 kernel per channel, zero-padded to the same size, in float64."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros_like(x)
    for i in range(3):
        for j in range(3):
            y += padded[:, i : i + height, j : j + width] * kernel[i, j]
    return y
