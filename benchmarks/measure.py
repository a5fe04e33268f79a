"""Measures functions side by side, computes the lower bound that the machine sets, and writes tables and JSON.

Other work on a machine slows down everything for a while. The functions therefore run in turn (A, B, C, A, B, C), so
that the times that are compared were measured during the same period.
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
import sys
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
"""A tree whose leaves are JAX or NumPy arrays."""

Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the functions that are measured side by side.

    Attributes:
      name: label in tables and JSON; unique among the candidates of a call of `measure`.
      run: computes a tree of arrays and returns it once the computation has finished.
      group: candidates of one group must return the same values as the first candidate of the group; "" means no check.
      temporary_bytes: peak memory in addition to arguments and results; None if the compiler does not report it.
      needed_bytes: total memory of a run, as far as it is known.
      skip: the reason not to run the candidate, or "".
    """

    name: str
    run: Callable[[], PyTree]
    group: str = ""
    temporary_bytes: int | None = None
    needed_bytes: int = 0
    skip: str = ""


class Result(TypedDict):
    """The JSON record of a candidate. Without samples, the two times are None and `skipped` gives the reason."""

    name: str
    temporary_bytes: int | None
    skipped: str | None
    median_secs: float | None
    quartiles_secs: list[float] | None
    samples_secs: list[float]


class Floor(TypedDict):
    """The JSON record of a lower bound on the time; `secs` is the larger of `bytes_secs` and `exponentials_secs`."""

    bytes: int
    bytes_per_sec: float
    bytes_secs: float
    exponentials: int
    exponentials_per_sec: float
    exponentials_secs: float
    secs: float


class MachineFacts(TypedDict):
    """What the numbers depend on in addition to the code. `packages` has the installed versions; `date` is UTC."""

    cpu: str
    cores: int | None
    device: str
    backend: str
    python: str
    packages: dict[str, str]
    date: str


def compiled_candidate(name: str, function: Callable[..., PyTree], *arguments: PyTree, group: str = "") -> Candidate:
    """Returns a candidate that runs `function(*arguments)`, which is compiled here with `jax.jit`.

    Args:
      name: as `Candidate.name`.
      function: maps trees of arrays to a tree of arrays.
      arguments: the values for which the function is compiled and run.
      group: as `Candidate.group`.
    """
    compiled = jax.jit(function).lower(*arguments).compile()

    def run() -> PyTree:
        return jax.block_until_ready(compiled(*arguments))

    memory = compiled.memory_analysis()
    if memory is None:
        return Candidate(name, run, group)
    return Candidate(
        name,
        run,
        group,
        temporary_bytes=memory.temp_size_in_bytes,
        needed_bytes=memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes,
    )


def round_robin(
    runs: Mapping[Name, Callable[[], PyTree]],
    repeats: int,
    budget_secs: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Returns the times of each function in seconds. Each round runs every function once, in order.

    Run every function once before, so that compilation and first memory accesses are not measured.

    Args:
      runs: functions by name; each returns after its work has finished.
      repeats: number of rounds.
      budget_secs: a function whose times add up to more than this is left out of the remaining rounds.
      clock: returns the current time in seconds.
    """
    samples: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(samples[name]) > budget_secs:
                continue
            time.sleep(0.005)  # threads of another library's pool may spin for a moment after their work
            start = clock()
            run()
            samples[name].append(clock() - start)
    return samples


def relative_error(result: PyTree, expected: PyTree) -> float:
    """Returns the largest error of any array in a tree, relative to the largest magnitude in the expected array.

    Args:
      result: tree of arrays.
      expected: tree of arrays with the same leaves in the same order.

    Returns:
      The error; NaN if an array contains NaN, infinity if the shapes of the trees' leaves differ.
    """
    result, expected = jax.tree.leaves(result), jax.tree.leaves(expected)
    if [np.shape(x) for x in result] != [np.shape(x) for x in expected]:
        return float("inf")
    errors = []
    for got, want in zip(result, expected, strict=True):
        largest = np.max(np.abs(np.asarray(got) - np.asarray(want)))
        errors.append(largest / max(np.max(np.abs(want)), np.finfo(np.float32).tiny))
    return float(np.max(errors))


def measure(
    candidates: Sequence[Candidate],
    repeats: int,
    budget_secs: float,
    tolerance: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Returns a JSON-ready result for each candidate, in order.

    Each candidate is run once before the timed rounds. If its values differ from those of the first candidate of its
    group, or if it needs more memory than is available, it is not timed.

    Args:
      candidates: the functions to compare.
      repeats: number of timed rounds, as in `round_robin`.
      budget_secs: as in `round_robin`. A candidate whose first run takes longer is not run again; that run is its only
        sample.
      tolerance: the largest accepted `relative_error`.
      clock: as in `round_robin`.
    """
    runs: dict[str, Callable[[], PyTree]] = {}
    samples: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    expected: dict[str, PyTree] = {}
    for candidate in candidates:
        if reason := candidate.skip or _does_not_fit(candidate):
            skipped[candidate.name] = reason
            continue
        start = clock()
        result = candidate.run()
        secs = clock() - start
        error = relative_error(result, expected.setdefault(candidate.group, result)) if candidate.group else 0.0
        if not error <= tolerance:
            skipped[candidate.name] = f"wrong: relative error {error:.1e}"
        elif secs > budget_secs:
            samples[candidate.name] = [secs]
        else:
            runs[candidate.name] = candidate.run
    samples |= round_robin(runs, repeats, budget_secs, clock)
    return [_result(candidate, samples.get(candidate.name), skipped.get(candidate.name)) for candidate in candidates]


def _does_not_fit(candidate: Candidate) -> str:
    fits = candidate.needed_bytes < 0.8 * available_bytes()
    return "" if fits else f"needs {candidate.needed_bytes / 2**30:.1f} GiB"


def available_bytes() -> int:
    """Returns the memory of the device, or on a CPU the memory that is available without swapping, if it is reported.

    If it is not, the result is all memory of the machine.
    """
    stats = None if jax.default_backend() == "cpu" else jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _result(candidate: Candidate, samples: list[float] | None, skipped: str | None) -> Result:
    return {
        "name": candidate.name,
        "temporary_bytes": candidate.temporary_bytes,
        "skipped": skipped,
        "median_secs": None if samples is None else statistics.median(samples),
        "quartiles_secs": None if samples is None else np.percentile(samples, [25, 75]).tolist(),
        "samples_secs": [] if samples is None else samples,
    }


# The floor is a lower bound for all implementations: none moves its arguments and results faster than a large copy, and
# none computes its exponentials faster than a loop over an array in cache.

COPIED_FLOATS = 64 * 2**20  # 256 MiB, several times the largest cache
EXPONENTIALS_IN_CACHE = 2**18  # 1 MiB, shared by the cores


def copy_candidate() -> Candidate:
    """Returns a candidate that reads and writes an array larger than any cache.

    The array is donated, since the first access to new memory pages would cost more than the copy. The function adds
    one because XLA shares an addition among the cores but not a bare copy.
    """
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    holder = [jnp.zeros(COPIED_FLOATS)]

    def run() -> None:
        holder[0] = jax.block_until_ready(add_one(holder[0]))

    return Candidate("floor: copy", run)


def exponentials_candidate(count: int) -> Candidate:
    """Returns a candidate that computes about `count` exponentials (at least 2**24) of an array in cache."""
    x = jnp.full((EXPONENTIALS_IN_CACHE,), 0.5)
    rounds = _exponential_rounds(count)
    # The iteration x -> exp(-x) stays near 0.567, away from infinities and denormals, which would be slower.
    iterate = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, x: jnp.exp(-x), x))
    return Candidate("floor: exp", lambda: jax.block_until_ready(iterate(x)))


def _exponential_rounds(count: int) -> int:
    # 16M exponentials take some milliseconds. With fewer, the overhead of the call would dominate.
    return -(-max(count, 2**24) // EXPONENTIALS_IN_CACHE)


def floor(moved_bytes: int, exponentials: int, results: Sequence[Result], swept: int) -> Floor:
    """Returns the lower bound on the time of a computation: max(bytes / bandwidth, exponentials / rate).

    Args:
      moved_bytes: bytes that the computation has to read and write.
      exponentials: number of exponentials that it has to compute.
      results: those of `copy_candidate` and `exponentials_candidate` among others.
      swept: the argument `count` of `exponentials_candidate`.

    Raises:
      ValueError: one of the two candidates was not run.
    """
    secs = {result["name"]: result["median_secs"] for result in results}
    copy_secs, exp_secs = secs.get("floor: copy"), secs.get("floor: exp")
    if copy_secs is None or exp_secs is None:
        raise ValueError(f"results of {list(secs)} lack a time of 'floor: copy' or 'floor: exp'; measure both")
    bytes_per_sec = 2 * 4 * COPIED_FLOATS / copy_secs
    exponentials_per_sec = _exponential_rounds(swept) * EXPONENTIALS_IN_CACHE / exp_secs
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


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()) -> None:
    """Prints a title and aligned columns, the first one left-aligned and the others right-aligned.

    Args:
      title: the line above the table.
      columns: the headings.
      rows: each with one cell per column.
      left: headings of further columns that are left-aligned.
    """
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    is_left = [i == 0 or column in left for i, column in enumerate(columns)]
    print(f"\n{title}")
    for row in [columns, *rows]:
        cells = zip(row, widths, is_left, strict=True)
        print("  ".join(cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in cells).rstrip())
    sys.stdout.flush()


def milliseconds(result: Result) -> tuple[str, str]:
    """Returns the two cells of a table for a `result`: median and quartiles in milliseconds, or "-" and a reason."""
    median, quartiles = result["median_secs"], result["quartiles_secs"]
    if median is None or quartiles is None:
        return "-", result["skipped"] or ""
    low, high = quartiles
    return f"{1e3 * median:.1f}", f"{1e3 * low:.1f}-{1e3 * high:.1f}"


def mebibytes(count: float | None) -> str:
    """Returns `count` bytes in MiB, without the unit; "-" for None."""
    return "-" if count is None else f"{count / 2**20:.1f}"


PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "flax", "optax", "jaxtyping", "numpy"),
    *("torch", "mambapy", "transformers", "torchvision", "pytorch_fid"),
)


@functools.cache
def machine_facts() -> MachineFacts:
    """Returns processor, device, versions and the time of the first call."""
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


def write_json(path: str | Path, benchmark: str, **contents: object) -> None:
    """Writes {"benchmark": benchmark, "machine": machine_facts(), **contents} to a file.

    Args:
      path: the file, which is replaced if it exists.
      benchmark: name of the benchmark.
      contents: JSON-ready values, such as `settings` and `problems`.
    """
    report = {"benchmark": benchmark, "machine": machine_facts(), **contents}
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
