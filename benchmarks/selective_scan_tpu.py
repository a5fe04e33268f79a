"""Counts the instructions of the TPU kernels for several block sizes, without a TPU.

    make tpu-compiler
    python benchmarks/selective_scan_tpu.py [--d-inner 1536] [--dtype bfloat16] [--json FILE]

A TPU core issues one bundle of instructions per cycle. The number of bundles in a compiled kernel, with those of a loop
body multiplied by its iterations, is therefore the number of cycles that the kernel takes if it never waits for a copy.
The numbers serve to compare block sizes; they are not times. The compiler's number for the memory of the gradient is
exact.
"""

import collections
import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import tyro

from benchmarks import measure, tpu_compiler
from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import pallas_tpu

# The steps that one iteration of each loop in a kernel processes, in the order of the loops in the code.
TILES, GROUPS = 16, 8
LOOPS = {"forward": (TILES, GROUPS, TILES), "backward": (TILES, GROUPS, GROUPS, TILES)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The compiler's numbers for one choice of block sizes.

    Attributes:
      channels: channels per block.
      steps: time steps per chunk.
      is_chosen: whether `pallas_tpu.block_sizes` chooses these sizes.
      bundles: by pass, the bundles for one time step of all channels of one example.
      temporary_bytes: peak memory of value and gradients in addition to arguments and results.
    """

    channels: int
    steps: int
    is_chosen: bool
    bundles: dict[str, float]
    temporary_bytes: int


def analyse(
    dump: Path,
    chip: str,
    dtype: str,
    batch: int,
    length: int,
    d_inner: int,
    d_state: int,
    sizes: pallas_tpu.BlockSizes,
) -> Choice:
    """Compiles the scan and its gradients with given block sizes and returns the compiler's numbers.

    Args:
      dump: the folder into which the compiler writes its listings; its files are deleted first.
      chip: as for `tpu_compiler.device`.
      dtype: of the sequences u, delta, B and C; A, D and delta_bias are float32.
      batch: number of sequences.
      length: tokens per sequence.
      d_inner: channels.
      d_state: states per channel.
      sizes: the block sizes to use in place of the chosen ones.

    Raises:
      RuntimeError: a kernel does not have the loops in `LOOPS`.
    """

    def value_and_gradients(inputs: dict[str, jax.Array], cotangent: jax.Array) -> measure.PyTree:
        y, vjp = jax.vjp(
            lambda inputs: selective_scan(**inputs, delta_softplus=True, implementation="pallas_tpu"), inputs
        )
        return y, vjp(cotangent)[0]

    sequence = jax.ShapeDtypeStruct((batch, length, d_inner), dtype)
    projection = jax.ShapeDtypeStruct((batch, length, d_state), dtype)
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
    chosen = pallas_tpu.block_sizes(length, d_inner, d_state, sequence.dtype.itemsize)
    for file in dump.iterdir():
        file.unlink()
    with mock.patch.object(pallas_tpu, "block_sizes", return_value=sizes):
        compiled = tpu_compiler.compile_for(tpu_compiler.device(chip), value_and_gradients, inputs, sequence)
    blocks = -(-d_inner // (128 * sizes.tiles))
    return Choice(
        channels=128 * sizes.tiles,
        steps=sizes.steps,
        is_chosen=sizes == chosen,
        bundles={name: blocks * _bundles(dump, name, sizes.steps) / sizes.steps for name in LOOPS},
        temporary_bytes=tpu_compiler.temporary_bytes(compiled),
    )


def _bundles(dump: Path, name: str, steps: int) -> int:
    """Returns the bundles that one invocation of a kernel issues, from the compiler's listing of its code."""
    (listing,) = dump.glob(f"*selective_scan_{name}*-final_bundles.txt")
    by_loop: collections.Counter[int] = collections.Counter()
    loop = 0
    # A line is "0x1b LB: >> { ... }": address, "LB" at the entry of a loop, one ">" per enclosing loop, instructions.
    for line in re.finditer(r"^\s*0x[0-9a-f]+\s+(LB)?[^>{]*((?:> ?)*)\{", listing.read_text(), re.MULTILINE):
        depth = line[2].count(">")
        if depth == 2 and line[1]:
            loop += 1
        by_loop[loop if depth == 2 else 0] += depth > 0
    iterations = [steps // size for size in LOOPS[name]]
    if loop != len(iterations):
        raise RuntimeError(
            f"{listing.name} has {loop} loops, expected {len(iterations)}; update LOOPS to the kernel's code"
        )
    return by_loop[0] + sum(count * by_loop[i + 1] for i, count in enumerate(iterations))


def main(
    chip: str = "v5e",
    dtype: str = "bfloat16",
    batch: int = 1,
    length: int = 4096,
    d_inner: int = 1536,
    d_state: int = 16,
    tiles: tuple[int, ...] = (2, 4, 6),
    steps: tuple[int, ...] = (32, 64, 128),
    json: Path | None = None,
) -> None:
    """Compiles the kernels for every pair of block sizes and prints a table.

    Args:
      chip: v5e, v5p or v6e.
      dtype: of the sequences; bfloat16 or float32.
      batch: number of sequences.
      length: tokens per sequence.
      d_inner: channels.
      d_state: states per channel.
      tiles: widths of a block of channels, in tiles of 128.
      steps: time steps per chunk.
      json: file for all numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The compiler reads this variable once, when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        choices = [
            analyse(Path(folder), chip, dtype, batch, length, d_inner, d_state, pallas_tpu.BlockSizes(tiles=t, steps=s))
            for t in tiles
            for s in steps
        ]
    rows = [
        [
            f"{choice.channels} channels x {choice.steps} steps" + (" (chosen)" if choice.is_chosen else ""),
            *(f"{choice.bundles[name]:.0f}" for name in LOOPS),
            f"{sum(choice.bundles.values()):.0f}",
            measure.mebibytes(choice.temporary_bytes),
        ]
        for choice in choices
    ]
    title = f"{chip}, {dtype}, B={batch} L={length} D={d_inner} N={d_state}: bundles per time step of all channels"
    measure.print_table(title, ["block", *LOOPS, "both", "temp MiB"], rows)
    if json:
        records = [dataclasses.asdict(choice) for choice in choices]
        settings = {"chip": chip, "dtype": dtype, "batch": batch, "length": length, "d_inner": d_inner}
        measure.write_json(json, "selective_scan_tpu", settings=settings, choices=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
