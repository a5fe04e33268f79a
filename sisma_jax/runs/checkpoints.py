"""Checkpoints of a run: the only module that knows Orbax.

A checkpoint is a folder named after its step and holds three items:

    ema/           the averaged parameters alone, which is all that sampling reads
    state/         everything else that training needs: parameters, optimiser, step, key
    description/   JSON: name, dtype and shape of every array in ema/ and state/; position in the data; metrics

Arrays are stored flat, under the path of their leaf ("params.blocks.0.kernel"), so a checkpoint depends on no class
of Flax or Optax, and global, so it depends neither on the devices nor on the processes that saved it. On a disk the
folder is written under another name and renamed when it is complete, in a bucket a file says that it is: an interrupted
save is never taken for a checkpoint.

Each item has a `checksums.json` over its files, which is read before anything else is. Orbax has no such thing: of 20
flipped bits in a stored array, Orbax 0.12.8 noticed none, and it reads a truncated file with a page of tracebacks.

In a job of several processes each calls every method, at the same place: all see the same folder, and all of them agree
on what is damaged and on the step that is restored.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat, TypeVar

import grain
import jax
import orbax.checkpoint as ocp

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, to_path
from sisma_jax.parallel import agreement
from sisma_jax.parallel.agreement import together
from sisma_jax.runs import flat_trees
from sisma_jax.runs.checksums import DamagedError, verify_checksums, write_checksums
from sisma_jax.runs.ranking import BestMetric, Ranking
from sisma_jax.runs.write_failures import TIMEOUT_SECS, LateError, UnwrittenError, require_writable, writing

_DESCRIPTION_NAME = "description.json"

PyTree = Any
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# Orbax narrates every save through absl, errors included, and raises those as well; all that matters of it leaves this
# module as an exception or as a warning in our own words.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` read; the iterator was set in place."""

    step: int
    state: PyTree
    ema: PyTree


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, and restores that step over a damaged checkpoint.

    A context manager; leaving it waits for the save in progress.
    """

    def __init__(
        self,
        directory: str | PathLike,
        *,
        keep: int = 1,
        best: BestMetric | None = None,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        """Opens the folder, creating it unless `read_only`.

        Args:
          directory: folder that holds the checkpoints, on a disk or in a bucket.
          keep: number of newest checkpoints to keep; an older one is deleted once a newer one is complete.
          best: what makes a checkpoint the best; None: no checkpoint is.
          keep_best: number of best checkpoints to keep, whether or not they are among the newest.
          read_only: nothing is created, renamed or deleted; for sampling, also while a training writes.

        Raises:
          InputError: the folder cannot be created or written.
        """
        directory = to_path(directory)
        self.directory = directory if is_bucket(directory) else directory.absolute()
        self._keep = keep
        self._ranking = Ranking(best, keep_best)
        self._read_only = read_only
        if not read_only:
            with together():
                require_writable(self.directory)
        self._open_manager()

    def _open_manager(self) -> None:
        newest = ocp.checkpoint_managers.LatestN(None if self._read_only else self._keep)
        self._manager = ocp.CheckpointManager(
            self.directory,
            handler_registry=_handlers(),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=0 if self._read_only else 1,
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([newest, self._ranking]),
                create=not self._read_only,
                # What a killed save left behind; complete checkpoints are not touched.
                cleanup_tmp_directories=not self._read_only,
                enable_async_checkpointing=True,
                # Folders are made before `save` returns: when one cannot be made, Orbax's writers of its content
                # would wait for it for ten minutes and hold up the end of the process.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=TIMEOUT_SECS),
                enable_background_delete=False,
                # All processes see the steps that the first one sees.
                single_host_load_and_broadcast=True,
                read_only=self._read_only,
            ),
        )
        self._read_scores()

    def _reload(self) -> None:
        """Looks at the folder again."""
        self._manager.reload()
        self._read_scores()

    def _read_scores(self) -> None:
        if self._ranking.best is None:
            return

        def read() -> list[tuple[int, float]]:
            return [(step, score) for step in self.steps() if (score := self._score(step)) is not None]

        self._ranking.scores = dict(agreement.from_primary(read))

    def _score(self, step: int) -> float | None:
        try:
            verify_checksums(self.directory / str(step) / "description")
            return self._ranking.score(self._description(step)["metrics"])
        except (DamagedError, InputError, OSError):  # told when it is restored
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except InputError as failure:  # must not hide the error that ends the block
            logger.error("%s", failure)

    # Writing

    def save(
        self,
        step: int,
        *,
        state: PyTree,
        ema: PyTree,
        iterator: grain.DatasetIterator | None,
        metrics: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Starts to save a checkpoint and returns once the values are copied: the caller may donate its arrays.

        A step that has a checkpoint already is left as it is. Typed PRNG keys may be leaves.

        Args:
          step: training step that the checkpoint is named after.
          state: arrays that training needs besides `ema`.
          ema: averaged parameters.
          iterator: data iterator whose position is saved, if any: a state that is the same in every process.
          metrics: measurements of `ema`, the same in every process.

        Raises:
          InputError: this save could not start, or the one before it failed.
        """
        self.wait()
        if step in self.steps():
            return
        if jax.process_count() > 1:
            with together():  # a process that fails within Orbax's `save` leaves the others waiting there
                require_writable(self.directory)
        trees = {"ema": flat_trees.flatten(ema), "state": flat_trees.flatten(state)}
        values = {name: float(value) for name, value in (metrics or {}).items()}
        description = {
            "arrays": {name: flat_trees.forms(tree) for name, tree in trees.items()},
            "data": None if iterator is None else iterator.get_state(),
            "metrics": {name: value for name, value in values.items() if math.isfinite(value)},
        }
        self._ranking.add(step, description["metrics"])
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["description"] = ocp.args.JsonSave(description)
        try:
            # force: without it Orbax declines, silently, a step that is not the newest.
            with writing(self.directory):
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except (UnwrittenError, LateError) as error:
            # Alone: the others may wait in Orbax for this process, and end when it does.
            raise self._failure(str(error), reopen=jax.process_count() == 1) from error

    def wait(self) -> None:
        """Returns when the save in progress is complete.

        Raises:
          InputError: it failed, in this process or in another.
        """
        try:
            with together(UnwrittenError, LateError), writing(self.directory):
                self._manager.wait_until_finished()
        except (UnwrittenError, LateError) as error:
            raise self._failure(str(error), reopen=True) from error

    def close(self) -> None:
        """Waits as `wait` does and releases the threads."""
        self.wait()
        self._manager.close()

    def _failure(self, reason: str, *, reopen: bool) -> InputError:
        if reopen:
            # A manager whose save failed keeps the failed step and its thread; a fresh one reads the folder again.
            with contextlib.suppress(Exception):
                self._manager.close()
            with contextlib.suppress(Exception):
                self._open_manager()
        last = self.latest_step()
        return InputError(
            f"A checkpoint could not be written to {self.directory} ({reason}). "
            + (f"The last good checkpoint is step {last}. " if last is not None else "There is no checkpoint yet. ")
            + "Free disk space or mend the folder, then run the same command again: it resumes."
        )

    # Reading

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, readable or not, in rising order."""
        return sorted(map(int, self._manager.all_steps()))  # of NumPy where they were broadcast

    def latest_step(self) -> int | None:
        """Returns the newest step that has a complete checkpoint, readable or not."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint; None if no checkpoint has the metric."""
        return next(iter(self._ranking.sort(self.steps())), None)

    def restore(
        self, abstract_state: PyTree, abstract_ema: PyTree, iterator: grain.DatasetIterator | None
    ) -> Restored | None:
        """Reads the newest checkpoint that is whole.

        A damaged one is stepped over with a warning and renamed to `damaged-STEP`, so that its step can be saved again.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` (or arrays) like the one saved; a leaf's sharding is honoured,
            a leaf without one goes to the default device.
          abstract_ema: the same for the averaged parameters.
          iterator: data iterator to set to the saved position, if any.

        Returns:
          The restored values, or None if the folder holds no checkpoint.

        Raises:
          InputError: the checkpoint holds other arrays than asked for, or no checkpoint can be read.
        """

        def read(step: int) -> Restored:
            position = self._description(step)["data"]
            if iterator is not None and position is None:
                raise DamagedError(f"{self.directory / str(step)} holds no position in the data")
            trees = self._read_trees(step, {"state": abstract_state, "ema": abstract_ema})
            if iterator is not None:
                iterator.set_state(position)
                iterator.start_prefetch()
            return Restored(step, trees["state"], trees["ema"])

        return self._first_readable(self._newest_first, ["description", "state", "ema"], read)

    def restore_ema(self, abstract_ema: PyTree, step: int | Literal["best"] | None = None) -> tuple[int, PyTree]:
        """Returns step and averaged parameters of a checkpoint that is whole; changes nothing on the disk.

        Args:
          abstract_ema: see `restore`.
          step: of the checkpoint; "best": the best of those that are whole; None: the newest.

        Raises:
          InputError: there is no such checkpoint, it holds other arrays than asked for, or cannot be read.
        """

        def candidates() -> list[int]:
            if step is None:
                return self._newest_first()
            if step == "best":
                return self._best_first()
            return [step] if step in self.steps() else []

        restored = self._first_readable(
            candidates,
            ["description", "ema"],
            lambda step: (step, self._read_trees(step, {"ema": abstract_ema})["ema"]),
            set_aside=False,
        )
        if restored is not None:
            return restored
        if not self.steps():
            raise InputError(f"There is no checkpoint in {self.directory}; train first: python run.py ... train")
        wanted = f"whose {self._ranking.best.name} is known" if step == "best" else f"of step {step}"
        listed = ", ".join(map(str, self.steps()))
        raise InputError(f"There is no checkpoint {wanted} in {self.directory}; it has the steps {listed}.")

    def _newest_first(self) -> list[int]:
        return self.steps()[::-1]

    def _best_first(self) -> list[int]:
        if self._ranking.best is None:
            raise ValueError("which checkpoint is the best is known only of `Checkpoints` with `best`")
        return self._ranking.sort(self.steps())

    def _first_readable(
        self,
        candidates: Callable[[], list[int]],
        items: Sequence[str],
        read: Callable[[int], Result],
        *,
        set_aside: bool = True,
    ) -> Result | None:
        """Returns `read(step)` of the first candidate whose items are whole, or None without candidates."""
        self.wait()
        self._reload()
        damaged = []
        for step in candidates():
            try:
                self._verify(step, items)
                result = read(step)
            except Exception as error:
                is_damage = isinstance(error, DamagedError)  # on which all processes agree
                if (is_damage or jax.process_count() == 1) and not self._exists(step):
                    # Deleted by a training that goes on: look again.
                    return self._first_readable(candidates, items, read, set_aside=set_aside)
                if not is_damage:
                    raise
                logger.warning("The checkpoint of step %d is damaged: %s.", step, error)
                damaged.append(step)
                continue
            if damaged and set_aside and not self._read_only:
                self._set_aside(damaged)
            return result
        if damaged:
            raise InputError(
                f"None of the checkpoints in {self.directory} can be read (steps {sorted(damaged)}). Restore the "
                "folder from a copy, or start again with another --workdir."
            )
        return None

    def _exists(self, step: int) -> bool:
        return agreement.from_primary(lambda: (self.directory / str(step)).exists())

    def _set_aside(self, steps: list[int]) -> None:
        def rename() -> list[str]:
            return [str(self._rename_damaged(step)) for step in steps]

        for target in agreement.from_primary(rename):
            logger.warning("It is kept as %s; delete it when you no longer want it.", target)
        self._reload()

    def _rename_damaged(self, step: int) -> AnyPath:
        target, number = self.directory / f"damaged-{step}", 2
        while target.exists():
            target, number = self.directory / f"damaged-{step}-{number}", number + 1
        try:
            with bucket_errors(target):
                (self.directory / str(step)).rename(target)
        except OSError as error:
            raise InputError(
                f"The damaged checkpoint {self.directory / str(step)} cannot be renamed ({error}); mend the folder's "
                "permissions or choose another --workdir."
            ) from error
        return target

    def _description(self, step: int) -> dict[str, Any]:
        return json.loads((self.directory / str(step) / "description" / _DESCRIPTION_NAME).read_bytes())

    def _read_trees(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Restores items of a checkpoint whose files are whole."""
        targets = {item: flat_trees.flatten_abstract(tree) for item, tree in abstract.items()}
        saved = self._description(step)["arrays"]
        different = [
            line
            for item, target in targets.items()
            for line in flat_trees.list_differences(saved[item], flat_trees.forms(target), f"{item}/")
        ]
        if different:
            raise InputError(
                f"{self.directory / str(step)} was saved by a run of another configuration:"
                f"{flat_trees.shorten(different)}\nGive the configuration of that run, or another --workdir."
            )
        items = {item: ocp.args.StandardRestore(target) for item, target in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {item: flat_trees.unflatten(tree, restored[item]) for item, tree in abstract.items()}

    def _verify(self, step: int, items: Sequence[str]) -> None:
        """Raises DamagedError unless every file of the items has the bytes that were saved.

        Processes share the work, which for a large state takes as long as to read it.
        """
        with together(InputError, DamagedError):
            for item in items:
                verify_checksums(self.directory / str(step) / item, jax.process_index(), jax.process_count())


# Items with checksums


class _Checksummed:
    """Mix-in of a handler: adds checksums when the item's files are complete and not yet declared to be.

    Orbax calls `finalize` in the first process, when all have written their part and it has put these together, and
    from the thread that writes, so the training step does not wait for it.
    """

    def finalize(self, directory: PathLike) -> None:
        super().finalize(directory)
        write_checksums(to_path(directory))


class _TreeHandler(_Checksummed, ocp.handlers.StandardCheckpointHandler):
    pass


class _JsonHandler(_Checksummed, ocp.handlers.JsonCheckpointHandler):
    pass


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item, handler, arguments in (
        ("ema", _TreeHandler(), (ocp.args.StandardSave, ocp.args.StandardRestore)),
        ("state", _TreeHandler(), (ocp.args.StandardSave, ocp.args.StandardRestore)),
        ("description", _JsonHandler(_DESCRIPTION_NAME), (ocp.args.JsonSave, ocp.args.JsonRestore)),
    ):
        for argument in arguments:
            registry.add(item, argument, handler)
    return registry
