"""Checkpoints of a run: the only module that knows Orbax.

A checkpoint is a folder named after its step and holds four items:

    ema/       the averaged parameters alone, which is all that sampling reads
    state/     everything else that training needs: parameters, optimiser, step, key
    data/      the position of the Grain iterator, one file a process
    arrays/    name, dtype and shape of every array in ema/ and state/

Arrays are stored flat, under the path of their leaf ("params.blocks.0.kernel"), so a checkpoint depends on no class
of Flax or Optax. The folder is written under another name and renamed when it is complete: an interrupted save is never
taken for a checkpoint.

Each item has a `checksums.json` over its files, which is read before anything else is. Orbax has no such thing: of 20
flipped bits in a stored array, Orbax 0.12.8 noticed none, and it reads a truncated file with a page of tracebacks.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sisma_jax.errors import InputError

CHECKSUMS_NAME = "checksums.json"

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


class _DamagedError(Exception):
    """A checkpoint cannot be read; the message is the reason in one line."""


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, and restores that step over a damaged checkpoint.

    A context manager; leaving it waits for the save in progress.
    """

    def __init__(self, directory: Path, *, keep: int = 1, read_only: bool = False):
        """Opens the folder, creating it unless `read_only`.

        Args:
          directory: folder that holds the checkpoints.
          keep: number of newest checkpoints to keep; an older one is deleted once a newer one is complete.
          read_only: nothing is created, renamed or deleted; for sampling, also while a training writes.

        Raises:
          InputError: the folder cannot be created or written.
        """
        self.directory = directory.absolute()
        self._keep = keep
        self._read_only = read_only
        if not read_only:
            _require_writable(self.directory)
        self._manager = self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            handler_registry=_handlers(),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=0 if self._read_only else 1,
                preservation_policy=ocp.checkpoint_managers.LatestN(None if self._read_only else self._keep),
                create=not self._read_only,
                # What a killed save left behind; complete checkpoints are not touched.
                cleanup_tmp_directories=not self._read_only,
                enable_async_checkpointing=True,
                # Folders are made before `save` returns: when one cannot be made, Orbax's writers of its content
                # would wait for it for ten minutes and hold up the end of the process.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                enable_background_delete=False,
                read_only=self._read_only,
            ),
        )

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

    def save(self, step: int, *, state: PyTree, ema: PyTree, iterator: grain.DatasetIterator | None) -> None:
        """Starts to save a checkpoint and returns once the values are copied: the caller may donate its arrays.

        A step that has a checkpoint already is left as it is. Typed PRNG keys may be leaves.

        Args:
          step: training step that the checkpoint is named after.
          state: arrays that training needs besides `ema`.
          ema: averaged parameters.
          iterator: data iterator whose position is saved, if any.

        Raises:
          InputError: this save could not start, or the one before it failed.
        """
        with self._writing():
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                return
            trees = {"ema": _flatten(ema), "state": _flatten(state)}
            items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
            items["arrays"] = ocp.args.JsonSave({name: _forms(tree) for name, tree in trees.items()})
            if iterator is not None:
                items["data"] = grain.checkpoint.CheckpointSave(iterator)
            # force: without it Orbax declines, silently, a step that is not the newest.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when the save in progress is complete.

        Raises:
          InputError: it failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does and releases the threads."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a failure to write into an `InputError` and leaves a manager that knows what is on the disk."""
        try:
            yield
        except Exception as error:
            reason = _os_error_text(error)
            if reason is None:
                raise
            # A manager whose save failed keeps the failed step and its thread; a fresh one reads the folder again.
            with contextlib.suppress(Exception):
                self._manager.close()
            with contextlib.suppress(Exception):
                self._manager = self._open_manager()
            last = self.latest_step()
            raise InputError(
                f"A checkpoint could not be written to {self.directory} ({reason}). "
                + (f"The last good checkpoint is step {last}. " if last is not None else "There is no checkpoint yet. ")
                + "Free disk space or mend the folder, then run the same command again: it resumes."
            ) from error

    # Reading

    def latest_step(self) -> int | None:
        """Returns the newest step that has a complete checkpoint, readable or not."""
        return self._manager.latest_step()

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
            trees = self._read_trees(step, {"state": abstract_state, "ema": abstract_ema})
            if iterator is not None:
                data = grain.checkpoint.CheckpointRestore(iterator)
                self._manager.restore(step, args=ocp.args.Composite(data=data))
            return Restored(step, trees["state"], trees["ema"])

        items = ["arrays", "state", "ema"]
        return self._newest_readable(items if iterator is None else [*items, "data"], read)

    def restore_ema(self, abstract_ema: PyTree) -> tuple[int, PyTree]:
        """Returns step and averaged parameters of the newest checkpoint that is whole; changes nothing on the disk.

        Raises:
          InputError: there is no checkpoint, it holds other arrays than asked for, or none can be read.
        """
        restored = self._newest_readable(
            ["arrays", "ema"],
            lambda step: (step, self._read_trees(step, {"ema": abstract_ema})["ema"]),
            set_aside=False,
        )
        if restored is None:
            raise InputError(f"There is no checkpoint in {self.directory}; train first: python run.py ... train")
        return restored

    def _newest_readable(
        self, items: Sequence[str], read: Callable[[int], Result], *, set_aside: bool = True
    ) -> Result | None:
        """Returns `read(step)` of the newest step whose items are whole."""
        self.wait()
        self._manager.reload()
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._verify(step, items)
                result = read(step)
            except Exception as error:
                if not (self.directory / str(step)).exists():  # deleted by a training that goes on: look again
                    return self._newest_readable(items, read, set_aside=set_aside)
                if not isinstance(error, _DamagedError):
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

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory / f"damaged-{step}"
                number = 2
                while target.exists():
                    target = self.directory / f"damaged-{step}-{number}"
                    number += 1
                with self._writing():
                    (self.directory / str(step)).rename(target)
                logger.warning("It is kept as %s; delete it when you no longer want it.", target)
        ocp.multihost.sync_global_processes("sisma_jax:set_aside")
        self._manager.reload()

    def _read_trees(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Restores items of a checkpoint whose files are whole."""
        targets = {item: _flatten_abstract(tree) for item, tree in abstract.items()}
        saved = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.JsonRestore()))["arrays"]
        different = [
            f"{item}/{name}: the checkpoint has {before}, this run {now}"
            for item, target in targets.items()
            for name, before, now in _differences(saved[item], _forms(target))
        ]
        if different:
            more = [f"and {len(different) - 5} more"] if len(different) > 5 else []
            raise InputError(
                f"{self.directory / str(step)} was saved by a run of another configuration:\n  "
                + "\n  ".join(different[:5] + more)
                + "\nGive the configuration of that run, or another --workdir."
            )
        items = {item: ocp.args.StandardRestore(target) for item, target in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {item: _unflatten(tree, restored[item]) for item, tree in abstract.items()}

    def _verify(self, step: int, items: Sequence[str]) -> None:
        """Raises `_DamagedError` unless every file of the items has the bytes that were saved."""
        for item in items:
            _verify_checksums(self.directory / str(step) / item)


# Trees as flat dictionaries


def _flatten(tree: PyTree) -> dict[str, jax.Array]:
    """Returns {path: array}; NumPy arrays and numbers are copied."""
    return {path: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf) for path, leaf in _named_leaves(tree)}


def _flatten_abstract(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path: shape, dtype and sharding}; a leaf without sharding gets the default device."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = leaf if hasattr(leaf, "dtype") else jnp.array(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    return {path: abstract(leaf) for path, leaf in _named_leaves(tree)}


def _unflatten(abstract: PyTree, arrays: Mapping[str, jax.Array]) -> PyTree:
    """Returns the arrays in the structure of `abstract`."""
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path, _ in _named_leaves(abstract)])


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]
    assert len(dict(named)) == len(named), "two leaves have the same path"
    return named


def _forms(arrays: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> dict[str, str]:
    """Returns {path: "float32[64, 48]"}."""
    return {path: f"{array.dtype}{list(array.shape)}" for path, array in arrays.items()}


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [
        (name, before.get(name, "nothing"), now.get(name, "nothing"))
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


# Items with checksums


class _Checksummed:
    """Mix-in of a handler: adds checksums when the item's files are complete and not yet renamed into place.

    Orbax calls `finalize` in one process, from the thread that writes, so the training step does not wait for it.
    """

    def finalize(self, directory: PathLike) -> None:
        super().finalize(directory)
        _write_checksums(Path(directory))


class _TreeHandler(_Checksummed, ocp.handlers.StandardCheckpointHandler):
    pass


class _JsonHandler(_Checksummed, ocp.handlers.JsonCheckpointHandler):
    pass


class _IteratorHandler(_Checksummed, grain.checkpoint.CheckpointHandler):
    pass


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item, handler, arguments in (
        ("ema", _TreeHandler(), (ocp.args.StandardSave, ocp.args.StandardRestore)),
        ("state", _TreeHandler(), (ocp.args.StandardSave, ocp.args.StandardRestore)),
        ("data", _IteratorHandler(), (grain.checkpoint.CheckpointSave, grain.checkpoint.CheckpointRestore)),
        ("arrays", _JsonHandler(), (ocp.args.JsonSave, ocp.args.JsonRestore)),
    ):
        for argument in arguments:
            registry.add(item, argument, handler)
    return registry


def _write_checksums(folder: Path) -> None:
    files = {str(path.relative_to(folder)): _crc32(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    text = json.dumps(files)
    (folder / CHECKSUMS_NAME).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "files": files}, indent=1))


def _verify_checksums(folder: Path) -> None:
    text = _read(folder / CHECKSUMS_NAME, Path.read_bytes)
    try:
        table = json.loads(text)
        whole = table["crc32"] == zlib.crc32(json.dumps(table["files"]).encode())
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise _DamagedError(f"{folder / CHECKSUMS_NAME} has not the bytes that were saved")
    for name, checksum in table["files"].items():
        if _read(folder / name, _crc32) != checksum:
            raise _DamagedError(f"{folder / name} has not the bytes that were saved")


def _read(path: Path, read: Callable[[Path], Result]) -> Result:
    try:
        return read(path)
    except PermissionError as error:
        raise InputError(f"{path} may not be read; mend its permissions.") from error
    except OSError as error:
        raise _DamagedError(f"{path} cannot be read ({error.strerror})") from error


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


# Failures


def _os_error_text(error: Exception) -> str | None:
    """Returns what the operating system refused, or None. TensorStore quotes its error number in a ValueError."""
    if isinstance(error, OSError):
        return str(error)
    quoted = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(quoted[1])) if quoted else None


def _require_writable(directory: Path) -> None:
    probe = directory / f".probe-{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.mkdir(exist_ok=True)
        shutil.rmtree(probe)
    except OSError as error:
        raise InputError(
            f"The folder {directory} cannot be written ({error}); mend its permissions or choose another --workdir."
        ) from error
