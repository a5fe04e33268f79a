"""Metrics: every step once, also when a run is killed and resumed."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sisma_jax.errors import InputError
from sisma_jax.runs.folder import TrainingFolder
from sisma_jax.runs.metrics import MetricWriter, read_metrics
from tests.bucket import make_bucket


def steps(workdir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(workdir / "metrics.jsonl")]


def write_steps(workdir: Path, numbers: range, resume_step: int | None = None) -> None:
    with MetricWriter(TrainingFolder(workdir), resume_step=resume_step) as writer:
        for step in numbers:
            writer.write(step, {"loss": step / 2})


def events(workdir: Path) -> list[Event]:
    """Reads TensorBoard's files, which are named by their time."""
    return [event for path in sorted((workdir / "tensorboard").iterdir()) for event in events_of(path.read_bytes())]


def events_of(content: bytes) -> Iterator[Event]:
    """Yields what is in records of length (8 bytes), its checksum (4), data, their checksum (4)."""
    while content:
        length = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_values_of_every_type_are_read_back(tmp_path):
    with MetricWriter(TrainingFolder(tmp_path)) as writer:
        writer.write(1, {"loss": 0.1, "grad_norm": jnp.float32(2.5), "rate": np.float64(1e-4), "count": 3})
        writer.write(2, {})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1, "grad_norm": 2.5, "rate": 1e-4, "count": 3.0},
        {"step": 2},
    ]


def test_a_line_is_on_the_disk_when_write_returns(tmp_path):
    with MetricWriter(TrainingFolder(tmp_path)) as writer:
        writer.write(1, {"loss": 1.0})
        assert steps(tmp_path) == [1]


def test_values_that_are_not_finite_stay_json(tmp_path):
    with MetricWriter(TrainingFolder(tmp_path)) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line["a"])
    assert (line["b"], line["c"]) == (math.inf, -math.inf)


def test_resumed_run_has_every_step_once(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(6, 10), resume_step=5)
    assert steps(tmp_path) == list(range(1, 10))


def test_run_that_starts_again_from_nothing_drops_everything(tmp_path):
    write_steps(tmp_path, range(8))
    write_steps(tmp_path, range(3))
    assert steps(tmp_path) == [0, 1, 2]


def test_torn_last_line_is_skipped_by_readers_and_dropped_on_resume(tmp_path, caplog):
    write_steps(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 5)
    assert steps(tmp_path) == [1, 2, 3]
    write_steps(tmp_path, range(4, 6), resume_step=3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert path.read_text().count("\n") == 5
    assert not caplog.records


@pytest.mark.parametrize("damaged", ["\0\0\0", "[1, 2]", '{"loss": 1.0}', '{"step": 2, "loss": "high"}', "3", ""])
def test_damaged_line_is_left_out_with_a_warning(damaged, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n' + damaged + '\n{"step": 3, "loss": 1.0}\n')
    assert steps(tmp_path) == [1, 3]
    assert caplog.messages[0].startswith(f"{path}, line 2 is damaged")


def test_killed_writer_leaves_a_file_that_resumes(tmp_path):
    program = textwrap.dedent(
        """
        import sys
        from sisma_jax.runs.folder import TrainingFolder
        from sisma_jax.runs.metrics import MetricWriter
        writer = MetricWriter(TrainingFolder(sys.argv[1]))
        step = 0
        while True:
            step += 1
            writer.write(step, {"loss": 1 / step})
            if step == 100:
                print("running", flush=True)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(signal.SIGKILL)
    logged = steps(tmp_path)
    assert len(logged) >= 99
    assert logged == list(range(1, len(logged) + 1))
    write_steps(tmp_path, range(51, 60), resume_step=50)
    assert steps(tmp_path) == list(range(1, 60))


def shown_by_tensorboard(workdir: Path) -> dict[int, float]:
    shown: dict[int, float] = {}
    for event in events(workdir):
        if event.session_log.status == SessionLog.START:
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            assert value.tag == "loss"
            assert event.step not in shown
            shown[event.step] = value.simple_value
    return shown


def test_tensorboard_gets_the_values_and_is_told_what_to_hide(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(6, 8), resume_step=5)
    assert shown_by_tensorboard(tmp_path) == {step: step / 2 for step in range(1, 8)}


def test_metrics_in_a_bucket_are_whole_at_each_checkpoint_and_when_resumed(monkeypatch):
    workdir = make_bucket(monkeypatch) / "run"
    killed = MetricWriter(TrainingFolder(workdir))
    for step in range(1, 8):
        killed.write(step, {"loss": step / 2})
        if step == 5:
            killed.sync()
            assert steps(workdir) == [1, 2, 3, 4, 5]
    assert steps(workdir) == [1, 2, 3, 4, 5]
    write_steps(workdir, range(6, 10), resume_step=5)
    assert steps(workdir) == list(range(1, 10))
    assert shown_by_tensorboard(workdir) == {step: step / 2 for step in range(1, 10)}
    assert sorted(path.name for path in workdir.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_bucket_that_cannot_be_written_is_named(monkeypatch):
    workdir = make_bucket(monkeypatch) / "run"

    def fail(*_):
        raise RuntimeError("503")

    with MetricWriter(TrainingFolder(workdir)) as writer:
        writer.write(1, {"loss": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr(type(workdir), "write_bytes", fail)
            with pytest.raises(InputError, match=r"cannot be written to gs://bucket/run/metrics.jsonl .*503"):
                writer.sync()
    assert steps(workdir) == [1]


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"cannot be written to .*metrics.jsonl"):
        MetricWriter(TrainingFolder(tmp_path))


needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")


@needs_full_device
def test_full_disk_is_named(tmp_path):
    with MetricWriter(TrainingFolder(tmp_path)) as writer:
        writer.write(1, {"loss": 1.0})
        os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
        with pytest.raises(InputError, match=r"metrics.jsonl .*No space left on device.*free disk space"):
            writer.write(2, {"loss": 1.0})
        with pytest.raises(InputError, match="No space left on device"):
            writer.close()
    assert steps(tmp_path) == [1]


@needs_full_device
def test_failing_close_does_not_hide_the_error_that_ends_the_block(tmp_path):
    def train() -> None:
        with MetricWriter(TrainingFolder(tmp_path)) as writer:
            os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
            writer._file.write("what is still to be written")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")
