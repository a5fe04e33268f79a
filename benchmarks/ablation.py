"""Trains small denoisers that differ in one choice and compares them on held-out faces.

    python benchmarks/ablation.py --root FOLDER [--workdir runs/ablation] [--seeds 0 1 2]

FOLDER contains CelebAMask-HQ or a part of it. Every run has its own folder, so an interrupted ablation resumes. The
command prints the table of docs/ablation.md and writes all numbers to WORKDIR/ablation.json.
"""

import concurrent.futures
import dataclasses
import logging
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import tyro

from benchmarks import measure
from sisma_jax import config_files
from sisma_jax.commands.parser import prepare_parser
from sisma_jax.commands.train import All
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.evaluation import results
from sisma_jax.models.factory import init_params
from sisma_jax.runs.folder import RunFolder
from sisma_jax.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]

# For each variant the fields of `ModelConfig` that it sets, and the factor by which it multiplies the number of steps.
# The first variant is the baseline, which all others change in one respect. A step with 4 orders takes 1.6 times as
# long as one with 1 order, so the last variant trains for the same time as the one before it.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "Cross-Mamba, state from mask; 1 order": ({}, 1),
    "Cross-Mamba, readout from mask": ({"cross_wiring": "readout_from_mask"}, 1),
    "SPADE": ({"mask_conditioning": "spade"}, 1),
    "concatenation": ({"mask_conditioning": "concat"}, 1),
    "2 orders": ({"orders_per_layer": 2}, 1),
    "4 orders": ({"orders_per_layer": 4}, 1),
    "1 order, 1.6 times the steps": ({}, 1.6),
}


class Scores(TypedDict):
    """The results of a run: measurements on held-out data, and the median rate of training."""

    parameters: int
    held_out_loss: float
    miou: float
    pixel_accuracy: float
    examples_per_sec: float


def experiment(root: Path, cache_dir: Path, num_steps: int, seed: int, choices: dict[str, Any]) -> Config:
    """Returns the configuration of one run: `configs/celebamask_sample.py` with a small model.

    Args:
      root: folder of the raw data.
      cache_dir: folder for the shards.
      num_steps: training steps of 8 faces.
      seed: of initialisation, order of the data and noise.
      choices: fields of `ModelConfig` to replace.
    """
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


def run(experiment: Config, workdir: Path) -> Scores:
    """Trains and evaluates, unless the folder already contains an evaluation, and returns the scores.

    Args:
      experiment: configuration of the run.
      workdir: folder of the run.
    """
    logging.getLogger("sisma_jax").setLevel(logging.INFO)
    folder = RunFolder(workdir, experiment)
    if not folder.evaluation.result.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        All().run(experiment, workdir)
    report = results.read(folder.evaluation.result)
    scores = results.flat_scores(report)
    rates = [values["examples_per_sec"] for values in read_metrics(folder.metrics)]
    params = jax.eval_shape(lambda: init_params(experiment, jax.random.key(0)))
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "held_out_loss": scores["held_out_loss"]["value"],
        "miou": scores["miou"]["value"],
        "pixel_accuracy": scores["pixel_accuracy"]["value"],
        "examples_per_sec": statistics.median(rates),
    }


def use_one_core(cores: "multiprocessing.Queue[int]") -> None:
    """Binds this process to the next core in the queue."""
    os.sched_setaffinity(0, {cores.get()})


def spread(values: list[float], digits: int) -> str:
    """Returns "mean ± half the range" of `values`, with the given number of decimal `digits`."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def main(
    root: Path,
    workdir: Path = Path("runs/ablation"),
    seeds: tuple[int, ...] = (0, 1, 2),
    num_steps: int = 400,
    cores: tuple[int, ...] = (0, 1),
) -> None:
    """Executes the runs that are missing and prints the table.

    Args:
      root: folder of the raw data, as --data.root of configs/celebamask_sample.py.
      workdir: folder for the results; contains one folder per run.
      seeds: one run of each variant per seed, which determines initialisation, order of the data and noise.
      num_steps: training steps of 8 faces.
      cores: numbers of the CPU cores to use; each executes one run at a time.
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
    with RunFolder.writing(workdir / "parser", any_experiment) as common:
        prepare_parser(common, DataSet.prepare(any_experiment.data))
    parser = dataclasses.replace(any_experiment.parser, weights=str(common.parser_path))
    plan = {key: dataclasses.replace(one, parser=parser) for key, one in plan.items()}
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with concurrent.futures.ProcessPoolExecutor(len(cores), context, use_one_core, (free,)) as pool:
        futures = {
            (name, seed): pool.submit(run, one, workdir / f"{list(VARIANTS).index(name)}_{seed}")
            for (name, seed), one in plan.items()
        }
        results = {key: future.result() for key, future in futures.items()}
    rows = []
    for name in VARIANTS:
        scores = [results[name, seed] for seed in seeds]
        rows.append(
            [
                name,
                f"{scores[0]['parameters'] / 1e3:.0f}k",
                spread([one["held_out_loss"] for one in scores], 4),
                spread([one["miou"] for one in scores], 3),
                spread([one["pixel_accuracy"] for one in scores], 3),
                f"{statistics.median([one['examples_per_sec'] for one in scores]):.1f}",
            ]
        )
    title = f"{num_steps} steps of 8, seeds {', '.join(map(str, seeds))}: mean ± half the range"
    measure.print_table(
        title, ["", "parameters", "held-out loss", "mIoU", "pixel accuracy", "examples per second per core"], rows
    )
    problems = [{"variant": name, "seed": seed, **scores} for (name, seed), scores in results.items()]
    measure.write_json(workdir / "ablation.json", "ablation", settings={"num_steps": num_steps}, problems=problems)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
