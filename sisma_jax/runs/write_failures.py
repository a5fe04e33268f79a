"""Failures to write a checkpoint, in the words of the disk or the bucket, out of what Orbax and TensorStore raise."""

import contextlib
import os
import re
from collections.abc import Iterator

import jax

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket

# A save that takes longer in one process, or fails there, is given up by the others; the default of Orbax.
TIMEOUT_SECS = 1200


class UnwrittenError(Exception):
    """A checkpoint could not be written; the message is the reason."""


class LateError(Exception):
    """Another process did not write its part in time; it may know why."""


@contextlib.contextmanager
def writing(directory: AnyPath) -> Iterator[None]:
    """Turns a failure to write into UnwrittenError or LateError; other exceptions are defects."""
    try:
        yield
    except Exception as error:
        # A process whose own write failed waits for the others all the same, and reports that they did not come.
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
            f"The folder {directory} cannot be written ({error}); mend its permissions or choose another --workdir."
        ) from error
