"""Preemption: SIGTERM to any process of a job stops the whole job."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from sisma_jax.errors import Preempted


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Makes SIGTERM raise `Preempted` in the block, for a job of one process whose work may stop at any point.

    Raises:
      Preempted: SIGTERM arrived.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted("Stopped by SIGTERM; the same command resumes from what is saved.")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class Preemption:
    """Context manager that lets all processes of a job stop after the same step on SIGTERM.

    A single process handles SIGTERM itself. With several processes, JAX's coordination service, which `jax.distributed`
    starts, receives the signal, informs all processes, and chooses a step that none of them has passed.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._before: Callable[[int, FrameType | None], Any] | int | None = None
        # Python handles signals only in the main thread.
        self._handles = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def is_due(self, step: int) -> bool:
        """Returns whether to stop after this step; every process must call this after each step.

        Args:
          step: number of the step that has just been dispatched.
        """
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
