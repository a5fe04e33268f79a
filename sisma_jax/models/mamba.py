"""Self-Mamba and Cross-Mamba: the token mixers of a SISMA block, around the selective scan.

Both are Mamba's mixer (arXiv 2312.00752, figure 3) on a grid of tokens: a depthwise 3x3 convolution takes the
place of the causal one, and the sequence is a serpentine path over the grid. In Cross-Mamba the scan's inputs
come from two streams (Mamba-ST, arXiv 2409.10385): the image reads the mask through the state.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sisma_jax.kernels import selective_scan, sequence_parallel_scan
from sisma_jax.kernels.partition import SEQUENCE_AXIS, batch_axes, channel_axes, map_parts
from sisma_jax.models.condition import Condition
from sisma_jax.models.convolution import DepthwiseConv
from sisma_jax.models.patches import Grid
from sisma_jax.models.scan_orders import Paths, ScanPath, SplitScanPath

# Mamba's range of initial step sizes: log-uniform in [DT_MIN, DT_MAX].
DT_MIN, DT_MAX = 1e-3, 1e-1


class OrderedScan(nnx.Module):
    """The selective scan of a grid along one path, with the projections that make Δ, B and C of its inputs.

    Δ and B are projected from the stream `drive`, C from the stream `readout`. A state-space model of its own
    for each path, as in VMamba (arXiv 2401.10166).
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        dt_rank: int,
        *,
        implementation: str | None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.implementation = implementation
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.drive_proj = nnx.Linear(d_inner, dt_rank + d_state, use_bias=False, dtype=dtype, rngs=rngs)
        self.readout_proj = nnx.Linear(d_inner, d_state, use_bias=False, dtype=dtype, rngs=rngs)

        def uniform(shape: tuple[int, ...], low: float, high: float) -> Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, minval=low, maxval=high)

        bound = dt_rank**-0.5
        self.dt_proj = nnx.Param(uniform((dt_rank, d_inner), -bound, bound))
        dt = jnp.exp(uniform((d_inner,), math.log(DT_MIN), math.log(DT_MAX)))
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # the inverse of softplus
        # S4D-real initialisation: A[d, n] = -(n + 1).
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1, d_state + 1, dtype=jnp.float32))[None], (d_inner, 1)))
        self.D = nnx.Param(jnp.ones((d_inner,), jnp.float32))

    def __call__(self, u: Grid, drive: Grid, readout: Grid, path: ScanPath | SplitScanPath) -> Grid:
        # Projections act on each token alone, so they come before the path and the narrow results are reordered.
        dt, B = jnp.split(self.drive_proj(drive), [self.dt_rank], axis=-1)
        C = self.readout_proj(readout)
        parameters = {
            "dt_proj": self.dt_proj[...],
            "A": -jnp.exp(self.A_log[...]),
            "D": self.D[...],
            "dt_bias": self.dt_bias[...],
        }
        if isinstance(path, SplitScanPath):
            return self._scan_in_parts(u, jnp.concatenate([dt, B, C], axis=-1), parameters, path)
        height, width = u.shape[1:3]
        u, dt, B, C = (path.to_sequence(x) for x in (u, dt, B, C))
        y = selective_scan(**_scan_arguments(u, dt, B, C, parameters), implementation=self.implementation)
        return path.to_grid(y, height, width)

    def _scan_in_parts(
        self, u: Grid, projected: Float[Array, "B H W P"], parameters: dict[str, Array], path: SplitScanPath
    ) -> Grid:
        """Each device scans its part of the sequence, from the state in which the parts before it left off.

        Args:
          projected: dt, B and C of each token in one array, which devices exchange in one go.
        """
        ends_of_dt_and_B = [self.dt_rank, self.dt_rank + self.d_state]

        def scan(u: Array, projected: Array, parameters: dict[str, Array], path: SplitScanPath) -> Array:
            width = u.shape[2]
            dt, B, C = jnp.split(path.to_sequence(projected), ends_of_dt_and_B, axis=-1)
            y, _ = sequence_parallel_scan(
                **_scan_arguments(path.to_sequence(u), dt, B, C, parameters),
                parts_reversed=path.parts_reversed,
                implementation=self.implementation,
            )
            return path.to_rows(y, width)

        mesh = jax.sharding.get_abstract_mesh()
        batch = batch_axes(u, mesh)
        channels = channel_axes(u, mesh, taken=(*batch, SEQUENCE_AXIS))
        rows = jax.P(batch, SEQUENCE_AXIS, None, channels)
        parameter_specs = {name: jax.P(channels) for name in parameters} | {"dt_proj": jax.P(None, channels)}
        in_specs = (rows, jax.P(batch, SEQUENCE_AXIS), parameter_specs, path.specs())
        return map_parts(scan, in_specs, rows)(u, projected, parameters, path)


def _scan_arguments(u: Array, dt: Array, B: Array, C: Array, parameters: dict[str, Array]) -> dict[str, Any]:
    return {
        "u": u,
        "delta": dt @ parameters["dt_proj"].astype(dt.dtype),
        "A": parameters["A"],
        "B": B,
        "C": C,
        "D": parameters["D"],
        "delta_bias": parameters["dt_bias"],
        "delta_softplus": True,
    }


class _Mixer(nnx.Module):
    """What Self-Mamba and Cross-Mamba share: all but where the scan's inputs come from.

    Args:
      d_model: channels of a token.
      d_state, expand, d_conv: as in Mamba; d_inner = expand * d_model, dt_rank = ceil(d_model / 16).
      num_orders: how many paths are scanned, each with parameters of its own, and summed.
      scan_implementation: of `kernels.selective_scan`; None takes the platform's preference.
      dtype: type of the matrix products; parameters, the norm and the scan's carry stay float32.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        expand: int,
        d_conv: int,
        num_orders: int,
        scan_implementation: str | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.d_inner = expand * d_model
        self.in_proj = nnx.Linear(d_model, 2 * self.d_inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(self.d_inner, d_conv, rngs=rngs)
        dt_rank = math.ceil(d_model / 16)
        options = {"implementation": scan_implementation, "dtype": dtype, "rngs": rngs}
        self.scans = nnx.List([OrderedScan(self.d_inner, d_state, dt_rank, **options) for _ in range(num_orders)])
        self.out_norm = nnx.LayerNorm(self.d_inner, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.out_proj = nnx.Linear(self.d_inner, d_model, use_bias=False, dtype=dtype, rngs=rngs)

    def _scan_and_gate(self, u: Grid, z: Grid, paths: Paths, *, drive: Grid, readout: Grid) -> Float[Array, "B H W M"]:
        y = sum(scan(u, drive, readout, path) for scan, path in zip(self.scans, paths, strict=True))
        return self.out_proj(self.out_norm(y).astype(z.dtype) * jax.nn.silu(z))


class SelfMamba(_Mixer):
    """Mixes the image tokens: u, Δ, B, C and the gate all come from the image."""

    def __call__(self, x: Grid, condition: Condition, paths: Paths) -> Grid:
        u, z = jnp.split(self.in_proj(x), 2, axis=-1)
        u = self.conv(u)
        return self._scan_and_gate(u, z, paths, drive=u, readout=u)


class SkippingSelfMamba(SelfMamba):
    """Self-Mamba that adds its input, times a learned scale per channel, to its output."""

    def __init__(self, d_model: int, **mixer: Any):
        super().__init__(d_model, **mixer)
        self.skip_scale = nnx.Param(jnp.ones((d_model,), jnp.float32))

    def __call__(self, x: Grid, condition: Condition, paths: Paths) -> Grid:
        return super().__call__(x, condition, paths) + x * self.skip_scale[...].astype(x.dtype)[None, None, None]


class CrossMamba(_Mixer):
    """Lets the image read the mask in linear time: the only place where the mask enters the denoiser.

    The scan's input u always comes from the mask features and the gate from the image. With the wiring
    `state_from_mask`, Δ and B (what the state keeps) come from the mask and C (what is read) from the image;
    `readout_from_mask` is the other way round. Both streams go through the same convolution.

    Args:
      d_model: channels of an image token and of a mask feature.
      wiring: see above.
      mixer: as for `_Mixer`.
    """

    def __init__(self, d_model: int, *, wiring: Literal["state_from_mask", "readout_from_mask"], **mixer: Any):
        super().__init__(d_model, **mixer)
        self.wiring = wiring
        self.mask_proj = nnx.Linear(d_model, self.d_inner, use_bias=False, dtype=mixer["dtype"], rngs=mixer["rngs"])

    def __call__(self, x: Grid, condition: Condition, paths: Paths) -> Grid:
        image, z = jnp.split(self.in_proj(x), 2, axis=-1)
        image = self.conv(image)
        mask = self.conv(self.mask_proj(condition.mask))
        drive, readout = (mask, image) if self.wiring == "state_from_mask" else (image, mask)
        return self._scan_and_gate(mask, z, paths, drive=drive, readout=readout)
