"""What one process finds wrong ends all of them; files of a run are written by the first."""

import json

import pytest

from sisma_jax.errors import InputError
from sisma_jax.parallel import agreement
from sisma_jax.runs.folder import read_config
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
from sisma_jax.config import Config, ModelConfig, TrainConfig
from sisma_jax.parallel.agreement import from_primary, gather, together
from sisma_jax.runs.metrics import MetricWriter
from sisma_jax.runs.folder import open_workdir

folder, outcomes = pathlib.Path(arguments[0]), {}

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
open_workdir(folder / "run", config)
open_workdir(folder / "run", config)
with MetricWriter(folder / "run") as writer:
    writer.write(1, {"loss": 2.0})
    writer.sync()
with recorded("refused"):
    open_workdir(folder / "run", dataclasses.replace(config, model=ModelConfig(depth=3)))
with recorded("one differs"):
    open_workdir(folder / "run", config if process == 0 else dataclasses.replace(config, model=ModelConfig(depth=3)))
with recorded("not shared"):
    open_workdir(folder / str(process), config)
(folder / "file").touch()
with recorded("no folder"):
    open_workdir(folder / "file", config)
(folder / "no_metrics" / "metrics.jsonl").mkdir(parents=True, exist_ok=True)
with recorded("no metrics"):
    MetricWriter(folder / "no_metrics")
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
    for outcome, expected in {
        "refused": "--model.depth: the run has 12, given 3",
        "one differs": "--model.depth: the run has 12, given 3",
        "not shared": "Process 1 does not see",
        "no folder": "cannot be created",
        "no metrics": "Metrics cannot be written to",
    }.items():
        assert first[outcome].startswith("InputError")
        assert expected in first[outcome]
        assert second[outcome] == first[outcome]
    assert read_config(tmp_path / "run").model.depth == 12
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
