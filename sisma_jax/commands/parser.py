"""The command `parser`: trains the face parser, which predicts masks from faces."""

import dataclasses

from sisma_jax.commands.prepare import prepare_data
from sisma_jax.commands.report import tell
from sisma_jax.config import Config
from sisma_jax.data.dataset import DataSet
from sisma_jax.evaluation import mask_agreement
from sisma_jax.files import AnyPath
from sisma_jax.parallel.agreement import from_primary, is_primary, together
from sisma_jax.runs import parser_file
from sisma_jax.runs.folder import RunFolder
from sisma_jax.training import face_parser


@dataclasses.dataclass(frozen=True)
class Parser:
    """Trains the run's face parser, which `segment`, `evaluate` and edits of photographs use, and measures it."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`, which is created if it does not exist.

        Raises:
          InputError: the run was started with another configuration, or as for `prepare_parser`.
          Preempted: SIGTERM arrived, and a checkpoint is saved.
        """
        face_parser.make_mesh(config)
        with RunFolder.writing(workdir, config) as run:
            dataset = prepare_data(config)
            prepare_parser(run, dataset)
            agreement = face_parser.held_out_agreement(run.parser, dataset, config.evaluate.num_samples)
            tell(mask_agreement.format_agreement(agreement, "Face parser, held-out images"))
            tell(f"Face parser: {config.parser.weights or run.parser_path}")


def prepare_parser(run: RunFolder, dataset: DataSet) -> None:
    """Trains the run's face parser, unless it exists or the configuration names another one.

    Every process of a job must call this; the first one writes.

    Args:
      run: the run, opened with `RunFolder.writing`.
      dataset: training data.

    Raises:
      InputError: the named face parser cannot be read, or training fails, as for `loop.run_job`.
      Preempted: SIGTERM arrived during training, and a checkpoint is saved.
    """
    if from_primary(run.has_parser):
        return
    parser = face_parser.train(run, dataset)
    with together():
        if is_primary():
            parser_file.save(parser, run.parser_path)
