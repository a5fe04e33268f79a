"""The layer of a denoiser, which consists of residual sub-layers, and stacks of layers that `jax.lax.scan` runs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from sisma_jax.config import ModelConfig
from sisma_jax.kernels.partition import row_parts
from sisma_jax.kernels.selective_scan import CHECKPOINT_NAME
from sisma_jax.models.condition import Condition
from sisma_jax.models.convolution import DepthwiseConv
from sisma_jax.models.patches import Grid
from sisma_jax.models.region_pooling import RegionPooling
from sisma_jax.models.scan_orders import Paths, Rotation, paths_of_layers
from sisma_jax.models.sublayer import Sublayer
from sisma_jax.parallel import sharding

# What the forward pass of a layer saves for its backward pass, which recomputes the rest. "dots" saves the results of
# matrix products and of scans, which take most of the time.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@runtime_checkable
class MakeSublayer(Protocol):
    """Creates a sub-layer of `Block`, a module with the methods of `Sublayer`."""

    def __call__(self, config: ModelConfig, /, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> "Sublayer":
        """Returns the sub-layer with newly initialised parameters.

        Args:
          config: sizes of the model.
          dtype: type of the matrix products.
          rngs: randomness of the initial parameters.
        """
        ...


@dataclasses.dataclass(frozen=True)
class LayerParts:
    """The sub-layers that distinguish one backbone from another.

    Attributes:
      mixer: creates the sub-layer that mixes the image tokens.
      cross_reader: creates the sub-layer in which the image tokens read the mask.
    """

    mixer: MakeSublayer
    cross_reader: MakeSublayer


def modulate(x: Grid, shift: Float[Array, "#B D"], scale: Float[Array, "#B D"]) -> Grid:
    """Returns x (1 + scale) + shift, with the same scale and shift for all tokens of an example."""
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


def layer_norm(x: Grid) -> Grid:
    """Returns LayerNorm of x over the channels, float32, without parameters: adaLN supplies scale and shift."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)


class FeedForward(Sublayer):
    """Linear, GELU, linear, applied to each token separately.

    Args:
      d_model: channels of a token.
      d_hidden: channels of the hidden layer.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, d_model: int, d_hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(d_model, d_hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(d_hidden, d_model, dtype=dtype, rngs=rngs)

    def __call__(self, x: Grid, read: None, paths: Paths) -> Grid:
        """Returns the transformed tokens; `read` and `paths` are not used."""
        return self.down(jax.nn.gelu(self.up(x)))


class Spade(Sublayer):
    """Spatially adaptive normalisation by the mask: Linear(SiLU(LN(x) (1 + γ(S_M)) + β(S_M))) (arXiv 1903.07291).

    Args:
      d_model: channels of a token and of a mask feature.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = DepthwiseConv(d_model, 3, rngs=rngs)
        self.scale_and_shift = nnx.Linear(d_model, 2 * d_model, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)

    def read(self, condition: Condition, paths: Paths) -> tuple[Grid, Grid]:
        """Returns γ and β of the mask features in `condition`; `paths` is not used."""
        scale, shift = jnp.split(self.scale_and_shift(self.conv(condition.mask)), 2, axis=-1)
        return scale, shift

    def __call__(self, x: Grid, read: tuple[Grid, Grid], paths: Paths) -> Grid:
        """Returns the tokens `x`, normalised and modulated by the mask features that were `read`; see `Sublayer`."""
        scale, shift = read
        return self.out_proj(jax.nn.silu((layer_norm(x) * (1 + scale) + shift).astype(x.dtype)))


class Modulation(nnx.Linear):
    """Linear(SiLU(embedding)), the values that modulate sub-layers (adaLN-zero, arXiv 2212.09748); initially zero.

    Args:
      d_model: channels of the embedding.
      size: number of values.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, d_model: int, size: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        super().__init__(d_model, size, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def __call__(self, embedding: Float[Array, "#B D"], out_sharding: None = None) -> Float[Array, "#B M"]:
        """Returns the values; `out_sharding` is not used."""
        return super().__call__(jax.nn.silu(embedding))


class ModulationOffset(nnx.Module):
    """Adds a vector of its own to a modulation that all layers share (adaLN-single, arXiv 2310.00426).

    Args:
      size: number of values.
    """

    def __init__(self, size: int):
        self.offset = nnx.Param(jnp.zeros((size,), jnp.float32))

    def __call__(self, shared: Float[Array, "#B M"]) -> Float[Array, "#B M"]:
        """Returns the values."""
        return shared + self.offset[...][None]


class Block(nnx.Module):
    """Residual sub-layers with adaLN-zero (arXiv 2212.09748).

    Each sub-layer computes x += gate · sublayer(modulate(LN(x), shift, scale)). The gates are initially zero, so a new
    block is the identity.

    Args:
      sublayers: in order, by the name of the attribute that stores them.
      modulation: maps the argument `embedding` to shift, scale and gate of every sub-layer.
    """

    def __init__(self, sublayers: Mapping[str, Sublayer], modulation: Modulation | ModulationOffset):
        self.names = tuple(sublayers)
        for name, sublayer in sublayers.items():
            setattr(self, name, sublayer)
        self.modulation = modulation

    def read(self, condition: Condition, paths: Paths) -> dict[str, PyTree[Array]]:
        """Returns what each sub-layer reads from the condition; see `Sublayer.read`.

        Args:
          condition: with mask features on the token grid.
          paths: scan paths of this layer.
        """
        return {name: getattr(self, name).read(condition, paths) for name in self.names}

    def __call__(
        self, x: Grid, embedding: Float[Array, "#B E"], read: Mapping[str, PyTree[Array]], paths: Paths
    ) -> Grid:
        """Returns the tokens after all sub-layers.

        Args:
          x: tokens.
          embedding: of the time and of conditions per image, or the modulation that all layers share; one row if all
            images have the same.
          read: result of `read`.
          paths: scan paths of this layer.
        """
        modulation = jnp.split(self.modulation(embedding), 3 * len(self.names), axis=-1)
        for i, name in enumerate(self.names):
            shift, scale, gate = modulation[3 * i : 3 * i + 3]
            y = getattr(self, name)(modulate(layer_norm(x), shift, scale).astype(x.dtype), read[name], paths)
            x = x + y * gate.astype(y.dtype)[:, None, None]
        return x


def make_block(config: ModelConfig, parts: LayerParts, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Block:
    """Returns one layer with newly initialised parameters.

    Its sub-layers are region pooling, if `config.region_pooling` is set; a mixer; a reader of the mask, unless
    `config.mask_conditioning` is "concat"; and a feed-forward layer, unless `config.mlp_ratio` is 0.

    Args:
      config: sizes and wiring of the model.
      parts: layer parts of the backbone.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
    """
    sublayers: dict[str, Sublayer] = {}
    if config.region_pooling:
        sublayers["pooling"] = RegionPooling(config.d_model, dtype=dtype, rngs=rngs)
    sublayers["mixer"] = parts.mixer(config, dtype=dtype, rngs=rngs)
    if config.mask_conditioning == "cross":
        sublayers["reader"] = parts.cross_reader(config, dtype=dtype, rngs=rngs)
    elif config.mask_conditioning == "spade":
        sublayers["reader"] = Spade(config.d_model, dtype=dtype, rngs=rngs)
    if d_hidden := int(config.mlp_ratio * config.d_model):
        sublayers["feed_forward"] = FeedForward(config.d_model, d_hidden, dtype=dtype, rngs=rngs)
    size = modulation_size(config)
    shared = config.modulation == "shared"
    modulation = ModulationOffset(size) if shared else Modulation(config.d_model, size, rngs=rngs)
    return Block(sublayers, modulation)


def modulation_size(config: ModelConfig) -> int:
    """Returns the number of values that modulate the sub-layers of a block: shift, scale and gate of each channel."""
    has_reader = config.mask_conditioning != "concat"
    has_feed_forward = int(config.mlp_ratio * config.d_model) > 0
    return 3 * config.d_model * (1 + config.region_pooling + has_reader + has_feed_forward)


def in_memory(x: Grid) -> Grid:
    """Returns x unchanged. On a CPU, XLA computes it, and its gradient, once and not in each operation that uses it.

    XLA:CPU fuses sums into all their users. Without a loop around the layers, the tokens are one long sum over all
    sub-layers, and the gradient of four layers with a small batch takes more than twice the time. XLA:CPU does not
    fuse across a conditional. It ignores optimization barriers.

    Args:
      x: tokens.
    """
    return jax.lax.platform_dependent(x, cpu=_behind_a_conditional, default=lambda x: x)


def _behind_a_conditional(x: Grid) -> Grid:
    # The predicate is always true, which XLA does not know. Two equal branches might become one.
    return jax.lax.cond(x[(0,) * x.ndim] > jnp.inf, lambda x: -x, lambda x: x, x)


class Stack(nnx.Module):
    """Consecutive layers, whose parameters are stacked along a leading axis and which `jax.lax.scan` runs.

    If `is_unrolled` is set, the loop is unrolled; see `make_graph`.

    Args:
      config: configuration of the model, which gives scan orders and rematerialisation.
      make_layer: returns one layer with newly initialised parameters.
      layers: numbers of the layers in the model, which determine their scan orders.
      rngs: randomness of the initial parameters.
    """

    def __init__(
        self, config: ModelConfig, make_layer: Callable[[nnx.Rngs], nnx.Module], layers: range, *, rngs: nnx.Rngs
    ):
        self.layers = layers
        self.orders_per_layer = config.orders_per_layer
        self.order_rotation: Rotation = config.order_rotation
        self.remat = config.remat
        self.is_unrolled = False
        keys = jax.random.split(rngs.params(), len(layers))
        setattr(self, sharding.STACKED, nnx.vmap(lambda key: make_layer(nnx.Rngs(key)))(keys))

    def __call__(self, x: Grid, embedding: Float[Array, "#B E"], condition: Condition) -> Grid:
        """Returns the output of the last layer; the arguments are those of `run`."""
        return self.run(x, embedding, condition, condition.read)[0]

    def read(self, condition: Condition) -> PyTree[Array]:
        """Returns what all layers read from the condition, stacked along a leading axis of layers.

        Args:
          condition: with mask features on the token grid.
        """
        graph, params = nnx.split(getattr(self, sharding.STACKED))

        def read(layer: tuple[PyTree, Paths]) -> PyTree:
            params, paths = layer
            return nnx.merge(graph, sharding.gather(params)).read(condition, paths)

        return jax.lax.map(read, (params, self.paths(*condition.mask.shape[1:3])))

    def paths(self, height: int, width: int) -> Paths:
        """Returns the scan paths of all layers, stacked along a leading axis of layers.

        Args:
          height: rows of the token grid.
          width: columns of the token grid.
        """
        parts = row_parts(height, width)
        return paths_of_layers(self.layers, self.orders_per_layer, height, width, self.order_rotation, parts)

    def run(
        self,
        x: Grid,
        embedding: Float[Array, "#B E"],
        condition: Condition,
        read: PyTree[Array] = None,
        *per_layer: PyTree[Array],
        keep: bool = False,
    ) -> tuple[Grid, Float[Array, "layers B H W D"] | None]:
        """Runs the layers in sequence with `jax.lax.scan`, so that compile time does not grow with depth.

        Args:
          x: tokens.
          embedding: of the time and of conditions per image, or the modulation that all layers share.
          condition: with mask features on the token grid of x.
          read: result of `read`; None if every layer is to compute its part of it.
          per_layer: further arguments of the layers, with a leading axis of layers.
          keep: also return the outputs of all layers.

        Returns:
          The output of the last layer, and the outputs of all layers, or None if not `keep`.
        """
        graph, params = nnx.split(getattr(self, sharding.STACKED))

        def run(x: Grid, layer: tuple[PyTree, ...]) -> tuple[Grid, Grid | None]:
            params, paths, read, *arguments = layer
            # Without this constraint, XLA may shard the activations like the parameters.
            x = sharding.constrain(x)
            if self.is_unrolled:
                x = in_memory(x)
            block = nnx.merge(graph, sharding.gather(params))
            read = block.read(condition, paths) if read is None else read
            x = block(x, embedding, read, paths, *arguments)
            return x, x if keep else None

        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(run, x, (params, self.paths(*x.shape[1:3]), read, *per_layer), unroll=self.is_unrolled)
