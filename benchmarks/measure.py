"""Times functions side by side, says how far they are from what the machine allows, and writes tables and JSON.

A busy machine slows everything for a while. So functions take turns, A, B, C, A, B, C, and none is compared with
another that was measured at another time.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the functions that are measured side by side.

    Attributes:
      run: computes, and returns a tree of arrays once it is finished.
      group: candidates of one group compute the same thing; the group's first one says what.
      temporary_bytes: memory beside arguments and results at its peak, where the compiler tells.
      needed_bytes: all its memory, as far as known.
      skip: why it is not to be run, or "".
    """

    name: str
    run: Callable[[], Any]
    group: str = ""
    temporary_bytes: int | None = None
    needed_bytes: int = 0
    skip: str = ""


def compiled_candidate(name: str, function: Callable, *arguments, group: str = "") -> Candidate:
    """`function(*arguments)` under `jax.jit`, compiled here."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return Candidate(
        name,
        run=lambda: jax.block_until_ready(compiled(*arguments)),
        group=group,
        temporary_bytes=memory.temp_size_in_bytes,
        needed_bytes=memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes,
    )


def round_robin(
    runs: Mapping[str, Callable[[], Any]], repeats: int, budget_secs: float = 60.0, clock=time.perf_counter
) -> dict[str, list[float]]:
    """Returns each function's times in seconds, all of them run once in turn, `repeats` times over.

    A function that has used up `budget_secs` sits out the remaining rounds. Run each once before: compilation and first
    touches are not what is measured.
    """
    samples = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(samples[name]) > budget_secs:
                continue
            time.sleep(0.005)  # the threads of another library's pool spin for a moment after its work
            start = clock()
            run()
            samples[name].append(clock() - start)
    return samples


def relative_error(result: Any, expected: Any) -> float:
    """The largest error of any array in a tree, relative to that array's largest entry; NaN if there is one."""
    result, expected = jax.tree.leaves(result), jax.tree.leaves(expected)
    if [np.shape(x) for x in result] != [np.shape(x) for x in expected]:
        return float("inf")
    errors = []
    for got, want in zip(result, expected, strict=True):
        largest = np.max(np.abs(np.asarray(got) - np.asarray(want)))
        errors.append(largest / max(np.max(np.abs(want)), np.finfo(np.float32).tiny))
    return float(np.max(errors))


def measure(candidates: Sequence[Candidate], repeats: int, budget_secs: float, tolerance: float) -> list[dict]:
    """Returns a JSON-ready result for each candidate, once its value is seen to agree with its group's first.

    One whose first run takes longer than `budget_secs` is not run again: that run is its only sample.
    """
    runs, samples, skipped, expected = {}, {}, {}, {}
    for candidate in candidates:
        if reason := candidate.skip or _does_not_fit(candidate):
            skipped[candidate.name] = reason
            continue
        start = time.perf_counter()
        result = candidate.run()
        secs = time.perf_counter() - start
        error = relative_error(result, expected.setdefault(candidate.group, result)) if candidate.group else 0.0
        if not error <= tolerance:
            skipped[candidate.name] = f"wrong: relative error {error:.1e}"
        elif secs > budget_secs:
            samples[candidate.name] = [secs]
        else:
            runs[candidate.name] = candidate.run
    samples |= round_robin(runs, repeats, budget_secs)
    return [_result(candidate, samples.get(candidate.name), skipped.get(candidate.name)) for candidate in candidates]


def _does_not_fit(candidate: Candidate) -> str:
    fits = candidate.needed_bytes < 0.8 * available_bytes()
    return "" if fits else f"needs {candidate.needed_bytes / 2**30:.1f} GiB"


def available_bytes() -> int:
    """Memory that is available without swapping; where the system does not tell, all of it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _result(candidate: Candidate, samples: list[float] | None, skipped: str | None) -> dict:
    result = {"name": candidate.name, "temporary_bytes": candidate.temporary_bytes, "skipped": skipped}
    if samples is None:
        return result | {"median_secs": None, "quartiles_secs": None, "samples_secs": []}
    quartiles = np.percentile(samples, [25, 75]).tolist()
    return result | {
        "median_secs": statistics.median(samples),
        "quartiles_secs": quartiles,
        "samples_secs": samples,
    }


# The floor: no implementation moves its arguments and results, or takes its exponentials, faster than these do.

COPIED_FLOATS = 64 * 2**20  # 256 MiB: several times the largest cache
EXPONENTIALS_IN_CACHE = 2**18  # 1 MiB, shared by the cores


def copy_candidate() -> Candidate:
    """Reads and writes an array larger than any cache, in place: fresh pages would cost more than the copy.

    The added one makes XLA share the work among the cores, as it does not for a bare copy.
    """
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    holder = [jnp.zeros(COPIED_FLOATS)]

    def run():
        holder[0] = jax.block_until_ready(add_one(holder[0]))

    return Candidate("floor: copy", run)


def exponentials_candidate(count: int) -> Candidate:
    """Takes about `count` exponentials of an array that stays in cache."""
    x = jnp.full((EXPONENTIALS_IN_CACHE,), 0.5)
    rounds = _sweep_rounds(count)
    # x -> exp(-x) stays near 0.567, away from the slow paths for infinities and denormals.
    sweep = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, x: jnp.exp(-x), x))
    return Candidate("floor: exp", lambda: jax.block_until_ready(sweep(x)))


def _sweep_rounds(count: int) -> int:
    # At least 16M, some milliseconds: a shorter sweep would time the call.
    return -(-max(count, 2**24) // EXPONENTIALS_IN_CACHE)


def floor(moved_bytes: int, exponentials: int, results: Sequence[Mapping], swept: int) -> dict:
    """Returns the least time for so many bytes and exponentials, from the two candidates' results.

    Args:
      swept: the count that `exponentials_candidate` was asked for.
    """
    secs = {result["name"]: result["median_secs"] for result in results}
    bytes_per_sec = 2 * 4 * COPIED_FLOATS / secs["floor: copy"]
    exponentials_per_sec = _sweep_rounds(swept) * EXPONENTIALS_IN_CACHE / secs["floor: exp"]
    bytes_secs, exponentials_secs = moved_bytes / bytes_per_sec, exponentials / exponentials_per_sec
    return {
        "bytes": moved_bytes,
        "bytes_per_sec": bytes_per_sec,
        "bytes_secs": bytes_secs,
        "exponentials": exponentials,
        "exponentials_per_sec": exponentials_per_sec,
        "exponentials_secs": exponentials_secs,
        "secs": max(bytes_secs, exponentials_secs),
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]):
    """Prints columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip(), flush=True)


def milliseconds(result: Mapping) -> tuple[str, str]:
    """Median and quartiles in milliseconds, or why there are none."""
    if result["median_secs"] is None:
        return "-", result["skipped"]
    low, high = result["quartiles_secs"]
    return f"{1e3 * result['median_secs']:.1f}", f"{1e3 * low:.1f}-{1e3 * high:.1f}"


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


PACKAGES = ("jax", "jaxlib", "numpy", "torch", "mambapy", "transformers")


@functools.cache
def machine_facts() -> dict:
    """What the numbers depend on, beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path: str | Path, benchmark: str, **contents):
    """Writes {"benchmark", "machine", **contents}."""
    report = {"benchmark": benchmark, "machine": machine_facts(), **contents}
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
