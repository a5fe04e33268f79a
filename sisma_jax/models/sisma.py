"""The SISMA denoiser (arXiv 2509.17651): patchify, N blocks of Self-Mamba, Cross-Mamba and feed-forward, depatchify.

Beyond the paper, the blocks may form a U: see `u_shape.py`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Integer

from kernels.partition import row_parts
from sisma_jax.config import ModelConfig
from sisma_jax.models.layers import Block, FeedForward, Spade, layer_norm, modulate, run_stacked, stacked
from sisma_jax.models.mamba import CrossMamba, Grid, SelfMamba
from sisma_jax.models.mask_encoder import MaskEncoder
from sisma_jax.models.patches import depth_to_space, space_to_depth
from sisma_jax.models.scan_orders import paths_of_layers
from sisma_jax.models.u_shape import Level
from sisma_jax.parallel import sharding

TIME_FREQUENCIES = 256


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
        self.order_rotation = config.order_rotation
        self.remat = config.remat
        self.d_model = config.d_model
        self.learned_positions = config.learned_positions
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
        if config.learned_positions:
            shape = (config.learned_positions, config.learned_positions, d_model)
            self.positions = nnx.Param(jnp.asarray(position_features(*shape)))

        def make_block(rngs: nnx.Rngs) -> Block:
            return self.make_block(config, dtype=dtype, rngs=rngs)

        self.blocks = stacked(make_block, config.depth, rngs)
        self.levels = nnx.List(
            Level(
                make_block,
                depth,
                d_model,
                blocks_read_mask=config.mask_conditioning != "concat",
                dtype=dtype,
                rngs=rngs,
            )
            for depth in config.level_depths
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
        d_hidden = int(config.mlp_ratio * config.d_model)
        feed_forward = FeedForward(config.d_model, d_hidden, **options) if d_hidden else None
        return Block(config.d_model, mixer, reader, feed_forward, rngs=rngs)

    @staticmethod
    def make_mixer(config: ModelConfig, **options: Any) -> nnx.Module:
        """Returns (tokens, paths) -> tokens."""
        return SelfMamba(config.d_model, has_skip=config.mixer_skip, **_mamba_sizes(config), **options)

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
          ValueError: the latent is not tiled by patches or, in a U, by those of its coarsest resolution; it has not
            the size of learned positions; S_M is of another grid.
        """
        multiple = self.patch_size * 2 ** len(self.levels)
        if xt.shape[1] % multiple or xt.shape[2] % multiple:
            halved = f", halved {len(self.levels)} times" if self.levels else ""
            raise ValueError(
                f"xt is {xt.shape[1:3]}, want multiples of {multiple} (the patch size {self.patch_size}{halved})"
            )
        x = self.embed(space_to_depth(sharding.constrain(xt).astype(self.dtype), self.patch_size))
        if mask_features.shape[:3] != x.shape[:3]:
            raise ValueError(f"mask_features are {mask_features.shape[:3]}, want the token grid {x.shape[:3]}")
        if self.mask_conditioning == "concat":
            x = self.merge(jnp.concatenate([x, mask_features.astype(x.dtype)], axis=-1))
        x = x + self._positions(*x.shape[1:3]).astype(x.dtype)[None]
        condition = self.time_down(jax.nn.silu(self.time_up(time_features(t))))
        x = self._run_blocks(x, condition, mask_features)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(condition)), 2, axis=-1)
        return depth_to_space(self.head(modulate(layer_norm(x), shift, scale)).astype(jnp.float32), self.patch_size)

    def _positions(self, height: int, width: int) -> Float[Array, "H W D"]:
        if not self.learned_positions:
            return jnp.asarray(position_features(height, width, self.d_model))
        if (height, width) != self.positions.shape[:2]:
            raise ValueError(f"the token grid is {(height, width)}, want that of positions, {self.positions.shape[:2]}")
        return self.positions[...]

    def _run_blocks(self, x: Grid, condition: Float[Array, "B D"], mask_features: Grid) -> Grid:
        """Down the U, through its bottom, up again; a flat stack is the bottom alone."""
        first_layer = 0

        def run(blocks: nnx.Module, depth: int, x: Grid, mask_features: Grid, **options: Any) -> tuple[Grid, Any]:
            nonlocal first_layer
            layers = range(first_layer, first_layer + depth)
            first_layer += depth
            sides = x.shape[1:3]
            paths = paths_of_layers(
                layers, self.orders_per_layer, *sides, rotation=self.order_rotation, parts=row_parts(*sides)
            )
            return run_stacked(blocks, x, condition, mask_features, paths, remat=self.remat, **options)

        encoded = []
        for level in self.levels:
            x, outputs = run(level.encoder_blocks, level.depth, x, mask_features, keep=True)
            encoded.append((outputs, mask_features))
            x, mask_features = level.to_coarser(x), level.coarser_mask(mask_features)
        x, _ = run(self.blocks, self.depth, x, mask_features)
        for level, (outputs, mask_features) in zip(reversed(self.levels), reversed(encoded), strict=True):
            # The last block of the encoder meets the first of the decoder.
            x, _ = run(level.decoder_blocks, level.depth, level.to_finer(x), mask_features, skips=outputs[::-1])
        return x


def _mamba_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "d_state": config.d_state,
        "expand": config.expand,
        "d_conv": config.d_conv,
        "num_orders": config.orders_per_layer,
        "scan_implementation": None if config.scan_implementation == "auto" else config.scan_implementation,
    }
