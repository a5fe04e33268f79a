"""The checks for a machine with an accelerator, here with small sizes on the CPU."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import device_check, measure
from benchmarks.device_checks import peaks, training
from benchmarks.device_checks.rows import Check, Row
from benchmarks.device_checks.scan_cases import ScanCase
from sisma_jax.config import PRESETS, ModelConfig
from sisma_jax.kernels.selective_scan import api
from tests.processes import ROOT

# Packages of the core and of training that a machine with only JAX, Flax and Optax lacks.
ABSENT = (
    "PIL",
    "array_record",
    "cv2",
    "etils",
    "fsspec",
    "grain",
    "matplotlib",
    "orbax",
    "safetensors",
    "tensorboard",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tqdm",
    "tyro",
)


@pytest.mark.slow
def test_the_checks_run_without_the_packages_for_data_and_files(tmp_path):
    program = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        f"sys.argv = ['device_check.py', '--platform', 'cpu', '--json', {str(tmp_path / 'check.json')!r}]\n"
        "runpy.run_path('benchmarks/device_check.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert set(report) == {"benchmark", "machine", "settings", "secs", "failed", "rows"}
    assert {"jax", "flax", "optax"} <= set(report["machine"]["packages"])
    rows = report["rows"]
    assert report["failed"] == 0
    assert {row["section"] for row in rows} == {"environment", "correctness", "timings", "training"}
    assert {row["status"] for row in rows} == {"pass", "measured"}
    scan = next(row for row in rows if row["name"].startswith("scan"))
    gradients = {f"d {name}" for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")}
    assert set(scan["errors"]) == {"y", "final_state"} | gradients
    assert sum(row["name"].startswith("order") for row in rows) == 8
    candidates = [row["candidate"] for row in rows if row["section"] == "timings"]
    assert candidates == ["xla", "associative", "attention xla, 1x64"]
    (trained,) = (row for row in rows if "training," in row["name"])
    assert trained["losses"][-1] < trained["losses"][0]
    # Every row of the report is a line of the tables, whose columns begin at the same place.
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(row["name"]) for line in lines) for row in rows)
    table = lines[lines.index("correctness") + 1 : lines.index("timings") - 1]
    assert {line.index("float32") for line in table if " float32 " in line} == {table[0].index("dtype")}
    assert lines[-1].startswith(f"0 of {len(rows)} rows failed")


def test_a_wrong_gradient_is_a_failure(tmp_path, monkeypatch, capsys):
    right = api.IMPLEMENTATIONS["xla"]

    def wrong(u, delta, *arrays, **options):
        return right(u, 1.01 * delta - 0.01 * jax.lax.stop_gradient(delta), *arrays, **options)

    monkeypatch.setattr(api, "IMPLEMENTATIONS", {**api.IMPLEMENTATIONS, "xla": wrong})
    file = tmp_path / "check.json"
    assert device_check.main(["--platform", "cpu", "--sections", "correctness", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())["rows"]
    judged = {(row["name"].split()[0], row["dtype"]): row["status"] for row in rows}
    # One per cent is within the rounding of bfloat16.
    assert judged["scan", "float32"] == judged["order", "float32"] == "FAIL"
    assert judged["convolution", "float32"] == judged["convolution", "bfloat16"] == "pass"
    scan = next(row for row in rows if (row["status"], row["dtype"]) == ("FAIL", "float32"))
    assert scan["cells"]["worst"] == "d delta"
    assert scan["errors"]["y"] < scan["tolerances"]["y"]
    assert "FAIL" in capsys.readouterr().out


def test_another_platform_is_refused(capsys):
    assert device_check.main(["--platform", "gpu"]) == 2
    assert "JAX" in capsys.readouterr().err


def test_a_check_that_raises_hides_no_other_and_late_ones_are_skipped(tmp_path):
    now = [0.0]

    def passing(secs):
        now[0] += secs
        return [Row("quick", "pass")]

    def broken():
        yield Row("before", "pass")
        raise RuntimeError("the driver is gone\nand more lines")

    session = device_check.Session(1.0, tmp_path / "check.json", {}, clock=lambda: now[0])
    session.run(Check("correctness", "broken", broken))
    session.run(Check("correctness", "first", lambda: passing(40.0)))
    # Another check of 40 seconds would end after the minute. Of the other section, none has run.
    session.run(Check("correctness", "second", lambda: passing(40.0)))
    session.run(Check("timings", "third", lambda: passing(1.0)))
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert [(row["name"], row["status"]) for row in rows] == [
        ("before", "pass"),
        ("broken", "FAIL"),
        ("quick", "pass"),
        ("second", "skipped"),
        ("quick", "pass"),
    ]
    assert rows[1]["note"] == "RuntimeError: the driver is gone"
    assert "broken" in rows[1]["traceback"]
    assert session.failed == 1


def test_the_sizes_are_those_of_the_presets():
    assert {name: PRESETS[name]["d_model"] * ModelConfig().expand for name in device_check.D_INNER} == (
        device_check.D_INNER
    )


def test_the_real_checks_are_listed_and_begin_with_what_matters_most():
    checks = device_check.real_checks()
    assert [check.section for check in checks[:6]] == [
        *("environment", "correctness", "timings", "timings", "training", "training")
    ]
    assert {check.section for check in checks} == set(device_check.COLUMNS)


def test_the_roofline_is_the_longest_of_its_bounds():
    work = peaks.Work(num_bytes=48 * 10**9, matmul_flops=989 * 10**9, exponentials=10**6)
    bound = peaks.roofline(work, "NVIDIA H200")
    assert bound is not None
    assert (bound["bound"], bound["secs"]) == ("bytes", pytest.approx(0.01))
    assert bound["secs_by_bound"]["matmul"] == pytest.approx(1e-3)
    assert peaks.roofline(work, "a device without a data sheet") is None


def test_the_bytes_of_a_scan_are_those_of_its_arguments_and_results():
    case = ScanCase(2, 5, 6, d_state=3)
    inputs, y = case.inputs(), case.cotangents()["y"]
    forward = sum(x.size for x in inputs.values()) + y.size
    both = forward + sum(x.size for x in inputs.values()) + y.size + sum(x.size for x in inputs.values())
    assert peaks.scan_work(2, 5, 6, 3, 4, backward=False).num_bytes == 4 * forward
    # The backward pass reads the arguments and the cotangent, and writes the gradients; those of the parameters, which
    # are small, are not counted.
    parameters = sum(inputs[name].size for name in ("A", "D", "delta_bias"))
    assert peaks.scan_work(2, 5, 6, 3, 4, backward=True).num_bytes == 4 * (both - parameters)


def test_an_image_shows_the_class_of_each_pixel():
    batch = training.examples(16, 3, seed=0)
    assert batch["image"].shape == (3, 16, 16, 3)
    assert batch["mask"].dtype == batch["image"].dtype == np.uint8
    other = training.examples(16, 3, seed=1)
    for label in np.intersect1d(batch["mask"], other["mask"]):
        colours = [example["image"][example["mask"] == label] for example in (batch, other)]
        assert len(np.unique(np.concatenate(colours), axis=0)) == 1


def test_the_memory_of_a_device_limits_its_programs(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 7}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert measure.available_bytes() == 7
