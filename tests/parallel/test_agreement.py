"""What one process finds wrong ends all of them; files of a run are written by the first."""

import json

import pytest

from sisma_jax.errors import InputError
from sisma_jax.parallel import agreement
from sisma_jax.runs.folder import RunFolder
from sisma_jax.runs.metrics import read_metrics
from tests.processes import run_processes


def test_one_process_agrees_with_itself():
    assert agreement.is_primary()
    assert agreement.gather("text") == ["text"]
    assert agreement.from_primary(lambda: [1, "two"]) == [1, "two"]
    for error in (InputError("bad"), KeyError("defect")):
        with pytest.raises(type(error)) as raised, agreement.together():
            raise error
        assert raised.value is error


PROGRAM = """
import contextlib, dataclasses, json, pathlib
from sisma_jax.config import Config, ModelConfig
from sisma_jax.errors import InputError
from sisma_jax.parallel.agreement import from_primary, gather, together
from sisma_jax.runs.folder import RunFolder, TrainingFolder
from sisma_jax.runs.metrics import MetricWriter

folder, outcomes = pathlib.Path(arguments[0]), {}

def lose():
    raise InputError("it is lost")

def begin(path, config):
    with RunFolder.writing(path, config) as run:
        run.require_lock()

@contextlib.contextmanager
def recorded(name):
    try:
        yield
    except Exception as error:
        outcomes[name] = f"{type(error).__name__}: {error}"

outcomes["gathered"] = gather("é" * process) + gather("")
outcomes["from_primary"] = from_primary(lambda: ["of", process])
with recorded("one fails"), together():
    if process == 1:
        raise ValueError("a defect")
with recorded("both fail"), together(KeyError, OSError):
    raise KeyError("telling") if process == 1 else OSError("less so")
with recorded("primary fails"):
    from_primary(lambda: {}["missing"])

config = Config()
deeper = dataclasses.replace(config, model=ModelConfig(depth=3))
begin(folder / "run", config)
with RunFolder.writing(folder / "run", config) as run:
    with MetricWriter(run) as writer:
        writer.write(1, {"loss": 2.0})
        writer.sync()
    with recorded("held"):
        begin(folder / "run", config)
    if process == 0:
        run._require_lock = lose
    with recorded("lost"):
        run.require_lock()
with recorded("refused"):
    begin(folder / "run", deeper)
with recorded("refused to read"):
    RunFolder.open(folder / "run", config if process == 0 else deeper)
with recorded("one differs"):
    begin(folder / "run", config if process == 0 else deeper)
with recorded("not shared"):
    begin(folder / str(process), config)
(folder / "file").touch()
with recorded("no folder"):
    begin(folder / "file", config)
outcomes["unlocked"] = sorted(path.name for path in (folder / "run").iterdir())
(folder / "no_metrics" / "metrics.jsonl").mkdir(parents=True, exist_ok=True)
with recorded("no metrics"):
    MetricWriter(TrainingFolder(folder / "no_metrics"))
print(json.dumps(outcomes))
"""


def test_two_processes_agree_and_the_first_writes(tmp_path):
    results = run_processes(PROGRAM, tmp_path, devices=1)
    assert [status for status, *_ in results] == [0, 0], results
    first, second = (json.loads(output.splitlines()[-1]) for _, output, _ in results)
    assert first["gathered"] == second["gathered"] == ["", "é", "", ""]
    assert first["from_primary"] == second["from_primary"] == ["of", 0]
    assert first["one fails"] == "InputError: Process 1 failed: ValueError('a defect')"
    assert second["one fails"] == "ValueError: a defect"
    assert first["both fail"] == "KeyError: \"'telling'\""
    assert second["both fail"] == "KeyError: 'telling'"
    assert first["primary fails"] == "KeyError: 'missing'"
    assert second["primary fails"] == "InputError: Process 0 failed: KeyError('missing')"
    assert first["unlocked"] == second["unlocked"] == ["config.json", "metrics.jsonl", "tensorboard"]
    for outcome, expected in {
        "held": "is being written by process",
        "lost": "it is lost",
        "refused": "model.depth: the run has 12, given 3",
        "refused to read": "model.depth: the run has 12, given 3",
        "one differs": "model.depth: the run has 12, given 3",
        "not shared": "Process 1 does not see",
        "no folder": "cannot be created",
        "no metrics": "Metrics cannot be written to",
    }.items():
        assert first[outcome].startswith("InputError")
        assert expected in first[outcome]
        assert second[outcome] == first[outcome]
    assert RunFolder.open(tmp_path / "run").config.model.depth == 12
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
