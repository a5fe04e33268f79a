"""The selective scan on CUDA GPUs since Hopper: Pallas kernels compiled by Mosaic GPU, forward and backward.

The equations are those of `reference.py`. A program is one warpgroup that takes a block of channels through the
complete sequence, tile by tile. The four warps of a program work on a quarter of the tile each. A quarter is linear in
its start state, so that the warps scan it from zero at the same time, exchange what they found, and scan it again from
the right state with the decays that they have kept in registers. So each pass is one kernel, and takes one exponential
per state and step, where the Triton kernels of `pallas_gpu` take two forward and four backward.

`mosaic_gpu_layout` describes tiles and programs, and `mosaic_gpu_kernels` contains the bodies. Carries, exponentials
and sums are float32 for every input dtype, and no sum depends on the order in which programs run, so results are
reproducible bit by bit.

No array of size (batch, length, d_inner, d_state) is ever in memory. The forward pass keeps the state before each tile
for the backward pass. The sums over channels for the gradients of B and C are computed by at most 264 programs, or one
per example, each of which has a partial sum in memory: their size does not grow with the number of channels.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..derivatives import with_gradient
from ..partition import vary_alike
from ..typing import Array, Float, ScanArrays
from .mosaic_gpu_kernels import backward, forward, scratch_names
from .mosaic_gpu_layout import WARPS, BlockSizes, Problem, block_sizes, operands, parameter_shapes
from .mosaic_gpu_program import SLOTS, Program
from .reference import CHECKPOINT_NAME, first_state, skip_and_gate
from .xla import selective_scan_xla

__all__ = [
    "BlockSizes",
    "block_sizes",
    "check_supported_by_mosaic_gpu",
    "device_runs_mosaic_gpu",
    "selective_scan_mosaic_gpu",
]

# With more, the decays and states of even one step per lane would not leave enough registers.
MAX_D_STATE = 64

FLOAT32 = jnp.dtype("float32")

# (y, final_state), or their gradients.
Outputs = tuple[Float[Array, "B L D"], Float[Array, "B D N"]]
TileStates = Float[Array, "B tiles padN padD"]


def selective_scan_mosaic_gpu(
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
    interpret: Any = False,
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
      interpret: run the kernels on the CPU: True for Pallas's interpreter, which knows no threads, or an
        `InterpretGPUParams` for the interpreter of Mosaic GPU kernels, which emulates barriers and asynchronous copies.

    Returns:
      y, with the shape and dtype of u, and the state after the last scanned token, float32.

    Raises:
      NotImplementedError: a dtype or d_state is not supported; see `check_supported_by_mosaic_gpu`.
    """
    check_supported_by_mosaic_gpu(u, delta, A, B, C, D, z, delta_bias, initial_state)
    state = first_state(initial_state, u, A, FLOAT32)
    # A grid without programs would leave the outputs unwritten.
    if 0 in u.shape or 0 in A.shape:
        return skip_and_gate(jnp.zeros(u.shape, FLOAT32), u, D, z), state
    (batch, length, d_inner), d_state = u.shape, A.shape[1]
    problem = Problem(batch, length, d_inner, d_state, block_sizes(d_state), delta_softplus, reverse, interpret)
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


def check_supported_by_mosaic_gpu(
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
            raise NotImplementedError(f"{name}: got dtype {x.dtype}, mosaic_gpu supports float32 and bfloat16")
    if A.shape[1] > MAX_D_STATE:
        raise NotImplementedError(
            f"A: got {A.shape[1]} states per channel, mosaic_gpu supports at most {MAX_D_STATE}; "
            "use implementation 'xla'"
        )


def device_runs_mosaic_gpu() -> bool:
    """Returns whether the default backend's first device is a CUDA GPU with compute capability 9 or 10."""
    # The TMA came with Hopper, 9, and 10 is Blackwell. GPUs with compute capability 12 have less shared memory than the
    # kernels need for 64 states.
    capability = getattr(jax.local_devices()[0], "compute_capability", "none")
    return str(capability).split(".")[0] in ("9", "10")


def _call(
    kernel: Callable[[Program], None],
    problem: Problem,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, jnp.dtype],
) -> dict[str, Array]:
    """Runs the kernel and returns its outputs.

    Args:
      kernel: what one program does.
      problem: the sizes and options for which to compile it.
      inputs: arrays by name; absent arguments have no entry.
      outputs: dtypes by name.
    """
    layouts, sizes = operands(problem), problem.sizes
    shapes = {name: operand.shape for name, operand in layouts.items()} | parameter_shapes(problem)

    def body(inputs: dict[str, Any], outputs: dict[str, Any], scratch: dict[str, Any]) -> None:
        kernel(Program(problem, inputs, outputs, scratch))

    # The blocks that are copied for each tile.
    old = {f"old {name}": outputs[name] for name in ("dB", "dC") if name in outputs and problem.rounds > 1}
    read = {name: x.dtype for name, x in inputs.items() if name in layouts} | old
    written = {name: dtype for name, dtype in outputs.items() if name in layouts}
    buffers = {
        name: plgpu.SMEM((SLOTS, *layouts[name.removeprefix("old ")].block), dtype)
        for name, dtype in (read | written).items()
    }
    of_tokens, of_states = scratch_names(kernel)
    scratch: dict[str, Any] = {name: plgpu.SMEM((WARPS, sizes.steps, sizes.d_inner), FLOAT32) for name in of_tokens}
    scratch |= {name: plgpu.SMEM((WARPS, sizes.d_state, sizes.d_inner), FLOAT32) for name in of_states}
    scratch["carry"] = plgpu.SMEM((sizes.d_state, sizes.d_inner), FLOAT32)
    scratch["buffers"] = buffers
    out_type = {name: jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs.items()}
    grid = (problem.blocks if kernel is forward else problem.groups, problem.batch)
    if problem.interpret is True:
        # The interpreter accepts references of any memory space.
        run = pl.pallas_call(body, out_type, grid=grid, scratch_shapes=[scratch], interpret=True)
        return run(dict(inputs))
    # The barrier of a slot waits for all blocks that are copied for the tile.
    scratch["barriers"] = plgpu.Barrier(num_arrivals=len(read), num_barriers=SLOTS)
    run = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[scratch],
        grid=grid,
        grid_names=("group", "example"),
        compiler_params=plgpu.CompilerParams(
            # Exponentials and divisions are those of the hardware.
            approx_math=True,
            # The kernels place their barriers themselves: one per phase instead of two per store.
            unsafe_no_auto_barriers=True,
            # The layouts of arrays are stated in the kernels, and not inferred.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name=f"selective_scan_mosaic_{kernel.__name__}",
        interpret=problem.interpret,
    )
    # Inside a `jax.shard_map`, kernels drop the mesh axes over which values vary.
    _, results = vary_alike((inputs, run(dict(inputs))))
    return results


def _save(problem: Problem, arrays: ScanArrays) -> tuple[Outputs, TileStates]:
    """(y, final_state), and the states before each tile in the layout of the kernels."""
    inputs = _kernel_inputs(problem, arrays) | {"initial_state": _kernel_state(problem, arrays["initial_state"])}
    outputs = _call(forward, problem, inputs, {"y": arrays["u"].dtype} | _float32("final_state", "starts"))
    y = _caller_sequence(problem, outputs["y"])
    # The gradient needs the inputs, which are alive anyway, and one state per tile. It recomputes step sizes, decays
    # and all other states.
    return (y, _caller_state(problem, outputs["final_state"])), outputs["starts"]


def _gradient(problem: Problem, arrays: ScanArrays, starts: TileStates, cotangents: Outputs) -> ScanArrays:
    dy, d_final_state = cotangents
    inputs = _kernel_inputs(problem, arrays) | {"dy": _kernel_sequence(problem, dy), "starts": starts}
    inputs["d_final_state"] = _kernel_state(problem, d_final_state)
    # Gradients of sequences are complete and are written in the dtype of their argument. The others are partial sums.
    types = {f"d{name}": inputs[name].dtype for name in ("u", "delta", "z") if name in inputs}
    types |= _float32(*(f"d{name}" for name in ("A", "B", "C", "D", "delta_bias") if name in inputs))
    d = _call(backward, problem, inputs, types | _float32("d_initial_state"))

    def projection(x: Float[Array, "groups B chunks T padN"]) -> Float[Array, "B L N"]:
        x = jnp.sum(x, axis=0)
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, : problem.length, : problem.d_state]

    def per_channel(name: str) -> Float[Array, " D"] | None:
        return jnp.sum(d[name], axis=(0, 1))[: problem.d_inner] if name in d else None

    gradients = ScanArrays(
        u=_caller_sequence(problem, d["du"]),
        delta=_caller_sequence(problem, d["ddelta"]),
        A=_caller_state(problem, jnp.sum(d["dA"], axis=(0, 1))),
        B=projection(d["dB"]),
        C=projection(d["dC"]),
        D=per_channel("dD"),
        z=_caller_sequence(problem, d["dz"]) if "dz" in d else None,
        delta_bias=per_channel("ddelta_bias"),
        initial_state=_caller_state(problem, d["d_initial_state"]),
    )
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, arrays)


def _float32(*names: str) -> dict[str, jnp.dtype]:
    return dict.fromkeys(names, FLOAT32)


def _kernel_inputs(problem: Problem, arrays: ScanArrays) -> dict[str, Array]:
    """The arrays as the kernels read them, by name; absent arguments have no entry."""
    inputs = {name: _kernel_sequence(problem, arrays[name]) for name in ("u", "delta")}
    if arrays["z"] is not None:
        inputs["z"] = _kernel_sequence(problem, arrays["z"])
    for name in ("B", "C"):
        inputs[name] = _by_quarters(problem, _pad(arrays[name], -1, problem.sizes.d_state))
    # A is scaled once here, so that exp(Δ A) is 2^(Δ A log2 e): the GPU's instruction for exponentials has base 2.
    inputs["A"] = _kernel_state(problem, arrays["A"].astype(jnp.float32) * math.log2(math.e))
    for name, x in (("D", arrays["D"]), ("delta_bias", arrays["delta_bias"])):
        if x is not None:
            inputs[name] = _pad(x.astype(jnp.float32), 0, problem.padded_width)
    return inputs


def _kernel_sequence(problem: Problem, x: Float[Array, "B L D"]) -> Float[Array, "B chunks T padD"]:
    """x by quarters of tiles. It is only copied if its length or width does not suit the TMA."""
    return _by_quarters(problem, _pad(x, 2, problem.sequence_shape[1]))


def _by_quarters(problem: Problem, x: Float[Array, "B L _"]) -> Float[Array, "B chunks T _"]:
    x = _pad(x, 1, problem.sequence_shape[0])
    return x.reshape(x.shape[0], -1, problem.sizes.steps, x.shape[2])


def _caller_sequence(problem: Problem, x: Float[Array, "B chunks T padD"]) -> Float[Array, "B L D"]:
    """The inverse of `_kernel_sequence`."""
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, : problem.length, : problem.d_inner]


def _kernel_state(problem: Problem, x: Float[Array, "*axes D N"]) -> Float[Array, "*axes padN padD"]:
    """x with its last two axes exchanged and padded to complete blocks."""
    return _pad(_pad(jnp.swapaxes(x, -1, -2), -1, problem.padded_width), -2, problem.sizes.d_state)


def _caller_state(problem: Problem, x: Float[Array, "*axes padN padD"]) -> Float[Array, "*axes D N"]:
    """The inverse of `_kernel_state`."""
    return jnp.swapaxes(x[..., : problem.d_state, : problem.d_inner], -1, -2)


def _pad(x: Float[Array, "..."], axis: int, size: int) -> Float[Array, "..."]:
    """x with zeros at the end of an axis, which then has `size` entries."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
