"""Plans SISMA-B and SISMA-XL at 256 and 512 px on several TPUs, which need not be present: the tables of docs/plan.md.

    python benchmarks/plan_table.py [--results runs/plan_table.jsonl] [--topologies v5e:2x2] [--document docs/plan.md]

Each plan takes some minutes, most of them in the compiler. It is saved as a line of the results file, so the same
command resumes an interrupted table. After a change to the model or its sharding, give another results file. The
command needs the TPU compiler (`make tpu-compiler`).
"""

import dataclasses
import itertools
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import tyro

from benchmarks import measure
from sisma_jax import config, config_files
from sisma_jax.config import Config, MeshConfig
from sisma_jax.parallel import sharding
from sisma_jax.planning import plan
from sisma_jax.planning.memory import state_bytes
from sisma_jax.planning.programs import abstract_state

ROOT = Path(__file__).resolve().parents[1]

TOPOLOGIES = {"v5e:2x2": 4, "v5e:4x4": 16, "v5p:2x2x1": 4}
PRESETS = ("B", "XL")
SIZES = (256, 512)
FSDP = (1, 2, 4, 8, 16)
MAX_TRIALS = 3

BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"

PlanRecord: TypeAlias = dict[str, Any]
"""The fields of `sisma_jax.planning.Plan`, as JSON."""
Plans: TypeAlias = dict[tuple[str, int, str], PlanRecord]
"""By preset, size in pixels and topology."""


def experiment(preset: str, size: int, num_devices: int) -> Config:
    """Returns `configs/celebamask_hq_SIZE.py` with the sizes of a preset, sharded over all devices.

    Args:
      preset: a key of `sisma_jax.config.PRESETS`.
      size: side of the images in pixels, 256 or 512.
      num_devices: size of the mesh axis `fsdp`.
    """
    base = config_files.load(ROOT / "configs" / f"celebamask_hq_{size}.py")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **config.PRESETS[preset]),
        mesh=MeshConfig(fsdp=num_devices),
    )


def read(results: Path) -> Plans:
    """Returns the plans in a results file; none if the file does not exist."""
    lines = results.read_text().splitlines() if results.exists() else []
    records = [json.loads(line) for line in lines]
    return {(record["preset"], record["size"], record["topology"]): record["plan"] for record in records}


def plans_table(plans: Plans) -> list[str]:
    """Returns the table of the plans as rows of Markdown. Rows of plans that do not exist contain no numbers."""
    columns = (
        "model",
        "px",
        "chips",
        "GiB per chip",
        "state",
        "step, batch 64: arguments + temporaries + program",
        "sampler, batch 16",
        "TFLOPs per step",
        "sent per step",
        "lower bound, ms: products + scans",
        "largest batch",
        "too large",
    )
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for preset, size, topology in itertools.product(PRESETS, SIZES, TOPOLOGIES):
        made = plans.get((preset, size, topology))
        cells = ["not made"] + [""] * (len(columns) - 4) if made is None else _cells(made)
        rows.append(f"| {' | '.join([f'SISMA-{preset}', str(size), topology, *cells])} |")
    return rows


def _cells(made: PlanRecord) -> list[str]:
    train, sampler, largest = made["train"], made["sampler"], made["largest_batch"]
    sent = sum(each["sent_bytes"] for each in train["traffic"]["collectives"]) if train["traffic"] else None
    least_secs = [train["flops"]["matmul"] / (made["num_devices"] * made["peak_flops"])]
    if train["scan_secs"] is not None:
        least_secs.append(train["scan_secs"])
    return [
        gib(made["memory_limit"]),
        gib(sum(made["state"].values())),
        _sum(train),
        gib(sampler["needed"]) if sampler["fits"] else "does not fit",
        f"{sum(train['flops'].values()) / 1e12:.1f}",
        "" if sent is None else gib(sent),
        " + ".join(f"{1e3 * secs:.0f}" for secs in least_secs),
        *(("", "") if largest is None else (str(largest["batch_size"] or "none"), _too_large(largest))),
    ]


def _too_large(largest: dict[str, Any]) -> str:
    if largest["too_large"] is not None:
        return str(largest["too_large"])
    return f"({largest['expected_too_large']})"


def _sum(program: dict[str, Any]) -> str:
    if program["memory"] is None:
        needed = "" if program["needed"] is None else f": > {gib(program['needed'])}"
        return f"does not fit{needed}"
    parts = program["memory"]
    text = f"{gib(parts['arguments'] + parts['outputs'])} + {gib(parts['temporaries'])} + {gib(parts['code'])}"
    return text if program["fits"] else f"{text}: does not fit"


def state_table() -> list[str]:
    """Returns the table of the bytes of the training state per device as rows of Markdown."""
    rows = [f"| | {' | '.join(f'fsdp {parts}' for parts in FSDP)} |", "|" + "---|" * (len(FSDP) + 1)]
    for preset in PRESETS:
        states = []
        for parts in FSDP:
            mesh = jax.sharding.AbstractMesh((1, parts, 1), sharding.AXES)
            states.append(state_bytes(abstract_state(experiment(preset, 256, parts), mesh)))
        for name in ("parameters", "ema", "optimizer"):
            sizes = [getattr(state, name) for state in states]
            cells = [f"{gib(size)} ({sizes[0] / size:.2f})" for size in sizes]
            rows.append(f"| SISMA-{preset}, {name} | {' | '.join(cells)} |")
    return rows


def gib(count: int) -> str:
    """Returns `count` bytes in GiB, without the unit."""
    return f"{count / 2**30:.2f}"


def write(document: Path, tables: dict[str, list[str]]) -> None:
    """Replaces each table between its markers in a Markdown document.

    Args:
      document: the file.
      tables: rows by the name of the table, for example "plans" for the markers "<!-- plans -->" and "<!-- end of plans
        -->". Tables without markers in the document are left out.
    """
    text = document.read_text()
    for name, rows in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        replaced = "\n".join([begin, *rows, end])
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, new=replaced: new, text, flags=re.DOTALL)
    document.write_text(text)


def main(
    results: Path = Path("runs/plan_table.jsonl"),
    document: Path | None = None,
    topologies: tuple[str, ...] = tuple(TOPOLOGIES),
    presets: tuple[str, ...] = PRESETS,
    sizes: tuple[int, ...] = SIZES,
    max_trials: int = MAX_TRIALS,
) -> None:
    """Makes the plans that are missing and prints the tables.

    Args:
      results: file of the plans, one per line.
      document: Markdown file whose tables are replaced.
      topologies: keys of `TOPOLOGIES`.
      presets: keys of `sisma_jax.config.PRESETS`.
      sizes: sides of the images in pixels.
      max_trials: number of batch sizes that the search for the largest one may compile, including the configured one.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, force=True)
    logging.getLogger("sisma_jax").setLevel(logging.INFO)
    results.parent.mkdir(parents=True, exist_ok=True)
    for size, preset, topology in itertools.product(sizes, presets, topologies):
        if (preset, size, topology) in read(results):
            continue
        print(f"SISMA-{preset}, {size} px, {topology}", file=sys.stderr, flush=True)
        settings = experiment(preset, size, TOPOLOGIES[topology])
        made = dataclasses.asdict(plan(settings, topology, search=max_trials > 1, max_trials=max_trials))
        record = {"preset": preset, "size": size, "topology": topology, "machine": measure.machine_facts()}
        with results.open("a") as file:
            file.write(json.dumps(record | {"plan": made}) + "\n")
    tables = {"plans": plans_table(read(results)), "state": state_table()}
    for rows in tables.values():
        print("\n".join(["", *rows]))
    if document is not None:
        write(document, tables)


if __name__ == "__main__":
    tyro.cli(main)
