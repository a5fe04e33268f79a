"""The selective scan on CUDA GPUs: Pallas kernels compiled by Triton, forward and backward.

The equations are those of `reference.py`. A program is one warp that takes a block of channels through a chunk of the
sequence. Chunks run in parallel, because at batch size 1 channels alone would leave most of the GPU idle. A chunk is
linear in its start state h: its end state is exp(A ΣΔ) h plus its end state from zero. Each pass therefore has three
kernels:

    forward    summarize           each chunk's end state from a zero start, and the sum of its step sizes
               combine             every chunk's start state, by a short recurrence over the chunks
               forward             y and the final state, each chunk from its start state
    backward   summarize_adjoint   the same three for the adjoint's carry, in the opposite direction
               combine
               backward

`pallas_gpu_layout` describes grid and blocks, and `pallas_gpu_kernels` contains the bodies. Bias, softplus, skip and
gate are computed inside the kernels. Carries, exponentials and sums are float32 for every input dtype, and no sum
depends on the order in which programs run, so results are reproducible bit by bit.

No array of size (batch, length, d_inner, d_state) is ever in memory. The forward pass keeps the states at chunk starts
for the backward pass, which temporarily holds the states of every eighth step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from ..derivatives import linear_call, with_gradient
from ..typing import Array, Float, Ref, ScanArrays
from .pallas_gpu_kernels import Program, backward, combine, forward, summarize, summarize_adjoint
from .pallas_gpu_layout import BlockSizes, Problem, block_sizes, operands
from .reference import CHECKPOINT_NAME, first_state, skip_and_gate
from .xla import selective_scan_xla

__all__ = ["BlockSizes", "block_sizes", "check_supported_by_pallas_gpu", "selective_scan_pallas_gpu"]

# With more states, a block has fewer than 8 channels, and there are many partial sums over channels.
MAX_D_STATE = 64

# Of the partial sums of dB, and of those of dC: the channels are cut into at most 16 calls, each of which is compiled.
MAX_PARTIAL_BYTES, MAX_PARTS = 2**26, 16

FLOAT32 = jnp.dtype("float32")

# (y, final_state), or their gradients.
Outputs = tuple[Float[Array, "B L D"], Float[Array, "B D N"]]
ChunkStates = Float[Array, "B chunks padN padD"]


def selective_scan_pallas_gpu(
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
    interpret: bool = False,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns (y, final_state); see `selective_scan` for the formula, and for the shapes of the arguments.

    Args:
      u: as for `selective_scan`, like the other arrays; float32 or bfloat16.
      delta: step sizes before bias and softplus.
      A: diagonal of each channel's state matrix, with at most 64 states per channel.
      B: input matrix of each token.
      C: output matrix of each token.
      D: skip weight of each channel; no skip connection if None.
      z: gate before its SiLU; no gate if None.
      delta_bias: added to delta; no bias if None.
      delta_softplus: apply a softplus to the step sizes.
      reverse: scan from the last token to the first.
      initial_state: state before the first scanned token; zeros if None.
      interpret: run the kernels in Pallas's interpreter on the CPU.

    Returns:
      y, with the shape and dtype of u, and the state after the last scanned token, float32.

    Raises:
      NotImplementedError: a dtype or d_state is not supported; see `check_supported_by_pallas_gpu`.
    """
    check_supported_by_pallas_gpu(u, delta, A, B, C, D, z, delta_bias, initial_state)
    # Between the kernels, as inside them, states and parameters are float32.
    state = first_state(initial_state, u, A, FLOAT32)
    # A grid without programs would leave the outputs unwritten.
    if 0 in u.shape or 0 in A.shape:
        return skip_and_gate(jnp.zeros(u.shape, FLOAT32), u, D, z), state
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    sizes = block_sizes(batch, length, d_inner, d_state)
    problem = Problem(batch, length, d_inner, d_state, sizes, delta_softplus, reverse, interpret)
    arrays = ScanArrays(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=state)
    save = functools.partial(_save, problem)
    scan = with_gradient(
        lambda arrays: save(arrays)[0],
        save,
        functools.partial(_gradient, problem),
        # Kernels have no forward mode: tangents are those of the loops in XLA.
        plain=lambda arrays: selective_scan_xla(**arrays, delta_softplus=delta_softplus, reverse=reverse),
        name=CHECKPOINT_NAME,
    )
    return scan(arrays)


def check_supported_by_pallas_gpu(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
) -> None:
    """Checks that the kernels support the arguments, which are the arrays of `selective_scan`.

    Raises:
      NotImplementedError: an array is neither float32 nor bfloat16, or A has more than 64 states per channel.
    """
    arrays = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    for name, x in arrays.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name}: got dtype {x.dtype}, pallas_gpu supports float32 and bfloat16")
    if A.shape[1] > MAX_D_STATE:
        raise NotImplementedError(
            f"A: got {A.shape[1]} states per channel, pallas_gpu supports at most {MAX_D_STATE}; "
            "use implementation 'xla'"
        )


def _call(
    kernel: Callable[[Program, dict[str, Ref], dict[str, Ref]], None],
    problem: Problem,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, jnp.dtype],
    each_chunk: bool = True,
    into: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Runs kernel(program, inputs, outputs), where inputs and outputs are references by name; returns its outputs.

    Args:
      kernel: reads and writes the blocks of one program.
      problem: the sizes and options for which to compile it.
      inputs: arrays by name; absent arguments have no entry.
      outputs: dtypes by name.
      each_chunk: each chunk has its own program; if False, one program goes through all chunks.
      into: outputs of a call for other blocks of channels, to which this one adds its blocks, in place.
    """
    # Inside a `jax.shard_map`, outputs vary over the mesh axes that shard the batch, as all inputs do.
    layouts, varying = operands(problem), jax.typeof(inputs["A"]).manual_axis_type

    def body(inputs: dict[str, Ref], _: dict[str, Ref], outputs: dict[str, Ref]) -> None:
        kernel(Program(problem), inputs, outputs)

    # pallas_call takes and returns dictionaries, so no operand is identified by its position, except in aliases: the
    # leaves of a dictionary are in the order of its keys.
    into = dict(into or {})
    aliases = {len(inputs) + i: sorted(outputs).index(name) for i, name in enumerate(sorted(into))}
    call = pl.pallas_call(
        body,
        out_shape={
            name: jax.ShapeDtypeStruct(layouts[name][0], dtype, manual_axis_type=varying)
            for name, dtype in outputs.items()
        },
        # Blocks of channels are CUDA's x axis, which is scheduled first: programs that run together share the rows of B
        # and C in the L2 cache.
        grid=(problem.call_blocks, problem.chunks if each_chunk else 1, problem.batch),
        in_specs=[{name: layouts[name][1] for name in inputs}, {name: layouts[name][1] for name in into}],
        out_specs={name: layouts[name][1] for name in outputs},
        # One warp, so that sums over channels or states need no exchange between warps. One stage, which is no software
        # pipelining: about 16 warps per multiprocessor hide the latency of memory instead.
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=problem.interpret,
        input_output_aliases=aliases,
        name=f"selective_scan_{kernel.__name__}",
    )
    # As a primitive, which is lowered without the warning that JAX's Triton backend is deprecated. It is not
    # differentiated.
    return linear_call(lambda operands, _: call(*operands), lambda *_: (), (dict(inputs), into), ())


def _save(problem: Problem, arrays: ScanArrays) -> tuple[Outputs, ChunkStates]:
    """(y, final_state), and the states at chunk starts in the layout of the kernels."""
    inputs, first = _kernel_inputs(problem, arrays), _kernel_state(problem, arrays["initial_state"])
    if problem.chunks == 1:
        # The only chunk starts from the initial state, and neither `summarize` nor `combine` is needed.
        start = first[:, None]
    else:
        # The states do not depend on C, D and z, so `summarize` does not read them.
        needed = {name: x for name, x in inputs.items() if name in ("u", "delta", "delta_bias", "A", "B")}
        summaries = _call(summarize, problem, needed, _float32("end", "step_sum"))
        start = _combine_chunks(problem, inputs["A"], first, **summaries)["starts"]
    outputs = _call(forward, problem, inputs | {"start": start}, {"y": arrays["u"].dtype} | _float32("final_state"))
    # The gradient needs the inputs, which are alive anyway, and one state per chunk. It recomputes step sizes, decays
    # and all other states, which would take d_state times the memory of u.
    return (outputs["y"], _caller_state(problem, outputs["final_state"])), start


def _gradient(problem: Problem, arrays: ScanArrays, start: ChunkStates, cotangents: Outputs) -> ScanArrays:
    # Unlike the forward pass, this one needs `summarize_adjoint` even for one chunk, for the states of the groups.
    dy, d_final_state = cotangents
    inputs = _kernel_inputs(problem, arrays) | {"dy": dy}
    # Only the gradients of u and z need D.
    needed = {name: x for name, x in inputs.items() if name != "D"} | {"start": start}
    summaries = _call(summarize_adjoint, problem, needed, _float32("end", "step_sum", "group_starts"))
    group_starts = summaries.pop("group_starts")
    # The carry is a state of the same linear recurrence from the last chunk to the first, so `combine` serves it too.
    against_time = dataclasses.replace(problem, reverse=not problem.reverse)
    carries = _combine_chunks(against_time, inputs["A"], _kernel_state(problem, d_final_state), **summaries)

    # Gradients of sequences are complete and are written in the dtype of their argument. The others are partial sums,
    # which stay float32 until they have been added.
    types = {f"d{name}": inputs[name].dtype for name in ("u", "delta", "z") if name in inputs}
    types |= _float32(*(f"d{name}" for name in ("A", "B", "C", "D", "delta_bias") if name in inputs))
    inputs |= {"group_starts": group_starts, "start": carries["starts"]}
    # XLA adds the programs' partial sums: of A, D and delta_bias over examples and chunks, of B and C over blocks of
    # channels. The latter would take much memory for all blocks at once.
    d: dict[str, Array] = {}
    projections = dict.fromkeys(("dB", "dC"), jnp.zeros((), FLOAT32))
    for part in _parts(problem):
        d = _call(backward, part, inputs, types, into=d)
        for name in projections:
            projections[name] += jnp.sum(d.pop(name), axis=0)[:, : problem.length, : problem.d_state]
    d |= projections
    for name in ("dD", "ddelta_bias"):
        if name in d:
            d[name] = jnp.sum(d[name], axis=(0, 1))[: problem.d_inner]
    gradients = ScanArrays(
        u=d["du"],
        delta=d["ddelta"],
        A=_caller_state(problem, jnp.sum(d["dA"], axis=(0, 1))),
        B=d["dB"],
        C=d["dC"],
        D=d.get("dD"),
        z=d.get("dz"),
        delta_bias=d.get("ddelta_bias"),
        # The carry at the start of the first chunk is the gradient of the state before it.
        initial_state=_caller_state(problem, carries["last"]),
    )
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, arrays)


def _parts(problem: Problem) -> list[Problem]:
    """The problem, cut into parts with so few blocks of channels that the partial sums of dB and of dC are small."""
    bytes_per_block = 4 * problem.batch * problem.chunks * problem.sizes.chunk * problem.sizes.d_state
    blocks = max(1, MAX_PARTIAL_BYTES // bytes_per_block, pl.cdiv(problem.blocks, MAX_PARTS))
    starts = range(0, problem.blocks, blocks)
    return [dataclasses.replace(problem, first_block=start, max_blocks=blocks) for start in starts]


def _float32(*names: str) -> dict[str, jnp.dtype]:
    return dict.fromkeys(names, FLOAT32)


def _combine_chunks(
    problem: Problem,
    A: Float[Array, "padN padD"],
    first: Float[Array, "B padN padD"],
    end: Float[Array, "B chunks padN padD"],
    step_sum: Float[Array, "B chunks padD"],
) -> dict[str, Array]:
    """{"starts": the state at the start of each chunk, "last": the state after the last chunk}, from `first`."""
    inputs = {"A": A, "first": first, "ends": end, "step_sums": step_sum}
    return _call(combine, problem, inputs, _float32("starts", "last"), each_chunk=False)


def _kernel_inputs(problem: Problem, arrays: ScanArrays) -> dict[str, Array]:
    """The arrays as the kernels read them, by name; absent arguments have no entry.

    Only the parameters, which are small, are padded and converted to float32.
    """
    inputs = {"u": arrays["u"], "delta": arrays["delta"], "B": arrays["B"], "C": arrays["C"]}
    # A is scaled once here, so that exp(Δ A) is 2^(Δ A log2 e): the GPU's instruction for exponentials has base 2.
    inputs["A"] = _kernel_state(problem, arrays["A"].astype(jnp.float32) * math.log2(math.e))
    if arrays["z"] is not None:
        inputs["z"] = arrays["z"]
    for name, x in (("D", arrays["D"]), ("delta_bias", arrays["delta_bias"])):
        if x is not None:
            inputs[name] = _pad(x.astype(jnp.float32), 0, problem.sizes.d_inner)
    return inputs


def _kernel_state(problem: Problem, x: Float[Array, "*axes D N"]) -> Float[Array, "*axes padN padD"]:
    """x with its last two axes exchanged and padded to complete blocks."""
    x = _pad(jnp.swapaxes(x, -1, -2), -1, problem.sizes.d_inner)
    return _pad(x, -2, problem.sizes.d_state)


def _caller_state(problem: Problem, x: Float[Array, "*axes padN padD"]) -> Float[Array, "*axes D N"]:
    """The inverse of `_kernel_state`."""
    return jnp.swapaxes(x[..., : problem.d_state, : problem.d_inner], -1, -2)


def _pad(x: Float[Array, "..."], axis: int, multiple: int) -> Float[Array, "..."]:
    """x with zeros at the end of an axis, to a multiple of entries."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
