"""How a process joins its job: by flags, by the environment, by what JAX finds, or not at all."""

import jax
import pytest

from sisma_jax.errors import InputError
from sisma_jax.parallel import distributed
from sisma_jax.parallel.distributed import DistributedOptions

FLAGS = DistributedOptions("localhost:1234", 2, 1)


@pytest.fixture
def joined(monkeypatch):
    """Calls of `jax.distributed.initialize`, which are not made."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_process_alone_joins_nothing(joined, tmp_path):
    assert distributed.initialize(DistributedOptions(), devices=tmp_path) == 1
    assert joined == []


def test_flags_come_before_the_environment(joined, monkeypatch):
    explicit = {"cluster_detection_method": "deactivate"}
    assert distributed.initialize(FLAGS) == 2
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert distributed.initialize(DistributedOptions()) == 3
    assert distributed.initialize(DistributedOptions(process_id=2)) == 3
    assert joined == [
        (("localhost:1234", 2, 1), explicit),
        (("host:1", 3, 0), explicit),
        (("host:1", 3, 2), explicit),
    ]


@pytest.mark.parametrize("chip", ["accel0", "vfio/0"])
def test_a_tpu_vm_is_joined_by_itself_unless_told_to_use_another_platform(joined, monkeypatch, tmp_path, chip):
    (tmp_path / chip).parent.mkdir(exist_ok=True)
    (tmp_path / chip).touch()
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert distributed.initialize(DistributedOptions(), devices=tmp_path) == 1  # JAX_PLATFORMS is cpu
    assert joined == []
    monkeypatch.delenv("JAX_PLATFORMS")
    distributed.initialize(DistributedOptions(), devices=tmp_path)
    assert joined == [((), {})]
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    distributed.initialize(DistributedOptions(), devices=tmp_path)
    assert len(joined) == 1


def test_a_launcher_of_several_tasks_is_left_to_jax(joined, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    distributed.initialize(DistributedOptions(), devices=tmp_path)
    assert joined == []
    monkeypatch.setenv("SLURM_NTASKS", "4")
    distributed.initialize(DistributedOptions(), devices=tmp_path)
    assert joined == [((), {})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DistributedOptions("localhost:1"), r"needs `num_processes` \(JAX_NUM_PROCESSES\) and `process_id`"),
        (DistributedOptions(num_processes=2, process_id=0), r"needs `coordinator` \(JAX_COORDINATOR_ADDRESS\)"),
        (DistributedOptions("localhost", 2, 0), "`coordinator` localhost does not have the form HOST:PORT"),
        (DistributedOptions("localhost:x", 2, 0), "`coordinator` localhost:x does not have the form HOST:PORT"),
        (DistributedOptions("localhost:1", 0, 0), "`num_processes` must be positive, got 0"),
        (DistributedOptions("localhost:1", 2, 2), r"`process_id` must be in 0..1 for 2 processes, got 2"),
    ],
)
def test_contradictions_are_refused(joined, options, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(options)
    assert joined == []


def test_a_number_that_is_none_is_refused(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is 'two', want an integer"):
        distributed.initialize(DistributedOptions("localhost:1", process_id=0))


@pytest.mark.parametrize(("options", "error"), [(FLAGS, RuntimeError), (DistributedOptions(), RuntimeError)])
def test_others_that_do_not_come_are_an_error_of_one_line(monkeypatch, options, error):
    def fail(*args, **kwargs):
        raise error("DEADLINE_EXCEEDED: barrier timed out\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(InputError, match=r"could not join the others.*DEADLINE_EXCEEDED: barrier timed out\)"):
        distributed.initialize(options)


def test_chips_without_a_service_that_names_hosts_are_a_job_of_one(monkeypatch):
    def fail():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert distributed.initialize(DistributedOptions()) == 1
