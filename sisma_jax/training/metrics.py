"""Scalars of a run over its steps, as JSON lines for programs and as TensorBoard events for people."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from sisma_jax.errors import InputError
from sisma_jax.files import write_atomically

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


class MetricWriter:
    """Appends to `metrics.jsonl` and to the events in `tensorboard/` of a run's folder. A context manager.

    A line reads {"step": 50, "loss": 0.5, ...}. JSON has no numbers that are not finite: they are the strings "nan",
    "inf" and "-inf", which `read_metrics` turns into floats again.
    """

    def __init__(self, workdir: Path, *, resume_step: int | None = None):
        """Opens the files at the point from which training goes on.

        Args:
          workdir: the run's folder, which exists.
          resume_step: step of the restored checkpoint, None if training starts from nothing. What an earlier process
            logged after it belongs to steps that are now trained again, and is dropped; so is the torn last line that
            a killed process leaves.

        Raises:
          InputError: the files cannot be read or written.
        """
        self._path = workdir / METRICS_NAME
        first_step = 0 if resume_step is None else resume_step + 1
        try:
            if self._path.exists():
                kept = [line for line in _parse(self._path) if line["step"] < first_step]
                write_atomically(self._path, "".join(map(_to_line, kept)))
            self._file = self._path.open("a", encoding="utf-8")
            self._events = _open_events(workdir / TENSORBOARD_NAME, first_step)
        except OSError as error:
            raise self._failure(error) from error

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends the values of one step; the line is on its way to the disk when this returns.

        Raises:
          InputError: the file cannot be written.
        """
        numbers = {key: float(value) for key, value in values.items()}
        try:
            self._file.write(_to_line({"step": step} | numbers))
            self._file.flush()
            for key, value in numbers.items():
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
            self._events.flush()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Closes both files, once.

        Raises:
          InputError: what was written last does not fit on the disk.
        """
        if self._file.closed:
            return
        try:
            with contextlib.closing(self._events), contextlib.closing(self._file):
                pass
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> InputError:
        return InputError(f"Metrics cannot be written to {self._path} ({error}); free disk space or mend the folder.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A failure to close must not hide the error that ends the block.
        with contextlib.suppress(InputError) if error is not None else contextlib.nullcontext():
            self.close()


def _open_events(folder: Path, first_step: int) -> EventsWriter:
    """Opens a new file of events and tells TensorBoard to hide earlier ones at or after `first_step`.

    Not tensorboardX's `SummaryWriter`: its thread dies when the disk is full, and the tenth value after that waits for
    it for ever, and with it the training.
    """
    folder.mkdir(exist_ok=True)
    events = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
    events.write_event(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))
    return events


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl` in the order written; "step" is an int, every other value a float.

    A last line without its end is what a killed or still running process leaves, and is left out. Any other line that
    cannot be read is left out with a warning.

    Raises:
      InputError: there is no such file.
    """
    try:
        return _parse(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}).") from error


def _parse(path: Path) -> list[dict[str, Any]]:
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
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
