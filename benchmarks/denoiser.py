"""Times a call of the denoiser at growing numbers of tokens: SISMA, its U, and the DiT of as many parameters.

    python benchmarks/denoiser.py [--size B] [--tokens 1024 4096] [--no-parts] [--json FILE]

Latents of 32, 64 and 128 positions a side, 4 channels, patch 1: images of 256, 512 and 1024 px. One image, float32,
forward, parameters at random; the condition, encoded once for all steps of a sampler, is given.

Every part of a layer is also run alone, at each resolution of the model; its share is its time at all layers over that
of the call. FLOPs are those of the parts by XLA's cost analysis, which counts the body of a loop once: so for the scan
it is asked for one step, for the convolution and attention for those of XLA. JSON: {"benchmark", "machine", "settings",
"problems"}.
"""

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import measure
from sisma_jax.config import ModelConfig, preset
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.kernels import selective_scan
from sisma_jax.models.condition import Condition
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.dit import Attention, attention
from sisma_jax.models.factory import layer_parts
from sisma_jax.models.layers import Block, FeedForward, make_block
from sisma_jax.models.mamba import CrossMamba, OrderedScan, SelfMamba

CHANNELS, DOWNSAMPLING = 4, 8
PARTS = ("scan", "projections", "convolution", "attention", "feed-forward")


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of a layer's work.

    Attributes:
      function: does it once.
      counted: does the same without loops but one of `steps` equal steps, of which this is one.
      times: in a layer.
    """

    part: str
    function: Callable
    arguments: tuple
    times: int
    counted: Callable | None = None
    counted_arguments: tuple = ()
    steps: int = 1

    def flops(self) -> float:
        """Of all its times in a layer."""
        function, arguments = (
            (self.counted, self.counted_arguments) if self.counted else (self.function, self.arguments)
        )
        return self.times * self.steps * jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def matched_dit(config: ModelConfig, mask_conditioning: str | None = None) -> ModelConfig:
    """Returns the DiT of the same width whose depth brings it nearest to the parameters of `config`'s SISMA.

    Args:
      mask_conditioning: the DiT's, if not that of `config`: "concat" leaves it with self-attention alone.
    """
    conditioning = mask_conditioning or config.mask_conditioning
    baseline = dataclasses.replace(config, backbone="dit", mask_conditioning=conditioning)

    def block_size(config: ModelConfig) -> int:
        parts = layer_parts(config.backbone)
        block = nnx.eval_shape(lambda: make_block(config, parts, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(block, nnx.Param)))

    depth = max(round(config.depth * block_size(config) / block_size(baseline)), 1)
    return dataclasses.replace(baseline, depth=depth)


def models(size: str) -> dict[str, ModelConfig]:
    flat = preset(size, patch_size=1)
    return {
        f"SISMA-{size}": flat,
        f"SISMA-U-{size}": preset(f"U-{size}", patch_size=1),
        "DiT, cross-attention": matched_dit(flat),
        "DiT, self-attention": matched_dit(flat, mask_conditioning="concat"),
    }


def random_parameters(state: nnx.State) -> nnx.State:
    """Small random values everywhere, gates included, so that no part of the work can be left out."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), state)


def denoiser(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the model's structure and its parameters' shapes."""
    sizes = len(CELEBAMASK_HQ), CHANNELS, DOWNSAMPLING

    def make():
        return Denoiser(config, layer_parts(config.backbone), *sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(make))


def call(graph: nnx.GraphDef, params: nnx.State, x: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
    return nnx.merge(graph, params)(x, t, condition)


def layers_at(config: ModelConfig, side: int) -> dict[int, int]:
    """Returns how many layers work on a grid of each side."""
    counts = {side // 2**i: 2 * depth for i, depth in enumerate(config.level_depths)}
    return counts | {side // 2 ** len(config.level_depths): config.depth}


def random_block(config: ModelConfig) -> Block:
    def make():
        return make_block(config, layer_parts(config.backbone), dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, random_parameters(state))


def work_of_layer(block: Block, side: int, d_model: int) -> list[Work]:
    """Returns what a layer does on a grid of the given side, but for what is elementwise and the reorderings."""
    rng = np.random.default_rng(0)

    def grid(channels):
        return jnp.asarray(rng.standard_normal((1, side, side, channels), np.float32))

    x = grid(d_model)
    work = []
    for module in (getattr(block, name) for name in block.names):
        if isinstance(module, FeedForward):
            work.append(_applied("feed-forward", module, x, Condition(x), ()))
        elif isinstance(module, Attention):
            work += [_applied("projections", linear, x) for linear in (module.query_proj, module.key_value_proj)]
            work.append(_applied("projections", module.out_proj, x))
            heads = x.reshape(1, side * side, -1, module.d_head)
            work.append(Work("attention", attention, (heads,) * 3, 1, jax.nn.dot_product_attention, (heads,) * 3))
        elif isinstance(module, SelfMamba | CrossMamba):
            inner = grid(module.d_inner)
            work += [_applied("projections", module.in_proj, x), _applied("projections", module.out_proj, inner)]
            num_streams = 1
            if isinstance(module, CrossMamba):
                work.append(_applied("projections", module.mask_proj, x))
                num_streams = 2
            work.append(_convolution(module.conv, inner, num_streams))
            for scan in module.scans:
                work += [_applied("projections", linear, inner) for linear in (scan.drive_proj, scan.readout_proj)]
                work += [_applied("projections", jnp.matmul, grid(scan.dt_rank), scan.dt_proj[...]), _scan(scan, inner)]
    return work


def _applied(part: str, function: Callable, *arguments: Any) -> Work:
    if isinstance(function, nnx.Module):
        graph, params = nnx.split(function)
        return Work(part, lambda params, *args: nnx.merge(graph, params)(*args), (params, *arguments), 1)
    return Work(part, function, arguments, 1)


def _convolution(conv: nnx.Module, x: jax.Array, times: int) -> Work:
    counted = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    kernel = conv.kernel[...][:, :, None]
    return dataclasses.replace(
        _applied("convolution", conv, x), times=times, counted=counted, counted_arguments=(x, kernel)
    )


def _scan(scan: OrderedScan, x: jax.Array) -> Work:
    u = x.reshape(1, -1, x.shape[-1])
    length = u.shape[1]
    state = jnp.ones((1, length, scan.d_state))
    step = (u[:, :1], u[:, :1], scan.A_log[...], state[:, :1], state[:, :1], scan.D[...])
    whole = (u, u, scan.A_log[...], state, state, scan.D[...])

    def run(u, delta, A_log, B, C, D):
        return selective_scan(u, delta, -jnp.exp(A_log), B, C, D, delta_softplus=True)

    def one(u, delta, A_log, B, C, D):
        return selective_scan(u, delta, -jnp.exp(A_log), B, C, D, delta_softplus=True, implementation="reference")

    return Work("scan", run, whole, 1, one, step, steps=length)


def measure_parts(config: ModelConfig, side: int, repeats: int) -> dict[str, dict[str, float]]:
    """Returns the seconds and FLOPs of every part at all layers of the model."""
    block = random_block(config)
    runs, counts = {}, {}
    flops = collections.Counter()
    for one_side, layers in layers_at(config, side).items():
        for i, work in enumerate(work_of_layer(block, one_side, config.d_model)):
            flops[work.part] += layers * work.flops()
            candidate = measure.compiled_candidate("", work.function, *work.arguments)
            candidate.run()
            runs[work.part, one_side, i] = candidate.run
            counts[work.part, one_side, i] = layers * work.times
    secs = collections.Counter()
    for name, samples in measure.round_robin(runs, repeats).items():
        secs[name[0]] += counts[name] * float(np.median(samples))
    return {part: {"secs": secs[part], "flops": flops[part]} for part in PARTS}


def main(
    size: str = "B",
    tokens: tuple[int, ...] = (1024, 4096),
    repeats: int = 5,
    budget_secs: float = 60.0,
    parts: bool = True,
    json: Path | None = None,
):
    """Times the denoisers.

    Args:
      size: S, B, L or XL.
      tokens: squares of the latent's side.
      repeats: rounds in which every model has a turn.
      budget_secs: a model that has run for so long sits out the remaining rounds.
      parts: also run every part of a layer alone.
      json: the file for all samples.
    """
    configs = models(size)
    records = []
    for length in tokens:
        side = math.isqrt(length)
        x = jnp.ones((1, side, side, CHANNELS))
        t, condition = jnp.full((1,), 0.5), Condition(jnp.ones((1, side, side, configs[f"SISMA-{size}"].d_model)))
        candidates, sizes = [], {}
        for name, config in configs.items():
            graph, state = denoiser(config)
            sizes[name] = sum(x.size for x in jax.tree.leaves(state))
            candidates.append(
                measure.compiled_candidate(
                    name, functools.partial(call, graph), random_parameters(state), x, t, condition
                )
            )
        results = measure.measure(candidates, repeats, budget_secs, tolerance=0.0)
        del candidates  # and the parameters with them
        first = results[0]["median_secs"]
        rows, shares = [], []
        for result, (name, config) in zip(results, configs.items(), strict=True):
            result["parameters"] = sizes[name]
            median = result["median_secs"]
            ratio = median / first if median and first else None
            result["ratio_to_first"] = ratio
            row = [name, f"{config.depth + 2 * sum(config.level_depths)}", f"{sizes[name] / 1e6:.0f}M"]
            row += [*measure.milliseconds(result), measure.mebibytes(result["temporary_bytes"])]
            rows.append([*row, "-" if ratio is None else f"{ratio:.2f}"])
            if parts and median:
                result["parts"] = measure_parts(config, side, repeats)
                total = sum(part["flops"] for part in result["parts"].values())
                cells = [
                    f"{1e3 * part['secs']:.0f} ms {100 * part['secs'] / median:.0f}%" if part["secs"] else "-"
                    for part in result["parts"].values()
                ]
                rest = 100 * (1 - sum(part["secs"] for part in result["parts"].values()) / median)
                shares.append([name, f"{total / 1e9:.1f}", f"{total / median / 1e9:.0f}", *cells, f"{rest:.0f}%"])
        columns = ["", "depth", "parameters", "ms", "quartiles", "temp MiB", "/SISMA"]
        measure.print_table(f"{length} tokens, a call", columns, rows)
        if shares:
            columns = ["", "GFLOP", "GFLOP/s", *PARTS, "the rest"]
            measure.print_table(f"{length} tokens, parts of the call", columns, shares)
        records.append({"tokens": length, "results": results})
        if json:
            settings = {"size": size, "repeats": repeats, "budget_secs": budget_secs}
            measure.write_json(json, "denoiser", settings=settings, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
