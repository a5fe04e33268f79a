"""What the command line can do with a configuration: one function a command."""

import dataclasses
import json
import logging
from typing import Literal

import cv2
import jax
import numpy as np

from sisma_jax import planning
from sisma_jax.config import Config, Solver
from sisma_jax.data import images, latents, loading
from sisma_jax.errors import InputError
from sisma_jax.evaluation import grids, mask_agreement, segmenter
from sisma_jax.evaluation.held_out_loss import held_out_loss
from sisma_jax.files import AnyPath, bucket_errors, to_path, write_atomically
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.pipeline import Pipeline, Settings, load
from sisma_jax.runs.export import EXPORT_SUFFIX, export_params
from sisma_jax.runs.folder import autoencoder_folder, open_workdir, read_config
from sisma_jax.runs.metrics import METRICS_NAME, read_metrics
from sisma_jax.training import autoencoder as autoencoders
from sisma_jax.training import loop
from sisma_jax.training.examples import examples_of
from sisma_jax.training.step import make_held_out_loss

logger = logging.getLogger(__name__)

GRID_ROWS = 8
GRID_SAMPLES = 4
GRID_HEIGHT = 128
"""Height of one picture in a sample grid, in pixels, at least."""

Checkpoint = Literal["newest", "best"] | int
"""Which checkpoint of a run to take: the newest, that of the lowest held-out loss, or that of a step."""


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """What `sample` paints; values not given are those of the configuration's `sample` section."""

    mask: str
    """A mask file (PNG of class indices 0..18), or a folder of them."""
    weights: str = ""
    """A file that the command `export` wrote, to paint with in place of the run and its configuration."""
    checkpoint: Checkpoint = "newest"
    """Of the run: the newest, the best (lowest held-out loss), or that of a step."""
    image: str = ""
    """A photograph to repaint where its mask was changed; all else stays as it is."""
    image_mask: str = ""
    """The photograph's mask before it was edited. Without this and region, the run's segmenter guesses it."""
    region: str = ""
    """What to repaint, in place of image_mask: a picture that is black elsewhere."""
    margin: int | None = None
    """Pixels of the model's size by which the painting reaches out of what was changed, blended with the photograph;
    a 32nd of that size if not given."""
    out: str = ""
    """Folder for the pictures; WORKDIR/samples/painted if empty."""
    num: int = 4
    """Faces a mask."""
    steps: int | None = None
    solver: Solver | None = None
    shift: float | None = None
    guidance: float | None = None
    guidance_low: float | None = None
    guidance_high: float | None = None
    guidance_rescale: float | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What `export` writes, and where."""

    out: str = ""
    """The file, *.safetensors; WORKDIR/NAME_STEP.safetensors if empty, with the name of the run's folder."""
    checkpoint: Checkpoint = "newest"
    """The newest, the best (lowest held-out loss), or that of a step."""


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What `evaluate` measures."""

    checkpoint: Checkpoint = "newest"
    """The newest, the best (lowest held-out loss), or that of a step."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """For which devices `plan` compiles, which need not be there."""

    topology: str
    """As libtpu names it, such as v5e:4x4 or v5p:2x2x1; or cpu:8, virtual devices of a CPU."""
    search: bool = True
    """Search the largest batch that fits."""
    memory_gib: float | None = None
    """Memory of a device that the programs are to make do with; what its compiler allows if not given."""


def _tell(text: str) -> None:
    """Prints, once a job."""
    if is_primary():
        print(text)


def prepare(config: Config) -> None:
    """Builds the data set's shards."""
    loading.prepare(config.data)
    counts = ", ".join(f"{loading.num_examples(config.data, split)} {split}" for split in ("train", "test"))
    _tell(f"Data: {config.data.name} in {config.data.cache_dir} ({counts} examples)")


def autoencoder(config: Config, workdir: AnyPath) -> None:
    """Prepares the data and the run's autoencoder, and shows what it makes of test images."""
    if config.autoencoder.kind == "identity":
        raise InputError("There is no autoencoder to prepare: --autoencoder.kind is identity.")
    open_workdir(workdir, config)
    if config.autoencoder.weights:  # a wrong file is named before the data set is written
        autoencoders.prepare(config, workdir)
        prepare(config)
    else:
        prepare(config)
        autoencoders.prepare(config, workdir)
    path = workdir / "samples" / "reconstructions.png"
    if is_primary() and not path.exists():
        model = autoencoders.load(config, workdir)
        originals, painted = zip(*autoencoders.reconstructions(model, config, GRID_ROWS), strict=True)
        masks = next(loading.eval_batches(config.data, "test", batch_size=GRID_ROWS, limit=GRID_ROWS))["mask"]
        samples, scale = np.concatenate(painted)[:, None], _grid_scale(config.data.image_size)
        _make_folder(path.parent)
        grids.save_png(path, grids.sample_grid(masks, samples, np.concatenate(originals), scale=scale))
        _tell(f"PSNR of reconstructed test images: {autoencoders.psnr(model, config):.2f} dB")
    _tell(f"Autoencoder: {autoencoder_folder(workdir)}")
    _tell(f"Reconstructions (mask | reconstruction | original): {path}")


def encode(config: Config, workdir: AnyPath) -> None:
    """Prepares the data, the run's autoencoder, and the cache of its latents."""
    autoencoder(config, workdir)
    model = autoencoders.load(config, workdir)
    path = latents.prepare(config.data, autoencoders.encoder_of(model, config.autoencoder.encode_batch_size))
    _tell(f"Latents: {path}")


def train(config: Config, workdir: AnyPath) -> None:
    """Prepares what training reads, trains, and draws the loss curve."""
    _check(config, workdir)
    open_workdir(workdir, config)
    if config.autoencoder.kind == "identity":
        prepare(config)
    else:
        encode(config, workdir)
    loop.train(config, workdir)
    if is_primary():
        grids.loss_curve(read_metrics(workdir / METRICS_NAME), workdir / "loss.png")
    _tell(f"Checkpoints: {workdir / loop.CHECKPOINTS_NAME}")
    _tell(f"Loss curve: {workdir / 'loss.png'}")


def _check(config: Config, workdir: AnyPath) -> None:
    """Raises InputError for what would stop a training after its data are prepared."""
    loop.mesh_of(config)
    if config.autoencoder.kind != "identity" and not config.autoencoder.weights:
        autoencoders.mesh_of(config)
    if config.train.init_from and not (workdir / loop.CHECKPOINTS_NAME).exists():  # a run that goes on needs it no more
        loop.initial_params(config)


def sample(config: Config, workdir: AnyPath, options: SampleOptions) -> None:
    """Paints faces into the user's masks."""
    files = images.image_files(options.mask)
    masks = [images.read_mask_file(file) for file in files]
    image = images.read_image_file(options.image) if options.image else None
    image_mask = images.read_mask_file(options.image_mask) if options.image_mask else None
    region = images.decode_part(images.read_bytes(options.region), options.region) if options.region else None
    if image is None and (options.image_mask or options.region):
        raise InputError("--image_mask and --region belong to an edit: name the photograph with --image.")
    if image is not None and options.weights and not (options.image_mask or options.region):
        raise InputError("An edit with --weights needs --image_mask or --region: the file holds no segmenter.")
    if options.weights:
        pipeline = load(options.weights, mesh=sharding.make_mesh(config.mesh))
        config = pipeline.config
    else:
        pipeline = _load_run(config, workdir, options.checkpoint)
    size = config.data.image_size
    out = to_path(options.out) if options.out else workdir / "samples" / "painted"
    seed = config.sample.seed if options.seed is None else options.seed
    settings = {name: getattr(options, name) for name in Settings.__annotations__}
    # The same keys for every mask: what differs between two edits of a mask is what was edited.
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), np.arange(options.num))
    shown_masks = np.stack([images.resize_mask(mask, size) for mask in masks])
    if image is None:
        of_all = jax.numpy.tile(keys, len(masks))
        faces = pipeline(shown_masks, key=of_all, num_samples=options.num, **settings)
        faces = faces.reshape(len(masks), options.num, size, size, 3)
    else:
        if image_mask is None and region is None:
            changes = [{"region": one} for one in _guess_regions(image, shown_masks, config, workdir)]
        else:
            changes = [{"image_mask": image_mask, "region": region}] * len(masks)
        settings |= {"margin": options.margin, "num_samples": options.num}
        faces = [
            pipeline.edit(image, one, key=keys, **change, **settings)
            for one, change in zip(masks, changes, strict=True)
        ]
    if not is_primary():
        return
    _make_folder(out)
    for file, row in zip(files, faces, strict=True):
        for number, face in enumerate(row):
            grids.save_png(out / f"{file.stem}_{number}.png", face)
    shown = np.stack([[images.resize_image(face, size) for face in row] for row in faces])
    originals = None if image is None else np.stack([images.resize_image(image, size)] * len(masks))
    grids.save_png(out / "grid.png", grids.sample_grid(shown_masks, shown, originals, scale=_grid_scale(size)))
    _tell(f"Faces: {len(masks) * options.num} in {out}, side by side in {out / 'grid.png'}")


def evaluate(config: Config, workdir: AnyPath, options: EvaluateOptions = EvaluateOptions()) -> None:
    """Paints faces into held-out masks, measures them, and shows them beside the originals."""
    pipeline = _load_run(config, workdir, options.checkpoint)
    batch_size = sharding.round_up(config.sample.batch_size, pipeline.mesh)
    limit = config.evaluate.num_samples
    batches = list(loading.eval_batches(config.data, "test", batch_size=batch_size, limit=limit))
    masks = np.concatenate([batch["mask"] for batch in batches])
    originals = np.concatenate([batch["image"] for batch in batches])
    loss = held_out_loss(
        make_held_out_loss(config, pipeline.mesh),
        pipeline.params,
        examples_of(config, workdir).eval_batches("test", batch_size, limit),
        batch_size,
        pipeline.mesh,
    )
    key = jax.random.key(config.sample.seed)
    logger.info("Painting %d held-out masks.", len(masks))
    faces = pipeline(masks, key=key)
    shown = pipeline(masks[:GRID_ROWS], key=key, num_samples=GRID_SAMPLES)
    size = config.data.image_size
    shown = shown.reshape(-1, GRID_SAMPLES, size, size, 3)
    # By each process for itself: they would have to wait for the first one otherwise.
    agreement = mask_agreement.agreement_report(faces, originals, masks, segmenter_of(config, workdir))
    if not is_primary():
        return
    folder = workdir / "samples"
    _make_folder(folder)
    grid_path = folder / f"grid_{pipeline.step:07d}.png"
    grid = grids.sample_grid(masks[:GRID_ROWS], shown, originals[:GRID_ROWS], scale=_grid_scale(size))
    grids.save_png(grid_path, grid)
    report = {"step": pipeline.step, "held_out_loss": loss, "mask_agreement": agreement}
    write_atomically(workdir / "evaluation.json", json.dumps(report, indent=2) + "\n")
    _tell(mask_agreement.format_report(agreement))
    _tell(f"Held-out loss at step {pipeline.step}: {loss:.4f}")
    _tell(f"Measurements: {workdir / 'evaluation.json'}")
    _tell(f"Sample grid (mask | samples | held-out original): {grid_path}")


def run_all(config: Config, workdir: AnyPath) -> None:
    """Does the whole job of a configuration: prepare, train, sample, evaluate."""
    train(config, workdir)
    evaluate(config, workdir)


def export(config: Config, workdir: AnyPath, options: ExportOptions) -> None:
    """Writes averaged parameters, configuration and autoencoder to one file that samples."""
    if options.out and not options.out.endswith(EXPORT_SUFFIX):
        raise InputError(f"--out {options.out} must end in {EXPORT_SUFFIX}.")
    pipeline = _load_run(config, workdir, options.checkpoint)
    path = to_path(options.out or workdir / f"{workdir.name}_{pipeline.step:07d}{EXPORT_SUFFIX}")
    params = sharding.fetch(pipeline.params, pipeline.mesh)
    export_params(path, pipeline.config, pipeline.step, params, pipeline.autoencoder)
    _tell(f"Parameters of step {pipeline.step}: {path}")
    _tell(f"From Python: sisma_jax.load({str(path)!r}); or: run.py ... sample --weights {path} --mask FILE")


def plan(config: Config, workdir: AnyPath, options: PlanOptions) -> None:
    """Says what training and sampling take on devices that need not be there."""
    planned = planning.plan(config, options.topology, search=options.search, memory_gib=options.memory_gib)
    path = workdir / f"plan_{options.topology.replace(':', '-')}.json"
    _make_folder(workdir)
    write_atomically(path, planning.to_json(planned))
    _tell(planning.format_plan(planned))
    _tell(f"Plan: {path}")


def _guess_regions(image: np.ndarray, masks: np.ndarray, config: Config, workdir: AnyPath) -> np.ndarray:
    """Returns where edited masks (n, S, S) differ from what the run's segmenter reads in the image."""
    logger.warning(
        "The image's own mask is not given (--image_mask), so what is repainted is where --mask differs from what the "
        "run's small segmenter reads in the image: a rough guess."
    )
    small = images.resize_image(image, config.data.image_size)
    read = segmenter.predict(segmenter_of(config, workdir), small[None])
    # Two readings of one face differ along all outlines: what is thinner than three pixels is no edit.
    square = np.ones((3, 3), np.uint8)
    return np.stack([cv2.morphologyEx(one.astype(np.uint8), cv2.MORPH_OPEN, square) > 0 for one in masks != read])


def _load_run(config: Config, workdir: AnyPath, checkpoint: Checkpoint) -> Pipeline:
    """Loads the run after checking that it is one of this configuration."""
    read_config(workdir)  # a folder without a run is refused, not made into one
    open_workdir(workdir, config)
    return load(workdir, checkpoint=checkpoint, mesh=sharding.make_mesh(config.mesh))


def segmenter_path(config: Config, workdir: AnyPath) -> AnyPath:
    """Returns the file of a run's segmenter."""
    return workdir / f"segmenter_{config.evaluate.segmenter_width}x{config.evaluate.segmenter_steps}.npz"


def segmenter_of(config: Config, workdir: AnyPath) -> segmenter.Params:
    """Returns the segmenter of this data set and size, trained once a run."""
    path = segmenter_path(config, workdir)
    if path.exists():
        return segmenter.load(path)
    batches = loading.train_iterator(config.data, batch_size=16, seed=config.train.seed)
    logger.info("Training the segmenter that reads masks back from faces.")
    params = segmenter.train_segmenter(
        batches,
        num_steps=config.evaluate.segmenter_steps,
        width=config.evaluate.segmenter_width,
        key=jax.random.key(config.train.seed),
    )
    if is_primary():
        segmenter.save(params, path)
    return params


def _grid_scale(size: int) -> int:
    return max(1, GRID_HEIGHT // size)


def _make_folder(path: AnyPath) -> None:
    try:
        with bucket_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {path} cannot be created ({error}); name another.") from error
