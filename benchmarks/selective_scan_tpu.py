"""Counts the instructions of the TPU kernels without a TPU: at the widths of the presets, or for several block sizes.

    make tpu-compiler
    python benchmarks/selective_scan_tpu.py [--chips v5e v6e] [--d-inner 1536] [--tiles 2 3 4] [--steps 64 128]
    python benchmarks/selective_scan_tpu.py --table sisma_jax/planning/scan_bundles.json

The second command writes the table of bundles that `sisma_jax.planning` reads. It is due when the kernels change.

A TPU core issues one bundle of instructions per cycle. The number of bundles in a compiled kernel, with those of a loop
body multiplied by its iterations, is therefore the number of cycles that the kernel takes if it never waits for a copy.
The numbers serve to compare kernels; they are not times. The compiler's number for the memory of the gradient is exact.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import tyro

from benchmarks import measure, tpu_compiler
from sisma_jax.config import PRESETS
from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import pallas_tpu
from sisma_jax.kernels.selective_scan.pallas_tpu_layout import GROUP, BlockSizes

PASSES = ("forward", "backward")
# expand is 2 in all presets.
PRESET_WIDTHS = tuple(sorted({2 * sizes["d_model"] for sizes in PRESETS.values()}))

# A loop of a kernel: how often it runs per chunk, and the loops inside it.
Loop = tuple[float, "list[Loop]"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a scan.

    Attributes:
      batch: number of sequences.
      length: tokens per sequence.
      d_inner: channels.
      d_state: states per channel.
      dtype: of the sequences u, delta, B and C; A, D and delta_bias are float32.
    """

    batch: int
    length: int
    d_inner: int
    d_state: int
    dtype: str

    def sizes(self) -> BlockSizes:
        """Returns the block sizes that the kernels choose."""
        itemsize = jax.numpy.dtype(self.dtype).itemsize
        return pallas_tpu.block_sizes(self.batch, self.length, self.d_inner, self.d_state, itemsize)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The compiler's numbers for the kernel of one pass.

    Attributes:
      bundles: for one time step of all channels of one example.
      exponentials: registers whose exponential is computed, likewise.
      spills: stores of registers that the compiler ran out of, likewise.
      registers: vector registers that occur, of 64.
    """

    bundles: float
    exponentials: float
    spills: float
    registers: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """The compiler's numbers for one choice of block sizes.

    Attributes:
      chip: as for `tpu_compiler.device`.
      problem: the sizes of the scan.
      sizes: the block sizes.
      is_chosen: whether the kernels choose these sizes.
      kernels: by pass.
      temporary_bytes: peak memory of value and gradients in addition to arguments and results.
    """

    chip: str
    problem: Problem
    sizes: BlockSizes
    is_chosen: bool
    kernels: dict[str, Kernel]
    temporary_bytes: int


@contextlib.contextmanager
def listings() -> Iterator[Path]:
    """Yields the folder into which the compiler writes its listings; to be entered before the first compilation."""
    with tempfile.TemporaryDirectory() as folder:
        # The compiler reads this variable once, when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        yield Path(folder)


def analyse(dump: Path, chip: str, problem: Problem, sizes: BlockSizes) -> Choice:
    """Compiles the scan and its gradients with given block sizes and returns the compiler's numbers.

    Args:
      dump: the folder of `listings`; its files are deleted first.
      chip: as for `tpu_compiler.device`.
      problem: the sizes of the scan.
      sizes: the block sizes to use in place of the chosen ones.

    Raises:
      RuntimeError: a kernel does not have the loops that are expected.
    """

    def value_and_gradients(inputs: dict[str, jax.Array], cotangent: jax.Array) -> measure.PyTree:
        y, vjp = jax.vjp(
            lambda inputs: selective_scan(**inputs, delta_softplus=True, implementation="pallas_tpu"), inputs
        )
        return y, vjp(cotangent)[0]

    batch, length, d_inner, d_state = problem.batch, problem.length, problem.d_inner, problem.d_state
    sequence = jax.ShapeDtypeStruct((batch, length, d_inner), problem.dtype)
    projection = jax.ShapeDtypeStruct((batch, length, d_state), problem.dtype)
    channels = jax.ShapeDtypeStruct((d_inner,), "float32")
    inputs = {
        "u": sequence,
        "delta": sequence,
        "A": jax.ShapeDtypeStruct((d_inner, d_state), "float32"),
        "B": projection,
        "C": projection,
        "D": channels,
        "delta_bias": channels,
    }
    for file in dump.iterdir():
        file.unlink()
    is_chosen = sizes == problem.sizes()
    with mock.patch.object(pallas_tpu, "block_sizes", return_value=sizes):
        compiled = tpu_compiler.compile_for(tpu_compiler.device(chip), value_and_gradients, inputs, sequence)
    chunks = -(-length // sizes.steps)
    # Time steps of all channels of one example, per program of the grid.
    scale = -(-d_inner // sizes.channels) / sizes.steps
    kernels = {name: count(dump, name, loops(name, sizes, chunks), scale) for name in PASSES}
    return Choice(chip, problem, sizes, is_chosen, kernels, tpu_compiler.temporary_bytes(compiled))


def loops(name: str, sizes: BlockSizes, chunks: int) -> list[Loop]:
    """Returns the loops of a kernel in the order of its code; those that run once per chunk are no loops.

    Args:
      name: an entry of `PASSES`.
      sizes: the block sizes.
      chunks: chunks in the sequence.
    """
    groups = sizes.steps // GROUP
    tiles: list[Loop] = [(groups // 2, [])] if groups > 2 else []
    steps: list[Loop] = [(groups, [])] if groups > 1 else []
    if name == "backward":
        # The gradients of B and C are cleared in the first chunk.
        clear: list[Loop] = [(groups / chunks, [])] if groups > 1 else []
        strips = steps + steps
    else:
        clear, strips = [], steps
    return clear + tiles + ([(sizes.strips, strips)] if sizes.strips > 1 else strips) + tiles


def count(dump: Path, name: str, expected: list[Loop], scale: float) -> Kernel:
    """Returns the numbers of a kernel from the compiler's listings of its code.

    Args:
      dump: the folder of the listings.
      name: an entry of `PASSES`.
      expected: the kernel's loops.
      scale: multiplies what one program of the grid does.

    Raises:
      RuntimeError: the kernel does not have these loops.
    """
    (listing,) = dump.glob(f"*selective_scan_{name}*-final_bundles.txt")
    (utilization,) = dump.glob(f"*selective_scan_{name}*-final_hlo-static-per-bundle-utilization.txt")
    text = listing.read_text()
    # A line per bundle: the use of each unit, the last but one of which stores spilled registers.
    spills = [int(line[1]) for line in re.finditer(r"^(?:\d+ ){8}(\d+) \d+$", utilization.read_text(), re.MULTILINE)]
    # A line is "0x1b LB: >> { ... }": address, "LB" at the entry of a loop, one ">" per enclosing loop, instructions.
    bundles = list(re.finditer(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB)?[^>{\n]*((?:> ?)*)\{(.*)", text, re.MULTILINE))
    if len(bundles) != len(spills):
        raise RuntimeError(f"{listing.name} has {len(bundles)} bundles, but {utilization.name} {len(spills)}")

    found: dict[tuple[int, ...], int] = {}  # loops by path: the number of each enclosing loop within the one around it
    path: tuple[int, ...] = ()
    totals = [0.0, 0.0, 0.0]
    for bundle, spilled in zip(bundles, spills, strict=True):
        depth = bundle[2].count(">")
        if bundle[1]:
            parent = path[: depth - 1]
            found[parent] = found.get(parent, 0) + 1
            path = (*parent, found[parent])
        if depth == 0:  # outside the loop over the grid
            continue
        times, inside = 1.0, expected
        for k in path[1:depth]:
            if k > len(inside):
                raise RuntimeError(f"{listing.name} has more loops than expected; update `loops` to the kernel's code")
            iterations, inside = inside[k - 1]
            times *= iterations
        for i, number in enumerate((1, bundle[3].count("vpow2"), spilled)):
            totals[i] += times * number
    if found.get((1,), 0) != len(expected):
        raise RuntimeError(
            f"{listing.name} has {found.get((1,), 0)} loops, expected {len(expected)}; update `loops` to its code"
        )
    registers = {int(register) for register in re.findall(r"%v\d+_v(\d+)", text)}
    return Kernel(*(scale * total for total in totals), registers=len(registers))


def write_table(path: Path, choices: list[Choice]) -> None:
    """Writes the bundles per time step of all channels of one example as JSON, for `sisma_jax.planning.scans`.

    Args:
      path: the file, which is replaced if it exists.
      choices: of one problem for each number of channels.
    """
    devices = {choice.chip: tpu_compiler.device(choice.chip) for choice in choices}
    kernels = [
        {
            "device_kind": devices[choice.chip].device_kind,
            "dtype": choice.problem.dtype,
            "d_state": choice.problem.d_state,
            "d_inner": choice.problem.d_inner,
            **{name: round(choice.kernels[name].bundles, 1) for name in PASSES},
        }
        for choice in choices
    ]
    lines = ",\n".join(f"  {json.dumps(kernel)}" for kernel in kernels)
    # The last line of libtpu's version is its build.
    compiler = {f"libtpu, {device.client.platform_version.splitlines()[-1]}" for device in devices.values()}
    header = {"command": "python benchmarks/selective_scan_tpu.py --table PATH", "compiler": ", ".join(compiler)}
    path.write_text(f'{json.dumps(header)[:-1]},\n"kernels": [\n{lines}\n]}}\n')


def main(
    chips: tuple[str, ...] = ("v5e", "v5p", "v6e"),
    dtype: str = "bfloat16",
    batch: int = 8,
    length: int = 1024,
    d_inner: tuple[int, ...] = PRESET_WIDTHS,
    d_state: int = 16,
    tiles: tuple[int, ...] = (),
    steps: tuple[int, ...] = (),
    table: Path | None = None,
    json: Path | None = None,
) -> None:
    """Compiles the kernels for every chip, width and choice of block sizes and prints a table.

    Args:
      chips: v5e, v5p or v6e.
      dtype: of the sequences; bfloat16 or float32.
      batch: number of sequences.
      length: tokens per sequence.
      d_inner: channels; by default those of the presets.
      d_state: states per channel.
      tiles: widths of a strip, in tiles of 128 channels; by default the one that the kernels choose.
      steps: time steps per chunk; by default the number that the kernels choose.
      table: file for the bundles of the block sizes that the kernels choose.
      json: file for all numbers.
    """
    choices: list[Choice] = []
    with listings() as dump:
        for problem in (Problem(batch, length, width, d_state, dtype) for width in d_inner):
            chosen = problem.sizes()
            for t in tiles or (chosen.tiles,):
                strips = -(-chosen.channels // (128 * t))
                for s in steps or (chosen.steps,):
                    choices += [analyse(dump, chip, problem, BlockSizes(t, strips, s)) for chip in chips]
    choices.sort(key=lambda choice: chips.index(choice.chip))
    rows = [
        [
            choice.chip,
            str(choice.problem.d_inner),
            f"{128 * choice.sizes.tiles} x {choice.sizes.strips} x {choice.sizes.steps}" + "*" * choice.is_chosen,
            *(f"{choice.kernels[name].bundles:.1f}" for name in PASSES),
            *(f"{choice.kernels[name].exponentials:.0f}" for name in PASSES),
            *(f"{choice.kernels[name].spills:.1f}" for name in PASSES),
            *(f"{choice.kernels[name].registers}" for name in PASSES),
            measure.mebibytes(choice.temporary_bytes),
        ]
        for choice in choices
    ]
    title = (
        f"{dtype}, B={batch} L={length} N={d_state}: per time step of all channels, forward and backward; "
        "blocks are channels per strip x strips x steps, * chosen"
    )
    columns = [f"{name} {short}" for name in ("bundles", "exp", "spills", "registers") for short in ("fwd", "bwd")]
    measure.print_table(title, ["chip", "D", "block", *columns, "temp MiB"], rows)
    if table:
        write_table(table, [choice for choice in choices if choice.is_chosen])
    if json:
        records = [dataclasses.asdict(choice) for choice in choices]
        measure.write_json(json, "selective_scan_tpu", choices=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
