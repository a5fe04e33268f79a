"""The state-space model of Mamba-2 on a grid of tokens: an alternative to the selective scan in Self- and Cross-Mamba.

The mixers in `models.mamba` create one `OrderedScan` or one `OrderedSsd` per path.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from sisma_jax.kernels import ssd
from sisma_jax.models.patches import Grid
from sisma_jax.models.scan_orders import ScanPath, SplitScanPath
from sisma_jax.models.step_sizes import initial_dt_bias

# Initial decay rates are uniform in [A_MIN, A_MAX], as in Mamba-2's code.
A_MIN, A_MAX = 1.0, 16.0


class OrderedSsd(nnx.Module):
    """`kernels.ssd` of a grid along one path, with the projections that compute Δ, B and C.

    It takes the place of `models.mamba.OrderedScan`. All channels of a head have the same Δ and the same decay, so Δ is
    projected from the stream `drive` directly, without a bottleneck. D has one value per channel, as in the scan.

    Args:
      d_inner: channels of u; a multiple of d_head.
      d_state: state dimension N.
      d_head: channels of a head.
      dtype: type of the matrix products; parameters and the states between chunks stay float32.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, d_inner: int, d_state: int, d_head: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_heads = d_inner // d_head
        self.drive_proj = nnx.Linear(d_inner, self.num_heads + d_state, use_bias=False, dtype=dtype, rngs=rngs)
        self.readout_proj = nnx.Linear(d_inner, d_state, use_bias=False, dtype=dtype, rngs=rngs)
        self.dt_bias = nnx.Param(initial_dt_bias(self.num_heads, rngs))
        rates = jax.random.uniform(rngs.params(), (self.num_heads,), jnp.float32, minval=A_MIN, maxval=A_MAX)
        self.A_log = nnx.Param(jnp.log(rates))
        self.D = nnx.Param(jnp.ones((d_inner,), jnp.float32))

    def to_sequence(self, u: Grid, path: ScanPath | SplitScanPath) -> Array:
        """Returns tokens in the order of the path; see `OrderedScan.to_sequence`.

        Args:
          u: grid of tokens.
          path: order in which the tokens are scanned.

        Raises:
          NotImplementedError: the rows of the grid are sharded.
        """
        if isinstance(path, SplitScanPath):
            raise NotImplementedError("SSD does not support a mesh with an axis seq; use the selective scan")
        return path.to_sequence(u)

    def state(self, drive: Grid, path: ScanPath | SplitScanPath) -> tuple[Array, Array]:
        """Returns Δ, (B, L, heads), and B, (B, L, N); the arguments are those of `OrderedScan.state`."""
        # Projections act on each token separately. Before the path, they leave fewer channels to reorder.
        dt, B = jnp.split(self.drive_proj(drive), [self.num_heads], axis=-1)
        return self.to_sequence(dt, path), self.to_sequence(B, path)

    def readout(self, readout: Grid, path: ScanPath | SplitScanPath) -> Array:
        """Returns C, (B, L, N); the arguments are those of `OrderedScan.readout`."""
        return self.to_sequence(self.readout_proj(readout), path)

    def __call__(
        self, u: Array, state: tuple[Array, Array], C: Array, path: ScanPath | SplitScanPath, height: int, width: int
    ) -> Grid:
        """Returns the output on the grid, with the dtype of u; the arguments are those of `OrderedScan.__call__`."""
        dt, B = state
        y = ssd(
            u,
            dt,
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            delta_bias=self.dt_bias[...],
            delta_softplus=True,
        )
        assert isinstance(path, ScanPath), "to_sequence has refused other paths"
        return path.to_grid(y, height, width)
