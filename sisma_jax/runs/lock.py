"""The lock of a run's folder: only one job at a time writes to it.

On a disk, the lock is `flock` on a file. The kernel releases it when the process ends for any reason. It also works
between hosts that share the disk if the file system supports this (NFS 4, GPFS, Lustre with `-o flock`).

On Windows, in a bucket, and on file systems without `flock`, the lock is a lease. This is a file (or an object) with
the process, the host, a random token and a count, which the holder rewrites every `RENEW_SECS`. A process that finds a
lease watches it for three times `RENEW_SECS`. If the content changes, the holder is alive, and the process fails. If it
does not change, the process takes over the lease. Clocks of different hosts are never compared.

The lease prevents two jobs from writing to one folder when both are started by mistake, even at the same moment. It
does not guarantee mutual exclusion, because there is no conditional write to a bucket here. A holder that is suspended
or cannot reach the bucket for three times `RENEW_SECS` loses its lease to another process. When it continues, it finds
the other process's token and saves no more checkpoints, but what it has written until then remains.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, write_atomically

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no `flock`
    fcntl = None

RENEW_SECS = 15.0
"""Seconds between two renewals of a lease."""
_LOOKS_PER_RENEWAL = 5

# Errors of file systems without `flock`.
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(path: AnyPath) -> Iterator[Callable[[], None]]:
    """Holds a lock during the block.

    Args:
      path: file of the lock, on a disk or in a bucket; its folder must exist.

    Yields:
      A function that raises InputError if another process has taken over the lock in the meantime.

    Raises:
      InputError: another process holds the lock; the message names its process id and host.
      OSError: the lock cannot be written.
    """
    with contextlib.ExitStack() as held:
        yield _acquire(path, held)


def _acquire(path: AnyPath, held: contextlib.ExitStack) -> Callable[[], None]:
    if fcntl is not None and not is_bucket(path):
        try:
            held.enter_context(_flocked(path))
            return lambda: None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
    return held.enter_context(_Lease(path)).require


@contextlib.contextmanager
def _flocked(path: Path) -> Iterator[None]:
    with _open_locked(path) as file:
        file.truncate(0)
        file.write(json.dumps(_owner()).encode())
        file.flush()
        try:
            yield
        finally:
            # Still locked. A process that has already opened this file will find that it is no longer at the path.
            path.unlink(missing_ok=True)


def _open_locked(path: Path) -> BinaryIO:
    assert fcntl is not None
    while True:
        file = path.open("a+b")
        with contextlib.ExitStack() as unless_locked:
            unless_locked.enter_context(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise _refusal(path, file.read()) from None
            with contextlib.suppress(FileNotFoundError):  # its holder has deleted it since it was opened here
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    unless_locked.pop_all()
                    return file


class _Lease:
    """Context manager that holds a lease at a path; raises InputError if another process holds it."""

    def __init__(self, path: AnyPath):
        self._path = path
        self._owner = _owner() | {"token": secrets.token_hex(8)}
        self._count = 0
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._require_abandoned()
        self._write()
        # If two processes have found no lease at the same time, the one that writes last holds it.
        time.sleep(RENEW_SECS / _LOOKS_PER_RENEWAL)
        found = self._read()
        if self._is_lost(found):
            raise _refusal(self._path, found or b"")
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewer.join()
        try:
            if not self._is_lost(self._read()):
                with bucket_errors(self._path):
                    self._path.unlink()
        except OSError as error:
            logger.warning(
                "%s cannot be deleted (%s); the next run in this folder waits %.0f seconds for the lease to expire.",
                *(self._path, error, 3 * RENEW_SECS),
            )

    def require(self) -> None:
        """Raises InputError if another process holds the lease."""
        try:
            found = self._read()
        except OSError:  # the next write of the caller fails likewise, and reports it
            return
        if self._is_lost(found):
            raise InputError(
                f"{self._path.parent} was taken over by {_describe(found or b'')}, because this process did not renew "
                f"its lease for {3 * RENEW_SECS:.0f} seconds. This process no longer writes to it; stop one of the two."
            )

    def _require_abandoned(self) -> None:
        """Returns if there is no lease, or when it has expired; raises InputError if another process renews it."""
        first = self._read()
        for look in range(3 * _LOOKS_PER_RENEWAL):
            if not first:  # empty: left by an attempt to use `flock`
                return
            if look == 0:
                logger.warning(
                    "According to %s, %s writes to this folder; waiting up to %.0f seconds to see whether it is alive.",
                    *(self._path, _describe(first), 3 * RENEW_SECS),
                )
            time.sleep(RENEW_SECS / _LOOKS_PER_RENEWAL)
            found = self._read()
            if found is not None and found != first:
                raise _refusal(self._path, found)
            first = found

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECS):
            with contextlib.suppress(OSError):  # probably a temporary network failure
                if self._is_lost(self._read()):
                    return
                self._write()

    def _is_lost(self, found: bytes | None) -> bool:
        return found is None or _parse(found).get("token") != self._owner["token"]

    def _read(self) -> bytes | None:
        try:
            with bucket_errors(self._path):
                return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self._count += 1
        write_atomically(self._path, json.dumps(self._owner | {"count": self._count}))


def _owner() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):  # the holder has not written it yet
        return {}


def _describe(content: bytes) -> str:
    owner = _parse(content)
    if not owner.keys() >= _owner().keys():
        return "another process"
    return f"process {owner['process']} on host {owner['host']}, which started at {owner['since']}"


def _refusal(path: AnyPath, content: bytes) -> InputError:
    return InputError(
        f"{path.parent} is being written by {_describe(content)}; wait until it ends, stop it, or name another folder."
    )
