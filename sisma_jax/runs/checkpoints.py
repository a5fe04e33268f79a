"""Checkpoints of a run: a restored checkpoint is bit-identical to what was saved, and damaged ones are skipped.

A checkpoint is a folder named after its step. It holds three items:

    ema/           EMA parameters; sampling reads nothing else
    state/         the rest of the training state: parameters, optimizer state, step, key
    description/   JSON: name, dtype and shape of each array in ema/ and state/; position in the data; metrics

Arrays are stored in flat dictionaries, keyed by the path of each leaf ("params.layers.stacked.mixer.in_proj.kernel"),
so a checkpoint does not depend on classes of Flax or Optax. They are stored as global arrays, so it does not depend on
the devices or the processes that saved it. Arrays that are not finite are neither saved nor restored. `store.py` writes
and reads the files.

Every process of a job must call each method at the same point of the program. All processes see the same folder, and
agree on which checkpoints are damaged and which step is restored.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Protocol, Self, SupportsFloat, TypeVar

import jax

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, to_path
from sisma_jax.parallel import agreement
from sisma_jax.parallel.agreement import together
from sisma_jax.runs import flat_trees
from sisma_jax.runs.checksums import DamagedError, verify_checksums
from sisma_jax.runs.ranking import BestMetric, Ranking
from sisma_jax.runs.store import DESCRIPTION, LateError, Store, UnwrittenError, require_writable

PyTree = Any
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class DataIterator(Protocol):
    """A data iterator whose position can be saved, such as `grain.DatasetIterator`."""

    def get_state(self) -> dict[str, Any]:
        """Returns the position, as values that JSON can hold."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to the position `state`, which `get_state` returned."""

    def start_prefetch(self) -> None:
        """Starts to load the next elements in the background."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` has read. The iterator is not included, because it is set in place.

    Attributes:
      step: training step of the checkpoint.
      state: arrays in the structure of `abstract_state`.
      ema: EMA parameters in the structure of `abstract_ema`.
    """

    step: int
    state: PyTree
    ema: PyTree


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, and restores that skip damaged checkpoints.

    A context manager, which waits for the save in progress when its block ends.

    Attributes:
      directory: folder of the checkpoints.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        keep: int = 1,
        best: BestMetric | None = None,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        """Opens the folder, and creates it unless `read_only`.

        Args:
          directory: folder of the checkpoints, on a disk or in a bucket.
          keep: number of newest checkpoints to keep. Older ones are deleted when a newer one is complete.
          best: the metric that ranks checkpoints; None: checkpoints are not ranked.
          keep_best: number of best checkpoints to keep in addition to the newest.
          read_only: create, rename and delete nothing. For sampling, also while a training job writes to the folder.

        Raises:
          InputError: the folder cannot be created or written.
        """
        path = to_path(directory)
        self.directory: AnyPath = path if is_bucket(path) else path.absolute()
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
        """Reads the list of checkpoints and their scores again."""
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
        except (DamagedError, InputError, OSError):  # `restore` reports it
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
        except InputError as failure:  # must not hide the exception that ends the block
            logger.error("%s", failure)

    # Writing

    def save(
        self,
        step: int,
        *,
        state: PyTree,
        ema: PyTree,
        iterator: DataIterator | None,
        metrics: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Starts to save a checkpoint, and returns when the arrays are copied, so the caller may donate them.

        Does nothing if the step already has a checkpoint.

        Args:
          step: training step, which names the checkpoint.
          state: tree of arrays that training needs in addition to `ema`. Leaves may be typed PRNG keys.
          ema: tree of EMA parameters.
          iterator: data iterator whose position is saved; its state must be the same in every process.
          metrics: measurements of `ema`, the same in every process. Values that are not finite are not saved.

        Raises:
          InputError: an array is not finite, this save cannot start, or the previous save failed.
        """
        self.wait()
        if step in self.steps():
            return
        if jax.process_count() > 1:
            with together():  # if one process failed within Orbax's `save`, the others would wait there
                require_writable(self.directory)
        trees = {"ema": flat_trees.flatten(ema), "state": flat_trees.flatten(state)}
        if bad := _first_not_finite(trees):
            raise InputError(f"The checkpoint of step {step} is not saved: {bad} is not finite. {self._last_good()}")
        values = {name: float(value) for name, value in (metrics or {}).items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        description = {
            "arrays": {name: flat_trees.forms(tree) for name, tree in trees.items()},
            "data": None if iterator is None else iterator.get_state(),
            "metrics": finite,
        }
        self._ranking.add(step, finite)
        try:
            self._store.save(step, trees, description)
        except (UnwrittenError, LateError) as error:
            # Not `together`: the other processes may wait in Orbax for this process, until it ends.
            raise self._failure(str(error), reopen=jax.process_count() == 1) from error

    def wait(self) -> None:
        """Waits until the save in progress is complete.

        Raises:
          InputError: the save failed, in this process or in another.
        """
        try:
            with together(UnwrittenError, LateError):
                self._store.wait()
        except (UnwrittenError, LateError) as error:
            raise self._failure(str(error), reopen=True) from error

    def close(self) -> None:
        """Waits until the save in progress is complete, and ends the threads of the store.

        Raises:
          InputError: the save failed, in this process or in another.
        """
        self.wait()
        self._store.close()

    def _failure(self, reason: str, *, reopen: bool) -> InputError:
        if reopen:
            # After a failed save, the store still lists the step and keeps its thread. A new store reads the folder.
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
        """Returns the steps that have a complete checkpoint, damaged or not, in increasing order."""
        return self._store.steps()

    def latest_step(self) -> int | None:
        """Returns the newest step that has a complete checkpoint, damaged or not; None if there is no checkpoint."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint; None if no checkpoint is ranked."""
        return next(iter(self._ranking.sort(self.steps())), None)

    def restore(self, abstract_state: PyTree, abstract_ema: PyTree, iterator: DataIterator | None) -> Restored | None:
        """Restores the newest checkpoint that is complete, undamaged and finite.

        A damaged checkpoint is skipped with a warning and renamed to `damaged-STEP`, so that its step can be saved
        again.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct`s (or arrays) that describes the saved `state`. An array is
            restored with the sharding of its leaf, or on the default device if the leaf has none.
          abstract_ema: the same for the EMA parameters.
          iterator: data iterator to set to the saved position.

        Returns:
          The restored values, or None if the folder has no checkpoint.

        Raises:
          InputError: the arrays in the checkpoint differ from those described, or all checkpoints are damaged.
        """

        def read(step: int) -> Restored:
            position = self._store.describe(step)["data"]
            if iterator is not None and position is None:
                raise DamagedError(f"{self.directory / str(step)} does not contain the position in the data")
            trees = self._read_trees(step, {"state": abstract_state, "ema": abstract_ema})
            if iterator is not None:
                iterator.set_state(position)
                iterator.start_prefetch()
            return Restored(step, trees["state"], trees["ema"])

        return self._first_readable(self._newest_first, [DESCRIPTION, "state", "ema"], read)

    def restore_ema(
        self, abstract_ema: PyTree, checkpoint: int | Literal["newest", "best"] = "newest"
    ) -> tuple[int, PyTree]:
        """Returns the step and the EMA parameters of a checkpoint; changes nothing in the folder.

        Args:
          abstract_ema: tree of `jax.ShapeDtypeStruct`s (or arrays) that describes the EMA parameters and their
            shardings, as for `restore`.
          checkpoint: "newest" or "best", which skip damaged checkpoints, or the step of a checkpoint.

        Raises:
          InputError: the checkpoint does not exist, its arrays differ from those described, or it is damaged.
          ValueError: `checkpoint` is "best", and this object was created without the metric `best`.
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
        best = self._ranking.best
        wanted = f"of step {checkpoint}" if best is None or checkpoint != "best" else f"whose {best.name} is known"
        listed = ", ".join(map(str, self.steps()))
        raise InputError(f"There is no checkpoint {wanted} in {self.directory}; it has the steps {listed}.")

    def _newest_first(self) -> list[int]:
        return self.steps()[::-1]

    def _best_first(self) -> list[int]:
        if self._ranking.best is None:
            raise ValueError(
                "checkpoint is 'best', which needs a metric; create Checkpoints(..., best=BestMetric(...))"
            )
        return self._ranking.sort(self.steps())

    def _first_readable(
        self,
        candidates: Callable[[], list[int]],
        items: Sequence[str],
        read: Callable[[int], Result],
        *,
        set_aside: bool = True,
    ) -> Result | None:
        """Returns `read(step)` for the first candidate with undamaged items, or None if there are no candidates."""
        self.wait()
        self._reload()
        damaged = []
        for step in candidates():
            try:
                self._verify(step, items)
                result = read(step)
            except Exception as error:
                is_damage = isinstance(error, DamagedError)  # the same in all processes
                if (is_damage or jax.process_count() == 1) and not self._exists(step):
                    # A training job in progress has deleted it: read the list again.
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
            logger.warning("The damaged checkpoint is kept as %s; delete it when you no longer need it.", target)
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
        """Restores items of a verified checkpoint. Raises DamagedError if an array is not finite."""
        targets = {item: flat_trees.flatten_abstract(tree) for item, tree in abstract.items()}
        saved = self._store.describe(step)["arrays"]
        different = [
            line
            for item, target in targets.items()
            for line in flat_trees.list_differences(saved[item], flat_trees.forms(target), f"{item}/")
        ]
        if different:
            raise InputError(
                f"{self.directory / str(step)} was saved by a run with another configuration:"
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
