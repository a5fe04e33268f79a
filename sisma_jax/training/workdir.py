"""The folder of one run and its `config.json`.

workdir/
  config.json      the resolved configuration
  autoencoder/     see `autoencoder.py`; not for a denoiser of pixels
  checkpoints/     see `checkpoints.py`
  metrics.jsonl    see `metrics.py`
  tensorboard/     the same values as TensorBoard events
"""

from pathlib import Path

from sisma_jax import config as config_lib
from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.files import write_atomically

CONFIG_NAME = "config.json"


def autoencoder_folder(workdir: Path) -> Path:
    """Returns where a run keeps its autoencoder; see `autoencoder.py`."""
    return workdir / "autoencoder"


def open_workdir(workdir: Path, config: Config) -> None:
    """Makes `workdir` the folder of a run with this configuration, or checks that it is one and may be resumed.

    Values that may change on resume (`config.MAY_CHANGE_ON_RESUME`) replace the saved ones.

    Raises:
      InputError: the run was started with another configuration, its `config.json` is damaged, or the folder cannot
        be created or written.
    """
    path = workdir / CONFIG_NAME
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        exists = path.exists()
    except OSError as error:
        raise InputError(f"The folder {workdir} cannot be created ({error}); choose another --workdir.") from error
    if exists:
        different = config_lib.differences(read_config(workdir), config)
        if different:
            raise InputError(
                f"{workdir} holds a run with another configuration:\n  "
                + "\n  ".join(different)
                + "\nGive the run's own values to resume it, or another --workdir to start a new run."
            )
    try:
        write_atomically(path, config_lib.to_json(config))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); mend the folder or choose another --workdir.") from error


def read_config(workdir: Path) -> Config:
    """Returns the configuration of the run in `workdir`.

    Raises:
      InputError: the folder holds no run, or its `config.json` is damaged.
    """
    path = workdir / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{workdir} holds no run: there is no {path}. Train first, or name another folder.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from error
    try:
        return config_lib.from_json(text, source=str(path))
    except InputError as error:
        raise InputError(f"{path} is damaged: {error} Restore it from a copy, or choose another --workdir.") from error
