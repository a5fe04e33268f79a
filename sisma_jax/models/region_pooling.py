"""Region pooling: the tokens of a class share their mean, and all tokens share that of the image.

A scan carries information along its path and forgets it on the way, so that distant parts of a region, such as the hair
left and right of a face, may get different colours. Region pooling connects them directly, in linear time.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.models.condition import Condition
from sisma_jax.models.patches import Grid
from sisma_jax.models.scan_orders import Paths
from sisma_jax.models.sublayer import Sublayer

# Least number of tokens by which a sum is divided: an absent class has none.
_LEAST_TOKENS = 1e-3


class RegionPooling(Sublayer):
    """Sums over the classes k of share_k MLP(mean_k), and adds the same of the whole image.

    mean_k is the mean of the tokens, weighted by share_k, the share of a token's pixels that have class k.

    Args:
      d_model: channels of a token.
      dtype: type of the matrix products.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)
        self.of_region = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)
        self.of_image = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)

    def read(self, condition: Condition, paths: Paths) -> Float[Array, "B H W K"]:
        """Returns the shares of the classes in `condition`; `paths` is not used."""
        assert condition.regions is not None, "a model with region pooling encodes the regions"
        return condition.regions

    def __call__(self, x: Grid, read: Float[Array, "B H W K"], paths: Paths) -> Grid:
        """Returns what the tokens `x` get from their regions; `paths` is not used.

        Args:
          x: tokens.
          read: the shares of the classes.
          paths: not used.
        """
        sums = jnp.einsum("bhwk,bhwd->bkd", read, x, preferred_element_type=jnp.float32)
        counts = jnp.maximum(read.astype(jnp.float32).sum(axis=(1, 2)), _LEAST_TOKENS)
        image = x.astype(jnp.float32).mean(axis=(1, 2))[:, None]
        pooled = jnp.concatenate([sums / counts[..., None], image], axis=1).astype(x.dtype)
        hidden = jax.nn.gelu(self.up(pooled))
        y = jnp.einsum("bhwk,bkd->bhwd", read, self.of_region(hidden[:, :-1]))
        return y + self.of_image(hidden[:, -1])[:, None, None]
