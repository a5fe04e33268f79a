"""Times forward mode through the denoiser, and the gradient of an objective that contains it.

    python benchmarks/forward_mode.py [--config configs/demo.py] [--batch 16] [--json FILE]

The derivative is that along a path of the flow: along the velocity in the images, and 1 in the time. The rows are a
function evaluation; the same with the derivative (`jax.jvp`); the gradient of the squared error to a fixed target, as
in flow matching; and the gradient of the squared error to a target that contains the derivative, as in mean flows
(arXiv 2505.13447). The mask encoder is included. Parameters are random, so that no work is removed. JSON: {"benchmark",
"machine", "settings", "results"}.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import measure
from benchmarks.denoiser import State, random_parameters
from sisma_jax import config_files
from sisma_jax.config import Config
from sisma_jax.models.factory import make_denoiser


def candidates(config: Config, batch: int) -> list[measure.Candidate]:
    """Returns the compiled functions to compare, the function evaluation first.

    Args:
      config: gives the model and the size of its images, which are not encoded.
      batch: number of images.
    """
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make_denoiser(config, jax.random.key(0))))
    rng = np.random.default_rng(0)
    shape = (batch, config.data.image_size, config.data.image_size)
    x, velocity = (jnp.asarray(rng.standard_normal((*shape, 3)), jnp.float32) for _ in range(2))
    t = jnp.asarray(rng.uniform(size=batch), jnp.float32)
    mask = jnp.asarray(rng.integers(0, len(config.data.classes), shape), jnp.uint8)

    def predict(params: State, x: jax.Array, t: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return model(x, t, model.encode({"mask": mask}))

    def with_derivative(params: State, x: jax.Array, t: jax.Array, velocity: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(lambda x, t: predict(params, x, t), (x, t), (velocity, jnp.ones_like(t)))

    def flow_loss(params: State, x: jax.Array, t: jax.Array, velocity: jax.Array) -> jax.Array:
        return jnp.mean((predict(params, x, t) - velocity) ** 2)

    def mean_flow_loss(params: State, x: jax.Array, t: jax.Array, velocity: jax.Array) -> jax.Array:
        prediction, derivative = with_derivative(params, x, t, velocity)
        return jnp.mean((prediction - velocity + jax.lax.stop_gradient(derivative)) ** 2)

    params = random_parameters(shapes)
    return [
        measure.compiled_candidate("function evaluation", predict, params, x, t),
        measure.compiled_candidate("with derivative", with_derivative, params, x, t, velocity),
        measure.compiled_candidate("gradient of flow matching", jax.grad(flow_loss), params, x, t, velocity),
        measure.compiled_candidate("gradient of mean flow", jax.grad(mean_flow_loss), params, x, t, velocity),
    ]


def main(
    config: str = "configs/demo.py",
    batch: int = 16,
    repeats: int = 9,
    budget_secs: float = 120.0,
    json: Path | None = None,
) -> None:
    """Times the functions in turns and prints a table.

    Args:
      config: file of the configuration whose model is measured.
      batch: number of images.
      repeats: number of rounds; each round runs every function once.
      budget_secs: a function whose runs add up to more than this is left out of the remaining rounds.
      json: file for all samples.
    """
    results = measure.measure(candidates(config_files.load(config), batch), repeats, budget_secs, tolerance=0.0)
    first = results[0]["median_secs"]
    rows = []
    for result in results:
        median = result["median_secs"]
        ratio = f"{median / first:.2f}" if median and first else "-"
        rows.append(
            [result["name"], *measure.milliseconds(result), measure.mebibytes(result["temporary_bytes"]), ratio]
        )
    measure.print_table(f"{config}, batch {batch}", ["", "ms", "quartiles", "temp MiB", "/first"], rows)
    if json:
        settings = {"config": config, "batch": batch, "repeats": repeats, "budget_secs": budget_secs}
        measure.write_json(json, "forward_mode", settings=settings, results=results)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
