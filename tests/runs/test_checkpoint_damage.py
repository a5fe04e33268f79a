"""Checkpoints: what is damaged, or of another configuration, is noticed, named and stepped over."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.errors import InputError
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.ranking import BestMetric
from tests.runs.checkpoint_cases import (
    abstract,
    assert_same,
    flip_a_bit,
    largest_file,
    make_ema,
    make_iterator,
    make_state,
    save,
)


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
    path = folder / "description" / "description.json"
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
    remove("description"),
    remove("description/description.json"),
    remove("state/_METADATA"),
    remove("state/manifest.ocdbt"),
    remove("state/array_metadatas"),
    remove("state/d"),
    overwrite_json("description/description.json", '{"arrays'),
    overwrite_json("description/description.json", '{"wrong": 1}'),
    overwrite_json("description/description.json", "[3]"),
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
        (folder / step / "description" / "description.json").write_text('{"wrong": 1}')
    iterator = make_iterator()
    for _ in range(5):
        next(iterator)
    with (
        Checkpoints(folder, keep=2) as checkpoints,
        pytest.raises(InputError, match=r"None of the checkpoints in .* \(steps \[200, 300\]\).* in another folder\."),
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
        for item in ("description", "ema", "state"):
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


def test_damaged_best_gives_way_to_the_next_best(tmp_path, caplog):
    best = BestMetric("loss", "min")
    with Checkpoints(tmp_path, keep=3, best=best) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
            save(checkpoints, step, loss=loss)
    flip_a_bit(largest_file(tmp_path / "2" / "ema"))
    with Checkpoints(tmp_path, read_only=True, best=best) as checkpoints:
        assert checkpoints.best_step() == 2
        step, ema = checkpoints.restore_ema(jax.eval_shape(make_ema), "best")
        assert step == 1
        assert_same(ema, make_ema(1))
        assert "checkpoint of step 2 is damaged" in caplog.text
        with pytest.raises(InputError, match=r"can be read \(steps \[2\]\)"):
            checkpoints.restore_ema(jax.eval_shape(make_ema), 2)


def test_damaged_description_is_never_the_best_and_no_obstacle(tmp_path):
    best = BestMetric("loss", "min")
    with Checkpoints(tmp_path, keep=1, best=best) as checkpoints:
        for step, loss in ((1, 1.0), (2, 2.0)):
            save(checkpoints, step, loss=loss)
    flip_a_bit(tmp_path / "1" / "description" / "description.json")
    with Checkpoints(tmp_path, keep=1, best=best) as checkpoints:
        assert checkpoints.best_step() == 2


def test_unreadable_file_is_no_damage(two_checkpoints, monkeypatch):
    # Falling back would train again what a chmod brings back. (Tests may run as root, whom no mode stops.)
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with (
        Checkpoints(two_checkpoints, keep=2) as checkpoints,
        pytest.raises(InputError, match=r"300/\w+/checksums.json cannot be read"),
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
    assert "300 was saved by a run with another configuration" in str(error.value)
    assert "state/params.kernel: the checkpoint has float32[64, 48], this run float32[64, 50]" in str(error.value)
    assert "name another folder" in str(error.value)


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
