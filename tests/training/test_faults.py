"""What a training run survives: being killed, told to stop, moved; with real processes and real signals."""

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sisma_jax.data.dataset import DataSet
from sisma_jax.runs.folder import TrainingFolder
from sisma_jax.runs.metrics import read_metrics
from tests import interrupted
from tests.processes import ROOT, free_port
from tests.tiny import tiny_config
from tests.training.runs import assert_same, final_state, train

NUM_STEPS = 100


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    DataSet.prepare(tiny_config(path).data)
    return path


def environment(devices: int = 1) -> dict[str, str]:
    """For a process that starts quickly."""
    return {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def has_trained(workdir, step, elapsed) -> bool:
    try:
        return TrainingFolder(workdir).metrics.read_bytes().count(b"\n") >= step
    except FileNotFoundError:
        return False


def metrics(path) -> list[dict]:
    return read_metrics(TrainingFolder(path).metrics)


@pytest.mark.slow
def test_killed_at_twenty_random_steps_a_run_ends_with_the_bits_of_an_unbroken_one(tmp_path, cache_dir):
    config = tiny_config(cache_dir, num_steps=NUM_STEPS, checkpoint_every_steps=3)
    interrupted.run(functools.partial(train, config, tmp_path / "unbroken"), **environment())
    steps = np.sort(np.random.default_rng(0).choice(np.arange(1, NUM_STEPS - 5), 20, replace=False))
    conditions = [functools.partial(has_trained, tmp_path / "killed", step) for step in steps]
    job = functools.partial(train, config, tmp_path / "killed")
    assert interrupted.run(job, conditions, **environment()) == 20
    assert_same(final_state(tmp_path / "killed", config), final_state(tmp_path / "unbroken", config))
    losses = [[(line["step"], line["loss"]) for line in metrics(tmp_path / name)] for name in ("killed", "unbroken")]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, NUM_STEPS + 1))


def config_file(folder, **settings):
    """A file for the command line, and the configuration in it."""
    cache_dir, train = settings.pop("cache_dir"), settings
    path = folder / "tiny.py"
    path.write_text(
        "from pathlib import Path\nfrom tests.tiny import tiny_config\n\n\n"
        f"def get_config():\n    return tiny_config(Path({str(cache_dir)!r}), **{train})\n"
    )
    return path, tiny_config(cache_dir, **train)


class Job:
    """`run.py ... train`, or another command, in one process or several of two devices each."""

    def __init__(self, file, workdir, *arguments, processes=1, command="train"):
        self.workdir = workdir
        command = [sys.executable, "run.py", "--config", str(file), command, "--workdir", str(workdir), *arguments]
        flags = [[]]
        if processes > 1:
            coordinator = ["--coordinator", f"localhost:{free_port()}", "--num_processes", str(processes)]
            flags = [[*coordinator, "--process_id", str(i)] for i in range(processes)]
        self.processes = [
            subprocess.Popen(
                [*command, *more],
                cwd=ROOT,
                env=os.environ | environment(devices=2),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for more in flags
        ]

    def wait_for_step(self, step):
        deadline = time.monotonic() + 240
        while not has_trained(self.workdir, step, 0.0):
            for process in self.processes:
                assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self):
        """Returns exit codes, outputs and errors."""
        try:
            texts = [process.communicate(timeout=240) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], *map(list, zip(*texts, strict=True))


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_the_code_to_start_again(tmp_path, cache_dir):
    file, config = config_file(tmp_path, cache_dir=cache_dir, num_steps=3000, checkpoint_every_steps=3000)
    job = Job(file, tmp_path / "run")
    job.wait_for_step(20)
    job.processes[0].send_signal(signal.SIGTERM)
    (code,), _, (errors,) = job.end()
    assert code == os.EX_TEMPFAIL
    assert "Traceback" not in errors
    lines = metrics(tmp_path / "run")
    saved = lines[-1]["step"]
    assert saved < 3000
    assert f"step {saved} is saved, and the same command resumes from there" in errors
    assert final_state(tmp_path / "run", config)[0] == saved


@pytest.mark.slow
def test_two_processes_killed_and_told_to_stop_go_on_to_the_bits_of_an_unbroken_run(tmp_path, cache_dir):
    """FSDP over two processes of two devices: SIGKILL to one, SIGTERM to the other, then to the end."""
    file, config = config_file(tmp_path, cache_dir=cache_dir, num_steps=16, checkpoint_every_steps=4)
    mesh = ("--mesh.data=2", "--mesh.fsdp=2")
    codes, _, errors = Job(file, tmp_path / "unbroken", *mesh, processes=2).end()
    assert codes == [0, 0], errors

    job = Job(file, tmp_path / "broken", *mesh, processes=2)
    job.wait_for_step(6)
    for process in job.processes[::-1]:  # the first alone would wait for the other, for 100 seconds
        process.kill()
    assert job.end()[0] == [-signal.SIGKILL] * 2
    assert metrics(tmp_path / "broken")[-1]["step"] < 16

    job = Job(file, tmp_path / "broken", *mesh, processes=2)
    job.wait_for_step(9)
    job.processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = job.end()
    assert codes == [os.EX_TEMPFAIL] * 2, errors
    assert all("the same command resumes from there" in text for text in errors)

    codes, outputs, errors = Job(file, tmp_path / "broken", *mesh, processes=2, command="all").end()
    assert codes == [0, 0], errors
    assert "Resuming from the checkpoint of step" in errors[0]
    # The first process speaks for all.
    for told in ("Checkpoints: ", "Held-out loss at step 16", "Sample grid"):
        assert told in outputs[0]
        assert told not in outputs[1]
    assert (tmp_path / "broken/samples/grid_0000016.png").stat().st_size > 0
    assert "step 16" not in errors[1]
    assert_same(final_state(tmp_path / "broken", config), final_state(tmp_path / "unbroken", config))
    lines = metrics(tmp_path / "broken")
    assert [line["step"] for line in lines] == list(range(1, 17))
    unbroken = metrics(tmp_path / "unbroken")
    assert [line["loss"] for line in lines] == [line["loss"] for line in unbroken]
    # Told to stop at a checkpoint's step, the run does not stay to measure.
    measured = [
        (a["held_out_loss"], b["held_out_loss"]) for a, b in zip(lines, unbroken, strict=True) if "held_out_loss" in a
    ]
    assert len(measured) >= 3
    assert all(a == b for a, b in measured)
    # And another number of processes goes through the same batches to the same result, but for rounding.
    alone = tmp_path / "alone"
    (code,), _, errors = Job(file, alone, "--mesh.data=2").end()
    assert code == 0, errors
    losses = [[line["loss"] for line in metrics(path)] for path in (alone, tmp_path / "unbroken")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
