"""The training loop: mesh, data, state, update, restore, and then step after step."""

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sisma_jax.config import Config
from sisma_jax.data.dataset import BatchSource, Share
from sisma_jax.errors import InputError, Preempted
from sisma_jax.evaluation.held_out_loss import held_out_loss
from sisma_jax.models.factory import Params, init_params
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.parallel.preemption import Preemption
from sisma_jax.runs import flat_trees
from sisma_jax.runs.checkpoints import HELD_OUT_LOSS, Checkpoints
from sisma_jax.runs.export import load_exported
from sisma_jax.runs.folder import RunFolder, TrainingFolder
from sisma_jax.runs.metrics import MetricWriter
from sisma_jax.runs.profiling import Profile
from sisma_jax.runs.ranking import BestMetric
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import Metrics, Update, jit_update, make_held_out_loss, make_update

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on what, and how often it is saved.

    Attributes:
      mesh: of the devices that train.
      initialize: makes the state before the first step.
      initial_params: in place of those that `initialize` makes; called if training starts from nothing.
      update: of the state.
      held_out: EMA parameters to measurements on data that no update has seen, made at every checkpoint.
      iterator: over this process's share of the batches (`local_share`), whose arrays but "id" go to the devices.
      batch_size: over all devices and processes.
      best: by which measurement `keep_best` checkpoints are kept besides the newest `keep_checkpoints`.
      max_skipped_steps: in a row, before the run stops.
      profiled: steps that are traced.
    """

    mesh: Mesh
    initialize: Callable[[], TrainState]
    update: Update
    held_out: Callable[[Params], dict[str, float]]
    iterator: grain.DatasetIterator
    batch_size: int
    num_steps: int
    log_every_steps: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    max_skipped_steps: int
    initial_params: Callable[[], Params] | None = None
    keep_best: int = 0
    best: BestMetric | None = None
    profiled: range = range(0)


def local_share(mesh: Mesh) -> Share:
    """Returns which part of every batch this process reads for its devices."""
    parts = sharding.batch_shards(mesh, jax.process_index())
    return Share(tuple(parts), sharding.num_batch_shards(mesh))


def make_mesh(config: Config) -> Mesh:
    """Returns the mesh of all devices for the denoiser's training.

    Raises:
      InputError: it does not fit the devices, or the batch the mesh.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.require_fit(config, mesh, config.train.batch_size, config.train.accumulate_steps)
    return mesh


def train(run: RunFolder, examples: BatchSource) -> None:
    """Trains a run's denoiser to `config.train.num_steps`, from its newest good checkpoint if it has one.

    Every process of a job calls this. SIGTERM to one of them makes all save after the same step and raise `Preempted`.

    Args:
      run: held for writing.
      examples: images or, for a denoiser of latents, those of the run's autoencoder.

    Raises:
      InputError: the mesh does not fit the devices or the batch the mesh, a checkpoint cannot be read or written, loss,
        gradients or updates are not finite again and again, or another job has taken the folder over.
      Preempted: see above.
    """
    config, settings = run.config, run.config.train
    mesh = make_mesh(config)
    losses = make_held_out_loss(config, mesh)

    def held_out(params: Params) -> dict[str, float]:
        batches = examples.eval_batches("test", settings.batch_size, limit=config.evaluate.num_samples)
        return {HELD_OUT_LOSS.name: held_out_loss(losses, params, batches, settings.batch_size, mesh)}

    job = Job(
        mesh=mesh,
        initialize=functools.partial(init_state, config),
        update=make_update(config),
        held_out=held_out,
        iterator=examples.train_batches(settings.batch_size, settings.seed, local_share(mesh)),
        batch_size=settings.batch_size,
        num_steps=settings.num_steps,
        log_every_steps=settings.log_every_steps,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        keep_checkpoints=settings.keep_checkpoints,
        max_skipped_steps=settings.max_skipped_steps,
        initial_params=functools.partial(initial_params, config) if settings.init_from else None,
        keep_best=settings.keep_best,
        best=HELD_OUT_LOSS,
        profiled=settings.profiled,
    )
    run_job(job, run)


def run_job(job: Job, folder: TrainingFolder) -> TrainState:
    """Does a job, from the newest good checkpoint in its folder if there is one, and returns the state at its end.

    Raises:
      InputError, Preempted: as `train`.
    """
    abstract = jax.eval_shape(job.initialize)
    shardings = sharding.of_state(abstract, job.mesh)
    kept = {"keep": job.keep_checkpoints, "best": job.best, "keep_best": job.keep_best}
    with Checkpoints(folder.checkpoints, **kept) as checkpoints:
        state = _restore(checkpoints, sharding.place(abstract, shardings), job.iterator)
        first_step = None if state is None else int(state.step)
        if state is None:
            state = _new_state(job, shardings)
        profile = Profile(job.profiled, folder.profile)
        with MetricWriter(folder, resume_step=first_step) as writer, Preemption() as preemption, profile:
            return _run(job, state, folder, checkpoints, writer, preemption, profile)


def _new_state(job: Job, shardings: TrainState) -> TrainState:
    with jax.set_mesh(job.mesh):
        state = jax.jit(job.initialize, out_shardings=shardings)()
    if job.initial_params is None:
        return state
    params = sharding.distribute(job.initial_params(), shardings.params)

    def copies(params: Params) -> tuple[Params, Params]:
        return jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, params)

    # Apart in memory, as an update donates its state.
    params, ema = jax.jit(copies, out_shardings=(shardings.params, shardings.ema))(params)
    return state.replace(params=params, ema=ema)


def initial_params(config: Config) -> Params:
    """Returns the parameters in the file that a new run begins with.

    Raises:
      InputError: there is no such file, it is damaged, or of another model.
    """
    path = config.train.init_from
    exported = load_exported(path)
    own = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    forms = [flat_trees.forms(flat_trees.flatten_abstract(tree)) for tree in (exported.params, own)]
    if lines := flat_trees.list_differences(*forms, owners=("the file", "this configuration")):
        raise InputError(f"train.init_from {path} is of another model:{flat_trees.shorten(lines)}")
    return exported.params


def _restore(checkpoints: Checkpoints, placed: TrainState, iterator: grain.DatasetIterator) -> TrainState | None:
    """Returns the state of the newest good checkpoint with the iterator set to match, or None to start anew."""
    restored = checkpoints.restore(_without_ema(placed), placed.ema, iterator)
    if restored is None:
        return None
    if is_primary():
        logger.info("Resuming from the checkpoint of step %d.", restored.step)
    return TrainState(ema=restored.ema, **restored.state)


def _without_ema(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "ema"}


def _run(
    job: Job,
    state: TrainState,
    folder: TrainingFolder,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    preemption: Preemption,
    profile: Profile,
) -> TrainState:
    update = jit_update(job.update, state, job.mesh)
    window = _Window()
    first_step = int(state.step)
    with tqdm(
        total=job.num_steps,
        initial=first_step,
        desc="training",
        unit="step",
        disable=None if is_primary() else True,
        smoothing=0.05,
    ) as progress:
        for step in range(first_step + 1, job.num_steps + 1):
            profile.before(step)
            arrays = {name: x for name, x in next(job.iterator).items() if name != "id"}
            batch = sharding.to_devices(arrays, job.mesh, job.batch_size)
            # The mesh in context: kernels, which XLA cannot shard, shard their batch over it.
            with jax.set_mesh(job.mesh):
                state, metrics = update(state, batch)
            profile.after(step, metrics)
            window.add(step, metrics)
            is_preempted = preemption.is_due(step)
            is_checkpoint = step == job.num_steps or step % job.checkpoint_every_steps == 0
            is_log = is_checkpoint or is_preempted or step % job.log_every_steps == 0
            # Otherwise one step late, so that the device computes while the host looks at the numbers.
            window.read(late=not is_log)
            if window.skipped_in_a_row > job.max_skipped_steps:
                raise InputError(_divergence_message(window, checkpoints))
            progress.update()
            if not is_log:
                continue
            values = window.summary(job.batch_size)
            if is_checkpoint and not is_preempted:
                values |= job.held_out(state.ema)
            # Before the checkpoint: a run killed between the two resumes from an earlier step and writes the line
            # again, where the other order would lose it.
            writer.write(step, values)
            if is_checkpoint or is_preempted:
                folder.require_lock()
                writer.sync()
                checkpoints.save(step, state=_without_ema(state), ema=state.ema, iterator=job.iterator, metrics=values)
            _report(progress, step, job.num_steps, values)
            if is_preempted:
                checkpoints.wait()
                raise Preempted(f"Told to stop: step {step} is saved, and the same command resumes from there.")
            window = _Window(window.skipped_in_a_row)
    return state


class _Window:
    """The metrics of the steps since the last report.

    Attributes:
      skipped_in_a_row: the last steps, also from before, that were skipped because a value was not finite.
      last_step, last: number and metrics of the newest step that was read.
    """

    def __init__(self, skipped_in_a_row: int = 0) -> None:
        self.skipped_in_a_row = skipped_in_a_row
        self.last_step, self.last = 0, {}
        self._start = time.monotonic()
        self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._read: list[dict[str, np.ndarray]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        self._pending.append((step, metrics))

    def read(self, *, late: bool) -> None:
        """Fetches metrics from the device: all, or all but the newest step's."""
        while len(self._pending) > (1 if late else 0):
            self.last_step, metrics = self._pending.popleft()
            self.last = jax.device_get(metrics)
            self._read.append(self.last)
            self.skipped_in_a_row = int(self.last["skipped"])

    def summary(self, batch_size: int) -> dict[str, float]:
        """Returns the mean of every metric over the steps that were not skipped, the number of those that were, and
        the examples per second."""
        counted = [values for values in self._read if not values["skipped"]]
        names = [name for name in self._read[0] if name != "skipped"] if counted else []
        means = {name: float(np.mean([values[name] for values in counted])) for name in names}
        return means | {
            "skipped_steps": float(len(self._read) - len(counted)),
            "examples_per_sec": len(self._read) * batch_size / (time.monotonic() - self._start),
        }


def _divergence_message(window: _Window, checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    last, count = checkpoints.latest_step(), window.skipped_in_a_row
    kept = f"The last good checkpoint, step {last}, is kept." if last is not None else "There was no checkpoint yet."
    causes = [name for name in ("loss", "grad_norm") if not np.isfinite(window.last[name])]
    cause = f"{causes[0]} is {float(window.last[causes[0]])}" if causes else "the update is not finite"
    skipped = f" The {count} updates up to it were skipped." if count > 1 else ""
    return (
        f"{cause} at step {window.last_step}; the run stops.{skipped} {kept} Lower optim.learning_rate or "
        "optim.clip_norm, or train in float32, in another folder; or tolerate more of them in a row by "
        "train.max_skipped_steps."
    )


def _report(progress: tqdm, step: int, num_steps: int, values: dict[str, float]) -> None:
    """Shows a summary on the progress bar, or as a line in the log where there is no terminal."""
    shown = {name: f"{values[name]:.4g}" for name in ("loss", "held_out_loss", "psnr") if name in values}
    if values["skipped_steps"]:
        shown["skipped"] = f"{values['skipped_steps']:.0f}"
    shown["examples/s"] = f"{values['examples_per_sec']:.1f}"
    if not progress.disable:
        progress.set_postfix(shown)
    elif is_primary():
        logger.info("step %d of %d: %s", step, num_steps, ", ".join(f"{k} {v}" for k, v in shown.items()))
