"""Self-Mamba and Cross-Mamba, the token mixers of a SISMA block, which are built on the selective scan or on SSD.

Both apply Mamba's mixer (arXiv 2312.00752, figure 3) to a grid of tokens. A depthwise 3x3 convolution replaces the
causal convolution, and the sequence is a serpentine path over the grid. The scan of Cross-Mamba takes its inputs from
two streams (Mamba-ST, arXiv 2409.10385), so that the image reads the mask through the state.
"""

import math
from collections.abc import Iterable
from typing import Literal, NotRequired, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from sisma_jax.kernels import selective_scan, sequence_parallel_scan
from sisma_jax.kernels.partition import SEQUENCE_AXIS, batch_axes, channel_axes, map_parts
from sisma_jax.models.condition import Condition
from sisma_jax.models.convolution import DepthwiseConv
from sisma_jax.models.patches import Grid
from sisma_jax.models.scan_orders import Paths, ScanPath, SplitScanPath
from sisma_jax.models.ssd import OrderedSsd
from sisma_jax.models.step_sizes import initial_dt_bias
from sisma_jax.models.sublayer import Sublayer


class MixerSizes(TypedDict):
    """Arguments of Self-Mamba and Cross-Mamba that the configuration of the model determines.

    Attributes:
      d_state: state dimension N.
      expand: d_inner / d_model.
      d_conv: side of the depthwise convolution's kernel; odd.
      num_orders: number of paths that are scanned. Each has its own parameters, and the outputs are summed.
      ssd_head: channels of a head of SSD (Mamba-2), which divides d_inner; None (the default) is the selective scan.
      scan_implementation: implementation of `kernels.selective_scan`; None selects the platform's preference.
    """

    d_state: int
    expand: int
    d_conv: int
    num_orders: int
    ssd_head: NotRequired[int | None]
    scan_implementation: NotRequired[str | None]


class MixerOptions(MixerSizes):
    """All keyword arguments that Self-Mamba and Cross-Mamba share.

    Attributes:
      dtype: type of the matrix products; parameters, the norm and the scan's carry stay float32.
      rngs: randomness of the initial parameters.
    """

    dtype: jnp.dtype
    rngs: nnx.Rngs


class _ScanArguments(TypedDict):
    """Arguments of `selective_scan`."""

    u: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array
    delta_bias: Array
    delta_softplus: bool


class OrderedScan(nnx.Module):
    """The selective scan of a grid along one path, with the projections that compute Δ, B and C.

    Δ and B are projected from the stream `drive`, C from the stream `readout`. Each path has its own parameters, as in
    VMamba (arXiv 2401.10166).

    Args:
      d_inner: channels of the scan.
      d_state: state dimension N.
      dt_rank: rank of the projection to Δ.
      implementation: implementation of `kernels.selective_scan`; None selects the platform's preference.
      dtype: type of the matrix products; parameters and the scan's carry stay float32.
      rngs: randomness of the initial parameters.
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

        bound = dt_rank**-0.5
        self.dt_proj = nnx.Param(
            jax.random.uniform(rngs.params(), (dt_rank, d_inner), jnp.float32, minval=-bound, maxval=bound)
        )
        self.dt_bias = nnx.Param(initial_dt_bias(d_inner, rngs))
        # S4D-real initialisation: A[d, n] = -(n + 1).
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1, d_state + 1, dtype=jnp.float32))[None], (d_inner, 1)))
        self.D = nnx.Param(jnp.ones((d_inner,), jnp.float32))

    def to_sequence(self, u: Grid, path: ScanPath | SplitScanPath) -> Array:
        """Returns the scan's input in the order of the path, (B, L, d_inner).

        Args:
          u: input of the scan, d_inner channels.
          path: order in which the tokens are scanned. With a `SplitScanPath`, the rows of the grid are sharded over
            the mesh axis `seq`, and this function and the next two leave arrays on the grid.
        """
        return u if isinstance(path, SplitScanPath) else path.to_sequence(u)

    def state(self, drive: Grid, path: ScanPath | SplitScanPath) -> tuple[Array, Array]:
        """Returns Δ, (B, L, d_inner), and B, (B, L, N), which determine what the state stores.

        Args:
          drive: stream that gives Δ and B, d_inner channels.
          path: as for `to_sequence`; if it is a `SplitScanPath`, Δ is not yet projected from its rank.
        """
        # Projections act on each token separately. Before the path, they leave fewer channels to reorder.
        dt, B = jnp.split(self.drive_proj(drive), [self.dt_rank], axis=-1)
        if isinstance(path, SplitScanPath):
            return dt, B
        return path.to_sequence(dt) @ self.dt_proj[...].astype(dt.dtype), path.to_sequence(B)

    def readout(self, readout: Grid, path: ScanPath | SplitScanPath) -> Array:
        """Returns C, (B, L, N), which determines what is read from the state.

        Args:
          readout: stream that gives C, d_inner channels.
          path: as for `to_sequence`.
        """
        return self.to_sequence(self.readout_proj(readout), path)

    def __call__(
        self, u: Array, state: tuple[Array, Array], C: Array, path: ScanPath | SplitScanPath, height: int, width: int
    ) -> Grid:
        """Returns the output of the scan on the grid, with the dtype of u.

        Args:
          u: result of `to_sequence`.
          state: result of `state`.
          C: result of `readout`.
          path: order in which the tokens are scanned.
          height: rows of the grid.
          width: columns of the grid.
        """
        parameters = {"A": -jnp.exp(self.A_log[...]), "D": self.D[...], "dt_bias": self.dt_bias[...]}
        if isinstance(path, SplitScanPath):
            parameters["dt_proj"] = self.dt_proj[...]
            return self._scan_in_parts(u, jnp.concatenate([*state, C], axis=-1), parameters, path)
        y = selective_scan(**_scan_arguments(u, *state, C, parameters), implementation=self.implementation)
        return path.to_grid(y, height, width)

    def _scan_in_parts(
        self, u: Grid, projected: Float[Array, "B H W P"], parameters: dict[str, Array], path: SplitScanPath
    ) -> Grid:
        """Returns the output of a scan in which each device scans its part of the sequence.

        The initial state of a part is the final state of the part before it.

        Args:
          u: input of the scan.
          projected: dt, B and C of each token, concatenated, so that devices exchange one array.
          parameters: of the scan, by name.
          path: order of the tokens, divided over the devices.
        """
        ends_of_dt_and_B = [self.dt_rank, self.dt_rank + self.d_state]

        def scan(u: Array, projected: Array, parameters: dict[str, Array], path: SplitScanPath) -> Array:
            width = u.shape[2]
            dt, B, C = jnp.split(path.to_sequence(projected), ends_of_dt_and_B, axis=-1)
            delta = dt @ parameters["dt_proj"].astype(dt.dtype)
            y, _ = sequence_parallel_scan(
                **_scan_arguments(path.to_sequence(u), delta, B, C, parameters),
                parts_reversed=jnp.asarray(path.parts_reversed),
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


def _scan_arguments(u: Array, delta: Array, B: Array, C: Array, parameters: dict[str, Array]) -> _ScanArguments:
    return {
        "u": u,
        "delta": delta,
        "A": parameters["A"],
        "B": B,
        "C": C,
        "D": parameters["D"],
        "delta_bias": parameters["dt_bias"],
        "delta_softplus": True,
    }


class _Mixer(Sublayer):
    """The common part of Self-Mamba and Cross-Mamba: everything but the choice of the scan's inputs.

    With Mamba's sizes, d_inner = expand * d_model and dt_rank = ceil(d_model / 16). For the arguments, see
    `MixerOptions`. The scan of each path is an `OrderedScan` or an `OrderedSsd`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        expand: int,
        d_conv: int,
        num_orders: int,
        ssd_head: int | None = None,
        scan_implementation: str | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.d_inner = expand * d_model
        self.in_proj = nnx.Linear(d_model, 2 * self.d_inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(self.d_inner, d_conv, rngs=rngs)
        dt_rank = math.ceil(d_model / 16)

        def make_scan() -> OrderedScan | OrderedSsd:
            if ssd_head is not None:
                return OrderedSsd(self.d_inner, d_state, ssd_head, dtype=dtype, rngs=rngs)
            return OrderedScan(
                self.d_inner, d_state, dt_rank, implementation=scan_implementation, dtype=dtype, rngs=rngs
            )

        self.scans = nnx.List([make_scan() for _ in range(num_orders)])
        self.out_norm = nnx.LayerNorm(self.d_inner, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.out_proj = nnx.Linear(self.d_inner, d_model, use_bias=False, dtype=dtype, rngs=rngs)

    def _gate(self, scanned: Iterable[Grid], z: Grid) -> Float[Array, "B H W M"]:
        return self.out_proj(self.out_norm(sum(scanned)).astype(z.dtype) * jax.nn.silu(z))


class SelfMamba(_Mixer):
    """Mixes the image tokens: u, Δ, B, C and the gate all come from the image.

    Its arguments are `d_model`, the channels of a token, and those of `MixerOptions`.
    """

    def __call__(self, x: Grid, read: None, paths: Paths) -> Grid:
        """Returns the mixed tokens, with the shape of x; `read` is not used.

        Args:
          x: tokens.
          read: not used.
          paths: the scan paths, as many as `num_orders`.
        """
        u, z = jnp.split(self.in_proj(x), 2, axis=-1)
        u = self.conv(u)
        side = u.shape[1:3]
        scanned = (
            scan(scan.to_sequence(u, path), scan.state(u, path), scan.readout(u, path), path, *side)
            for scan, path in zip(self.scans, paths, strict=True)
        )
        return self._gate(scanned, z)


class SkippingSelfMamba(SelfMamba):
    """Self-Mamba that adds its input, times a learned scale per channel, to its output.

    Args:
      d_model: channels of a token.
      mixer: as for `SelfMamba`.
    """

    def __init__(self, d_model: int, **mixer: Unpack[MixerOptions]):
        super().__init__(d_model, **mixer)
        self.skip_scale = nnx.Param(jnp.ones((d_model,), jnp.float32))

    def __call__(self, x: Grid, read: None, paths: Paths) -> Grid:
        """Returns the mixed tokens plus the scaled input; see `SelfMamba`."""
        return super().__call__(x, read, paths) + x * self.skip_scale[...].astype(x.dtype)[None, None, None]


class CrossMamba(_Mixer):
    """Conditions the image tokens on the mask, in linear time. The mask enters the denoiser only here.

    The scan's input u always comes from the mask features, and the gate from the image. With the wiring
    `state_from_mask`, Δ and B, which determine what the state stores, come from the mask, and C, which determines what
    is read from the state, comes from the image. With `readout_from_mask`, Δ and B come from the image and C from the
    mask. Both streams pass through the same convolution.

    Args:
      d_model: channels of an image token and of a mask feature.
      wiring: the streams from which Δ, B and C come.
      mixer: as for `SelfMamba`.
    """

    def __init__(
        self, d_model: int, *, wiring: Literal["state_from_mask", "readout_from_mask"], **mixer: Unpack[MixerOptions]
    ):
        super().__init__(d_model, **mixer)
        self._stores_mask = wiring == "state_from_mask"
        self.mask_proj = nnx.Linear(d_model, self.d_inner, use_bias=False, dtype=mixer["dtype"], rngs=mixer["rngs"])

    def read(self, condition: Condition, paths: Paths) -> list[tuple[Array, PyTree[Array]]]:
        """Returns, for each path, the scan's input u, and Δ and B or C, as far as they come from the mask features."""
        mask = self.conv(self.mask_proj(condition.mask))
        return [
            (scan.to_sequence(mask, path), scan.state(mask, path) if self._stores_mask else scan.readout(mask, path))
            for scan, path in zip(self.scans, paths, strict=True)
        ]

    def __call__(self, x: Grid, read: list[tuple[Array, PyTree[Array]]], paths: Paths) -> Grid:
        """Returns what the image tokens read from the mask, with the shape of x.

        Args:
          x: image tokens.
          read: result of `read`.
          paths: the scan paths, as many as `num_orders`.
        """
        image, z = jnp.split(self.in_proj(x), 2, axis=-1)
        image = self.conv(image)
        scanned = []
        for scan, (u, of_mask), path in zip(self.scans, read, paths, strict=True):
            state, C = (of_mask, scan.readout(image, path)) if self._stores_mask else (scan.state(image, path), of_mask)
            scanned.append(scan(u, state, C, path, *image.shape[1:3]))
        return self._gate(scanned, z)
