"""The bodies of the CUDA kernels: what one program does; see `pallas_gpu`.

`inputs` and `outputs` are references to a program's blocks by name; an optional argument that is absent has none.
Everything inside is float32.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


class Program:
    """Where a program is, and how it goes through time, reads and writes."""

    def __init__(self, problem):
        self.problem = problem
        sizes, (block, self.chunk) = problem.sizes, (pl.program_id(0), pl.program_id(1))
        self.is_last = self.chunk == (0 if problem.reverse else problem.chunks - 1)
        self.channel_mask = _mask(block * sizes.d_inner, sizes.d_inner, problem.d_inner)
        self.state_mask = _mask(0, sizes.d_state, problem.d_state)

    def for_groups(self, body, carry, backward=False):
        """carry = body(i, rows, carry) for each group of steps; rows are its steps' in the order of the scan."""
        reverse, steps, chunk = self.problem.reverse, self.problem.sizes.steps, self.problem.sizes.chunk
        groups = chunk // steps

        def group(i, carry):
            i = groups - 1 - i if backward else i
            rows = [i * steps + step for step in range(steps)]
            return body(i, [chunk - 1 - row for row in rows] if reverse else rows, carry)

        return jax.lax.fori_loop(0, groups, group, carry)

    def channels(self, ref, row):
        """A row of a sequence in float32, with zeros outside."""
        return _read(ref, row, _both(self._is_inside(row), self.channel_mask))

    def states(self, ref, row):
        """A row of a projection in float32, as (d_state, 1), with zeros outside."""
        return _read(ref, row, _both(self._is_inside(row), self.state_mask))[:, None]

    def write_channels(self, ref, row, x):
        mask = _both(self._is_inside(row), self.channel_mask)
        plt.store(ref.at[row], x.astype(ref.dtype), mask=None if mask is None else jnp.broadcast_to(mask, x.shape))

    def biased(self, inputs, row):
        """delta + delta_bias."""
        delta = self.channels(inputs["delta"], row)
        return delta + inputs["delta_bias"][...] if "delta_bias" in inputs else delta

    def step_size(self, biased, row):
        """Δ; zero outside the sequence, so that states pass unchanged."""
        if self.problem.delta_softplus:
            biased = jnp.maximum(biased, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(biased)))
        return self._zero_outside(biased, row)

    def biased_gradient(self, d_step_size, biased, row):
        """The gradient by delta + delta_bias from that by Δ."""
        if self.problem.delta_softplus:
            d_step_size *= jax.nn.sigmoid(biased)
        return self._zero_outside(d_step_size, row)

    def sequences(self, inputs, rows):
        """[(row, u, Δ)]: all are read before the first is used, so that they arrive together."""
        u = [self.channels(inputs["u"], row) for row in rows]
        step_sizes = [self.step_size(self.biased(inputs, row), row) for row in rows]
        return list(zip(rows, u, step_sizes, strict=True))

    def _is_inside(self, row):
        """Whether the sequence has this row; None if it has all rows of all chunks."""
        length, chunk = self.problem.length, self.problem.sizes.chunk
        return None if length % chunk == 0 else self.chunk * chunk + row < length

    def _zero_outside(self, x, row):
        is_inside = self._is_inside(row)
        return x if is_inside is None else jnp.where(is_inside, x, 0.0)


def _mask(start, size, total):
    return None if total % size == 0 else start + jnp.arange(size, dtype=jnp.int32) < total


def _both(a, b):
    return b if a is None else a if b is None else a & b


def _read(ref, row, mask):
    if mask is None:
        return ref[row].astype(jnp.float32)
    return plt.load(ref.at[row], mask=jnp.broadcast_to(mask, ref.shape[1:]), other=0.0).astype(jnp.float32)


def _decay(step_size, A):
    """exp(Δ A), for an A that is multiplied by log2(e): the GPU has an instruction for powers of two."""
    return jnp.exp2(step_size[None, :] * A)


def summarize(program, inputs, outputs):
    """A chunk's state at its end, had it started with zeros, and its ΣΔ."""
    A = inputs["A"][...]

    def group(_, rows, carry):
        h, step_sum = carry
        for row, u, step_size in program.sequences(inputs, rows):
            h = _decay(step_size, A) * h + (step_size * u)[None, :] * program.states(inputs["B"], row)
            step_sum += step_size
        return h, step_sum

    carry = (jnp.zeros_like(A), jnp.zeros(A.shape[1:], A.dtype))
    outputs["end"][...], outputs["step_sum"][...] = program.for_groups(group, carry)


def combine(program, inputs, outputs):
    """The state at each chunk's start, that after the last, from all chunks' `summarize`."""
    A, chunks = inputs["A"][...], program.problem.chunks

    def chunk(i, h):
        i = chunks - 1 - i if program.problem.reverse else i
        outputs["starts"][i] = h
        return _decay(inputs["step_sums"][i], A) * h + inputs["ends"][i]

    outputs["last"][...] = jax.lax.fori_loop(0, chunks, chunk, inputs["first"][...])


def forward(program, inputs, outputs):
    """y, and the state after the last chunk."""
    A = inputs["A"][...]

    def group(_, rows, h):
        outcomes = []
        for row, u, step_size in program.sequences(inputs, rows):
            h = _decay(step_size, A) * h + (step_size * u)[None, :] * program.states(inputs["B"], row)
            outcomes.append((row, u, jnp.sum(h * program.states(inputs["C"], row), axis=0)))
        for row, u, y in outcomes:
            if "D" in inputs:
                y += inputs["D"][...] * u
            if "z" in inputs:
                y *= jax.nn.silu(program.channels(inputs["z"], row))
            program.write_channels(outputs["y"], row, y)
        return h

    h = program.for_groups(group, inputs["start"][...])

    @pl.when(program.is_last)
    def _():
        outputs["final_state"][...] = h


def summarize_adjoint(program, inputs, outputs):
    """A chunk's carry at its start (see `backward`), had it ended with zeros, its ΣΔ, and its groups' first states.

    Forward in time, for with zeros at the end the carry at the start is Σ_t exp(A Σ_{s≤t} Δ_s) dy_t C_t.
    """
    A = inputs["A"][...]

    def group(i, rows, carry):
        h, decay_so_far, adjoint, step_sum = carry
        outputs["group_starts"][i] = h
        for row, u, step_size in program.sequences(inputs, rows):
            decay = _decay(step_size, A)
            h = decay * h + (step_size * u)[None, :] * program.states(inputs["B"], row)
            dy = program.channels(inputs["dy"], row)
            if "z" in inputs:
                dy *= jax.nn.silu(program.channels(inputs["z"], row))
            decay_so_far *= decay
            adjoint += decay_so_far * dy[None, :] * program.states(inputs["C"], row)
            step_sum += step_size
        return h, decay_so_far, adjoint, step_sum

    carry = (inputs["start"][...], jnp.ones_like(A), jnp.zeros_like(A), jnp.zeros(A.shape[1:], A.dtype))
    _, _, outputs["end"][...], outputs["step_sum"][...] = program.for_groups(group, carry)


def backward(program, inputs, outputs):
    """The adjoint recurrence from a chunk's last step to its first.

    Let carry_t be the loss's gradient by h_{t-1} through step t, so that by h_t is g_t:

        g_t         = carry_{t+1} + dy_t C_t
        carry_t     = exp(Δ_t A) g_t
        dC_t        = Σ_d h_t dy_t
        dB_t        = Σ_d g_t Δ_t u_t
        d(Δ_t u_t)  = Σ_n g_t B_t
        d(Δ_t A)    = carry_t h_{t-1}

    where dy_t is the gradient by the gate's input, D u_t + Σ_n h_t C_t. Here `start` is the carry at the chunk's end.

    The order of what follows matters to the compiler: reading rows earlier than they are used spills registers.
    """
    A = inputs["A"][...]

    def replay(rows, h):
        """The states before, between and after the rows' steps."""
        states = [h]
        for row in rows:
            step_size = program.step_size(program.biased(inputs, row), row)
            drive = (step_size * program.channels(inputs["u"], row))[None, :]
            h = _decay(step_size, A) * h + drive * program.states(inputs["B"], row)
            states.append(h)
        return states

    def adjoint(rows, h, carry):
        states = replay(rows, h)
        carry, dA, dD, ddelta_bias = carry
        for row in reversed(rows):
            h_t = states.pop()
            u, dy = program.channels(inputs["u"], row), program.channels(inputs["dy"], row)
            C = program.states(inputs["C"], row)
            if "z" in inputs:
                z = program.channels(inputs["z"], row)
                y = jnp.sum(h_t * C, axis=0)
                if "D" in inputs:
                    y += inputs["D"][...] * u
                sigmoid = jax.nn.sigmoid(z)
                program.write_channels(outputs["dz"], row, dy * y * sigmoid * (1.0 + z * (1.0 - sigmoid)))
                dy *= z * sigmoid
            outputs["dC"][row] = jnp.sum(h_t * dy[None, :], axis=1)
            biased = program.biased(inputs, row)
            step_size = program.step_size(biased, row)
            g = carry + dy[None, :] * C
            outputs["dB"][row] = jnp.sum(g * (step_size * u)[None, :], axis=1)
            d_drive = jnp.sum(g * program.states(inputs["B"], row), axis=0)
            carry = _decay(step_size, A) * g
            d_exponent = carry * states[-1]
            dA = dA + d_exponent * step_size[None, :]
            d_step_size = d_drive * u + math.log(2) * jnp.sum(d_exponent * A, axis=0)
            ddelta = program.biased_gradient(d_step_size, biased, row)
            program.write_channels(outputs["ddelta"], row, ddelta)
            ddelta_bias += ddelta
            du = d_drive * step_size
            if "D" in inputs:
                dD += dy * u
                du += dy * inputs["D"][...]
            program.write_channels(outputs["du"], row, du)
        return carry, dA, dD, ddelta_bias

    def in_halves(rows, read_start, carry):
        # Four steps' states at once would spill registers. A start is read again rather than kept meanwhile.
        if len(rows) <= 2:
            return adjoint(rows, read_start(), carry)
        half = len(rows) // 2
        middle = replay(rows[:half], read_start())[-1]
        carry = in_halves(rows[half:], lambda: middle, carry)
        return in_halves(rows[:half], read_start, carry)

    def group(i, rows, carry):
        return in_halves(rows, lambda: inputs["group_starts"][i], carry)

    zeros = jnp.zeros(A.shape[1:], A.dtype)
    carry = (inputs["start"][...], jnp.zeros_like(A), zeros, zeros)
    _, outputs["dA"][...], dD, ddelta_bias = program.for_groups(group, carry, backward=True)
    if "D" in inputs:
        outputs["dD"][...] = dD
    if "delta_bias" in inputs:
        outputs["ddelta_bias"][...] = ddelta_bias
