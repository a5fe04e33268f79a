"""The bodies of the CUDA kernels: what one program, a warp, does with its blocks; see `pallas_gpu`.

`inputs` and `outputs` are references to the program's blocks by name, in global memory and with the block shapes of
`pallas_gpu_layout`; an optional argument that is absent has no entry. Values, such as the state `h`, are in registers,
spread over the 32 lanes of the warp. Everything inside is float32, because it accumulates over the sequence.

In annotations N and D are the sizes of a block: padded state entries, and channels.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from ..typing import Array, Bool, Float, Index, Ref
from .pallas_gpu_layout import Problem

Refs = dict[str, Ref]
Carry = TypeVar("Carry")
# (carry, dA so far, dD so far, d delta_bias so far) of the backward kernel.
AdjointCarry = tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, " D"], Float[Array, " D"]]


class Program:
    """The position of a program in the grid, and how it steps through time, reads and writes.

    A "row" is the position of a time step in the chunk's blocks. Masks are None where the blocks divide the array
    evenly: this is known at trace time, and the kernel then contains plain loads and stores.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        # Axis 2 of the grid, the example, needs no attribute: the index maps select it, and no axis of a block is left.
        sizes, (block, self.chunk) = problem.sizes, (problem.first_block + pl.program_id(0), pl.program_id(1))
        # The last chunk in the order of the scan.
        self.is_last = self.chunk == (0 if problem.reverse else problem.chunks - 1)
        self.channel_mask = _mask(block * sizes.d_inner, sizes.d_inner, problem.d_inner)
        self.state_mask = _mask(0, sizes.d_state, problem.d_state)

    def for_groups(
        self, body: Callable[[Index, list[Index], Carry], Carry], carry: Carry, backward: bool = False
    ) -> Carry:
        """Returns the carry after `carry = body(i, rows, carry)` for each group of steps of the chunk.

        Bodies unroll the steps of a group, so that the compiler overlaps the loads of one step with the arithmetic of
        another.

        Args:
          body: receives the number of the group in the order of the scan, the rows of the group's steps in the order of
            the scan, and the carry.
          carry: the first carry.
          backward: visit the groups in the opposite order of the scan.
        """
        reverse, steps, chunk = self.problem.reverse, self.problem.sizes.steps, self.problem.sizes.chunk
        groups = chunk // steps

        # A loop over groups, because unrolling a complete chunk of 32 steps or more would make large code and slow
        # compilation without more overlap.
        def group(i: Index, carry: Carry) -> Carry:
            i = groups - 1 - i if backward else i
            rows = [i * steps + step for step in range(steps)]
            return body(i, [chunk - 1 - row for row in rows] if reverse else rows, carry)

        return jax.lax.fori_loop(0, groups, group, carry)

    def channels(self, ref: Ref, row: Index) -> Float[Array, " D"]:
        """Returns row `row` of a sequence's block in float32, with zeros outside the array."""
        return _read(ref, row, _both(self._is_inside(row), self.channel_mask))

    def states(self, ref: Ref, row: Index) -> Float[Array, "N 1"]:
        """Returns row `row` of a projection's block in float32, as a column, with zeros outside the array."""
        return _read(ref, row, _both(self._is_inside(row), self.state_mask))[:, None]

    def write_channels(self, ref: Ref, row: Index, x: Float[Array, " D"]) -> None:
        """Writes x to row `row` of a sequence's block, rounded to its dtype; nothing outside the array."""
        mask = _both(self._is_inside(row), self.channel_mask)
        # plt.load and plt.store take masks, unlike indexing a reference. A mask has the shape of the value.
        plt.store(ref.at[row], x.astype(ref.dtype), mask=None if mask is None else jnp.broadcast_to(mask, x.shape))

    def biased(self, inputs: Refs, row: Index) -> Float[Array, " D"]:
        """Returns delta + delta_bias of a row, in float32."""
        delta = self.channels(inputs["delta"], row)
        # delta_bias, like D, is loaded for each row, from cache, instead of being held in registers.
        return delta + inputs["delta_bias"][...] if "delta_bias" in inputs else delta

    def step_size(self, biased: Float[Array, " D"], row: Index) -> Float[Array, " D"]:
        """Returns Δ from delta + delta_bias. It is zero outside the sequence, where the state then stays unchanged."""
        if self.problem.delta_softplus:
            # log(1 + exp(x)) without overflow: the exponential's argument is never positive.
            biased = jnp.maximum(biased, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(biased)))
        return self._zero_outside(biased, row)

    def biased_gradient(
        self, d_step_size: Float[Array, " D"], biased: Float[Array, " D"], row: Index
    ) -> Float[Array, " D"]:
        """Returns the gradient of delta + delta_bias from the gradient of Δ; zero outside the sequence."""
        if self.problem.delta_softplus:
            d_step_size *= jax.nn.sigmoid(biased)
        return self._zero_outside(d_step_size, row)

    def sequences(self, inputs: Refs, rows: list[Index]) -> list[tuple[Index, Float[Array, " D"], Float[Array, " D"]]]:
        """Returns (row, u, Δ) for each of the rows. All loads come before the first use of a value: they overlap."""
        # u and Δ do not depend on the state, so a step waits only for the step before it, not for memory.
        u = [self.channels(inputs["u"], row) for row in rows]
        step_sizes = [self.step_size(self.biased(inputs, row), row) for row in rows]
        return list(zip(rows, u, step_sizes, strict=True))

    def _is_inside(self, row: Index) -> Bool[Array, ""] | None:
        """Whether the row is inside the sequence; None if all rows of all chunks are."""
        length, chunk = self.problem.length, self.problem.sizes.chunk
        return None if length % chunk == 0 else self.chunk * chunk + row < length

    def _zero_outside(self, x: Float[Array, " D"], row: Index) -> Float[Array, " D"]:
        is_inside = self._is_inside(row)
        return x if is_inside is None else jnp.where(is_inside, x, 0.0)


def _mask(start: Index, size: int, total: int) -> Bool[Array, " size"] | None:
    """Which entries of the block that begins at start are inside an axis of `total` entries; None if always all."""
    # int32 also where 64-bit types are enabled.
    return None if total % size == 0 else start + jnp.arange(size, dtype=jnp.int32) < total


def _both(a: Bool[Array, "..."] | None, b: Bool[Array, "..."] | None) -> Bool[Array, "..."] | None:
    """a & b, where None is true."""
    return b if a is None else a if b is None else a & b


def _read(ref: Ref, row: Index, mask: Bool[Array, "..."] | None) -> Float[Array, " width"]:
    """A row of a block, in float32. Masked entries are not loaded, and are zero."""
    if mask is None:
        return ref[row].astype(jnp.float32)
    return plt.load(ref.at[row], mask=jnp.broadcast_to(mask, ref.shape[1:]), other=0.0).astype(jnp.float32)


def _decay(step_size: Float[Array, " D"], A: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """exp(Δ A), for an A that is multiplied by log2 e: the GPU's instruction for exponentials has base 2."""
    return jnp.exp2(step_size[None, :] * A)


def summarize(program: Program, inputs: Refs, outputs: Refs) -> None:
    """Writes `end`, the state after the chunk's last step if the chunk starts from zero, and `step_sum`, its ΣΔ."""
    # Reads the blocks u, delta (chunk, D), B (chunk, N), delta_bias (D,) and A (N, D). Writes end (N, D) and step_sum
    # (D,). A and h stay in registers for the complete chunk: 16 entries of each per lane.
    A = inputs["A"][...]

    def group(
        _: Index, rows: list[Index], carry: tuple[Float[Array, "N D"], Float[Array, " D"]]
    ) -> tuple[Float[Array, "N D"], Float[Array, " D"]]:
        h, step_sum = carry
        for row, u, step_size in program.sequences(inputs, rows):
            h = _decay(step_size, A) * h + (step_size * u)[None, :] * program.states(inputs["B"], row)
            # `combine` computes the product of the chunk's decays from ΣΔ, as one exponential. ΣΔ has D entries, the
            # product has N x D.
            step_sum += step_size
        return h, step_sum

    carry = (jnp.zeros_like(A), jnp.zeros(A.shape[1:], A.dtype))
    outputs["end"][...], outputs["step_sum"][...] = program.for_groups(group, carry)


def combine(program: Program, inputs: Refs, outputs: Refs) -> None:
    """Writes `starts`, the state at each chunk's start, and `last`, the state after all chunks.

    One program goes through all chunks of its block of channels. Its loop has one iteration per chunk instead of one
    per step, so this sequential part is short.
    """
    # Reads A and first (N, D), ends (chunks, N, D) and step_sums (chunks, D). Writes starts (chunks, N, D) and last
    # (N, D).
    A, chunks = inputs["A"][...], program.problem.chunks

    def chunk(i: Index, h: Float[Array, "N D"]) -> Float[Array, "N D"]:
        i = chunks - 1 - i if program.problem.reverse else i
        outputs["starts"][i] = h
        # The product of a chunk's decays is exp(A ΣΔ): it underflows to zero at worst, and is never divided by.
        return _decay(inputs["step_sums"][i], A) * h + inputs["ends"][i]

    outputs["last"][...] = jax.lax.fori_loop(0, chunks, chunk, inputs["first"][...])


def forward(program: Program, inputs: Refs, outputs: Refs) -> None:
    """Writes y of a chunk, from the chunk's start state, and the state after the last chunk."""
    # Reads u, delta, z (chunk, D), B, C (chunk, N), D, delta_bias (D,), A and start (N, D). Writes y (chunk, D) and
    # final_state (N, D).
    A = inputs["A"][...]

    def group(_: Index, rows: list[Index], h: Float[Array, "N D"]) -> Float[Array, "N D"]:
        outcomes = []
        for row, u, step_size in program.sequences(inputs, rows):
            h = _decay(step_size, A) * h + (step_size * u)[None, :] * program.states(inputs["B"], row)
            # The sum over state entries: 4 within each lane, then shuffles between lanes.
            outcomes.append((row, u, jnp.sum(h * program.states(inputs["C"], row), axis=0)))
        # Each step of the group depends on the step before. Skip, gate and stores come after all of them, so that they
        # do not lengthen this chain.
        for row, u, y in outcomes:
            if "D" in inputs:
                y += inputs["D"][...] * u
            if "z" in inputs:
                y *= jax.nn.silu(program.channels(inputs["z"], row))
            program.write_channels(outputs["y"], row, y)
        return h

    h = program.for_groups(group, inputs["start"][...])

    # All chunks of an example share the block of final_state; only the last one in the order of the scan writes it.
    @pl.when(program.is_last)
    def _() -> None:
        outputs["final_state"][...] = h


def summarize_adjoint(program: Program, inputs: Refs, outputs: Refs) -> None:
    """Writes what `combine` and `backward` need of a chunk: `end`, `step_sum` and `group_starts`.

    `end` is the adjoint's carry (see `backward`) at the start of the chunk if the carry at its end is zero:
    Σ_t exp(A Σ_{s≤t} Δ_s) dy_t C_t. `step_sum` is ΣΔ. The sum for `end` runs in the order of the scan, so the same loop
    recomputes the states and writes `group_starts`, the state before each group of steps.
    """
    # Reads u, delta, z, dy (chunk, D), B, C (chunk, N), delta_bias (D,), A and start (N, D), here the state before the
    # chunk. Writes end (N, D), step_sum (D,) and group_starts (groups, N, D).
    A = inputs["A"][...]

    def group(
        i: Index,
        rows: list[Index],
        carry: tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, "N D"], Float[Array, " D"]],
    ) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, "N D"], Float[Array, " D"]]:
        h, decay_so_far, adjoint, step_sum = carry
        # Written before the group's steps; `backward` recomputes the states within the group from it.
        outputs["group_starts"][i] = h
        for row, u, step_size in program.sequences(inputs, rows):
            decay = _decay(step_size, A)
            h = decay * h + (step_size * u)[None, :] * program.states(inputs["B"], row)
            dy = program.channels(inputs["dy"], row)
            if "z" in inputs:
                dy *= jax.nn.silu(program.channels(inputs["z"], row))
            # exp(A Σ_{s≤t} Δ_s). Where it underflows to zero, the carry does not reach the chunk's start.
            decay_so_far *= decay
            adjoint += decay_so_far * dy[None, :] * program.states(inputs["C"], row)
            step_sum += step_size
        return h, decay_so_far, adjoint, step_sum

    carry = (inputs["start"][...], jnp.ones_like(A), jnp.zeros_like(A), jnp.zeros(A.shape[1:], A.dtype))
    _, _, outputs["end"][...], outputs["step_sum"][...] = program.for_groups(group, carry)


def backward(program: Program, inputs: Refs, outputs: Refs) -> None:
    """The adjoint recurrence of a chunk, from its last step to its first.

    Let carry_t be the gradient of the loss with respect to h_{t-1}, through step t and all later steps, and dy_t the
    gradient with respect to the input of the gate, D u_t + C_t · h_t:

        g_t         = carry_{t+1} + dy_t C_t           the gradient with respect to h_t
        carry_t     = exp(Δ_t A) g_t
        dC_t        = Σ_d h_t dy_t
        dB_t        = Σ_d g_t Δ_t u_t
        d(Δ_t u_t)  = Σ_n g_t B_t
        d(Δ_t A)    = carry_t h_{t-1}

    Here `start` is the carry at the chunk's end, from `combine`. States are recomputed within each group from
    `group_starts`. dA, dD and ddelta_bias are sums over the chunk, which XLA adds up after the kernel.

    The order of statements matters. About ten arrays of 16 registers per lane are alive at once, and the compiler
    spills registers if rows are loaded earlier than they are used. So small rows are loaded where they are used, more
    than once, and come from the cache.
    """
    # Reads what `summarize_adjoint` reads, D (D,) and group_starts (groups, N, D). Writes du, ddelta, dz (chunk, D),
    # dB, dC (chunk, N), dA (N, D), dD and ddelta_bias (D,).
    A = inputs["A"][...]

    def replay(rows: list[Index], h: Float[Array, "N D"]) -> list[Float[Array, "N D"]]:
        """The states before the first row's step and after each step."""
        states = [h]
        for row in rows:
            step_size = program.step_size(program.biased(inputs, row), row)
            drive = (step_size * program.channels(inputs["u"], row))[None, :]
            h = _decay(step_size, A) * h + drive * program.states(inputs["B"], row)
            states.append(h)
        return states

    def adjoint(rows: list[Index], h: Float[Array, "N D"], accumulated: AdjointCarry) -> AdjointCarry:
        """The steps of the rows, from the last to the first; h is the state before the first."""
        states = replay(rows, h)
        carry, dA, dD, ddelta_bias = accumulated
        for row in reversed(rows):
            # h_t; the last of the remaining states is then h_{t-1}.
            h_t = states.pop()
            u, dy = program.channels(inputs["u"], row), program.channels(inputs["dy"], row)
            C = program.states(inputs["C"], row)
            if "z" in inputs:
                z = program.channels(inputs["z"], row)
                # The input of the gate, which the forward pass does not keep.
                y = jnp.sum(h_t * C, axis=0)
                if "D" in inputs:
                    y += inputs["D"][...] * u
                # silu(z) = z σ(z), so its derivative is σ(z) (1 + z (1 - σ(z))).
                sigmoid = jax.nn.sigmoid(z)
                program.write_channels(outputs["dz"], row, dy * y * sigmoid * (1.0 + z * (1.0 - sigmoid)))
                dy *= z * sigmoid
            # Sums over the block's channels. dB and dC are padded to complete chunks and states: no mask is needed.
            outputs["dC"][row] = jnp.sum(h_t * dy[None, :], axis=1)
            biased = program.biased(inputs, row)
            step_size = program.step_size(biased, row)
            g = carry + dy[None, :] * C
            outputs["dB"][row] = jnp.sum(g * (step_size * u)[None, :], axis=1)
            d_drive = jnp.sum(g * program.states(inputs["B"], row), axis=0)
            # The decay is computed again: keeping it from `replay` would take 16 more registers per step.
            carry = _decay(step_size, A) * g
            d_exponent = carry * states[-1]
            dA = dA + d_exponent * step_size[None, :]
            # A here is A log2 e, and log2 e ln 2 = 1: the factor restores the gradient through Δ A.
            d_step_size = d_drive * u + math.log(2) * jnp.sum(d_exponent * A, axis=0)
            ddelta = program.biased_gradient(d_step_size, biased, row)
            program.write_channels(outputs["ddelta"], row, ddelta)
            # Zero outside the sequence, by `biased_gradient`; dD too, because dy and u are.
            ddelta_bias += ddelta
            du = d_drive * step_size
            if "D" in inputs:
                dD += dy * u
                du += dy * inputs["D"][...]
            program.write_channels(outputs["du"], row, du)
        return carry, dA, dD, ddelta_bias

    def in_halves(rows: list[Index], read_start: Callable[[], Array], carry: AdjointCarry) -> AdjointCarry:
        """`adjoint` of the rows, by halves, the later half first, down to two steps at a time."""
        # The states of four steps at once would spill registers. With two steps at a time, and groups of eight, a state
        # is recomputed up to three times. `read_start` reads the start from memory again, because keeping it would take
        # 16 registers.
        if len(rows) <= 2:
            return adjoint(rows, read_start(), carry)
        half = len(rows) // 2
        middle = replay(rows[:half], read_start())[-1]
        carry = in_halves(rows[half:], lambda: middle, carry)
        return in_halves(rows[:half], read_start, carry)

    def group(i: Index, rows: list[Index], carry: AdjointCarry) -> AdjointCarry:
        return in_halves(rows, lambda: inputs["group_starts"][i], carry)

    # The sums stay in registers for the complete chunk and are written once. Each program writes a block of its own.
    zeros = jnp.zeros(A.shape[1:], A.dtype)
    carry = (inputs["start"][...], jnp.zeros_like(A), zeros, zeros)
    _, outputs["dA"][...], dD, ddelta_bias = program.for_groups(group, carry, backward=True)
    if "D" in inputs:
        outputs["dD"][...] = dD
    if "delta_bias" in inputs:
        outputs["ddelta_bias"][...] = ddelta_bias
