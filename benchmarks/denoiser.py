"""Times a call of the denoiser, SISMA beside the DiT of as many parameters, at growing numbers of tokens.

    python benchmarks/denoiser.py [--preset-name B] [--tokens 1024 4096] [--json FILE]

Latents of 32, 64 and 128 positions a side, 4 channels, patch 1: images of 256, 512 and 1024 px. One image, float32,
forward, parameters at random. JSON: {"benchmark", "machine", "settings", "problems"}.
"""

import dataclasses
import functools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import measure
from sisma_jax.config import ModelConfig, preset
from sisma_jax.models.baselines.dit import Dit, matched_dit
from sisma_jax.models.sisma import Sisma

CHANNELS, DOWNSAMPLING = 4, 8
CLASSES = {"sisma": Sisma, "dit": Dit}


def abstract(make) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(make))


def random_parameters(state: nnx.State) -> nnx.State:
    """Small random values everywhere, gates included, so that no part of the work can be left out."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), state)


def count(state: nnx.State) -> int:
    return sum(x.size for x in jax.tree.leaves(state))


def denoiser(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    cls = CLASSES[config.backbone]
    return abstract(lambda: cls(config, CHANNELS, DOWNSAMPLING, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))


def call(graph: nnx.GraphDef, params: nnx.State, x: jax.Array, t: jax.Array, features: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(x, t, features)


def main(
    preset_name: str = "B",
    tokens: tuple[int, ...] = (1024, 4096),
    repeats: int = 5,
    budget_secs: float = 60.0,
    json: Path | None = None,
):
    """Times the denoisers.

    Args:
      preset_name: S, B, L or XL.
      tokens: squares of the latent's side.
      repeats: rounds in which every model has a turn.
      budget_secs: a model that has run for so long sits out the remaining rounds.
      json: the file for all samples.
    """
    sisma = preset(preset_name, patch_size=1)
    models = {"sisma": sisma, "dit, cross-attention": matched_dit(sisma)}
    concat = dataclasses.replace(sisma, mask_conditioning="concat")
    models["dit, concatenation"] = matched_dit(concat)
    records = []
    for length in tokens:
        side = math.isqrt(length)
        x = jnp.ones((1, side, side, CHANNELS))
        t, features = jnp.full((1,), 0.5), jnp.ones((1, side, side, sisma.d_model))
        candidates = []
        for name, config in models.items():
            graph, state = denoiser(config)
            candidates.append(
                measure.compiled_candidate(
                    name, functools.partial(call, graph), random_parameters(state), x, t, features
                )
            )
        results = measure.measure(candidates, repeats, budget_secs, tolerance=0.0)
        first = results[0]["median_secs"]
        rows = []
        for result, config in zip(results, models.values(), strict=True):
            result["parameters"] = count(denoiser(config)[1])
            median = result["median_secs"]
            result["ratio_to_sisma"] = median and first and median / first
            ratio = result["ratio_to_sisma"]
            rows.append(
                [
                    result["name"],
                    f"{config.depth}",
                    f"{result['parameters'] / 1e6:.0f}M",
                    *measure.milliseconds(result),
                    measure.mebibytes(result["temporary_bytes"]),
                    "-" if ratio is None else f"{ratio:.2f}",
                ]
            )
        title = f"{preset_name}, {length} tokens, a call"
        measure.print_table(title, ["", "depth", "parameters", "ms", "quartiles", "temp MiB", "/sisma"], rows)
        records.append({"tokens": length, "results": results})
    if json:
        settings = {"preset": preset_name, "repeats": repeats, "budget_secs": budget_secs}
        measure.write_json(json, "denoiser", settings=settings, problems=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
