"""Times `selective_scan` on this machine, forward and with all gradients, against a lower bound and other packages.

    python benchmarks/selective_scan.py                               the two standard problems
    python benchmarks/selective_scan.py --sweep --json scan.json      lengths 256 to 65536, too; all samples to a file
    python benchmarks/selective_scan.py --peers                       PyTorch packages and softmax attention, too
    python benchmarks/selective_scan.py --jax_peers --clones FOLDER   other JAX projects, too; see jax_peers.py

The lower bound ("floor") holds for every implementation on this machine. It is the larger of

- the time for the bytes that have to be moved, each argument read and each result written once, at the bandwidth of a
  large copy, and
- the time for the exponentials that have to be computed, batch x length x d_inner x d_state in the forward pass and the
  same number in the backward pass (to store them would move more bytes than it saves), at the rate of a loop in cache.

Both rates are measured in the same rounds as the implementations. JSON: {"benchmark", "machine", "settings",
"problems", "sweep"}; the last two are lists of {"problem": {"batch", "length", "d_inner", "d_state"}, "direction",
"floor", "results": [{"name", "median_secs", "quartiles_secs", "samples_secs", "temporary_bytes", "skipped",
"ratio_to_floor", "ratio_to_associative", "secs_per_token"}]}. The ratios are ratios of times. If a candidate was not
run, "skipped" gives the reason.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import tyro

from benchmarks import measure
from benchmarks.jax_peers import jax_peer_candidates
from benchmarks.measure import Candidate
from benchmarks.peers import absent, attention_candidates, peer_candidates
from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import api

DIRECTIONS = ("forward", "forward and backward")
# The implementations sum in float32 in different orders, and the gradient of A is a sum over all tokens.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a scan of u, delta, A, B and C in float32, without D, z and delta_bias."""

    batch: int
    length: int
    d_inner: int
    d_state: int

    @classmethod
    def parse(cls, text: str) -> "Problem":
        """Returns the problem that a text describes.

        Args:
          text: BATCHxLENGTHxD_INNERxD_STATE, for example "2x1024x768x16".

        Raises:
          ValueError: the text is not four positive integers with "x" between them.
        """
        sizes = text.split("x")
        if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
            raise ValueError(f"problems: got {text!r}, want BATCHxLENGTHxD_INNERxD_STATE such as 2x1024x768x16")
        return cls(*map(int, sizes))

    def __str__(self) -> str:
        return f"B={self.batch} L={self.length} D={self.d_inner} N={self.d_state}"

    @property
    def exponentials(self) -> int:
        """Number of exponentials in the forward pass."""
        return self.batch * self.length * self.d_inner * self.d_state

    def moved_bytes(self, backward: bool) -> int:
        """Returns the bytes of all arguments and results; with `backward`, also of cotangent and gradients."""
        sequence = self.batch * self.length * self.d_inner
        inputs = 2 * sequence + self.d_inner * self.d_state + 2 * self.batch * self.length * self.d_state
        # The cotangent and the gradients have the sizes of y and of the arguments.
        return 4 * (2 if backward else 1) * (inputs + sequence)

    def inputs(self) -> dict[str, jax.Array]:
        """Returns the arguments u, delta, A, B and C of `selective_scan`, float32.

        Their values resemble those of a trained model: most step sizes are below one, and the states decay.
        """
        keys = jax.random.split(jax.random.key(0), 4)
        by_channel = (self.batch, self.length, self.d_inner)
        by_state = (self.batch, self.length, self.d_state)
        return {
            "u": jax.random.normal(keys[0], by_channel),
            "delta": jax.nn.softplus(jax.random.normal(keys[1], by_channel) - 3),
            "A": -jnp.tile(jnp.arange(1.0, self.d_state + 1)[None], (self.d_inner, 1)),
            "B": jax.random.normal(keys[2], by_state),
            "C": jax.random.normal(keys[3], by_state),
        }

    def cotangent(self) -> jax.Array:
        """Returns a random cotangent of y, float32 (batch, length, d_inner)."""
        return jax.random.normal(jax.random.key(1), (self.batch, self.length, self.d_inner))


class ScanResult(measure.Result):
    """A result with ratios of its median to other times; they are None if one of the two was not measured."""

    ratio_to_floor: float | None
    ratio_to_associative: float | None
    secs_per_token: float | None


class Record(TypedDict):
    """The JSON record of one problem, the fields of `Problem`, in one of `DIRECTIONS`."""

    problem: dict[str, int]
    direction: str
    floor: measure.Floor
    results: list[ScanResult]


def implementations() -> list[str]:
    """Returns the names of the implementations for this backend, first "xla", against which the others are checked."""
    kernels = api.kernels_for_device()
    names = [name for name in api.IMPLEMENTATIONS if name not in api.SUPPORT_CHECKS or name in kernels]
    return sorted(names, key=lambda name: name != "xla")


def scan_candidate(name: str, inputs: dict[str, jax.Array], cotangent: jax.Array | None) -> Candidate:
    """Returns a candidate for one implementation of `selective_scan`.

    Args:
      name: of the implementation.
      inputs: u, delta, A, B and C, as for `selective_scan`.
      cotangent: cotangent of y, to compute the gradients of all inputs, too; None measures the forward pass only.
    """

    def forward(inputs: dict[str, jax.Array]) -> measure.PyTree:
        u, delta, A, B, C = (inputs[argument] for argument in ("u", "delta", "A", "B", "C"))
        return selective_scan(u, delta, A, B, C, implementation=name)

    def forward_and_backward(inputs: dict[str, jax.Array], cotangent: jax.Array) -> measure.PyTree:
        y, vjp = jax.vjp(forward, inputs)
        return y, vjp(cotangent)[0]

    try:
        if cotangent is None:
            return measure.compiled_candidate(name, forward, inputs, group="scan")
        return measure.compiled_candidate(name, forward_and_backward, inputs, cotangent, group="scan")
    except NotImplementedError as error:
        return Candidate(name, run=lambda: None, group="scan", skip=str(error))


class Benchmark:
    """Measures problems one after another, and skips candidates that would take too long.

    The time of a run is predicted from the candidate's time per exponential in the latest problem that it ran.

    Args:
      repeats: number of rounds, as in `measure.measure`.
      budget_secs: as in `measure.measure`; a candidate is skipped if one run is predicted to take longer.
      with_peers: measure PyTorch packages and attention, too.
      with_jax_peers: measure other JAX projects, too.
      clones: folder with clones of those that have no package.
    """

    def __init__(
        self,
        repeats: int,
        budget_secs: float,
        with_peers: bool,
        with_jax_peers: bool = False,
        clones: Path | None = None,
    ):
        self.repeats = repeats
        self.budget_secs = budget_secs
        self.with_peers = with_peers
        self.with_jax_peers = with_jax_peers
        self.clones = clones
        self._secs_per_exponential: dict[tuple[str, str], float] = {}

    def measure(self, problem: Problem, direction: str) -> Record:
        """Returns the JSON record of a problem.

        Args:
          problem: its sizes.
          direction: one of `DIRECTIONS`.
        """
        backward = direction == DIRECTIONS[1]
        inputs, cotangent = problem.inputs(), problem.cotangent() if backward else None
        candidates = [scan_candidate(name, inputs, cotangent) for name in implementations()]
        if self.with_peers:
            candidates += peer_candidates(inputs, cotangent)
            candidates += attention_candidates(problem.batch, problem.length, problem.d_inner, backward)
        if self.with_jax_peers:
            candidates += jax_peer_candidates(inputs, cotangent, self.clones)
        candidates = [self._unless_too_slow(candidate, problem, direction) for candidate in candidates]
        floors = [measure.copy_candidate(), measure.exponentials_candidate(problem.exponentials)]
        results = measure.measure(floors + candidates, self.repeats, self.budget_secs, TOLERANCE)
        floor = measure.floor(
            problem.moved_bytes(backward), (1 + backward) * problem.exponentials, results, swept=problem.exponentials
        )
        associative = next((result["median_secs"] for result in results if result["name"] == "associative"), None)
        scan_results: list[ScanResult] = []
        for result in results:
            median = result["median_secs"]
            scan_results.append(
                {
                    **result,
                    "ratio_to_floor": median and median / floor["secs"],
                    "ratio_to_associative": median and associative and median / associative,
                    "secs_per_token": median and median / (problem.batch * problem.length),
                }
            )
            if median:
                self._secs_per_exponential[result["name"], direction] = median / problem.exponentials
        return {
            "problem": dataclasses.asdict(problem),
            "direction": direction,
            "floor": floor,
            "results": scan_results,
        }

    def _unless_too_slow(self, candidate: Candidate, problem: Problem, direction: str) -> Candidate:
        secs = problem.exponentials * self._secs_per_exponential.get((candidate.name, direction), 0.0)
        too_slow = not candidate.skip and secs > self.budget_secs
        return dataclasses.replace(candidate, skip=f"over {secs:.0f} s per run") if too_slow else candidate


def print_record(record: Record) -> None:
    """Prints the table of a `record`: times, memory and ratios of each candidate."""

    def ratio(x: float | None) -> str:
        return "-" if x is None else f"{x:.2f}" if x < 10 else f"{x:.1f}"

    rows = [
        [
            result["name"],
            *measure.milliseconds(result),
            str(len(result["samples_secs"])),
            measure.mebibytes(result["temporary_bytes"]),
            ratio(result["ratio_to_floor"]),
            ratio(result["ratio_to_associative"]),
        ]
        for result in record["results"]
        if not result["name"].startswith("floor")
    ]
    floor = record["floor"]
    title = (
        f"{Problem(**record['problem'])}, {record['direction']}. Floor {1e3 * floor['secs']:.1f} ms: "
        f"{1e3 * floor['bytes_secs']:.1f} ms for {floor['bytes'] / 2**20:.0f} MiB, "
        f"{1e3 * floor['exponentials_secs']:.1f} ms for {floor['exponentials'] / 1e6:.1f}M exponentials"
    )
    measure.print_table(title, ["", "ms", "quartiles", "runs", "temp MiB", "/floor", "/associative"], rows)


def print_sweep(records: Sequence[Record]) -> None:
    """Prints a table for each direction: microseconds per token of each candidate, by length.

    Args:
      records: those of all lengths, with batch 1 and equal d_inner, in increasing order of length.
    """
    for direction in DIRECTIONS:
        sweep = [record for record in records if record["direction"] == direction]
        if not sweep:
            continue
        rows = [
            [results[0]["name"]]
            + [f"{1e6 * r['secs_per_token']:.1f}" if r["secs_per_token"] else r["skipped"] or "" for r in results]
            for results in zip(*(record["results"] for record in sweep), strict=True)
            if not results[0]["name"].startswith("floor")
        ]
        floors = [f"{1e6 * r['floor']['secs'] / r['problem']['length']:.1f}" for r in sweep]
        lengths = [f"L={record['problem']['length']}" for record in sweep]
        measure.print_table(
            f"Microseconds per token, {direction}, B=1 D={sweep[0]['problem']['d_inner']}",
            ["", *lengths],
            [*rows, ["floor", *floors]],
        )


def main(
    problems: tuple[str, ...] = ("2x1024x768x16", "1x4096x1536x16"),
    sweep: bool = False,
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384, 65536),
    peers: bool = False,
    jax_peers: bool = False,
    clones: Path | None = None,
    repeats: int = 9,
    budget_secs: float = 60.0,
    json: Path | None = None,
) -> None:
    """Times the selective scan and prints a table for each problem and direction.

    Args:
      problems: sizes, each as BATCHxLENGTHxD_INNERxD_STATE.
      sweep: measure the time per token at several lengths, too, with batch 1, 768 channels and 16 states.
      lengths: lengths of the sweep, in increasing order.
      peers: measure PyTorch packages and attention, too.
      jax_peers: measure other JAX projects, too.
      clones: folder with clones of those JAX projects that have no package; see `jax_peers.py`.
      repeats: number of rounds; each round runs every candidate once.
      budget_secs: a candidate whose runs add up to more than this is left out of the remaining rounds. It is skipped
        in problems in which a single run would take longer.
      json: file for all samples.

    Raises:
      ValueError: a problem is malformed.
    """
    if peers:
        print("\n".join(absent()))
    benchmark = Benchmark(repeats, budget_secs, peers, jax_peers, clones)
    records = []
    for problem in [Problem.parse(text) for text in problems]:
        for direction in DIRECTIONS:
            records.append(benchmark.measure(problem, direction))
            print_record(records[-1])
    sweep_records = []
    if sweep:
        benchmark = Benchmark(repeats, budget_secs, peers, jax_peers, clones)
        for length in lengths:
            for direction in DIRECTIONS:
                sweep_records.append(benchmark.measure(Problem(1, length, 768, 16), direction))
                print_record(sweep_records[-1])
        print_sweep(sweep_records)
    if json:
        settings = {"repeats": repeats, "budget_secs": budget_secs, "peers": peers}
        measure.write_json(json, "selective_scan", settings=settings, problems=records, sweep=sweep_records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
