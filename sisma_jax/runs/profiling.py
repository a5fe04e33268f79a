"""A trace of some steps, for TensorBoard's profile tab or XProf."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sisma_jax.files import AnyPath, bucket_errors, is_bucket


@contextlib.contextmanager
def traced(folder: AnyPath) -> Iterator[None]:
    """Writes what devices and host do in the block to `folder`; each process adds its own part.

    The block has to wait for its results, or what computes them is cut off.

    Raises:
      OSError: the folder cannot be written.
    """
    with contextlib.ExitStack() as resources:
        local = Path(resources.enter_context(tempfile.TemporaryDirectory())) if is_bucket(folder) else folder
        with jax.profiler.trace(str(local)):
            yield
        if local is not folder:
            for file in local.rglob("*"):
                if file.is_file():
                    target = folder / file.relative_to(local)
                    with bucket_errors(target):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(file.read_bytes())


class Profile:
    """Traces the given steps of a loop. A context manager.

    Args:
      steps: numbers of the steps; those before the first that is done are not traced.
      folder: for the trace.
    """

    def __init__(self, steps: range, folder: AnyPath):
        self._steps, self._folder = steps, folder
        self._trace = contextlib.ExitStack()
        self._is_on = False

    def before(self, step: int) -> None:
        """To be called before each step."""
        if step in self._steps and not self._is_on:
            self._trace.enter_context(traced(self._folder))
            self._is_on = True

    def after(self, step: int, results: Any) -> None:
        """To be called after each step, with what it computes."""
        if self._is_on and step == self._steps[-1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        self._trace.close()
        self._is_on = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
