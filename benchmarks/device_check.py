"""Checks this project on a GPU or TPU: correctness, speed, a short training. Prints tables and writes JSON.

    make gpu-check PYTHON=python3        on a machine whose python3 has jax, flax, optax and jaxtyping
    make tpu-check PYTHON=python3
    python benchmarks/device_check.py --platform cpu                      the same checks, with small sizes

No other package is needed, and no data. The checks are, in this order as far as the time allows:

- the device, the versions, and which implementation of the scan the dispatcher chooses
- the scan at the size of the B preset, values and every gradient, against the recurrence step by step in float64
- the time of the scan against `associative_scan`, XLA and the platform's attention, and against the roofline: the
  longest of bytes, operations and exponentials at the device's peak rates
- a training of the denoiser in bfloat16, whose loss must fall, and sampling
- the other presets, lengths, directions, scan orders, and the convolution

Every row is "pass", "FAIL", "measured" or "skipped". The exit code is 1 if a row fails. The JSON file is written after
every check, so that an abort of the driver leaves what was found: {"benchmark", "machine", "settings", "rows"}.
"""

import argparse
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# The reference runs on the host's CPU, which JAX must know beside the accelerator. JAX reads this when it is imported.
if "cpu" not in os.environ.get("JAX_PLATFORMS", "cpu").split(","):
    os.environ["JAX_PLATFORMS"] += ",cpu"

import jax

from benchmarks import measure
from benchmarks.device_checks import correctness, scan_cases, timings
from benchmarks.device_checks.peaks import PEAKS
from benchmarks.device_checks.rows import COLUMNS, Check, Row, Section, print_tables, reason
from benchmarks.device_checks.scan_cases import ScanCase
from benchmarks.device_checks.training import Training, case_for_device, tiny_case
from sisma_jax.kernels.selective_scan import api

PLATFORMS = ("gpu", "tpu", "cpu")

D_INNER = {"S": 768, "B": 1536, "L": 2048, "XL": 2304}
"""Channels of the scan by preset."""

ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
"""Variables that change results or times."""


class Session:
    """Runs checks until the time is up, and keeps the report.

    Args:
      minutes: after which no further check starts.
      json: file of the report.
      settings: for the report.
      clock: returns the current time in seconds.
    """

    def __init__(
        self,
        minutes: float,
        json: Path,
        settings: dict[str, object],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.rows: list[tuple[Section, Row]] = []
        self._json, self._settings, self._clock = json, settings, clock
        self._start = clock()
        self._end = self._start + 60 * minutes
        self._longest: dict[Section, float] = {}

    @property
    def failed(self) -> int:
        """Number of rows that failed."""
        return sum(row.status == "FAIL" for _, row in self.rows)

    def run(self, check: Check) -> None:
        """Runs a check and adds its rows, unless it would probably not finish in time.

        Args:
          check: expected to take as long as the longest one of its section so far.
        """
        start = self._clock()
        if start + self._longest.get(check.section, 0.0) > self._end:
            self._add(check.section, Row(check.name, "skipped", note="no time left; see --minutes"))
        else:
            try:
                for row in check.run():
                    self._add(check.section, row)
            except Exception as error:  # one broken check must not hide the others
                record = {"traceback": traceback.format_exc()}
                self._add(check.section, Row(check.name, "FAIL", note=reason(error), record=record))
            self._longest[check.section] = max(self._longest.get(check.section, 0.0), self._clock() - start)
        self._write()

    def _add(self, section: Section, row: Row) -> None:
        self.rows.append((section, row))
        text = "  ".join((row.status, row.name, *row.cells.values(), row.note))
        print(f"[{self._clock() - self._start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        records = [row.to_json(section) for section, row in self.rows]
        secs = self._clock() - self._start
        measure.write_json(
            self._json, "device_check", settings=self._settings, secs=secs, failed=self.failed, rows=records
        )


def environment_rows(first: ScanCase) -> Iterable[Row]:
    """Yields rows with the device, the versions, the settings, and the dispatcher's choice.

    Args:
      first: the problem for which the dispatcher chooses.
    """
    device = jax.local_devices()[0]
    facts = measure.machine_facts()
    known = "peak rates known" if device.device_kind in PEAKS else "peak rates not known: times only"
    memory = measure.available_bytes() / 2**30
    values = {
        "device": f"{jax.local_device_count()} x {device.device_kind}, {memory:.0f} GiB, {known}",
        "runtime": " ".join(device.client.platform_version.split()),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        "python, host": f"{facts['python']}, {facts['cores']} cores, {facts['cpu']}",
        "variables": " ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ) or "none set",
    }
    for dtype in scan_cases.DTYPES:
        values[f"implementation=None, {dtype}"] = scan_cases.chosen_implementation(first, dtype)
    for name, value in values.items():
        yield Row(name, "measured", {"value": value}, record={"value": value})
    yield timings.latency_row(repeats=20)
    yield timings.copy_row(repeats=5)


def real_checks() -> list[Check]:
    """Returns the checks for a GPU or TPU at the sizes of the presets, the most important ones first."""
    first = ScanCase(2, 1024, D_INNER["B"])
    chosen = scan_cases.chosen_implementation(first, "bfloat16")
    # On a recent GPU also the kernel for older ones.
    both = tuple(dict.fromkeys((chosen, *api.kernels_for_device(), "xla")))
    training = Training(case_for_device())

    def scan(case: ScanCase, implementations: Sequence[str] = both) -> Check:
        return Check("correctness", str(case), lambda: correctness.scan_rows(case, implementations))

    def timing(batch: int, length: int, preset: str, dtype: str, direction: timings.Direction) -> Check:
        case = ScanCase(batch, length, D_INNER[preset])
        name = f"{batch}x{length}x{case.d_inner} {dtype} {direction}"
        return Check("timings", name, lambda: timings.rows(case, dtype, direction, repeats=7, budget_secs=5.0))

    forward, both_ways = timings.DIRECTIONS
    checks = [
        Check("environment", "environment", lambda: environment_rows(first)),
        scan(first),
        timing(8, 1024, "B", "bfloat16", forward),
        timing(8, 1024, "B", "bfloat16", both_ways),
        Check("training", "training", training.train),
        Check("training", "sampling", training.sample),
        scan(ScanCase(1, 1024, D_INNER["B"], reverse=True, with_options=True)),
        Check("correctness", "convolution", lambda: correctness.convolution_rows(2, 32, D_INNER["B"])),
        timing(8, 4096, "B", "bfloat16", both_ways),
        timing(1, 1024, "B", "bfloat16", forward),
        Check("correctness", "scan orders", lambda: correctness.order_rows(32, 256, chosen)),
        scan(ScanCase(1, 4096, D_INNER["B"])),
        scan(ScanCase(2, 256, D_INNER["B"])),
        timing(8, 256, "B", "bfloat16", both_ways),
        timing(8, 4096, "B", "bfloat16", forward),
        timing(8, 1024, "XL", "bfloat16", both_ways),
        timing(8, 1024, "B", "float32", both_ways),
        scan(ScanCase(1, 1024, D_INNER["XL"]), (chosen,)),
        scan(ScanCase(1, 1024, D_INNER["S"]), (chosen,)),
        scan(ScanCase(1, 1024, D_INNER["L"]), (chosen,)),
        scan(ScanCase(1, 1000, D_INNER["S"], reverse=True)),
        scan(ScanCase(1, 512, D_INNER["S"], d_state=64)),
        scan(ScanCase(1, 1024, 256), ("associative",)),
        timing(1, 4096, "XL", "bfloat16", both_ways),
        timing(1, 1024, "S", "bfloat16", both_ways),
        timing(1, 1024, "L", "bfloat16", both_ways),
        scan(ScanCase(1, 4096, D_INNER["XL"], reverse=True), (chosen,)),
        Check("correctness", "convolution", lambda: correctness.convolution_rows(1, 64, D_INNER["XL"])),
    ]
    if chosen != "xla":
        compare = Check("training", "denoiser with both scans", lambda: training.compare(chosen, "xla"))
        checks.insert(8, compare)
    return checks


def small_checks() -> list[Check]:
    """Returns checks of the same kinds with sizes for a CPU."""
    first = ScanCase(1, 24, 32, d_state=4, reverse=True, with_options=True)
    chosen = scan_cases.chosen_implementation(first, "float32")
    timed = ScanCase(1, 16, 128, d_state=4)
    training = Training(tiny_case())
    return [
        Check("environment", "environment", lambda: environment_rows(first)),
        Check("correctness", str(first), lambda: correctness.scan_rows(first, (chosen,))),
        Check("correctness", "scan orders", lambda: correctness.order_rows(4, 8, chosen)),
        Check("correctness", "convolution", lambda: correctness.convolution_rows(1, 4, 8)),
        Check("timings", "scan", lambda: timings.rows(timed, "bfloat16", "forward+backward", 2, budget_secs=1.0)),
        Check("training", "training", training.train),
        Check("training", "sampling", training.sample),
        Check("training", "denoiser with two scans", lambda: training.compare(chosen, "associative")),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks and returns the exit code: 1 if one failed, 2 if the platform is not there.

    Args:
      arguments: of the command line; by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=PLATFORMS, required=True, help="platform that JAX must have")
    parser.add_argument("--minutes", type=float, default=10.0, help="time after which no check starts (default: 10)")
    parser.add_argument("--json", type=Path, help="file of the report (default: PLATFORM_check.json)")
    parser.add_argument("--sections", nargs="+", choices=list(COLUMNS), default=list(COLUMNS), help="default: all")
    options = parser.parse_args(arguments)
    if (backend := jax.default_backend()) != options.platform:
        print(
            f"--platform is {options.platform}, but JAX {jax.__version__} runs on {backend}. Name an interpreter whose "
            "JAX supports the device: make gpu-check PYTHON=/path/to/python",
            file=sys.stderr,
        )
        return 2
    json = options.json or Path(f"{options.platform}_check.json")
    settings: dict[str, object] = {name: str(value) for name, value in vars(options).items()}
    # A check that does not end, such as a deadlocked kernel, is ended with a traceback of where it is.
    faulthandler.dump_traceback_later(60 * options.minutes + 300, exit=True, file=sys.__stderr__ or sys.stderr)
    session = Session(options.minutes, json, settings)
    try:
        for check in small_checks() if backend == "cpu" else real_checks():
            if check.section in options.sections:
                session.run(check)
    finally:
        faulthandler.cancel_dump_traceback_later()
    print_tables(session.rows)
    print(f"\n{session.failed} of {len(session.rows)} rows failed; report: {json}", flush=True)
    return int(session.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
