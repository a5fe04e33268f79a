"""The selective scan chunk by chunk in plain XLA: the default on CPU, and correct on any backend.

The recurrence is that of `reference.py`, h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t · h_t. The forward pass
steps through time and keeps the state at the start of each chunk. The backward pass recomputes a chunk's decays and
states from there, so that no array of size (batch, length, d_inner, d_state) is ever in memory.

The loops, from the outermost to the innermost, all sequential:

    blocks of channels   a block's states, (batch, d_state, channels), stay in the second-level cache while time passes
    chunks of steps      a chunk's decays and states, one array each, stay in the cache of the cores
    steps                the recurrence; each step is an elementwise operation over a block's states

Inputs and outputs keep the caller's layout, (batch, length, d_inner); each chunk reads and writes a window of steps and
channels. Inside a chunk, arrays have steps first, (steps, batch, channels), because a step then is contiguous. States
have channels last, (batch, d_state, channels), because XLA vectorizes the last axis, and a block's channels fill the
vector registers better than the few entries of a state. No loop cuts the batch, because it may be sharded.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from ..derivatives import with_gradient
from ..typing import Array, Float, Index, Size
from .reference import CHECKPOINT_NAME, batch_zeros, compute_dtype, discretization_step, first_state, skip_and_gate
from .xla_windows import Window, at_step, for_windows, loop_into, pad_to_chunks, read, read_steps, write, write_steps

# Two arrays that each chunk of the backward pass overwrites: h_t and carry_{t+1} of its steps; see `_backward_chunk`.
Buffers = tuple[Float[Array, "T B N width"], Float[Array, "T B N width"]]
# (carry, dA so far, the step size after the chunk's last step): what the backward pass carries from chunk to chunk.
ChunkCarry = tuple[Float[Array, "B N width"], Float[Array, "B N width"], Float[Array, "B width"]]
# Carries of the loop over blocks of channels, of the forward and of the backward pass. `width` is that of a block.
ForwardOutputs = tuple[Float[Array, "B N D"], Float[Array, "B L D"], Float[Array, "chunks B N D"]]
BackwardOutputs = tuple[
    Float[Array, "B N D"],
    Float[Array, "B N D"],
    Buffers,
    list[Float[Array, "B L D"]],
    list[Float[Array, "B L N"]],
]


class Inputs(NamedTuple):
    """The arrays of the recurrence, or their gradients."""

    u: Float[Array, "B L D"]
    step_size: Float[Array, "B L D"]
    A: Float[Array, "D N"]
    B: Float[Array, "B L N"]
    C: Float[Array, "B L N"]
    initial_state: Float[Array, "B D N"]


# (y, final_state) without skip and gate, in the dtype of the computation, or their gradients.
Outputs = tuple[Float[Array, "B L D"], Float[Array, "B D N"]]


def selective_scan_xla(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Float[Array, "B D N"] | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns (y, final_state); see `selective_scan` for the formula and the arguments."""
    # Bias, softplus, skip and gate are elementwise. They are outside the scan with its own gradient, where XLA fuses
    # and JAX differentiates them.
    dtype = compute_dtype(u, delta, A, B, C)
    step_size = discretization_step(delta, delta_bias, delta_softplus, dtype)
    state = first_state(initial_state, u, A, dtype)
    # Nothing to loop over: y is the skip connection, and the state remains.
    if 0 in u.shape or 0 in A.shape:
        return skip_and_gate(jnp.zeros(u.shape, dtype), u, D, z), state
    save, gradient = functools.partial(_forward, reverse), functools.partial(_backward, reverse)
    scan = with_gradient(lambda inputs: save(inputs)[0], save, gradient, name=CHECKPOINT_NAME)
    y, final_state = scan(Inputs(u, step_size, A, B, C, state))
    return skip_and_gate(y, u, D, z), final_state


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The number of channels in a block, and the number of time steps in a chunk."""

    d_inner: int
    steps: int


def block_sizes(batch: Size, length: int, d_inner: int, d_state: int) -> BlockSizes:
    """Returns the most channels whose states take up to 96 KiB, and the most steps whose states take up to 1.5 MiB.

    A block has at most 768 channels, unless the number of channels has no such divisor. The sizes are those of float32
    states. The limits were measured on two Zen 4 cores with 1 MiB of second-level cache each. The time of the gradient
    varies by a tenth between 12 and 96 KiB, and between 0.5 and 2 MiB, and is longer beyond these ranges.

    Args:
      batch: number of examples; a symbolic one (`jax.export`) counts as 8.
      length: steps of the sequence, at least 1.
      d_inner: number of channels, at least 1.
      d_state: states per channel.
    """
    batch = 8 if jax.export.is_symbolic_dim(batch) else batch
    # Entries of 4 bytes: 96 KiB and 1.5 MiB.
    max_states, max_chunk_states = 24 * 1024, 384 * 1024
    # At batch 1, 1,536 channels are within the limit for states, but two blocks of 768 with chunks of twice the length
    # take the same time, and the gradient keeps half as many states.
    max_width = 768
    # Only divisors of d_inner, so that no block is ragged. Blocks of fewer than 64 channels would not fill vectors.
    widths = [n for n in _divisors(d_inner) if n >= min(64, d_inner)]
    width = max((n for n in widths if n <= max_width and batch * d_state * n <= max_states), default=widths[0])
    # Between 8 and 32 steps. Shorter chunks keep more states and have more loop overhead. Longer chunks need more
    # memory for their decays and states.
    max_steps = min(max(max_chunk_states // (batch * d_state * width), 8), 32)
    # A divisor of the length avoids padding. If none is within a factor of two of the limit, the chunks are as even as
    # possible, which pads by less than one step per chunk.
    even_steps = -(-length // -(-length // max_steps))
    steps = max((n for n in _divisors(length) if max_steps // 2 <= n <= max_steps), default=even_steps)
    return BlockSizes(d_inner=width, steps=steps)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _forward(reverse: bool, inputs: Inputs) -> tuple[Outputs, Float[Array, "chunks B N D"]]:
    """The recurrence alone, without softplus, skip and gate; and the state at the start of each chunk."""
    u, step_size, A, B, C, initial_state = inputs
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    dtype = step_size.dtype
    sizes = block_sizes(batch, length, d_inner, d_state)
    # Ragged lengths are padded, not masked: step sizes of zero leave the state unchanged, in either direction.
    by_channel, by_state = pad_to_chunks(sizes.steps, u, step_size), pad_to_chunks(sizes.steps, B, C)
    padded_length = by_state[0].shape[1]
    # (d_state, d_inner), like the states: channels last.
    A_t = A.astype(dtype).T
    # Reverse mode through these loops happens only in derivatives of derivatives. It then recomputes each chunk too.
    forward_chunk = jax.checkpoint(functools.partial(_forward_chunk, reverse), prevent_cse=False)

    def block(channels: Window, outputs: ForwardOutputs) -> ForwardOutputs:
        A_block = read(A_t, None, channels)

        def chunk(
            steps: Window, loop: tuple[Float[Array, "B N width"], Float[Array, "B L D"], Float[Array, "chunks B N D"]]
        ) -> tuple[Float[Array, "B N width"], Float[Array, "B L D"], Float[Array, "chunks B N D"]]:
            h, y, h_starts = loop
            # Inputs stay in their own dtype in memory. A chunk is converted when it is read, so that no float32 copy of
            # a bfloat16 sequence is made.
            u, step_size = (read_steps(x, steps, channels, dtype) for x in by_channel)
            B, C = (read_steps(x, steps, None, dtype) for x in by_state)
            h_starts = write(h_starts, h[None], (steps[0] // sizes.steps, 1), None, None, channels)
            h, y_chunk = forward_chunk(A_block, h, u, step_size, B, C)
            return h, write_steps(y, y_chunk, steps, channels), h_starts

        # `state` holds the final states of the blocks before this one, and the initial states of the others.
        state, y, h_starts = outputs
        h = read(state, None, None, channels)
        h, y, h_starts = for_windows(padded_length, sizes.steps, chunk, (h, y, h_starts), reverse)
        return write(state, h, None, None, channels), y, h_starts

    state = jnp.swapaxes(initial_state, 1, 2)
    y = batch_zeros(u, (batch, padded_length, d_inner), dtype)
    h_starts = batch_zeros(u, (padded_length // sizes.steps, *state.shape), dtype, batch_axis=1)
    state, y, h_starts = for_windows(d_inner, sizes.d_inner, block, (state, y, h_starts))
    # The gradient needs the inputs, which are alive anyway, and one state per chunk. It recomputes the decays and
    # states of all steps, which would take d_state times the memory of u each.
    return (y[:, :length], jnp.swapaxes(state, 1, 2)), h_starts


def _backward(reverse: bool, inputs: Inputs, h_starts: Float[Array, "chunks B N D"], cotangents: Outputs) -> Inputs:
    """The gradients of the inputs, in their dtypes. Chunks are visited in reverse order."""
    u, step_size, A, B, C, initial_state = inputs
    dy, d_final_state = cotangents
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    dtype = step_size.dtype
    sizes = block_sizes(batch, length, d_inner, d_state)
    by_channel, by_state = pad_to_chunks(sizes.steps, u, step_size, dy), pad_to_chunks(sizes.steps, B, C)
    padded_length = by_state[0].shape[1]
    # Step sizes and dy are zero in the padding, so padded steps add nothing to any gradient.
    A_t = A.astype(dtype).T

    def block(channels: Window, outputs: BackwardOutputs) -> BackwardOutputs:
        A_block = read(A_t, None, channels)

        def chunk(
            steps: Window,
            loop: tuple[ChunkCarry, Buffers, list[Float[Array, "B L D"]], list[Float[Array, "B L N"]]],
        ) -> tuple[ChunkCarry, Buffers, list[Float[Array, "B L D"]], list[Float[Array, "B L N"]]]:
            carried, buffers, d_by_channel, d_by_state = loop
            # The residual: the state before the chunk. Everything else about the chunk is recomputed from it.
            h_start = read(h_starts, (steps[0] // sizes.steps, 1), None, None, channels)[0]
            u, step_size, dy = (read_steps(x, steps, channels, dtype) for x in by_channel)
            B, C = (read_steps(x, steps, None, dtype) for x in by_state)
            carried, buffers, gradients_by_channel, gradients_by_state = _backward_chunk(
                reverse, A_block, carried, buffers, h_start, u, step_size, B, C, dy
            )
            d_by_channel = [
                write_steps(x, d, steps, channels) for x, d in zip(d_by_channel, gradients_by_channel, strict=True)
            ]
            # All blocks of channels share B and C, so their gradients are accumulated over the outer loop.
            d_by_state = [
                write_steps(x, read_steps(x, steps, None, dtype) + d, steps, None)
                for x, d in zip(d_by_state, gradients_by_state, strict=True)
            ]
            return carried, buffers, d_by_channel, d_by_state

        dh, dA, buffers, d_by_channel, d_by_state = outputs
        # `dh` holds the gradients of the initial states for the blocks before this one, and of the final states for the
        # others.
        carry = read(dh, None, None, channels)
        loop = ((carry, jnp.zeros_like(carry), jnp.zeros_like(carry[:, 0])), buffers, d_by_channel, d_by_state)
        loop = for_windows(padded_length, sizes.steps, chunk, loop, not reverse)
        (carry, dA_block, _), buffers, d_by_channel, d_by_state = loop
        dh = write(dh, carry, None, None, channels)
        return dh, write(dA, dA_block, None, None, channels), buffers, d_by_channel, d_by_state

    # The buffers for a chunk's states are carries of all loops. As outputs of a scan they would be allocated and zeroed
    # again for each chunk.
    buffer = batch_zeros(u, (sizes.steps, batch, d_state, sizes.d_inner), dtype, batch_axis=1)
    sequence = batch_zeros(u, (batch, padded_length, d_inner), dtype)
    projection = batch_zeros(u, (batch, padded_length, d_state), dtype)
    # dA keeps its batch axis until the loops end. The sum over a sharded batch is a collective, which then runs once
    # instead of once per chunk. du is complete when it is written, so it has the dtype of u. The others are sums.
    outputs = (
        jnp.swapaxes(d_final_state, 1, 2),
        batch_zeros(u, (batch, d_state, d_inner), dtype),
        (buffer, buffer),
        [sequence.astype(u.dtype), sequence],
        [projection, projection],
    )
    dh, dA, _, d_by_channel, d_by_state = for_windows(d_inner, sizes.d_inner, block, outputs)
    du, d_step_size = (x[:, :length] for x in d_by_channel)
    dB, dC = (x[:, :length] for x in d_by_state)

    # The chunks leave out two terms (see `_backward_chunk`): in dA that of the first scanned step, and in dB_t the
    # product of C_t with the sum of dy_t Δ_t u_t over all channels.
    state = jnp.swapaxes(initial_state, 1, 2)
    first = -1 if reverse else 0
    step_size_padded = by_channel[1]
    dA = jnp.sum(dA + dh * state * step_size_padded[:, first, None, :], axis=0).T
    dB += C.astype(dtype) * jnp.sum(dy * step_size * u.astype(dtype), axis=2, keepdims=True)
    return Inputs(
        u=du,
        step_size=d_step_size,
        A=dA.astype(A.dtype),
        B=dB.astype(B.dtype),
        C=dC.astype(C.dtype),
        initial_state=jnp.swapaxes(dh, 1, 2).astype(initial_state.dtype),
    )


def _forward_chunk(
    reverse: bool,
    A: Float[Array, "N width"],
    h: Float[Array, "B N width"],
    u: Float[Array, "T B width"],
    step_size: Float[Array, "T B width"],
    B: Float[Array, "T B N"],
    C: Float[Array, "T B N"],
) -> tuple[Float[Array, "B N width"], Float[Array, "T B width"]]:
    """Returns the state after the chunk, and y.

    The decays of all steps are computed first. XLA divides one operation over a complete chunk among the CPU's cores;
    the operations of a single step are too short for that.
    """

    def step(
        h: Float[Array, "B N width"],
        inputs: tuple[Float[Array, "B N width"], Float[Array, "B width"], Float[Array, "B N"], Float[Array, "B N"]],
    ) -> tuple[Float[Array, "B N width"], Float[Array, "B width"]]:
        decay_t, drive_t, B_t, C_t = inputs
        h = decay_t * h + drive_t[:, None, :] * B_t[:, :, None]
        return h, _sum_states(h, C_t[:, :, None])

    return jax.lax.scan(step, h, (_decay(step_size, A), step_size * u, B, C), reverse=reverse)


def _backward_chunk(
    reverse: bool,
    A: Float[Array, "N width"],
    carried: ChunkCarry,
    buffers: Buffers,
    h_start: Float[Array, "B N width"],
    u: Float[Array, "T B width"],
    step_size: Float[Array, "T B width"],
    B: Float[Array, "T B N"],
    C: Float[Array, "T B N"],
    dy: Float[Array, "T B width"],
) -> tuple[
    ChunkCarry,
    Buffers,
    tuple[Float[Array, "T B width"], Float[Array, "T B width"]],
    tuple[Float[Array, "T B N"], Float[Array, "T B N"]],
]:
    """The adjoint recurrence from a chunk's last step to its first.

    Let carry_t be the gradient of the loss with respect to h_{t-1}, through step t and all later steps. The gradient
    with respect to h_t is then carry_{t+1} + dy_t C_t, and

        carry_t     = exp(Δ_t A) (carry_{t+1} + dy_t C_t)
        dC_t        = Σ_d h_t dy_t
        dB_t        = Σ_d (carry_{t+1} + dy_t C_t) Δ_t u_t
        d(Δ_t u_t)  = Σ_n (carry_{t+1} + dy_t C_t) B_t
        d(Δ_t A)    = carry_t h_{t-1}

    The chunk stores h_t and carry_{t+1}. The last product is computed for the next step as
    d(Δ_{t+1} A) = carry_{t+1} h_t, which takes both arrays at the same index and needs no decays. The terms with
    dy_t C_t factor into sums over N or D alone, so they need no array over both axes.

    Args:
      reverse: direction of the forward pass; this function goes in the opposite direction.
      A: of the block, like all arrays here in the dtype of the computation.
      carried: (carry, dA so far, step size after the chunk's last step). The result holds those for the chunk before.
      buffers: two arrays to overwrite, for h_t and carry_{t+1} of all steps.
      h_start: the state before the chunk's first scanned step.
      u: the chunk's steps and the block's channels of the input.
      step_size: the same window of the step sizes.
      B: the chunk's steps.
      C: the chunk's steps.
      dy: the same window of the gradient of y.

    Returns:
      carried; buffers; the gradients of u_t and Δ_t; and dB and dC, where dB lacks the term C_t Σ_d dy_t Δ_t u_t.
    """
    carry, dA, step_size_end = carried
    h_all, carry_all = buffers
    decay = _decay(step_size, A)
    drive = step_size * u
    # Δ_{t+1} at index t, in the order of the scan; that of the chunk's last step comes from the chunk after it.
    if reverse:
        step_size_next = jnp.concatenate([step_size_end[None], step_size[:-1]])
    else:
        step_size_next = jnp.concatenate([step_size[1:], step_size_end[None]])

    def recompute(
        h: Float[Array, "B N width"], t: Index
    ) -> tuple[Float[Array, "B N width"], Float[Array, "B N width"]]:
        h = at_step(decay, t) * h + at_step(drive, t)[:, None, :] * at_step(B, t)[:, :, None]
        return h, h

    def adjoint(
        accumulated: tuple[Float[Array, "B N width"], Float[Array, "B N width"]], t: Index
    ) -> tuple[tuple[Float[Array, "B N width"], Float[Array, "B N width"]], Float[Array, "B N width"]]:
        carry, dA = accumulated
        dA = dA + carry * at_step(h_all, t) * at_step(step_size_next, t)[:, None, :]
        return (at_step(decay, t) * (carry + at_step(dy, t)[:, None, :] * at_step(C, t)[:, :, None]), dA), carry

    _, h_all = loop_into(h_all, recompute, h_start, reverse)
    (carry, dA), carry_all = loop_into(carry_all, adjoint, (carry, dA), not reverse)
    # Sums over channels or states for all steps at once. HIGHEST: by default TPUs and GPUs round the factors of an
    # einsum to bfloat16 or TF32.
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    dC = dot("tbnd,tbd->tbn", h_all, dy)
    dB = dot("tbnd,tbd->tbn", carry_all, drive)
    d_drive = dot("tbnd,tbn->tbd", carry_all, B) + dy * dot("tbn,tbn->tb", B, C)[:, :, None]
    # The gradient of Δ_{t+1} through Δ_{t+1} A, at index t. That of the chunk's first step is computed from the states
    # at the chunk's start, and that of the step after the chunk has been computed by the chunk after it.
    d_next = _sum_states(carry_all, h_all, A[None, None])
    d_first = _sum_states(carry, h_start, A[None])[None]
    d_decay = jnp.concatenate([d_next[1:], d_first] if reverse else [d_first, d_next[:-1]])
    carried = (carry, dA, step_size[-1 if reverse else 0])
    return carried, (h_all, carry_all), (d_drive * step_size, d_drive * u + d_decay), (dB, dC)


def _decay(step_size: Float[Array, "*steps D"], A: Float[Array, "N D"]) -> Float[Array, "*steps N D"]:
    """exp(Δ A)."""
    # Singleton axes instead of implicit rank promotion, which the tests forbid.
    return jnp.exp(step_size[..., None, :] * A.reshape((1,) * (step_size.ndim - 1) + A.shape))


def _sum_states(*factors: Float[Array, "... N #D"]) -> Float[Array, "... D"]:
    """The sum over N of the product of the factors, added in pairs.

    It is written as additions, because XLA's CPU backend compiles this reduction to a library call, which at batch size
    1 takes longer than the rest of a step. Slices are taken before products, so that the products need no memory.
    """
    d_state = factors[0].shape[-2]
    slices = ([jax.lax.index_in_dim(x, n, -2, keepdims=False) for x in factors] for n in range(d_state))
    terms = [functools.reduce(jnp.multiply, factors_n) for factors_n in slices]
    # A tree of additions has log2(N) dependent additions and as many roundings; a running sum would have N.
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in zip(terms[0::2], terms[1::2], strict=False)] + odd
    return terms[0]
