"""The folder of one run. No other module knows the names of its files.

RUN/
  config.json             the resolved configuration
  autoencoder/            weights and sizes in the format of diffusers; absent for a denoiser of pixels
  autoencoder_training/   checkpoints, metrics and traces of the autoencoder, if the run trains its own
  checkpoints/            see `checkpoints.py`
  metrics.jsonl           see `metrics.py`
  tensorboard/            the same values as TensorBoard events
  profile/                traces of single steps
  samples/                images
  evaluation.json, evaluation_terms.npz, report.html, model_card.md, evaluation_cache/   see `EvaluationFolder`
  evaluations/            results of the command `evaluate`: numbered folders, whose files are named as in a run
  mask_prior.npz          where the classes lie in the training masks; see `data/location_prior.py`
  parser.safetensors      the face parser; see `parser_file.py`
  parser_training/        checkpoints and metrics of its training
  loss.png, plan_TOPOLOGY.json, RUN_STEP.safetensors
  lock.json               the job that writes to the folder, while it runs; see `lock.py`
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Literal, Self

import jax
from jax.sharding import Mesh

from sisma_jax import config_files
from sisma_jax.config import Config
from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, to_path, write_atomically
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder
from sisma_jax.models.face_parser import FaceParser
from sisma_jax.models.factory import Params, init_params
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary, together
from sisma_jax.runs import lock, parser_file
from sisma_jax.runs.ranking import BEST_METRICS

Checkpoint = Literal["newest", "best"] | int
"""A checkpoint of a run: the newest, the best by the metric `train.best`, or the one of a step."""


class TrainingFolder:
    """The folder to which one training job writes.

    Attributes:
      path: the folder, on a disk or in a bucket.
      checkpoints: folder of the checkpoints.
      metrics: file with one line of JSON per logged step.
      tensorboard: folder of the TensorBoard events.
      profile: folder of the traces.
    """

    def __init__(self, path: str | os.PathLike[str], require_lock: Callable[[], None] | None = None):
        """Names the files in a folder, which need not exist.

        Args:
          path: the folder.
          require_lock: raises InputError if this job has lost the lock of the folder; None if there is no lock.
        """
        self.path = to_path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self._require_lock = require_lock

    def require_lock(self) -> None:
        """Checks that this job still holds the lock of the folder (see `lock.py`); every process must call this.

        Raises:
          InputError: another job has taken over the folder.
        """
        with together():
            if self._require_lock is not None:
                self._require_lock()


class EvaluationFolder:
    """The files of one evaluation, in the folder of a run or in one of its own.

    Attributes:
      path: the folder, on a disk or in a bucket.
      result: values with intervals; see `evaluation/results.py`.
      terms: the terms of the values.
      report: page that shows them.
      model_card: description of the model for a model hub.
      cache: sampled faces and features, by which an interrupted evaluation resumes.
      samples: folder of the grid of samples.
    """

    def __init__(self, path: AnyPath):
        self.path = path
        self.result = path / "evaluation.json"
        self.terms = path / "evaluation_terms.npz"
        self.report = path / "report.html"
        self.model_card = path / "model_card.md"
        self.cache = path / "evaluation_cache"
        self.samples = path / "samples"

    def sample_grid(self, step: int) -> AnyPath:
        """Returns the image file for a grid of masks, samples and originals at a training `step`."""
        return self.samples / f"grid_{step:07d}.png"


class RunFolder(TrainingFolder):
    """The folder of a run: `open` it for reading, or use `writing` to create or resume a run.

    Attributes:
      config: the run's configuration.
      autoencoder_path: folder of the KL autoencoder.
      autoencoder_training: folder of the KL autoencoder's training, if the run trains its own.
      samples: folder for images.
      reconstructions: image of test images and their reconstructions.
      evaluations: folder for the results of the command `evaluate`.
      evaluation: files of the evaluation at the end of training.
      loss_curve: plot of the losses.
      parser_path: file of the face parser.
      parser_training: folder of the face parser's training.
    """

    def __init__(self, path: str | os.PathLike[str], config: Config, require_lock: Callable[[], None] | None = None):
        """Names the files of a run in a folder, which need not contain a run.

        Args:
          path: the folder, on a disk or in a bucket.
          config: the run's configuration.
          require_lock: as for `TrainingFolder`.
        """
        super().__init__(path, require_lock)
        self.config = config
        self.autoencoder_path = self.path / "autoencoder"
        self.mask_prior_path = self.path / "mask_prior.npz"
        self.autoencoder_training = TrainingFolder(self.path / "autoencoder_training", require_lock)
        self.samples = self.path / "samples"
        self.reconstructions = self.samples / "reconstructions.png"
        self.evaluations = self.path / "evaluations"
        self.evaluation = EvaluationFolder(self.path)
        self.loss_curve = self.path / "loss.png"
        self.parser_path = self.path / "parser.safetensors"
        self.parser_training = TrainingFolder(self.path / "parser_training", require_lock)

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: Config | None = None) -> Self:
        """Returns an existing run for reading; writes nothing.

        Args:
          path: folder of the run, on a disk or in a bucket.
          config: the expected configuration. Values that may change when a run resumes may differ from the saved ones,
            and replace them. None: the saved configuration.

        Raises:
          InputError: the folder contains no run, its configuration cannot be read, or it differs from `config`.
        """
        folder = to_path(path)
        with together():
            saved = read_config(folder)
            if config is not None:
                _require_same(folder, saved, config)
        return cls(folder, saved if config is None else config)

    @classmethod
    @contextlib.contextmanager
    def writing(cls, path: str | os.PathLike[str], config: Config) -> Iterator[Self]:
        """Creates a new run or resumes an existing one, and holds the lock of its folder during the block.

        Every process of a job must call this. The first process holds the lock and writes the configuration. The others
        check that they see the same configuration.

        Args:
          path: folder of the run, on a disk or in a bucket.
          config: the run's configuration. Values that may change when a run resumes replace the saved ones.

        Yields:
          The run.

        Raises:
          InputError: another job writes to the folder; the run was started with another configuration, or its
            `config.json` cannot be read; the folder cannot be created or written; or the processes do not all see the
            same folder.
        """
        folder, require_lock = to_path(path), None
        with contextlib.ExitStack() as held:
            with together():
                if is_primary():
                    require_lock = _begin(folder, config, held)
            if jax.process_count() > 1:
                with together():
                    _require_shared(folder, config)
            yield cls(folder, config, require_lock)

    def plan(self, topology: str) -> AnyPath:
        """Returns the file for the plan of the run on a `topology` such as "v5e:4x4"."""
        return self.path / f"plan_{topology.replace(':', '-')}.json"

    def exported(self, step: int, suffix: str) -> AnyPath:
        """Returns the default file for an export of a training `step`, with a suffix such as .safetensors."""
        name = (self.path if is_bucket(self.path) else self.path.resolve()).name
        return self.path / f"{name}_{step:07d}{suffix}"

    def has_autoencoder(self) -> bool:
        """Returns whether the run has the weights of a KL autoencoder."""
        return kl_weights.exist(self.autoencoder_path)

    @functools.cached_property
    def autoencoder(self) -> IdentityAutoencoder | KlAutoencoder:
        """The run's autoencoder, which is read on first use.

        Raises:
          InputError: the run has no weights of its KL autoencoder yet, or they are damaged.
        """
        return IdentityAutoencoder() if self.config.autoencoder.kind == "identity" else self.kl_autoencoder

    @functools.cached_property
    def kl_autoencoder(self) -> KlAutoencoder:
        """The run's KL autoencoder, which is read on first use.

        Raises:
          InputError: the run has no weights of a KL autoencoder, or they are damaged.
        """
        if not self.has_autoencoder():
            raise InputError(f"{self.path} has no autoencoder yet; run the `autoencoder` command, or `train`.")
        return kl_weights.load(self.autoencoder_path)

    @functools.cached_property
    def autoencoder_fingerprint(self) -> str:
        """Fingerprint that identifies the run's KL autoencoder.

        Raises:
          InputError: the run has no weights of a KL autoencoder, or they are damaged.
        """
        return kl_weights.fingerprint(self.kl_autoencoder)

    @functools.cached_property
    def mask_prior(self) -> LocationPrior | None:
        """Where the classes lie in the training masks; None if the run was trained before this was recorded.

        Raises:
          InputError: the file is damaged.
        """
        with bucket_errors(self.mask_prior_path):
            return LocationPrior.load(self.mask_prior_path) if self.mask_prior_path.exists() else None

    def has_parser(self) -> bool:
        """Returns whether the configuration names a face parser, or the run has its own."""
        with bucket_errors(self.parser_path):
            return bool(self.config.parser.weights) or self.parser_path.exists()

    @functools.cached_property
    def parser(self) -> FaceParser:
        """The face parser, which is read on first use: that of `parser.weights`, or the run's own.

        Raises:
          InputError: the file does not exist or is damaged, or the face parser has other classes than the run.
        """
        return parser_file.load(self.config.parser.weights or self.parser_path, self.config.data.classes)

    def restore_ema(self, mesh: Mesh, checkpoint: Checkpoint = "newest") -> tuple[int, Params]:
        """Returns the step and the EMA parameters of a checkpoint, sharded over the mesh.

        Args:
          mesh: of all devices.
          checkpoint: "newest" or "best", which skip damaged checkpoints, or the step of a checkpoint.

        Raises:
          InputError: the checkpoint does not exist or is damaged, or the packages to read it are not installed.
        """
        try:
            from sisma_jax.runs.checkpoints import Checkpoints  # imports Orbax
        except ModuleNotFoundError as error:
            raise InputError(
                f"{self.path}: reading checkpoints needs the package {error.name}; pip install 'sisma-jax[train]', or "
                "load a file that the command `export` wrote."
            ) from error

        abstract = jax.eval_shape(functools.partial(init_params, self.config), jax.random.key(0))
        placed = sharding.place(abstract, sharding.of_state(abstract, mesh))
        with Checkpoints(self.checkpoints, best=BEST_METRICS[self.config.train.best], read_only=True) as checkpoints:
            return checkpoints.restore_ema(placed, checkpoint)


def _config_path(path: AnyPath) -> AnyPath:
    return path / "config.json"


def _begin(path: AnyPath, config: Config, held: contextlib.ExitStack) -> Callable[[], None]:
    """Creates and locks the folder until `held` is closed, and writes the configuration; returns `require_lock`."""
    try:
        with bucket_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {path} cannot be created ({error}); name another folder.") from error
    _require_resumable(path, config)  # before the lock, for which this process may have to wait
    try:
        require_lock = held.enter_context(lock.hold(path / "lock.json"))
        _require_resumable(path, config)
        write_atomically(_config_path(path), config_files.to_json(config))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); fix the folder, or name another.") from error
    return require_lock


def _require_resumable(path: AnyPath, config: Config) -> None:
    if _exists(_config_path(path)):
        _require_same(path, read_config(path), config)


def _require_shared(path: AnyPath, config: Config) -> None:
    if not _exists(_config_path(path)):
        raise InputError(
            f"Process {jax.process_index()} does not see {_config_path(path)}, which process 0 wrote; put the folder "
            "of the run on a disk that all processes share, or in a bucket."
        )
    _require_same(path, read_config(path), config)


def _exists(path: AnyPath) -> bool:
    try:
        with bucket_errors(path):
            return path.exists()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}).") from error


def _require_same(path: AnyPath, saved: Config, config: Config) -> None:
    different = config_files.differences(saved, config)
    if different:
        raise InputError(
            f"{path} holds a run with another configuration:\n  "
            + "\n  ".join(different)
            + "\nGive the run's own values to resume it, or name another folder to start a new run."
        )


def read_config(path: AnyPath) -> Config:
    """Returns the saved configuration of a run.

    Args:
      path: folder of the run.

    Raises:
      InputError: the folder contains no run, or its configuration cannot be read.
    """
    file = _config_path(path)
    try:
        with bucket_errors(file):
            text = file.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path} holds no run, as {file} does not exist; train first, or name another folder."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({error}).") from error
    return config_files.from_json(text, source=str(file))
