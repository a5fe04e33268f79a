"""Metrics of a run at each logged step, as JSON lines for programs and as TensorBoard events."""

import contextlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, SupportsFloat

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue] protobuf defines it at run time
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue] protobuf defines it at run time
)
from tensorboardX.summary import scalar

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, write_atomically
from sisma_jax.parallel.agreement import is_primary, together
from sisma_jax.runs.folder import TrainingFolder

logger = logging.getLogger(__name__)


class MetricWriter:
    """Context manager that appends metrics to the JSON lines and the TensorBoard events of a training job.

    A line is {"step": 50, "loss": 0.5, ...}. JSON has no numbers that are not finite, so these are the strings "nan",
    "inf" and "-inf", which `read_metrics` converts to floats.

    Every process of a job creates a writer. That of the first process writes, and the others do nothing. If the run is
    in a bucket, where nothing can be appended to an object, the files grow on the local disk, and `sync` and `close`
    copy them to the bucket.
    """

    def __init__(self, folder: TrainingFolder, *, resume_step: int | None = None):
        """Opens the files, and drops what the resumed training will write again.

        Args:
          folder: of the training job; must exist.
          resume_step: step of the restored checkpoint, or None if training starts from the beginning. Lines of later
            steps are dropped, because these steps are trained again. So is an incomplete last line, which a killed
            process may leave.

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
        """Appends the values of one step, and hands the line to the operating system before it returns.

        Args:
          step: training step.
          values: {name: value}; a value may be a float or a scalar array.

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
        """Copies the files to the bucket, if the run is in one.

        Must be called before each checkpoint. Otherwise, a run that resumes from it lacks the lines before it.

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
        """Closes both files, and copies them to the bucket if the run is in one. A second call does nothing.

        Raises:
          InputError: the last values cannot be written to the disk or the bucket.
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
        # A failure to close must not hide the exception that ends the block.
        with contextlib.suppress(InputError) if error is not None else contextlib.nullcontext():
            self.close()


def _open_events(folder: AnyPath, first_step: int) -> tuple[AnyPath, EventsWriter]:
    """Opens a new file of events, which makes TensorBoard hide earlier events at or after `first_step`.

    This does not use tensorboardX's `SummaryWriter`. Its thread ends when the disk is full, and then training would
    wait for this thread forever.
    """
    folder.mkdir(exist_ok=True)
    suffix = f".{time.time_ns()}"
    events = EventsWriter(str(folder / "events"), filename_suffix=suffix)
    events.write_event(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))
    return next(folder.glob(f"*{suffix}")), events


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file in order, each as {"step": int, name: float, ...}.

    An incomplete last line, which a killed or running process leaves, is ignored. Any other line that cannot be parsed
    is ignored with a warning.

    Args:
      path: the file, on a disk or in a bucket.

    Raises:
      InputError: the file does not exist or cannot be read.
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
            logger.warning("%s, line %d is damaged and is ignored: %.80r", path, number, line)
    return parsed


def _to_line(values: Mapping[str, float]) -> str:
    written = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
    return json.dumps(written, allow_nan=False) + "\n"
