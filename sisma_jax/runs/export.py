"""One file that samples: the EMA parameters of a run, its configuration, and its autoencoder if it has one.

The file is in the format safetensors, which other programs read too. Names are the paths of the parameters:

    layers.stacked.mixer.in_proj.kernel         of the denoiser
    autoencoder.decoder.conv_in.kernel          of the KL autoencoder, for a denoiser of latents

and its metadata, all strings: format, version, step, config (JSON, with the classes of the masks), autoencoder (JSON of
`KlConfig`), crc32 (of the arrays' bytes in the order of their names).
"""

import contextlib
import dataclasses
import json
import zlib
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
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, on_disk, to_path, write_atomically
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.factory import Params, init_params
from sisma_jax.parallel.agreement import is_primary, together
from sisma_jax.runs import flat_trees

EXPORT_SUFFIX = ".safetensors"

_FORMAT = "sisma_jax"
_VERSION = 2
_AUTOENCODER = "autoencoder"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a file holds: all that a `Pipeline` is made of."""

    config: Config
    step: int
    params: Params
    autoencoder: IdentityAutoencoder | KlAutoencoder


def export_params(
    path: str | PathLike,
    config: Config,
    step: int,
    params: Params,
    autoencoder: IdentityAutoencoder | KlAutoencoder | None = None,
) -> None:
    """Writes the file at `path`, which appears when it is complete; of several processes the first one writes.

    Args:
      path: on a disk or in a bucket; its folder is made, and a file that is there replaced.
      config: of the run.
      step: training step that the parameters are from.
      params: EMA parameters of the denoiser, on one device of this process.
      autoencoder: of the run; none is needed by a denoiser of pixels.

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
        path, flat = to_path(path), flat_trees.flatten(tree)
        if bad := flat_trees.first_not_finite(flat):
            raise InputError(f"{path} is not written: the parameter {bad} is not finite. Export another checkpoint.")
        arrays = {name: np.ascontiguousarray(array) for name, array in flat.items()}
        try:
            with bucket_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            content = safetensors.numpy.save(arrays, metadata | {"crc32": str(_crc32(arrays))})
            write_atomically(path, content)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error}); free disk space or name another file.") from error


def load_exported(path: str | PathLike) -> Exported:
    """Returns what `export_params` wrote.

    Raises:
      InputError: there is no such file, it is damaged, of another program or version, holds other arrays than its
        configuration describes, or one that is not finite.
    """
    path = to_path(path)
    with _opened(path) as content:
        metadata = content.metadata()
        arrays = {name: content.get_tensor(name) for name in content.keys()}
    config = config_files.from_json(metadata["config"], f"the configuration in {path}")
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    autoencoder = IdentityAutoencoder()
    if _AUTOENCODER in metadata:
        sizes = KlConfig(**_with_tuples(json.loads(metadata[_AUTOENCODER])))
        graph, state = nnx.split(nnx.eval_shape(lambda: KlAutoencoder(sizes, rngs=nnx.Rngs(0))))
        abstract = abstract | {_AUTOENCODER: nnx.to_pure_dict(state)}
    elif config.autoencoder.kind == "kl":
        raise InputError(f"{path} holds a denoiser of latents without its autoencoder; export the run again.")
    expected = flat_trees.forms(flat_trees.flatten_abstract(abstract))
    owners = ("the file", "its configuration")
    if different := flat_trees.list_differences(flat_trees.forms(arrays), expected, owners=owners):
        raise InputError(f"{path} holds other arrays than its configuration describes:{flat_trees.shorten(different)}")
    if metadata.get("crc32") != str(_crc32(arrays)):
        raise InputError(f"{path} has not the bytes that were exported; copy it again.")
    if bad := flat_trees.first_not_finite(arrays):
        raise InputError(f"{path} cannot be used: the parameter {bad} is not finite. Export another checkpoint.")
    params = flat_trees.unflatten(abstract, arrays)
    if weights := params.pop(_AUTOENCODER, None):
        autoencoder = nnx.merge(graph, weights)
    return Exported(config, int(metadata["step"]), params, autoencoder)


def read_config(path: str | PathLike) -> Config:
    """Returns the configuration in an exported file; raises InputError as `load_exported` does."""
    path = to_path(path)
    with _opened(path) as content:
        return config_files.from_json(content.metadata()["config"], f"the configuration in {path}")


@contextlib.contextmanager
def _opened(path: AnyPath) -> Iterator[Any]:
    """Opens a file that `export_params` wrote."""
    try:
        with on_disk(path) as file, safetensors.safe_open(file, framework="flax") as content:
            metadata = content.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} was not written by the command `export`: its metadata do not name {_FORMAT}.")
            if metadata.get("version") != str(_VERSION):
                raise InputError(
                    f"{path} is a file of version {metadata.get('version')}, this release of sisma_jax reads version "
                    f"{_VERSION}: use the release that exported it, or train and export again."
                )
            yield content
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors ({error}); it is damaged, or no file of the command `export`."
        ) from error


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with tuples for the lists that JSON makes of them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _crc32(arrays: Mapping[str, Any]) -> int:
    checksum = 0
    for _, array in sorted(arrays.items()):
        checksum = zlib.crc32(np.ravel(array).view(np.uint8), checksum)
    return checksum
