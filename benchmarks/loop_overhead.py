"""Times the training loop against its bare compiled step: the cost of data, logging and checkpoints.

    python benchmarks/loop_overhead.py [--config configs/demo.py] [--blocks 6] [--steps 70] [--json FILE]

Blocks of steps of the real loop alternate with blocks of the same compiled step on a batch that is already on the
device. The loop reads, decodes and places its batches, logs, and saves checkpoints as configured. Compilation and the
measurement of the held-out loss are not included.
"""

import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grain
import jax
import numpy as np
import tyro

from benchmarks import measure
from sisma_jax import config_files
from sisma_jax.data.dataset import DataSet
from sisma_jax.diffusion.objectives import Batch
from sisma_jax.runs.folder import RunFolder, TrainingFolder
from sisma_jax.training import loop
from sisma_jax.training.state import TrainState
from sisma_jax.training.step import Metrics, Update, jit_update

WARMUP_STEPS = 5


class Turns(grain.DatasetIterator[dict[str, np.ndarray]]):
    """A data iterator that, before every block of the loop's steps, runs and times a block of bare steps.

    Args:
      iterator: the loop's own iterator over training batches.
      steps: number of steps per block.

    Attributes:
      clock: returns the current time in seconds.
      bare: runs one bare step and returns arrays to wait for; must be set before the first block.
      results: arrays of the loop's latest step, for which the clock waits at the end of a block.
      loop_secs, bare_secs: seconds of each finished block.
    """

    def __init__(self, iterator: grain.DatasetIterator[dict[str, np.ndarray]], steps: int):
        super().__init__()
        self._iterator, self._steps = iterator, steps
        self._step = 0
        self._start = 0.0
        self.clock = time.perf_counter
        self.bare: Callable[[], Any] | None = None
        self.results: Any = None
        self.loop_secs: list[float] = []
        self.bare_secs: list[float] = []

    def __next__(self) -> dict[str, np.ndarray]:
        done = self._step - WARMUP_STEPS
        if done >= 0 and done % self._steps == 0:
            if self.bare is None:
                raise RuntimeError("bare is None; set it to a function that runs one step before the first block")
            jax.block_until_ready(self.results)
            if done:
                self.loop_secs.append(self.clock() - self._start)
            start = self.clock()
            jax.block_until_ready([self.bare() for _ in range(self._steps)])
            self.bare_secs.append(self.clock() - start)
            self._start = self.clock()
        self._step += 1
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the state of the loop's own iterator."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Sets the state of the loop's own iterator."""
        self._iterator.set_state(state)


def main(config: Path = Path("configs/demo.py"), blocks: int = 6, steps: int = 70, json: Path | None = None) -> None:
    """Prints a table of milliseconds per step for each block, and the ratios of loop and bare step.

    Args:
      config: configuration of the run that is timed; its data are prepared if necessary.
      blocks: number of blocks of the loop, and of the bare step.
      steps: number of steps per block.
      json: file for all samples.
    """
    settings = config_files.load(config)
    total = WARMUP_STEPS + blocks * steps + 1
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, num_steps=total))
    dataset = DataSet.prepare(settings.data)
    created: list[Turns] = []

    def with_turns(job: loop.Job, folder: TrainingFolder) -> None:
        created.append(Turns(job.iterator, steps))
        run_job(dataclasses.replace(job, iterator=created[0], held_out=lambda step, params: {}), folder)

    def with_bare_step(update: Update, state: TrainState, mesh: jax.sharding.Mesh) -> Update:
        jitted = jit_update(update, state, mesh)
        turns = created[0]
        bare_state: TrainState = jax.tree.map(lambda x: x.copy(), state)
        latest_batch: Batch = {}

        def bare() -> Metrics:
            nonlocal bare_state
            with jax.set_mesh(mesh):
                bare_state, metrics = jitted(bare_state, latest_batch)
            return metrics

        def update_of_loop(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            nonlocal latest_batch
            latest_batch = batch
            state, turns.results = jitted(state, batch)
            return state, turns.results

        turns.bare = bare
        return update_of_loop

    run_job = loop.run_job
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as resources:
        resources.enter_context(mock.patch.object(loop, "run_job", with_turns))
        resources.enter_context(mock.patch.object(loop, "jit_update", with_bare_step))
        loop.train(resources.enter_context(RunFolder.writing(folder, settings)), dataset)
    (turns,) = created
    pairs = list(zip(turns.loop_secs, turns.bare_secs, strict=False))[:blocks]
    ratios = [in_loop / bare for in_loop, bare in pairs]
    columns = ["", *(f"{i + 1}" for i in range(len(pairs))), "median"]
    rows = [
        [name, *(f"{1e3 * x / steps:.1f}" for x in secs), f"{1e3 * statistics.median(secs) / steps:.1f}"]
        for name, secs in zip(("loop, ms per step", "bare step, ms"), zip(*pairs, strict=True), strict=True)
    ]
    rows.append(["ratio", *(f"{x:.3f}" for x in ratios), f"{statistics.median(ratios):.3f}"])
    measure.print_table(f"{config}: alternating blocks of {steps} steps", columns, rows)
    ratio = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    print(f"Over all blocks, the loop takes {ratio:.3f} times as long as the bare step.")
    if json:
        records = [{"loop_secs": a, "bare_secs": b} for a, b in pairs]
        measure.write_json(json, "loop_overhead", settings={"config": str(config), "steps": steps}, blocks=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
