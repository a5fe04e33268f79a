"""Measures how fast the data pipeline delivers examples, and how fast training steps consume them.

    python benchmarks/data.py [--root FOLDER] [--num-faces 1024] [--json FILE]

The pipeline delivers 256-px masks with JPEG images of 256 px, and then with cached 32 x 32 x 4 latents. The latents are
random numbers, since their values do not affect the time. The table shows examples per second in batches of 64, as
medians of several passes; then follows how much the process has grown during the passes. It also shows how fast raw
files are converted to shards, and how many examples per second training steps consume on this machine. Without --root,
the benchmark draws faces and writes them in the layout of CelebAMask-HQ.
"""

import dataclasses
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import tyro

from benchmarks import measure
from configs import demo as configs_demo
from sisma_jax.config import AutoencoderConfig, Config, DataConfig, TrainConfig, preset
from sisma_jax.data import photos
from sisma_jax.data.dataset import BatchSource, DataSet
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.latents import Encoder, LatentDataSet
from sisma_jax.training.state import init_state
from sisma_jax.training.step import make_update

SIZE, LATENT = 256, (32, 32, 4)
BATCH_SIZE = 64


def write_drawn_faces(root: Path, num_faces: int) -> None:
    """Draws `num_faces` faces and writes images and label maps in the layout of CelebAMask-HQ to `root`."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for index in range(num_faces):
        image, mask = draw_face((0, index), SIZE)
        (root / "images" / f"{index:05d}.jpg").write_bytes(photos.encode_jpeg(image))
        (root / "labels" / f"{index:05d}.png").write_bytes(photos.encode_png(mask))


def random_encoder() -> Encoder:
    """Returns an encoder whose latents are random numbers, in place of an autoencoder's."""
    rng = np.random.default_rng(0)

    def encode(image: np.ndarray) -> np.ndarray:
        height, width, channels = LATENT
        return rng.standard_normal((len(image), height, width, 2 * channels), np.float32).astype(np.float16)

    return Encoder(encode, batch_size=16, fingerprint="random", scale=1.0, shift=0.0)


def take(iterator: Iterator[Mapping[str, np.ndarray]], batches: int) -> float:
    """Returns the seconds that the next `batches` elements of an iterator take."""
    start = time.perf_counter()
    for _ in itertools.islice(iterator, batches):
        pass
    return time.perf_counter() - start


def measure_source(source: BatchSource, batches: int, repeats: int) -> tuple[list[float], float, dict[str, np.ndarray]]:
    """Reads training batches of 64 examples.

    Args:
      source: the prepared data.
      batches: batches per pass.
      repeats: number of timed passes, after one that is not timed.

    Returns:
      Examples per second of each pass, the growth of the process in MiB during the passes, and the next batch.
    """
    iterator = source.train_batches(BATCH_SIZE, seed=0)
    take(iterator, batches)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rates = [batches * BATCH_SIZE / take(iterator, batches) for _ in range(repeats)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return rates, grown, next(iterator)


def appetite(config: Config, batch: dict[str, np.ndarray], repeats: int) -> list[float]:
    """Returns the examples per second of training steps, without compilation.

    Args:
      config: of a denoiser of latents.
      batch: "moments" and "mask" of at least `config.train.batch_size` examples.
      repeats: number of steps that are timed, after one that is not.
    """
    update = jax.jit(make_update(config), donate_argnums=0)
    state = jax.jit(lambda: init_state(config))()
    examples = {name: batch[name][: config.train.batch_size] for name in ("moments", "mask")}
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = update(state, examples)
        jax.block_until_ready(metrics)
        rates.append(config.train.batch_size / (time.perf_counter() - start))
    return rates[1:]


def main(
    root: Path | None = None,
    num_faces: int = 1024,
    batches: int = 40,
    repeats: int = 7,
    num_threads: int = 4,
    steps: bool = True,
    json: Path | None = None,
) -> None:
    """Prints a table of examples per second.

    Args:
      root: folder of CelebAMask-HQ or a part of it; without it, faces are drawn.
      num_faces: number of faces to draw.
      batches: batches of 64 examples per pass.
      repeats: number of passes.
      num_threads: threads that read ahead.
      steps: time training steps, too.
      json: file for all samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            root = Path(folder) / "raw"
            write_drawn_faces(root, num_faces)
        data = DataConfig(
            name="celebamask_hq",
            root=str(root),
            cache_dir=str(Path(folder) / "cache"),
            image_size=SIZE,
            stored_size=SIZE,
            num_test=16,
            num_threads=num_threads,
        )
        start = time.perf_counter()
        dataset = DataSet.prepare(data)
        count = sum(dataset.counts.values())
        samples = {"raw files to shards": [count / (time.perf_counter() - start)]}
        latents = LatentDataSet.prepare(dataset, random_encoder())
        grown: dict[str, float] = {}
        # One source after the other: the threads of an idle iterator would fill its buffers.
        samples["JPEG at 256 px"], grown["JPEG at 256 px"], _ = measure_source(dataset, batches, repeats)
        samples["cached latents"], grown["cached latents"], batch = measure_source(latents, batches, repeats)
        demo = dataclasses.replace(configs_demo.get_config().model, patch_size=2)
        models = [("the demo's model", demo, 16), ("SISMA-U-S", preset("U-S", patch_size=1), 4)] if steps else []
        for name, model, batch_size in models:
            config = Config(
                autoencoder=AutoencoderConfig(kind="kl"),
                model=model,
                data=DataConfig(image_size=SIZE),
                train=TrainConfig(batch_size=batch_size),
            )
            samples[f"consumed by a training step: {name}"] = appetite(config, batch, min(repeats, 3))
    rows = [[name, f"{np.median(x):,.1f}", f"{np.min(x):,.1f} to {np.max(x):,.1f}"] for name, x in samples.items()]
    measure.print_table("Examples per second", ["", "median", "range"], rows)
    for name, mebibytes in grown.items():
        print(f"{name}: the process grew by {mebibytes:.0f} MiB over {repeats * batches} batches.")
    if json:
        settings = {"num_faces": count, "batches": batches, "repeats": repeats, "num_threads": num_threads}
        measure.write_json(
            json, "data", settings=settings, problems=[{"examples_per_sec": samples, "grown_mib": grown}]
        )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
