"""The layer of a denoiser: residual sub-layers modulated by the time, and many layers rolled into one loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.models.mamba import DepthwiseConv, Grid, Paths
from sisma_jax.parallel import sharding

# What a block's forward pass keeps for its backward pass; the rest is computed again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
      feed_forward: tokens -> tokens. None leaves this sub-layer out.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nnx.Module,
        reader: nnx.Module | None,
        feed_forward: nnx.Module | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.mixer = mixer
        self.reader = reader
        self.feed_forward = feed_forward
        zeros = nnx.initializers.zeros
        num_sublayers = 1 + (reader is not None) + (feed_forward is not None)
        self.modulation = nnx.Linear(
            d_model, 3 * num_sublayers * d_model, kernel_init=zeros, bias_init=zeros, rngs=rngs
        )

    def __call__(self, x: Grid, condition: Float[Array, "B D"], mask_features: Grid, paths: Paths) -> Grid:
        sublayers = [lambda x: self.mixer(x, paths)]
        if self.reader is not None:
            sublayers.append(lambda x: self.reader(x, mask_features, paths))
        if self.feed_forward is not None:
            sublayers.append(self.feed_forward)
        modulation = jnp.split(self.modulation(jax.nn.silu(condition)), 3 * len(sublayers), axis=-1)
        for i, sublayer in enumerate(sublayers):
            shift, scale, gate = modulation[3 * i : 3 * i + 3]
            y = sublayer(modulate(layer_norm(x), shift, scale).astype(x.dtype))
            x = x + y * gate.astype(y.dtype)[:, None, None]
        return x


def stacked(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns `depth` modules as one, whose parameters have a leading axis of layers."""
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))


def run_stacked(
    blocks: nnx.Module,
    x: Grid,
    condition: Float[Array, "B D"],
    mask_features: Grid,
    paths: Paths,
    *,
    remat: str,
    skips: Float[Array, "layers B H W D"] | None = None,
    keep: bool = False,
) -> tuple[Grid, Float[Array, "layers B H W D"] | None]:
    """Runs stacked blocks one after the other, rolled into a loop: compile time does not grow with depth.

    Args:
      blocks: of `stacked`.
      paths: their arrays have a leading axis of layers.
      remat: "none" or a key of `REMAT_POLICIES`.
      skips: for each block, what is given to it as its skip connection.
      keep: return the output of every block, too.

    Returns:
      The last block's output, and those of all or None.
    """
    graph, params = nnx.split(blocks)

    def run(x: Grid, layer: tuple) -> tuple[Grid, Grid | None]:
        params, paths, skip = layer
        block = nnx.merge(graph, sharding.gather(params))
        # Else XLA may split activations as it does the parameters that they meet.
        x = sharding.constrain(x)
        inputs = (x,) if skip is None else (x, skip)
        x = block(*inputs, condition, mask_features, paths)
        return x, x if keep else None

    if remat != "none":
        run = jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(run, x, (params, paths, skips))
