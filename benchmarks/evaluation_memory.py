"""Measures the time and the peak memory of each stage that compares two sets of images.

    python benchmarks/evaluation_memory.py [--num-images 500 2000] [--num-features 50000] [--json FILE]

For each number of images, it draws two sets of faces of 256 px, and measures the two stages of `measure_folders` with
random weights of FID's Inception: the features, from files to the cache, and the distances between them with all
intervals. Then it measures the distances alone, one by one, between random features. Each stage runs in a new process,
whose peak is that of its resident memory with Python, JAX and the features themselves. Beside the time is the processor
time, which other work on the machine hardly changes.
JSON: {"benchmark", "machine", "settings", "problems"}.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

from benchmarks import measure
from benchmarks.evaluation import inception_weights, write_faces
from sisma_jax.evaluation.features import extract
from sisma_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from sisma_jax.evaluation.frechet_interval import frechet_interval
from sisma_jax.evaluation.image_sets import FolderImages
from sisma_jax.evaluation.kernel_distance import kernel_distance
from sisma_jax.evaluation.manifold import density_coverage_per_image, precision_recall_per_image
from sisma_jax.evaluation.measurement import Networks, measure_folders
from sisma_jax.evaluation.networks import inception_from_weights

DIMENSIONS = 2048
RESAMPLES = 2
"""Of the interval of the Fréchet distance; an evaluation has 50, which take the same memory."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stage took.

    Attributes:
      stage: its name.
      num_images: of each set.
      secs: wall time.
      cpu_secs: processor time of all threads.
      peak_bytes: largest resident memory of the process.
    """

    stage: str
    num_images: int
    secs: float
    cpu_secs: float
    peak_bytes: int


def run_cost(stage: str, num_images: int, run: Callable[[], object]) -> Cost:
    """Returns the cost of a stage, which runs once. Compilation is a part of it.

    Args:
      stage: its name.
      num_images: of each set.
      run: the stage.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    run()
    secs, cpu_secs = time.perf_counter() - start, time.process_time() - start_cpu
    return Cost(stage, num_images, secs, cpu_secs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def folder_cost(stage: str, num_images: int, folder: Path) -> Cost:
    """Returns the cost of the stage "features" or "distances" of two folders of images.

    Args:
      stage: "features" computes the features and fills the cache. "distances" finds them there.
      num_images: of each set.
      folder: with the folders of the images, "0" and "1".
    """
    network = inception_from_weights(inception_weights(), "random weights")
    networks = Networks((network,), None, None, {})

    def run() -> None:
        first, second = (FolderImages.open(folder / name) for name in ("0", "1"))
        if stage == "features":
            for images in (first, second):
                extract(network, images, folder / "cache")
        else:
            measure_folders(first, second, networks, masks=None, is_paired=False, seed=0, cache=folder / "cache")

    return run_cost(stage, num_images, run)


def random_features(num_images: int, seed: int) -> np.ndarray:
    """Returns features with correlations, none of them negative, as those of Inception: float32 (N, 2048)."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(0).standard_normal((64, DIMENSIONS), np.float32)
    features = 0.1 * rng.standard_normal((num_images, DIMENSIONS), np.float32)
    features += 0.1 * rng.standard_normal((num_images, 64), np.float32) @ directions
    return np.maximum(features + np.float32(0.5 + 0.05 * seed), 0, out=features)


DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {
    "precision, recall": precision_recall_per_image,
    "density, coverage": lambda samples, references: density_coverage_per_image(references, samples, 5),
    "kernel distance": kernel_distance,
    "Fréchet distance": lambda *sets: frechet_distance(*(FeatureStatistics.from_batches([x]) for x in sets)),
    f"its interval, {RESAMPLES} resamples": lambda *sets: frechet_interval(*sets, num_resamples=RESAMPLES),
}
"""The distances, as `set_distances` calls them, by name."""


def distance_cost(name: str, num_images: int) -> Cost:
    """Returns the cost of a distance between random features.

    Args:
      name: key of `DISTANCES`.
      num_images: of each set.
    """
    samples, references = (random_features(num_images, seed) for seed in range(2))
    return run_cost(name, num_images, lambda: DISTANCES[name](samples, references))


def main(
    num_images: tuple[int, ...] = (500, 2000),
    num_features: tuple[int, ...] = (50_000,),
    size: int = 256,
    json: Path | None = None,
) -> None:
    """Prints a table of the stages.

    Args:
      num_images: numbers of images of each set, at least 6, for the stages from files to distances.
      num_features: numbers of images of each set, at least 1000, for the distances of random features.
      size: height and width of the images in pixels.
      json: file for the costs.
    """
    costs: list[Cost] = []
    settings = {"num_images": num_images, "num_features": num_features, "size": size}

    def add(cost: Cost) -> None:
        costs.append(cost)
        if json:
            problems = [dataclasses.asdict(one) for one in costs]
            measure.write_json(json, "evaluation_memory", settings=settings, problems=problems)

    new_process = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )
    with new_process as pool, tempfile.TemporaryDirectory() as root:
        for count in num_images:
            folder = Path(root) / str(count)
            for seed in range(2):
                write_faces(folder / str(seed), count, seed, size)
            for stage in ("features", "distances"):
                add(pool.submit(folder_cost, stage, count, folder).result())
        for count in num_features:
            for name in DISTANCES:
                add(pool.submit(distance_cost, name, count).result())
    rows = [
        [
            cost.stage,
            f"{cost.num_images:,}",
            f"{cost.secs:.1f}",
            f"{cost.cpu_secs:.1f}",
            f"{cost.peak_bytes / 2**30:.2f}",
        ]
        for cost in costs
    ]
    columns = ["", "images per set", "secs", "processor secs", "peak GiB"]
    measure.print_table("Stages of comparing two sets of images", columns, rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
