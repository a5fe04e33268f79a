"""What the Mosaic GPU kernels of `mosaic_gpu_kernels` are written with: layouts of registers, and the loop over tiles.

`Space` says how the threads of a program share an array, and how arrays with fewer axes follow from it. `Program` finds
the blocks of a program in memory, copies its tiles to shared memory and back, and exchanges carries between its warps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..typing import Array, Float, Index
from .mosaic_gpu_layout import WARPS, Operand, Problem, operands

# A reference, or the part of one that `.at` selects, whose type JAX does not export.
View = Any
Refs = dict[str, View]
Carry = TypeVar("Carry")
# Before JAX 0.11, loads took an index, and stores were always for any layout.
_OLD_ACCESS = jax.__version_info__ < (0, 11)
# Copies of a tile in shared memory: the next tile is copied while the program works on this one.
SLOTS = 2


@dataclasses.dataclass(frozen=True)
class Space:
    """The shape (W, rows, D) of a tile's arrays in registers, and how the threads share its entries.

    Args:
      shape: warps, time steps or states, channels.
      compiled: arrays have layouts; if False they are plain arrays, for the interpreter.
    """

    shape: tuple[int, int, int]
    compiled: bool

    def load(self, ref: View, axes: tuple[int, ...] = (0, 1, 2)) -> Float[Array, "..."]:
        """Returns the reference's array in float32, whose axes are those `axes` of the space."""
        if not self.compiled:
            return ref[...].astype(jnp.float32)
        # Not "optimized", because that refuses every access whose addresses have a conflict of banks.
        index = ((),) if _OLD_ACCESS else ()
        return plgpu.load(ref, *index, layout=self._layout(axes), optimized=False).astype(jnp.float32)

    def store(self, ref: View, x: Float[Array, "..."]) -> None:
        """Writes x to the reference, in its dtype."""
        x = x.astype(ref.dtype)
        if not self.compiled or _OLD_ACCESS:
            ref[...] = x
        else:
            plgpu.store(ref, x, optimized=False)  # pyright: ignore[reportAttributeAccessIssue] new in JAX 0.11

    def spread(self, x: Array, axes: tuple[int, ...]) -> Array:
        """Returns x, whose axes are those `axes` of the space, repeated along the other axes. It copies nothing."""
        return self._cast(lax.broadcast_in_dim(x, self.shape, axes), (0, 1, 2))

    def index(self, axis: int) -> Array:
        """Returns the index along the axis, int32, of this one axis."""
        return self._cast(lax.broadcasted_iota(jnp.int32, (self.shape[axis],), 0), (axis,))

    def zeros(self, axes: tuple[int, ...] = (0, 1, 2)) -> Float[Array, "..."]:
        """Returns zeros, whose axes are those `axes` of the space."""
        return self._cast(jnp.zeros([self.shape[axis] for axis in axes], jnp.float32), axes)

    def _cast(self, x: Array, axes: tuple[int, ...]) -> Array:
        return plgpu.layout_cast(x, self._layout(axes)) if self.compiled else x

    def _layout(self, axes: tuple[int, ...]) -> Any:
        # A warp has one index of the first axis. Its lanes are 4 rows x 8 runs of neighbouring channels.
        _, _, d = self.shape
        tiling = plgpu.Tiling(((WARPS, 4, d), (1, 4, d), (1, 1, d // 8)))
        # After the tiling, the axes are (W, 1, 1, 1, 4, 8, 1, 1, d/8), counted from the end.
        layout = fragmented_array.TiledLayout(tiling, (-9,), (-5, -4), -1, _check_canonical=False).canonicalize()
        whole = plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)
        absent = tuple(axis for axis in range(3) if axis not in axes)
        return whole.reduce(absent) if absent else whole


class Program:
    """The position of a program, its references, and how it goes through the tiles.

    Args:
      problem: the sizes and options.
      inputs: arrays in global memory by name; absent arguments have no entry.
      outputs: the same for what the kernel writes.
      scratch: shared memory by name, and "barriers", one per slot.
    """

    def __init__(self, problem: Problem, inputs: Refs, outputs: Refs, scratch: dict[str, Any]) -> None:
        sizes, compiled = problem.sizes, not problem.interpret
        self.problem, self.inputs, self.outputs, self.scratch = problem, inputs, outputs, scratch
        self.states = Space((WARPS, sizes.d_state, sizes.d_inner), compiled)
        self.tokens = Space((WARPS, sizes.steps, sizes.d_inner), compiled)
        if self.is_plain:
            self.group, self.example = pl.program_id(0), pl.program_id(1)
        else:
            self.group, self.example = lax.axis_index("group"), lax.axis_index("example")

    @property
    def is_plain(self) -> bool:
        """Whether there is one thread, and references to plain arrays: in Pallas's interpreter."""
        return self.problem.interpret is True

    def synchronize(self) -> None:
        """Waits until all threads have written to shared memory what they have to write."""
        if not self.is_plain:
            plgpu.commit_smem()

    @property
    def steps(self) -> list[int]:
        """The steps of a warp, in the order of the scan."""
        steps = list(range(self.problem.sizes.steps))
        return steps[::-1] if self.problem.reverse else steps

    def parameter(self, name: str, block: Index) -> View:
        """Returns the reference to a block's part of the array called `name`, which is read or written once."""
        ref = self.inputs[name] if name in self.inputs else self.outputs[name]
        d = self.problem.sizes.d_inner
        leading: list[Any] = [slice(None)] * (len(ref.shape) - 1)
        if name not in ("A", "D", "delta_bias"):
            leading[0] = self.example
        return ref.at[(*leading, pl.ds(block * d, d))]

    def for_tiles(
        self, body: Callable[[Index, Refs, Carry], Carry], carry: Carry, block: Index, backward: bool = False
    ) -> Carry:
        """Returns the carry after `carry = body(tile, refs, carry)` for each tile.

        Args:
          body: receives the number of the tile, references to its inputs and outputs in shared memory, and the carry.
          carry: the first carry.
          block: number of the block of channels.
          backward: visit the tiles in the opposite order of the scan.
        """
        tiles, layouts = self.problem.tiles, operands(self.problem)
        # The interpreter of plain arrays has no barriers.
        buffers: Refs = self.scratch["buffers"]
        barriers: Any = self.scratch.get("barriers")

        def tile_of(i: Index) -> Index:
            return tiles - 1 - i if backward != self.problem.reverse else i

        def window(layout: Operand, i: Index) -> tuple[Any, ...]:
            place = dict(tile=tile_of(i), block=block, example=self.example, group=self.group)
            return layout.window(self.problem.sizes, **place)

        def fetch(i: Index, slot: Index) -> None:
            for name in self.reads:
                source = self.outputs[name[4:]] if name.startswith("old ") else self.inputs[name]
                source, target = source.at[window(layouts[name.removeprefix("old ")], i)], buffers[name].at[slot]
                if self.is_plain:
                    target[...] = source[...]
                else:
                    plgpu.copy_gmem_to_smem(source, target, barriers.at[slot])

        def send(i: Index, slot: Index) -> None:
            for name in self.writes:
                source, target = buffers[name].at[slot], self.outputs[name].at[window(layouts[name], i)]
                if self.is_plain:
                    target[...] = source[...]
                else:
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)
            if not self.is_plain:
                plgpu.commit_smem_to_gmem_group()

        def wait_for_sent(tiles: int, reads_only: bool) -> None:
            if not self.is_plain:
                plgpu.wait_smem_to_gmem(tiles, wait_read_only=reads_only)

        def step(i: Index, carry: Carry) -> Carry:
            slot = lax.rem(i, SLOTS)
            if not self.is_plain:
                plgpu.barrier_wait(barriers.at[slot])
            # The outputs of the tile that last used this slot have left it.
            wait_for_sent(SLOTS - 1, reads_only=True)
            carry = body(tile_of(i), {name: buffer.at[slot] for name, buffer in buffers.items()}, carry)
            # All warps have read and written the slot.
            self.synchronize()
            send(i, slot)
            pl.when(i + SLOTS < tiles)(lambda: fetch(i + SLOTS, slot))
            return carry

        for i in range(min(SLOTS, tiles)):
            fetch(jnp.int32(i), i)
        carry = lax.fori_loop(0, tiles, step, carry)
        wait_for_sent(0, reads_only=False)
        return carry

    @property
    def reads(self) -> list[str]:
        """The names of the buffers that are filled for each tile."""
        layouts = operands(self.problem)
        old = [f"old {name}" for name in self.outputs if name in ("dB", "dC") and self.problem.rounds > 1]
        return [name for name in self.inputs if name in layouts] + old

    @property
    def writes(self) -> list[str]:
        """The names of the buffers that are written for each tile."""
        layouts = operands(self.problem)
        return [name for name in self.outputs if name in layouts]

    def over_channels(self, x: Float[Array, "W D"]) -> Float[Array, "W N D"]:
        """Returns one value per warp and channel as an array of states."""
        return self.states.spread(x, (0, 2))

    def channels(self, ref: View, step: int) -> Float[Array, "W N D"]:
        """Returns a step's values per channel, as an array of states."""
        return self.over_channels(self.states.load(ref.at[:, step], (0, 2)))

    def projection(self, ref: View, step: int) -> Float[Array, "W N D"]:
        """Returns a step's values per state entry, as an array of states."""
        return self.states.spread(self.states.load(ref.at[:, step], (0, 1)), (0, 1))

    def write_sum(self, ref: View, step: int, x: Float[Array, "W N D"], axis: int) -> None:
        """Writes the sum of x over the axis to a step of the reference."""
        self.states.store(ref.at[:, step], jnp.sum(x, axis=axis))

    def per_channel(self, name: str, block: Index) -> Float[Array, "W T D"]:
        """Returns the parameter `name`, D or delta_bias, as an array of a tile's tokens."""
        # Loaded for each tile, from cache, instead of being held in registers.
        return self.tokens.spread(self.tokens.load(self.parameter(name, block), (2,)), (2,))

    def step_size(self, delta: View, tile: Index, block: Index) -> tuple[Array, Array]:
        """Returns delta + delta_bias, and Δ, which is zero outside the sequence: the state then stays unchanged."""
        biased = self.tokens.load(delta)
        if "delta_bias" in self.inputs:
            biased += self.per_channel("delta_bias", block)
        return biased, self.zero_outside(softplus(biased) if self.problem.delta_softplus else biased, tile)

    def zero_outside(self, x: Float[Array, "W T D"], tile: Index) -> Float[Array, "W T D"]:
        """Returns x with zeros at the tokens outside the sequence."""
        sizes, length = self.problem.sizes, self.problem.length
        if length % sizes.tile == 0:
            return x
        tokens = self.tokens
        row = tokens.spread(tokens.index(0), (0,)) * sizes.steps + tokens.spread(tokens.index(1), (1,))
        return jnp.where(row < length - tile * sizes.tile, x, 0.0)

    def across_warps(
        self, ends: View, carry: Float[Array, "N D"], backward: bool = False
    ) -> tuple[Float[Array, "W N D"], Float[Array, "N D"]]:
        """Returns each warp's carry at its start, and the carry after all warps.

        Args:
          ends: each warp's carry at its end if its start is zero. The product of its decays is in scratch "decay".
          carry: before the first warp.
          backward: from the last warp in the order of the scan to the first.
        """
        states = self.states
        warps = list(range(WARPS))
        warp, start = states.index(0), states.spread(carry, (1, 2))
        for i in warps[::-1] if backward != self.problem.reverse else warps:
            # Every warp computes all carries, and keeps its own.
            start = jnp.where(states.spread(warp == i, (0,)), states.spread(carry, (1, 2)), start)
            decay = states.load(self.scratch["decay"].at[i], (1, 2))
            carry = decay * carry + states.load(ends.at[i], (1, 2))
        return start, carry


def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns log(1 + exp(x)), accurate also where it is small."""
    # log1p(e) = 2 atanh(s) with s = e / (2 + e) <= 1/3. The GPU's fast logarithm has an absolute error of 2^-22, which
    # is not small beside a small step size. The first omitted term is 2e-9 of the sum.
    e = jnp.exp(-jnp.abs(x))
    s = e / (2.0 + e)
    square, series = s * s, 1.0 / 15
    for power in range(13, 0, -2):
        series = series * square + 1.0 / power
    return jnp.maximum(x, 0.0) + 2.0 * s * series


def sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns 1 / (1 + exp(-x)): zero where the exponential overflows."""
    return 1.0 / (1.0 + jnp.exp(-x))
