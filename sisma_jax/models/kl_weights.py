"""Weights of KL autoencoders as the package diffusers saves them: safetensors, with a config.json beside them."""

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
from flax.traverse_util import flatten_dict, unflatten_dict

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, on_disk, to_path, write_atomically
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig

Weights = Mapping[str, jax.Array | np.ndarray]

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"

_OBTAIN = (
    f"Expected is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or such a .safetensors file. Stable Diffusion's "
    f"autoencoder is available at https://huggingface.co/stabilityai/sd-vae-ft-mse: download these two files into one "
    "folder and name it."
)

# Names of the attention's projections before diffusers 0.18, which published files still have.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_SUFFIXES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# Fields of config.json that change what the weights compute, and the values that are implemented.
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


# Fields whose values are used: what they must be.
_VALID: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "norm_num_groups": ("a positive integer", lambda value: type(value) is int and value > 0),
    "scaling_factor": ("a positive number", lambda value: _is_finite(value) and value > 0),
    "shift_factor": ("a number or null", lambda value: value is None or _is_finite(value)),
}


def exist(folder: AnyPath) -> bool:
    """Whether `save` has written a whole autoencoder to the folder."""
    try:
        with bucket_errors(folder):
            return (folder / CONFIG_NAME).exists()
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error}).") from error


def load(path: str | os.PathLike) -> KlAutoencoder:
    """Returns the autoencoder of a folder or file, its parameters in float32.

    Without config.json beside them, the weights are taken for those of Stable Diffusion 1 or 2.

    Raises:
      InputError: there is no such file, it is damaged or of another model, or has latents of other than 4 channels and
        no config.json, which alone tells their scale; or a value in config.json is out of range.
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
    """Writes the autoencoder as diffusers does, float32, into a folder that appears when it is complete.

    In a bucket, which has no folders, config.json appears last.

    Raises:
      OSError: the folder exists, or cannot be written.
    """
    config = autoencoder.config
    weights = {
        _name(key): np.ascontiguousarray(_to_torch(np.asarray(value)))
        for key, value in _parameters(autoencoder).items()
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
    """Returns a short hash of all that decides the latents: sizes, scale and shift, and parameters."""
    digest = hashlib.sha256(repr(autoencoder.config).encode())
    for key, value in sorted(_parameters(autoencoder).items(), key=lambda item: _name(item[0])):
        digest.update(_name(key).encode() + np.asarray(value).tobytes())
    return digest.hexdigest()[:10]


def convert(weights: Weights, params: dict, source: str) -> dict:
    """Returns parameters with the values of `weights`.

    Args:
      weights: by the names of diffusers, in PyTorch's layout.
      params: what is wanted, as nested dictionaries of arrays or their shapes.
      source: where the weights are from, for the message.

    Raises:
      InputError: a weight is missing, has another shape, or there are others.
    """
    left = set(weights)
    values = {}
    for key, wanted in flatten_dict(params).items():
        name = _name_in(weights, key)
        if name is None:
            raise InputError(f"{source} has no weight {_name(key)!r}: it is not a KL autoencoder's. {_OBTAIN}")
        left.discard(name)
        value = _from_torch(weights[name], len(wanted.shape))
        if value.shape != wanted.shape:
            raise InputError(f"{source}: the weight {name!r} is {value.shape}, the model's is {wanted.shape}.")
        values[key] = value
    if left:
        raise InputError(f"{source} has weights that the model does not: {', '.join(sorted(left)[:3])}.")
    return unflatten_dict(values)


def _read(file: AnyPath) -> dict[str, jax.Array]:
    try:
        with on_disk(file) as path, safetensors.safe_open(path, framework="flax") as content:
            return {name: content.get_tensor(name) for name in content.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({error}); copy or download it again.") from error


def _config(weights: Weights, config_file: AnyPath, source: AnyPath) -> KlConfig:
    """Sizes are those of the weights; what these do not tell comes from config.json."""
    given = _read_config(config_file)
    firsts = (weights.get(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(len(weights)))
    widths = tuple(x.shape[0] for x in firsts if x is not None)
    if not widths or "decoder.conv_in.weight" not in weights:
        raise InputError(f"{source} does not hold a KL autoencoder in the format of diffusers. {_OBTAIN}")
    channels = weights["decoder.conv_in.weight"].shape[1]
    if channels != 4 and "scaling_factor" not in given:
        raise InputError(f"{config_file} is missing: only it tells the scale of latents of {channels} channels.")
    groups = given.get("norm_num_groups", 32)
    for width in widths:
        if width % groups:
            raise InputError(f"{source} has {width} channels, which {groups} groups do not divide: see {config_file}.")
    in_first = {name for name in weights if re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", name)}
    return KlConfig(
        latent_channels=channels,
        block_channels=widths,
        layers_per_block=len(in_first),
        norm_groups=groups,
        has_quant_conv="quant_conv.weight" in weights,
        scale=given.get("scaling_factor", 0.18215),
        shift=given.get("shift_factor") or 0.0,
    )


def _read_config(file: AnyPath) -> dict[str, Any]:
    """Returns the values of config.json, of which those that are used are checked; none if there is no such file."""
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


def _parameters(autoencoder: KlAutoencoder) -> dict[tuple, jax.Array]:
    return flatten_dict(nnx.to_pure_dict(nnx.split(autoencoder)[1]))


def _name(key: tuple) -> str:
    return ".".join(map(str, (*key[:-1], _SUFFIXES[key[-1]])))


def _name_in(weights: Weights, key: tuple) -> str | None:
    name = _name(key)
    for new, old in _OLD_NAMES.items():
        if name not in weights:
            name = re.sub(rf"\.{re.escape(new)}\.", f".{old}.", name)
    return name if name in weights else None


def _to_torch(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T


def _from_torch(weight: jax.Array, ndim: int) -> jax.Array:
    weight = np.asarray(weight.astype(jnp.float32))
    if weight.ndim == 4 and ndim == 2:  # a linear map that was saved as a 1x1 convolution
        weight = weight[:, :, 0, 0]
    return jnp.asarray(weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T)
