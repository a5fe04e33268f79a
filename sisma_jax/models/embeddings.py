"""Position embeddings, which are added to the tokens, and embeddings of scalars, which modulate the layers."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.models.patches import Grid

TIMEFREQUENCIES = 256
TimeFrequencies = Literal["smooth", "dit"]
# Angular frequencies of `time_features`: from 16 to 0.16, and those of DiT at time step 1000 t.
FREQUENCIES = {
    "smooth": np.geomspace(16.0, 0.16, TIMEFREQUENCIES // 2),
    "dit": 1000.0 * 10_000.0 ** (-np.arange(TIMEFREQUENCIES // 2) / (TIMEFREQUENCIES // 2)),
}


def time_features(t: Float[Array, " B"], frequencies: TimeFrequencies = "smooth") -> Float[Array, "B 256"]:
    """Returns cosines and sines of numbers in [0, 1], such as times, float32.

    With the frequencies of DiT (arXiv 2212.09748), up to 1000, the network changes so fast with t that its derivative,
    which mean flows need, is noise. With those up to 16, flow matching is as good and the derivative is right.

    Args:
      t: the numbers.
      frequencies: "smooth", up to 16, or "dit", up to 1000.
    """
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(FREQUENCIES[frequencies], jnp.float32)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedding(nnx.Module):
    """Linear, SiLU, linear on the `time_features` of one number or several, in float32.

    Args:
      d_model: channels of the embedding.
      num_scalars: how many numbers are embedded together.
      frequencies: of `time_features`.
      is_zero: whether the embedding is initially zero, so that a model that is trained without it can be fine-tuned.
      rngs: randomness of the initial parameters.
    """

    def __init__(
        self,
        d_model: int,
        num_scalars: int = 1,
        *,
        frequencies: TimeFrequencies = "smooth",
        is_zero: bool = False,
        rngs: nnx.Rngs,
    ):
        self.frequencies: TimeFrequencies = frequencies
        self.up = nnx.Linear(num_scalars * TIMEFREQUENCIES, d_model, rngs=rngs)
        init = nnx.initializers.zeros if is_zero else nnx.initializers.lecun_normal()
        self.down = nnx.Linear(d_model, d_model, kernel_init=init, rngs=rngs)

    def __call__(self, *scalars: Float[Array, " B"]) -> Float[Array, "B D"]:
        """Returns the embedding of numbers in [0, 1], float32."""
        features = jnp.concatenate([time_features(x, self.frequencies) for x in scalars], axis=-1)
        return self.down(jax.nn.silu(self.up(features)))


def position_features(height: int, width: int, d_model: int) -> np.ndarray:
    """Returns fixed 2-D sine and cosine position embeddings, float32 (height, width, d_model).

    The first half of the channels encodes the row, the second half the column.

    Args:
      height: rows of the token grid.
      width: columns of the token grid.
      d_model: channels of a token; a multiple of 4.
    """
    frequencies = 1.0 / 10_000 ** (np.arange(d_model // 4) / (d_model // 4))

    def features(positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None] * frequencies[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows = np.broadcast_to(features(np.arange(height))[:, None], (height, width, d_model // 2))
    columns = np.broadcast_to(features(np.arange(width))[None], (height, width, d_model // 2))
    return np.concatenate([rows, columns], axis=-1).astype(np.float32)


class FixedPositions(nnx.Module):
    """Adds `position_features` to the tokens of a grid of any size."""

    def __call__(self, x: Grid) -> Grid:
        """Returns the tokens plus their position embeddings."""
        return x + jnp.asarray(position_features(*x.shape[1:])).astype(x.dtype)[None]


class LearnedPositions(nnx.Module):
    """Adds learned position embeddings, initialised to `position_features`, to the tokens of a square grid.

    Args:
      side: height and width of the grid in tokens.
      d_model: channels of a token; a multiple of 4.
    """

    def __init__(self, side: int, d_model: int):
        self.grid = nnx.Param(jnp.asarray(position_features(side, side, d_model)))

    def __call__(self, x: Grid) -> Grid:
        """Returns the tokens plus their position embeddings.

        Raises:
          ValueError: the token grid has another size than the learned positions.
        """
        if x.shape[1:3] != self.grid.shape[:2]:
            raise ValueError(
                f"the token grid is {x.shape[1:3]}, want that of positions, {self.grid.shape[:2]}; give latents of the "
                "size for which the positions were learned"
            )
        return x + self.grid[...].astype(x.dtype)[None]
