"""Trains small models with one choice changed at a time, for equal time, and compares what they learn.

    python benchmarks/recipe.py --base demo [--workdir runs/recipe] [--seeds 0 1 2] [--steps 200]
    python benchmarks/recipe.py --base celebamask_sample --root FOLDER

The base is one of the configurations in configs/. All variants see the same examples in the same order, and a variant
whose step takes longer takes fewer steps, so that all take the same processor time. The held-out loss is that of the
base's distribution of times, without mask dropout. Tones are the mean absolute differences, in grey values, between the
mean colours left and right of the middle of the skin and of the hair: distinct tones on the two sides of a face are
large differences. Every run is one file in WORKDIR, so an interrupted comparison resumes. WORKDIR also gets a picture
of each run: samples above the held-out originals of the same masks.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import tyro
from PIL import Image

from benchmarks import measure
from benchmarks.ablation import ROOT, spread, use_one_core
from sisma_jax import allocator, config_files
from sisma_jax.config import Config, MeshConfig
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.dataset import DataSet
from sisma_jax.evaluation.patch_borders import border_ratio
from sisma_jax.parallel import sharding
from sisma_jax.pipeline import Pipeline
from sisma_jax.training.state import init_state
from sisma_jax.training.step import make_held_out_loss, make_update

THREE = ("--model.region_pooling", "--model.patch_overlap=2", "--model.modulation=shared")
BEST = ("--optim.name=muon", *THREE)
# For each variant the options that it changes in the base, which has AdamW and none of the choices below.
VARIANTS: dict[str, tuple[str, ...]] = {
    "AdamW": (),
    "AdamW, rate x 2": ("--optim.learning_rate=4e-3",),
    "Muon": ("--optim.name=muon",),
    "Muon, rate x 2": ("--optim.name=muon", "--optim.learning_rate=4e-3"),
    "Muon, times towards noise": ("--optim.name=muon", "--flow.time_mean=-0.5"),
    "Muon, wider times": ("--optim.name=muon", "--flow.time_std=1.5"),
    "Muon, 2 orders": ("--optim.name=muon", "--model.orders_per_layer=2"),
    "Muon, one modulation": ("--optim.name=muon", "--model.modulation=shared"),
    "Muon, overlapping patches": ("--optim.name=muon", "--model.patch_overlap=2"),
    "Muon, region pooling": ("--optim.name=muon", "--model.region_pooling"),
    "AdamW and the three, rate x 2": (*THREE, "--optim.learning_rate=4e-3"),
    "all": BEST,
    "all, adaptive weights": (*BEST, "--flow.adaptive_weights"),
    "all, rate x 2": (*BEST, "--optim.learning_rate=4e-3"),
    "all, rate x 4": (*BEST, "--optim.learning_rate=8e-3"),
    "all, rate x 8": (*BEST, "--optim.learning_rate=16e-3"),
}
SKIN, HAIR = (CELEBAMASK_HQ.names.index(name) for name in ("skin", "hair"))
MEASURED = (("held_out_loss", 4), ("patch_borders", 2), ("tones", 1))  # in the table, with their decimal digits
NUM_PICTURES = 32


class Outcome(TypedDict):
    """The result of a run; seconds are those of the processor."""

    parameters: int
    steps: int
    step_secs: float
    held_out_loss: float
    patch_borders: float
    tones: float


def configured(base: str, options: tuple[str, ...], steps: int, seed: int, root: str, cache_dir: Path) -> Config:
    """Returns the configuration of a run.

    Args:
      base: name of a file in configs/.
      options: changes, as on the command line.
      steps: training steps, after which the rate is zero.
      seed: of initialisation, order of the data and noise.
      root: folder of the raw data, or "" for data that need none.
      cache_dir: folder for the shards.
    """
    default = config_files.load(ROOT / "configs" / f"{base}.py")
    model = dataclasses.replace(default.model, region_pooling=False, patch_overlap=0, modulation="per_layer")
    optim = dataclasses.replace(default.optim, name="adamw", learning_rate=2e-3, warmup_steps=30, ema_decay=0.99)
    flow = dataclasses.replace(default.flow, objective="flow_matching", adaptive_weights=False)
    sample = dataclasses.replace(default.sample, steps=20)
    default = dataclasses.replace(default, model=model, optim=optim, flow=flow, sample=sample)
    data = (f"--data.cache_dir={cache_dir}", *((f"--data.root={root}",) if root else ()))
    run = (f"--optim.decay_steps={steps}", f"--train.num_steps={steps}", f"--train.seed={seed}")
    return tyro.cli(Config, default=default, args=[*data, *run, *options])


def tone_difference(images: np.ndarray, masks: np.ndarray) -> float:
    """Returns the mean over skin and hair of the difference between left and right, in grey values.

    Args:
      images: uint8 (N, S, S, 3).
      masks: classes of CelebAMask-HQ, uint8 (N, S, S).
    """
    half, differences = images.shape[2] // 2, []
    for image, mask in zip(images, masks, strict=True):
        for label in (SKIN, HAIR):
            left, right = mask[:, :half] == label, mask[:, half:] == label
            if min(left.sum(), right.sum()) > image.shape[0]:
                means = image[:, :half][left].mean(axis=0), image[:, half:][right].mean(axis=0)
                differences.append(np.abs(means[0] - means[1]).mean())
    return float(np.mean(differences))


def step_secs(config: Config, rounds: int = 12) -> float:
    """Returns the median processor time of a training step."""
    dataset = DataSet.open(config.data)
    batch = _arrays(next(dataset.train_batches(config.train.batch_size, 0)))
    update, state = jax.jit(make_update(config), donate_argnums=0), init_state(config)
    times = []
    for _ in range(rounds + 2):
        start = time.process_time()
        state, _ = jax.block_until_ready(update(state, batch))
        times.append(time.process_time() - start)
    return statistics.median(times[2:])


def run(config: Config, base: Config, path: Path, secs: float) -> Outcome:
    """Trains and measures, unless the file of the result exists, and returns the result.

    Args:
      config: of the run.
      base: gives the distribution of times of the held-out loss.
      path: file for the result; the picture lies beside it.
      secs: processor time of a training step, for the result.
    """
    if path.exists():
        return json.loads(path.read_text())
    dataset, mesh, state = DataSet.open(config.data), sharding.make_mesh(MeshConfig()), init_state(config)
    update = jax.jit(make_update(config), donate_argnums=0)
    batches = dataset.train_batches(config.train.batch_size, config.train.seed)
    for _ in range(config.train.num_steps):
        state, _ = update(state, _arrays(next(batches)))
    size = config.train.batch_size
    held_out = [_arrays(batch) for batch in dataset.eval_batches("test", size) if len(batch["mask"]) == size]
    losses = make_held_out_loss(dataclasses.replace(config, flow=base.flow), mesh)
    with jax.set_mesh(mesh):
        loss = np.mean([losses(state.ema, batch, i) for i, batch in enumerate(held_out)])
    originals, masks = (
        np.concatenate([batch[name] for batch in held_out])[:NUM_PICTURES] for name in ("image", "mask")
    )
    faces = Pipeline(config, jax.device_get(state.ema), config.train.num_steps)(list(masks), key=jax.random.key(0))
    rows = [np.concatenate(list(images[:12]), axis=1) for images in (faces, originals)]
    Image.fromarray(np.concatenate(rows)).save(path.with_suffix(".png"))
    outcome: Outcome = {
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "steps": config.train.num_steps,
        "step_secs": secs,
        "held_out_loss": float(loss),
        "patch_borders": float(border_ratio(faces, config.model.patch_size).mean()),
        "tones": tone_difference(faces, masks),
    }
    path.write_text(json.dumps(outcome) + "\n")
    return outcome


def _arrays(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: batch[name] for name in ("image", "mask")}


def start_worker(cores: "multiprocessing.Queue[int]") -> None:
    """Prepares a new process: it keeps freed memory, as `run.py` does, and uses the next core in the queue."""
    allocator.keep_freed_memory()
    use_one_core(cores)


def main(
    base: str = "demo",
    root: str = "",
    workdir: Path = Path("runs/recipe"),
    variants: tuple[str, ...] = tuple(VARIANTS),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 200,
    cores: tuple[int, ...] = (0, 1),
) -> None:
    """Executes the runs that are missing and prints the table.

    Args:
      base: name of a file in configs/.
      root: folder of the raw data, if the base needs one.
      workdir: folder for the results.
      variants: names in `VARIANTS`; the first one is that whose time all others take.
      seeds: one run of each variant per seed.
      steps: training steps of the first variant.
      cores: numbers of the CPU cores to use; each executes one run at a time.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.resolve() / "compiled"))
    folder = workdir / base
    folder.mkdir(parents=True, exist_ok=True)

    def config(name: str, steps: int, seed: int) -> Config:
        return configured(base, VARIANTS[name], steps, seed, root, workdir / "data")

    reference = configured(base, (), steps, 0, root, workdir / "data")
    DataSet.prepare(reference.data)
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with concurrent.futures.ProcessPoolExecutor(len(cores), context, start_worker, (free,)) as pool:
        timed = folder / "step_secs.json"
        secs: dict[str, float] = json.loads(timed.read_text()) if timed.exists() else {}
        missing = [name for name in variants if name not in secs]
        secs |= zip(missing, pool.map(step_secs, [config(name, steps, 0) for name in missing]), strict=True)
        timed.write_text(json.dumps(secs, indent=1) + "\n")
        counts = {name: round(steps * secs[variants[0]] / secs[name]) for name in variants}
        futures = {
            (name, seed): pool.submit(
                run,
                config(name, counts[name], seed),
                reference,
                folder / f"{name.replace(' ', '_').replace(',', '')}_{counts[name]}_{seed}.json",
                secs[name],
            )
            for seed in seeds
            for name in variants
        }
        outcomes = {key: future.result() for key, future in futures.items()}
    rows = []
    for name in variants:
        runs = [outcomes[name, seed] for seed in seeds]
        cells = [f"{runs[0]['parameters'] / 1e6:.2f}M", f"{secs[name]:.3f}", str(counts[name])]
        cells += [spread([one[key] for one in runs], digits) for key, digits in MEASURED]
        rows.append([name, *cells])
    columns = ["", "parameters", "s/step", "steps", "held-out loss", "patch borders", "tones"]
    measure.print_table(f"{base}, seeds {', '.join(map(str, seeds))}: mean ± half the range", columns, rows)
    problems = [{"variant": name, "seed": seed, **one} for (name, seed), one in outcomes.items()]
    measure.write_json(folder / "recipe.json", "recipe", settings={"base": base, "steps": steps}, problems=problems)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
