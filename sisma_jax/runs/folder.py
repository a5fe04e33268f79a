"""The folder of one run and its `config.json`.

workdir/
  config.json      the resolved configuration
  autoencoder/     see `autoencoder.py`; not for a denoiser of pixels
  checkpoints/     see `checkpoints.py`
  metrics.jsonl    see `metrics.py`
  tensorboard/     the same values as TensorBoard events
"""

import jax

from sisma_jax import config_files
from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, write_atomically
from sisma_jax.parallel.agreement import is_primary, together

CONFIG_NAME = "config.json"


def autoencoder_folder(workdir: AnyPath) -> AnyPath:
    """Returns where a run keeps its autoencoder; see `autoencoder.py`."""
    return workdir / "autoencoder"


def open_workdir(workdir: AnyPath, config: Config) -> None:
    """Makes `workdir` the folder of a run with this configuration, or checks that it is one and may be resumed.

    Values that may change on resume (`config_files.MAY_CHANGE_ON_RESUME`) replace the saved ones. Of several processes,
    which all call this, the first one writes, and the others check their own configuration against what it wrote.

    Raises:
      InputError: the run was started with another configuration, its `config.json` is damaged, the folder cannot be
        created or written, or is not the same for all processes.
    """
    with together():
        if is_primary():
            _open(workdir, config)
    if jax.process_count() == 1:
        return
    with together():
        if not _exists(workdir / CONFIG_NAME):
            raise InputError(
                f"Process {jax.process_index()} does not see {workdir / CONFIG_NAME}, which process 0 wrote: --workdir "
                "must be on a disk that all processes share, or in a bucket."
            )
        _require_same(workdir, config)


def _open(workdir: AnyPath, config: Config) -> None:
    path = workdir / CONFIG_NAME
    try:
        with bucket_errors(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {workdir} cannot be created ({error}); choose another --workdir.") from error
    if _exists(path):
        _require_same(workdir, config)
    try:
        write_atomically(path, config_files.to_json(config))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); mend the folder or choose another --workdir.") from error


def _exists(path: AnyPath) -> bool:
    try:
        with bucket_errors(path):
            return path.exists()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}).") from error


def _require_same(workdir: AnyPath, config: Config) -> None:
    different = config_files.differences(read_config(workdir), config)
    if different:
        raise InputError(
            f"{workdir} holds a run with another configuration:\n  "
            + "\n  ".join(different)
            + "\nGive the run's own values to resume it, or another --workdir to start a new run."
        )


def read_config(workdir: AnyPath) -> Config:
    """Returns the configuration of the run in `workdir`.

    Raises:
      InputError: the folder holds no run, or its `config.json` is damaged.
    """
    path = workdir / CONFIG_NAME
    try:
        with bucket_errors(path):
            text = path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{workdir} holds no run: there is no {path}. Train first, or name another folder.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from error
    try:
        return config_files.from_json(text, source=str(path))
    except InputError as error:
        raise InputError(f"{path} is damaged: {error} Restore it from a copy, or choose another --workdir.") from error
