"""Times the scan against its other implementations and against attention, and compares both with the roofline.

A sample is the time of several calls that are queued before the first one has finished, divided by their number, so
that the latency of a call does not hide the time of a short kernel.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.device_checks import scan_cases
from benchmarks.device_checks.peaks import PEAKS, Work, attention_work, roofline, scan_work
from benchmarks.device_checks.rows import Row, reason
from benchmarks.device_checks.scan_cases import ScanCase
from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import api

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")

SAMPLE_SECS = 0.02
MAX_CALLS = 32
# Results of implementations for the same inputs. `correctness.py` judges them; this is to not time a wrong result.
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A function to time.

    Attributes:
      name: in tables.
      function: maps arrays to arrays.
      arguments: on the default device.
      work: what it has to do at least.
      must_run: an error is a failure; otherwise the function is reported as not available.
      group: contenders of a group return the same values; "" means that they are not compared.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    work: Work
    must_run: bool = False
    group: str = ""


class Compiled:
    """A compiled contender, which has run once.

    Attributes:
      calls: per sample.
      temporary_bytes: peak memory in addition to arguments and results; None if the compiler does not report it.
      result: of the first call, if the contender has a group.

    Raises:
      MemoryError: the device does not have the memory that the program needs.
    """

    def __init__(self, contender: Contender):
        self._arguments = contender.arguments
        self._compiled = jax.jit(contender.function).lower(*contender.arguments).compile()
        memory = self._compiled.memory_analysis()
        self.temporary_bytes = None if memory is None else memory.temp_size_in_bytes
        if memory is not None:
            needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
            if needed > 0.8 * measure.available_bytes():
                raise MemoryError(f"needs {needed / 2**30:.1f} GiB")
        self.calls = 1
        result = self.run()
        self.result = result if contender.group else None
        start = time.perf_counter()
        self.run()
        self.calls = min(max(math.ceil(SAMPLE_SECS / (time.perf_counter() - start)), 1), MAX_CALLS)

    def run(self) -> Any:
        """Queues the calls of one sample, waits for them, and returns the result of the last one."""
        result = None
        for _ in range(self.calls):
            result = self._compiled(*self._arguments)
        return jax.block_until_ready(result)


def rows(case: ScanCase, dtype: str, direction: Direction, repeats: int, budget_secs: float) -> Iterator[Row]:
    """Yields a row per implementation of the scan and per attention that the platform has.

    Args:
      case: sizes of the scan. Attention has half as many channels as the scan, as a transformer has with the same
        channels per token.
      dtype: of the sequences.
      direction: one of `DIRECTIONS`.
      repeats: number of rounds; each round runs every contender once.
      budget_secs: a contender whose samples add up to more than this is left out of the remaining rounds.
    """
    backward = direction == "forward+backward"
    name = f"{case.batch}x{case.length}x{case.d_inner} {dtype} {direction}"
    contenders = _scans(case, dtype, backward) + _attentions(case, dtype, backward)
    compiled: dict[str, Compiled] = {}
    failed: dict[str, Row] = {}
    for contender in contenders:
        cells, record = {"candidate": contender.name}, {"candidate": contender.name}
        try:
            one = Compiled(contender)
        except Exception as error:  # whatever a compiler or a driver raises
            status = "FAIL" if contender.must_run else "skipped"
            failed[contender.name] = Row(name, status, cells, reason(error), record)
            continue
        first = next((compiled[other.name] for other in contenders if _same_group(other, contender, compiled)), one)
        error = float(_relative_error(one.result, first.result)) if contender.group else 0.0
        if error <= TOLERANCES[dtype]:
            compiled[contender.name] = one
        else:
            note = f"differs from the first implementation by {error:.1e}"
            failed[contender.name] = Row(name, "FAIL", cells, note, record)
    for one in compiled.values():
        one.result = None  # frees its memory
    samples = measure.round_robin({name: one.run for name, one in compiled.items()}, repeats, budget_secs)
    secs = {name: [total / compiled[name].calls for total in totals] for name, totals in samples.items()}
    medians = {name: statistics.median(each) for name, each in secs.items()}
    fastest_attention = min((m for name, m in medians.items() if name.startswith("attention")), default=None)
    for contender in contenders:
        if contender.name in failed:
            yield failed[contender.name]
            continue
        one, median = compiled[contender.name], medians[contender.name]
        bound = roofline(contender.work, jax.devices()[0].device_kind)
        low, high = np.percentile(secs[contender.name], [25, 75])
        associative = medians.get("associative")
        yield Row(
            name,
            "measured",
            {
                "candidate": contender.name,
                "ms": f"{1e3 * median:.3f}",
                "quartiles": f"{1e3 * low:.3f}-{1e3 * high:.3f}",
                "temp MiB": measure.mebibytes(one.temporary_bytes),
                "roofline": "-" if bound is None else f"{100 * bound['secs'] / median:.0f}%",
                "bound": "-" if bound is None else bound["bound"],
                "/associative": "-" if associative is None else f"{median / associative:.2f}",
                "/attention": "-" if fastest_attention is None else f"{median / fastest_attention:.2f}",
            },
            record={
                "problem": dataclasses.asdict(case) | {"dtype": dtype, "direction": direction},
                "candidate": contender.name,
                "median_secs": median,
                "samples_secs": secs[contender.name],
                "calls_per_sample": one.calls,
                "temporary_bytes": one.temporary_bytes,
                "work": dataclasses.asdict(contender.work),
                "roofline": bound,
            },
        )


@jax.jit
def _relative_error(result: Any, expected: Any) -> jax.Array:
    """`measure.relative_error` on the device, since the arrays are large; both trees have the same shapes."""

    def error(got: jax.Array, want: jax.Array) -> jax.Array:
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        return jnp.max(jnp.abs(got - want)) / jnp.maximum(jnp.max(jnp.abs(want)), jnp.finfo(jnp.float32).tiny)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(error, result, expected))))


def _same_group(other: Contender, contender: Contender, compiled: dict[str, Compiled]) -> bool:
    return bool(contender.group) and other.group == contender.group and other.name in compiled


def _directed(function: Callable[..., jax.Array], backward: bool) -> Callable[..., Any]:
    """The function itself, or the function (*arguments, cotangent) -> (value, gradients)."""
    if not backward:
        return function

    def value_and_gradients(*arguments: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        *inputs, cotangent = arguments
        value, vjp = jax.vjp(function, *inputs)
        return value, vjp(cotangent)

    return value_and_gradients


def _scans(case: ScanCase, dtype: str, backward: bool) -> list[Contender]:
    """The implementations of the scan, first "xla", with which the others are compared."""
    inputs = scan_cases.on_device(case.inputs(), dtype)
    arguments: tuple[Any, ...] = (inputs,)
    if backward:
        arguments += (scan_cases.on_device(case.cotangents(), dtype)["y"],)
    work = scan_work(case.batch, case.length, case.d_inner, case.d_state, jnp.dtype(dtype).itemsize, backward=backward)

    def scan(implementation: str, inputs: dict[str, Any]) -> jax.Array:
        return selective_scan(**inputs, delta_softplus=True, reverse=case.reverse, implementation=implementation)

    chosen = scan_cases.chosen_implementation(case, dtype)
    return [
        Contender(
            name,
            _directed(functools.partial(scan, name), backward),
            arguments,
            work,
            must_run=name == chosen,
            group="scan",
        )
        for name in dict.fromkeys(("xla", chosen, *api.kernels_for_device(), "associative"))
    ]


def _attentions(case: ScanCase, dtype: str, backward: bool) -> list[Contender]:
    """Softmax attention by the kernels of the platform, and by XLA."""
    channels = case.d_inner // 2
    # Heads of 128 channels fill the matrix units of a TPU. A diffusion transformer has heads of 64.
    head = 128 if jax.default_backend() == "tpu" and channels % 128 == 0 else min(64, channels)
    heads = channels // head
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (case.batch, case.length, heads, head)
    arguments = tuple(jax.random.normal(key, shape, dtype) for key in keys[: 4 if backward else 3])
    itemsize = jnp.dtype(dtype).itemsize
    work = attention_work(case.batch, case.length, channels, heads, itemsize, backward=backward)
    return [
        Contender(f"attention {name}, {heads}x{head}", _directed(function, backward), arguments, work)
        for name, function in _attention_functions(case.length).items()
    ]


def _attention_functions(length: int) -> dict[str, Callable[..., jax.Array]]:
    """By name, functions of query, key and value (batch, length, heads, channels) that this platform has."""
    attention = jax.nn.dot_product_attention
    functions: dict[str, Callable[..., jax.Array]] = {"xla": functools.partial(attention, implementation="xla")}
    match jax.default_backend():
        case "gpu":
            functions["cudnn"] = functools.partial(attention, implementation="cudnn")
        case "tpu":
            functions["flash"] = functools.partial(_tpu_flash, min(length, 512))
            functions["splash"] = functools.partial(_tpu_splash, min(length, 512))
        case _:
            pass
    return functions


def _tpu_flash(block: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    sizes = flash.BlockSizes(
        block_q=block,
        block_k_major=block,
        block_k=block,
        block_b=1,
        block_q_major_dkv=block,
        block_k_major_dkv=block,
        block_k_dkv=block,
        block_q_dkv=block,
        block_k_major_dq=block,
        block_k_dq=block,
        block_q_dq=block,
    )
    arrays = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    out = flash.flash_attention(*arrays, sm_scale=query.shape[-1] ** -0.5, block_sizes=sizes)
    return jnp.swapaxes(out, 1, 2)


def _tpu_splash(block: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads = query.shape[1:3]
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    everything = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, length))] * heads)
    kernel: Any = splash_attention_kernel.make_splash_mha(everything, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    return jnp.swapaxes(jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (query, key, value))), 1, 2)


def copy_row(repeats: int) -> Row:
    """Returns the measured bandwidth of a large copy beside that of the data sheet.

    Args:
      repeats: number of copies.
    """
    candidate = measure.copy_candidate()
    candidate.run()
    secs = statistics.median(measure.round_robin({"copy": candidate.run}, repeats)["copy"])
    rate, peaks = 2 * 4 * measure.COPIED_FLOATS / secs, PEAKS.get(jax.devices()[0].device_kind)
    share = "" if peaks is None else f", {100 * rate / peaks.num_bytes:.0f}% of the data sheet"
    return Row(
        "copy of 256 MiB, with the latency of a call",
        "measured",
        {"value": f"{rate / 1e9:.0f} GB/s{share}"},
        record={"secs": secs, "bytes_per_sec": rate},
    )


def latency_row(repeats: int) -> Row:
    """Returns the time of a call that computes almost nothing, from the host's call to its answer.

    Args:
      repeats: number of calls.
    """
    add, x = jax.jit(lambda x: x + 1), jnp.zeros(8)
    jax.block_until_ready(add(x))
    samples = measure.round_robin({"call": lambda: jax.block_until_ready(add(x))}, repeats)["call"]
    secs = statistics.median(samples)
    return Row("latency of a call", "measured", {"value": f"{1e6 * secs:.0f} µs"}, record={"secs": secs})
