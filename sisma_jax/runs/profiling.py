"""Traces of single training steps, for TensorBoard's profile tab or XProf."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from sisma_jax.files import AnyPath, bucket_errors, is_bucket


@contextlib.contextmanager
def traced(folder: AnyPath) -> Iterator[None]:
    """Traces the devices and the host during the block; each process writes its own part.

    The block must wait for its results. Otherwise, the trace ends before the devices have computed them.

    Args:
      folder: for the trace, on a disk or in a bucket.

    Raises:
      OSError: the folder cannot be written.
    """
    with contextlib.ExitStack() as resources:
        temporary = Path(resources.enter_context(tempfile.TemporaryDirectory())) if is_bucket(folder) else None
        with jax.profiler.trace(str(temporary or folder)):
            yield
        if temporary is not None:
            for file in temporary.rglob("*"):
                if file.is_file():
                    target = folder / file.relative_to(temporary)
                    with bucket_errors(target):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(file.read_bytes())


class Profile:
    """Context manager that traces the given steps of a loop.

    Args:
      steps: numbers of the steps to trace. Steps that the loop does not run, because it resumes after them, are
        ignored.
      folder: for the trace, on a disk or in a bucket.
    """

    def __init__(self, steps: range, folder: AnyPath):
        self._steps, self._folder = steps, folder
        self._trace = contextlib.ExitStack()
        self._is_on = False

    def before(self, step: int) -> None:
        """Starts the trace if the step is to be traced; must be called before each step.

        Args:
          step: number of the step.

        Raises:
          OSError: the folder cannot be written.
        """
        if step in self._steps and not self._is_on:
            self._trace.enter_context(traced(self._folder))
            self._is_on = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after the last step to be traced; must be called after each step.

        Args:
          step: number of the step.
          results: arrays that the step computes; the trace ends when they are ready.

        Raises:
          OSError: the folder cannot be written.
        """
        if self._is_on and step == self._steps[-1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        self._trace.close()
        self._is_on = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
