"""Peers of the denoiser in PyTorch: the DiT of `sisma_jax.models.dit` with the same parameters, and modules of users.

The DiT uses `torch.nn.functional.scaled_dot_product_attention`, which on CPUs is faster than JAX's for long sequences.
What depends on the mask alone, the keys and values of cross-attention, is computed once per image, as in SISMA.

    pip install -r benchmarks/requirements-torch.txt
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]  optional, not in the development environment
from flax import nnx
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from benchmarks import measure
from sisma_jax.config import ModelConfig
from sisma_jax.models.dit import HEAD_CHANNELS
from sisma_jax.models.embeddings import FREQUENCIES, position_features

Params = Mapping[str, Any]
"""Nested dictionaries of NumPy arrays, as of a `Denoiser` without Flax types."""


class Attention(nn.Module):  # pyright: ignore[reportUntypedBaseClass]
    """Multi-head softmax attention; see `sisma_jax.models.dit.Attention`.

    Args:
      params: query_proj, key_value_proj and out_proj.
      d_head: channels of a head.
    """

    def __init__(self, params: Params, d_head: int):
        super().__init__()
        self.d_head = d_head
        self.query, self.key_value, self.out = (
            linear(params[name]) for name in ("query_proj", "key_value_proj", "out_proj")
        )

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, L, D) as (B, heads, L, d_head)."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def keys_and_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the attention reads from tokens (B, L, D)."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self.heads(key), self.heads(value)

    def forward(self, x: torch.Tensor, keys_and_values: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Returns the attention of the tokens x (B, L, D) to others."""
        y = functional.scaled_dot_product_attention(self.heads(self.query(x)), *keys_and_values)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):  # pyright: ignore[reportUntypedBaseClass]
    """Self-attention, cross-attention and feed-forward layer with adaLN-zero; see `sisma_jax.models.layers.Block`.

    Args:
      params: of one layer; without "reader", there is no cross-attention.
      d_head: channels of a head.
    """

    def __init__(self, params: Params, d_head: int):
        super().__init__()
        self.mixer = Attention(params["mixer"], d_head)
        self.reader = Attention(params["reader"], d_head) if "reader" in params else None
        self.up, self.down = linear(params["feed_forward"]["up"]), linear(params["feed_forward"]["down"])
        self.modulation = linear(params["modulation"])

    def forward(
        self, x: torch.Tensor, embedding: torch.Tensor, read: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Returns the tokens after all sub-layers."""
        values = iter(self.modulation(functional.silu(embedding))[:, None].chunk(9 if self.reader else 6, dim=-1))

        def residual(x: torch.Tensor, sublayer: Any) -> torch.Tensor:
            shift, scale, gate = next(values), next(values), next(values)
            return torch.addcmul(x, gate, sublayer(modulated(x, shift, scale)))

        x = residual(x, lambda y: self.mixer(y, self.mixer.keys_and_values(y)))
        reader = self.reader
        if reader is not None:
            x = residual(x, lambda y: reader(y, read))
        return residual(x, lambda y: self.down(functional.gelu(self.up(y), approximate="tanh")))


class TorchDit(nn.Module):  # pyright: ignore[reportUntypedBaseClass]
    """A denoiser with patch size 1 and fixed positions.

    Args:
      params: of the denoiser with the backbone "dit".
      side: tokens along the side of the latent.
      d_head: channels of an attention head.
    """

    def __init__(self, params: Params, side: int, d_head: int):
        super().__init__()
        stacked = params["layers"]["stacked"]
        depth = len(stacked["modulation"]["bias"])
        self.blocks = nn.ModuleList(Block(layer(stacked, i), d_head) for i in range(depth))
        self.embed, self.merge = linear(params["embed"]), linear(params["merge"]["proj"]) if "merge" in params else None
        self.time_up, self.time_down = linear(params["time"]["up"]), linear(params["time"]["down"])
        self.head_modulation, self.out = linear(params["head"]["modulation"]), linear(params["head"]["out_proj"])
        width = self.embed.out_features
        self.register_buffer("positions", torch.from_numpy(position_features(side, side, width)).flatten(0, 1)[None])
        self.register_buffer("frequencies", torch.from_numpy(FREQUENCIES["smooth"].astype(np.float32)))

    def read(self, mask: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Returns what each layer reads from the mask features (B, L, D)."""
        return [block.reader and block.reader.keys_and_values(mask) for block in self.blocks]

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        mask: torch.Tensor,
        read: list[tuple[torch.Tensor, torch.Tensor] | None],
    ) -> torch.Tensor:
        """Returns the prediction for latents x (B, L, C) at times t (B,)."""
        x = self.embed(x)
        if self.merge is not None:
            x = self.merge(torch.cat([x, mask], dim=-1))
        x = x + self.positions
        angles = t[:, None] * self.frequencies[None]
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding = self.time_down(functional.silu(self.time_up(features)))
        for block, keys_and_values in zip(self.blocks, read, strict=True):
            x = block(x, embedding, keys_and_values)
        shift, scale = self.head_modulation(functional.silu(embedding))[:, None].chunk(2, dim=-1)
        return self.out(modulated(x, shift, scale))


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns LayerNorm(x) (1 + scale) + shift."""
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def linear(params: Params) -> nn.Linear:
    """Returns a linear layer with the kernel (in, out) and bias of a Flax layer."""
    kernel = np.asarray(params["kernel"])
    module = nn.Linear(*kernel.shape)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(kernel.T.copy()))
        module.bias.copy_(torch.from_numpy(np.array(params["bias"])))
    return module


def layer(stacked: Params, index: int) -> Params:
    """Returns the parameters of one layer, from those of all layers along a leading axis."""
    return {name: layer(x, index) if isinstance(x, Mapping) else x[index] for name, x in stacked.items()}


def torch_candidates(
    name: str, params: Any, config: ModelConfig, x: jax.Array, t: jax.Array, mask: jax.Array, *, is_compiled: bool
) -> list[measure.Candidate]:
    """Returns the DiT in PyTorch with the same parameters, which must give the values of the candidate `name`.

    Args:
      name: of the candidate in JAX, which is also the group of both.
      params: parameters of the DiT, an `nnx.State`.
      config: of the DiT.
      x: noisy latents, float32 (1, H, W, C).
      t: times in [0, 1], float32 (1,).
      mask: mask features, float32 (1, H, W, D).
      is_compiled: also add the module compiled by `torch.compile`.
    """
    d_head = min(HEAD_CHANNELS, config.d_model)
    module = TorchDit(jax.tree.map(np.asarray, nnx.to_pure_dict(params)), x.shape[1], d_head).eval()
    sequence, times, features = (torch.from_numpy(np.array(a)) for a in (x, t, mask))
    with torch.inference_mode():
        read = module.read(features.flatten(1, 2))
    candidates = [("PyTorch", module)]
    if is_compiled:
        candidates.append(("torch.compile", torch.compile(module)))

    def run(module: Callable[..., torch.Tensor]) -> np.ndarray:
        with torch.inference_mode():
            y = module(sequence.flatten(1, 2), times, features.flatten(1, 2), read)
        return y.numpy().reshape(x.shape)

    return [measure.Candidate(f"{name}, {label}", functools.partial(run, one), group=name) for label, one in candidates]


def peer_candidate(peer: str, x: jax.Array, t: jax.Array, mask: jax.Array) -> measure.Candidate:
    """Returns a PyTorch module of the user as a candidate; benchmarks/denoiser.py describes it.

    Args:
      peer: "MODULE:FUNCTION".
      x: noisy latents, float32 (1, H, W, C).
      t: times in [0, 1], float32 (1,).
      mask: mask features, float32 (1, H, W, D).
    """
    path, _, function = peer.partition(":")
    module = getattr(importlib.import_module(path), function)(x.shape[1], mask.shape[-1]).eval()
    arguments = [
        torch.from_numpy(np.array(a)) for a in (x.reshape(1, -1, x.shape[-1]), t, mask.reshape(1, -1, mask.shape[-1]))
    ]

    def run() -> np.ndarray:
        with torch.inference_mode():
            return module(*arguments).numpy()

    return measure.Candidate(peer, run)
