"""The commands `autoencoder` and `latents`, which prepare what a denoiser of latents needs before training."""

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
    """Prepares the run's autoencoder, and writes reconstructions of test images."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`.

        Raises:
          InputError: the configuration has no autoencoder, or as for `prepare_autoencoder`.
        """
        _require_autoencoder(config)
        with RunFolder.writing(workdir, config) as run:
            prepare_autoencoder(run)


@dataclasses.dataclass(frozen=True)
class Latents:
    """Prepares the run's autoencoder, and the cache of the data set's latents."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`.

        Raises:
          InputError: the configuration has no autoencoder, or as for `prepare_latents`.
        """
        _require_autoencoder(config)
        with RunFolder.writing(workdir, config) as run:
            prepare_latents(run)


def _require_autoencoder(config: Config) -> None:
    if config.autoencoder.kind == "identity":
        raise InputError("There is no autoencoder to prepare, as autoencoder.kind is identity; set it to kl.")


def prepare_autoencoder(run: RunFolder) -> DataSet:
    """Prepares the data set and the run's autoencoder, and writes reconstructions of test images.

    Every process of a job must call this.

    Args:
      run: the run, opened with `RunFolder.writing`.

    Returns:
      The data set.

    Raises:
      InputError: the data or the weights are missing or damaged, or training fails, as for `loop.run_job`.
      Preempted: SIGTERM arrived while the autoencoder was trained.
    """
    config = run.config
    if config.autoencoder.weights:  # report a wrong file before the data set is written
        autoencoders.prepare(run)
        dataset = prepare_data(config)
    else:
        dataset = prepare_data(config)
        autoencoders.prepare(run, dataset)
    path = run.reconstructions
    if is_primary() and not path.exists():
        originals, decoded = zip(*autoencoders.reconstructions(run.kl_autoencoder, dataset, GRID_ROWS), strict=True)
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
            run.kl_autoencoder, dataset, config.evaluate.num_samples, config.autoencoder.encode_batch_size
        )
        tell(f"PSNR of reconstructed test images: {psnr:.2f} dB")
    tell(f"Autoencoder: {run.autoencoder_path}")
    tell(f"Reconstructions (mask | reconstruction | original): {path}")
    return dataset


def prepare_latents(run: RunFolder) -> tuple[DataSet, LatentDataSet]:
    """Prepares the data set, the run's autoencoder, and the cache of latents; does what is not done yet.

    Every process of a job must call this.

    Args:
      run: the run, opened with `RunFolder.writing`.

    Returns:
      The data set of images, and the data set of latents.

    Raises:
      InputError: as for `prepare_autoencoder`, or the cache cannot be written.
      Preempted: SIGTERM arrived while the autoencoder was trained.
    """
    dataset = prepare_autoencoder(run)
    latents = LatentDataSet.prepare(dataset, autoencoders.encoder(run))
    tell(f"Latents: {latents.path}")
    return dataset, latents
