"""Times `ssd` beside `selective_scan` on this machine, forward and with all gradients, at several state dimensions.

    python benchmarks/ssd.py [--problems 2x1024x768x16 2x1024x768x64] [--d-head 64] [--json ssd.json]

The two compute different models of the same sizes: the scan has a decay for each channel and state, SSD one for each
head. The last column is the time of SSD divided by that of the scan.

On a machine that does other work, --one-core gives steadier ratios: it binds the process to one core and measures the
CPU time of the process instead of the time of the clock.

JSON: {"benchmark", "machine", "settings", "problems"}; the last is a list of {"problem", "direction", "results",
"ratio"}, where results are those of `measure.measure`.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import tyro

from benchmarks import measure
from benchmarks.measure import Candidate
from benchmarks.selective_scan import DIRECTIONS, Problem, scan_candidate
from sisma_jax.kernels import ssd


def ssd_inputs(inputs: dict[str, jax.Array], d_head: int) -> dict[str, jax.Array]:
    """Returns the arguments of `ssd` for those of a `Problem`: Δ of each head's first channel, and A from -1 to -heads.

    Args:
      inputs: from `Problem.inputs`.
      d_head: channels of a head; a divisor of d_inner.
    """
    heads = inputs["u"].shape[2] // d_head
    return inputs | {"delta": inputs["delta"][:, :, ::d_head], "A": -jnp.arange(1.0, heads + 1)}


def ssd_candidate(inputs: dict[str, jax.Array], cotangent: jax.Array | None) -> Candidate:
    """Returns a candidate for `ssd`.

    Args:
      inputs: u, delta, A, B and C, as for `ssd`.
      cotangent: cotangent of y, to compute the gradients of all inputs, too; None measures the forward pass only.
    """

    def forward_and_backward(inputs: dict[str, jax.Array], cotangent: jax.Array) -> measure.PyTree:
        y, vjp = jax.vjp(lambda inputs: ssd(**inputs), inputs)
        return y, vjp(cotangent)[0]

    if cotangent is None:
        return measure.compiled_candidate("ssd", lambda inputs: ssd(**inputs), inputs)
    return measure.compiled_candidate("ssd", forward_and_backward, inputs, cotangent)


def measured(problem: Problem, direction: str, d_head: int, repeats: int, one_core: bool) -> dict[str, Any]:
    """Returns the JSON record of a problem.

    Args:
      problem: its sizes.
      direction: one of `DIRECTIONS`.
      d_head: channels of a head.
      repeats: number of rounds, as in `measure.measure`.
      one_core: measure CPU time.
    """
    clock = time.process_time if one_core else time.perf_counter
    inputs = problem.inputs()
    cotangent = problem.cotangent() if direction == DIRECTIONS[1] else None
    scan = dataclasses.replace(scan_candidate("xla", inputs, cotangent), name="selective_scan", group="")
    candidates = [scan, ssd_candidate(ssd_inputs(inputs, d_head), cotangent)]
    results = measure.measure(candidates, repeats, budget_secs=float("inf"), tolerance=0.0, clock=clock)
    of_scan, of_ssd = (result["median_secs"] for result in results)
    assert of_scan is not None, "neither is skipped"
    assert of_ssd is not None, "neither is skipped"
    return {
        "problem": dataclasses.asdict(problem),
        "direction": direction,
        "results": results,
        "ratio": of_ssd / of_scan,
    }


def main(
    problems: tuple[str, ...] = ("2x1024x768x16", "2x1024x768x64"),
    d_head: int = 64,
    repeats: int = 15,
    one_core: bool = False,
    json: Path | None = None,
) -> None:
    """Times both and prints a table.

    Args:
      problems: sizes, each as BATCHxLENGTHxD_INNERxD_STATE.
      d_head: channels of a head of SSD; a divisor of all d_inner.
      repeats: number of rounds; each round runs both once.
      one_core: bind the process to the first core that it may use, and measure CPU time.
      json: file for all samples.

    Raises:
      ValueError: a problem is malformed.
    """
    if one_core:  # before JAX starts its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    records = [
        measured(Problem.parse(text), direction, d_head, repeats, one_core)
        for text in problems
        for direction in DIRECTIONS
    ]
    rows = []
    for record in records:
        name = f"{Problem(**record['problem'])}, {record['direction']}"
        for result in record["results"]:
            ratio = "" if result["name"] == "selective_scan" else f"{record['ratio']:.2f}"
            memory = measure.mebibytes(result["temporary_bytes"])
            rows.append([name, result["name"], *measure.milliseconds(result), memory, ratio])
    columns = ["", "", "ms", "quartiles", "temp MiB", "/scan"]
    cores = "CPU time on one core" if one_core else "all cores"
    measure.print_table(f"float32, heads of {d_head} channels, {repeats} rounds, {cores}", columns, rows)
    if json:
        settings = {"d_head": d_head, "repeats": repeats, "one_core": one_core}
        measure.write_json(json, "ssd", settings=settings, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
