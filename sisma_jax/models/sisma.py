"""The SISMA denoiser (arXiv 2509.17651): patchify, N blocks of Self-Mamba, Cross-Mamba and feed-forward, depatchify."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Integer

from sisma_jax.config import ModelConfig
from sisma_jax.models.mamba import CrossMamba, DepthwiseConv, Grid, Paths, SelfMamba
from sisma_jax.models.mask_encoder import MaskEncoder
from sisma_jax.models.patches import depth_to_space, space_to_depth
from sisma_jax.models.scan_orders import paths_of_layers

TIME_FREQUENCIES = 256

# What a block's forward pass keeps for its backward pass; the rest is computed again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def time_features(t: Float[Array, " B"]) -> Float[Array, "B 256"]:
    """Returns sines and cosines of t in [0, 1]: those of DiT (arXiv 2212.09748) at time step 1000 t."""
    frequencies = 1000.0 * np.exp(-math.log(10_000) * np.arange(TIME_FREQUENCIES // 2) / (TIME_FREQUENCIES // 2))
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_features(height: int, width: int, d_model: int) -> np.ndarray:
    """Returns fixed 2-D sine and cosine positions: float32 (height, width, d_model), d_model a multiple of 4."""
    frequencies = 1.0 / 10_000 ** (np.arange(d_model // 4) / (d_model // 4))

    def features(positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None] * frequencies[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows = np.broadcast_to(features(np.arange(height))[:, None], (height, width, d_model // 2))
    columns = np.broadcast_to(features(np.arange(width))[None], (height, width, d_model // 2))
    return np.concatenate([rows, columns], axis=-1).astype(np.float32)


def modulate(x: Grid, shift: Float[Array, "B D"], scale: Float[Array, "B D"]) -> Grid:
    """Returns x (1 + scale) + shift, the same for all tokens of an example."""
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


def layer_norm(x: Grid) -> Grid:
    """LayerNorm without parameters, in float32: adaLN's scale and shift take their place."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)


class FeedForward(nnx.Module):
    """Linear, GELU, linear."""

    def __init__(self, d_model: int, d_hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(d_model, d_hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(d_hidden, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, x: Grid) -> Grid:
        return self.down(jax.nn.gelu(self.up(x)))


class Spade(nnx.Module):
    """Reads the mask by spatially adaptive normalisation (arXiv 1903.07291): LN(x) (1 + γ(S_M)) + β(S_M), projected."""

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = DepthwiseConv(d_model, 3, rngs=rngs)
        self.scale_and_shift = nnx.Linear(d_model, 2 * d_model, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, x: Grid, mask_features: Grid, paths: Paths) -> Grid:
        scale, shift = jnp.split(self.scale_and_shift(self.conv(mask_features)), 2, axis=-1)
        return self.out_proj(jax.nn.silu((layer_norm(x) * (1 + scale) + shift).astype(x.dtype)))


class Block(nnx.Module):
    """Residual sub-layers, each shifted and scaled by the time before and gated by it after (adaLN-zero).

    x += g1 mixer(modulate(LN(x))); x += g2 reader(modulate(LN(x)), S_M); x += g3 feed_forward(modulate(LN(x))).
    The gates start at zero, so a new block is the identity.

    Args:
      mixer: (tokens, paths) -> tokens: Self-Mamba.
      reader: (tokens, mask features, paths) -> tokens: Cross-Mamba. None leaves this sub-layer out.
      feed_forward: tokens -> tokens.
    """

    def __init__(
        self, d_model: int, mixer: nnx.Module, reader: nnx.Module | None, feed_forward: nnx.Module, *, rngs: nnx.Rngs
    ):
        self.mixer = mixer
        self.reader = reader
        self.feed_forward = feed_forward
        zeros = nnx.initializers.zeros
        width = (6 if reader is None else 9) * d_model
        self.modulation = nnx.Linear(d_model, width, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def __call__(self, x: Grid, condition: Float[Array, "B D"], mask_features: Grid, paths: Paths) -> Grid:
        sublayers = [lambda x: self.mixer(x, paths), self.feed_forward]
        if self.reader is not None:
            sublayers.insert(1, lambda x: self.reader(x, mask_features, paths))
        modulation = jnp.split(self.modulation(jax.nn.silu(condition)), 3 * len(sublayers), axis=-1)
        for i, sublayer in enumerate(sublayers):
            shift, scale, gate = modulation[3 * i : 3 * i + 3]
            y = sublayer(modulate(layer_norm(x), shift, scale).astype(x.dtype))
            x = x + y * gate.astype(y.dtype)[:, None, None]
        return x


class Sisma(nnx.Module):
    """The denoiser: noisy latent, time and mask features in, one value a latent element out.

    `encode_mask` is a method of its own because a sampler needs the mask's features once, not once a step.

    Args:
      config: sizes and wiring.
      latent_channels: channels of the latent.
      latent_downsampling: image pixels along the side of a latent position (1 for pixels, 8 for f8 latents).
      dtype: type of the matrix products; parameters, norms and scan carries stay float32.
      rngs: initialisation randomness; none is kept.
    """

    def __init__(
        self, config: ModelConfig, latent_channels: int, latent_downsampling: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.patch_size = config.patch_size
        self.depth = config.depth
        self.orders_per_layer = config.orders_per_layer
        self.remat = config.remat
        self.dtype = dtype
        d_model = config.d_model
        d_patch = config.patch_size**2 * latent_channels
        self.mask_encoder = MaskEncoder(
            config.patch_size * latent_downsampling, config.d_label, d_model, dtype=dtype, rngs=rngs
        )
        self.embed = nnx.Linear(d_patch, d_model, dtype=dtype, rngs=rngs)
        self.time_up = nnx.Linear(TIME_FREQUENCIES, d_model, rngs=rngs)
        self.time_down = nnx.Linear(d_model, d_model, rngs=rngs)
        if config.mask_conditioning == "concat":
            self.merge = nnx.Linear(2 * d_model, d_model, dtype=dtype, rngs=rngs)
        self.mask_conditioning = config.mask_conditioning
        # One block whose parameters have a leading axis of layers.
        self.blocks = nnx.vmap(lambda key: self.make_block(config, dtype=dtype, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), config.depth)
        )
        zeros = nnx.initializers.zeros
        self.modulation = nnx.Linear(d_model, 2 * d_model, kernel_init=zeros, bias_init=zeros, rngs=rngs)
        self.head = nnx.Linear(d_model, d_patch, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    @classmethod
    def make_block(cls, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Block:
        """Returns one layer: what mixes the tokens, what reads the mask, feed-forward."""
        options = {"dtype": dtype, "rngs": rngs}
        mixer = cls.make_mixer(config, **options)
        if config.mask_conditioning == "cross":
            reader = cls.make_cross_reader(config, **options)
        else:
            reader = Spade(config.d_model, **options) if config.mask_conditioning == "spade" else None
        feed_forward = FeedForward(config.d_model, int(config.mlp_ratio * config.d_model), **options)
        return Block(config.d_model, mixer, reader, feed_forward, rngs=rngs)

    @staticmethod
    def make_mixer(config: ModelConfig, **options: Any) -> nnx.Module:
        """Returns (tokens, paths) -> tokens."""
        return SelfMamba(config.d_model, **_mamba_sizes(config), **options)

    @staticmethod
    def make_cross_reader(config: ModelConfig, **options: Any) -> nnx.Module:
        """Returns (tokens, mask features, paths) -> tokens."""
        return CrossMamba(config.d_model, wiring=config.cross_wiring, **_mamba_sizes(config), **options)

    def encode_mask(
        self, mask: Integer[Array, "B H W"], is_dropped: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B h w D"]:
        """Returns S_M: see `MaskEncoder`."""
        return self.mask_encoder(mask, is_dropped)

    def null_features(self, shape: tuple[int, ...]) -> Float[Array, "B h w D"]:
        """Returns S_M of "no mask" in the given shape."""
        return self.mask_encoder.null_features(shape)

    def __call__(
        self, xt: Float[Array, "B H W C"], t: Float[Array, " B"], mask_features: Float[Array, "B h w D"]
    ) -> Float[Array, "B H W C"]:
        """Returns the network's prediction at (xt, t), float32: see `FlowConfig.prediction` for its meaning.

        Args:
          xt: latent between noise (t = 0) and data (t = 1); H and W multiples of the patch size.
          t: in [0, 1].
          mask_features: S_M, one a token.

        Raises:
          ValueError: the latent is not tiled by patches, or S_M is of another grid.
        """
        if xt.shape[1] % self.patch_size or xt.shape[2] % self.patch_size:
            raise ValueError(f"xt is {xt.shape[1:3]}, want multiples of the patch size {self.patch_size}")
        x = self.embed(space_to_depth(xt.astype(self.dtype), self.patch_size))
        if mask_features.shape[:3] != x.shape[:3]:
            raise ValueError(f"mask_features are {mask_features.shape[:3]}, want the token grid {x.shape[:3]}")
        if self.mask_conditioning == "concat":
            x = self.merge(jnp.concatenate([x, mask_features.astype(x.dtype)], axis=-1))
        x = x + jnp.asarray(position_features(x.shape[1], x.shape[2], x.shape[3]), x.dtype)[None]
        condition = self.time_down(jax.nn.silu(self.time_up(time_features(t))))
        x = self._run_blocks(x, condition, mask_features)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(condition)), 2, axis=-1)
        return depth_to_space(self.head(modulate(layer_norm(x), shift, scale)).astype(jnp.float32), self.patch_size)

    def _run_blocks(self, x: Grid, condition: Float[Array, "B D"], mask_features: Grid) -> Grid:
        """One after the other, rolled into a loop: compile time does not grow with depth."""
        graph, params = nnx.split(self.blocks)

        def run(x, layer):
            params, paths = layer
            return nnx.merge(graph, params)(x, condition, mask_features, paths), None

        paths = paths_of_layers(self.depth, self.orders_per_layer, x.shape[1], x.shape[2])
        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(run, x, (params, paths))[0]


def _mamba_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "d_state": config.d_state,
        "expand": config.expand,
        "d_conv": config.d_conv,
        "num_orders": config.orders_per_layer,
        "scan_implementation": None if config.scan_implementation == "auto" else config.scan_implementation,
    }
