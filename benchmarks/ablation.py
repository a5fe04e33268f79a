"""Trains small denoisers that differ in one choice and compares them on held-out faces.

    python benchmarks/ablation.py --root FOLDER [--workdir runs/ablation] [--seeds 0 1 2]
    python benchmarks/ablation.py --root FOLDER --study state_space

FOLDER contains CelebAMask-HQ or a part of it. Every run has its own folder, so an interrupted ablation resumes. The
command prints a table of docs/ablation.md and writes all numbers to WORKDIR/STUDY.json.

The study `state_space` compares its variants at equal training time. It first measures the training steps of all
variants side by side on one core, in CPU time, and writes the samples to WORKDIR/step_secs.json. Each variant then
takes as many steps as fit into the time of the first one. A resumed ablation reads that file.
"""

import concurrent.futures
import dataclasses
import json
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
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
from sisma_jax.training.state import init_state
from sisma_jax.training.step import make_update

ROOT = Path(__file__).resolve().parents[1]

Study = Literal["conditioning", "state_space"]
# For each variant of a study the fields of `ModelConfig` that it sets, and the factor by which it multiplies the number
# of steps; None for as many steps as take the time of the first variant.
Variants = dict[str, tuple[dict[str, Any], float | None]]

STUDIES: dict[Study, Variants] = {
    # The first variant is the baseline, which all others change in one respect. A step with 4 orders takes 1.6 times as
    # long as one with 1 order, so the last variant trains for the same time as the one before it.
    "conditioning": {
        "Cross-Mamba, state from mask; 1 order": ({}, 1),
        "Cross-Mamba, readout from mask": ({"cross_wiring": "readout_from_mask"}, 1),
        "SPADE": ({"mask_conditioning": "spade"}, 1),
        "concatenation": ({"mask_conditioning": "concat"}, 1),
        "2 orders": ({"orders_per_layer": 2}, 1),
        "4 orders": ({"orders_per_layer": 4}, 1),
        "1 order, 1.6 times the steps": ({}, 1.6),
    },
    # 96 channels are 6 heads of SSD.
    "state_space": {
        "scan, N = 16": ({"d_state": 16}, 1),
        "SSD, N = 16": ({"d_state": 16, "mixer": "ssd", "d_head": 16}, None),
        "scan, N = 64": ({"d_state": 64}, None),
        "SSD, N = 64": ({"d_state": 64, "mixer": "ssd", "d_head": 16}, None),
    },
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


def step_samples(experiments: Mapping[str, Config], rounds: int = 20) -> dict[str, list[float]]:
    """Returns the CPU seconds of single training steps, which run side by side.

    Bind the process to one core before. The time that other processes take of this core does not count.

    Args:
      experiments: configuration of each variant, which determines the batch.
      rounds: steps of each variant that are measured.
    """

    def prepared(experiment: Config) -> Callable[[], Any]:
        size, batch = experiment.data.image_size, experiment.train.batch_size
        rng = np.random.default_rng(0)
        examples = {
            "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
            "mask": rng.integers(0, len(experiment.data.classes), (batch, size, size), np.uint8),
        }
        update = jax.jit(make_update(experiment), donate_argnums=0)
        state = init_state(experiment)

        def step() -> None:
            nonlocal state
            state, metrics = update(state, examples)
            jax.block_until_ready((state, metrics))

        step()
        return step

    steps = {name: prepared(one) for name, one in experiments.items()}
    return measure.round_robin(steps, rounds, budget_secs=float("inf"), clock=time.process_time)


def step_counts(variants: Variants, num_steps: int, secs: Mapping[str, float]) -> dict[str, int]:
    """Returns the number of training steps of each variant.

    Args:
      variants: of a study.
      num_steps: steps of a variant with the factor 1.
      secs: seconds of a step of each variant, if there is one with the factor None.
    """
    first = next(iter(variants))
    return {
        name: round(num_steps * (secs[first] / secs[name] if factor is None else factor))
        for name, (_, factor) in variants.items()
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
    study: Study = "conditioning",
    seeds: tuple[int, ...] = (0, 1, 2),
    num_steps: int = 400,
    cores: tuple[int, ...] = (0, 1),
) -> None:
    """Executes the runs that are missing and prints the table.

    Args:
      root: folder of the raw data, as --data.root of configs/celebamask_sample.py.
      workdir: folder for the results; contains one folder per run.
      study: conditioning compares mask conditioning and scan orders; state_space compares scan and SSD.
      seeds: one run of each variant per seed, which determines initialisation, order of the data and noise.
      num_steps: training steps of 8 faces.
      cores: numbers of the CPU cores to use; each executes one run at a time.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.resolve() / "compiled"))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    variants = STUDIES[study]
    any_experiment = experiment(root, workdir / "data", num_steps, 0, {})
    workdir.mkdir(parents=True, exist_ok=True)
    with RunFolder.writing(workdir / "parser", any_experiment) as common:
        prepare_parser(common, DataSet.prepare(any_experiment.data))
    parser = dataclasses.replace(any_experiment.parser, weights=str(common.parser_path))
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with concurrent.futures.ProcessPoolExecutor(len(cores), context, use_one_core, (free,)) as pool:
        secs: dict[str, float] = {}
        if any(factor is None for _, factor in variants.values()):
            samples_path = workdir / "step_secs.json"
            if not samples_path.exists():
                singles = {
                    name: experiment(root, workdir / "data", num_steps, 0, choices)
                    for name, (choices, _) in variants.items()
                }
                samples_path.write_text(json.dumps(pool.submit(step_samples, singles).result(), indent=1) + "\n")
            secs = {name: statistics.median(x) for name, x in json.loads(samples_path.read_text()).items()}
        steps = step_counts(variants, num_steps, secs)
        plan = {
            (name, seed): experiment(root, workdir / "data", steps[name], seed, choices)
            for seed in seeds
            for name, (choices, _) in variants.items()
        }
        futures = {
            (name, seed): pool.submit(
                run, dataclasses.replace(one, parser=parser), workdir / f"{study}_{list(variants).index(name)}_{seed}"
            )
            for (name, seed), one in plan.items()
        }
        results = {key: future.result() for key, future in futures.items()}
    rows = []
    for name in variants:
        scores = [results[name, seed] for seed in seeds]
        rows.append(
            [
                name,
                f"{scores[0]['parameters'] / 1e3:.0f}k",
                str(steps[name]),
                spread([one["held_out_loss"] for one in scores], 4),
                spread([one["miou"] for one in scores], 3),
                spread([one["pixel_accuracy"] for one in scores], 3),
                f"{statistics.median([one['examples_per_sec'] for one in scores]):.1f}",
            ]
        )
    title = f"Batches of 8, seeds {', '.join(map(str, seeds))}: mean ± half the range"
    columns = ["", "parameters", "steps", "held-out loss", "mIoU", "pixel accuracy", "examples per second per core"]
    measure.print_table(title, columns, rows)
    problems = [
        {"variant": name, "seed": seed, "steps": steps[name], **scores} for (name, seed), scores in results.items()
    ]
    measure.write_json(workdir / f"{study}.json", "ablation", settings={"num_steps": num_steps}, problems=problems)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
