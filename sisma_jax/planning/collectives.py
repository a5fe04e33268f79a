"""Communication between the devices of a compiled program: counts the collective operations in its HLO.

The HLO is the program of one device. An operation in a loop counts once per iteration. Of a conditional, only the
branch that sends the most bytes counts. On TPUs, an operation that overlaps with computation consists of several
fusions that share a `chain_id`, and a reduce-scatter is a fusion that contains an all-reduce.
"""

import collections
import dataclasses
import json

from sisma_jax.planning import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_AMOUNTS = ("count", "bytes", "sent_bytes")
_Totals = collections.Counter[tuple[str, str]]
"""From (kind, amount) to the total, where an amount is a field of `Collective`."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """The totals of all operations of one kind in one run of the program.

    Attributes:
      kind: one of KINDS.
      count: number of operations that run.
      bytes: bytes of the operations' arrays on one device. Of each operation, the larger of argument and result counts.
      sent_bytes: bytes that one device sends if n devices form a ring: `bytes` times (n - 1) / n; twice that for an
        all-reduce, which is a reduce-scatter and an all-gather; and `bytes` for a collective-permute.
    """

    kind: str
    count: int
    bytes: int
    sent_bytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The communication between the devices in one run of a program.

    Attributes:
      collectives: one entry per kind that occurs, in the order of KINDS.
      num_unknown_loops: number of loops that contain collectives and have an unknown number of iterations. The totals
        include one iteration of each.
    """

    collectives: tuple[Collective, ...]
    num_unknown_loops: int


def traffic(module: hlo.SerializableModule) -> Traffic:
    """Returns the communication between the devices in one run of a program.

    Args:
      module: the program of one device, which is the only entry of `compiled.runtime_executable().hlo_modules()`.

    Raises:
      NotImplementedError: this version of XLA writes the device groups of a collective in an unknown field.
    """
    program = _Program(hlo.read(module))
    totals = program.totals(program.entry)
    kinds = [kind for kind in KINDS if totals[kind, "count"]]
    collectives = [Collective(kind, *(totals[kind, amount] for amount in _AMOUNTS)) for kind in kinds]
    return Traffic(tuple(collectives), program.num_unknown_loops)


class _Program:
    """A module with its computations and instructions by id, and what the count has found so far."""

    def __init__(self, module: hlo.Module):
        self.entry = module.entry_computation_id
        self.num_unknown_loops = 0
        self._computations = {computation.id: computation for computation in module.computations}
        self._instructions = {x.id: x for computation in module.computations for x in computation.instructions}
        self._chains: set[str] = set()

    def totals(self, computation_id: int) -> _Totals:
        """Returns the totals of a computation, including the computations that it calls."""
        computation = self._computations[computation_id]
        totals: _Totals = collections.Counter()
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

    def _is_counted(self, instruction: hlo.Instruction) -> bool:
        """Whether another instruction of the same chain has been counted; marks the chain as counted."""
        chain = hlo.attribute(instruction, "chain_id")
        is_counted = chain in self._chains
        if chain is not None:
            self._chains.add(chain)
        return is_counted

    def _amounts(self, kind: str, instruction: hlo.Instruction) -> dict[tuple[str, str], int]:
        """The amounts of a single operation."""
        shape = instruction.shape
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            shape = shape.tuple_shapes[1]  # the tuple is (argument, result, ...)
        size = sent = hlo.shape_bytes(shape)
        if kind != "collective-permute":
            group = hlo.group_size(instruction)
            size *= group if instruction.opcode == "reduce-scatter" else 1
            sent = (2 if kind == "all-reduce" else 1) * size * (group - 1) // group
        return {(kind, "count"): 1, (kind, "bytes"): size, (kind, "sent_bytes"): sent}

    def _iterations(self, loop: hlo.Instruction) -> int:
        """Returns the number of iterations of a loop, or 1 if it is not known.

        XLA for CPUs states the number in the backend configuration. In programs of libtpu it is the difference between
        the limit and the start of a counter, which is assumed to grow by 1.
        """
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
        """The value of an integer constant, or of a copy of one; None for other instructions."""
        instruction = self._instructions[instruction_id]
        while instruction.opcode == "copy":
            instruction = self._instructions[instruction.operand_ids[0]]
        return hlo.integer(instruction)
