"""Checkpoints: saved on some devices and processes, restored on others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.runs.checkpoints import Checkpoints
from tests.processes import run_processes
from tests.runs.checkpoint_cases import (
    assert_same,
    flip_a_bit,
    make_iterator,
    make_large_state,
    place_large_state,
    placed_large_state,
    steps_on_disk,
)

P = jax.sharding.PartitionSpec


def test_shardings_of_the_abstract_tree_are_honoured(tmp_path):
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))
    sharded, whole = jax.sharding.NamedSharding(mesh, P("fsdp")), jax.sharding.NamedSharding(mesh, P())
    state = {"w": jnp.arange(16.0 * len(devices)).reshape(-1, 4), "key": jax.random.key(3), "step": jnp.int32(1)}
    ema = {"w": jnp.ones((8 * len(devices), 2))}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        on_mesh = {"w": jax.device_put(state["w"], sharded), "key": state["key"], "step": state["step"]}
        checkpoints.save(1, state=on_mesh, ema=ema, iterator=None)
        target = {
            "w": jax.ShapeDtypeStruct(state["w"].shape, state["w"].dtype, sharding=sharded),
            "key": jax.ShapeDtypeStruct((), state["key"].dtype, sharding=whole),
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        }
        restored = checkpoints.restore(target, jax.eval_shape(lambda: ema), None)
        # The same checkpoint on another topology: one device.
        on_one = checkpoints.restore(jax.eval_shape(lambda: state), jax.eval_shape(lambda: ema), None)
    assert restored is not None
    assert on_one is not None
    assert restored.state["w"].sharding == sharded
    assert restored.state["key"].sharding.is_equivalent_to(whole, 0)
    assert restored.ema["w"].devices() == {devices[0]}
    assert on_one.state["w"].devices() == {devices[0]}
    assert_same(restored.state, state)
    assert_same(on_one.state, state)


def test_state_split_over_eight_devices_goes_on_with_four_then_one_then_eight(tmp_path):
    expected = make_large_state()
    state = place_large_state(placed_large_state(jax.devices()))
    assert len(state["params"]["kernel"].addressable_shards[0].data) * 8 == len(expected["params"]["kernel"])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, devices in enumerate((4, 1, 8), start=1):
            checkpoints.save(step, state=state, ema=state["params"], iterator=None)
            target = placed_large_state(jax.devices()[:devices])
            restored = checkpoints.restore(target, target["params"], None)
            assert restored is not None
            assert restored.step == step
            state = restored.state
            for tree in (state["params"], restored.ema):
                kernel = tree["kernel"]
                assert kernel.sharding == target["params"]["kernel"].sharding
                assert len(kernel.addressable_shards[0].data) * devices == len(kernel)
                assert len(kernel.devices()) == devices
            assert_same(state, expected)


PROGRAM = """
import pathlib
from sisma_jax.errors import InputError
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.ranking import BestMetric
from tests.runs.checkpoint_cases import *

folder, expected = pathlib.Path(arguments[0]), make_large_state()
placed = placed_large_state(jax.devices())
iterator = make_iterator(process, count)
with Checkpoints(folder / "one", read_only=True) as checkpoints:
    restored = checkpoints.restore(placed, placed["params"], iterator)
    assert restored.step == 3
    assert_same_parts(restored.state, expected)
    step, ema = checkpoints.restore_ema(jax.eval_shape(make_large_state)["params"])  # whole in each process
    assert_same(ema, expected["params"])
batch = next(iterator)
with Checkpoints(folder / "two", keep=1, best=BestMetric("loss", "min")) as checkpoints:
    for step, loss in ((4, 1.0), (5, 2.0), (6, 3.0)):
        checkpoints.save(
            step, state=restored.state, ema=restored.ema, iterator=iterator, metrics={"loss": loss}
        )
    try:
        bad = jax.tree.map(lambda x: x * jnp.inf, restored.ema)
        checkpoints.save(7, state=restored.state, ema=bad, iterator=iterator, metrics={"loss": 0.0})
    except InputError as error:
        print(error)
with Checkpoints(folder / "damaged", keep=2) as checkpoints:
    restored = checkpoints.restore(placed, placed["params"], None)
    print(restored.step, checkpoints.steps(), batch.tolist())
"""


def test_two_processes_go_on_with_the_state_of_one_and_one_with_theirs(tmp_path):
    expected = make_large_state()
    state = place_large_state(placed_large_state(jax.devices()))
    iterator = make_iterator()
    for _ in range(3):
        next(iterator)
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(3, state=state, ema=state["params"], iterator=iterator)
    with Checkpoints(tmp_path / "damaged", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state=state, ema=state["params"], iterator=None)
    damaged = tmp_path / "damaged" / "2" / "state"
    flip_a_bit(damaged / list(json.loads((damaged / "checksums.json").read_text())["files"])[1])  # process 1 reads it

    results = run_processes(PROGRAM, tmp_path)
    assert [status for status, *_ in results] == [0, 0], results
    # Both fall back to the same step, and each has its half of the next batch.
    printed = [output.splitlines()[-1] for _, output, _ in results]
    batch = next(iterator).tolist()
    assert all("step 7 is not saved: ema/bias is not finite" in output for _, output, _ in results)
    assert printed == [f"1 [1] {batch[process::2]}" for process in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["1", "damaged-2"]

    assert steps_on_disk(tmp_path / "two") == [4, 6]
    target, resumed = placed_large_state(jax.devices()), make_iterator()
    with Checkpoints(tmp_path / "two", read_only=True) as checkpoints:
        restored = checkpoints.restore(target, target["params"], resumed)
    assert restored is not None
    assert restored.step == 6
    assert_same(restored.state, expected)
    assert_same(restored.ema, expected["params"])
    np.testing.assert_array_equal(next(resumed), next(iterator))


FULL_DISK = """
import pathlib, resource
from sisma_jax.errors import InputError
from sisma_jax.runs import store
from sisma_jax.runs.checkpoints import Checkpoints
from tests.runs.checkpoint_cases import make_large_state, place_large_state, placed_large_state

store.TIMEOUT_SECS = 3
state = place_large_state(placed_large_state(jax.devices()))
with Checkpoints(pathlib.Path(arguments[0])) as checkpoints:
    checkpoints.save(1, state=state, ema=state["params"], iterator=None)
    checkpoints.wait()
    if process == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    checkpoints.save(2, state=state, ema=state["params"], iterator=None)
    try:
        checkpoints.save(3, state=state, ema=state["params"], iterator=None)
    except InputError as error:
        print(error)
"""


@pytest.mark.slow
def test_all_processes_tell_why_one_could_not_write(tmp_path):
    for status, output, errors in run_processes(FULL_DISK, tmp_path):
        assert status == 0, errors
        assert "(File too large). The last good checkpoint is step 1." in output
