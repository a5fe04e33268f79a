"""The benchmarks of evaluation: what they write, and whom they leave out. No test depends on how fast anything is."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import evaluation, evaluation_memory, fid_peer
from sisma_jax.evaluation.features import FeatureNetwork


@pytest.fixture
def mean_colours(monkeypatch):
    """A network of three features in place of Inception."""
    network = FeatureNetwork("inception", lambda images: images.mean(axis=(1, 2)), "0", "none")
    monkeypatch.setattr(evaluation, "inception_from_weights", lambda weights, source: network)


def without_peer(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytorch_fid" else find(name))


@pytest.mark.usefixtures("mean_colours")
def test_without_the_peer_this_project_is_measured_alone(monkeypatch, tmp_path, capsys):
    without_peer(monkeypatch)
    evaluation.main(num_images=3, rounds=2, size=32, json=tmp_path / "fid.json")
    printed = capsys.readouterr().out
    assert "peer 'pytorch-fid' left out: " in printed
    assert "pip install torch torchvision pytorch-fid" in printed
    report = json.loads((tmp_path / "fid.json").read_text())
    (record,) = report["problems"]
    assert (report["benchmark"], record["name"], len(record["samples"])) == ("evaluation", "sisma_jax", 2)
    assert record["samples"][0]["fid"] == record["samples"][1]["fid"]


@pytest.mark.usefixtures("mean_colours")
def test_distances_that_differ_are_an_error(monkeypatch, tmp_path):
    class Peer:
        def __init__(self, weights):
            pass

        def measure(self, first, second):
            assert sorted(file.name for file in first.iterdir()) == ["00000.png", "00001.png"]
            return fid_peer.Timed(1e6, (1.0, 1.0), (1.0, 1.0))

        def close(self):
            pass

    monkeypatch.setattr(fid_peer, "absent", lambda: "")
    monkeypatch.setattr(fid_peer, "Peer", Peer)
    with pytest.raises(SystemExit, match="differ by more than"):
        evaluation.main(num_images=2, rounds=1, size=32)


def test_weights_have_the_layout_of_the_published_file():
    weights = evaluation.inception_weights()
    assert weights["fc.weight"].shape == (1008, 2048)
    assert weights["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)


@pytest.mark.parametrize("name", evaluation_memory.DISTANCES)
def test_distances_of_random_features_are_measured(monkeypatch, name):
    monkeypatch.setattr(evaluation_memory, "DIMENSIONS", 8)
    cost = evaluation_memory.distance_cost(name, 1000)
    assert (cost.stage, cost.num_images) == (name, 1000)
    assert cost.peak_bytes > 2**20


def test_random_features_are_not_negative_and_differ_by_the_seed():
    first, second = (evaluation_memory.random_features(20, seed) for seed in range(2))
    assert first.dtype == np.float32
    assert min(first.min(), second.min()) >= 0
    assert np.any(first != second)
