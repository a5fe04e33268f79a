"""Reads and writes KL autoencoders in the format of the package diffusers: a safetensors file and a config.json."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, on_disk, to_path, write_atomically
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig

Weights = Mapping[str, jax.Array | np.ndarray]
"""Arrays in PyTorch's layout, by the names of diffusers."""

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"

_OBTAIN = (
    f"Give a folder that contains {CONFIG_NAME} and {WEIGHTS_NAME}, or such a .safetensors file. To use Stable "
    "Diffusion's autoencoder, download both from https://huggingface.co/stabilityai/sd-vae-ft-mse into one folder."
)

# Names of the attention's projections before diffusers 0.18. Published files still use them.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_SUFFIXES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# Fields of config.json that change the computation, with the values that are implemented.
_IMPLEMENTED = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "out_channels": (3,),
    "mid_block_add_attention": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
}


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# Fields of config.json whose values are used: the wanted values in words, and their check.
_VALID: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "norm_num_groups": ("a positive integer", lambda value: type(value) is int and value > 0),
    "scaling_factor": ("a positive number", lambda value: _is_finite(value) and value > 0),
    "shift_factor": ("a number or null", lambda value: value is None or _is_finite(value)),
}


def exist(folder: AnyPath) -> bool:
    """Returns whether the folder contains a complete autoencoder that `save` has written.

    Raises:
      InputError: the folder cannot be read.
    """
    try:
        with bucket_errors(folder):
            return (folder / CONFIG_NAME).exists()
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error}); check its permissions and the connection.") from error


def load(path: str | os.PathLike[str]) -> KlAutoencoder:
    """Returns the autoencoder that a folder or file contains, with float32 parameters.

    If there is no config.json beside the weights, scale, shift and normalisation groups are those of Stable Diffusion 1
    and 2.

    Args:
      path: folder with `WEIGHTS_NAME` and optionally `CONFIG_NAME`, or a .safetensors file; on the disk or in a bucket.

    Raises:
      InputError: the file does not exist, is damaged or contains another model; config.json is damaged or has a value
        that is out of range or not implemented; or config.json is missing and the latents do not have 4 channels, so
        that their scale is unknown.
    """
    path = to_path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.exists():
        raise InputError(f"the autoencoder's weights {file} do not exist. {_OBTAIN}")
    weights = _read(file)
    config = _config(weights, file.parent / CONFIG_NAME, file)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: KlAutoencoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, convert(weights, nnx.to_pure_dict(abstract), str(file)))


def save(autoencoder: KlAutoencoder, folder: AnyPath) -> None:
    """Writes the autoencoder in the format of diffusers, float32. The folder appears when it is complete.

    A bucket has no folders; there, config.json is written last.

    Args:
      autoencoder: the module, with its parameters.
      folder: the folder to create, on the disk or in a bucket.

    Raises:
      OSError: the folder exists and is not empty, or cannot be written.
    """
    config = autoencoder.config
    weights = {
        name: np.ascontiguousarray(_to_torch(np.asarray(value))) for name, value in _parameters(autoencoder).items()
    }
    depth = len(config.block_channels)
    description = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": config.block_channels,
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
        "use_quant_conv": config.has_quant_conv,
        "use_post_quant_conv": config.has_quant_conv,
    }
    text = json.dumps(description, indent=2) + "\n"
    if is_bucket(folder):
        write_atomically(folder / WEIGHTS_NAME, safetensors.numpy.save(weights))
        write_atomically(folder / CONFIG_NAME, text)
        return
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        safetensors.numpy.save_file(weights, partial / WEIGHTS_NAME)
        (partial / CONFIG_NAME).write_text(text)
        partial.rename(folder)
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fingerprint(autoencoder: KlAutoencoder) -> str:
    """Returns a hash of everything that determines the latents, configuration and parameters: 10 hexadecimal digits."""
    digest = hashlib.sha256(repr(autoencoder.config).encode())
    for name, value in sorted(_parameters(autoencoder).items()):
        digest.update(name.encode() + np.asarray(value).tobytes())
    return digest.hexdigest()[:10]


def convert(weights: Weights, params: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the weights as parameters of `KlAutoencoder`, float32.

    Args:
      weights: arrays in PyTorch's layout, by the names of diffusers.
      params: parameters of the same model, nested dictionaries of arrays or `jax.ShapeDtypeStruct`s. Only their
        structure and shapes are used.
      source: origin of the weights, for error messages.

    Returns:
      Nested dictionaries of arrays with the structure of `params`.

    Raises:
      InputError: a weight is missing or has the wrong shape, or there is a weight that the model does not have.
    """
    unused = set(weights)

    def value(path: tuple[Any, ...], wanted: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        wanted_name = _name(path)
        name = _find(weights, wanted_name)
        if name is None:
            raise InputError(f"{source} has no weight {wanted_name!r}, so it is not a KL autoencoder. {_OBTAIN}")
        unused.discard(name)
        array = _from_torch(weights[name], len(wanted.shape))
        if array.shape != wanted.shape:
            raise InputError(
                f"{source}: the weight {name!r} is {array.shape}, the model's is {wanted.shape}; give weights of a KL "
                "autoencoder in the format of diffusers."
            )
        return array

    converted = jax.tree_util.tree_map_with_path(value, params)
    if unused:
        raise InputError(f"{source} has weights that the model does not: {', '.join(sorted(unused)[:3])}. {_OBTAIN}")
    return converted


def _read(file: AnyPath) -> dict[str, jax.Array]:
    try:
        with on_disk(file) as path, safetensors.safe_open(path, framework="flax") as content:
            return {name: content.get_tensor(name) for name in content.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({error}); copy or download it again.") from error


def _config(weights: Weights, config_file: AnyPath, source: AnyPath) -> KlConfig:
    """Returns the configuration: sizes from the shapes of the weights, and all else from config.json."""
    given = _read_config(config_file)
    firsts = (weights.get(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(len(weights)))
    widths = tuple(x.shape[0] for x in firsts if x is not None)
    if not widths or "decoder.conv_in.weight" not in weights:
        raise InputError(f"{source} does not hold a KL autoencoder in the format of diffusers. {_OBTAIN}")
    channels = weights["decoder.conv_in.weight"].shape[1]
    if channels != 4 and "scaling_factor" not in given:
        raise InputError(
            f"{config_file} is missing or has no scaling_factor, but only it gives the scale of latents of {channels} "
            "channels; download it into the folder of the weights."
        )
    groups = given.get("norm_num_groups", 32)
    for width in widths:
        if width % groups:
            raise InputError(
                f"{source} has {width} channels, which {groups} groups do not divide; correct norm_num_groups in "
                f"{config_file}."
            )
    first_level = re.compile(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight")
    return KlConfig(
        latent_channels=channels,
        block_channels=widths,
        layers_per_block=sum(first_level.fullmatch(name) is not None for name in weights),
        norm_groups=groups,
        has_quant_conv="quant_conv.weight" in weights,
        scale=given.get("scaling_factor", 0.18215),
        shift=given.get("shift_factor") or 0.0,
    )


def _read_config(file: AnyPath) -> dict[str, Any]:
    """Returns the fields of config.json, after checking those that are used; an empty dictionary if it is missing."""
    if not file.exists():
        return {}
    try:
        given = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not JSON ({error}); copy or download it again.") from error
    if not isinstance(given, dict):
        raise InputError(f"{file} is not a JSON object; copy or download it again.")
    for field, implemented in _IMPLEMENTED.items():
        if given.get(field, implemented[0]) not in implemented:
            raise InputError(f"{file} has {field} = {given[field]!r}, which is not implemented.")
    for field, (wanted, is_valid) in _VALID.items():
        if field in given and not is_valid(given[field]):
            raise InputError(f"{file} has {field} = {given[field]!r}, want {wanted}; copy or download it again.")
    return given


def _parameters(autoencoder: KlAutoencoder) -> dict[str, jax.Array]:
    """Returns the parameters by the names of diffusers, in the layout of Flax."""
    params = nnx.to_pure_dict(nnx.split(autoencoder)[1])
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(path: tuple[Any, ...]) -> str:
    """Returns the name that diffusers gives to a parameter, whose path is as `jax.tree_util` passes it."""
    modules, _, parameter = jax.tree_util.keystr(path, simple=True, separator=".").rpartition(".")
    return f"{modules}.{_SUFFIXES[parameter]}"


def _find(weights: Weights, name: str) -> str | None:
    """Returns the name under which the weights contain a parameter, which may be its old name; None if they do not."""
    for new, old in _OLD_NAMES.items():
        if name not in weights:
            name = re.sub(rf"\.{re.escape(new)}\.", f".{old}.", name)
    return name if name in weights else None


def _to_torch(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T


def _from_torch(weight: jax.Array | np.ndarray, ndim: int) -> jax.Array:
    array = np.asarray(weight.astype(jnp.float32))
    if array.ndim == 4 and ndim == 2:  # a linear map that was saved as a 1x1 convolution
        array = array[:, :, 0, 0]
    return jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)
