"""Public weights give the logits of the original program, in the order of classes that is asked for."""

import json
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError
from sisma_jax.models import bisenet
from sisma_jax.models.autoencoder import from_uint8
from sisma_jax.runs import parser_file
from tests.models.random_weights import random_weights

GOLDEN = np.load(Path(__file__).parent / "golden" / "bisenet.npz")


@pytest.fixture(scope="module")
def weights():
    shapes = {name: tuple(shape) for name, shape in json.loads(str(GOLDEN["shapes"])).items()}
    return random_weights(shapes)


@pytest.mark.parametrize("classes", [bisenet.CLASSES, CELEBAMASK_HQ], ids=lambda classes: classes.title)
def test_logits_are_those_of_the_original(weights, classes):
    network = bisenet.from_weights(weights, classes, "FILE")
    logits = network(from_uint8(jnp.asarray(GOLDEN["image"])))[:, ::4, ::4]
    expected = GOLDEN["logits"][..., [bisenet.CLASSES.index[name] for name in classes.names]]
    # float32 in another order of additions
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("cp.arm16.bn_atten.bias"), r"FILE has no cp\.arm16\.bn_atten\.bias, .*79999_iter"),
        (lambda weights: weights.clear(), r"FILE has no cp\.resnet\.conv1\.weight"),
        (lambda weights: weights["ffm.conv1.weight"].fill(np.nan), r"ffm\.conv1\.weight is not finite"),
        (
            lambda weights: weights.update({"conv_out.conv_out.weight": np.zeros((11, 256, 1, 1), np.float32)}),
            "FILE predicts 11 classes; wanted are 19",
        ),
        (
            lambda weights: weights.update({"ffm.conv1.weight": np.zeros((64, 32, 1, 1), np.float32)}),
            r"FILE: ffm\.conv1\.weight has the shape \(64, 32, 1, 1\), want \(64, 256, 1, 1\); download",
        ),
        # These fit: one number is broadcast, and a larger kernel has the same channels.
        (
            lambda weights: weights.update({"cp.resnet.bn1.bias": np.zeros(1, np.float32)}),
            r"cp\.resnet\.bn1\.bias has the shape \(1,\), want \(64,\)",
        ),
        (
            lambda weights: weights.update({"cp.arm16.conv.conv.weight": np.zeros((128, 256, 5, 5), np.float32)}),
            r"cp\.arm16\.conv\.conv\.weight has the shape \(128, 256, 5, 5\), want \(128, 256, 3, 3\)",
        ),
        # A deeper network of the same names.
        (
            lambda weights: weights.update({"cp.resnet.layer1.2.conv1.weight": np.zeros((64, 64, 3, 3), np.float32)}),
            r"FILE has weights that .* does not, such as cp\.resnet\.layer1\.2\.conv1\.weight",
        ),
        (
            lambda weights: weights["cp.resnet.bn1.running_var"].fill(-1),
            r"cp\.resnet\.bn1\.running_var is negative",
        ),
    ],
)
def test_other_weights_are_refused_by_name(weights, change, message):
    changed = {name: array.copy() for name, array in weights.items()}
    change(changed)
    with pytest.raises(InputError, match=message):
        bisenet.from_weights(changed, CELEBAMASK_HQ, "FILE")


def test_what_only_training_uses_may_be_absent(weights):
    used = {name: array for name, array in weights.items() if not name.startswith(("conv_out16", "conv_out32"))}
    assert len(used) < len(weights)
    counters = {"cp.resnet.bn1.num_batches_tracked": np.array(7)}
    network, same = (bisenet.from_weights(w, CELEBAMASK_HQ, "FILE") for w in (weights, used | counters))
    chex.assert_trees_all_equal(nnx.state(network), nnx.state(same))


def test_other_classes_are_refused(weights):
    with pytest.raises(InputError, match=r"FILE predicts the classes of .*, and those of LaPa.* are not the same"):
        bisenet.from_weights(weights, ClassSet.load("lapa"), "FILE")


def test_a_parser_with_public_weights_predicts_masks(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(parser_file, "read_state_dict", lambda _: weights)
    monkeypatch.setattr(bisenet, "IMAGE_SIZE", 64)
    parser = parser_file.load(tmp_path / "79999_iter.pth", CELEBAMASK_HQ)
    monkeypatch.undo()
    monkeypatch.setattr(bisenet, "IMAGE_SIZE", 64)
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    same = parser_file.load(tmp_path / "model.safetensors", CELEBAMASK_HQ)
    chex.assert_trees_all_equal(same.params, parser.params)
    image = GOLDEN["image"][:, :64, :64]
    masks = parser.predict(image)
    network = bisenet.from_weights(weights, CELEBAMASK_HQ, "FILE")
    logits, mirrored = (network(from_uint8(jnp.asarray(x))) for x in (image, np.ascontiguousarray(image[:, :, ::-1])))
    exchanged = CELEBAMASK_HQ.exchange_sides(np.arange(19, dtype=np.uint8))
    np.testing.assert_array_equal(masks, (logits + mirrored[:, :, ::-1][..., exchanged]).argmax(-1))
    assert not parser.is_own
