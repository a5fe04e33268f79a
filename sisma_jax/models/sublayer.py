"""The interface of the parts of a layer, which maps tokens to tokens and may read the condition."""

from flax import nnx
from jaxtyping import Array, PyTree

from sisma_jax.models.condition import Condition
from sisma_jax.models.patches import Grid
from sisma_jax.models.scan_orders import Paths


class Sublayer(nnx.Module):
    """A part of a `Block`: maps tokens to tokens, given what it has read from the condition."""

    def read(self, condition: Condition, paths: Paths) -> PyTree[Array]:
        """Returns what the sub-layer computes from the condition alone: arrays (B, ...), or None for nothing.

        A sampler computes it once per image, because it does not depend on the noisy image or on the time.

        Args:
          condition: with mask features on the token grid.
          paths: scan paths of the layer.
        """

    def __call__(self, x: Grid, read: PyTree[Array], paths: Paths) -> Grid:
        """Returns tokens of the shape of x.

        Args:
          x: tokens.
          read: result of `read`.
          paths: scan paths of the layer.
        """
        raise NotImplementedError
