"""Exported models: one file with everything that sampling needs.

The file contains the EMA parameters of a run, its configuration and, for a denoiser of latents, its KL autoencoder. It
has the safetensors format, which other programs can read. The names of the arrays are the paths of the parameters:

    layers.stacked.mixer.in_proj.kernel         denoiser
    autoencoder.decoder.conv_in.kernel          KL autoencoder
    parser.levels.block_in.conv_in.kernel       face parser

All metadata are strings: format, version, step, config (JSON, including the mask classes), autoencoder (JSON of
`KlConfig`), mask_prior, parser (see `parser_file.py`), and crc32 (of the bytes of all arrays, sorted by name).
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from sisma_jax import config_files
from sisma_jax.config import Config
from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, on_disk, to_path, write_atomically
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.face_parser import FaceParser
from sisma_jax.models.factory import Params, init_params
from sisma_jax.parallel.agreement import is_primary, together
from sisma_jax.runs import flat_trees, named_weights, parser_file

EXPORT_SUFFIX = ".safetensors"

_FORMAT = "sisma_jax"
_VERSION = 2
_AUTOENCODER = "autoencoder"
_MASK_PRIOR = "mask_prior"
_PARSER = "parser"
_PARSER_PREFIX = f"{_PARSER}."


@dataclasses.dataclass(frozen=True)
class Exported:
    """The content of an exported file.

    Attributes:
      config: configuration of the run.
      step: training step of the parameters.
      params: EMA parameters of the denoiser.
      autoencoder: of the run, with its parameters.
      mask_prior: of the run, if it has recorded one.
      parser: the run's face parser, if it had one.
    """

    config: Config
    step: int
    params: Params
    autoencoder: IdentityAutoencoder | KlAutoencoder
    mask_prior: LocationPrior | None = None
    parser: FaceParser | None = None


def export_params(
    path: str | PathLike[str],
    config: Config,
    step: int,
    params: Params,
    autoencoder: IdentityAutoencoder | KlAutoencoder | None = None,
    mask_prior: LocationPrior | None = None,
    parser: FaceParser | None = None,
) -> None:
    """Writes an exported file atomically. Every process of a job must call this; the first one writes.

    Args:
      path: file on a disk or in a bucket. Its folder is created, and an existing file is replaced.
      config: configuration of the run.
      step: training step of the parameters.
      params: EMA parameters of the denoiser, on one device of this process.
      autoencoder: of the run; a denoiser of pixels needs none.
      mask_prior: of the run, if it has one.
      parser: of the run, if it has one.

    Raises:
      InputError: a parameter is not finite, or the file cannot be written.
    """
    with together():
        if not is_primary():
            return
        tree: Params = dict(params)
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "step": str(step),
            "config": config_files.to_json(config),
        }
        if isinstance(autoencoder, KlAutoencoder):
            tree[_AUTOENCODER] = nnx.to_pure_dict(nnx.split(autoencoder)[1])
            metadata[_AUTOENCODER] = json.dumps(dataclasses.asdict(autoencoder.config))
        file, flat = to_path(path), flat_trees.flatten(tree)
        if bad := flat_trees.first_not_finite(flat):
            raise InputError(f"{file} is not written: the parameter {bad} is not finite. Export another checkpoint.")
        arrays = {name: np.ascontiguousarray(array) for name, array in flat.items()}
        if mask_prior is not None:
            arrays[_MASK_PRIOR] = np.ascontiguousarray(mask_prior.log_probabilities)
            metadata[_MASK_PRIOR] = str(mask_prior.usual_score)
        if parser is not None:
            parser_arrays, metadata[_PARSER] = parser_file.pack(parser)
            arrays |= {_PARSER_PREFIX + name: array for name, array in parser_arrays.items()}
        write_exported(file, safetensors.numpy.save(arrays, metadata | {"crc32": flat_trees.crc32(arrays)}))


def write_exported(file: AnyPath, content: bytes) -> None:
    """Writes a file atomically, in a folder that is created.

    Args:
      file: on a disk or in a bucket; an existing file is replaced.
      content: all bytes of the file.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        with bucket_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error}); free disk space or name another file.") from error


def load_exported(path: str | PathLike[str]) -> Exported:
    """Returns the content of a file that `export_params` wrote.

    Args:
      path: the file, on a disk or in a bucket, or a name of `named_weights`.

    Raises:
      InputError: the file does not exist, is damaged, or was written by another program or version; its arrays differ
        from those that its configuration describes, or one of them is not finite.
    """
    path = to_path(named_weights.find(path))
    with _opened(path) as content:
        metadata = content.metadata()
        arrays = {name: content.get_tensor(name) for name in content.keys()}
    config = config_files.from_json(metadata["config"], f"the configuration in {path}")
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    graph = None
    if _AUTOENCODER in metadata:
        sizes = KlConfig(**_with_tuples(json.loads(metadata[_AUTOENCODER])))
        graph, state = nnx.split(nnx.eval_shape(lambda: KlAutoencoder(sizes, rngs=nnx.Rngs(0))))
        abstract = abstract | {_AUTOENCODER: nnx.to_pure_dict(state)}
    elif config.autoencoder.kind == "kl":
        raise InputError(f"{path} holds a denoiser of latents without its autoencoder; export the run again.")
    checksum = flat_trees.crc32(arrays)
    prior = None
    if _MASK_PRIOR in metadata and _MASK_PRIOR in arrays:
        prior = LocationPrior(np.asarray(arrays.pop(_MASK_PRIOR)), float(metadata[_MASK_PRIOR]))
    parser = None
    if _PARSER in metadata:
        names = [name for name in arrays if name.startswith(_PARSER_PREFIX)]
        own = {name.removeprefix(_PARSER_PREFIX): np.asarray(arrays.pop(name)) for name in names}
        parser = parser_file.unpack(own, metadata[_PARSER], str(path))
    expected = flat_trees.forms(flat_trees.flatten_abstract(abstract))
    owners = ("the file", "its configuration")
    if different := flat_trees.list_differences(flat_trees.forms(arrays), expected, owners=owners):
        raise InputError(f"{path} holds other arrays than its configuration describes:{flat_trees.shorten(different)}")
    if metadata.get("crc32") != checksum:
        raise InputError(f"{path} differs from what was exported; copy it again.")
    if bad := flat_trees.first_not_finite(arrays):
        raise InputError(f"{path} cannot be used: the parameter {bad} is not finite. Export another checkpoint.")
    params = flat_trees.unflatten(abstract, arrays)
    autoencoder = IdentityAutoencoder() if graph is None else nnx.merge(graph, params.pop(_AUTOENCODER))
    return Exported(config, int(metadata["step"]), params, autoencoder, prior, parser)


def read_config(path: str | PathLike[str]) -> Config:
    """Returns the configuration in a file that `export_params` wrote; does not read the arrays.

    Args:
      path: the file, on a disk or in a bucket, or a name of `named_weights`.

    Raises:
      InputError: the file does not exist, is damaged, or was written by another program or version.
    """
    path = to_path(named_weights.find(path))
    with _opened(path) as content:
        return config_files.from_json(content.metadata()["config"], f"the configuration in {path}")


@contextlib.contextmanager
def _opened(path: AnyPath) -> Iterator[Any]:
    """Opens a file that `export_params` wrote, and checks its format and version."""
    try:
        with on_disk(path) as file, safetensors.safe_open(file, framework="flax") as content:
            metadata = content.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(
                    f"{path} was not written by the command `export`, as its metadata do not name {_FORMAT}; name a "
                    "file that it wrote."
                )
            if metadata.get("version") != str(_VERSION):
                raise InputError(
                    f"{path} is a file of version {metadata.get('version')}, and this release of sisma_jax reads "
                    f"version {_VERSION}; use the release that exported it, or train and export again."
                )
            yield content
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}; name a file that the command `export` wrote.") from error
    except (OSError, safetensors.SafetensorError) as error:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file that the command `export` wrote.") from error
        raise InputError(
            f"{path} cannot be read as safetensors ({error}); it is damaged, or the command `export` did not write it."
        ) from error


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with tuples in place of the lists that JSON has for them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
