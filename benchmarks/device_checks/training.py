"""Trains the denoiser in bfloat16 for some steps by the library's training step, and samples from it.

The examples are arrays made here: masks of bands and a disc, and images that show each class in its colour.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks import measure
from benchmarks.device_checks.peaks import PEAKS
from benchmarks.device_checks.rows import Row
from sisma_jax import flops
from sisma_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, Sampling, TrainConfig, preset
from sisma_jax.diffusion.objectives import Batch, make_objective
from sisma_jax.diffusion.sampling import sample
from sisma_jax.models.autoencoder import IdentityAutoencoder
from sisma_jax.models.factory import Params, make_graph
from sisma_jax.parallel import sharding
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import jit_update, make_update

NUM_CLASSES = 19
WARMUP_STEPS = 3
# The denoiser starts with outputs of zero, so the first loss is the mean square of the target. What is to be learned,
# the colour of each class, takes few steps.
MAX_LOSS_RATIO = 0.8


@dataclasses.dataclass(frozen=True)
class TrainingCase:
    """A training run of pixels.

    Attributes:
      model: of the denoiser.
      image_size: height and width of an image in pixels.
      batch_size: examples per step.
      num_steps: training steps.
      sampling_steps: solver steps per sample.
      num_samples: images that are sampled at once.
      learning_rate: after three steps of warm-up.
    """

    model: ModelConfig
    image_size: int
    batch_size: int
    num_steps: int
    sampling_steps: int
    num_samples: int
    learning_rate: float = 3e-4

    def config(self, **model: Any) -> Config:
        """Returns the configuration.

        Args:
          model: fields of `ModelConfig` to replace.
        """
        return Config(
            data=DataConfig(image_size=self.image_size),
            model=dataclasses.replace(self.model, **model),
            optim=OptimConfig(learning_rate=self.learning_rate, warmup_steps=WARMUP_STEPS, ema_decay=0.9),
            train=TrainConfig(num_steps=self.num_steps, batch_size=self.batch_size, compute_dtype="bfloat16"),
            sample=Sampling(steps=self.sampling_steps),
        )


def case_for_device(num_steps: int = 40) -> TrainingCase:
    """Returns the training of SISMA-B with 1,024 tokens, with a batch that fits into the device's memory.

    Args:
      num_steps: training steps.
    """
    # According to the TPU compiler, a step with 16 examples needs 14.3 GiB.
    gibibytes = measure.available_bytes() / 2**30
    batch_size = next((size for size, least in ((64, 90), (32, 45), (16, 20)) if gibibytes > least), 8)
    model = preset("B", patch_size=2, remat="dots")
    return TrainingCase(model, 64, batch_size, num_steps, sampling_steps=10, num_samples=16)


def tiny_case() -> TrainingCase:
    """Returns a training that a CPU finishes in seconds."""
    model = ModelConfig(depth=1, d_model=32, patch_size=2, d_state=4, mlp_ratio=1.0, d_label=8)
    return TrainingCase(model, 8, 8, 30, sampling_steps=2, num_samples=2, learning_rate=5e-3)


def examples(size: int, count: int, seed: int) -> Batch:
    """Returns {"image": uint8 (count, size, size, 3), "mask": uint8 (count, size, size)}.

    Args:
      size: height and width in pixels.
      count: number of examples.
      seed: of the masks.
    """
    rng = np.random.default_rng(seed)
    palette = np.random.default_rng(0).integers(0, 256, (NUM_CLASSES, 3), np.uint8)
    rows, columns = np.mgrid[:size, :size] / size
    bands = rng.integers(0, NUM_CLASSES, (count, 4), np.uint8)
    mask = bands[:, (4 * rows).astype(int)]
    x, y = rng.uniform(0.2, 0.8, (2, count, 1, 1))
    is_disc = (columns[None] - x) ** 2 + (rows[None] - y) ** 2 < 0.05
    mask = np.where(is_disc, rng.integers(0, NUM_CLASSES, (count, 1, 1), np.uint8), mask)
    return {"image": palette[mask], "mask": mask}


class Training:
    """A training run, and what is computed with its parameters afterwards.

    Args:
      case: sizes of the run.
    """

    def __init__(self, case: TrainingCase):
        self._case = case
        self._params: Params | None = None
        # One device, so that numbers are those of one chip.
        self._mesh: Mesh = sharding.make_mesh(MeshConfig(), devices=jax.local_devices()[:1])

    def train(self) -> Iterator[Row]:
        """Yields the rows of the training: compilation, losses and speed."""
        case, config = self._case, self._case.config()
        batches = [examples(case.image_size, case.batch_size, seed) for seed in range(4)]
        with jax.set_mesh(self._mesh):
            shardings = sharding.of_state(jax.eval_shape(lambda: init_state(config)), self._mesh)
            state: TrainState = jax.jit(lambda: init_state(config), out_shardings=shardings)()
            placed = [jax.device_put(batch, sharding.replicated(self._mesh)) for batch in batches]
            start = time.perf_counter()
            jitted: Any = jit_update(make_update(config), state, self._mesh)
            traced = jitted.trace(state, placed[0])
            update = traced.lower().compile()
            compile_secs = time.perf_counter() - start
            work, memory = flops.count(traced.jaxpr), update.memory_analysis()
            metrics = []
            for step in range(case.num_steps):
                if step == WARMUP_STEPS:
                    jax.block_until_ready(state)
                    start = time.perf_counter()
                state, values = update(state, placed[step % len(placed)])
                metrics.append(values)
            jax.block_until_ready(state)
            secs = (time.perf_counter() - start) / (case.num_steps - WARMUP_STEPS)
        self._params = state.params
        model = case.model
        num_params = sum(x.size for x in jax.tree.leaves(state.params))
        name = (
            f"bfloat16 training, {len(batches)} batches of {case.batch_size}, depth {model.depth}, d_model "
            f"{model.d_model}, {config.token_rows**2} tokens"
        )
        temporary = None if memory is None else memory.temp_size_in_bytes
        yield Row(
            "compilation of the training step",
            "measured",
            {"value": f"{compile_secs:.0f} s, temporary memory {measure.mebibytes(temporary)} MiB"},
            record={"secs": compile_secs, "temporary_bytes": temporary},
        )
        losses = [float(values["loss"]) for values in metrics]
        skipped = sum(int(values["skipped"]) > 0 for values in metrics)
        first = statistics.mean(losses[:WARMUP_STEPS])
        last = statistics.mean(losses[-len(batches) :])
        is_good = last < MAX_LOSS_RATIO * first and not skipped and bool(np.all(np.isfinite(losses)))
        yield Row(
            name,
            "pass" if is_good else "FAIL",
            {"value": f"loss {first:.3f} to {last:.3f} in {case.num_steps} steps"},
            f"{skipped} steps were not finite" if skipped else f"wanted: below {MAX_LOSS_RATIO} of the first",
            record={"losses": losses, "skipped": skipped, "parameters": num_params},
        )
        rate, peaks = work.matmul / secs, PEAKS.get(jax.devices()[0].device_kind)
        share = "" if peaks is None else f" ({100 * rate / peaks.matmul_flops:.0f}% of peak)"
        yield Row(
            "speed of training",
            "measured",
            {
                "value": f"{1e3 * secs:.1f} ms per step, {case.batch_size / secs:.1f} examples per second, matrix "
                f"products {rate / 1e12:.1f} TFLOP/s{share}"
            },
            record={
                "step_secs": secs,
                "examples_per_sec": case.batch_size / secs,
                "matmul_flops_per_step": work.matmul,
                "parameters": num_params,
            },
        )

    def sample(self) -> Iterator[Row]:
        """Yields the rows of sampling with guidance: that images are not constant and repeat, and the speed.

        Raises:
          RuntimeError: there are no parameters, because training did not finish.
        """
        case, config, params = self._case, self._case.config(), self._trained()
        graph, count = make_graph(config), case.num_samples
        mask = examples(case.image_size, count, seed=100)["mask"]

        @jax.jit
        def draw(params: Params, keys: jax.Array, mask: jax.Array, settings: Sampling) -> jax.Array:
            return sample(
                nnx.merge(graph, params),
                keys,
                {"mask": mask},
                settings,
                autoencoder=IdentityAutoencoder(),
                flow=config.flow,
            )

        with jax.set_mesh(self._mesh):
            arguments = (params, jax.random.split(jax.random.key(1), count), jnp.asarray(mask), config.sample)
            faces = again = np.asarray(draw(*arguments))
            secs = []
            for _ in range(3):
                start = time.perf_counter()
                again = np.asarray(draw(*arguments))
                secs.append(time.perf_counter() - start)
        is_good = faces.shape == (count, case.image_size, case.image_size, 3) and faces.dtype == np.uint8
        varied, repeats = bool(np.all(faces.std(axis=(1, 2, 3)) > 0)), bool(np.array_equal(faces, again))
        median = statistics.median(secs)
        yield Row(
            f"{count} samples, {case.sampling_steps} guided steps",
            "pass" if is_good and varied and repeats else "FAIL",
            {"value": f"{1e3 * median:.0f} ms, {count / median:.1f} images per second"},
            f"shape {'right' if is_good else 'wrong'}, {'varied' if varied else 'constant'}, "
            f"{'the same bits twice' if repeats else 'other bits the second time'}",
            record={"samples_secs": secs, "images_per_sec": count / median, "steps": case.sampling_steps},
        )

    def compare(self, implementation: str, other: str) -> Iterator[Row]:
        """Yields a row that compares the losses, in float32, of the trained model with two implementations of the scan.

        Args:
          implementation: of the scan, the one to judge.
          other: of the scan.

        Raises:
          RuntimeError: there are no parameters, because training did not finish.
        """
        params = self._trained()
        batch = examples(self._case.image_size, min(self._case.batch_size, 4), seed=200)

        def losses(implementation: str) -> np.ndarray:
            config = self._case.config(scan_implementation=implementation)
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype="float32"))
            objective = make_objective(config)
            drawn = objective.draw(jax.tree.map(jnp.asarray, batch), jax.random.key(0), mask_dropout=0.0)
            return np.asarray(jax.jit(objective.held_out_losses)(params, drawn))

        # On a GPU or TPU, the default precision of float32 matrix products would hide a wrong scan.
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("highest"):
            judged, right = losses(implementation), losses(other)
        error = float(np.max(np.abs(judged - right) / right))
        tolerance = 1e-3  # float32, and the differences of the scan are carried through all layers
        yield Row(
            f"loss of the denoiser with {implementation} and with {other}, float32",
            "pass" if error <= tolerance else "FAIL",
            {"value": f"relative difference {error:.1e}"},
            f"tolerance {tolerance:.0e}",
            record={"relative_difference": error, "tolerance": tolerance},
        )

    def _trained(self) -> Params:
        if self._params is None:
            raise RuntimeError("training did not finish, so there are no parameters")
        return self._params
