"""The layer of a denoiser: residual sub-layers modulated by the time; and stacks of layers that run as one loop."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from sisma_jax.config import ModelConfig
from sisma_jax.kernels.partition import row_parts
from sisma_jax.models.condition import Condition
from sisma_jax.models.convolution import DepthwiseConv
from sisma_jax.models.patches import Grid
from sisma_jax.models.scan_orders import Paths, paths_of_layers
from sisma_jax.parallel import sharding

# What a layer's forward pass keeps for its backward pass; the rest is computed again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class LayerParts:
    """What distinguishes a backbone: each part maps (config, dtype=, rngs=) to a sub-layer of `Block`.

    Attributes:
      mixer: mixes the image tokens.
      cross_reader: lets the image tokens read the mask.
    """

    mixer: Callable[..., nnx.Module]
    cross_reader: Callable[..., nnx.Module]


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
    """Linear, GELU, linear: the sub-layer that works on each token alone."""

    def __init__(self, d_model: int, d_hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(d_model, d_hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(d_hidden, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, x: Grid, condition: Condition, paths: Paths) -> Grid:
        return self.down(jax.nn.gelu(self.up(x)))


class Spade(nnx.Module):
    """Reads the mask by spatially adaptive normalisation (arXiv 1903.07291): LN(x) (1 + γ(S_M)) + β(S_M), projected."""

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = DepthwiseConv(d_model, 3, rngs=rngs)
        self.scale_and_shift = nnx.Linear(d_model, 2 * d_model, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, x: Grid, condition: Condition, paths: Paths) -> Grid:
        scale, shift = jnp.split(self.scale_and_shift(self.conv(condition.mask)), 2, axis=-1)
        return self.out_proj(jax.nn.silu((layer_norm(x) * (1 + scale) + shift).astype(x.dtype)))


class Block(nnx.Module):
    """Residual sub-layers, each shifted and scaled by the time before and gated by it after (adaLN-zero).

    For each sub-layer in turn: x += gate sublayer(modulate(LN(x), shift, scale)). The gates start at zero, so a new
    block is the identity.

    Args:
      sublayers: by name, each (tokens, condition, paths) -> tokens.
    """

    def __init__(self, d_model: int, sublayers: Mapping[str, nnx.Module], *, rngs: nnx.Rngs):
        self.names = tuple(sublayers)
        for name, sublayer in sublayers.items():
            setattr(self, name, sublayer)
        zeros = nnx.initializers.zeros
        self.modulation = nnx.Linear(
            d_model, 3 * len(sublayers) * d_model, kernel_init=zeros, bias_init=zeros, rngs=rngs
        )

    def __call__(self, x: Grid, embedding: Float[Array, "B D"], condition: Condition, paths: Paths) -> Grid:
        """Returns the tokens after all sub-layers.

        Args:
          embedding: of the time, and of what else conditions the whole image.
          condition: at the resolution of x.
          paths: the scan orders of this layer.
        """
        modulation = jnp.split(self.modulation(jax.nn.silu(embedding)), 3 * len(self.names), axis=-1)
        for i, name in enumerate(self.names):
            shift, scale, gate = modulation[3 * i : 3 * i + 3]
            y = getattr(self, name)(modulate(layer_norm(x), shift, scale).astype(x.dtype), condition, paths)
            x = x + y * gate.astype(y.dtype)[:, None, None]
        return x


def make_block(config: ModelConfig, parts: LayerParts, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Block:
    """Returns one layer: what mixes the tokens, what reads the mask unless it is concatenated, feed-forward."""
    options = {"dtype": dtype, "rngs": rngs}
    sublayers = {"mixer": parts.mixer(config, **options)}
    if config.mask_conditioning == "cross":
        sublayers["reader"] = parts.cross_reader(config, **options)
    elif config.mask_conditioning == "spade":
        sublayers["reader"] = Spade(config.d_model, **options)
    if d_hidden := int(config.mlp_ratio * config.d_model):
        sublayers["feed_forward"] = FeedForward(config.d_model, d_hidden, **options)
    return Block(config.d_model, sublayers, rngs=rngs)


class Stack(nnx.Module):
    """Consecutive layers as one module, whose parameters have a leading axis of layers.

    Args:
      config: of the model, for scan orders and rematerialisation.
      make_layer: one layer, with fresh parameters.
      layers: their numbers in the model, by which scan orders rotate.
    """

    def __init__(
        self, config: ModelConfig, make_layer: Callable[[nnx.Rngs], nnx.Module], layers: range, *, rngs: nnx.Rngs
    ):
        self.layers = layers
        self.orders_per_layer = config.orders_per_layer
        self.order_rotation = config.order_rotation
        self.remat = config.remat
        keys = jax.random.split(rngs.params(), len(layers))
        setattr(self, sharding.STACKED, nnx.vmap(lambda key: make_layer(nnx.Rngs(key)))(keys))

    def __call__(self, x: Grid, embedding: Float[Array, "B D"], condition: Condition) -> Grid:
        """Returns the output of the last layer."""
        return self.run(x, embedding, condition)[0]

    def paths(self, height: int, width: int) -> Paths:
        """Returns the scan orders of all layers, with a leading axis of layers."""
        parts = row_parts(height, width)
        return paths_of_layers(self.layers, self.orders_per_layer, height, width, self.order_rotation, parts)

    def run(
        self,
        x: Grid,
        embedding: Float[Array, "B D"],
        condition: Condition,
        *per_layer: PyTree[Array],
        keep: bool = False,
    ) -> tuple[Grid, Float[Array, "layers B H W D"] | None]:
        """Runs the layers one after the other with `jax.lax.scan`: compile time does not grow with depth.

        Args:
          per_layer: further arguments of the layers, with a leading axis of layers.
          keep: return the output of every layer, too.

        Returns:
          The last layer's output, and those of all or None.
        """
        graph, params = nnx.split(getattr(self, sharding.STACKED))

        def run(x: Grid, layer: tuple) -> tuple[Grid, Grid | None]:
            params, *arguments = layer
            # Else XLA may split activations as it does the parameters that they meet.
            x = sharding.constrain(x)
            x = nnx.merge(graph, sharding.gather(params))(x, embedding, condition, *arguments)
            return x, x if keep else None

        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(run, x, (params, self.paths(*x.shape[1:3]), *per_layer))
