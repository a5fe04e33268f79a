"""The command `evaluate`: samples faces for held-out masks, measures them, and shows them beside the originals."""

import dataclasses
import json
import logging

import jax
import numpy as np

from sisma_jax import pipeline
from sisma_jax.commands.report import GRID_ROWS, grid_scale, make_folder, output_folder, require_free, tell
from sisma_jax.commands.segment import load_parser
from sisma_jax.config import Config, EvaluateConfig
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.latents import LatentDataSet
from sisma_jax.errors import InputError
from sisma_jax.evaluation import grids, mask_agreement
from sisma_jax.evaluation.features import (
    ArrayImages,
    FeatureNetwork,
    FolderImages,
    SplitImages,
    extract,
    parser_network,
)
from sisma_jax.evaluation.held_out_loss import held_out_loss
from sisma_jax.evaluation.networks import load_inception, load_vgg16
from sisma_jax.evaluation.set_distances import LEAST_IMAGES, format_distances, memorization, set_distances
from sisma_jax.files import AnyPath, to_path, write_atomically
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs.folder import Checkpoint, RunFolder
from sisma_jax.training.step import make_held_out_loss

logger = logging.getLogger(__name__)

_GRID_SAMPLES = 4
_REPORT_NAME = "evaluation.json"
# Training images in which samples are searched for.
_MOST_TRAINING_IMAGES = 5000


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Samples faces for held-out masks and measures them, or compares two folders of images."""

    samples: str = ""
    """Folder of images to compare with `references`, in place of a run."""
    references: str = ""
    """Folder of real images."""
    checkpoint: Checkpoint = "newest"
    """Checkpoint to evaluate: the newest, the best (lowest held-out loss), or the one of a step."""
    weights: str = ""
    """File that the command `export` wrote, whose face parser compares the folders."""
    out: str = ""
    """Folder for the results. If empty: WORKDIR/evaluations/NUMBER, or evaluations/NUMBER for folders."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`.

        Raises:
          InputError: the run, its checkpoint, its autoencoder or its data cannot be read, or the folder for the results
            cannot be written.
        """
        if self.samples or self.references:
            self._compare_folders(config, workdir)
            return
        if self.weights:
            raise InputError("`weights` applies only to two folders; name them with `samples` and `references`.")
        run = RunFolder.open(workdir, config)
        with output_folder(self.out, run.evaluations) as out:
            trained = pipeline.from_run(run, checkpoint=self.checkpoint, mesh=sharding.make_mesh(config.mesh))
            dataset = examples = DataSet.open(config.data)
            if config.autoencoder.kind != "identity":
                examples = LatentDataSet.open(dataset, run.autoencoder_fingerprint)
            evaluate(run, trained, dataset, examples, out=RunFolder(out, config))

    def _compare_folders(self, config: Config, workdir: AnyPath) -> None:
        if not (self.samples and self.references):
            raise InputError("Give both `samples` and `references`, folders of images.")
        sets = [FolderImages.open(folder) for folder in (self.samples, self.references)]
        networks = load_networks(config.evaluate)
        if self.weights or config.parser.weights or not networks:
            parser = load_parser(config, workdir, self.weights)
            if not parser.is_own:
                raise InputError(f"parser.weights {config.parser.weights} is not a face parser of this project.")
            networks = [parser_network(parser), *networks]
        with output_folder(self.out, to_path("evaluations")) as out:
            require_free([out / _REPORT_NAME], overwrite=False)
            if not is_primary():
                return
            distances = []
            for network in networks:
                samples, references = (extract(network, images, out / "features") for images in sets)
                distances.append(set_distances(network, samples, references, seed=config.sample.seed))
            names = ("samples", "references")
            files = {
                key: {"folder": images.name, "hash": images.fingerprint}
                for key, images in zip(names, sets, strict=True)
            }
            report = {"images": files, "distances": distances}
            write_atomically(out / _REPORT_NAME, json.dumps(report, indent=2) + "\n")
            for one in distances:
                tell(format_distances(one))
            tell(f"Measurements: {out / _REPORT_NAME}")


def load_networks(config: EvaluateConfig) -> list[FeatureNetwork]:
    """Returns the pretrained networks whose weights the configuration names.

    Args:
      config: names the files.

    Raises:
      InputError: a file cannot be read, or holds other weights.
    """
    networks = []
    if config.inception:
        networks.append(load_inception(config.inception, resize=config.inception_resize))
    if config.vgg16:
        networks.append(load_vgg16(config.vgg16))
    return networks


def evaluate(
    run: RunFolder, trained: Pipeline, dataset: DataSet, examples: DataSet | LatentDataSet, *, out: RunFolder
) -> None:
    """Samples faces for held-out masks, measures them, and writes the results.

    Every process of a job must call this; the first one writes.

    Args:
      run: the run to evaluate.
      trained: its pipeline.
      dataset: its data set, whose test split is used.
      examples: what the denoiser was trained on: `dataset`, or its latents.
      out: where to write the results, under the same names as in a run: `run` itself, or another folder.

    Raises:
      InputError: the face parser is damaged, or the folder for the results cannot be created.
    """
    config = run.config
    parser = run.parser if run.has_parser() else None
    networks = load_networks(config.evaluate)
    batch_size = sharding.round_up(config.sample.batch_size, trained.mesh)
    limit = config.evaluate.num_samples
    batches = list(dataset.eval_batches("test", batch_size, limit=limit))
    masks = np.concatenate([batch["mask"] for batch in batches])
    originals = np.concatenate([batch["image"] for batch in batches])
    loss = held_out_loss(
        make_held_out_loss(config, trained.mesh),
        trained.params,
        examples.eval_batches("test", batch_size, limit=limit),
        batch_size,
        trained.mesh,
    )
    key = jax.random.key(config.sample.seed)
    logger.info("Sampling faces for %d held-out masks.", len(masks))
    faces = trained(masks, key=key)
    shown = trained(masks[:GRID_ROWS], key=key, num_samples=_GRID_SAMPLES)
    size = config.data.image_size
    shown = shown.reshape(-1, _GRID_SAMPLES, size, size, 3)
    # Every process computes this, because otherwise the others would have to wait for the first one.
    agreement = None if parser is None else mask_agreement.agreement_report(faces, originals, masks, parser)
    distances, memorized = [], None
    own = [parser_network(parser)] if parser is not None and parser.is_own else []
    if len(masks) > LEAST_IMAGES:
        sets = ArrayImages(faces, "samples"), ArrayImages(originals, "originals")
        for network in (*own, *networks):
            of_samples, of_originals = (extract(network, images) for images in sets)
            distances.append(set_distances(network, of_samples, of_originals, seed=config.sample.seed))
            if network in own:
                training = SplitImages(dataset, "train", min(dataset.counts["train"], _MOST_TRAINING_IMAGES))
                of_training = extract(network, training)
                memorized = memorization(of_samples, of_originals, of_training, seed=config.sample.seed)
    if not is_primary():
        return
    make_folder(out.samples)
    grid_path = out.sample_grid(trained.step)
    grid = grids.sample_grid(
        masks[:GRID_ROWS], shown, originals[:GRID_ROWS], classes=dataset.classes, scale=grid_scale(size)
    )
    grids.save_png(grid_path, grid)
    report = {
        "step": trained.step,
        "held_out_loss": loss,
        "mask_agreement": agreement,
        "distances": distances,
        "memorization": memorized,
    }
    write_atomically(out.evaluation, json.dumps(report, indent=2) + "\n")
    if agreement is None:
        tell("Mask agreement is not computed, as the run has no face parser; the command `parser` trains one.")
    else:
        tell(mask_agreement.format_report(agreement))
    for one in distances:
        tell(format_distances(one, memorized if one["network"] == "parser" else None))
    if not config.evaluate.inception:
        tell("The FID is not computed: evaluate.inception names no weights of Inception-v3 (pytorch-fid's file).")
    tell(f"Held-out loss at step {trained.step}: {loss:.4f}")
    tell(f"Measurements: {out.evaluation}")
    tell(f"Sample grid (mask | samples | held-out original): {grid_path}")
