"""The training loop: mesh, data, state, restore, and then one step after another."""

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sisma_jax.config import Config
from sisma_jax.data.dataset import Batch, BatchSource, Share
from sisma_jax.errors import InputError, Preempted
from sisma_jax.evaluation.held_out_loss import held_out_losses
from sisma_jax.models.factory import Params, init_params
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.parallel.preemption import Preemption
from sisma_jax.runs import flat_trees
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.export import load_exported
from sisma_jax.runs.folder import RunFolder, TrainingFolder
from sisma_jax.runs.metrics import MetricWriter
from sisma_jax.runs.profiling import Profile
from sisma_jax.runs.ranking import BEST_METRICS, BestMetric
from sisma_jax.training.state import TrainState, init_state
from sisma_jax.training.step import Metrics, Update, jit_update, make_held_out_loss, make_update

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained on which data, and how often it is logged and saved.

    Attributes:
      mesh: of all devices.
      initialize: returns the state before the first step; jitted.
      update: the training step.
      held_out: returns measurements of a step's EMA parameters on held-out data; called at every checkpoint.
      iterator: yields this process's share (`local_share`) of each batch. All arrays except "id" go to the devices.
      batch_size: examples per step, over all devices and processes.
      num_steps: step at which training ends.
      log_every_steps: steps between two lines of metrics.
      checkpoint_every_steps: steps between two checkpoints.
      keep_checkpoints: number of newest checkpoints to keep.
      max_skipped_steps: consecutive steps that may be skipped because a value is not finite; the next one stops the
        run.
      initial_params: returns parameters that replace those of `initialize`; called if there is no checkpoint.
      keep_best: number of best checkpoints to keep in addition.
      best: the measurement that ranks checkpoints.
      profiled: steps to trace.
    """

    mesh: Mesh
    initialize: Callable[[], TrainState]
    update: Update
    held_out: Callable[[int, Params], dict[str, float]]
    iterator: grain.DatasetIterator[Batch]
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
    """Returns the part of each batch that this process loads for its devices."""
    parts = sharding.batch_shards(mesh, jax.process_index())
    return Share(tuple(parts), sharding.num_batch_shards(mesh))


def make_mesh(config: Config) -> Mesh:
    """Returns the device mesh for training the denoiser.

    Raises:
      InputError: the mesh does not match the number of devices, or the batch cannot be sharded evenly over it.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.require_fit(config, mesh, config.train.batch_size, config.train.accumulate_steps)
    return mesh


def train(
    run: RunFolder, examples: BatchSource, evaluate: Callable[[int, Params], dict[str, float]] | None = None
) -> None:
    """Trains the denoiser of a run up to `config.train.num_steps`.

    Training resumes from the newest undamaged checkpoint, if there is one. A resumed run is bit-identical to an
    uninterrupted one. Every process of a job must call this. On SIGTERM to any of them, all processes save a checkpoint
    after the same step and raise `Preempted`.

    Args:
      run: the run, opened with `RunFolder.writing`.
      examples: images or, for a denoiser of latents, the latents of the run's autoencoder.
      evaluate: returns further measurements of a step's EMA parameters; called at every checkpoint.

    Raises:
      InputError: the mesh does not match the devices or the batch, a checkpoint cannot be read or written, the loss,
        the gradient or the update is not finite in too many consecutive steps, or another job has taken over the
        folder.
      Preempted: SIGTERM arrived, and a checkpoint is saved.
    """
    config, settings = run.config, run.config.train
    mesh = make_mesh(config)
    losses = make_held_out_loss(config, mesh)

    def held_out(step: int, params: Params) -> dict[str, float]:
        batches = examples.eval_batches("test", settings.batch_size, limit=config.evaluate.num_samples)
        loss = float(held_out_losses(losses, params, batches, settings.batch_size, mesh).mean())
        return {"held_out_loss": loss} | ({} if evaluate is None else evaluate(step, params))

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
        best=BEST_METRICS[settings.best],
        profiled=settings.profiled,
    )
    run_job(job, run)


def run_job(job: Job, folder: TrainingFolder) -> TrainState:
    """Runs a training job, and returns the state after its last step.

    Training resumes from the newest undamaged checkpoint in the folder, if there is one. Every process must call this.

    Args:
      job: what to train.
      folder: where to write; its lock is held.

    Raises:
      InputError: as for `train`.
      Preempted: as for `train`.
    """
    abstract = jax.eval_shape(job.initialize)
    shardings = sharding.of_state(abstract, job.mesh)
    with Checkpoints(
        folder.checkpoints, keep=job.keep_checkpoints, best=job.best, keep_best=job.keep_best
    ) as checkpoints:
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

    # Separate buffers, because the training step donates its state.
    params, ema = jax.jit(copies, out_shardings=(shardings.params, shardings.ema))(params)
    return dataclasses.replace(state, params=params, ema=ema)


def initial_params(config: Config) -> Params:
    """Returns the parameters in the file `train.init_from`, from which a new run starts.

    A mean flow can start from a model of flow matching. What this model lacks is initialised: the embeddings of the
    duration and of the guidance, which are zero at first.

    Raises:
      InputError: the file does not exist or is damaged, or its model differs from that of the configuration.
    """
    path = config.train.init_from
    exported = load_exported(path)
    predicted = exported.config.flow.prediction
    if predicted != config.flow.prediction:
        raise InputError(f"train.init_from {path} predicts {predicted}; set flow.prediction to {predicted}.")
    own = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    if config.flow.objective == "mean_flow" and exported.config.flow.objective == "flow_matching":
        exported = dataclasses.replace(exported, params=_with_new_embeddings(config, exported.params))
    theirs, ours = (flat_trees.forms(flat_trees.flatten_abstract(tree)) for tree in (exported.params, own))
    if lines := flat_trees.list_differences(theirs, ours, owners=("the file", "this configuration")):
        raise InputError(f"train.init_from {path} is of another model:{flat_trees.shorten(lines)}")
    return exported.params


def _with_new_embeddings(config: Config, params: Params) -> Params:
    """Returns the parameters of flow matching with those that a mean flow has in addition, as initialised."""
    added = init_params(config, jax.random.key(config.train.seed))
    encoder = params["condition_encoder"] | {"guidance": added["condition_encoder"]["guidance"]}
    return params | {"condition_encoder": encoder, "duration": added["duration"]}


def _restore(checkpoints: Checkpoints, placed: TrainState, iterator: grain.DatasetIterator[Batch]) -> TrainState | None:
    """Returns the state of the newest undamaged checkpoint, and sets the iterator; None if there is no checkpoint."""
    restored = checkpoints.restore(_without_ema(placed), placed.ema, iterator)
    if restored is None:
        return None
    if is_primary():
        logger.info("Resuming from the checkpoint of step %d.", restored.step)
    return TrainState(ema=restored.ema, **restored.state)


def _without_ema(state: TrainState) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(state)]
    return {name: getattr(state, name) for name in names if name != "ema"}


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
            # XLA cannot shard kernels. They shard their batch themselves, over the mesh in context.
            with jax.set_mesh(job.mesh):
                state, metrics = update(state, batch)
            profile.after(step, metrics)
            window.add(step, metrics)
            is_preempted = preemption.is_due(step)
            is_checkpoint = step == job.num_steps or step % job.checkpoint_every_steps == 0
            is_log = is_checkpoint or is_preempted or step % job.log_every_steps == 0
            # Between two lines, metrics are read one step late, so that the host does not wait for the devices.
            window.read(late=not is_log)
            if window.skipped_in_a_row > job.max_skipped_steps:
                raise InputError(_divergence_message(window, checkpoints))
            progress.update()
            if not is_log:
                continue
            values = window.summary(job.batch_size)
            if is_checkpoint and not is_preempted:
                values |= job.held_out(step, state.ema)
            # The line is written before the checkpoint. If the run is killed between the two, it resumes from an
            # earlier step and writes the line again. In the other order, the line would be lost.
            writer.write(step, values)
            if is_checkpoint or is_preempted:
                folder.require_lock()
                writer.sync()
                checkpoints.save(step, state=_without_ema(state), ema=state.ema, iterator=job.iterator, metrics=values)
            _report(progress, step, job.num_steps, values)
            if is_preempted:
                checkpoints.wait()
                raise Preempted(f"Stopped by SIGTERM: step {step} is saved, and the same command resumes from there.")
            window = _Window(window.skipped_in_a_row)
    return state


class _Window:
    """The metrics of the steps since the last line.

    Attributes:
      skipped_in_a_row: consecutive skipped steps up to the newest one, including steps before this window.
      last_step: number of the newest step whose metrics were read.
      last: its metrics.
    """

    def __init__(self, skipped_in_a_row: int = 0) -> None:
        self.skipped_in_a_row = skipped_in_a_row
        self.last_step = 0
        self.last: dict[str, np.ndarray] = {}
        self._start = time.monotonic()
        self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._read: list[dict[str, np.ndarray]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        self._pending.append((step, metrics))

    def read(self, *, late: bool) -> None:
        """Fetches the metrics of all steps from the devices, or, if `late`, of all steps but the newest."""
        while len(self._pending) > (1 if late else 0):
            self.last_step, metrics = self._pending.popleft()
            self.last = jax.device_get(metrics)
            self._read.append(self.last)
            self.skipped_in_a_row = int(self.last["skipped"])

    def summary(self, batch_size: int) -> dict[str, float]:
        """Returns the mean of each metric over the steps that were not skipped, the number of skipped steps, and the
        examples per second."""
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
        "optim.clip_norm, or train in float32, in another folder; or raise train.max_skipped_steps to tolerate more "
        "consecutive skipped steps."
    )


def _report(progress: "tqdm[NoReturn]", step: int, num_steps: int, values: dict[str, float]) -> None:
    """Shows a summary on the progress bar, or logs it as a line if there is no terminal."""
    names = ("loss", "held_out_loss", "fd_parser", "miou", "psnr")
    shown = {name: f"{values[name]:.4g}" for name in names if name in values}
    if values["skipped_steps"]:
        shown["skipped"] = f"{values['skipped_steps']:.0f}"
    shown["examples/s"] = f"{values['examples_per_sec']:.1f}"
    if not progress.disable:
        progress.set_postfix(shown)
    elif is_primary():
        logger.info("step %d of %d: %s", step, num_steps, ", ".join(f"{k} {v}" for k, v in shown.items()))
