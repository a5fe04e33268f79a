"""The command `evaluate`: measures the faces of a model, or the images of a folder, beside real ones."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from sisma_jax import pipeline
from sisma_jax.commands.report import GRID_ROWS, grid_scale, make_folder, output_folder, require_free, tell
from sisma_jax.commands.segment import load_parser
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.latents import LatentDataSet
from sisma_jax.errors import InputError
from sisma_jax.evaluation import comparison, grids, mask_agreement, results
from sisma_jax.evaluation.held_out_loss import held_out_losses
from sisma_jax.evaluation.image_sets import FolderImages, FolderMasks, ImageSet, SplitImages
from sisma_jax.evaluation.measurement import (
    Measurements,
    load_networks,
    mean_score,
    measure_faces,
    measure_folders,
    reconstruction,
)
from sisma_jax.evaluation.model_card import write_model_card
from sisma_jax.evaluation.protocols import Protocol, protocol
from sisma_jax.evaluation.report import Pictures, write_report
from sisma_jax.evaluation.sampled_faces import params_checksum, sample_faces
from sisma_jax.evaluation.set_distances import format_distances
from sisma_jax.files import AnyPath, to_path
from sisma_jax.models.autoencoder import KlAutoencoder
from sisma_jax.models.face_parser import FaceParser
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs.folder import Checkpoint, EvaluationFolder, RunFolder
from sisma_jax.runs.metrics import read_metrics
from sisma_jax.training import autoencoder as autoencoders
from sisma_jax.training.step import make_held_out_loss

logger = logging.getLogger(__name__)

_GRID_SAMPLES = 4
# Faces that the report shows beside their nearest training images, and those that agree least with their masks.
_SHOWN_NEIGHBOURS, _SHOWN_WORST = 8, 8


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Samples faces for held-out masks and measures them, compares two folders of images, or compares evaluations."""

    samples: str = ""
    """Folder of images to compare with `references`, in place of a run."""
    references: str = ""
    """Folder of real images."""
    masks: str = ""
    """Folder of the masks of `samples`, with the same names, to measure their agreement."""
    paired: bool = False
    """Images of the same name in `samples` and `references` show the same; adds PSNR, SSIM and LPIPS of the pairs."""
    runs: tuple[str, ...] = ()
    """Two or more runs, or folders of evaluations, whose results are shown side by side with paired tests."""
    checkpoint: Checkpoint = "newest"
    """Checkpoint to evaluate: the newest, the best (see train.best), or the one of a step."""
    weights: str = ""
    """File that the command `export` wrote, to evaluate in place of a run; or, with `samples`, to use its face
    parser."""
    out: str = ""
    """Folder for the results, which all processes of a job must see. If empty: WORKDIR/evaluations/NUMBER, or
    evaluations/NUMBER without a run."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`, on the file `weights`, or on folders.

        Raises:
          InputError: options contradict each other; the run, its checkpoint, its autoencoder, its data or the weights
            of a network cannot be read; or the folder for the results cannot be written.
        """
        if self.runs:
            tell(comparison.compare([to_path(path) for path in self.runs]))
        elif self.samples or self.references:
            self._measure_folders(config, workdir)
        elif self.masks or self.paired:
            raise InputError("`masks` and `paired` apply to two folders; name them with `samples` and `references`.")
        elif self.weights:
            self._measure_exported(config)
        else:
            self._measure_run(config, workdir)

    def _measure_run(self, config: Config, workdir: AnyPath) -> None:
        run = RunFolder.open(workdir, config)
        with output_folder(self.out, run.evaluations, _is_unfinished) as out:
            trained = pipeline.from_run(run, checkpoint=self.checkpoint, mesh=sharding.make_mesh(config.mesh))
            dataset = examples = DataSet.open(config.data)
            if config.autoencoder.kind != "identity":
                examples = LatentDataSet.open(dataset, run.autoencoder_fingerprint)
            evaluate(run, trained, dataset, examples, out=EvaluationFolder(out))

    def _measure_exported(self, config: Config) -> None:
        with output_folder(self.out, to_path("evaluations"), _is_unfinished) as out:
            trained = pipeline.from_exported(self.weights, config, mesh=sharding.make_mesh(config.mesh))
            subject: results.Subject = {"kind": "exported", "path": self.weights, "checksum": ""}
            parser = load_parser(config, to_path(""), self.weights) if config.parser.weights else trained.parser
            _evaluate(subject, trained, DataSet.open(config.data), parser, None, [], EvaluationFolder(out))

    def _measure_folders(self, config: Config, workdir: AnyPath) -> None:
        if not (self.samples and self.references):
            raise InputError("Give both `samples` and `references`, folders of images.")
        samples, references = (FolderImages.open(folder) for folder in (self.samples, self.references))
        if self.paired:
            references = samples.matching(references)
        named, protocol_of = config.evaluate, _folder_protocol(config)
        needs_parser = bool(self.weights or config.parser.weights or self.masks)
        parser = None
        if needs_parser or not (named.inception or named.vgg16 or named.extractors):
            parser = load_parser(config, workdir, self.weights)
        networks = load_networks(named, protocol_of, parser)
        masks = None
        if self.masks and parser is not None:
            masks = FolderMasks.open(self.masks, samples, parser.classes)
        with output_folder(self.out, to_path("evaluations"), _is_unfinished) as path:
            out = EvaluationFolder(path)
            require_free([out.result], overwrite=False)
            measured = measure_folders(
                samples,
                references,
                networks,
                masks=masks,
                is_paired=self.paired,
                seed=config.sample.seed,
                cache=out.cache,
            )
            if not is_primary():
                return
            if masks is None:
                measured.not_computed.setdefault("miou", "Name the folder of the masks of the samples with `masks`.")
            record: results.ProtocolRecord = {
                "name": "",
                "data": references.name,
                "data_fingerprint": references.fingerprint,
                "num_masks": 0,
                "num_references": len(references),
                "references": "the images of the folder",
                "image_size": 0,
                "diversity_masks": 0,
                "samples_per_mask": 1,
                "sampling": {"seed": config.sample.seed},
                "resize": networks.resizing,
            }
            subject: results.Subject = {"kind": "folders", "path": samples.name, "checksum": samples.fingerprint}
            evaluation = _assemble(subject, record, networks.checksums, measured, None)
            _write(out, evaluation, measured, {"names": np.array([file.name for file in samples.files])})
            write_report(out.report, evaluation, None, [], None if parser is None else parser.classes)
            _tell_results(out, evaluation)


def _is_unfinished(folder: AnyPath) -> bool:
    out = EvaluationFolder(folder)
    return out.cache.exists() and not out.result.exists()


def _folder_protocol(config: Config) -> Protocol:
    if config.evaluate.protocol:
        raise InputError("evaluate.protocol applies to a model, which samples the faces; leave it out for folders.")
    settings = config.evaluate
    return Protocol("", 0, 0, 1, settings.inception_resize, settings.lpips_network)


def evaluate(
    run: RunFolder, trained: Pipeline, dataset: DataSet, examples: DataSet | LatentDataSet, *, out: EvaluationFolder
) -> None:
    """Samples faces of a run for held-out masks, measures them, and writes the results.

    Every process of a job must call this; the first one writes.

    Args:
      run: the run to evaluate.
      trained: its pipeline.
      dataset: its data set, whose test split is used.
      examples: what the denoiser was trained on: `dataset`, or its latents.
      out: where to write the results.

    Raises:
      InputError: the face parser is damaged, or the folder for the results cannot be created.
    """
    config = run.config
    chosen = protocol(config, dataset.counts["test"])
    batch_size = sharding.round_up(config.sample.batch_size, trained.mesh)
    parser = run.parser if run.has_parser() else None
    losses = held_out_losses(
        make_held_out_loss(config, trained.mesh),
        trained.params,
        examples.eval_batches("test", batch_size, limit=chosen.num_masks),
        batch_size,
        trained.mesh,
    )
    subject: results.Subject = {"kind": "run", "path": str(run.path), "checksum": ""}
    metrics = read_metrics(run.metrics) if is_primary() else []
    _evaluate(subject, trained, dataset, parser, losses, metrics, out)


def _evaluate(
    subject: results.Subject,
    trained: Pipeline,
    dataset: DataSet,
    parser: FaceParser | None,
    losses: np.ndarray | None,
    metrics: list[dict[str, int | float]],
    out: EvaluationFolder,
) -> None:
    config = trained.config
    chosen = protocol(config, dataset.counts["test"])
    networks = load_networks(config.evaluate, chosen, parser)
    checksum = params_checksum(trained)
    trained.mask_prior = None  # these are the data set's own masks, in its own order
    logger.info("Sampling faces for %d held-out masks.", chosen.num_masks)
    repetitions = [
        sample_faces(trained, checksum, dataset, out.cache, count=count, repetition=repetition)
        for repetition in range(chosen.samples_per_mask)
        if (count := chosen.diversity_masks if repetition else chosen.num_masks)
    ]
    measured = measure_faces(
        repetitions,
        dataset,
        chosen,
        networks,
        seed=config.sample.seed,
        cache=out.cache,
        reference_cache=dataset.path.parent / "features",
    )
    loss = None
    if losses is not None:
        measured.terms["held_out_loss"] = losses
        loss = mean_score(losses, config.sample.seed)
    measured.reconstruction = _reconstruction(trained, dataset, chosen.num_masks, config)
    if not is_primary():
        return
    originals = SplitImages(dataset, "test", chosen.num_masks)
    record: results.ProtocolRecord = {
        "name": chosen.name,
        "data": config.data.name,
        "data_fingerprint": dataset.path.name,
        "num_masks": chosen.num_masks,
        "num_references": len(originals),
        "references": "the originals of the masks",
        "image_size": config.data.image_size,
        "diversity_masks": chosen.diversity_masks,
        "samples_per_mask": chosen.samples_per_mask,
        "sampling": dataclasses.asdict(config.sample),
        "resize": networks.resizing,
    }
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trained.params))
    subject = {
        **subject,
        "step": trained.step,
        "checksum": checksum,
        "parameters": parameters,
        "objective": _objective(config),
    }
    evaluation = _assemble(subject, record, networks.checksums, measured, loss)
    _write(out, evaluation, measured, {"ids": repetitions[0].ids})
    shown = _grid(repetitions, originals)
    make_folder(out.samples)
    grid = grids.sample_grid(*shown, classes=dataset.classes, scale=grid_scale(config.data.image_size))
    grids.save_png(out.sample_grid(trained.step), grid)
    pictures = _with_pictures(Pictures(*shown), repetitions[0], originals, measured, networks.parser)
    write_report(out.report, evaluation, pictures, metrics, dataset.classes)
    write_model_card(out.model_card, evaluation, config)
    _tell_results(out, evaluation)
    tell(f"Sample grid (mask | samples | held-out original): {out.sample_grid(trained.step)}")


def _objective(config: Config) -> str:
    """Returns what the held-out loss measures; a prediction of data is converted to a velocity for it."""
    generated, flow = "pixels" if config.autoencoder.kind == "identity" else "latents", config.flow
    return f"velocity of {generated}, logit(t) with mean {flow.time_mean:g} and deviation {flow.time_std:g}"


def _reconstruction(trained: Pipeline, dataset: DataSet, limit: int, config: Config) -> dict[str, results.Score]:
    if not isinstance(trained.autoencoder, KlAutoencoder) or limit < 2:
        return {}
    batch_size = config.autoencoder.encode_batch_size
    pairs = autoencoders.reconstructions(trained.autoencoder, dataset, limit, batch_size)
    return reconstruction(((decoded, image) for image, decoded in pairs), config.sample.seed)


def _assemble(
    subject: results.Subject,
    record: results.ProtocolRecord,
    checksums: dict[str, str],
    measured: Measurements,
    loss: results.Score | None,
) -> results.Evaluation:
    return {
        "format": results.FORMAT,
        "subject": subject,
        "protocol": record,
        "networks": checksums,
        "versions": results.versions(),
        "held_out_loss": loss,
        "mask_agreement": measured.mask_agreement,
        "distances": measured.distances,
        "diversity": measured.diversity,
        "paired": measured.paired,
        "reconstruction": measured.reconstruction,
        "memorization": measured.memorization,
        "not_computed": measured.not_computed,
    }


def _write(
    out: EvaluationFolder, evaluation: results.Evaluation, measured: Measurements, names: dict[str, np.ndarray]
) -> None:
    results.write_terms(out.terms, names | measured.terms)
    results.write(out.result, evaluation)


def _grid(repetitions: Sequence[ImageSet], originals: SplitImages) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns masks, their samples, and their originals, as `grids.sample_grid` takes them."""
    rows = min(GRID_ROWS, *map(len, repetitions))
    columns = [np.stack(list(one.images(0, rows))) for one in repetitions[:_GRID_SAMPLES]]
    masks, images = (np.stack(list(read(0, rows))) for read in (originals.masks, originals.images))
    return masks, np.stack(columns, axis=1), images


def _with_pictures(
    pictures: Pictures, faces: ImageSet, originals: SplitImages, measured: Measurements, parser: FaceParser | None
) -> Pictures:
    """Adds the faces nearest to training images, and those that agree least with their masks."""
    if measured.neighbours is not None:
        found = measured.neighbours
        training = SplitImages(originals.dataset, "train", originals.dataset.counts["train"])
        nearest = np.argsort(found.distances[:, 0])[:_SHOWN_NEIGHBOURS]
        pictures = dataclasses.replace(
            pictures,
            neighbour_samples=_at(faces.images, nearest),
            neighbours=np.stack([_at(training.images, found.indices[row]) for row in nearest]),
            neighbour_distances=found.distances[nearest],
        )
    if parser is not None and "confusion" in measured.terms:
        accuracies = mask_agreement.pixel_accuracy(measured.terms["confusion"])
        worst = np.argsort(accuracies)[:_SHOWN_WORST]  # a mask without pixels has NaN, which comes last
        samples = _at(faces.images, worst)
        pictures = dataclasses.replace(
            pictures,
            worst_masks=_at(originals.masks, worst),
            worst_samples=samples,
            worst_predicted=parser.predict(samples),
            worst_originals=_at(originals.images, worst),
            worst_accuracies=accuracies[worst],
        )
    return pictures


def _at(read: Callable[[int, int], Iterator[np.ndarray]], indices: np.ndarray) -> np.ndarray:
    """Returns the images or masks at these positions."""
    return np.stack([next(read(index, index + 1)) for index in indices.tolist()])


def _tell_results(out: EvaluationFolder, evaluation: results.Evaluation) -> None:
    if evaluation["mask_agreement"] is not None:
        tell(mask_agreement.format_report(evaluation["mask_agreement"]))
    for one in evaluation["distances"]:
        tell(format_distances(one, evaluation["memorization"] if one["network"] == "parser" else None))
    rest = evaluation["diversity"] | evaluation["paired"] | evaluation["reconstruction"]
    for name, score in rest.items():
        tell(f"{name}: {score['value']:.4f}   [{score['low']:.4f}, {score['high']:.4f}]")
    for name, reason in evaluation["not_computed"].items():
        tell(f"Not computed: {name}. {reason}")
    loss = evaluation["held_out_loss"]
    if loss is not None:
        step = evaluation["subject"].get("step")
        tell(f"Held-out loss at step {step}: {loss['value']:.4f}   [{loss['low']:.4f}, {loss['high']:.4f}]")
    tell(f"Measurements: {out.result}")
    tell(f"Report: {out.report}")
