"""The commands `train` and `all`."""

import dataclasses

from sisma_jax import pipeline
from sisma_jax.commands.autoencoder import prepare_latents
from sisma_jax.commands.evaluate import evaluate
from sisma_jax.commands.prepare import prepare_data
from sisma_jax.commands.report import tell
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.latents import LatentDataSet
from sisma_jax.evaluation import grids
from sisma_jax.files import AnyPath
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.runs.folder import RunFolder, TrainingFolder
from sisma_jax.runs.metrics import read_metrics
from sisma_jax.training import autoencoder as autoencoders
from sisma_jax.training import loop


@dataclasses.dataclass(frozen=True)
class Train:
    """Prepares what training reads, trains, and draws the loss curve; resumes a run that exists."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        _check(config, workdir)
        with RunFolder.writing(workdir, config) as run:
            train(run)


@dataclasses.dataclass(frozen=True)
class All:
    """Does the whole job of a configuration: prepares the data, trains, samples and evaluates."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        _check(config, workdir)
        with RunFolder.writing(workdir, config) as run:
            dataset, examples = train(run)
            trained = pipeline.from_run(run, mesh=sharding.make_mesh(config.mesh))
            evaluate(run, trained, dataset, examples, out=run)


def _check(config: Config, workdir: AnyPath) -> None:
    """Raises InputError for what would stop a training after its data are prepared."""
    loop.make_mesh(config)
    if config.autoencoder.kind != "identity" and not config.autoencoder.weights:
        autoencoders.make_mesh(config)
    if (
        config.train.init_from and not TrainingFolder(workdir).checkpoints.exists()
    ):  # a run that resumes needs it no more
        loop.initial_params(config)


def train(run: RunFolder) -> tuple[DataSet, DataSet | LatentDataSet]:
    """Trains a run; returns its data set, and the examples that the denoiser was trained on: images or latents."""
    if run.config.autoencoder.kind == "identity":
        dataset = examples = prepare_data(run.config)
    else:
        dataset, examples = prepare_latents(run)
    loop.train(run, examples)
    if is_primary():
        grids.loss_curve(read_metrics(run.metrics), run.loss_curve)
    tell(f"Checkpoints: {run.checkpoints}")
    tell(f"Loss curve: {run.loss_curve}")
    return dataset, examples
