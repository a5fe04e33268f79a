"""Times a function evaluation of the denoiser by number of tokens: SISMA, its U shape, and a DiT of the same size.

    python benchmarks/denoiser.py [--size B] [--tokens 1024 4096] [--no-parts] [--torch-compile] [--json FILE]

The latents have 32, 64 or 128 positions per side, 4 channels and patch size 1, which corresponds to images of 256, 512
and 1024 px. The benchmark evaluates one image in float32, forward only, with random parameters. The encoding of the
mask and what the layers read from it are not included, since a sampler computes them once for all steps.

If PyTorch is installed (benchmarks/requirements-torch.txt), each DiT also runs in PyTorch, with the same parameters. It
is timed only if its results agree. `--peer MODULE:FUNCTION` adds any other PyTorch module: the function
gets the side of the latent and the width of the mask features, and returns a module that maps latents (1, L, C), times
(1,) and mask features (1, L, D), float32, to a tensor.

The benchmark also runs every part of a layer alone, at each resolution of the model. The share of a part is its time in
all layers divided by the time of the function evaluation. FLOPs are the sum over the parts by XLA's cost analysis. This
counts the body of a loop once, so the FLOPs of the scan are those of one step multiplied by the number of steps, and
those of convolution and attention are XLA's for its own implementations. JSON: {"benchmark", "machine", "settings",
"problems"}.
"""

import dataclasses
import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict

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
from sisma_jax.models.convolution import DepthwiseConv
from sisma_jax.models.denoiser import Denoiser
from sisma_jax.models.dit import Attention, CrossAttention, attention
from sisma_jax.models.factory import layer_parts
from sisma_jax.models.layers import Block, FeedForward, make_block
from sisma_jax.models.mamba import CrossMamba, OrderedScan, SelfMamba

CHANNELS, DOWNSAMPLING = 4, 8
PARTS = ("scan", "projections", "convolution", "attention", "feed-forward")


State: TypeAlias = nnx.State[Any, Any]
"""Parameters of a module, or their shapes."""


class PartCost(TypedDict):
    """Seconds and FLOPs of one of `PARTS` in all layers of a model."""

    secs: float
    flops: float


class DenoiserResult(measure.Result):
    """A result with the number of parameters, the median's ratio to that of the first model, and the costs of parts."""

    parameters: int | None
    ratio_to_first: float | None
    parts: NotRequired[dict[str, PartCost]]


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation of a layer.

    Attributes:
      part: the one of `PARTS` to which it belongs.
      function: executes the operation once.
      arguments: of `function`.
      times: how often a layer executes the operation.
      counted: a function without loops whose FLOPs are counted in place of those of `function`, or None.
      counted_arguments: of `counted`.
      steps: how many times the work of `counted` is contained in that of `function`.
    """

    part: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    times: int
    counted: Callable[..., Any] | None = None
    counted_arguments: tuple[Any, ...] = ()
    steps: int = 1

    def flops(self) -> float:
        """Returns the FLOPs of all executions in a layer.

        Raises:
          RuntimeError: the compiler does not report them.
        """
        function, arguments = (
            (self.counted, self.counted_arguments) if self.counted else (self.function, self.arguments)
        )
        cost = jax.jit(function).lower(*arguments).cost_analysis()
        if cost is None:
            raise RuntimeError("the compiler does not report the cost of its programs")
        return self.times * self.steps * cost["flops"]


def matched_dit(config: ModelConfig, mask_conditioning: str | None = None) -> ModelConfig:
    """Returns a DiT of the same width, with the depth at which its number of parameters is nearest to that of a SISMA.

    Args:
      config: of the SISMA model.
      mask_conditioning: of the DiT, by default that of `config`; with "concat" it contains only self-attention.
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
    """Returns the models to compare, by name, with patch size 1.

    Args:
      size: S, B, L or XL.
    """
    flat = preset(size, patch_size=1)
    return {
        f"SISMA-{size}": flat,
        f"SISMA-U-{size}": preset(f"U-{size}", patch_size=1),
        "DiT, cross-attention": matched_dit(flat),
        "DiT, self-attention": matched_dit(flat, mask_conditioning="concat"),
    }


def random_parameters(state: State) -> State:
    """Returns small random values of these shapes, also for gates, whose initial zeros could let XLA remove work."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), state)


def denoiser(config: ModelConfig) -> tuple[nnx.GraphDef[Denoiser], State]:
    """Returns the graph definition of a model and the shapes of its parameters."""
    sizes = len(CELEBAMASK_HQ), CHANNELS, DOWNSAMPLING

    def make() -> Denoiser:
        return Denoiser(config, layer_parts(config.backbone), *sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(make))


def call(graph: nnx.GraphDef[Denoiser], params: State, x: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
    """Returns the velocity, float32 with the shape of x.

    Args:
      graph: of the denoiser.
      params: its parameters.
      x: noisy latents, float32 (B, H, W, C).
      t: times in [0, 1], float32 (B,).
      condition: the encoded masks, with what the layers have read from them.
    """
    return nnx.merge(graph, params)(x, t, condition)


def read(graph: nnx.GraphDef[Denoiser], params: State, condition: Condition) -> Condition:
    """Returns the encoded masks with what the layers read from them.

    Args:
      graph: of the denoiser.
      params: its parameters.
      condition: the encoded masks.
    """
    return nnx.merge(graph, params).read(condition)


def layers_at(config: ModelConfig, side: int) -> dict[int, int]:
    """Returns the number of layers by the side of the grid of tokens on which they operate.

    Args:
      config: of the model.
      side: tokens along the side of the latent.
    """
    counts = {side // 2**i: 2 * depth for i, depth in enumerate(config.level_depths)}
    return counts | {side // 2 ** len(config.level_depths): config.depth}


def random_block(config: ModelConfig) -> Block:
    """Returns one layer of a model with random parameters."""

    def make() -> Block:
        return make_block(config, layer_parts(config.backbone), dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, random_parameters(state))


def work_of_layer(block: Block, side: int, d_model: int) -> list[Work]:
    """Returns the operations of a layer, without elementwise operations and the reordering of tokens.

    What a layer reads from the mask is not among them, with the presets' wiring of Cross-Mamba.

    Args:
      block: the layer.
      side: tokens along the side of the grid.
      d_model: channels of a token.
    """
    rng = np.random.default_rng(0)

    def grid(channels: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((1, side, side, channels), np.float32))

    x = grid(d_model)
    work = []
    for module in (getattr(block, name) for name in block.names):
        if isinstance(module, FeedForward):
            work.append(_applied("feed-forward", module, x, None, ()))
        elif isinstance(module, Attention):
            linears = (
                (module.query_proj,)
                if isinstance(module, CrossAttention)
                else (module.query_proj, module.key_value_proj)
            )
            work += [_applied("projections", linear, x) for linear in linears]
            work.append(_applied("projections", module.out_proj, x))
            heads = x.reshape(1, side * side, -1, module.d_head)
            work.append(Work("attention", attention, (heads,) * 3, 1, jax.nn.dot_product_attention, (heads,) * 3))
        elif isinstance(module, SelfMamba | CrossMamba):
            inner = grid(module.d_inner)
            work += [_applied("projections", module.in_proj, x), _applied("projections", module.out_proj, inner)]
            work.append(_convolution(module.conv, inner))
            for scan in module.scans:
                assert isinstance(scan, OrderedScan), "the presets have the mixer scan"
                work += [_applied("projections", scan.readout_proj, inner), _scan(scan, inner)]
                if isinstance(module, SelfMamba):
                    work.append(_applied("projections", scan.drive_proj, inner))
                    work.append(_applied("projections", jnp.matmul, grid(scan.dt_rank), scan.dt_proj[...]))
    return work


def _applied(part: str, function: Callable[..., Any], *arguments: Any) -> Work:
    if isinstance(function, nnx.Module):
        graph, params = nnx.split(function)
        return Work(part, lambda params, *args: nnx.merge(graph, params)(*args), (params, *arguments), 1)
    return Work(part, function, arguments, 1)


def _convolution(conv: DepthwiseConv, x: jax.Array) -> Work:
    counted = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    kernel = conv.kernel[...][:, :, None]
    return dataclasses.replace(_applied("convolution", conv, x), counted=counted, counted_arguments=(x, kernel))


def _scan(scan: OrderedScan, x: jax.Array) -> Work:
    u = x.reshape(1, -1, x.shape[-1])
    length = u.shape[1]
    state = jnp.ones((1, length, scan.d_state))
    step = (u[:, :1], u[:, :1], scan.A_log[...], state[:, :1], state[:, :1], scan.D[...])
    whole = (u, u, scan.A_log[...], state, state, scan.D[...])

    def run(
        u: jax.Array,
        delta: jax.Array,
        A_log: jax.Array,
        B: jax.Array,
        C: jax.Array,
        D: jax.Array,
        implementation: str | None = None,
    ) -> measure.PyTree:
        return selective_scan(u, delta, -jnp.exp(A_log), B, C, D, delta_softplus=True, implementation=implementation)

    return Work("scan", run, whole, 1, functools.partial(run, implementation="reference"), step, steps=length)


def measure_parts(config: ModelConfig, side: int, repeats: int) -> dict[str, PartCost]:
    """Returns the cost of each of `PARTS` in all layers of a model.

    Args:
      config: of the model.
      side: tokens along the side of the latent.
      repeats: number of timed runs of each operation.
    """
    block = random_block(config)
    runs: dict[tuple[str, int, int], Callable[[], measure.PyTree]] = {}
    counts: dict[tuple[str, int, int], int] = {}
    costs: dict[str, PartCost] = {part: {"secs": 0, "flops": 0} for part in PARTS}
    for one_side, layers in layers_at(config, side).items():
        for i, work in enumerate(work_of_layer(block, one_side, config.d_model)):
            costs[work.part]["flops"] += layers * work.flops()
            candidate = measure.compiled_candidate("", work.function, *work.arguments)
            candidate.run()
            runs[work.part, one_side, i] = candidate.run
            counts[work.part, one_side, i] = layers * work.times
    for name, samples in measure.round_robin(runs, repeats).items():
        costs[name[0]]["secs"] += counts[name] * float(np.median(samples))
    return costs


def main(
    size: str = "B",
    tokens: tuple[int, ...] = (1024, 4096),
    repeats: int = 5,
    budget_secs: float = 60.0,
    parts: bool = True,
    torch_compile: bool = False,
    peer: str = "",
    json: Path | None = None,
) -> None:
    """Times the denoisers and prints tables for each number of tokens.

    Args:
      size: S, B, L or XL.
      tokens: numbers of tokens, each a square number.
      repeats: number of rounds; each round runs every model once.
      budget_secs: a model whose runs add up to more than this is left out of the remaining rounds.
      parts: run every part of a layer alone, too.
      torch_compile: also run the PyTorch models after `torch.compile`, which needs a C++ compiler.
      peer: MODULE:FUNCTION that returns a PyTorch module to add.
      json: file for all samples.
    """
    configs = models(size)
    records = []
    for length in tokens:
        side = math.isqrt(length)
        x = jnp.ones((1, side, side, CHANNELS))
        t, mask = jnp.full((1,), 0.5), jnp.ones((1, side, side, configs[f"SISMA-{size}"].d_model))
        candidates, sizes, config_of = [], {}, {}
        for name, config in configs.items():
            graph, state = denoiser(config)
            params = random_parameters(state)
            condition = jax.jit(functools.partial(read, graph))(params, Condition(mask))
            has_torch = config.backbone == "dit" and importlib.util.find_spec("torch") is not None
            new = [
                measure.compiled_candidate(
                    name, functools.partial(call, graph), params, x, t, condition, group=name if has_torch else ""
                )
            ]
            if has_torch:
                from benchmarks.torch_dit import torch_candidates  # which imports PyTorch

                new += torch_candidates(name, params, config, x, t, mask, is_compiled=torch_compile)
            candidates += new
            for one in new:
                sizes[one.name], config_of[one.name] = sum(leaf.size for leaf in jax.tree.leaves(state)), config
        if peer:
            from benchmarks.torch_dit import peer_candidate

            candidates.append(peer_candidate(peer, x, t, mask))
        results = measure.measure(candidates, repeats, budget_secs, tolerance=1e-3)
        del candidates  # and the parameters with them
        first = results[0]["median_secs"]
        rows, shares = [], []
        denoiser_results: list[DenoiserResult] = []
        for measured in results:
            name, median = measured["name"], measured["median_secs"]
            config = config_of.get(name)
            ratio = median / first if median and first else None
            result: DenoiserResult = {**measured, "parameters": sizes.get(name), "ratio_to_first": ratio}
            denoiser_results.append(result)
            depth = f"{config.depth + 2 * sum(config.level_depths)}" if config else ""
            row = [name, depth, f"{sizes[name] / 1e6:.0f}M" if config else ""]
            row += [*measure.milliseconds(result), measure.mebibytes(result["temporary_bytes"])]
            rows.append([*row, "-" if ratio is None else f"{ratio:.2f}"])
            if parts and median and name in configs:
                costs = result["parts"] = measure_parts(configs[name], side, repeats)
                total = sum(part["flops"] for part in costs.values())
                cells = [
                    f"{1e3 * part['secs']:.0f} ms {100 * part['secs'] / median:.0f}%" if part["secs"] else "-"
                    for part in costs.values()
                ]
                rest = 100 * (1 - sum(part["secs"] for part in costs.values()) / median)
                shares.append([name, f"{total / 1e9:.1f}", f"{total / median / 1e9:.0f}", *cells, f"{rest:.0f}%"])
        columns = ["", "depth", "parameters", "ms", "quartiles", "temp MiB", "/SISMA"]
        measure.print_table(f"{length} tokens, one function evaluation", columns, rows)
        if shares:
            columns = ["", "GFLOP", "GFLOP/s", *PARTS, "other"]
            measure.print_table(f"{length} tokens, parts of the function evaluation", columns, shares)
        records.append({"tokens": length, "results": denoiser_results})
        if json:
            settings = {"size": size, "repeats": repeats, "budget_secs": budget_secs}
            measure.write_json(json, "denoiser", settings=settings, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
