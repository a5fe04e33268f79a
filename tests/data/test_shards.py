import functools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sisma_jax.data import shards
from sisma_jax.errors import InputError
from tests import interrupted

LENGTHS = {"train": (5, 5, 0, 4, 5, 3), "test": (4, 2)}


def slow_records(first: int, count: int, pause: float, damaged: tuple[int, ...] = ()) -> Iterator[dict | InputError]:
    for number in range(first, first + count):
        time.sleep(pause)
        yield (
            InputError(f"number {number} is damaged")
            if number in damaged
            else {"number": number, "text": b"x" * number}
        )


def fail(_: object) -> None:
    raise ZeroDivisionError("of a job")


def recipe(pause: float = 0.0, damaged: tuple[int, ...] = (), **changes) -> shards.ShardRecipe:
    starts, jobs = iter(np.cumsum([0, *LENGTHS["train"], *LENGTHS["test"]]).tolist()), {}
    for split, counts in LENGTHS.items():
        jobs[split] = [functools.partial(slow_records, next(starts), count, pause, damaged) for count in counts]
    features = {"number": np.int64, "text": tfds.features.Tensor(shape=(), dtype=np.object_)}
    values = {
        "name": "numbers",
        "variant": "few",
        "features": tfds.features.FeaturesDict(features),
        "jobs": jobs,
        "num_records": 28,
        "information": {"description": "Numbers."},
    }
    return shards.ShardRecipe(**(values | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbers(cache_dir: Path, split: str) -> list[int]:
    return [int(record["number"]) for record in shards.read(recipe().path(cache_dir)).as_data_source(split)]


def build(cache_dir: Path, num_processes: int, pause: float = 0.0) -> None:
    shards.build(recipe(pause), cache_dir, num_processes=num_processes)


@pytest.mark.parametrize("num_processes", [0, 1, 3])
def test_the_number_of_processes_does_not_show(tmp_path, num_processes):
    build(tmp_path / "one", 0)
    build(tmp_path / "other", num_processes)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert numbers(tmp_path / "other", "train") == list(range(22))
    assert numbers(tmp_path / "other", "test") == list(range(22, 28))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_build_killed_at_any_moment_ends_with_the_bytes_of_an_unbroken_one(tmp_path, num_processes):
    build(tmp_path / "unbroken", 0)
    # All of it takes a second or so, the start of processes included: the later kills find ever less to do.
    moments = np.random.default_rng(num_processes).uniform(0.0, 0.4, 10)
    job = functools.partial(build, tmp_path / "broken", num_processes, 0.02)
    assert interrupted.run(job, list(map(interrupted.after, moments))) >= 4
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_what_is_finished_is_not_made_again(tmp_path):
    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.build(recipe(finish=stop), tmp_path, num_processes=0)
    jobs = {split: [functools.partial(fail, None)] * len(counts) for split, counts in LENGTHS.items()}
    assert shards.build(recipe(jobs=jobs), tmp_path, num_processes=0) == recipe().path(tmp_path)
    assert numbers(tmp_path, "train") == list(range(22))


def test_a_process_that_is_killed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.sys, "executable", "false")
    with pytest.raises(InputError, match=r"wrote numbers-train.* ended with code 1.* resumes where"):
        build(tmp_path, 2)
    monkeypatch.undo()
    build(tmp_path, 0)
    assert numbers(tmp_path, "test") == list(range(22, 28))


def test_an_error_of_a_job_comes_out_of_its_process(tmp_path):
    jobs = {"train": [functools.partial(fail, None)]}
    with pytest.raises(ZeroDivisionError, match="of a job"):
        shards.build(recipe(jobs=jobs), tmp_path, num_processes=2)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_damaged_records_are_named_at_the_end_or_left_out(tmp_path, num_processes, caplog):
    damaged = recipe(damaged=(0, 7, 25))
    with pytest.raises(
        InputError, match=r"(?s)3 examples are damaged or incomplete:.* 0 is.* 7 is.* 25 is damaged.*skip_damaged"
    ):
        shards.build(damaged, tmp_path, num_processes=num_processes)
    shards.build(damaged, tmp_path, num_processes=num_processes, skip_damaged=True)
    assert "3 examples are left out" in caplog.text
    assert numbers(tmp_path, "train") == [n for n in range(22) if n not in (0, 7)]
    assert numbers(tmp_path, "test") == [22, 23, 24, 26, 27]
    assert len((damaged.path(tmp_path) / shards.SKIPPED_NAME).read_text().splitlines()) == 3
    # The complete data set tells of them again.
    with pytest.raises(
        InputError, match=r"(?s)3 examples are damaged or incomplete:.* 0 is.* 7 is.* 25 is damaged.*skip_damaged"
    ):
        shards.build(damaged, tmp_path, num_processes=num_processes)
    caplog.clear()
    shards.build(damaged, tmp_path, num_processes=num_processes, skip_damaged=True)
    assert "3 examples are left out" in caplog.text


def test_of_many_damaged_records_a_file_names_all(tmp_path):
    with pytest.raises(
        InputError, match=r"(?s)28 examples .* 9 is damaged\n  and 18 more: all are listed in /"
    ) as error:
        shards.build(recipe(damaged=tuple(range(28))), tmp_path, num_processes=0)
    file = Path(str(error.value).split("listed in ")[1].split()[0])
    assert len(file.read_text().splitlines()) == 28
    file.unlink()
