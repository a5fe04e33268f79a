"""The selective scan on CUDA GPUs: Pallas kernels compiled by Triton, forward and backward.

A program is one warp that takes a block of channels through a chunk of the sequence. Chunks run in parallel, since at
batch 1 channels alone would leave most of the GPU idle:

    forward    summarize            each chunk's end state from a zero start, and the sum of its step sizes
               combine              every chunk's start state, a short recurrence over chunks
               forward              y and the final state, each chunk from its start state
    backward   summarize_adjoint, combine against time, backward: the same for the adjoint's carry

The recurrence is linear: a chunk takes start state h to exp(A ΣΔ) h + its end state from a zero start. Bias, softplus,
skip and gate are computed inside. Carries, exponentials and sums are float32, whatever the inputs' type, and no sum
depends on the order in which programs run.

Nothing of size (batch, length, d_inner, d_state) is ever in memory. The forward pass keeps states at chunk starts for
the backward pass, which while it lasts has them at every eighth step.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels.partition import vary_as
from kernels.selective_scan.pallas_gpu_kernels import (
    Program,
    backward,
    combine,
    forward,
    summarize,
    summarize_adjoint,
)
from kernels.selective_scan.reference import first_state, skip_and_gate
from kernels.typing import Array, Float

# With more, a block has so few channels that sums over channels, whose parts are (blocks, batch, length, d_state), take
# as much memory as states at every fourth step.
MAX_D_STATE = 64


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
    """Returns (y, final_state); see `selective_scan` for the formula and the arguments.

    Args:
      interpret: run the kernels step by step on the CPU.

    Raises:
      NotImplementedError: see `check_supported_by_pallas_gpu`.
    """
    check_supported_by_pallas_gpu(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = jnp.dtype("float32")
    initial_state = first_state(initial_state, u, A, dtype)
    if 0 in u.shape or 0 in A.shape:
        return skip_and_gate(jnp.zeros(u.shape, dtype), u, D, z), initial_state
    sizes = block_sizes(*u.shape, A.shape[1])
    problem = _Problem(*u.shape, A.shape[1], sizes, delta_softplus, reverse, interpret)
    arrays = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    return _scan(problem, {name: x if x is None else vary_as(u, x) for name, x in arrays.items()})


def check_supported_by_pallas_gpu(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None) -> None:
    """Raises NotImplementedError for a type that the kernels do not have, or more states than registers hold."""
    arrays = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    for name, x in arrays.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name}: got dtype {x.dtype}, pallas_gpu wants float32 or bfloat16")
    if A.shape[1] > MAX_D_STATE:
        raise NotImplementedError(f"A: got {A.shape[1]} states a channel, pallas_gpu wants at most {MAX_D_STATE}")


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What one program, a warp, works on. All but the chunk are powers of two, as Triton's arrays are."""

    d_inner: int  # channels
    d_state: int  # states of a channel, with padding
    steps: int  # time steps that are unrolled: a group, whose first state the backward pass reads
    chunk: int  # time steps in all, a multiple of steps


def block_sizes(batch: int, length: int, d_inner: int, d_state: int) -> BlockSizes:
    """Blocks of 512 states, and the longest chunks, in doublings of 32 steps, that still make 2048 programs.

    Triton gives each lane of the warp 4 states of 4 channels, so that sums over either add registers first and take two
    or three shuffles. The backward pass, with some ten such arrays, just fits a lane's 255 registers: see
    `benchmarks/compile_for_h100.py`. 2048 programs are 16 warps for each of an H100's 132 multiprocessors. A sequence
    of one chunk needs fewer kernels.
    """
    d_state = pl.next_power_of_2(d_state)
    width, steps, chunk = min(32, 512 // d_state), 8, 32
    blocks = batch * pl.cdiv(d_inner, width)
    while chunk < length and blocks * pl.cdiv(length, 2 * chunk) >= 2048:
        chunk *= 2
    return BlockSizes(width, d_state, steps, min(chunk, pl.cdiv(length, steps) * steps))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Sizes and options that the kernels are made for."""

    batch: int
    length: int
    d_inner: int
    d_state: int
    sizes: BlockSizes
    delta_softplus: bool
    reverse: bool
    interpret: bool

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.d_inner, self.sizes.d_inner)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.sizes.chunk)


def _layouts(problem: _Problem) -> dict[str, tuple[tuple[int, ...], pl.BlockSpec]]:
    """Shape and block of every array, by name, on a grid of blocks of channels, chunks and examples.

    Sequences and projections have the caller's shape: kernels mask what is outside. All else is padded to whole blocks,
    and states have channels last, (d_state, d_inner), like sequences.
    """
    sizes, batch, length, chunks = problem.sizes, problem.batch, problem.length, problem.chunks
    n, d, chunk, groups = sizes.d_state, sizes.d_inner, sizes.chunk, sizes.chunk // sizes.steps
    blocks, width = problem.blocks, problem.blocks * d
    layouts = [
        ("u delta z dy y du ddelta dz", (batch, length, problem.d_inner), (None, chunk, d), lambda i, c, b: (b, c, i)),
        ("B C", (batch, length, problem.d_state), (None, chunk, n), lambda i, c, b: (b, c, 0)),
        ("D delta_bias", (width,), (d,), lambda i, c, b: (i,)),
        ("A", (n, width), (n, d), lambda i, c, b: (0, i)),
        ("first last final_state", (batch, n, width), (None, n, d), lambda i, c, b: (b, 0, i)),
        # One a chunk, for the programs of chunks and for those that go through all chunks.
        ("start end dA", (batch, chunks, n, width), (None, None, n, d), lambda i, c, b: (b, c, 0, i)),
        ("step_sum dD ddelta_bias", (batch, chunks, width), (None, None, d), lambda i, c, b: (b, c, i)),
        ("starts ends", (batch, chunks, n, width), (None, chunks, n, d), lambda i, c, b: (b, 0, 0, i)),
        ("step_sums", (batch, chunks, width), (None, chunks, d), lambda i, c, b: (b, 0, i)),
        ("group_starts", (batch, chunks * groups, n, width), (None, groups, n, d), lambda i, c, b: (b, c, 0, i)),
        # One a block of channels: parts of a sum over channels.
        ("dB dC", (blocks, batch, chunks * chunk, n), (None, None, chunk, n), lambda i, c, b: (i, b, c, 0)),
    ]
    specs = {names: (shape, pl.BlockSpec(block, index_map)) for names, shape, block, index_map in layouts}
    return {name: spec for names, spec in specs.items() for name in names.split()}


def _call(kernel, problem, inputs, outputs, each_chunk=True):
    """Runs kernel(program, inputs, outputs), the last two being dicts of references; returns a dict of arrays.

    Args:
      kernel: reads and writes a program's blocks.
      problem: what it is made for.
      inputs: arrays by name; None where an argument is absent.
      outputs: types by name.
      each_chunk: whether each chunk has its program, or one goes through all.
    """
    inputs = {name: x for name, x in inputs.items() if x is not None}
    layouts, varying = _layouts(problem), jax.typeof(inputs["A"]).manual_axis_type
    return pl.pallas_call(
        lambda inputs, outputs: kernel(Program(problem), inputs, outputs),
        out_shape={
            name: jax.ShapeDtypeStruct(layouts[name][0], dtype, manual_axis_type=varying)
            for name, dtype in outputs.items()
        },
        grid=(problem.blocks, problem.chunks if each_chunk else 1, problem.batch),
        in_specs=[{name: layouts[name][1] for name in inputs}],
        out_specs={name: layouts[name][1] for name in outputs},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=problem.interpret,
        name=f"selective_scan_{kernel.__name__}",
    )(inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(problem, arrays):
    """(y, final_state); arrays are the public function's, by name."""
    return _scan_fwd(problem, arrays)[0]


def _scan_fwd(problem, arrays):
    inputs, first = _kernel_inputs(problem, arrays), _kernel_state(problem, arrays["initial_state"])
    if problem.chunks == 1:
        start = first[:, None]
    else:
        needed = {name: inputs[name] for name in ("u", "delta", "delta_bias", "A", "B")}
        summaries = _call(summarize, problem, needed, _float32("end", "step_sum"))
        start = _combine_chunks(problem, inputs["A"], first, **summaries)["starts"]
    outputs = _call(forward, problem, inputs | {"start": start}, {"y": arrays["u"].dtype} | _float32("final_state"))
    # Kept: the inputs, which live anyway, and one state a chunk. Recomputed: decays and all other states.
    return (outputs["y"], _caller_state(problem, outputs["final_state"])), (arrays, start)


def _scan_bwd(problem, residuals, cotangents):
    (arrays, start), (dy, d_final_state) = residuals, cotangents
    inputs = _kernel_inputs(problem, arrays) | {"dy": dy}
    needed = {name: x for name, x in inputs.items() if name != "D"} | {"start": start}
    summaries = _call(summarize_adjoint, problem, needed, _float32("end", "step_sum", "group_starts"))
    group_starts = summaries.pop("group_starts")
    against_time = dataclasses.replace(problem, reverse=not problem.reverse)
    carries = _combine_chunks(against_time, inputs["A"], _kernel_state(problem, d_final_state), **summaries)

    present = [name for name, x in arrays.items() if x is not None]
    types = {f"d{name}": arrays[name].dtype for name in present if name in ("u", "delta", "z")}
    types |= _float32(*(f"d{name}" for name in present if name in ("A", "B", "C", "D", "delta_bias")))
    inputs |= {"group_starts": group_starts, "start": carries["starts"]}
    gradients = _call(backward, problem, inputs, types)
    gradients["dA"] = _caller_state(problem, jnp.sum(gradients["dA"], axis=(0, 1)))
    for name in ("dB", "dC"):
        gradients[name] = jnp.sum(gradients[name], axis=0)[:, : problem.length, : problem.d_state]
    for name in gradients.keys() & {"dD", "ddelta_bias"}:
        gradients[name] = jnp.sum(gradients[name], axis=(0, 1))[: problem.d_inner]
    gradients["dinitial_state"] = _caller_state(problem, carries["last"])
    return ({name: None if x is None else gradients[f"d{name}"].astype(x.dtype) for name, x in arrays.items()},)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _float32(*names):
    return dict.fromkeys(names, jnp.float32)


def _combine_chunks(problem, A, first, end, step_sum):
    inputs = {"A": A, "first": first, "ends": end, "step_sums": step_sum}
    return _call(combine, problem, inputs, _float32("starts", "last"), each_chunk=False)


def _kernel_inputs(problem, arrays):
    """The arrays as kernels read them: what is small is padded and made float32 here."""
    inputs = {name: arrays[name] for name in ("u", "delta", "z", "B", "C")}
    for name in ("D", "delta_bias"):
        x = arrays[name]
        inputs[name] = None if x is None else _pad(x.astype(jnp.float32), 0, problem.sizes.d_inner)
    return inputs | {"A": _kernel_state(problem, arrays["A"].astype(jnp.float32) * math.log2(math.e))}


def _kernel_state(problem, x):
    """(..., d_inner, d_state) as a padded (..., d_state, d_inner)."""
    x = _pad(jnp.swapaxes(x, -1, -2), -1, problem.sizes.d_inner)
    return _pad(x, -2, problem.sizes.d_state)


def _caller_state(problem, x):
    """A padded (..., d_state, d_inner) as (..., d_inner, d_state)."""
    return jnp.swapaxes(x[..., : problem.d_state, : problem.d_inner], -1, -2)


def _pad(x, axis, multiple):
    """x with zeros after it, to a multiple of entries along an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
