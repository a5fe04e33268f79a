"""Trains small denoisers that differ in one choice, for equal steps, and compares them on held-out faces.

    python benchmarks/ablation.py --root FOLDER [--workdir runs/ablation] [--seeds 0 1 2]

FOLDER holds CelebAMask-HQ, or a part of it. Every run has a folder of its own, so an interrupted ablation resumes.
Prints the table of docs/ablation.md; all numbers are in WORKDIR/ablation.json.
"""

import concurrent.futures
import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import tyro

from benchmarks import measure
from sisma_jax import config_files
from sisma_jax.commands.evaluate import load_or_train_segmenter
from sisma_jax.commands.train import All
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.models.factory import init_params
from sisma_jax.runs.folder import RunFolder
from sisma_jax.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]

# Choices for the model, and steps over those asked for. The first is what the others differ from, in what is said
# beside them. 4 orders take 1.6 times as long as one: the last has the same time.
VARIANTS = {
    "Cross-Mamba, state from mask; 1 order": ({}, 1),
    "Cross-Mamba, readout from mask": ({"cross_wiring": "readout_from_mask"}, 1),
    "SPADE": ({"mask_conditioning": "spade"}, 1),
    "concatenation": ({"mask_conditioning": "concat"}, 1),
    "2 orders": ({"orders_per_layer": 2}, 1),
    "4 orders": ({"orders_per_layer": 4}, 1),
    "1 order, 1.6 times the steps": ({}, 1.6),
}


def experiment(root: Path, cache_dir: Path, num_steps: int, seed: int, choices: dict) -> Config:
    base = config_files.load(ROOT / "configs" / "celebamask_sample.py")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, root=str(root), cache_dir=str(cache_dir)),
        model=dataclasses.replace(base.model, d_model=96, **choices),
        optim=dataclasses.replace(base.optim, warmup_steps=num_steps // 20, decay_steps=num_steps, ema_decay=0.99),
        train=dataclasses.replace(
            base.train, num_steps=num_steps, batch_size=8, seed=seed, checkpoint_every_steps=num_steps
        ),
        sample=dataclasses.replace(base.sample, steps=10),
        evaluate=dataclasses.replace(base.evaluate, num_samples=96),
    )


def run(experiment: Config, workdir: Path, segmenter: Path) -> dict:
    """Trains and evaluates, unless that is done, and returns the scores."""
    logging.getLogger("sisma_jax").setLevel(logging.INFO)
    folder = RunFolder(workdir, experiment)
    if not folder.evaluation.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copy(segmenter, folder.segmenter)
        All().run(experiment, workdir)
    report = json.loads(folder.evaluation.read_text())
    rates = [values["examples_per_sec"] for values in read_metrics(folder.metrics)]
    params = jax.eval_shape(lambda: init_params(experiment, jax.random.key(0)))
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "held_out_loss": report["held_out_loss"],
        "miou": report["mask_agreement"]["samples"]["miou"],
        "pixel_accuracy": report["mask_agreement"]["samples"]["pixel_accuracy"],
        "examples_per_sec": statistics.median(rates),
    }


def use_one_core(cores: multiprocessing.Queue) -> None:
    os.sched_setaffinity(0, {cores.get()})


def spread(values: list[float], digits: int) -> str:
    """Mean and half the range."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def main(
    root: Path,
    workdir: Path = Path("runs/ablation"),
    seeds: tuple[int, ...] = (0, 1, 2),
    num_steps: int = 400,
    cores: tuple[int, ...] = (0, 1),
):
    """Runs what is missing and prints the table.

    Args:
      root: as --data.root of configs/celebamask_sample.py.
      workdir: one folder per run.
      seeds: of initialisation, order of data, noise.
      num_steps: of 8 faces each.
      cores: one run at a time on each.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.resolve() / "compiled"))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    plan = {
        (name, seed): experiment(root, workdir / "data", round(times * num_steps), seed, choices)
        for seed in seeds
        for name, (choices, times) in VARIANTS.items()
    }
    any_experiment = next(iter(plan.values()))
    workdir.mkdir(parents=True, exist_ok=True)
    common = RunFolder(workdir, any_experiment)
    load_or_train_segmenter(common, DataSet.prepare(any_experiment.data), out=common)
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with concurrent.futures.ProcessPoolExecutor(len(cores), context, use_one_core, (free,)) as pool:
        futures = {
            (name, seed): pool.submit(run, one, workdir / f"{list(VARIANTS).index(name)}_{seed}", common.segmenter)
            for (name, seed), one in plan.items()
        }
        results = {key: future.result() for key, future in futures.items()}
    rows = []
    for name in VARIANTS:
        of_seeds = [results[name, seed] for seed in seeds]
        rows.append(
            [
                name,
                f"{of_seeds[0]['parameters'] / 1e3:.0f}k",
                spread([one["held_out_loss"] for one in of_seeds], 4),
                spread([one["miou"] for one in of_seeds], 3),
                spread([one["pixel_accuracy"] for one in of_seeds], 3),
                f"{statistics.median([one['examples_per_sec'] for one in of_seeds]):.1f}",
            ]
        )
    title = f"{num_steps} steps of 8, seeds {', '.join(map(str, seeds))}: mean ± half the range"
    measure.print_table(
        title, ["", "parameters", "held-out loss", "mIoU", "pixel accuracy", "examples/s per core"], rows
    )
    problems = [{"variant": name, "seed": seed, **scores} for (name, seed), scores in results.items()]
    measure.write_json(workdir / "ablation.json", "ablation", settings={"num_steps": num_steps}, problems=problems)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
