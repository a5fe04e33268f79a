"""Scalars of a run over its steps, as JSON lines for programs and as TensorBoard events for people."""

import contextlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, write_atomically
from sisma_jax.parallel.agreement import is_primary, together
from sisma_jax.runs.folder import TrainingFolder

logger = logging.getLogger(__name__)


class MetricWriter:
    """Appends to the JSON lines and to the TensorBoard events of a training. A context manager.

    A line reads {"step": 50, "loss": 0.5, ...}. JSON has no numbers that are not finite: they are the strings "nan",
    "inf" and "-inf", which `read_metrics` turns into floats again.

    All processes of a job make one; that of the first process writes, the others do nothing. Nothing can be appended to
    an object in a bucket: the files grow on the disk, and `sync` and `close` copy them there.
    """

    def __init__(self, folder: TrainingFolder, *, resume_step: int | None = None):
        """Opens the files at the point from which training resumes.

        Args:
          folder: of the training; it exists.
          resume_step: step of the restored checkpoint, None if training starts from nothing. What an earlier process
            logged after it belongs to steps that are now trained again, and is dropped; so is the torn last line that
            a killed process leaves.

        Raises:
          InputError: the files cannot be read or written.
        """
        self._folder = self._local = folder
        self._resources = contextlib.ExitStack()
        self._is_open = False
        with together():
            if is_primary():
                try:
                    self._open(0 if resume_step is None else resume_step + 1)
                except OSError as error:
                    raise self._failure(error) from error

    def _open(self, first_step: int) -> None:
        with contextlib.ExitStack() as resources:
            path, local = self._folder.metrics, self._folder
            if is_bucket(path):
                local = TrainingFolder(resources.enter_context(tempfile.TemporaryDirectory()))
            kept = []
            with bucket_errors(path):
                if path.exists():
                    kept = [line for line in _parse(path) if line["step"] < first_step]
            write_atomically(local.metrics, "".join(map(_to_line, kept)))
            self._file = resources.enter_context(local.metrics.open("a", encoding="utf-8"))
            self._events_path, self._events = _open_events(local.tensorboard, first_step)
            resources.callback(self._events.close)
            self._local = local
            self._resources = resources.pop_all()
            self._is_open = True

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends the values of one step; the line is on its way to the disk when this returns.

        Raises:
          InputError: the file cannot be written.
        """
        if not is_primary():
            return
        numbers = {key: float(value) for key, value in values.items()}
        try:
            self._file.write(_to_line({"step": step} | numbers))
            self._file.flush()
            for key, value in numbers.items():
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
            self._events.flush()
        except OSError as error:
            raise self._failure(error) from error

    def sync(self) -> None:
        """Copies what was written to the bucket, if the run is in one.

        To be called before each checkpoint: a run that resumes from it has lost what was not copied.

        Raises:
          InputError: the bucket cannot be written.
        """
        if not self._is_open or self._local is self._folder:
            return
        try:
            for path in (self._local.metrics, self._events_path):
                write_atomically(self._folder.path / path.relative_to(self._local.path), path.read_bytes())
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Closes both files, once.

        Raises:
          InputError: what was written last does not fit on the disk, or the bucket cannot be written.
        """
        if not self._is_open:
            return
        try:
            with self._resources:
                self.sync()
        except OSError as error:
            raise self._failure(error) from error
        finally:
            self._is_open = False

    def _failure(self, error: OSError) -> InputError:
        path = self._folder.metrics
        return InputError(f"Metrics cannot be written to {path} ({error}); free disk space or fix the folder.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A failure to close must not hide the error that ends the block.
        with contextlib.suppress(InputError) if error is not None else contextlib.nullcontext():
            self.close()


def _open_events(folder: Path, first_step: int) -> tuple[Path, EventsWriter]:
    """Opens a new file of events and tells TensorBoard to hide earlier ones at or after `first_step`.

    Not tensorboardX's `SummaryWriter`: its thread dies when the disk is full, and the tenth value after that waits for
    it forever, and with it the training.
    """
    folder.mkdir(exist_ok=True)
    suffix = f".{time.time_ns()}"
    events = EventsWriter(str(folder / "events"), filename_suffix=suffix)
    events.write_event(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))
    return next(folder.glob(f"*{suffix}")), events


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """Returns the lines of a file of metrics in the order written; "step" is an int, every other value a float.

    A last line without its end is what a killed or still running process leaves, and is left out. Any other line that
    cannot be read is left out with a warning.

    Raises:
      InputError: there is no such file.
    """
    try:
        with bucket_errors(path):
            return _parse(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}).") from error


def _parse(path: AnyPath) -> list[dict[str, Any]]:
    *lines, _torn = path.read_bytes().decode(errors="replace").split("\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            parsed.append({"step": step} | {key: float(value) for key, value in values.items()})
        except (ValueError, TypeError, AttributeError, KeyError):
            logger.warning("%s, line %d is damaged and is left out: %.80r", path, number, line)
    return parsed


def _to_line(values: Mapping[str, float]) -> str:
    written = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
    return json.dumps(written, allow_nan=False) + "\n"
