"""FID's Inception against the peers (see `golden/make_inception.py`), and what its importer refuses."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sisma_jax.errors import InputError
from sisma_jax.evaluation.features import FeatureNetwork
from sisma_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from sisma_jax.evaluation.networks import inception_from_weights, load_inception, resizing
from sisma_jax.evaluation.networks.convolution import Convolution
from tests.evaluation.golden.random_weights import random_images, random_weights, uniform

GOLDEN = Path(__file__).parent / "golden" / "inception.npz"
RESIZES = ("pytorch-fid", "torch-fidelity", "clean-fid")


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@functools.cache
def weights() -> dict[str, np.ndarray]:
    shapes = json.loads(str(golden()["shapes"]))
    classifier = {name: np.zeros(shapes.pop(name), np.float32) for name in ("fc.weight", "fc.bias")}
    return random_weights(shapes) | classifier


@functools.cache
def network(resize: str = "pytorch-fid") -> FeatureNetwork:
    return inception_from_weights(weights(), "weights", resize=resize)


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Differences are compared with the size of the whole array: a small value may be the sum of large ones."""
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.std(want))


@pytest.mark.parametrize("size", [(64, 48), (401, 512)])
@pytest.mark.parametrize("resize", RESIZES)
def test_resized_images_are_those_of_the_peers(resize, size):
    images = random_images("resized", 1, *size)
    got = resizing.resize_for_inception(jnp.asarray(images), resize)
    assert got.shape == (1, 299, 299, 3)
    # Sums of at most 14 pixels in another order; positions are rounded to float32 as the peers do.
    np.testing.assert_allclose(got[:, ::13, ::13], golden()[f"resized/{size[0]}x{size[1]}/{resize}"], atol=2e-6)


@pytest.mark.parametrize("resize", RESIZES)
def test_an_image_of_the_networks_size_is_not_changed(resize):
    images = random_images("same", 1, 299, 299)
    want = images / 127.5 - 1 if resize == "pytorch-fid" else (images - 128.0) / 128
    np.testing.assert_allclose(resizing.resize_for_inception(jnp.asarray(images), resize), want, atol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("resize", RESIZES)
def test_features_are_those_of_the_peers(resize):
    assert (network(resize).name, network(resize).resize) == ("inception", resize)
    features = network(resize).features(random_images("features", 2, 96, 80))
    assert features.dtype == np.float32
    # Batch normalisation is folded and convolutions sum in another order, in 48 layers.
    assert_close(features, golden()[f"features/{resize}"], 1e-4)


@pytest.mark.optimized
def test_the_distance_of_the_features_is_that_of_pytorch_fid():
    images = random_images("fid", 16, 64, 64)
    features = np.concatenate([network().features(images[i : i + 2])[:, ::512] for i in range(0, 16, 2)])
    distance = frechet_distance(*(FeatureStatistics.from_batches([x]) for x in (features[:8], features[8:])))
    np.testing.assert_allclose(distance, golden()["fid"], rtol=1e-3)


@pytest.mark.parametrize(("strides", "size"), [(1, (3, 3)), (2, (3, 3)), (1, (1, 1)), (2, (1, 1)), (3, (5, 2))])
@pytest.mark.parametrize("shape", [(9, 12), (10, 7)])
def test_a_convolution_without_padding_uses_no_pixels_beyond_the_image(strides, size, shape):
    layer = Convolution(2, 4, size, strides, "VALID")
    kernel, bias = uniform("kernel", (*size, 2, 4)), uniform("bias", (4,))
    layer.kernel[...], layer.bias[...] = jnp.asarray(kernel), jnp.asarray(bias)
    images = uniform("images", (2, *shape, 2))
    windows = np.lib.stride_tricks.sliding_window_view(images, size, axis=(1, 2))[:, ::strides, ::strides]
    want = np.maximum(np.einsum("bhwcyx,yxco->bhwo", windows, kernel) + bias, 0)
    np.testing.assert_allclose(layer(jnp.asarray(images)), want, atol=1e-5)  # sums of 18 terms in float32


def test_the_fingerprint_depends_on_weights_and_resizing_only():
    others = {name: x for name, x in weights().items() if not name.startswith("fc.")}
    assert inception_from_weights(dict(reversed(others.items())), "another file").fingerprint == network().fingerprint
    assert network("clean-fid").fingerprint != network().fingerprint
    name = "Mixed_7c.branch_pool.bn.running_mean"
    changed = inception_from_weights(weights() | {name: weights()[name] * 2}, "weights")
    assert changed.checksum != network().checksum


def test_a_file_is_loaded_and_named_if_it_does_not_fit(tmp_path):
    file = tmp_path / "inception.safetensors"
    safetensors.numpy.save_file(weights(), file)
    loaded = load_inception(file, resize="clean-fid")
    assert loaded.fingerprint == network("clean-fid").fingerprint
    safetensors.numpy.save_file({"fc.bias": np.zeros(1008, np.float32)}, file)
    with pytest.raises(InputError, match=r"inception\.safetensors lacks 470 of 470 arrays.*6726825d\.pth"):
        load_inception(file)


def test_weights_that_do_not_fit_are_refused_with_the_place_of_the_right_ones():
    name = "Mixed_6b.branch7x7_2.conv.weight"

    def assert_refused(change: dict, match: str, without: tuple[str, ...] = ()) -> None:
        changed = {key: x for key, x in (weights() | change).items() if key not in without}
        with pytest.raises(InputError, match=match) as error:
            inception_from_weights(changed, "some.pth")
        assert str(error.value).startswith("some.pth")
        assert "pt_inception-2015-12-05-6726825d.pth" in str(error.value)
        assert "\n" not in str(error.value)

    assert_refused({}, rf"lacks 1 of 470 arrays, such as '{name}'", without=(name,))
    assert_refused({name: np.zeros((128, 128, 7, 1), np.float32)}, rf"'{name}' has the shape \(128, 128, 7, 1\)")
    assert_refused({name: weights()[name] * np.float32(np.inf)}, f"'{name}' holds values that are not finite")
    assert_refused({name: weights()[name].astype(np.int64)}, f"'{name}' holds values that are not finite numbers")
    # torchvision's Inception has the same convolutions and other values.
    assert_refused({"fc.weight": np.zeros((1000, 2048), np.float32)}, "another Inception-v3")
    assert_refused({"AuxLogits.fc.bias": np.zeros(1008, np.float32)}, "another Inception-v3")
    with pytest.raises(InputError, match=r"some\.pth lacks 470 of 470 arrays"):
        inception_from_weights({}, "some.pth")


def test_another_name_of_a_method_is_refused():
    with pytest.raises(InputError, match="resize is 'nearest', want one of pytorch-fid, torch-fidelity, clean-fid"):
        resizing.check_resize("nearest")
