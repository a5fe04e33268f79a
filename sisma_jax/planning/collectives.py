"""What devices send one another in a compiled program: its collective operations, read from the text of its HLO.

The text is that of one device's program. Loops name their number of rounds (`known_trip_count`), or show it in their
condition; an operation counts once for each round of all loops around it. On TPUs an operation that overlaps with
others is spread over several fusions, which its channel number tells to be one, and a reduce-scatter is a fusion around
an all-reduce.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
_KINDS_BY_OPCODE = {**{kind: kind for kind in KINDS}, "ragged-all-to-all": "all-to-all"}

# Bits of the types that are not named after them.
_BITS = {"pred": 8, "token": 0, "opaque": 0}


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
      num_unknown_loops: loops with collectives in them whose rounds could not be read; these count as one.
    """

    collectives: tuple[Collective, ...]
    num_unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool


_Computation = dict[str, _Instruction]


def traffic(hlo: str) -> Traffic:
    """Returns what the devices send one another in a run of a program.

    Args:
      hlo: `as_text()` of what `compile()` returned.
    """
    program = _Program(hlo)
    totals = defaultdict(lambda: [0, 0, 0])
    for kind, instruction, rounds in program.collectives(program.entry, 1):
        group = program.group_size(instruction)
        size = _payload_bytes(kind, instruction, group)
        for i, amount in enumerate((1, size, _sent_bytes(kind, size, group))):
            totals[kind][i] += rounds * amount
    found = tuple(Collective(kind, *totals[kind]) for kind in KINDS if kind in totals)
    return Traffic(found, len(program.unknown_loops))


class _Program:
    def __init__(self, hlo: str):
        header = re.search(r"num_partitions=(\d+)", hlo.partition("\n")[0])
        self.num_devices = int(header[1]) if header else 1
        self.entry = ""
        self.computations: dict[str, _Computation] = {}
        self.unknown_loops: set[str] = set()
        current: _Computation = {}
        for line in hlo.splitlines():
            if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
                name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY ") else self.entry
            elif line.startswith("  ") and (instruction := _read(line)):
                current[instruction.name] = instruction

    def collectives(self, name: str, rounds: int) -> Iterator[tuple[str, _Instruction, int]]:
        """Yields kind, instruction and how often it runs, for all that a computation does and calls."""
        seen = set()
        for kind, instruction in self._within(name):
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            if channel is None or channel[1] not in seen:
                yield kind, instruction, rounds
            if channel:
                seen.add(channel[1])
        for loop in self._loops(name):
            body = re.search(r"\bbody=%?([\w.\-]+)", loop.rest)[1]
            if not self._has_collectives(body):
                continue
            trips = self._trip_count(name, loop)
            if trips is None:
                self.unknown_loops.add(loop.name)
            yield from self.collectives(body, rounds * (1 if trips is None else trips))

    def _within(self, name: str) -> Iterator[tuple[str, _Instruction]]:
        """Yields the collectives of a computation and of what it calls, loops left out."""
        for instruction in self.computations[name].values():
            kind = _KINDS_BY_OPCODE.get(instruction.opcode.removesuffix("-start"))
            if kind is not None:
                yield "reduce-scatter" if name.startswith("all-reduce-scatter") else kind, instruction
            for called in self._called(instruction):
                yield from self._within(called)

    def _loops(self, name: str) -> Iterator[_Instruction]:
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                yield instruction
            for called in self._called(instruction):
                yield from self._loops(called)

    def _called(self, instruction: _Instruction) -> list[str]:
        """Names of the computations that an instruction runs once, if it is no loop."""
        if instruction.opcode == "while":
            return []
        names = re.findall(r"\b(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)", instruction.rest)
        for several in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.rest):
            names += [name.strip().lstrip("%") for name in several.split(",")]
        return [name for name in names if name in self.computations]

    @functools.cache  # noqa: B019 (a program lives as long as one call of `traffic`)
    def _has_collectives(self, name: str) -> bool:
        if next(self._within(name), None) is not None:
            return True
        return any(self._has_collectives(re.search(r"\bbody=%?([\w.\-]+)", loop.rest)[1]) for loop in self._loops(name))

    def _trip_count(self, name: str, loop: _Instruction) -> int | None:
        """Rounds of a loop: named, or those of a counter from a constant (0 if not seen) to a constant by ones."""
        named = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if named:
            return int(named[1])
        condition = self.computations[re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)[1]]
        root = next(x for x in condition.values() if x.is_root)
        if root.opcode == "fusion":  # whose parameters are the condition's counter and limit
            outer, condition = (root, condition), self.computations[self._called(root)[0]]
            root = next(x for x in condition.values() if x.is_root)
        else:
            outer = None
        direction = re.search(r"direction=(\w+)", root.rest)
        if root.opcode != "compare" or direction is None:
            return None
        left, right = (_resolve(condition, operand, outer) for operand in root.operands)
        if direction[1] in ("GT", "GE"):
            left, right = right, left
        limit, index = _constant(right), re.search(r"index=(\d+)", left.rest)
        if limit is None or left.opcode != "get-tuple-element" or direction[1] not in ("LT", "LE", "GT", "GE", "NE"):
            return None
        start = self._start(name, loop, int(index[1]))
        return max(limit - start + direction[1].endswith("LE") + direction[1].endswith("GE"), 0)

    def _start(self, name: str, loop: _Instruction, index: int) -> int:
        """The counter's first value, 0 where it is not a constant in sight."""
        around = next(x for x in self.computations.values() if x.get(loop.name) is loop)
        initial = _resolve(around, loop.operands[0], None)
        if initial.opcode != "tuple":
            return 0
        return _constant(_resolve(around, initial.operands[index], None)) or 0

    def group_size(self, instruction: _Instruction) -> int:
        """How many devices take part together."""
        rest = instruction.rest
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return listed[1].count(",") + 1
        if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
            return int(iota[2])
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", rest):
            sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
            used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # an axis, or a part of one
            return math.prod(int(part) if part else sizes[axis] for axis, part in used)
        return self.num_devices


def _read(line: str) -> _Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    text = line[match.end() :]
    end = _closing(text) if text.startswith("(") else text.find(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, _, _ = text.partition("(")
    end = len(opcode) + _closing(text[len(opcode) :])
    operands = re.findall(r"%([\w.\-]+)", text[len(opcode) : end])
    # A constant's operand is its value.
    rest = text[end:] if opcode != "constant" else text
    return _Instruction(match[2], shape, opcode, tuple(operands), rest, match[1] is not None)


def _closing(text: str) -> int:
    """Where the parenthesis with which the text opens has ended."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _resolve(computation: _Computation, name: str, outer: tuple[_Instruction, _Computation] | None) -> _Instruction:
    """The instruction that a value is from, through copies, and out of a fusion."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "parameter" and outer is not None:
        caller, around = outer
        number = [x.name for x in computation.values() if x.opcode == "parameter"].index(instruction.name)
        return _resolve(around, caller.operands[number], None)
    return instruction


def _constant(instruction: _Instruction) -> int | None:
    match = re.match(r"constant\((-?\d+)\)", instruction.rest)
    return int(match[1]) if match and instruction.opcode == "constant" else None


def _payload_bytes(kind: str, instruction: _Instruction, group: int) -> int:
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute", "collective-broadcast"):
        shape = _elements(shape)[1]  # (argument, result, ...)
    return _shape_bytes(shape) * (group if instruction.opcode == "reduce-scatter" else 1)


def _sent_bytes(kind: str, size: int, group: int) -> int:
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) // group


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    elements, depth, start = [], 0, 1
    for match in re.finditer(r"[(){}\[\],]", shape):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        if (match[0] == "," and depth == 1) or depth == 0:
            elements.append(shape[start : match.start()])
            start = match.end()
    return elements


def _shape_bytes(shape: str) -> int:
    """Bytes of an array's entries, or of all arrays of a tuple; without padding."""
    total = 0
    for dtype, dimensions in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
        bits = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(x.removeprefix("<=")) for x in dimensions.split(",") if x) * bits // 8
    return total
