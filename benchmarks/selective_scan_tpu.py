"""Counts the instructions of the TPU kernels for several block sizes, without a TPU.

    make tpu-compiler
    python benchmarks/selective_scan_tpu.py [--d-inner 1536] [--dtype bfloat16] [--json FILE]

A TPU core issues one bundle of instructions per cycle, so that the bundles in the compiled kernel, those of a loop's
body times its iterations, are the cycles that it takes where no copy keeps it waiting. They compare block sizes; they
are no timing. The gradient's memory is the compiler's: exact.
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

# Iterations of each loop in a kernel, in the order of its code, by the steps of a chunk.
TILES, GROUPS = 16, 8
LOOPS = {"forward": (TILES, GROUPS, TILES), "backward": (TILES, GROUPS, GROUPS, TILES)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the compiler makes of one choice of block sizes.

    Attributes:
      channels, steps: of a block.
      bundles: by pass, for one time step of all channels of one example.
      temporary_bytes: of value and gradients.
    """

    channels: int
    steps: int
    is_chosen: bool
    bundles: dict[str, float]
    temporary_bytes: int


def analyse(dump: Path, chip: str, dtype: str, batch: int, length: int, d_inner: int, d_state: int, sizes) -> Choice:
    def value_and_gradients(inputs, cotangent):
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
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )


def _bundles(dump: Path, name: str, steps: int) -> int:
    """Bundles that one invocation of a kernel issues, from the compiler's listing of its code."""
    (listing,) = dump.glob(f"*selective_scan_{name}*-final_bundles.txt")
    by_loop = collections.Counter()
    loop = 0
    # A line is "0x1b LB: >> { ... }": address, loop entry if it is one, a sign for each loop around, instructions.
    for line in re.finditer(r"^\s*0x[0-9a-f]+\s+(LB)?[^>{]*((?:> ?)*)\{", listing.read_text(), re.MULTILINE):
        depth = line[2].count(">")
        if depth == 2 and line[1]:
            loop += 1
        by_loop[loop if depth == 2 else 0] += depth > 0
    iterations = [steps // size for size in LOOPS[name]]
    if loop != len(iterations):
        raise RuntimeError(f"{listing.name} has {loop} loops, not {len(iterations)}: the kernel's code has changed")
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
):
    """Compiles the kernels for every pair of block sizes.

    Args:
      chip: v5e, v5p or v6e.
      tiles: widths of a block of channels, in tiles of 128.
      steps: lengths of a chunk.
      json: the file for all numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Read once, when the compiler is loaded.
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
