"""Converts weights of U-Shape Mamba's public PyTorch code (arXiv 2504.13499) to parameters of this package's U.

    weights = {name: tensor.numpy() for name, tensor in torch.load("checkpoint.pt")["ema"].items()}
    config = Config(model=model_config(weights), ...)
    params = convert(weights, init_params(config, jax.random.key(0)))

Parameters that read the mask have no counterpart in U-Shape Mamba. They keep their initial values, with which the mask
has no influence until they are trained. Both packages use the same flow: t x1 + (1 - t) x0 in latents of Stable
Diffusion's autoencoder, time features at 1000 t, and prediction of the velocity.

Text conditioning, blocks without a gate (`skip_gate`), upsampling by pixel shuffle and a learned variance are not
supported and raise an error. Models with 57 layers (XL) are not supported either: at commit 431af0f their decoder has
one level more than their encoder, and they fail at the first call. The norm `ln_1` is not converted, because that code
does not use it. A class embedding is not converted; to use one class of a class-conditional model, add the embedding of
the class to "t_embedder.mlp.2.bias".
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sisma_jax.config import ModelConfig
from sisma_jax.errors import InputError
from sisma_jax.models.factory import Params
from sisma_jax.parallel.sharding import STACKED

Weights = Mapping[str, np.ndarray]
"""The state dictionary of the PyTorch model, as NumPy arrays."""

_Get = Callable[[str], np.ndarray]
"""Returns a weight by its name, as float32."""
_Key = TypeVar("_Key", str, int)

_NOT_CONVERTED = {
    r"\.mca\.": "text conditioning (has_text)",
    r"^dec_blocks\.0\.0\.weight$": "upsampling by pixel shuffle (it needs use_convtranspose)",
}


def model_config(weights: Weights, **values: Any) -> ModelConfig:
    """Returns the configuration of the model to which the weights belong.

    By default, the mask is concatenated and there is no feed-forward layer, as in U-Shape Mamba.

    Args:
      weights: the state dictionary, as NumPy arrays.
      values: fields of `ModelConfig` that replace those of the weights. For example, `mask_conditioning="cross"` and
        `mlp_ratio=4.0` add Cross-Mamba and a feed-forward layer to every block, to train the model further.

    Raises:
      InputError: the weights do not belong to U-Shape Mamba, belong to a variant that is not supported, or a value is
        out of range.
      TypeError: `ModelConfig` has no such field.
    """
    for pattern, what in _NOT_CONVERTED.items():
        if any(re.search(pattern, name) for name in weights):
            raise InputError(f"these weights of U-Shape Mamba have {what}, which is not supported.")
    embed, scan = _get(weights, "x_embedder.proj.weight"), "middle_block.attn.self_attention"
    d_model, channels, patch_size, _ = embed.shape
    d_inner, d_state = _get(weights, f"{scan}.A_logs").shape
    if _get(weights, f"{scan}.in_proj.weight").shape[0] == d_inner:
        raise InputError(
            "these weights of U-Shape Mamba have blocks without a gate (skip_gate), which are not supported."
        )
    if _get(weights, "final_layer.linear.weight").shape[0] != patch_size**2 * channels:
        raise InputError("these weights of U-Shape Mamba predict a variance (learn_sigma), which is not supported.")
    encoder, decoder = (_levels(weights, side)[0] for side in ("enc_blocks", "dec_blocks"))
    depths = [len(level) for level in encoder]
    if depths[-1] or [len(level) for level in reversed(decoder)] != [*depths[:-1], 0]:
        raise InputError(
            "these weights of U-Shape Mamba have an encoder and a decoder of different levels; such a model cannot run."
        )
    num_positions = _get(weights, "pos_embed").shape[1]
    fields: dict[str, Any] = {
        "depth": 1,
        "level_depths": tuple(depths[:-1]),
        "d_model": d_model,
        "patch_size": patch_size,
        "d_state": d_state,
        "expand": d_inner // d_model,
        "d_conv": _get(weights, f"{scan}.conv2d.weight").shape[-1],
        "mlp_ratio": 0.0,
        "order_rotation": "grouped",
        "time_frequencies": "dit",
        "mixer_skip": True,
        "learned_positions": round(num_positions**0.5),
        "mask_conditioning": "concat",
    }
    return ModelConfig(**(fields | values))


def convert(weights: Weights, params: Params) -> Params:
    """Returns the parameters with the values of U-Shape Mamba, as far as it has them.

    Args:
      weights: the state dictionary, as NumPy arrays.
      params: newly initialised parameters of a model with the configuration `model_config(weights)`.

    Raises:
      InputError: a weight is missing, has another shape than its parameter, or has no parameter.
    """

    def get(name: str) -> np.ndarray:
        return np.asarray(_get(weights, name), np.float32)

    embed = get("x_embedder.proj.weight")
    positions = get("pos_embed")[0]
    side = round(len(positions) ** 0.5)
    bottom = params["layers"]["bottom"][STACKED]
    block = functools.partial(_block, get, num_modulations=bottom["modulation"]["bias"].shape[-1])
    values: Params = {
        "embed": {"kernel": _patches_in(embed), "bias": get("x_embedder.proj.bias")},
        "positions": {"grid": positions.reshape(side, side, -1)},
        "time": {"up": _linear(get, "t_embedder.mlp.0"), "down": _linear(get, "t_embedder.mlp.2")},
        "head": {
            "modulation": _linear(get, "final_layer.adaLN_modulation.1"),
            "out_proj": _linear(get, "final_layer.linear"),
        },
        "layers": {"bottom": _stack([block("middle_block")]), "levels": {}},
    }
    if "merge" in params:
        identity = np.eye(len(embed), dtype=np.float32)
        kernel = np.concatenate([identity, np.zeros_like(identity)])
        values["merge"] = {"proj": {"kernel": kernel, "bias": np.zeros(len(embed), np.float32)}}
    (encoder, downs), (decoder, ups) = (_levels(weights, side) for side in ("enc_blocks", "dec_blocks"))
    levels = zip(encoder[:-1], downs, reversed(ups), reversed(decoder[1:]), strict=True)
    for i, (encoder_blocks, down, up, decoder_blocks) in enumerate(levels):
        up_kernel = get(f"{up}.weight").transpose(0, 2, 3, 1)
        values["layers"]["levels"][i] = {
            "encoder": _stack([block(name) for name in encoder_blocks]),
            "down": {"kernel": _patches_in(get(f"{down}.weight")), "bias": get(f"{down}.bias")},
            "up": {"kernel": up_kernel.reshape(len(up_kernel), -1), "bias": np.tile(get(f"{up}.bias"), 4)},
            "decoder": _stack(
                [{"merge": _linear(get, f"{name}.skip"), "block": block(name)} for name in decoder_blocks]
            ),
        }
    return _filled(params, values, "")


def _get(weights: Weights, name: str) -> np.ndarray:
    if name not in weights:
        raise InputError(
            f"the weights have no {name!r}, so they do not belong to a U-Shape Mamba with skip_conn; give those of one."
        )
    return weights[name]


def _levels(weights: Weights, side: str) -> tuple[list[list[str]], list[str]]:
    """Returns the names of the blocks of each level, and of the convolutions that separate the levels."""
    levels: list[list[str]] = [[]]
    resamplers: list[str] = []
    for i in sorted({int(name.split(".")[1]) for name in weights if name.startswith(f"{side}.")}):
        name = f"{side}.{i}"
        if f"{name}.weight" in weights:
            resamplers.append(name)
            levels.append([])
        else:
            levels[-1].append(name)
    return levels, resamplers


def _linear(get: _Get, name: str) -> dict[str, np.ndarray]:
    return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}


def _patches_in(kernel: np.ndarray) -> np.ndarray:
    """Returns the kernel (out, in, p, p) of a convolution of stride p as a matrix that acts on `space_to_depth`."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))


def _block(get: _Get, name: str, num_modulations: int) -> Params:
    scan = f"{name}.attn.self_attention"
    A_log, dt_proj = get(f"{scan}.A_logs"), get(f"{scan}.dt_projs_weight")[0]
    drive, readout = np.split(get(f"{scan}.x_proj_weight")[0], [dt_proj.shape[1] + A_log.shape[1]])
    mixer = {
        "in_proj": {"kernel": get(f"{scan}.in_proj.weight").T},
        "conv": {"kernel": get(f"{scan}.conv2d.weight")[:, 0].transpose(1, 2, 0), "bias": get(f"{scan}.conv2d.bias")},
        "scans": {
            0: {
                "drive_proj": {"kernel": drive.T},
                "readout_proj": {"kernel": readout.T},
                "dt_proj": dt_proj.T,
                "dt_bias": get(f"{scan}.dt_projs_bias")[0],
                "A_log": A_log,
                "D": get(f"{scan}.Ds"),
            }
        },
        "out_norm": {"scale": get(f"{scan}.out_norm.weight"), "bias": get(f"{scan}.out_norm.bias")},
        "out_proj": {"kernel": get(f"{scan}.out_proj.weight").T},
        "skip_scale": get(f"{name}.attn.skip_scale"),
    }
    modulation = _linear(get, f"{name}.adaLN_modulation.1")

    # Shifts, scales and gates of the sub-layers after the mixer are zero, so these sub-layers have no effect yet.
    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, num_modulations - x.shape[-1])])

    return {"mixer": mixer, "modulation": {name: pad(x) for name, x in modulation.items()}}


def _stack(blocks: list[Params]) -> Params:
    return {STACKED: jax.tree.map(lambda *layers: np.stack(layers), *blocks)}


def _filled(params: dict[_Key, Any], values: dict[_Key, Any], path: str) -> dict[_Key, Any]:
    """Returns the parameters with those replaced that have values; `path` is their place in the model, for messages."""
    filled = dict(params)
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in params:
            raise InputError(f"the model has no parameter {name}; create it with model_config(weights).")
        if isinstance(value, dict):
            filled[key] = _filled(params[key], value, name)
            continue
        if value.shape != params[key].shape:
            raise InputError(
                f"the weights for {name} are {value.shape}, the model's are {params[key].shape}; create the model with "
                "model_config(weights)."
            )
        filled[key] = jnp.asarray(value)
    return filled
