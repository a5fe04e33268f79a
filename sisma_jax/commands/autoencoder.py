"""The commands `autoencoder` and `latents`: what a denoiser of latents needs before its first step."""

import dataclasses

import numpy as np

from sisma_jax.commands.prepare import prepare_data
from sisma_jax.commands.report import GRID_ROWS, grid_scale, make_folder, tell
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.latents import LatentDataSet
from sisma_jax.errors import InputError
from sisma_jax.evaluation import grids
from sisma_jax.files import AnyPath
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.runs.folder import RunFolder
from sisma_jax.training import autoencoder as autoencoders


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Prepares the run's autoencoder, and shows its reconstructions of test images."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        _require_autoencoder(config)
        with RunFolder.writing(workdir, config) as run:
            prepare_autoencoder(run)


@dataclasses.dataclass(frozen=True)
class Latents:
    """Prepares the run's autoencoder and the cache of the data set's latents."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        _require_autoencoder(config)
        with RunFolder.writing(workdir, config) as run:
            prepare_latents(run)


def _require_autoencoder(config: Config) -> None:
    if config.autoencoder.kind == "identity":
        raise InputError("There is no autoencoder to prepare: autoencoder.kind is identity.")


def prepare_autoencoder(run: RunFolder) -> DataSet:
    """Returns the prepared data set; the run has its autoencoder afterwards."""
    config = run.config
    if config.autoencoder.weights:  # a wrong file is named before the data set is written
        autoencoders.prepare(run)
        dataset = prepare_data(config)
    else:
        dataset = prepare_data(config)
        autoencoders.prepare(run, dataset)
    path = run.reconstructions
    if is_primary() and not path.exists():
        originals, decoded = zip(*autoencoders.reconstructions(run.autoencoder, dataset, GRID_ROWS), strict=True)
        masks = next(dataset.eval_batches("test", GRID_ROWS, limit=GRID_ROWS))["mask"]
        grid = grids.sample_grid(
            masks,
            np.concatenate(decoded)[:, None],
            np.concatenate(originals),
            classes=dataset.classes,
            scale=grid_scale(config.data.image_size),
        )
        make_folder(path.parent)
        grids.save_png(path, grid)
        psnr = autoencoders.psnr(
            run.autoencoder, dataset, config.evaluate.num_samples, config.autoencoder.encode_batch_size
        )
        tell(f"PSNR of reconstructed test images: {psnr:.2f} dB")
    tell(f"Autoencoder: {run.autoencoder_path}")
    tell(f"Reconstructions (mask | reconstruction | original): {path}")
    return dataset


def prepare_latents(run: RunFolder) -> tuple[DataSet, LatentDataSet]:
    """Returns the data set, and the same in the latents of the run's autoencoder, prepared if they were not."""
    dataset = prepare_autoencoder(run)
    latents = LatentDataSet.prepare(dataset, autoencoders.encoder(run))
    tell(f"Latents: {latents.path}")
    return dataset, latents
