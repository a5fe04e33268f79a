"""The lock of a run's folder: one job writes it at a time.

On a disk the lock is `flock` on a file: the kernel releases it when its process ends, however that happens. It also
holds between hosts that share the disk where the file system passes `flock` on (NFS 4, GPFS, Lustre with `-o flock`);
where it knows no `flock`, on Windows, and in a bucket, the lock is a lease:

    an object with process, host, a random token and a count, which its holder rewrites every `RENEW_SECS`. A newcomer
    that finds one watches it: if its content changes, the holder is alive and the newcomer is refused; if nothing
    changes for three times `RENEW_SECS`, the holder is dead and the newcomer takes the lease over. Clocks of different
    hosts are never compared.

The lease protects against two jobs that are started on one folder by mistake, also at the same moment. It is no mutual
exclusion in the strict sense, because a bucket, as it is reached here, has no write that depends on what was there
before: a holder that cannot reach the bucket, or is suspended, for three times `RENEW_SECS` is taken for dead. When it
is back it finds the token of another, and saves no more checkpoints; what it wrote until then is not undone.
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
_LOOKS_PER_RENEWAL = 5

# What file systems without `flock` answer.
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(path: AnyPath) -> Iterator[Callable[[], None]]:
    """Holds the lock at `path`, in a folder that exists, during the block.

    Yields:
      A function that raises InputError if another process has taken the lock meanwhile.

    Raises:
      InputError: another process holds the lock: the message names process and host.
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
            path.unlink(missing_ok=True)  # still locked: who has opened this file finds another at the path, or none


def _open_locked(path: Path) -> BinaryIO:
    while True:
        file = path.open("a+b")
        with contextlib.ExitStack() as unless_locked:
            unless_locked.enter_context(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise _refusal(path, file.read()) from None
            with contextlib.suppress(FileNotFoundError):  # removed by its holder after it was opened here
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    unless_locked.pop_all()
                    return file


class _Lease:
    """A lease at a path. A context manager."""

    def __init__(self, path: AnyPath):
        self._path = path
        self._owner = _owner() | {"token": secrets.token_hex(8)}
        self._count = 0
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._require_abandoned()
        self._write()
        # Of two newcomers that have found no lease, the one that wrote last has it.
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
                "%s cannot be removed (%s); the next run here waits until it is abandoned.", self._path, error
            )

    def require(self) -> None:
        """Raises InputError if another process has the lease."""
        try:
            found = self._read()
        except OSError:  # what is written next has the same trouble, and tells it
            return
        if self._is_lost(found):
            raise InputError(
                f"{self._path.parent} was taken over by {_describe(found or b'')}, because this process did not renew "
                f"its lease for {3 * RENEW_SECS:.0f} seconds; it writes no more. Stop one of the two."
            )

    def _require_abandoned(self) -> None:
        """Returns if there is no lease, or once it has not been renewed for long; raises InputError if it is."""
        first = self._read()
        for look in range(3 * _LOOKS_PER_RENEWAL):
            if not first:  # empty: a trial of `flock`
                return
            if look == 0:
                logger.warning(
                    "%s says that %s writes this folder; waiting up to %.0f seconds to see whether it is alive.",
                    *(self._path, _describe(first), 3 * RENEW_SECS),
                )
            time.sleep(RENEW_SECS / _LOOKS_PER_RENEWAL)
            found = self._read()
            if found is not None and found != first:
                raise _refusal(self._path, found)
            first = found

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECS):
            with contextlib.suppress(OSError):  # the network, which comes back
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
    except (ValueError, TypeError):  # its holder has not written it yet
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
