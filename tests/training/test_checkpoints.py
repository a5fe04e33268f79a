"""Checkpoints: what is saved comes back bit for bit, and what is broken is noticed, named and stepped over."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sisma_jax.errors import InputError
from sisma_jax.training.checkpoints import Checkpoints

P = jax.sharding.PartitionSpec


def make_iterator() -> grain.DatasetIterator:
    dataset = grain.MapDataset.source(range(100)).seed(0).shuffle().repeat().batch(4)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2)))


def make_state(seed: int = 0) -> dict[str, Any]:
    """A state with all that Optax puts into one: NamedTuples, empty and masked nodes; and a typed key."""
    params = {
        "kernel": jax.random.normal(jax.random.key(seed), (64, 48)),
        "bias": jnp.arange(5, dtype=jnp.bfloat16),
        "order": jnp.array([True, False]),
    }
    trainable = {"kernel": True, "bias": True, "order": False}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), trainable))
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key(seed + 1),
    }


def make_ema(seed: int = 0) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(jax.random.key(100 + seed), (64, 48))}


def save(checkpoints: Checkpoints, step: int, iterator: grain.DatasetIterator | None = None) -> None:
    checkpoints.save(step, state=make_state(step), ema=make_ema(step), iterator=iterator)
    checkpoints.wait()


def abstract() -> tuple[Any, Any]:
    return jax.eval_shape(make_state), jax.eval_shape(make_ema)


def bits(tree: Any) -> list[np.ndarray]:
    def raw(leaf: jax.Array) -> np.ndarray:
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return np.asarray(leaf)

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
    for a, b in zip(bits(actual), bits(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


# Saving and restoring


def test_nothing_saved_restores_none(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(*abstract(), make_iterator()) is None


def test_values_structure_and_iterator_come_back_exactly(tmp_path):
    iterator = make_iterator()
    for _ in range(3):
        next(iterator)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, state=make_state(7), ema=make_ema(7), iterator=iterator)
        expected = [next(iterator) for _ in range(30)]  # also: the position is that of the call, not of the write
    resumed = make_iterator()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(*abstract(), resumed)
    assert restored is not None
    assert restored.step == 7
    assert_same(restored.state, make_state(7))
    assert_same(restored.ema, make_ema(7))
    np.testing.assert_array_equal([next(resumed) for _ in range(30)], expected)


def test_restored_key_and_optimiser_state_work(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1)
        restored = checkpoints.restore(*abstract(), None)
    assert restored is not None
    assert jax.random.key_impl(restored.state["key"]) == jax.random.key_impl(jax.random.key(0))
    np.testing.assert_array_equal(
        jax.random.normal(restored.state["key"], (3,)), jax.random.normal(make_state(1)["key"], (3,))
    )
    adam = restored.state["opt_state"][1].inner_state[0]
    assert isinstance(adam, optax.ScaleByAdamState)
    assert isinstance(adam.mu["order"], optax.MaskedNode)


def test_concrete_arrays_numbers_and_numpy_are_accepted(tmp_path):
    state = {"array": np.arange(3, dtype=np.float32), "number": 5}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state=state, ema=make_ema(), iterator=None)
        state["array"][:] = -1  # the copy was made before `save` returned
        restored = checkpoints.restore(state, make_ema(), None)
    assert restored is not None
    np.testing.assert_array_equal(restored.state["array"], [0.0, 1.0, 2.0])
    assert restored.state["number"] == 5


def test_caller_may_donate_its_arrays_while_the_save_runs(tmp_path):
    big = jax.random.normal(jax.random.key(0), (1024, 1024))
    expected = np.array(big)  # a copy of our own
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * -2 + 1, tree), donate_argnums=0)
    state = {"w": big}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state=state, ema={"w": jnp.zeros(3)}, iterator=None)
        for _ in range(20):
            state = update(state)
        assert big.is_deleted()
        restored = checkpoints.restore(jax.eval_shape(lambda: {"w": jnp.array(expected)}), {"w": jnp.zeros(3)}, None)
    assert restored is not None
    np.testing.assert_array_equal(restored.state["w"], expected)


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


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            save(checkpoints, step)
        assert checkpoints.latest_step() == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_a_step_saved_twice_is_left_as_it_is(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        checkpoints.save(1, state=make_state(9), ema=make_ema(9), iterator=None)
        restored = checkpoints.restore(*abstract(), None)
    assert restored is not None
    assert_same(restored.state, make_state(1))


def test_ema_is_restored_alone(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    shutil.rmtree(tmp_path / "2" / "state")  # not needed for sampling
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        step, ema = checkpoints.restore_ema(jax.eval_shape(make_ema))
    assert step == 2
    assert_same(ema, make_ema(2))


@pytest.mark.parametrize("read_only", [True, False])
def test_ema_without_checkpoint_says_train_first(tmp_path, read_only):
    with (
        Checkpoints(tmp_path / "checkpoints", keep=1, read_only=read_only) as checkpoints,
        pytest.raises(InputError, match=r"no checkpoint in .*checkpoints; train first"),
    ):
        checkpoints.restore_ema(jax.eval_shape(make_ema))


def test_reading_only_leaves_the_folder_alone(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    flip_a_bit(largest_file(tmp_path / "2" / "ema"))
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # a training is at work
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        step, ema = checkpoints.restore_ema(jax.eval_shape(make_ema))
    assert step == 1
    assert_same(ema, make_ema(1))
    assert sorted(tmp_path.rglob("*")) == before
    with Checkpoints(tmp_path / "missing", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
    assert not (tmp_path / "missing").exists()


def test_reader_finds_the_newer_checkpoint_when_its_own_is_deleted_meanwhile(tmp_path, monkeypatch, caplog):
    with Checkpoints(tmp_path, keep=1) as writer, Checkpoints(tmp_path, read_only=True) as reader:
        save(writer, 1)
        verify = Checkpoints._verify

        def delete_first(self: Checkpoints, step: int, items: list[str]) -> None:
            if step == 1:
                save(writer, 2)
            verify(self, step, items)

        monkeypatch.setattr(Checkpoints, "_verify", delete_first)
        step, ema = reader.restore_ema(jax.eval_shape(make_ema))
    assert step == 2
    assert_same(ema, make_ema(2))
    assert not caplog.records


# Damage


def truncate(folder: Path) -> None:
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size // 2)


def garble(folder: Path) -> None:
    path = largest_file(folder)
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def overwrite_json(path: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        assert (folder / path).exists()
        (folder / path).write_text(text)

    damage.__name__ = f"overwrite {path}"
    return damage


def remove(path: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    damage.__name__ = f"remove {path}"
    return damage


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def empty_every_file(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


def alter_a_shape(folder: Path) -> None:
    path = folder / "arrays" / "metadata"
    text = path.read_text().replace("[64, 48]", "[48, 64]")  # which must not read as another configuration
    assert text != path.read_text()
    path.write_text(text)


def forget_the_checksums_of_files(folder: Path) -> None:
    path = folder / "state" / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))


def flip_a_bit_of_the_parameters(folder: Path) -> None:
    flip_a_bit(largest_file(folder / "state"))


DAMAGES = [
    truncate,
    garble,
    flip_a_bit_of_the_parameters,
    empty,
    empty_every_file,
    alter_a_shape,
    forget_the_checksums_of_files,
    remove("state"),
    remove("ema"),
    remove("data"),
    remove("arrays"),
    remove("state/_METADATA"),
    remove("state/manifest.ocdbt"),
    remove("state/array_metadatas"),
    remove("state/d"),
    overwrite_json("data/process_0-of-1.json", '{"next_'),
    overwrite_json("data/process_0-of-1.json", '{"wrong": 1}'),
    overwrite_json("data/process_0-of-1.json", "[3]"),
    overwrite_json("state/_METADATA", "\0\0"),
]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    iterator = make_iterator()
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (200, 300):
            next(iterator)
            save(checkpoints, step, iterator)
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_newest_is_named_stepped_over_and_set_aside(damage, two_checkpoints, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    damage(folder / "300")
    iterator = make_iterator()
    with Checkpoints(folder, keep=2) as checkpoints:
        with caplog.at_level(logging.WARNING):
            restored = checkpoints.restore(*abstract(), iterator)
        assert restored is not None
        assert restored.step == 200
        assert_same(restored.state, make_state(200))
        assert_same(restored.ema, make_ema(200))
        assert iterator.get_state() == {"next_index": 1}
        assert "checkpoint of step 300" in caplog.messages[0]
        assert "\n" not in caplog.messages[0]
        assert (folder / "damaged-300").is_dir()
        # The run goes on and saves the same step again.
        save(checkpoints, 300, iterator)
        assert checkpoints.latest_step() == 300
        restored = checkpoints.restore(*abstract(), iterator)
        assert restored is not None
        assert restored.step == 300
    assert {"200", "300", "damaged-300"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\0\0", b"\xff\xfe\xfd"])
def test_damaged_bookkeeping_of_orbax_is_no_obstacle(content, two_checkpoints, tmp_path):
    # Two files of the step's folder hold no data of ours: whatever they say, the checkpoint is good.
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        (folder / "300" / name).unlink() if content is None else (folder / "300" / name).write_bytes(content)
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore(*abstract(), make_iterator())
        assert restored is not None
        assert restored.step == 300
        assert_same(restored.state, make_state(300))
        save(checkpoints, 301)


def test_things_that_are_no_checkpoints_are_left_alone(two_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "best-400").mkdir()
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 300
        save(checkpoints, 301)
    assert sorted(path.name for path in folder.iterdir()) == ["300", "301", "best-400", "notes.txt"]


def test_set_aside_names_do_not_collide(two_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    with Checkpoints(folder, keep=2) as checkpoints:
        for name in ("damaged-300", "damaged-300-2"):
            empty(folder / "300")
            restored = checkpoints.restore(*abstract(), None)
            assert restored is not None
            assert restored.step == 200
            assert (folder / name).is_dir()
            save(checkpoints, 300)


def test_iterator_keeps_its_position_when_no_checkpoint_can_be_read(two_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    for step in ("200", "300"):
        (folder / step / "data" / "process_0-of-1.json").write_text('{"wrong": 1}')
    iterator = make_iterator()
    for _ in range(5):
        next(iterator)
    with (
        Checkpoints(folder, keep=2) as checkpoints,
        pytest.raises(InputError, match=r"None of the checkpoints in .* can be read \(steps \[200, 300\]\).*--workdir"),
    ):
        checkpoints.restore(*abstract(), iterator)
    assert iterator.get_state() == {"next_index": 5}
    expected = make_iterator()
    np.testing.assert_array_equal(next(iterator), [next(expected) for _ in range(6)][-1])
    assert sorted(path.name for path in folder.iterdir()) == ["200", "300"]  # nothing is set aside


def test_every_flipped_bit_is_noticed(two_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    shutil.rmtree(folder / "200")
    rng = np.random.default_rng(0)
    with Checkpoints(folder, read_only=True) as checkpoints:
        for item in ("arrays", "data", "ema", "state"):
            for path in (path for path in (folder / "300" / item).rglob("*") if path.is_file()):
                if path.name == "commit_success.txt":  # Orbax's, without content
                    continue
                content = path.read_bytes()
                damaged = bytearray(content)
                damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
                path.write_bytes(damaged)
                with pytest.raises(InputError, match="None of the checkpoints"):
                    checkpoints.restore(*abstract(), make_iterator())
                path.write_bytes(content)
        assert checkpoints.restore(*abstract(), make_iterator()) is not None


def test_unreadable_file_is_no_damage(two_checkpoints, monkeypatch):
    # Falling back would train again what a chmod brings back. (Tests may run as root, whom no mode stops.)
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with (
        Checkpoints(two_checkpoints, keep=2) as checkpoints,
        pytest.raises(InputError, match=r"300/\w+/checksums.json may not be read"),
    ):
        checkpoints.restore(*abstract(), None)


# Another configuration


def test_other_shapes_are_another_configuration_not_damage(two_checkpoints):
    state, ema = abstract()
    state["params"]["kernel"] = jax.ShapeDtypeStruct((64, 50), jnp.float32)
    with Checkpoints(two_checkpoints, keep=2) as checkpoints:
        with pytest.raises(InputError) as error:
            checkpoints.restore(state, ema, None)
        assert checkpoints.restore(*abstract(), None) is not None
    assert "300 was saved by a run of another configuration" in str(error.value)
    assert "state/params.kernel: the checkpoint has float32[64, 48], this run float32[64, 50]" in str(error.value)
    assert "--workdir" in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"extra": jax.ShapeDtypeStruct((), jnp.int32)}, "state/extra: the checkpoint has nothing, this run int32[]"),
        ({"step": None}, "state/step: the checkpoint has int32[], this run nothing"),
        ({"step": jax.ShapeDtypeStruct((), jnp.float32)}, "the checkpoint has int32[], this run float32[]"),
        ({"key": jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))}, "has key<fry>[], this run key<rbg>[]"),
    ],
    ids=["added", "removed", "dtype", "key"],
)
def test_other_trees_are_another_configuration(change, line, two_checkpoints):
    state, ema = abstract()
    with Checkpoints(two_checkpoints, keep=2) as checkpoints, pytest.raises(InputError) as error:
        checkpoints.restore(state | change, ema, None)
    assert line in str(error.value)


def test_long_list_of_differences_is_cut(two_checkpoints):
    state, ema = abstract()
    with Checkpoints(two_checkpoints, keep=2) as checkpoints, pytest.raises(InputError, match="\n  and 7 more\n"):
        checkpoints.restore(state | {f"p{i}": jnp.zeros(1) for i in range(12)}, ema, None)


# Failures to write


@pytest.fixture
def limit_file_size():
    """Makes writes beyond a size fail, as a full disk does; Python ignores the signal that goes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


BIG = {"w": jax.random.normal(jax.random.key(0), (256, 1024))}


@pytest.mark.parametrize("surfaces_at", ["wait", "save", "close"])
def test_failed_write_surfaces_and_leaves_the_older_checkpoint(surfaces_at, tmp_path, limit_file_size):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state=BIG, ema=BIG, iterator=None)
    checkpoints.wait()
    limit_file_size(50_000)
    checkpoints.save(2, state=BIG, ema=BIG, iterator=None)
    with pytest.raises(InputError, match=r"File too large.*last good checkpoint is step 1\.") as error:
        {
            "wait": checkpoints.wait,
            "save": lambda: checkpoints.save(3, state=BIG, ema=BIG, iterator=None),
            "close": checkpoints.close,
        }[surfaces_at]()
    assert str(tmp_path) in str(error.value)
    limit_file_size(None)
    restored = checkpoints.restore(BIG, BIG, None)
    assert restored is not None
    assert restored.step == 1
    # The same object can save again, the failed step too, and cleans up.
    checkpoints.save(2, state=BIG, ema=BIG, iterator=None)
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_failed_write_does_not_hide_the_error_that_ends_the_block(tmp_path, limit_file_size, caplog):
    def train() -> None:
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            limit_file_size(50_000)
            checkpoints.save(2, state=BIG, ema=BIG, iterator=None)
            raise ZeroDivisionError("the error of the block")

    with pytest.raises(ZeroDivisionError):
        train()
    assert any("could not be written" in message for message in caplog.messages)


def test_misuse_is_not_reported_as_a_full_disk(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(TypeError):
        checkpoints.save(1, state={"w": "no array"}, ema=BIG, iterator=None)


def test_folder_that_cannot_be_made_is_found_at_construction(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(InputError, match=r"file.* cannot be written .*--workdir"):
            Checkpoints(folder, keep=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_found_at_construction(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot be written .*--workdir"):
        Checkpoints(tmp_path, keep=1)


def test_nothing_is_printed(tmp_path, capfd):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, make_iterator())
        save(checkpoints, 2, make_iterator())
        checkpoints.restore(*abstract(), make_iterator())
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        checkpoints.restore_ema(jax.eval_shape(make_ema))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


# Killed


KILLED = textwrap.dedent(
    """
    import os, pathlib, signal, sys, time
    import jax, jax.numpy as jnp
    from sisma_jax.training.checkpoints import Checkpoints

    folder, delay = pathlib.Path(sys.argv[1]), float(sys.argv[2])
    noise = jax.random.normal(jax.random.key(0), (1000, 1000))
    checkpoints = Checkpoints(folder, keep=2)
    restored = checkpoints.restore({"w": noise, "step": jnp.int32(0)}, {"w": noise[0]}, None)
    first = 1 if restored is None else restored.step + 1
    for step in range(first, first + 100):
        checkpoints.save(step, state={"w": noise + step, "step": jnp.int32(step)}, ema={"w": noise[0] + step},
                         iterator=None)
        if step > first:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.wait()
    """
)


@pytest.mark.slow
def test_killed_save_is_never_taken_for_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    noise = jax.random.normal(jax.random.key(0), (1000, 1000))
    newest = 0
    for delay in (0.0, 0.1):
        process = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), str(delay)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )
        assert process.returncode == -9, process.stderr
        if delay == 0.0:
            assert any("tmp" in path.name for path in folder.iterdir()), "the save was not interrupted"
        with Checkpoints(folder, read_only=True) as checkpoints:
            target = {"w": noise, "step": jnp.int32(0)}, {"w": noise[0]}
            restored = checkpoints.restore(*target, None)
        assert restored is not None
        assert restored.step > newest
        newest = restored.step
        assert restored.state["step"] == newest
        np.testing.assert_array_equal(restored.state["w"], noise + newest)
    # What was cut off is cleaned up by the next run that saves.
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(newest + 1, state=target[0], ema=target[1], iterator=None)
    assert all(path.name.isdigit() for path in folder.iterdir())
