"""When a training has to stop because its machine is needed elsewhere: SIGTERM, to any one of its processes."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils

from sisma_jax.errors import Preempted


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Makes SIGTERM raise `Preempted` in the block: for a single process, whose work may be cut off anywhere."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted("Told to stop; the same command resumes from what is saved.")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class Preemption:
    """Tells all processes of a job to stop after the same step. A context manager.

    A single process waits for SIGTERM itself. Of several, the coordination service of JAX, which `jax.distributed`
    started, has done so since then: it tells the others, and finds a step that none has passed.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._before: signal.Handlers | None = None
        # Python handles signals in the main thread alone.
        self._handles = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def is_due(self, step: int) -> bool:
        """Whether to stop after this step; every process asks after each of its steps."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self._is_asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True

    def __enter__(self) -> Self:
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
