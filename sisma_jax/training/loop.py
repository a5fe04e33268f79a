"""The training loop: mesh, data, state, update, restore, and then step after step."""

import collections
import logging
import math
import time
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from sisma_jax.config import Config
from sisma_jax.data import loading
from sisma_jax.errors import InputError
from sisma_jax.evaluation.held_out_loss import held_out_loss
from sisma_jax.training import sharding
from sisma_jax.training.checkpoints import Checkpoints
from sisma_jax.training.metrics import MetricWriter
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import make_held_out_loss, make_update
from sisma_jax.training.workdir import open_workdir

logger = logging.getLogger(__name__)

CHECKPOINTS_NAME = "checkpoints"


def train(config: Config, workdir: Path) -> None:
    """Trains to `config.train.num_steps`, from the newest good checkpoint in `workdir` if there is one.

    Raises:
      InputError: the folder holds another run, the data are not prepared, a checkpoint cannot be read or written, or
        the loss is no longer finite.
    """
    open_workdir(workdir, config)
    mesh = sharding.make_mesh()
    sharding.require_divisible(config.train.batch_size, mesh)
    iterator = loading.train_iterator(
        config.data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    replicated = sharding.replicated(mesh)
    initialize = jax.jit(lambda: init_state(config), out_shardings=replicated)
    with Checkpoints(workdir / CHECKPOINTS_NAME, keep=config.train.keep_checkpoints) as checkpoints:
        state = _restore(checkpoints, jax.eval_shape(initialize), replicated, iterator)
        first_step = None if state is None else int(state.step)
        state = initialize() if state is None else state
        # The mesh in context: kernels, which XLA cannot split, split their batch over it.
        with MetricWriter(workdir, resume_step=first_step) as writer, jax.set_mesh(mesh):
            _run(config, mesh, state, iterator, checkpoints, writer)


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


def _run(
    config: Config,
    mesh: Mesh,
    state: TrainState,
    iterator: grain.DatasetIterator,
    checkpoints: Checkpoints,
    writer: MetricWriter,
) -> None:
    settings = config.train
    update = jax.jit(make_update(config), donate_argnums=0)
    losses = jax.jit(make_held_out_loss(config))
    window = _Window()
    first_step = int(state.step)
    with tqdm(
        total=settings.num_steps, initial=first_step, desc="training", unit="step", disable=None, smoothing=0.05
    ) as progress:
        for step in range(first_step + 1, settings.num_steps + 1):
            batch = next(iterator)
            state, metrics = update(state, sharding.to_devices({key: batch[key] for key in ("image", "mask")}, mesh))
            window.add(step, metrics)
            is_checkpoint = step == settings.num_steps or step % settings.checkpoint_every_steps == 0
            is_log = is_checkpoint or step % settings.log_every_steps == 0
            try:
                # Otherwise one step late, so that the device computes while the host looks at the numbers; what is
                # saved must be known to be good.
                window.read(late=not is_log)
            except _NotFiniteError as error:
                raise InputError(_divergence_message(error, checkpoints)) from None
            progress.update()
            if not is_log:
                continue
            values = window.summary(settings.batch_size)
            if is_checkpoint:
                values["held_out_loss"] = held_out_loss(
                    losses,
                    state.ema,
                    config.data,
                    batch_size=settings.batch_size,
                    num_examples=config.evaluate.num_samples,
                )
            # Before the checkpoint: a run killed between the two resumes from an earlier step and writes the line
            # again, where the other order would lose it.
            writer.write(step, values)
            if is_checkpoint:
                checkpoints.save(step, state=_without_ema(state), ema=state.ema, iterator=iterator)
            _report(progress, step, settings.num_steps, values)
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
    shown = {name: f"{values[name]:.4g}" for name in ("loss", "held_out_loss") if name in values}
    shown["examples/s"] = f"{values['examples_per_sec']:.1f}"
    if progress.disable:
        logger.info("step %d of %d: %s", step, num_steps, ", ".join(f"{k} {v}" for k, v in shown.items()))
    else:
        progress.set_postfix(shown)
