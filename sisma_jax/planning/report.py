"""The contents of a plan, and its formats: text and JSON."""

import dataclasses
import json
from typing import Any

from sisma_jax.flops import Flops
from sisma_jax.planning.collectives import Traffic
from sisma_jax.planning.memory import Memory, StateBytes
from sisma_jax.planning.search import LargestBatch


@dataclasses.dataclass(frozen=True)
class Program:
    """Memory and cost of one compiled program.

    Attributes:
      batch_size: total over all devices.
      fits: whether the program fits into the memory of each device; None if the limit is not known.
      memory: bytes on each device; None if the compiler refused the program.
      needed: total bytes on each device. If the compiler refused the program, the lower bound that it states, or None.
      flops: operations, as a total over all devices.
      scan_secs: least seconds that the scan kernels take on each device; None if their bundles are not known. See
        `scans.least_secs`.
      traffic: communication between devices; None if the compiler refused the program.
      compile_secs: seconds that compilation took on this machine.
    """

    batch_size: int
    fits: bool | None
    memory: Memory | None
    needed: int | None
    flops: Flops
    scan_secs: float | None
    traffic: Traffic | None
    compile_secs: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and cost of a run on devices that need not be present.

    Attributes:
      topology: name of the topology, such as "v5e:4x4".
      device_kind: JAX's name of the device, such as "TPU v5 lite".
      num_devices: number of devices.
      mesh: size of each mesh axis.
      memory_limit: bytes per device that a program may use, from the compiler or the user; None if not known.
      peak_flops: peak rate of a device in dense bfloat16 operations per second; None if not known.
      num_parameters: number of trained parameters.
      state: the training state on each device.
      train: one training step.
      sampler: one call of the sampler.
      largest_batch: result of the search for the largest training batch; None if there was no search.
      settings: values of the configuration, by dotted key.
    """

    topology: str
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    memory_limit: int | None
    peak_flops: float | None
    num_parameters: int
    state: StateBytes
    train: Program
    sampler: Program
    largest_batch: LargestBatch | None
    settings: dict[str, Any]

    @property
    def least_secs(self) -> float | None:
        """A lower bound of the seconds per training step of the compiled program.

        It is the time of the matrix products at the devices' peak rate plus the time of the scan kernels at one bundle
        per cycle. It is the sum and not the maximum, although they use different units of a core: the core has one
        sequence of bundles, and XLA runs a kernel and the matrix products one after another in it. Copies and
        collectives can overlap with both, and have no part in the bound. Nor has other elementwise work, which XLA
        fuses with matrix products in part.

        None if the peak rate is not known, or if the training step does not compute in bfloat16. If `train.scan_secs`
        is None, the bound contains the matrix products alone.
        """
        if (products := self.matmul_secs) is None:
            return None
        return products + (self.train.scan_secs or 0.0)

    @property
    def matmul_secs(self) -> float | None:
        """The seconds of a training step's matrix products at the devices' peak rate; None as for `least_secs`."""
        if self.peak_flops is None or self.settings["train.compute_dtype"] != "bfloat16":
            return None
        return self.train.flops.matmul / (self.num_devices * self.peak_flops)


def to_json(plan: Plan) -> str:
    """Returns the plan as indented JSON, with `least_secs` beside the fields of `Plan`."""
    return json.dumps(dataclasses.asdict(plan) | {"least_secs": plan.least_secs}, indent=2) + "\n"


def format_plan(plan: Plan) -> str:
    """Returns the plan as text of several sections, for a terminal."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    limit = "no limit known" if plan.memory_limit is None else f"{in_units(plan.memory_limit)} per device"
    state = {**dataclasses.asdict(plan.state), "total": plan.state.total}
    sections = [
        f"Plan for {plan.topology}: {plan.num_devices} x {plan.device_kind}, mesh {axes}; memory: {limit}",
        _table("Settings", plan.settings),
        _table(
            f"Training state: {plan.num_parameters:,} parameters; on each device",
            {name: in_units(size) for name, size in state.items()},
        ),
        _program(f"Training step, batch {plan.train.batch_size}", plan.train, plan.memory_limit),
        _program(f"Sampler, batch {plan.sampler.batch_size}", plan.sampler, plan.memory_limit),
    ]
    if plan.least_secs is not None and plan.matmul_secs is not None:
        parts = f"{1e3 * plan.matmul_secs:.1f} ms of matrix products at the chips' peak rate"
        if plan.train.scan_secs is None:
            parts += " (the scans are left out, because their bundles are not known for these sizes)"
        else:
            parts += f" and {1e3 * plan.train.scan_secs:.1f} ms of scans at one bundle of instructions per cycle"
        sections.append(
            f"No training step is shorter than {1e3 * plan.least_secs:.1f} ms: {parts}. The actual time can only be "
            "measured on a chip."
        )
    return "\n\n".join([*sections, _largest(plan)]) + "\n"


def _program(title: str, program: Program, limit: int | None) -> str:
    if program.memory is None:
        at_least = "" if program.needed is None else f": it needs {in_units(program.needed)} or more"
        rows = {"does not fit": f"the compiler refuses it{at_least}"}
    else:
        rows = {name: in_units(size) for name, size in dataclasses.asdict(program.memory).items()}
        rows["total"] = in_units(program.memory.total)
        if limit is not None:
            verdict = "fits" if program.fits else "does not fit"
            rows["total"] += f", {program.memory.total / limit:.0%} of {in_units(limit)}: {verdict}"
    flops = program.flops
    rows["FLOPs"] = (
        f"{flops.total:.3g} over all devices (matrix products {flops.matmul:.3g}, scan kernels {flops.kernels:.3g}, "
        f"elementwise {flops.elementwise:.3g})"
    )
    if program.traffic is not None:
        rows |= _traffic(program.traffic)
    return _table(f"{title}; memory on each device", rows)


def _traffic(traffic: Traffic) -> dict[str, str]:
    rows = {
        each.kind: f"{each.count} times, {in_units(each.bytes)} on each device, sends {in_units(each.sent_bytes)}"
        for each in traffic.collectives
    }
    if traffic.num_unknown_loops:
        rows["unknown loops"] = f"{traffic.num_unknown_loops}; one iteration of each is counted"
    return rows or {"collectives": "none"}


def _largest(plan: Plan) -> str:
    found = plan.largest_batch
    if found is None:
        reason = "the memory limit is not known" if plan.memory_limit is None else "the search is off"
        return f"Largest batch: not searched, because {reason}."
    first = f"Largest batch that fits: {found.batch_size}" if found.batch_size else "No compiled batch fits"
    if found.too_large is not None:
        second = f"{found.too_large} does not fit"
    else:
        second = f"by extrapolation {found.expected_too_large} does not fit (not compiled)"
    tried = ", ".join(
        f"{trial.batch_size} ({'' if trial.fits else 'over, '}{'?' if trial.total is None else in_units(trial.total)})"
        for trial in found.trials
    )
    return f"{first}; {second}. Compiled: {tried}."


def _table(title: str, rows: dict[str, Any]) -> str:
    width = max(20, *map(len, rows))
    return "\n".join([title, *(f"  {name:{width}} {value}" for name, value in rows.items())])


def in_units(count: int) -> str:
    """Returns a number of bytes as text, such as "1.50 GiB".

    Args:
      count: bytes, at least 0.
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
