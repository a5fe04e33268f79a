"""The bodies of the Mosaic GPU kernels: what one program, a warpgroup, does with its blocks; see `mosaic_gpu`.

A tile of the sequence is in shared memory, with the axes (W, T, D): warps, time steps of a warp, channels. States are
in registers, with the axes (W, N, D), and everything in registers is float32. A lane of a warp has some states of some
channels, so that a sum over either axis adds registers first and then takes two or three shuffles.

A tile takes three phases, with barriers of the warpgroup between them:

    prepare   step sizes and gates, as elementwise operations on the complete tile
    scan      the recurrence, whose carry between warps goes through shared memory
    finish    skip, gate and the remaining gradients, again on the complete tile
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from ..typing import Array, Float, Index
from .mosaic_gpu_program import Program, Refs, View, sigmoid


def forward(program: Program) -> None:
    """Writes y, the state before each tile, and the final state. It takes one exponential per state and step."""
    # Each warp scans its quarter of the tile from a zero state, which gives the states at the starts of the quarters;
    # then it scans again from the right state, with the decays that it has kept in registers.
    scratch, states, block = program.scratch, program.states, program.group
    A = states.spread(states.load(program.parameter("A", block), (1, 2)), (1, 2))

    def tile(tile: Index, refs: Refs, carry: Float[Array, "N D"]) -> Float[Array, "N D"]:
        states.store(refs["starts"], carry)
        _, step_size = program.step_size(refs["delta"], tile, block)
        u = program.tokens.load(refs["u"])
        program.tokens.store(scratch["step_size"], step_size)
        program.tokens.store(scratch["drive"], step_size * u)
        program.synchronize()

        decays = _local_scan(program, A, refs["B"])
        h, carry = program.across_warps(scratch["end"], carry)
        for step in program.steps:
            h = decays[step] * h + program.channels(scratch["drive"], step) * program.projection(refs["B"], step)
            program.write_sum(scratch["y"], step, h * program.projection(refs["C"], step), axis=1)
        program.synchronize()

        y = program.tokens.load(scratch["y"])
        if "D" in program.inputs:
            y += program.per_channel("D", block) * u
        if "z" in refs:
            z = program.tokens.load(refs["z"])
            y *= z * sigmoid(z)
        program.tokens.store(refs["y"], y)
        return carry

    # The sum is for its type: inside a `jax.shard_map`, what is loaded varies over mesh axes by its type, and what is
    # computed in a kernel does not. The carry of a loop has one type.
    first = states.zeros((1, 2)) + states.load(program.parameter("initial_state", block), (1, 2))
    states.store(program.parameter("final_state", block), program.for_tiles(tile, first, block))


def _local_scan(
    program: Program, A: Float[Array, "W N D"], B: View, dy: View | None = None, C: View | None = None
) -> dict[int, Float[Array, "W N D"]]:
    """The decays of each step; writes what `across_warps` needs of each warp to scratch, with a barrier after.

    Writes "end", the state of a warp's last step if its start is zero, and "decay", the product of its decays. With dy
    and C also "adjoint", the adjoint's carry at the warp's first step if the carry after its last step is zero.
    """
    scratch, states = program.scratch, program.states
    h, decays = states.zeros(), {}
    for step in program.steps:
        decay = jnp.exp2(program.channels(scratch["step_size"], step) * A)
        h = decay * h + program.channels(scratch["drive"], step) * program.projection(B, step)
        decays[step] = decay
    states.store(scratch["end"], h)
    states.store(scratch["decay"], functools.reduce(operator.mul, decays.values()))
    if dy is not None and C is not None:
        carry = states.zeros()
        for step in reversed(program.steps):
            carry = decays[step] * (carry + program.channels(dy, step) * program.projection(C, step))
        states.store(scratch["adjoint"], carry)
    program.synchronize()
    return decays


def backward(program: Program) -> None:
    """The adjoint recurrence, from the last step to the first; the equations are those of `pallas_gpu_kernels`.

    It takes one exponential per state and step. A program goes through several blocks of channels, one after the other,
    and adds up their parts of dB and dC in global memory, always in the same order.
    """

    def block(round: Index, _: None) -> None:
        _backward_block(program, round)

    if program.problem.rounds == 1:
        block(jnp.int32(0), None)
    else:
        lax.fori_loop(0, program.problem.rounds, block, None)


def _backward_block(program: Program, round: Index) -> None:
    scratch, states, tokens = program.scratch, program.states, program.tokens
    block = round * program.problem.groups + program.group
    A = states.spread(states.load(program.parameter("A", block), (1, 2)), (1, 2))

    def tile(tile: Index, refs: Refs, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        dD, ddelta_bias = sums
        _, step_size = program.step_size(refs["delta"], tile, block)
        u, dy = tokens.load(refs["u"]), tokens.load(refs["dy"])
        tokens.store(scratch["step_size"], step_size)
        tokens.store(scratch["drive"], step_size * u)
        if "z" in refs:
            z = tokens.load(refs["z"])
            dy *= z * sigmoid(z)
        tokens.store(scratch["dy"], dy)
        program.synchronize()

        # Between tiles, the carry and dA are in shared memory, because they would occupy registers during the scan. All
        # warps have read the carry before the barrier in `_local_scan`, after which they write the next one.
        carry = states.load(scratch["carry"], (1, 2))
        decays = _local_scan(program, A, refs["B"], scratch["dy"], refs["C"])
        start = states.load(refs["starts"], (1, 2))
        h, _ = program.across_warps(scratch["end"], start)
        from_later, carry = program.across_warps(scratch["adjoint"], carry, backward=True)
        states.store(scratch["carry"], carry)
        dA = _adjoint(program, A, refs, decays, h, from_later, round)
        # A thread adds to what it has written itself.
        states.store(scratch["dA"], states.load(scratch["dA"]) + dA)
        program.synchronize()

        # dy and u are loaded again, because between the phases they would occupy registers.
        u, dy = tokens.load(refs["u"]), tokens.load(scratch["dy"])
        biased, step_size = program.step_size(refs["delta"], tile, block)
        d_drive = tokens.load(scratch["d_drive"])
        # A here is A log2 e, and log2 e ln 2 = 1: the factor restores the gradient through Δ A.
        ddelta = d_drive * u + math.log(2) * tokens.load(scratch["d_exponent"])
        if program.problem.delta_softplus:
            ddelta *= sigmoid(biased)
        ddelta = program.zero_outside(ddelta, tile)
        du = d_drive * step_size
        if "D" in program.inputs:
            du += dy * program.per_channel("D", block)
            dD += jnp.sum(dy * u, axis=1)
        ddelta_bias += jnp.sum(ddelta, axis=1)
        tokens.store(refs["ddelta"], ddelta)
        tokens.store(refs["du"], du)
        if "z" in refs:
            z, y = tokens.load(refs["z"]), tokens.load(scratch["y"])
            if "D" in program.inputs:
                y += program.per_channel("D", block) * u
            gate = sigmoid(z)
            tokens.store(refs["dz"], tokens.load(refs["dy"]) * y * gate * (1.0 + z * (1.0 - gate)))
        return dD, ddelta_bias

    states.store(scratch["carry"], states.load(program.parameter("d_final_state", block), (1, 2)))
    states.store(scratch["dA"], states.zeros())
    sums = (tokens.zeros((0, 2)), tokens.zeros((0, 2)))
    dD, ddelta_bias = program.for_tiles(tile, sums, block, backward=True)
    states.store(program.parameter("d_initial_state", block), states.load(scratch["carry"], (1, 2)))
    states.store(program.parameter("dA", block), states.load(scratch["dA"]))
    for name, x in (("dD", dD), ("ddelta_bias", ddelta_bias)):
        if name in program.outputs:
            tokens.store(program.parameter(name, block), x)
    # All warps have read the carry before the next round writes it.
    program.synchronize()


def _adjoint(
    program: Program,
    A: Float[Array, "W N D"],
    refs: Refs,
    decays: dict[int, Float[Array, "W N D"]],
    h: Float[Array, "W N D"],
    carry: Float[Array, "W N D"],
    round: Index,
) -> Float[Array, "W N D"]:
    """Scans the warp's steps forwards for the states and backwards for the adjoint; returns their part of dA.

    Writes dB and dC, and the sums over state entries "y", "d_drive" and "d_exponent" of scratch.
    """
    scratch = program.scratch
    befores, afters = {}, {}
    for step in program.steps:
        befores[step] = h
        h = decays[step] * h + program.channels(scratch["drive"], step) * program.projection(refs["B"], step)
        afters[step] = h
        if "z" in refs:
            program.write_sum(scratch["y"], step, h * program.projection(refs["C"], step), axis=1)
    dA = program.states.zeros()
    for step in reversed(program.steps):
        dy, C = program.channels(scratch["dy"], step), program.projection(refs["C"], step)
        _add_to_projection(program, refs, "dC", step, afters[step] * dy, round)
        g = carry + dy * C
        _add_to_projection(program, refs, "dB", step, g * program.channels(scratch["drive"], step), round)
        program.write_sum(scratch["d_drive"], step, g * program.projection(refs["B"], step), axis=1)
        carry = decays[step] * g
        d_exponent = carry * befores[step]
        dA += d_exponent * program.channels(scratch["step_size"], step)
        program.write_sum(scratch["d_exponent"], step, d_exponent * A, axis=1)
    return dA


def _add_to_projection(
    program: Program, refs: Refs, name: str, step: int, x: Float[Array, "W N D"], round: Index
) -> None:
    """Writes the sum of x over channels, plus that of the blocks before, to a step of dB or dC."""
    total = jnp.sum(x, axis=2)
    if program.problem.rounds > 1:
        # In the first round, the memory has not been written.
        old = program.states.load(refs[f"old {name}"].at[:, step], (0, 1))
        total += jnp.where(round > 0, old, 0.0)
    program.states.store(refs[name].at[:, step], total)


def scratch_names(kernel: Callable[[Program], None]) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the names of a kernel's scratch buffers of tokens, (W, T, D), and of states, (W, N, D)."""
    if kernel is forward:
        return ("step_size", "drive", "y"), ("end", "decay")
    return ("step_size", "drive", "y", "dy", "d_drive", "d_exponent"), ("end", "decay", "adjoint", "dA")
