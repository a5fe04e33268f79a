"""The least time of the TPU's scan kernels in a traced program: their instructions, at one bundle per cycle.

Each cycle, a TPU core issues one bundle of instructions, with slots for all of its units. The compiler has scheduled
the bundles of a kernel, so their number divided by the clock rate is the least time that the kernel takes; it takes
longer if it waits for a copy. `scan_bundles.json` has the bundles for one time step of all channels of one example, as
`benchmarks/selective_scan_tpu.py` counts them. The command in it writes it again, which is due when the kernels change.
"""

import collections
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from jax.extend import core

from sisma_jax.flops import inner_functions
from sisma_jax.parallel.topology import CLOCK_HZ, Device

_TABLE = Path(__file__).with_name("scan_bundles.json")
_PREFIX = "selective_scan_"


class Kernel(NamedTuple):
    """A scan kernel; the bundles of a time step depend on these values alone.

    Attributes:
      direction: "forward" or "backward".
      dtype: of the sequences.
      d_state: states per channel, rounded up to a multiple of 8.
      d_inner: channels on one device.
    """

    direction: str
    dtype: str
    d_state: int
    d_inner: int


def least_secs(steps: collections.Counter[Kernel], device: Device) -> float | None:
    """Returns the least seconds that the scan kernels of a program take on each device.

    The kernels of one core run one after another. They are a bound for a program with these kernels, and not for every
    program that computes the same.

    Args:
      steps: from `kernel_steps`.
      device: one of the devices.

    Returns:
      The seconds; 0.0 without kernels; None if the bundles of one of the kernels are not known.
    """
    bundles = _bundles()
    if any((device.device_kind, kernel) not in bundles for kernel in steps):
        return None
    # The grid of a kernel is divided among the cores of a device.
    return sum(
        bundles[device.device_kind, kernel] * count / (device.num_cores * CLOCK_HZ[device.device_kind])
        for kernel, count in steps.items()
    )


def kernel_steps(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> collections.Counter[Kernel]:
    """Returns the time steps of each scan kernel of a traced function on one device: examples times length.

    Kernels that the backward pass runs again count again. Of a conditional, the branch with the most steps counts. Of a
    loop whose length is not known, one iteration counts.

    Args:
      jaxpr: `jax.jit(f).trace(...).jaxpr`. The kernels are inside of `jax.shard_map`, unless there is only one device.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    total: collections.Counter[Kernel] = collections.Counter()
    for equation in jaxpr.eqns:
        total.update(_steps_of(equation))
    return total


def _steps_of(equation: core.JaxprEqn) -> dict[Kernel, int]:
    params = equation.params
    match equation.primitive.name:
        case "pallas_call":
            if not params["name"].startswith(_PREFIX):
                return {}
            # The first operands are u, delta and A, see `_kernel_inputs` in `kernels/selective_scan/pallas_tpu.py`.
            avals: list[Any] = [x.aval for x in equation.invars]
            u, _, A, *_ = avals
            *examples_and_length, d_inner = u.shape
            kernel = Kernel(params["name"].removeprefix(_PREFIX), u.dtype.name, A.shape[-2], d_inner)
            return {kernel: math.prod(examples_and_length)}
        case "scan":
            return {kernel: params["length"] * count for kernel, count in kernel_steps(params["jaxpr"]).items()}
        case "cond":
            return max(map(kernel_steps, params["branches"]), key=lambda steps: steps.total())
        case _:
            return sum(map(kernel_steps, inner_functions(params)), collections.Counter())


@functools.cache
def _bundles() -> dict[tuple[str, Kernel], float]:
    """Bundles per time step of one example, by `jax.Device.device_kind` and kernel."""
    return {
        (each["device_kind"], Kernel(direction, each["dtype"], each["d_state"], each["d_inner"])): each[direction]
        for each in json.loads(_TABLE.read_text())["kernels"]
        for direction in ("forward", "backward")
    }
