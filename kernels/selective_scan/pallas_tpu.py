"""The selective scan as Pallas kernels for TPUs, forward and backward, with the equations of `reference.py`.

One kernel per pass, on a grid of examples, blocks of channels and chunks of time steps: `pallas_tpu_layout` describes
the blocks, and `pallas_tpu_kernels` contains the bodies. The state stays in VMEM while the chunks pass. The forward
pass keeps the state at the start of each chunk, and the backward pass recomputes a chunk's states from it into VMEM, so
that no array of size (batch, length, d_inner, d_state) is ever in HBM. Bias, softplus, skip and gate are computed
inside the kernels: outside, each would read and write sequences in HBM once more.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..derivatives import with_gradient
from ..typing import Array, Float, Ref, ScanArrays
from .pallas_tpu_kernels import LOG2_E, BackwardRefs, ForwardRefs, backward_kernel, forward_kernel
from .pallas_tpu_layout import GROUP, LANES, PARTS, SUBLANES, BlockSizes, Config, Layout, padded_state
from .pallas_tpu_tiles import TURNED_ROWS
from .reference import CHECKPOINT_NAME, first_state, skip_and_gate
from .xla import selective_scan_xla

Refs = TypeVar("Refs", ForwardRefs, BackwardRefs)

FLOAT32 = jnp.dtype("float32")
# VMEM of one core is 128 MiB on v5e and v6e and 64 MiB on v7x. XLA keeps other arrays in it too, so the kernels plan
# for half of the smaller one. The limit given to the compiler leaves room for its own temporaries and register spills.
VMEM_BUDGET_BYTES = 32 * 2**20
VMEM_LIMIT_BYTES = 48 * 2**20
# The backward pass holds three registers for each one of a strip's state, in A, dh and dA, of the 64 that a core has.
# At d_state 16, strips of six tiles gained nothing over four: the compiler spilled more.
MAX_STATE_REGISTERS = 8
MAX_STRIP_TILES = 4
# 2,304 channels, the widest preset. Loops over tiles are unrolled, so that this limits the size of the kernel's code.
MAX_BLOCK_TILES = 18

# (y, final_state), or their gradients.
Outputs = tuple[Float[Array, "B L D"], Float[Array, "B D N"]]
ChunkStates = Float[Array, "B chunks rows channels"]


def selective_scan_pallas_tpu(
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
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Returns (y, final_state); see `selective_scan` for the formula, and for the shapes of the arguments.

    Args:
      u: as for `selective_scan`, like the other arrays; float32 or bfloat16.
      delta: step sizes before bias and softplus.
      A: diagonal of each channel's state matrix.
      B: input matrix of each token.
      C: output matrix of each token.
      D: skip weight of each channel; no skip connection if None.
      z: gate before its SiLU; no gate if None.
      delta_bias: added to delta; no bias if None.
      delta_softplus: apply a softplus to the step sizes.
      reverse: scan from the last token to the first.
      initial_state: state before the first scanned token; zeros if None.
      interpret: run the kernels in Pallas's interpreter on the CPU; with `pltpu.InterpretParams`, simulate the memories
        of a TPU too.

    Returns:
      y, with the shape and dtype of u, and the state after the last scanned token, float32.

    Raises:
      NotImplementedError: a dtype or d_state is not supported; see `check_supported_by_pallas_tpu`.
    """
    check_supported_by_pallas_tpu(u, delta, A, B, C, D, z, delta_bias, initial_state)
    # The kernels always take an initial state, so that they need no variant without one.
    state = first_state(initial_state, u, A, FLOAT32)
    # A grid without programs would leave the outputs unwritten.
    if 0 in u.shape or 0 in A.shape:
        return skip_and_gate(jnp.zeros(u.shape, FLOAT32), u, D, z), state
    batch, length, d_inner = u.shape
    sizes = block_sizes(batch, length, d_inner, A.shape[1], u.dtype.itemsize)
    config = Config(sizes, delta_softplus, reverse, interpret)
    arrays = ScanArrays(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=state)
    scan = with_gradient(
        functools.partial(_evaluate, config),
        functools.partial(_save, config),
        functools.partial(_gradient, config),
        # Kernels have no forward mode: tangents are those of the loops in XLA.
        plain=lambda arrays: selective_scan_xla(**arrays, delta_softplus=delta_softplus, reverse=reverse),
        name=CHECKPOINT_NAME,
    )
    return scan(arrays)


def check_supported_by_pallas_tpu(
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
      NotImplementedError: an array is neither float32 nor bfloat16, or the states of a chunk do not fit in VMEM.
    """
    arrays = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    for name, x in arrays.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name}: got dtype {x.dtype}, pallas_tpu supports float32 and bfloat16")
    batch, length, d_inner = u.shape
    block_sizes(batch, length, d_inner, A.shape[1], u.dtype.itemsize)


def block_sizes(batch: int, length: int, d_inner: int, d_state: int, itemsize: int) -> BlockSizes:
    """Returns the widths of blocks and strips with the least padding, and the most steps up to 128 that fit in VMEM.

    Args:
      batch: number of examples, at least 1.
      length: steps of the sequence, at least 1.
      d_inner: number of channels, at least 1.
      d_state: states per channel, at least 1.
      itemsize: bytes per entry of u.

    Raises:
      NotImplementedError: the states of 16 steps exceed the VMEM budget.
    """
    all_tiles = pl.cdiv(d_inner, LANES)
    # Each block of channels repeats the work on B and C, so there are as few as possible. But a single example has two,
    # one for each core of a v4 or v5p chip.
    blocks = max(pl.cdiv(all_tiles, MAX_BLOCK_TILES), 2 if batch == 1 and all_tiles > 1 else 1)
    block_tiles = pl.cdiv(all_tiles, blocks)
    # A wider strip has more independent operations to overlap, but less room for A, h and dA in registers. Among widths
    # with the same padding, the widest.
    widest = min(MAX_STRIP_TILES, max(1, MAX_STATE_REGISTERS * SUBLANES // padded_state(d_state)))
    tiles = min(range(1, widest + 1), key=lambda tiles: (pl.cdiv(block_tiles, tiles) * tiles, -tiles))
    strips = pl.cdiv(block_tiles, tiles)
    # A power of two, so that groups of 16 steps divide it, and no longer than the sequence needs. Longer chunks keep
    # fewer states in HBM and need more VMEM; above 128 steps the states in HBM are small beside u.
    steps = min(128, max(GROUP, pl.next_power_of_2(length)))
    while _vmem_bytes(BlockSizes(tiles, strips, steps), d_state, itemsize) > VMEM_BUDGET_BYTES:
        if steps == GROUP:
            raise NotImplementedError(
                f"A: got {d_state} states per channel, which do not fit in VMEM for pallas_tpu; use implementation "
                "'xla'"
            )
        steps //= 2
    return BlockSizes(tiles, strips, steps)


def _vmem_bytes(sizes: BlockSizes, d_state: int, itemsize: int) -> int:
    """The VMEM of the backward pass, which is larger than that of the forward pass.

    It consists of the scratch of `_backward`, and two buffers for each operand that is copied in or out: the seven
    sequences u, delta, z, dy and the gradients of u, delta and z; A, dA, and a chunk's first state and the gradients of
    the first and last state; B, C and their gradients; D, delta_bias and theirs, which take 8 rows each.
    """
    steps, rows = sizes.steps, padded_state(d_state)
    projection_lanes = pl.cdiv(PARTS * rows, LANES) * LANES
    # Entries of float32.
    states = steps * rows * sizes.tiles * LANES
    by_step = 6 * steps * sizes.channels
    by_entry = 4 * steps * rows * LANES
    by_group = 3 * TURNED_ROWS * sizes.tiles * LANES
    operands = (5 * rows + 4 * SUBLANES) * sizes.channels + 2 * steps * (projection_lanes + rows)
    return 4 * (states + by_step + by_entry + by_group + 2 * operands) + 2 * 7 * steps * sizes.channels * itemsize


def _evaluate(config: Config, arrays: ScanArrays) -> Outputs:
    """(y, final_state). Without a gradient, the states at chunk starts are not written."""
    outputs = _forward(config, arrays, keep_chunk_states=False)
    return outputs["y"], outputs["final_state"]


def _save(config: Config, arrays: ScanArrays) -> tuple[Outputs, ChunkStates]:
    outputs = _forward(config, arrays, keep_chunk_states=True)
    # The gradient needs the inputs, which are alive anyway, and one float32 state per chunk, 1/128 of all states at the
    # usual chunk of 128 steps. It recomputes step sizes, decays and states. Keeping all states would take d_state times
    # the memory of a float32 u, and the HBM traffic to write and read it.
    return (outputs["y"], outputs["final_state"]), outputs["chunk_states"]


def _gradient(config: Config, arrays: ScanArrays, chunk_states: ChunkStates, cotangents: Outputs) -> ScanArrays:
    gradients = _backward(config, arrays, chunk_states, *cotangents)
    # Gradients that are sums come in float32, and are rounded to the argument's dtype here, after the last addition.
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, arrays)


def _kernel_inputs(layout: Layout, arrays: ScanArrays) -> dict[str, tuple[Array, str]]:
    """{name: (array, kind of operand)} of what both kernels read; absent arguments have no entry."""
    inputs = {"u": (arrays["u"], "sequence"), "delta": (arrays["delta"], "sequence")}
    if arrays["z"] is not None:
        inputs["z"] = (arrays["z"], "sequence")
    # A is scaled once here, so that exp(Δ A) is 2^(Δ A log2 e): the hardware's exponential has base 2, and `exp` would
    # multiply each of its arguments by log2 e.
    inputs["A"] = (layout.pad_state(arrays["A"].T) * LOG2_E, "matrix")
    inputs |= {name: (layout.to_projection(arrays[name]), "projection") for name in ("B", "C")}
    for name, x in (("D", arrays["D"]), ("delta_bias", arrays["delta_bias"])):
        if x is not None:
            inputs[name] = (layout.pad_vector(x), "vector")
    return inputs


def _forward(config: Config, arrays: ScanArrays, keep_chunk_states: bool) -> dict[str, Array]:
    """y, final_state and, if kept, chunk_states (in the layout of the kernels), by name."""
    u = arrays["u"]
    layout = Layout.of(config, u, arrays["A"], backward=False)
    inputs = _kernel_inputs(layout, arrays)
    inputs["initial_state"] = (layout.pad_state(jnp.swapaxes(arrays["initial_state"], 1, 2)), "state")
    outputs = {"y": ("sequence", u.dtype), "final_state": ("state", FLOAT32)}
    if keep_chunk_states:
        outputs["chunk_states"] = ("chunk_states", FLOAT32)
    scratch = {name: _by_entry(layout) for name in ("B_rows", "C_rows")}
    scratch |= {name: _by_step(layout) for name in ("step_size", "drive", "y_sum")}
    scratch["y_turned"] = _by_group(layout)
    # Per entry of a state: Δ A, its product with h, drive B, their sum, and multiplication by C and addition to y.
    result = _call(forward_kernel, ForwardRefs, layout, inputs, outputs, scratch, operations=6)
    return result | {"final_state": layout.from_state(result["final_state"])}


def _backward(
    config: Config,
    arrays: ScanArrays,
    chunk_states: ChunkStates,
    dy: Float[Array, "B L D"],
    d_final_state: Float[Array, "B D N"],
) -> ScanArrays:
    """The gradients of the arrays; those that are sums are float32.

    The initial state itself is not needed: it is the first of the chunk states.
    """
    layout = Layout.of(config, arrays["u"], arrays["A"], backward=True)
    inputs = _kernel_inputs(layout, arrays) | {
        "d_out": (dy, "sequence"),
        "chunk_states": (chunk_states, "chunk_states"),
        "d_final_state": (layout.pad_state(jnp.swapaxes(d_final_state, 1, 2)), "state"),
    }
    # dA is accumulated per example, because examples are on a parallel axis of the grid.
    outputs = {
        "du": ("sequence", arrays["u"].dtype),
        "d_delta": ("sequence", arrays["delta"].dtype),
        "dA": ("state", FLOAT32),
        "dB": ("projection_sums", FLOAT32),
        "dC": ("projection_sums", FLOAT32),
        "d_initial_state": ("state", FLOAT32),
    }
    scratch = {name: _by_entry(layout) for name in ("B_rows", "C_rows", "dB_rows", "dC_rows")}
    scratch |= {name: _by_step(layout) for name in ("step_size", "drive", "dy", "d_drive", "d_step_size")}
    scratch |= {name: _by_group(layout) for name in ("d_drive_turned", "d_step_size_turned")}
    scratch["states"] = (layout.steps * layout.tiles * layout.padded_state, LANES)
    if arrays["D"] is not None:
        outputs["dD"] = ("vector_sums", FLOAT32)
    if arrays["delta_bias"] is not None:
        outputs["d_delta_bias"] = ("vector_sums", FLOAT32)
    # The gradient of z needs the gate's input, which is recomputed with the states and not kept.
    if arrays["z"] is not None:
        outputs["dz"] = ("sequence", arrays["z"].dtype)
        scratch |= {"y_sum": _by_step(layout), "y_turned": _by_group(layout)}
    # About 20 operations per entry of a state: to recompute it, for its adjoint, and for the products in the gradients.
    d = _call(backward_kernel, BackwardRefs, layout, inputs, outputs, scratch, operations=20)
    # XLA finishes the sums: those of parameters over the examples, and those of dB and dC over the blocks of channels.
    return ScanArrays(
        u=d["du"],
        delta=d["d_delta"],
        A=layout.from_state(d["dA"]).sum(axis=0),
        B=layout.from_projection_sums(d["dB"]),
        C=layout.from_projection_sums(d["dC"]),
        D=layout.from_vector_sums(d["dD"]) if "dD" in d else None,
        z=d.get("dz"),
        delta_bias=layout.from_vector_sums(d["d_delta_bias"]) if "d_delta_bias" in d else None,
        initial_state=layout.from_state(d["d_initial_state"]),
    )


def _by_entry(layout: Layout) -> tuple[int, int]:
    """The shape of scratch with a row of 128 lanes for each step and state index."""
    return layout.steps * layout.padded_state, LANES


def _by_step(layout: Layout) -> tuple[int, int]:
    """The shape of scratch with a row of 128 channels for each tile of the block and step."""
    return layout.channels // LANES * layout.steps, LANES


def _by_group(layout: Layout) -> tuple[int, int]:
    """The shape of scratch with a register for each step of a group and tile of a strip."""
    return layout.tiles * TURNED_ROWS, LANES


def _call(
    kernel: Callable[[Refs, Layout], None],
    refs_type: type[Refs],
    layout: Layout,
    inputs: dict[str, tuple[Array, str]],
    outputs: dict[str, tuple[str, jnp.dtype]],
    scratch: dict[str, tuple[int, ...]],
    operations: int,
) -> dict[str, Array]:
    """Runs the kernel over the layout's grid and returns its outputs by name.

    Args:
      kernel: called as kernel(refs, layout).
      refs_type: the class of refs, whose fields are the names of inputs, outputs and scratch.
      layout: sizes, grid and block specs of the pass.
      inputs: {name: (array, kind of operand)}, where the kinds are those of `Layout.operands`; absent arguments have no
        entry.
      outputs: {name: (kind of operand, dtype)}.
      scratch: {name: shape} of float32 buffers in VMEM. They keep their contents from one program to the next.
      operations: arithmetic operations per entry of a state, for XLA's scheduler.
    """
    operands = layout.operands()
    # Inside a `jax.shard_map`, outputs vary over the mesh axes that shard the batch.
    varies = jax.typeof(inputs["u"][0]).manual_axis_type
    out_shape = [
        jax.ShapeDtypeStruct(operands[kind].shape, dtype, manual_axis_type=varies) for kind, dtype in outputs.values()
    ]

    def body(*refs: Ref) -> None:
        # pallas_call passes references by position: inputs, outputs, scratch.
        kernel(refs_type(**dict(zip((*inputs, *outputs, *scratch), refs, strict=True))), layout)

    # The cost of the recurrence. The operations per step and channel, such as the gate, are few in comparison.
    entries = layout.batch * layout.length * layout.d_inner * layout.d_state
    results = pl.pallas_call(
        body,
        grid=layout.grid,
        in_specs=[operands[kind].spec for _, kind in inputs.values()],
        out_specs=[operands[kind].spec for kind, _ in outputs.values()],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            # Examples and blocks of channels are independent. Chunks run in order on one core: each starts from the
            # state that the one before left in VMEM.
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        # XLA cannot see inside the kernel, and schedules the operations around it by this estimate. The backward pass
        # computes each decay twice: keeping them would need as much VMEM as the states.
        cost_estimate=pl.CostEstimate(
            flops=operations * entries,
            transcendentals=entries * (2 if layout.backward else 1),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*(x for x, _ in inputs.values()), *out_shape)),
        ),
        interpret=layout.interpret,
        name=f"selective_scan_{'backward' if layout.backward else 'forward'}",
    )(*(x for x, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))
