"""Configurations as files: `configs/NAME.py` defines `get_config() -> Config`, and a run saves its own as JSON."""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any, get_type_hints

from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path

VERSION = 3
"""Version of the JSON. It rises when an older configuration would mean something else, or parameters are stored
differently."""


# Values of earlier releases that nothing reads any more.
_RETIRED = {"evaluate": ("segmenter_steps", "segmenter_width")}


def load(path: str | os.PathLike[str]) -> Config:
    """Returns what `get_config()` of a configuration file returns.

    Args:
      path: the file, configs/NAME.py.

    Raises:
      InputError: the file does not exist, fails to run, does not define `get_config`, or sets a key or value that the
        schema rejects. The message names the file and the line.
    """
    path = to_path(path)
    if not path.is_file() or path.suffix != ".py":
        beside = ", ".join(sorted(map(str, path.parent.glob("*.py"))))
        raise InputError(f"config {path} is not a Python file." + (f" There are {beside}." if beside else ""))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _naming_the_line(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        last = len(path.read_text().splitlines())
        raise InputError(
            f"{path}, line {last}: the file ends without get_config() -> sisma_jax.config.Config; define this function."
        )
    with _naming_the_line(path):
        config = module.get_config()
    if not isinstance(config, Config):
        line = module.get_config.__code__.co_firstlineno
        raise InputError(
            f"{path}, line {line}: get_config() returns {type(config).__name__}, want sisma_jax.config.Config."
        )
    return config


@contextlib.contextmanager
def _naming_the_line(path: AnyPath) -> Iterator[None]:
    """Turns an exception of the block into an InputError that names the line of the file that raised it."""
    try:
        yield
    except SyntaxError as error:  # in the file itself, or in a file that it imports
        raise InputError(f"{error.filename}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise InputError(f"{where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown and isinstance(error, TypeError):
        return f"{unknown[1]!r} is not a configuration key. {_nearest(unknown[1])}"
    return f"{type(error).__name__}: {error}"


def keys() -> dict[str, dataclasses.Field[Any]]:
    """Returns {dotted key: field} for every value of the schema; a key is "model.d_state", for example."""
    return {
        f"{section}.{field.name}": field
        for section, hint in get_type_hints(Config).items()
        for field in dataclasses.fields(hint)
    }


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, {key.split(".")[1] for key in keys()}, n=2)
    if not near:
        return f"The keys are {', '.join(keys())}."
    return f"Perhaps you meant {' or '.join(key for key in keys() if key.split('.')[1] in near)}."


def to_json(config: Config) -> str:
    """Returns the configuration as indented JSON, with the version of the schema."""
    return json.dumps({"version": VERSION} | dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """Returns the configuration that `to_json` wrote.

    Args:
      text: the JSON.
      source: where the text comes from, for error messages.

    Raises:
      InputError: the text is not JSON, has another version of the schema, or has a key or value that the schema
        rejects.
    """
    try:
        values = json.loads(text)
        version = values.pop("version", 1)
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise InputError(f"{source} is not a configuration ({error!r}).") from error
    if version != VERSION:
        raise InputError(
            f"{source} is of version {version} of the configuration, and this release of sisma_jax reads version "
            f"{VERSION}; use the release that wrote it, or train again."
        )
    try:
        for section, names in _RETIRED.items():
            for name in names:
                values.get(section, {}).pop(name, None)
        sections = get_type_hints(Config)
        return Config(**{key: sections[key](**value) for key, value in values.items()})
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{source} is not a configuration of this version ({error!r}).") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def differences(saved: Config, given: Config) -> list[str]:
    """Returns one line for each value that differs but may not change when a run resumes."""

    def get(config: Config, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    return [
        f"{key}: the run has {get(saved, key)!r}, given {get(given, key)!r}"
        for key, field in keys().items()
        if get(saved, key) != get(given, key) and not field.metadata.get("may_change", False)
    ]
