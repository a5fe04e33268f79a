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
    """What a run would take on devices that need not be there.

    Attributes:
      device_kind: JAX's name of the device.
      mesh: size of each axis.
      memory_limit: bytes of a device that programs can have, as its compiler says or the user; None if not known.
      peak_flops: dense bfloat16 operations that a device does a second at most; None if not known.
      state: of training, on each device.
      train: one update of the state.
      sampler: one call.
      largest_batch: of training; None if it was not searched.
      settings: those of the configuration on which the numbers depend most.
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
        """Below this no training step can be: its matrix products at the devices' peak in bfloat16."""
        if self.peak_flops is None or self.settings["train.compute_dtype"] != "bfloat16":
            return None
        return self.train.flops.matmul / (self.num_devices * self.peak_flops)


def to_json(plan: Plan) -> str:
    """Returns the plan as indented JSON."""
    return json.dumps(dataclasses.asdict(plan) | {"least_secs": plan.least_secs}, indent=2) + "\n"


def format_plan(plan: Plan) -> str:
    """Returns the plan as text."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    limit = "no limit known" if plan.memory_limit is None else f"{in_units(plan.memory_limit)} a device"
    state = plan.state
    lines = [
        f"Plan for {plan.topology}: {plan.num_devices} x {plan.device_kind}, mesh {axes}; memory: {limit}",
        *_rows("Settings", [(name, str(value)) for name, value in plan.settings.items()]),
        *_rows(
            f"Training state: {plan.num_parameters:,} parameters; on each device",
            [
                ("parameters", in_units(state.parameters)),
                ("their average", in_units(state.average)),
                ("optimiser", in_units(state.optimizer)),
                ("together", in_units(state.total)),
            ],
        ),
        *_program_lines(f"Training step, batch {plan.train.batch_size}", plan.train, plan.memory_limit),
        *_program_lines(f"Sampler, batch {plan.sampler.batch_size}", plan.sampler, plan.memory_limit),
    ]
    if plan.least_secs is not None:
        lines += [
            "",
            f"No training step is shorter than {1e3 * plan.least_secs:.1f} ms: its matrix products at the chips' peak. "
            "How long one takes only a chip can tell.",
        ]
    return "\n".join([*lines, "", *_largest_lines(plan)]) + "\n"


def _program_lines(title: str, program: Program, limit: int | None) -> list[str]:
    if program.memory is None:
        at_least = "" if program.needed is None else f": it needs {in_units(program.needed)} or more"
        rows = [("does not fit", f"the compiler refuses it{at_least}")]
    else:
        memory = program.memory
        rows = [
            ("arguments", in_units(memory.arguments)),
            ("results", in_units(memory.outputs)),
            ("temporaries", in_units(memory.temporaries)),
            ("program", in_units(memory.code)),
            ("together", in_units(memory.total) + _share(program, limit)),
        ]
    flops = program.flops
    rows.append(
        (
            "FLOPs",
            f"{flops.total:.3g} on all devices (matrix products {flops.matmul:.3g}, scan kernels {flops.kernels:.3g}, "
            f"elementwise {flops.elementwise:.3g})",
        )
    )
    return [*_rows(f"{title}; memory on each device", rows), *_traffic_lines(program.traffic)]


def _share(program: Program, limit: int | None) -> str:
    if limit is None:
        return ""
    return f", {program.memory.total / limit:.0%} of {in_units(limit)}: {'fits' if program.fits else 'does not fit'}"


def _traffic_lines(traffic: Traffic | None) -> list[str]:
    if traffic is None:
        return []
    if not traffic.collectives:
        return ["  collectives    none"]
    lines = [
        f"  {each.kind:20} {each.count} times, {in_units(each.bytes)} on each device, "
        f"which sends {in_units(each.sent_bytes)}"
        for each in traffic.collectives
    ]
    if traffic.num_unknown_loops:
        lines.append(f"  ({traffic.num_unknown_loops} loops whose rounds are not known count as one round)")
    return lines


def _largest_lines(plan: Plan) -> list[str]:
    found = plan.largest_batch
    if found is None:
        return ["The largest batch was not searched" + (": no limit is known." if plan.memory_limit is None else ".")]
    first = f"Largest batch that fits: {found.batch_size}" if found.batch_size else "No batch was found that fits"
    if found.too_large is not None:
        second = f"{found.too_large} does not"
    else:
        second = f"by extrapolation {found.expected_too_large} does not, which was not tried"
    tried = ", ".join(
        f"{trial.batch_size} ({'' if trial.fits else 'over, '}{'?' if trial.total is None else in_units(trial.total)})"
        for trial in found.trials
    )
    return [f"{first}; {second}. Compiled: {tried}."]


def _rows(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max(20, *(len(name) for name, _ in rows))
    return ["", title, *(f"  {name:{width}} {value}" for name, value in rows)]


def in_units(count: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
