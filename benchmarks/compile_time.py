"""Times the compilation of a training step at two depths, with layers in `jax.lax.scan` and with layers unrolled.

    python benchmarks/compile_time.py [--size B] [--depths 12 28] [--chip v5e] [--json FILE]

Batch 2 at 64 px (1,024 tokens), in float32 for the CPU of this machine; with --chip in bfloat16 for one chip of a TPU
that need not be present, including the Pallas kernels. The benchmark times `lower`, which includes tracing, and
`compile`. Each model is compiled once, since caches would shorten a second compilation.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from benchmarks import measure, tpu_compiler
from sisma_jax.config import Config, TrainConfig, preset
from sisma_jax.models.condition import Condition
from sisma_jax.models.layers import Stack
from sisma_jax.models.patches import Grid
from sisma_jax.parallel import sharding
from sisma_jax.training.state import init_state
from sisma_jax.training.step import make_update


def unrolled(self: Stack, x: Grid, embedding: jax.Array, condition: Condition) -> tuple[Grid, None]:
    """Replaces `Stack.run` in a flat denoiser: the compiled program contains each layer separately.

    Args:
      self: the stack of layers.
      x: tokens (B, H, W, D).
      embedding: of the time, (B, D).
      condition: at the resolution of x.

    Returns:
      The output of the last layer, and None in place of the outputs of all layers.
    """
    graph, params = nnx.split(getattr(self, sharding.STACKED))
    paths = self.paths(*x.shape[1:3])
    for i in range(len(self.layers)):
        layer_params, layer_paths = jax.tree.map(lambda leaf, i=i: leaf[i], (params, paths))
        x = nnx.merge(graph, layer_params)(x, embedding, condition, layer_paths)
    return x, None


@contextlib.contextmanager
def layers(arrangement: str) -> Iterator[None]:
    """Makes models run their layers in this way inside the context.

    Args:
      arrangement: "unrolled", or "rolled" for `jax.lax.scan`.
    """
    with mock.patch.object(Stack, "run", unrolled) if arrangement == "unrolled" else contextlib.nullcontext():
        yield


def compile_secs(config: Config, device: tpu_compiler.Device) -> tuple[float, float]:
    """Returns the seconds for lowering and for compiling the training step for a device."""
    on_device = jax.sharding.SingleDeviceSharding(device)

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device)

    batch = config.train.batch_size
    shapes = {"image": (batch, 64, 64, 3), "mask": (batch, 64, 64)}
    examples = {name: place(jax.ShapeDtypeStruct(shape, jnp.uint8)) for name, shape in shapes.items()}
    state = jax.tree.map(place, jax.eval_shape(functools.partial(init_state, config)))
    start = time.perf_counter()
    lowered = jax.jit(make_update(config), donate_argnums=0).lower(state, examples)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main(
    size: str = "B",
    depths: tuple[int, ...] = (12, 28),
    chip: str = "",
    arrangements: tuple[str, ...] = ("rolled", "unrolled"),
    json: Path | None = None,
) -> None:
    """Prints a table of the seconds of lowering and compiling.

    Args:
      size: S, B, L or XL; the depth of the preset is replaced.
      depths: numbers of layers.
      chip: v5e, v5p or v6e; empty for the CPU of this machine.
      arrangements: rolled (layers in `jax.lax.scan`, as in the model) or unrolled.
      json: file for the numbers.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    device = tpu_compiler.device(chip) if chip else jax.devices("cpu")[0]
    train = TrainConfig(batch_size=2, compute_dtype="bfloat16" if chip else "float32")
    scan = "pallas_tpu" if chip else "xla"
    records, rows = [], []
    for arrangement in arrangements:
        for depth in depths:
            model = dataclasses.replace(preset(size), depth=depth, scan_implementation=scan)
            with layers(arrangement):
                lower, compilation = compile_secs(Config(model=model, train=train), device)
            records.append(
                {"arrangement": arrangement, "depth": depth, "lower_secs": lower, "compile_secs": compilation}
            )
            rows.append([f"{arrangement}, {depth} layers", *(f"{x:.1f}" for x in (lower, compilation))])
            rows[-1].append(f"{lower + compilation:.1f}")
    title = f"Training step of {size} for {chip or 'this CPU'}, seconds"
    measure.print_table(title, ["", "lower", "compile", "both"], rows)
    if json:
        measure.write_json(json, "compile_time", settings={"size": size, "chip": chip}, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
