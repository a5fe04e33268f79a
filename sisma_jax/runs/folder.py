"""The folder of one run: the only code that knows the names of its files.

RUN/
  config.json             the resolved configuration
  autoencoder/            weights and sizes as diffusers saves them; not for a denoiser of pixels
  autoencoder_training/   what a training writes (see below), where the run trains its own autoencoder
  checkpoints/            see `checkpoints.py`
  metrics.jsonl           see `metrics.py`
  tensorboard/            the same values as TensorBoard events
  profile/                traces of single steps
  samples/                images
  evaluations/            results of `evaluate`, one folder each, with the names of a run
  evaluation.json, loss.png, segmenter_WIDTHxSTEPS.safetensors, plan_TOPOLOGY.json, RUN_STEP.safetensors
  lock.json               who writes the folder, while it is written; see `lock.py`
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
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, to_path, write_atomically
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder
from sisma_jax.models.factory import Params, init_params
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary, together
from sisma_jax.runs import lock
from sisma_jax.runs.export import EXPORT_SUFFIX

Checkpoint = Literal["newest", "best"] | int
"""Which checkpoint of a run: the newest, that of the lowest held-out loss, or that of a step."""


class TrainingFolder:
    """Where one training writes.

    Attributes:
      path: of the folder, on a disk or in a bucket.
      checkpoints, tensorboard, profile: folders in it.
      metrics: file in it.
    """

    def __init__(self, path: str | os.PathLike, require_lock: Callable[[], None] | None = None):
        """Names a folder, which need not exist; `require_lock`: see the method."""
        self.path = to_path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self._require_lock = require_lock

    def require_lock(self) -> None:
        """Raises InputError, in all processes of the job, if another job has taken the folder over; see `lock.py`."""
        with together():
            if self._require_lock is not None:
                self._require_lock()


class RunFolder(TrainingFolder):
    """The folder of a run: `open` it to read, or hold it for `writing`.

    Attributes:
      config: the run's configuration.
      autoencoder_path: folder of its KL autoencoder.
      autoencoder_training: where it trains that, unless weights are given.
      samples, evaluations: folders for images, and for the results of `evaluate`.
      reconstructions, evaluation, loss_curve, segmenter: files.
    """

    def __init__(self, path: str | os.PathLike, config: Config, require_lock: Callable[[], None] | None = None):
        """Names the files of a run with this configuration, in a folder that need not hold one."""
        super().__init__(path, require_lock)
        self.config = config
        self.autoencoder_path = self.path / "autoencoder"
        self.autoencoder_training = TrainingFolder(self.path / "autoencoder_training", require_lock)
        self.samples = self.path / "samples"
        self.reconstructions = self.samples / "reconstructions.png"
        self.evaluations = self.path / "evaluations"
        self.evaluation = self.path / "evaluation.json"
        self.loss_curve = self.path / "loss.png"
        width, steps = config.evaluate.segmenter_width, config.evaluate.segmenter_steps
        self.segmenter = self.path / f"segmenter_{width}x{steps}.safetensors"

    @classmethod
    def open(cls, path: str | os.PathLike, config: Config | None = None) -> Self:
        """Returns a run for reading; nothing is written.

        Args:
          config: what the run's configuration must be, except for values that may change when a run resumes: these
            count as given here. None: as the run has it.

        Raises:
          InputError: the folder holds no run, its configuration cannot be read, or it is another one.
        """
        path = to_path(path)
        with together():
            saved = read_config(path)
            if config is not None:
                _require_same(path, saved, config)
        return cls(path, saved if config is None else config)

    @classmethod
    @contextlib.contextmanager
    def writing(cls, path: str | os.PathLike, config: Config) -> Iterator[Self]:
        """Makes the folder of a new run, or checks that a run may be resumed; holds its lock during the block.

        Values that may change when a run resumes replace the saved ones. Every process of a job calls this: the first
        one holds the lock and writes, and the others check their configuration against what it wrote.

        Raises:
          InputError: another job writes the folder, the run was started with another configuration, its `config.json`
            cannot be read, or the folder cannot be created or written, or is not the same for all processes.
        """
        path, require_lock = to_path(path), None
        with contextlib.ExitStack() as held:
            with together():
                if is_primary():
                    require_lock = _begin(path, config, held)
            if jax.process_count() > 1:
                with together():
                    _require_shared(path, config)
            yield cls(path, config, require_lock)

    def sample_grid(self, step: int) -> AnyPath:
        """Returns the file for samples of a step beside their masks and originals."""
        return self.samples / f"grid_{step:07d}.png"

    def plan(self, topology: str) -> AnyPath:
        """Returns the file for what the run takes on a topology such as "v5e:4x4"."""
        return self.path / f"plan_{topology.replace(':', '-')}.json"

    def exported(self, step: int) -> AnyPath:
        """Returns where the parameters of a step are exported to, unless another file is named."""
        name = (self.path if is_bucket(self.path) else self.path.resolve()).name
        return self.path / f"{name}_{step:07d}{EXPORT_SUFFIX}"

    def has_autoencoder(self) -> bool:
        """Whether the run has the weights of a KL autoencoder."""
        return kl_weights.exist(self.autoencoder_path)

    @functools.cached_property
    def autoencoder(self) -> IdentityAutoencoder | KlAutoencoder:
        """The run's autoencoder, read once.

        Raises:
          InputError: the run has none yet, or its files are damaged.
        """
        if self.config.autoencoder.kind == "identity":
            return IdentityAutoencoder()
        if not self.has_autoencoder():
            raise InputError(f"{self.path} has no autoencoder yet; run the `autoencoder` command, or `train`.")
        return kl_weights.load(self.autoencoder_path)

    @functools.cached_property
    def autoencoder_fingerprint(self) -> str:
        """What distinguishes the run's KL autoencoder from others."""
        return kl_weights.fingerprint(self.autoencoder)

    def restore_ema(self, mesh: Mesh, checkpoint: Checkpoint = "newest") -> tuple[int, Params]:
        """Returns step and EMA parameters of a checkpoint, sharded over the mesh.

        Raises:
          InputError: there is no such checkpoint, or it cannot be read.
        """
        try:
            from sisma_jax.runs.checkpoints import HELD_OUT_LOSS, Checkpoints  # imports Orbax
        except ModuleNotFoundError as error:
            raise InputError(
                f"{self.path}: checkpoints need the package {error.name}; pip install 'sisma-jax[train]', or load a "
                "file that the command `export` wrote."
            ) from error

        abstract = jax.eval_shape(functools.partial(init_params, self.config), jax.random.key(0))
        placed = sharding.place(abstract, sharding.of_state(abstract, mesh))
        with Checkpoints(self.checkpoints, best=HELD_OUT_LOSS, read_only=True) as checkpoints:
            return checkpoints.restore_ema(placed, checkpoint)


def _config_path(path: AnyPath) -> AnyPath:
    return path / "config.json"


def _begin(path: AnyPath, config: Config, held: contextlib.ExitStack) -> Callable[[], None]:
    """Locks the folder until `held` is closed, and writes the configuration."""
    try:
        with bucket_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {path} cannot be created ({error}); name another folder.") from error
    _require_resumable(path, config)  # at once, even if it takes long to get the lock
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
            f"Process {jax.process_index()} does not see {_config_path(path)}, which process 0 wrote: the folder of a "
            "run must be on a disk that all processes share, or in a bucket."
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
            + "\nGive the run's own values to resume it, or another folder to start a new run."
        )


def read_config(path: AnyPath) -> Config:
    """Returns the configuration of a run.

    Raises:
      InputError: the folder holds no run, or its configuration cannot be read.
    """
    file = _config_path(path)
    try:
        with bucket_errors(file):
            text = file.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} holds no run: there is no {file}. Train first, or name another folder.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({error}).") from error
    return config_files.from_json(text, source=str(file))
