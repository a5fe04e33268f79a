"""The training loop: mesh, data, state, update, restore, and then step after step."""

import collections
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from sisma_jax import sharding
from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.evaluation.held_out_loss import held_out_loss
from sisma_jax.models.factory import Params
from sisma_jax.training.checkpoints import Checkpoints
from sisma_jax.training.examples import examples_of
from sisma_jax.training.metrics import MetricWriter
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import Batch, Metrics, make_held_out_loss, make_update
from sisma_jax.training.workdir import open_workdir

logger = logging.getLogger(__name__)

CHECKPOINTS_NAME = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on what, and how often it is saved.

    Attributes:
      initialize: makes the state before the first step.
      update: pure; (state, batch) -> (next state, metrics).
      held_out: averaged parameters to measurements on data that no update has seen, made at every checkpoint.
      iterator: over batches, whose arrays of these `keys` go to the devices.
      batch_size: over all devices and processes.
    """

    initialize: Callable[[], TrainState]
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    held_out: Callable[[Params], dict[str, float]]
    iterator: grain.DatasetIterator
    keys: tuple[str, ...]
    batch_size: int
    num_steps: int
    log_every_steps: int
    checkpoint_every_steps: int
    keep_checkpoints: int


def train(config: Config, workdir: Path) -> None:
    """Trains to `config.train.num_steps`, from the newest good checkpoint in `workdir` if there is one.

    Raises:
      InputError: the folder holds another run, the data are not prepared (with an autoencoder: its latents), a
        checkpoint cannot be read or written, or the loss is no longer finite.
    """
    open_workdir(workdir, config)
    settings = config.train
    examples = examples_of(config, workdir)
    losses = jax.jit(make_held_out_loss(config))

    def held_out(params: Params) -> dict[str, float]:
        batches = examples.eval_batches("test", settings.batch_size, config.evaluate.num_samples)
        return {"held_out_loss": held_out_loss(losses, params, batches, settings.batch_size)}

    job = Job(
        initialize=functools.partial(init_state, config),
        update=make_update(config),
        held_out=held_out,
        iterator=examples.train_iterator(settings.batch_size, settings.seed),
        keys=(examples.key, "mask"),
        batch_size=settings.batch_size,
        num_steps=settings.num_steps,
        log_every_steps=settings.log_every_steps,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        keep_checkpoints=settings.keep_checkpoints,
    )
    run(job, workdir)


def run(job: Job, workdir: Path) -> None:
    """Does a job, from the newest good checkpoint in `workdir` if there is one.

    Raises:
      InputError: as `train`.
    """
    mesh = sharding.make_mesh()
    sharding.require_divisible(job.batch_size, mesh)
    replicated = sharding.replicated(mesh)
    initialize = jax.jit(job.initialize, out_shardings=replicated)
    with Checkpoints(workdir / CHECKPOINTS_NAME, keep=job.keep_checkpoints) as checkpoints:
        state = _restore(checkpoints, jax.eval_shape(initialize), replicated, job.iterator)
        first_step = None if state is None else int(state.step)
        state = initialize() if state is None else state
        # The mesh in context: kernels, which XLA cannot split, split their batch over it.
        with MetricWriter(workdir, resume_step=first_step) as writer, jax.set_mesh(mesh):
            _run(job, mesh, state, checkpoints, writer)


def _restore(
    checkpoints: Checkpoints, abstract: TrainState, placement: NamedSharding, iterator: grain.DatasetIterator
) -> TrainState | None:
    """Returns the state of the newest good checkpoint with the iterator set to match, or None to start anew."""
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), abstract)
    restored = checkpoints.restore(_without_ema(placed), placed.ema, iterator)
    if restored is None:
        return None
    logger.info("Resuming from the checkpoint of step %d.", restored.step)
    return TrainState(ema=restored.ema, **restored.state)


def _without_ema(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state, "key": state.key}


def _run(job: Job, mesh: Mesh, state: TrainState, checkpoints: Checkpoints, writer: MetricWriter) -> None:
    update = jax.jit(job.update, donate_argnums=0)
    window = _Window()
    first_step = int(state.step)
    with tqdm(
        total=job.num_steps, initial=first_step, desc="training", unit="step", disable=None, smoothing=0.05
    ) as progress:
        for step in range(first_step + 1, job.num_steps + 1):
            batch = next(job.iterator)
            state, metrics = update(state, sharding.to_devices({key: batch[key] for key in job.keys}, mesh))
            window.add(step, metrics)
            is_checkpoint = step == job.num_steps or step % job.checkpoint_every_steps == 0
            is_log = is_checkpoint or step % job.log_every_steps == 0
            try:
                # Otherwise one step late, so that the device computes while the host looks at the numbers; what is
                # saved must be known to be good.
                window.read(late=not is_log)
            except _NotFiniteError as error:
                raise InputError(_divergence_message(error, checkpoints)) from None
            progress.update()
            if not is_log:
                continue
            values = window.summary(job.batch_size)
            if is_checkpoint:
                values |= job.held_out(state.ema)
            # Before the checkpoint: a run killed between the two resumes from an earlier step and writes the line
            # again, where the other order would lose it.
            writer.write(step, values)
            if is_checkpoint:
                checkpoints.save(step, state=_without_ema(state), ema=state.ema, iterator=job.iterator)
            _report(progress, step, job.num_steps, values)
            window = _Window()


class _NotFiniteError(Exception):
    """A metric of a step is NaN or infinite."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(step, name, value)
        self.step, self.name, self.value = step, name, value


class _Window:
    """The metrics of the steps since the last report."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._read: list[dict[str, float]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._pending.append((step, metrics))

    def read(self, *, late: bool) -> None:
        """Fetches metrics from the device: all, or all but the newest step's.

        Raises:
          _NotFiniteError: one is NaN or infinite.
        """
        while len(self._pending) > (1 if late else 0):
            step, metrics = self._pending.popleft()
            values = {name: float(value) for name, value in metrics.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    raise _NotFiniteError(step, name, value)
            self._read.append(values)

    def summary(self, batch_size: int) -> dict[str, float]:
        """Returns the mean of every metric, and the examples per second."""
        means = {name: sum(v[name] for v in self._read) / len(self._read) for name in self._read[0]}
        return means | {"examples_per_sec": len(self._read) * batch_size / (time.monotonic() - self._start)}


def _divergence_message(error: _NotFiniteError, checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    last = checkpoints.latest_step()
    kept = f"The last good checkpoint, step {last}, is kept." if last is not None else "There was no checkpoint yet."
    return (
        f"{error.name} is {error.value} at step {error.step}; the run stops. {kept} "
        "Lower --optim.learning_rate or --optim.clip_norm, or train in float32, with another --workdir."
    )


def _report(progress: tqdm, step: int, num_steps: int, values: dict[str, float]) -> None:
    """Shows a summary on the progress bar, or as a line in the log where there is no terminal."""
    shown = {name: f"{values[name]:.4g}" for name in ("loss", "held_out_loss", "psnr") if name in values}
    shown["examples/s"] = f"{values['examples_per_sec']:.1f}"
    if progress.disable:
        logger.info("step %d of %d: %s", step, num_steps, ", ".join(f"{k} {v}" for k, v in shown.items()))
    else:
        progress.set_postfix(shown)
