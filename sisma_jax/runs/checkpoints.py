"""Checkpoints of a run: what is saved comes back bit for bit, or a damaged checkpoint is stepped over.

A checkpoint is a folder named after its step and holds three items:

    ema/           the EMA parameters alone, which are all that sampling reads
    state/         everything else that training needs: parameters, optimizer state, step, key
    description/   JSON: name, dtype and shape of every array in ema/ and state/; position in the data; metrics

Arrays are stored flat, under the path of their leaf ("params.layers.stacked.mixer.in_proj.kernel"), so a checkpoint
depends on no class of Flax or Optax, and global, so it depends neither on the devices nor on the processes that saved
it. Arrays that are not finite are neither saved nor restored. `store.py` writes and reads the files.

In a job of several processes each calls every method, at the same place: all see the same folder, and all of them agree
on what is damaged and on the step that is restored.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsFloat, TypeVar

import jax

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, to_path
from sisma_jax.parallel import agreement
from sisma_jax.parallel.agreement import together
from sisma_jax.runs import flat_trees
from sisma_jax.runs.checksums import DamagedError, verify_checksums
from sisma_jax.runs.ranking import BestMetric, Ranking
from sisma_jax.runs.store import DESCRIPTION, LateError, Store, UnwrittenError, require_writable

if TYPE_CHECKING:
    import grain

HELD_OUT_LOSS = BestMetric("held_out_loss", "min")
"""What makes a checkpoint of a denoiser the best."""

PyTree = Any
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


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
        self._keep = None if read_only else keep
        self._ranking = Ranking(best, keep_best)
        if not read_only:
            with together():
                require_writable(self.directory)
        self._open()

    def _open(self) -> None:
        self._store = Store(self.directory, ("ema", "state"), keep=self._keep, ranking=self._ranking)
        self._read_scores()

    def _reload(self) -> None:
        """Looks at the folder again."""
        self._store.reload()
        self._read_scores()

    def _read_scores(self) -> None:
        if self._ranking.best is None:
            return

        def read() -> list[tuple[int, float]]:
            return [(step, score) for step in self.steps() if (score := self._score(step)) is not None]

        self._ranking.scores = dict(agreement.from_primary(read))

    def _score(self, step: int) -> float | None:
        try:
            verify_checksums(self.directory / str(step) / DESCRIPTION)
            return self._ranking.score(self._store.describe(step)["metrics"])
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
        iterator: "grain.DatasetIterator | None",
        metrics: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Starts to save a checkpoint and returns once the values are copied: the caller may donate its arrays.

        A step that has a checkpoint already is left as it is. Typed PRNG keys may be leaves.

        Args:
          step: training step that the checkpoint is named after.
          state: arrays that training needs besides `ema`.
          ema: EMA parameters.
          iterator: data iterator whose position is saved, if any: a state that is the same in every process.
          metrics: measurements of `ema`, the same in every process.

        Raises:
          InputError: an array is not finite, this save could not start, or the one before it failed.
        """
        self.wait()
        if step in self.steps():
            return
        if jax.process_count() > 1:
            with together():  # a process that fails within Orbax's `save` leaves the others waiting there
                require_writable(self.directory)
        trees = {"ema": flat_trees.flatten(ema), "state": flat_trees.flatten(state)}
        if bad := _first_not_finite(trees):
            raise InputError(f"The checkpoint of step {step} is not saved: {bad} is not finite. {self._last_good()}")
        values = {name: float(value) for name, value in (metrics or {}).items()}
        description = {
            "arrays": {name: flat_trees.forms(tree) for name, tree in trees.items()},
            "data": None if iterator is None else iterator.get_state(),
            "metrics": {name: value for name, value in values.items() if math.isfinite(value)},
        }
        self._ranking.add(step, description["metrics"])
        try:
            self._store.save(step, trees, description)
        except (UnwrittenError, LateError) as error:
            # Alone: the others may wait in Orbax for this process, and end when it does.
            raise self._failure(str(error), reopen=jax.process_count() == 1) from error

    def wait(self) -> None:
        """Returns when the save in progress is complete.

        Raises:
          InputError: it failed, in this process or in another.
        """
        try:
            with together(UnwrittenError, LateError):
                self._store.wait()
        except (UnwrittenError, LateError) as error:
            raise self._failure(str(error), reopen=True) from error

    def close(self) -> None:
        """Waits as `wait` does and releases the threads."""
        self.wait()
        self._store.close()

    def _failure(self, reason: str, *, reopen: bool) -> InputError:
        if reopen:
            # A store whose save failed keeps the failed step and its thread; a fresh one reads the folder again.
            with contextlib.suppress(Exception):
                self._store.close()
            with contextlib.suppress(Exception):
                self._open()
        return InputError(
            f"A checkpoint could not be written to {self.directory} ({reason}). {self._last_good()} "
            "Free disk space or fix the folder, then run the same command again: it resumes."
        )

    def _last_good(self) -> str:
        last = self.latest_step()
        return "There is no checkpoint yet." if last is None else f"The last good checkpoint is step {last}."

    # Reading

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, readable or not, in rising order."""
        return self._store.steps()

    def latest_step(self) -> int | None:
        """Returns the newest step that has a complete checkpoint, readable or not."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint; None if no checkpoint has the metric."""
        return next(iter(self._ranking.sort(self.steps())), None)

    def restore(
        self, abstract_state: PyTree, abstract_ema: PyTree, iterator: "grain.DatasetIterator | None"
    ) -> Restored | None:
        """Reads the newest checkpoint that is whole and finite.

        A damaged one is stepped over with a warning and renamed to `damaged-STEP`, so that its step can be saved again.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` (or arrays) like the one saved; a leaf's sharding is honoured,
            a leaf without one goes to the default device.
          abstract_ema: the same for the EMA parameters.
          iterator: data iterator to set to the saved position, if any.

        Returns:
          The restored values, or None if the folder holds no checkpoint.

        Raises:
          InputError: the checkpoint holds other arrays than asked for, or no checkpoint can be read.
        """

        def read(step: int) -> Restored:
            position = self._store.describe(step)["data"]
            if iterator is not None and position is None:
                raise DamagedError(f"{self.directory / str(step)} holds no position in the data")
            trees = self._read_trees(step, {"state": abstract_state, "ema": abstract_ema})
            if iterator is not None:
                iterator.set_state(position)
                iterator.start_prefetch()
            return Restored(step, trees["state"], trees["ema"])

        return self._first_readable(self._newest_first, [DESCRIPTION, "state", "ema"], read)

    def restore_ema(
        self, abstract_ema: PyTree, checkpoint: int | Literal["newest", "best"] = "newest"
    ) -> tuple[int, PyTree]:
        """Returns step and EMA parameters of a checkpoint that is whole and finite; changes nothing on the disk.

        Args:
          abstract_ema: see `restore`.
          checkpoint: that of a step, or the best or the newest of those that are whole.

        Raises:
          InputError: there is no such checkpoint, it holds other arrays than asked for, or cannot be read.
        """

        def candidates() -> list[int]:
            if checkpoint == "newest":
                return self._newest_first()
            if checkpoint == "best":
                return self._best_first()
            return [checkpoint] if checkpoint in self.steps() else []

        restored = self._first_readable(
            candidates,
            [DESCRIPTION, "ema"],
            lambda step: (step, self._read_trees(step, {"ema": abstract_ema})["ema"]),
            set_aside=False,
        )
        if restored is not None:
            return restored
        if not self.steps():
            raise InputError(f"There is no checkpoint in {self.directory}; train first: python run.py ... train")
        wanted = f"whose {self._ranking.best.name} is known" if checkpoint == "best" else f"of step {checkpoint}"
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
                    # Deleted by a training that continues: look again.
                    return self._first_readable(candidates, items, read, set_aside=set_aside)
                if not is_damage:
                    raise
                logger.warning("The checkpoint of step %d is damaged: %s.", step, error)
                damaged.append(step)
                continue
            if damaged and set_aside and self._keep is not None:
                self._set_aside(damaged)
            return result
        if damaged:
            raise InputError(
                f"None of the checkpoints in {self.directory} can be read (steps {sorted(damaged)}). Restore the "
                "folder from a copy, or start again in another folder."
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
                f"The damaged checkpoint {self.directory / str(step)} cannot be renamed ({error}); fix the folder's "
                "permissions or name another folder."
            ) from error
        return target

    def _verify(self, step: int, items: Sequence[str]) -> None:
        with together(InputError, DamagedError):
            self._store.verify(step, items)

    def _read_trees(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Restores items of a checkpoint whose files are whole. Raises DamagedError if an array is not finite."""
        targets = {item: flat_trees.flatten_abstract(tree) for item, tree in abstract.items()}
        saved = self._store.describe(step)["arrays"]
        different = [
            line
            for item, target in targets.items()
            for line in flat_trees.list_differences(saved[item], flat_trees.forms(target), f"{item}/")
        ]
        if different:
            raise InputError(
                f"{self.directory / str(step)} was saved by a run of another configuration:"
                f"{flat_trees.shorten(different)}\nGive the configuration of that run, or name another folder."
            )
        restored = self._store.read(step, targets)
        if bad := _first_not_finite(restored):
            raise DamagedError(f"{bad} in {self.directory / str(step)} is not finite")
        return {item: flat_trees.unflatten(tree, restored[item]) for item, tree in abstract.items()}


def _first_not_finite(trees: Mapping[str, Mapping[str, jax.Array]]) -> str | None:
    return flat_trees.first_not_finite(
        {f"{item}/{name}": x for item, tree in trees.items() for name, x in tree.items()}
    )
