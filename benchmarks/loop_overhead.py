"""Times the training loop beside its bare compiled step: what data, logging and checkpoints cost.

    python benchmarks/loop_overhead.py [--config configs/demo.py] [--blocks 6] [--steps 70] [--json FILE]

Blocks of steps of the real loop, which reads, decodes and places its batches, logs and saves checkpoints as the
configuration says, take turns with blocks of the same compiled step on a batch that is on the device already. Left out
are compilation and the measurement of the held-out loss.
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
from sisma_jax.runs.folder import RunFolder, TrainingFolder
from sisma_jax.training import loop
from sisma_jax.training.step import jit_update

WARMUP_STEPS = 5


class Turns(grain.DatasetIterator):
    """The loop's data iterator; every block of steps it first lets the bare step have its turn, and takes the times."""

    def __init__(self, iterator: grain.DatasetIterator, steps: int):
        super().__init__()
        self._iterator, self._steps = iterator, steps
        self._step = 0
        self.clock = time.perf_counter
        self.bare: Callable[[], Any] | None = None
        self.results: Any = None
        self.loop_secs: list[float] = []
        self.bare_secs: list[float] = []

    def __next__(self) -> dict[str, np.ndarray]:
        done = self._step - WARMUP_STEPS
        if done >= 0 and done % self._steps == 0:
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
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


def main(config: Path = Path("configs/demo.py"), blocks: int = 6, steps: int = 70, json: Path | None = None):
    """Prints the table.

    Args:
      config: of the run that is timed; its data are prepared if need be.
      blocks: of the loop, and as many of the bare step.
      steps: in a block.
      json: the file for all samples.
    """
    settings = config_files.load(config)
    total = WARMUP_STEPS + blocks * steps + 1
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, num_steps=total))
    dataset = DataSet.prepare(settings.data)
    turns = None

    def with_turns(job: loop.Job, folder: TrainingFolder) -> None:
        nonlocal turns
        turns = Turns(job.iterator, steps)
        run_job(dataclasses.replace(job, iterator=turns, held_out=lambda params: {}), folder)

    def with_bare_step(update: Callable, state: Any, mesh: jax.sharding.Mesh) -> Callable:
        jitted = jit_update(update, state, mesh)
        holder = [jax.tree.map(lambda x: x.copy(), state), None]

        def bare() -> Any:
            with jax.set_mesh(mesh):
                holder[0], metrics = jitted(holder[0], holder[1])
            return metrics

        def of_loop(state: Any, batch: Any) -> Any:
            holder[1] = batch
            state, turns.results = jitted(state, batch)
            return state, turns.results

        turns.bare = bare
        return of_loop

    run_job = loop.run_job
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as resources:
        resources.enter_context(mock.patch.object(loop, "run_job", with_turns))
        resources.enter_context(mock.patch.object(loop, "jit_update", with_bare_step))
        loop.train(resources.enter_context(RunFolder.writing(folder, settings)), dataset)
    pairs = list(zip(turns.loop_secs, turns.bare_secs, strict=False))[:blocks]
    ratios = [in_loop / bare for in_loop, bare in pairs]
    columns = ["", *(f"{i + 1}" for i in range(len(pairs))), "median"]
    rows = [
        [name, *(f"{1e3 * x / steps:.1f}" for x in secs), f"{1e3 * statistics.median(secs) / steps:.1f}"]
        for name, secs in zip(("loop, ms a step", "bare step, ms"), zip(*pairs, strict=True), strict=True)
    ]
    rows.append(["ratio", *(f"{x:.3f}" for x in ratios), f"{statistics.median(ratios):.3f}"])
    measure.print_table(f"{config}: blocks of {steps} steps, in turn", columns, rows)
    of_all = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    print(f"All blocks together: the loop takes {of_all:.3f} times the bare step's time.")
    if json:
        records = [{"loop_secs": a, "bare_secs": b} for a, b in pairs]
        measure.write_json(json, "loop_overhead", settings={"config": str(config), "steps": steps}, blocks=records)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
