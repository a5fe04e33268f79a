"""How checkpoints are stored: the only module that knows Orbax.

A checkpoint is a folder named after its step. On a disk it is written under another name and renamed when it is
complete, in a bucket a file says that it is: an interrupted save is never taken for a checkpoint. It holds items: trees
of arrays, and a description in JSON. Each item has a `checksums.json` over its files, which is read before anything
else is: of 20 flipped bits in a stored array, Orbax 0.12.8 noticed none, and it reads a truncated file with a page of
tracebacks.

Failures to write are raised in the words of the disk or the bucket. This is not what `files.bucket_errors` does for
other files: TensorStore quotes the operating system in a ValueError, and a process whose part of a checkpoint failed
waits for the others all the same, and reports that they did not come.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, to_path
from sisma_jax.runs.checksums import verify_checksums, write_checksums
from sisma_jax.runs.ranking import Ranking

# A save that takes longer in one process, or fails there, is given up by the others; the default of Orbax.
TIMEOUT_SECS = 1200

DESCRIPTION = "description"
_DESCRIPTION_NAME = "description.json"


class UnwrittenError(Exception):
    """A checkpoint could not be written; the message is the reason."""


class LateError(Exception):
    """Another process did not write its part in time; it may know why."""


class Store:
    """The checkpoints in a folder. Every process of a job calls each method, at the same place."""

    def __init__(self, directory: AnyPath, trees: Sequence[str], *, keep: int | None, ranking: Ranking):
        """Opens a folder.

        Args:
          trees: names of the items that are trees of arrays.
          keep: number of newest checkpoints that are kept; None: nothing is created, renamed or deleted.
          ranking: of the checkpoints that are kept besides.
        """
        self._directory = directory
        # Orbax reports every save through absl, errors included, and raises those as well; all that matters of it
        # leaves this module as an exception.
        self._filter = lambda record: "orbax" not in Path(record.pathname).parts
        logging.getLogger("absl").addFilter(self._filter)
        self._manager = ocp.CheckpointManager(
            directory,
            handler_registry=_handlers(trees),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=0 if keep is None else 1,
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
                    [ocp.checkpoint_managers.LatestN(keep), ranking]
                ),
                create=keep is not None,
                # What a killed save left behind; complete checkpoints are not touched.
                cleanup_tmp_directories=keep is not None,
                enable_async_checkpointing=True,
                # Folders are made before `save` returns: when one cannot be made, Orbax's writers of its content
                # would wait for it for ten minutes and hold up the end of the process.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=TIMEOUT_SECS),
                enable_background_delete=False,
                # All processes see the steps that the first one sees.
                single_host_load_and_broadcast=True,
                read_only=keep is None,
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, readable or not, in rising order."""
        return sorted(map(int, self._manager.all_steps()))  # of NumPy where they were broadcast

    def reload(self) -> None:
        """Lists the folder again."""
        self._manager.reload()

    def save(self, step: int, trees: Mapping[str, Mapping[str, jax.Array]], description: Mapping[str, Any]) -> None:
        """Starts to save a checkpoint and returns once the values are copied. Raises UnwrittenError, LateError."""
        items: dict[str, Any] = {name: ocp.args.StandardSave(dict(tree)) for name, tree in trees.items()}
        items[DESCRIPTION] = ocp.args.JsonSave(description)
        with _writing(self._directory):
            # force: without it Orbax declines, silently, a step that is not the newest.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when the save in progress is complete. Raises UnwrittenError, LateError."""
        with _writing(self._directory):
            self._manager.wait_until_finished()

    def verify(self, step: int, items: Sequence[str]) -> None:
        """Raises DamagedError unless every file of the items has the bytes that were saved.

        Processes share the work, which for a large state takes as long as to read it.
        """
        for item in items:
            verify_checksums(self._directory / str(step) / item, jax.process_index(), jax.process_count())

    def describe(self, step: int) -> dict[str, Any]:
        """Returns the description of a checkpoint that is verified."""
        return json.loads((self._directory / str(step) / DESCRIPTION / _DESCRIPTION_NAME).read_bytes())

    def read(
        self, step: int, targets: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
    ) -> dict[str, dict[str, jax.Array]]:
        """Returns trees of a checkpoint that is verified, placed as the targets are."""
        items = {item: ocp.args.StandardRestore(dict(target)) for item, target in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {item: restored[item] for item in targets}

    def close(self) -> None:
        """Releases the threads."""
        self._manager.close()
        logging.getLogger("absl").removeFilter(self._filter)


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


def _handlers(trees: Sequence[str]) -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in trees:
        handler = _TreeHandler()
        registry.add(name, ocp.args.StandardSave, handler)
        registry.add(name, ocp.args.StandardRestore, handler)
    registry.add(DESCRIPTION, ocp.args.JsonSave, _JsonHandler(_DESCRIPTION_NAME))
    return registry


# Failures


@contextlib.contextmanager
def _writing(directory: AnyPath) -> Iterator[None]:
    """Turns a failure to write into UnwrittenError or LateError; other exceptions are defects."""
    try:
        yield
    except Exception as error:
        is_late = isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in str(error)
        causes = [cause for cause in _chain(error) if not isinstance(cause, TimeoutError)] if is_late else [error]
        reason = next(filter(None, (_reason(cause, directory) for cause in causes)), None)
        if reason is not None:
            raise UnwrittenError(reason) from error
        if is_late:
            raise LateError(
                f"a process failed, or did not write its part within {TIMEOUT_SECS} seconds: see its messages"
            ) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the exception and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException, directory: AnyPath) -> str | None:
    """Returns what the operating system or the bucket refused, or None. TensorStore quotes it in a ValueError."""
    if isinstance(error, OSError):
        return str(error)
    quoted = re.search(r"os_error_code='(\d+)'", str(error))
    if quoted:
        return os.strerror(int(quoted[1]))
    is_late = "DEADLINE_EXCEEDED" in str(error)
    return str(error).partition("\n")[0] if is_bucket(directory) and not is_late else None


def require_writable(directory: AnyPath) -> None:
    """Makes the folder. Raises InputError if it cannot be made, or nothing in it."""
    probe = directory / f".probe-{jax.process_index()}"
    try:
        with bucket_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if is_bucket(directory):  # which has no folders
                probe.write_bytes(b"")
                probe.unlink()
            else:
                probe.mkdir(exist_ok=True)
                probe.rmdir()
    except OSError as error:
        raise InputError(
            f"The folder {directory} cannot be written ({error}); fix its permissions or name another folder."
        ) from error
