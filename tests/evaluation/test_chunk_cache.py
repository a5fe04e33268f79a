"""Chunks are kept, shared among the processes of a job, and never missing from a result."""

import contextlib

import jax
import numpy as np
import pytest

from sisma_jax.evaluation import chunk_cache


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunk_cache, "IMAGES_PER_CHUNK", 3)


def compute(cache, made):
    def make(start, stop):
        made.append((start, stop))
        return {"x": np.arange(start, stop)}

    return chunk_cache.compute(("test",), 8, make, cache=cache, title="test")["x"]


def as_process(monkeypatch, index):
    """Pretends to be one of two processes, which do not wait for each other."""
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(chunk_cache, "together", contextlib.nullcontext)


def test_a_process_reads_the_chunks_of_another_one(tmp_path, monkeypatch):
    made = [[], []]
    as_process(monkeypatch, 1)
    np.testing.assert_array_equal(compute(tmp_path, made[1]), np.arange(8))
    as_process(monkeypatch, 0)
    np.testing.assert_array_equal(compute(tmp_path, made[0]), np.arange(8))
    assert made == [[(0, 3), (6, 8)], [(3, 6), (0, 3), (6, 8)]]  # the first to run found no chunk of the other


@pytest.mark.parametrize("index", [0, 1])
def test_what_another_process_wrote_where_this_one_cannot_see_is_computed_here(tmp_path, monkeypatch, index):
    as_process(monkeypatch, index)
    np.testing.assert_array_equal(compute(tmp_path / str(index), []), np.arange(8))


def test_a_folder_that_cannot_be_written_is_told_once_and_costs_no_value(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    made = []
    np.testing.assert_array_equal(compute(tmp_path / "file" / "cache", made), np.arange(8))
    assert made == [(0, 3), (3, 6), (6, 8)]
    assert caplog.text.count("what is computed is not kept") == 1
