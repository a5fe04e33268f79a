"""Storage of checkpoints: the only module that uses Orbax.

A checkpoint is a folder named after its step. On a disk, it is written under another name and renamed when it is
complete. In a bucket, a marker file shows that it is complete. Hence an interrupted save is never taken for a
checkpoint.

A checkpoint consists of items: trees of arrays, and a description in JSON. Each item has a `checksums.json` of its
files, which is verified before the item is read. Orbax 0.12.8 detected none of 20 flipped bits in a stored array, and
it reports a truncated file with a page of tracebacks.

A failed write raises an exception with the message of the operating system or the bucket. `files.bucket_errors` cannot
do this here: TensorStore quotes the operating system in a ValueError, and a process that fails to write its part of a
checkpoint first waits for the others and then reports a timeout.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, to_path
from sisma_jax.runs.checksums import verify_checksums, write_checksums
from sisma_jax.runs.ranking import Ranking

# If a process fails, or needs longer than this for its part of a save, the others give up. The default of Orbax.
TIMEOUT_SECS = 1200

DESCRIPTION = "description"
_DESCRIPTION_NAME = "description.json"


class UnwrittenError(Exception):
    """A checkpoint cannot be written; the message is the reason."""


class LateError(Exception):
    """Another process did not write its part of a checkpoint in time; its own messages may show the reason."""


class Store:
    """The checkpoints in a folder. Every process of a job must call each method at the same point of the program."""

    def __init__(self, directory: AnyPath, trees: Sequence[str], *, keep: int | None, ranking: Ranking):
        """Opens a folder.

        Args:
          directory: folder of the checkpoints, on a disk or in a bucket.
          trees: names of the items that are trees of arrays.
          keep: number of newest checkpoints to keep. None: read only, nothing is created, renamed or deleted.
          ranking: of the best checkpoints, which are kept in addition.
        """
        self._directory = directory
        # Orbax logs every save and every error through absl. The errors are also raised, so its log is not needed.
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
                # Deletes what an interrupted save left behind, but no complete checkpoint.
                cleanup_tmp_directories=keep is not None,
                enable_async_checkpointing=True,
                # Folders are created before `save` returns. Otherwise, if one cannot be created, Orbax's writers
                # would wait for it for ten minutes and delay the end of the process.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=TIMEOUT_SECS),
                enable_background_delete=False,
                # All processes use the list of steps that the first process reads.
                single_host_load_and_broadcast=True,
                read_only=keep is None,
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, damaged or not, in increasing order."""
        return sorted(map(int, self._manager.all_steps()))  # broadcast steps are NumPy integers

    def reload(self) -> None:
        """Reads the list of checkpoints again."""
        self._manager.reload()

    def save(self, step: int, trees: Mapping[str, Mapping[str, jax.Array]], description: Mapping[str, Any]) -> None:
        """Starts to save a checkpoint, and returns when the values are copied to the host.

        Args:
          step: names the checkpoint.
          trees: {item: {path: array}}.
          description: item that is stored as JSON.

        Raises:
          UnwrittenError: the checkpoint cannot be written.
          LateError: another process did not write its part in time.
        """
        items: dict[str, Any] = {name: ocp.args.StandardSave(dict(tree)) for name, tree in trees.items()}
        items[DESCRIPTION] = ocp.args.JsonSave(description)
        with _writing(self._directory):
            # force: without it Orbax declines, silently, a step that is not the newest.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Waits until the save in progress is complete.

        Raises:
          UnwrittenError: the checkpoint cannot be written.
          LateError: another process did not write its part in time.
        """
        with _writing(self._directory):
            self._manager.wait_until_finished()

    def verify(self, step: int, items: Sequence[str]) -> None:
        """Verifies the checksums of items.

        Each process verifies a part of the files, because this takes as long as reading them.

        Args:
          step: of the checkpoint.
          items: names of the items.

        Raises:
          DamagedError: a file of this process's part is missing or differs from what was saved.
          InputError: a file cannot be read.
        """
        for item in items:
            verify_checksums(self._directory / str(step) / item, jax.process_index(), jax.process_count())

    def describe(self, step: int) -> dict[str, Any]:
        """Returns the description of the checkpoint of a `step`, which must be verified before."""
        return json.loads((self._directory / str(step) / DESCRIPTION / _DESCRIPTION_NAME).read_bytes())

    def read(
        self, step: int, targets: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
    ) -> dict[str, dict[str, jax.Array]]:
        """Returns trees of a checkpoint, which must be verified before.

        Args:
          step: of the checkpoint.
          targets: {item: {path: shape, dtype and sharding}} of the arrays to read.

        Returns:
          {item: {path: array}}, with the dtypes and shardings of the targets.
        """
        items = {item: ocp.args.StandardRestore(dict(target)) for item, target in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {item: restored[item] for item in targets}

    def close(self) -> None:
        """Ends the threads of Orbax."""
        self._manager.close()
        logging.getLogger("absl").removeFilter(self._filter)


# These handlers write checksums after all files of an item, and before Orbax marks the checkpoint as complete. Orbax
# calls `finalize` in the first process when all processes have written their parts. It does so in its writer thread, so
# that training does not wait.


class _TreeHandler(ocp.handlers.StandardCheckpointHandler):
    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        write_checksums(to_path(directory))


class _JsonHandler(ocp.handlers.JsonCheckpointHandler):
    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        write_checksums(to_path(directory))


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
    """Turns a failure to write into UnwrittenError or LateError. Other exceptions are defects and pass unchanged."""
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
                f"another process failed, or did not write its part within {TIMEOUT_SECS} seconds; see its messages"
            ) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the exception and the exceptions that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException, directory: AnyPath) -> str | None:
    """Returns the error of the operating system or the bucket, which TensorStore quotes in a ValueError, or None."""
    if isinstance(error, OSError):
        return str(error)
    quoted = re.search(r"os_error_code='(\d+)'", str(error))
    if quoted:
        return os.strerror(int(quoted[1]))
    is_late = "DEADLINE_EXCEEDED" in str(error)
    return str(error).partition("\n")[0] if is_bucket(directory) and not is_late else None


def require_writable(directory: AnyPath) -> None:
    """Creates a folder, and checks that files can be created in it.

    Args:
      directory: the folder, on a disk or in a bucket.

    Raises:
      InputError: the folder cannot be created or written.
    """
    probe = directory / f".probe-{jax.process_index()}"
    try:
        with bucket_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if is_bucket(directory):  # a bucket has no folders
                probe.write_bytes(b"")
                probe.unlink()
            else:
                probe.mkdir(exist_ok=True)
                probe.rmdir()
    except OSError as error:
        raise InputError(
            f"The folder {directory} cannot be written ({error}); fix its permissions or name another folder."
        ) from error
