"""Configurations as files: `configs/NAME.py`, which defines `get_config() -> Config`, and the JSON that a run keeps."""

import dataclasses
import difflib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

from sisma_jax.config import Config
from sisma_jax.errors import InputError


def load(path: Path) -> Config:
    """Returns `get_config()` of a configuration file.

    Raises:
      InputError: there is no such file, it defines no `get_config`, or it sets a key or value that the schema refuses.
    """
    if not path.is_file() or path.suffix != ".py":
        beside = ", ".join(sorted(map(str, path.parent.glob("*.py"))))
        raise InputError(f"--config {path} is not a Python file." + (f" There are {beside}." if beside else ""))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise InputError(f"{path} sets {unknown[1]!r}, which is not a key. {_nearest(unknown[1])}") from error
    except AttributeError as error:
        if hasattr(module, "get_config"):
            raise
        raise InputError(f"{path} does not define get_config() -> sisma_jax.config.Config.") from error
    if not isinstance(config, Config):
        raise InputError(f"get_config() of {path} returns {type(config).__name__}, want sisma_jax.config.Config.")
    return config


def _nearest(name: str) -> str:
    keys = [
        f"{section}.{field.name}"
        for section, hint in get_type_hints(Config).items()
        for field in dataclasses.fields(hint)
    ]
    near = difflib.get_close_matches(name, {key.split(".")[1] for key in keys}, n=2)
    if not near:
        return f"The keys are {', '.join(keys)}."
    return f"Perhaps you meant {' or '.join(key for key in keys if key.split('.')[1] in near)}."


# What may differ between a run's saved configuration and the one that resumes it: these change how
# long a run goes on and what is made of it, never what its checkpoints mean.
MAY_CHANGE_ON_RESUME = (
    "data.root",
    "data.cache_dir",
    "data.skip_damaged",
    "data.num_threads",
    "autoencoder.weights",  # what they hold may not: it is compared with what the run began with
    "autoencoder.decode_tile",
    "autoencoder.encode_batch_size",
    "autoencoder.checkpoint_every_steps",
    "model.remat",
    "model.scan_implementation",
    "mesh",
    "train.num_steps",
    "train.init_from",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.max_skipped_steps",
    "train.profile_steps",
    "sample",
    "evaluate",
)


def to_json(config: Config) -> str:
    """Returns the configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """Reads what `to_json` wrote.

    Raises:
      InputError: the text is not JSON, or has keys that the schema does not know.
    """
    try:
        values = json.loads(text)
        sections = get_type_hints(Config)
        return Config(**{key: sections[key](**value) for key, value in values.items()})
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{source} is not a configuration of this version ({error!r}).") from error


def differences(saved: Config, given: Config) -> list[str]:
    """Returns one line for each value that differs and may not change when a run is resumed."""

    def flatten(config: Config) -> dict[str, Any]:
        return {
            f"{section}.{key}": value
            for section, values in dataclasses.asdict(config).items()
            for key, value in values.items()
        }

    before, after = flatten(saved), flatten(given)
    return [
        f"--{key}: the run has {before[key]!r}, given {after[key]!r}"
        for key in before
        if before[key] != after[key] and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
