"""The state-space model of Mamba-2 on a grid of tokens: an alternative to the selective scan in Self- and Cross-Mamba.

The mixers in `models.mamba` create one `OrderedScan` or one `OrderedSsd` per path.
"""

import jax
import jax.numpy as jnp
from flax import nnx

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

    def __call__(self, u: Grid, drive: Grid, readout: Grid, path: ScanPath | SplitScanPath) -> Grid:
        """Returns the output on the grid, with the shape and dtype of u.

        Args:
          u: input, d_inner channels.
          drive: stream that gives Δ and B, d_inner channels.
          readout: stream that gives C, d_inner channels.
          path: order in which the tokens are scanned.

        Raises:
          NotImplementedError: the rows of the grid are sharded.
        """
        if isinstance(path, SplitScanPath):
            raise NotImplementedError("SSD does not support a mesh with an axis seq; use the selective scan")
        # Projections act on each token separately. Before the path, they leave fewer channels to reorder.
        dt, B = jnp.split(self.drive_proj(drive), [self.num_heads], axis=-1)
        C = self.readout_proj(readout)
        height, width = u.shape[1:3]
        u, dt, B, C = (path.to_sequence(x) for x in (u, dt, B, C))
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
        return path.to_grid(y, height, width)
