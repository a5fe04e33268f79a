"""What devices send one another in a compiled program: its collective operations, counted in its HLO.

The HLO is that of one device's program. An operation counts once per iteration of all loops around it, and of a
conditional the branch that sends most counts. On TPUs an operation that overlaps with computation is spread over
several fusions, which share a `chain_id`, and a reduce-scatter is a fusion around an all-reduce.
"""

import collections
import dataclasses
import json
from typing import Any

from google.protobuf.message import Message

from sisma_jax.planning import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_AMOUNTS = ("count", "bytes", "sent_bytes")
_Totals = collections.Counter[tuple[str, str]]
"""By kind and amount, those of `Collective`."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """All operations of one kind in a run of the program.

    Attributes:
      kind: one of KINDS.
      count: how often one runs.
      bytes: that they make or combine on a device: of each the larger of argument and result, summed.
      sent_bytes: that a device sends, if n devices in a ring share the work: (n - 1) / n of these bytes; twice that for
        an all-reduce, which is a reduce-scatter and an all-gather; and all of a permute's.
    """

    kind: str
    count: int
    bytes: int
    sent_bytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program's devices send one another.

    Attributes:
      collectives: by kind; kinds that do not occur are left out.
      num_unknown_loops: loops with collectives in them whose number of iterations is not known; these count as one.
    """

    collectives: tuple[Collective, ...]
    num_unknown_loops: int


def traffic(module: Any) -> Traffic:
    """Returns what the devices send one another in a run of a program.

    Args:
      module: one device's, the only one of `compiled.runtime_executable().hlo_modules()`.
    """
    program = _Program(hlo.read(module))
    totals = program.totals(program.entry)
    kinds = [kind for kind in KINDS if totals[kind, "count"]]
    collectives = [Collective(kind, *(totals[kind, amount] for amount in _AMOUNTS)) for kind in kinds]
    return Traffic(tuple(collectives), program.num_unknown_loops)


class _Program:
    def __init__(self, module: Message):
        self.entry = module.entry_computation_id
        self.num_unknown_loops = 0
        self._computations = {computation.id: computation for computation in module.computations}
        self._instructions = {x.id: x for computation in module.computations for x in computation.instructions}
        self._chains: set[str] = set()

    def totals(self, computation_id: int) -> _Totals:
        """Returns the amounts of all that a computation does and calls."""
        computation, totals = self._computations[computation_id], collections.Counter()
        for instruction in computation.instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS and not self._is_counted(instruction):
                is_scattered = computation.name.startswith("all-reduce-scatter")
                totals.update(self._amounts("reduce-scatter" if is_scattered else kind, instruction))
            called = [self.totals(each) for each in instruction.called_computation_ids]
            if instruction.opcode == "conditional":
                called = [max(called, key=lambda branch: sum(branch[kind, "sent_bytes"] for kind in KINDS))]
            for each in called:
                iterations = self._iterations(instruction) if each and instruction.opcode == "while" else 1
                totals.update({key: iterations * amount for key, amount in each.items()})
        return totals

    def _is_counted(self, instruction: Message) -> bool:
        """Whether another part of the same operation has been counted."""
        chain = hlo.attribute(instruction, "chain_id")
        is_counted = chain in self._chains
        if chain is not None:
            self._chains.add(chain)
        return is_counted

    def _amounts(self, kind: str, instruction: Message) -> dict[tuple[str, str], int]:
        shape = instruction.shape
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            shape = shape.tuple_shapes[1]  # of (argument, result, ...)
        size = sent = hlo.shape_bytes(shape)
        if kind != "collective-permute":
            group = hlo.group_size(instruction)
            size *= group if instruction.opcode == "reduce-scatter" else 1
            sent = (2 if kind == "all-reduce" else 1) * size * (group - 1) // group
        return {(kind, "count"): 1, (kind, "bytes"): size, (kind, "sent_bytes"): sent}

    def _iterations(self, loop: Message) -> int:
        """Returns how often a loop runs: XLA for CPUs names the number, libtpu leaves a counter that grows by ones."""
        known = json.loads(loop.backend_config or "{}").get("known_trip_count")
        if known:
            return int(known["n"])
        _, condition = (self._computations[each] for each in loop.called_computation_ids)
        state, compare = self._instructions[loop.operand_ids[0]], self._instructions[condition.root_id]
        if compare.comparison_direction == "LT" and state.opcode == "tuple":
            counter, limit = (self._instructions[each] for each in compare.operand_ids)
            start, end = self._constant(state.operand_ids[counter.tuple_index]), self._constant(limit.id)
            if counter.opcode == "get-tuple-element" and start is not None and end is not None:
                return max(end - start, 0)
        self.num_unknown_loops += 1
        return 1

    def _constant(self, instruction_id: int) -> int | None:
        instruction = self._instructions[instruction_id]
        while instruction.opcode == "copy":
            instruction = self._instructions[instruction.operand_ids[0]]
        return hlo.integer(instruction)
