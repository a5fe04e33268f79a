"""Times the Fréchet Inception distance of two folders of images, in JAX and by the package pytorch-fid.

    pip install torch torchvision pytorch-fid  # optional, in an environment of its own
    python benchmarks/evaluation.py [--num-images 1000] [--rounds 5] [--json FILE]

Both read the same PNG files of drawn faces and have the same random weights, so they must return the same distance.
They run in turn. The table shows the seconds per 1,000 images of the features (reading and decoding files, resizing,
the network), the seconds from the features to the distance, which depend on their 2048 dimensions more than on the
number of images, and both together per 1,000 images. Wall times come first, and then processor times, which other work
on the machine hardly changes. If it is busy, give BLAS a single thread (OPENBLAS_NUM_THREADS=1), or all processes one
core (taskset -c 0): threads that wait for one another spin.
JSON: {"benchmark", "machine", "settings", "problems"}.
"""

import dataclasses
import functools
import json as json_files
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

from benchmarks import fid_peer, measure
from benchmarks.fid_peer import Timed
from sisma_jax.data import photos
from sisma_jax.data.drawing import draw_face
from sisma_jax.evaluation.features import FeatureNetwork, extract
from sisma_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from sisma_jax.evaluation.image_sets import FolderImages
from sisma_jax.evaluation.networks import inception_from_weights
from tests.evaluation.golden import random_weights

TOLERANCE = 1e-3
"""The largest relative difference of the two distances. The float32 sums of 94 layers differ in their order."""


def inception_weights() -> dict[str, np.ndarray]:
    """Returns random weights by the names and in the shapes of the published file of FID's Inception."""
    with np.load(Path(random_weights.__file__).with_name("inception.npz")) as file:
        shapes = json_files.loads(str(file["shapes"]))
    return random_weights.random_weights(shapes)


def write_faces(folder: Path, num_images: int, seed: int, size: int) -> None:
    """Draws faces and writes them as PNG files.

    Args:
      folder: that is created.
      num_images: number of files.
      seed: of the faces.
      size: height and width in pixels.
    """
    folder.mkdir(parents=True)
    for index in range(num_images):
        image, _ = draw_face((seed, index), size)
        (folder / f"{index:05d}.png").write_bytes(photos.encode_png(image))


def measure_here(network: FeatureNetwork, first: Path, second: Path) -> Timed:
    """Returns the distance of two folders by this project, and its times.

    Args:
      network: of the features.
      first: folder of images.
      second: folder of images.
    """
    start = fid_peer.clocks()
    both = [extract(network, FolderImages.open(folder)) for folder in (first, second)]
    features, start = fid_peer.since(start), fid_peer.clocks()
    fid = frechet_distance(*(FeatureStatistics.from_batches([x]) for x in both))
    return Timed(fid, features, fid_peer.since(start))


def measure_all(num_images: int, rounds: int, size: int, folder: Path) -> dict[str, list[Timed]]:
    """Returns the samples of each implementation, which run in turn.

    Args:
      num_images: number of images of each of the two sets.
      rounds: number of timed rounds.
      size: height and width of the images in pixels.
      folder: for the images and weights.
    """
    weights = inception_weights()
    network = inception_from_weights(weights, "random weights")
    runs: dict[str, Callable[[Path, Path], Timed]] = {"sisma_jax": functools.partial(measure_here, network)}
    peer: fid_peer.Peer | None = None
    if message := fid_peer.absent():
        print(message)
    else:
        np.savez(folder / "weights.npz", **cast(dict[str, Any], weights))
        peer = fid_peer.Peer(folder / "weights.npz")
        runs["pytorch-fid"] = peer.measure
    write_faces(folder / "one", 1, 2, size)
    extract(network, FolderImages.open(folder / "one"))  # compiles
    first, second = folder / "first", folder / "second"
    for seed, path in enumerate((first, second)):
        write_faces(path, num_images, seed, size)
    samples: dict[str, list[Timed]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run(first, second))
    if peer is not None:
        peer.close()
    return samples


def summary(secs: Sequence[float]) -> str:
    """Returns the cell of a table for the seconds of all rounds: the median, and the range."""
    return f"{statistics.median(secs):.1f} ({min(secs):.1f}-{max(secs):.1f})"


def main(num_images: int = 1000, rounds: int = 5, size: int = 256, json: Path | None = None) -> None:
    """Prints a table of the times.

    Args:
      num_images: number of images of each of the two sets, at least 2.
      rounds: number of timed rounds, after the compilation, which is not timed.
      size: height and width of the images in pixels.
      json: file for all samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        samples = measure_all(num_images, rounds, size, Path(folder))
    fids = {name: timed[0].fid for name, timed in samples.items()}
    print("FID: " + ", ".join(f"{fid:.7g} by {name}" for name, fid in fids.items()))
    expected = fids.get("pytorch-fid", fids["sisma_jax"])
    if not abs(fids["sisma_jax"] - expected) <= TOLERANCE * expected:
        sys.exit(f"The distances differ by more than {TOLERANCE:.0e} of their value.")
    thousands = 2 * num_images / 1000
    rows = []
    for name, timed in samples.items():
        row = [name]
        for clock in range(2):
            row += [
                summary([one.features[clock] / thousands for one in timed]),
                summary([one.distance[clock] for one in timed]),
                summary([(one.features[clock] + one.distance[clock]) / thousands for one in timed]),
            ]
        rows.append(row)
    columns = ["", "features per 1000", "distance", "whole per 1000"]
    columns += [f"processor: {column}" for column in columns[1:]]
    measure.print_table(f"Seconds for two sets of {num_images} images: medians (ranges)", columns, rows)
    if json:
        settings = {"num_images": num_images, "rounds": rounds, "size": size}
        records = [
            {"name": name, "samples": [dataclasses.asdict(one) for one in timed]} for name, timed in samples.items()
        ]
        measure.write_json(json, "evaluation", settings=settings, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
