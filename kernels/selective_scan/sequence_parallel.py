"""The selective scan of a sequence that is sharded over a mesh axis; for use inside `jax.shard_map`.

Each device of the axis holds one contiguous part of the sequence. The recurrence is linear in the state: a part with
step sizes Δ_t takes the state h before it to

    exp(A Σ_t Δ_t) h + s,    where s is the part's last state if it starts from zero.

So the devices exchange only s, (B, D, N), and Σ_t Δ_t, (B, D), whatever the length of the sequence. From these arrays
of all parts before its own, each device computes the state that its part starts from. It then scans its part with one
of the implementations of `selective_scan`. The gradient with respect to the states is linear too, and passes through
the parts in the opposite order.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..derivatives import with_gradient
from ..partition import SEQUENCE_AXIS
from ..typing import Array, Bool, Float, Index, Int, ScanArrays
from .api import check_arguments, selective_scan
from .reference import CHECKPOINT_NAME, batch_zeros, compute_dtype, discretization_step, first_state

# Steps in one iteration of the loop over time. XLA's CPU backend divides sixteen steps among the cores, and takes a
# sixth of the time of two, four or eight (measured with 1,024 steps, 768 channels, 16 states and batch 2).
UNROLLED_STEPS = 16

# (y, final_state), or their gradients.
_Outputs = tuple[Float[Array, "B L D"], Float[Array, "B D N"]]
# The arrays, and parts_reversed, which is traced, because layers of both directions may share a program.
_Inputs = tuple[ScanArrays, Bool[Array, ""]]
# Gradients of the outputs to those of the arrays, as `jax.vjp` returns it.
_Pullback = Callable[[_Outputs], tuple[ScanArrays]]
# The pullback of the part's scan, as a function of the inputs, and the sums of step sizes of all parts.
_Saved = tuple[Callable[[_Inputs], _Pullback], Float[Array, "P B D"]]


def sequence_parallel_scan(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    *,
    axis_name: str = SEQUENCE_AXIS,
    delta_softplus: bool = False,
    reverse: bool = False,
    parts_reversed: bool | Bool[Array, ""] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns (y, final_state) of this device's part of the sequence; see `selective_scan` for the formula.

    All devices of the axis call this function, each with a part of the same length L. It is differentiable in every
    array argument. `jax.shard_map` sums the gradient of a replicated parameter or initial state over the devices.
    `jax.checkpoint` finds what `selective_scan` names, and the part's start state, by the name `CHECKPOINT_NAME`.

    Args:
      u: this part's input of the scan; shapes and dtypes are those of `selective_scan`, with the length of the part.
      delta: this part's step sizes before bias and softplus.
      A: diagonal of each channel's state matrix, the same on all devices.
      B: this part's input matrices.
      C: this part's output matrices.
      D: skip weight of each channel, the same on all devices; no skip connection if None.
      z: this part's gate before its SiLU; no gate if None.
      delta_bias: added to delta, the same on all devices; no bias if None.
      axis_name: the manual mesh axis over which the sequence is sharded.
      delta_softplus: apply a softplus to the step sizes.
      reverse: scan each part from its last token to its first.
      parts_reversed: scan the last device's part first and the first device's part last; None means the value of
        `reverse`. It may be traced, but must have the same value on all devices.
      initial_state: state before the first scanned token of the complete sequence, the same on all devices; zeros if
        None.
      implementation: scans the part; a name as for `selective_scan`, or None for the platform's preference.

    Returns:
      y, with the shape and dtype of u, and the state after the part's last scanned token, in the dtype of the
      computation.

    Raises:
      ValueError: the shapes do not match, a dtype is not floating-point, or the implementation's name is unknown.
      NotImplementedError: the named implementation does not support the arguments.
    """
    check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    # All later functions take the dtype of the computation from the initial state.
    state = first_state(initial_state, u, A, compute_dtype(u, delta, A, B, C))
    arrays = ScanArrays(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=state)
    options = _Options(axis_name, delta_softplus, reverse, implementation)
    scan = with_gradient(
        functools.partial(_evaluate, options),
        functools.partial(_save, options),
        functools.partial(_gradient, options),
        name=CHECKPOINT_NAME,
    )
    return scan((arrays, jnp.asarray(reverse if parts_reversed is None else parts_reversed)))


@dataclasses.dataclass(frozen=True)
class _Options:
    """The static arguments of `sequence_parallel_scan`."""

    axis_name: str
    delta_softplus: bool
    reverse: bool
    implementation: str | None


def _evaluate(options: _Options, inputs: _Inputs) -> _Outputs:
    """(y, final_state)."""
    return _scan_part(options, _with_start_state(options, inputs)[0])


def _save(options: _Options, inputs: _Inputs) -> tuple[_Outputs, _Saved]:
    # jax.vjp of the part's scan alone. `_gradient` computes the gradient of the exchange between devices itself,
    # instead of differentiating through the gathers and the extra pass.
    started, step_sums = _with_start_state(options, inputs)
    # Everything that is saved here gets the name CHECKPOINT_NAME, so it should be no more than the name stands for.
    # With this policy, the pullback keeps what the implementation has named, and recomputes step sizes and the gate.
    policy = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
    scan = jax.checkpoint(functools.partial(_scan_part, options), policy=policy, prevent_cse=False)
    outputs, pullback = jax.vjp(scan, started)
    # The gradient needs the states that the implementation keeps, the part's start state, the inputs, which are alive
    # anyway, and the sums of step sizes of all parts, (P, B, D), so that they are not gathered again.
    return outputs, (_without_inputs(pullback, inputs), step_sums)


def _without_inputs(pullback: _Pullback, inputs: _Inputs) -> Callable[[_Inputs], _Pullback]:
    """The pullback as a function of the inputs: a pytree of only those of its arrays that are not inputs."""
    leaves, structure = jax.tree.flatten(pullback)
    indices = {id(x): i for i, x in enumerate(jax.tree.leaves(inputs))}
    sources = [indices.get(id(x)) for x in leaves]

    def restore(kept: list[Array], inputs: _Inputs) -> _Pullback:
        given, others = jax.tree.leaves(inputs), iter(kept)
        return structure.unflatten([next(others) if i is None else given[i] for i in sources])

    return jax.tree_util.Partial(restore, [x for x, i in zip(leaves, sources, strict=True) if i is None])


def _gradient(options: _Options, inputs: _Inputs, saved: _Saved, cotangents: _Outputs) -> tuple[ScanArrays, None]:
    """The pullback of the part's own scan, applied to the final state's gradient through all later parts.

    Let g be the gradient of the loss with respect to a part's final state, and r that with respect to its start state
    if g were zero. The gradient with respect to the start state is then exp(A Σ_t Δ_t) g + r, which is added to the g
    of the part before. This is the recurrence of the states again, from the last part to the first.
    """
    (arrays, parts_reversed), (pullback_of, step_sums), (dy, d_final_state) = inputs, saved, cotangents
    step_size, A = _discretize(options, arrays)
    # The gradient with respect to C_t · h_t; the skip connection does not reach the state.
    d_sum = dy.astype(step_size.dtype)
    if arrays["z"] is not None:
        d_sum *= jax.nn.silu(arrays["z"].astype(step_size.dtype))
    # r + exp(A ΣΔ) g, with the g that comes from this part's own final_state. Later parts add to it below.
    d_start = _accumulate_adjoint(options, A, step_size, d_sum, arrays["C"])
    d_start += _decay(step_size.sum(axis=1), A) * jnp.swapaxes(d_final_state, 1, 2)
    # (P, B, N, D): one state per device. Each device folds the gathered states itself, because P is small and a chain
    # of P exchanges would take P times the latency.
    d_starts = jax.lax.all_gather(d_start, options.axis_name)
    # The parts after this one come "before" it in the opposite order of parts.
    from_later = _fold(options, A, d_starts, step_sums, jnp.zeros_like(d_start), ~parts_reversed)
    (gradients,) = pullback_of(inputs)((dy, d_final_state + jnp.swapaxes(from_later, 1, 2)))
    # Only the first part starts from the argument. The gradient of any other part's start state has been passed to the
    # part before it, by `_fold`.
    is_first = _parts_before(options, parts_reversed) == 0
    gradients["initial_state"] = jnp.where(is_first, gradients["initial_state"], 0)
    return gradients, None


def _scan_part(options: _Options, arrays: ScanArrays) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    return selective_scan(
        **arrays,
        delta_softplus=options.delta_softplus,
        reverse=options.reverse,
        return_final_state=True,
        implementation=options.implementation,
    )


def _with_start_state(options: _Options, inputs: _Inputs) -> tuple[ScanArrays, Float[Array, "P B D"]]:
    """The arrays with this part's start state as their initial state, and the sum of step sizes of each part."""
    arrays, parts_reversed = inputs
    step_size, A = _discretize(options, arrays)
    drive = step_size * arrays["u"].astype(step_size.dtype)
    # A pass over the part that computes only its last state from zero. The scan itself cannot return it, because it
    # needs the start state.
    final_state = _accumulate(options, A, step_size, drive, arrays["B"])
    # One collective for both: P (B, N, D) and P (B, D) arrays, independent of the length of the sequence.
    final_states, step_sums = jax.lax.all_gather((final_state, step_size.sum(axis=1)), options.axis_name)
    start = jnp.swapaxes(arrays["initial_state"], 1, 2)
    start = _fold(options, A, final_states, step_sums, start, parts_reversed)
    return {**arrays, "initial_state": jnp.swapaxes(start, 1, 2)}, step_sums


def _discretize(options: _Options, arrays: ScanArrays) -> tuple[Float[Array, "B L D"], Float[Array, "N D"]]:
    """Δ and the transpose of A, in the dtype of the computation.

    The functions below have channels last in states too, (B, N, D): they fill a vector register better than the few
    entries of a state.
    """
    dtype = arrays["initial_state"].dtype
    step_size = discretization_step(arrays["delta"], arrays["delta_bias"], options.delta_softplus, dtype)
    return step_size, arrays["A"].astype(dtype).T


def _fold(
    options: _Options,
    A: Float[Array, "N D"],
    states: Float[Array, "P B N D"],
    step_sums: Float[Array, "P B D"],
    start: Float[Array, "B N D"],
    from_last: Bool[Array, ""],
) -> Float[Array, "B N D"]:
    """The state h after h <- exp(A ΣΔ) h + state over the parts before this device's, in the given order of parts.

    Args:
      options: gives the mesh axis.
      A: the transposed A.
      states: for each part, the state after it if it starts from zero.
      step_sums: ΣΔ of each part.
      start: h before the first part.
      from_last: the parts are in order from the last device to the first.
    """

    def add(i: Index, h: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        part = jnp.where(from_last, states.shape[0] - 1 - i, i)
        return jnp.where(i < before, _decay(step_sums[part], A) * h + states[part], h)

    # All devices visit all parts, because reverse mode supports no loop with a traced number of steps. The last part
    # comes before none.
    before = _parts_before(options, from_last)
    return jax.lax.fori_loop(0, states.shape[0] - 1, add, start)


def _parts_before(options: _Options, from_last: Bool[Array, ""]) -> Int[Array, ""]:
    """The number of parts before this device's, in the order from the first device or from the last."""
    # The mesh axis orders the parts as `jax.shard_map` cuts the sequence.
    index = jax.lax.axis_index(options.axis_name)
    return jnp.where(from_last, jax.lax.axis_size(options.axis_name) - 1 - index, index)


def _accumulate(
    options: _Options,
    A: Float[Array, "N D"],
    step_size: Float[Array, "B L D"],
    drive: Float[Array, "B L D"],
    B: Float[Array, "B L N"],
) -> Float[Array, "B N D"]:
    """The last h of h <- exp(Δ_t A) h + drive_t B_t, from zero. Without outputs a scan takes half the time."""
    return _loop(options.reverse, lambda h, decay, inputs: decay * h + inputs, A, step_size, drive, B)


def _accumulate_adjoint(
    options: _Options,
    A: Float[Array, "N D"],
    step_size: Float[Array, "B L D"],
    d_sum: Float[Array, "B L D"],
    C: Float[Array, "B L N"],
) -> Float[Array, "B N D"]:
    """The last g of g <- exp(Δ_t A) (g + d_sum_t C_t), from zero and in the opposite direction of the scan."""
    return _loop(not options.reverse, lambda g, decay, inputs: decay * (g + inputs), A, step_size, d_sum, C)


def _loop(
    reverse: bool,
    step: Callable[[Array, Array, Array], Array],
    A: Float[Array, "N D"],
    step_size: Float[Array, "B L D"],
    by_channel: Float[Array, "B L D"],
    by_state: Float[Array, "B L N"],
) -> Float[Array, "B N D"]:
    """The last state of state <- step(state, exp(Δ_t A), by_channel_t by_state_t), from zero."""
    (batch, length, d_inner), dtype = step_size.shape, step_size.dtype
    # The state is the only carry, and no step writes an output.
    unrolled = min(UNROLLED_STEPS, max(length, 1))
    # Padding at the end: steps of size zero that add nothing, in either direction.
    padding = ((0, 0), (0, -length % unrolled), (0, 0))
    arrays = [jnp.pad(x.astype(dtype), padding) for x in (step_size, by_channel, by_state)]
    iterations = arrays[0].shape[1] // unrolled

    def iterate(i: Index, state: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        first = (iterations - 1 - i if reverse else i) * unrolled
        step_size, by_channel, by_state = (jax.lax.dynamic_slice_in_dim(x, first, unrolled, 1) for x in arrays)
        for t in reversed(range(unrolled)) if reverse else range(unrolled):
            inputs = by_channel[:, t, None, :] * by_state[:, t, :, None]
            state = step(state, _decay(step_size[:, t], A), inputs)
        return state

    return jax.lax.fori_loop(0, iterations, iterate, batch_zeros(step_size, (batch, A.shape[0], d_inner), dtype))


def _decay(step_size: Float[Array, "B D"], A: Float[Array, "N D"]) -> Float[Array, "B N D"]:
    """exp(Δ A)."""
    return jnp.exp(step_size[:, None, :] * A[None])
