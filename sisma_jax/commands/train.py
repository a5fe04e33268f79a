"""The commands `train` and `all`, which create or resume a run."""

import dataclasses

from sisma_jax import pipeline
from sisma_jax.commands.autoencoder import prepare_latents
from sisma_jax.commands.evaluate import evaluate
from sisma_jax.commands.parser import prepare_parser
from sisma_jax.commands.prepare import prepare_data
from sisma_jax.commands.report import tell
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.latents import LatentDataSet
from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.evaluation import grids
from sisma_jax.evaluation.measurement import load_networks
from sisma_jax.evaluation.periodic import PeriodicEvaluation
from sisma_jax.evaluation.protocols import protocol
from sisma_jax.files import AnyPath, bucket_errors
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.runs import parser_file
from sisma_jax.runs.folder import RunFolder, TrainingFolder
from sisma_jax.runs.metrics import read_metrics
from sisma_jax.training import autoencoder as autoencoders
from sisma_jax.training import face_parser, loop

# More masks do not change the prior noticeably. Reading them takes a few seconds.
_PRIOR_MASKS = 2000


@dataclasses.dataclass(frozen=True)
class Train:
    """Prepares the data, trains the denoiser, and plots the loss; resumes the run if it exists."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`, which is created if it does not exist.

        Raises:
          InputError: the run was started with another configuration, or as for `train`.
          Preempted: SIGTERM arrived, and a checkpoint is saved.
        """
        _check(config, workdir)
        with RunFolder.writing(workdir, config) as run:
            train(run)


@dataclasses.dataclass(frozen=True)
class All:
    """Runs the whole experiment: prepares the data, trains denoiser and face parser, samples and evaluates. Resumes."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`, which is created if it does not exist.

        Raises:
          InputError: the run was started with another configuration, or as for `train` and `evaluate`.
          Preempted: SIGTERM arrived, and a checkpoint is saved.
        """
        _check(config, workdir)
        _check_evaluation(config)
        with RunFolder.writing(workdir, config) as run:
            dataset, examples = train(run)
            prepare_parser(run, dataset)
            trained = pipeline.from_run(run, mesh=sharding.make_mesh(config.mesh))
            evaluate(run, trained, dataset, examples, out=run.evaluation)


def _check(config: Config, workdir: AnyPath) -> None:
    """Raises InputError at once for errors that training would otherwise report after the data are prepared."""
    loop.make_mesh(config)
    if config.autoencoder.kind != "identity" and not config.autoencoder.weights:
        autoencoders.make_mesh(config)
    if config.evaluate.every_steps:
        face_parser.make_mesh(config)
    if config.train.init_from and not TrainingFolder(workdir).checkpoints.exists():  # a resumed run does not read it
        loop.initial_params(config)


def _check_evaluation(config: Config) -> None:
    """Raises InputError at once for errors that the face parser and the evaluation would report after training."""
    face_parser.make_mesh(config)
    load_networks(config.evaluate, protocol(config, config.data.num_test), None)
    if config.parser.weights:
        parser_file.load(config.parser.weights, config.data.classes)


def _record_mask_prior(run: RunFolder, dataset: DataSet) -> None:
    """Writes where the classes lie in the training masks, by which `sample` recognizes masks in another order."""
    if not is_primary():
        return
    with bucket_errors(run.mask_prior_path):
        if run.mask_prior_path.exists():
            return
    LocationPrior.fit(dataset.training_masks(_PRIOR_MASKS), dataset.classes).save(run.mask_prior_path)


def train(run: RunFolder) -> tuple[DataSet, DataSet | LatentDataSet]:
    """Prepares what training needs, trains the denoiser of a run, and plots the loss.

    Every process of a job must call this.

    Args:
      run: the run, opened with `RunFolder.writing`.

    Returns:
      The data set, and the examples on which the denoiser is trained: the same data set, or its latents.

    Raises:
      InputError: the data or the weights are missing or damaged, or training fails, as for `loop.train`.
      Preempted: SIGTERM arrived, and a checkpoint is saved.
    """
    if run.config.autoencoder.kind == "identity":
        dataset = examples = prepare_data(run.config)
    else:
        dataset, examples = prepare_latents(run)
    _record_mask_prior(run, dataset)
    evaluate_step = None
    if run.config.evaluate.every_steps:
        prepare_parser(run, dataset)
        evaluate_step = PeriodicEvaluation(run, dataset)
    loop.train(run, examples, evaluate_step)
    if is_primary():
        grids.loss_curve(read_metrics(run.metrics), run.loss_curve)
    tell(f"Checkpoints: {run.checkpoints}")
    tell(f"Loss curve: {run.loss_curve}")
    return dataset, examples
