"""What a plan says, as text for people and as JSON."""

import dataclasses
import json
from typing import Any

from sisma_jax.planning.collectives import Traffic
from sisma_jax.planning.flops import Flops
from sisma_jax.planning.memory import Memory, StateBytes
from sisma_jax.planning.search import LargestBatch


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
      batch_size: over all devices.
      fits: whether a device's memory holds it; None if there is no limit known.
      memory: on each device; None if the compiler refused the program.
      needed: bytes on a device; of a program that the compiler refused what it says at least, or None.
      flops: of all devices together.
      traffic: between devices; None if the compiler refused the program.
      compile_secs: on this machine.
    """

    batch_size: int
    fits: bool | None
    memory: Memory | None
    needed: int | None
    flops: Flops
    traffic: Traffic | None
    compile_secs: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes on devices that need not be present.

    Attributes:
      device_kind: JAX's name of the device.
      mesh: size of each axis.
      memory_limit: bytes of a device that programs can have, as its compiler says or the user; None if not known.
      peak_flops: dense bfloat16 operations per second of a device, at most; None if not known.
      state: of training, on each device.
      train: one update of the state.
      sampler: one call.
      largest_batch: of training; None if it was not searched.
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
        """A bound below every training step: its matrix products at the devices' peak in bfloat16."""
        if self.peak_flops is None or self.settings["train.compute_dtype"] != "bfloat16":
            return None
        return self.train.flops.matmul / (self.num_devices * self.peak_flops)


def to_json(plan: Plan) -> str:
    """Returns the plan as indented JSON."""
    return json.dumps(dataclasses.asdict(plan) | {"least_secs": plan.least_secs}, indent=2) + "\n"


def format_plan(plan: Plan) -> str:
    """Returns the plan as text."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    limit = "no limit known" if plan.memory_limit is None else f"{in_units(plan.memory_limit)} per device"
    state = {**dataclasses.asdict(plan.state), "together": plan.state.total}
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
    if plan.least_secs is not None:
        sections.append(
            f"No training step is shorter than {1e3 * plan.least_secs:.1f} ms: its matrix products at the chips' peak. "
            "How long one takes only a chip can tell."
        )
    return "\n\n".join([*sections, _largest(plan)]) + "\n"


def _program(title: str, program: Program, limit: int | None) -> str:
    if program.memory is None:
        at_least = "" if program.needed is None else f": it needs {in_units(program.needed)} or more"
        rows = {"does not fit": f"the compiler refuses it{at_least}"}
    else:
        rows = {name: in_units(size) for name, size in dataclasses.asdict(program.memory).items()}
        rows["together"] = in_units(program.memory.total)
        if limit is not None:
            verdict = "fits" if program.fits else "does not fit"
            rows["together"] += f", {program.memory.total / limit:.0%} of {in_units(limit)}: {verdict}"
    flops = program.flops
    rows["FLOPs"] = (
        f"{flops.total:.3g} on all devices (matrix products {flops.matmul:.3g}, scan kernels {flops.kernels:.3g}, "
        f"elementwise {flops.elementwise:.3g})"
    )
    if program.traffic is not None:
        rows |= _traffic(program.traffic)
    return _table(f"{title}; memory on each device", rows)


def _traffic(traffic: Traffic) -> dict[str, str]:
    rows = {
        each.kind: f"{each.count} times, {in_units(each.bytes)} on each device, which sends {in_units(each.sent_bytes)}"
        for each in traffic.collectives
    }
    if traffic.num_unknown_loops:
        rows["unknown loops"] = f"{traffic.num_unknown_loops}, of which one iteration counts"
    return rows or {"collectives": "none"}


def _largest(plan: Plan) -> str:
    found = plan.largest_batch
    if found is None:
        return "The largest batch was not searched" + (": no limit is known." if plan.memory_limit is None else ".")
    first = f"Largest batch that fits: {found.batch_size}" if found.batch_size else "No batch was found that fits"
    if found.too_large is not None:
        second = f"{found.too_large} does not"
    else:
        second = f"by extrapolation {found.expected_too_large} does not, which was not tried"
    tried = ", ".join(
        f"{trial.batch_size} ({'' if trial.fits else 'over, '}{'?' if trial.total is None else in_units(trial.total)})"
        for trial in found.trials
    )
    return f"{first}; {second}. Compiled: {tried}."


def _table(title: str, rows: dict[str, Any]) -> str:
    width = max(20, *map(len, rows))
    return "\n".join([title, *(f"  {name:{width}} {value}" for name, value in rows.items())])


def in_units(count: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
