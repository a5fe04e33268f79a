import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.data import labels
from sisma_jax.errors import InputError
from sisma_jax.evaluation import segmenter

WIDTH = 32
SIZE = 16


def blocks(count, seed):
    """Pictures of two squares of three classes, in those classes' colours, on a background."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, SIZE, SIZE), np.uint8)
    for mask in masks:
        for label in generator.choice([1, 4, 13], 2, replace=False):
            y, x = generator.integers(0, SIZE - 6, 2)
            mask[y : y + 8, x : x + 8] = label
    return {"image": labels.colorize(masks), "mask": masks}


def train(num_steps, *, seed=0):
    return segmenter.train_segmenter(
        (blocks(8, step) for step in itertools.count()),
        num_steps=num_steps,
        width=WIDTH,
        key=jax.random.key(seed),
    )


@pytest.fixture(scope="module")
def params():
    return train(400)


def test_the_segmenter_learns_blocks_of_colour(params):
    held_out = blocks(64, seed=10**6)
    predicted = segmenter.predict(params, held_out["image"], batch_size=4)
    assert predicted.dtype == np.uint8
    assert np.mean(predicted == held_out["mask"]) > 0.9


def test_training_twice_gives_the_same_bits():
    first, second = train(3), train(3)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other = train(3, seed=1)
    assert (first["stem"]["kernel"] != other["stem"]["kernel"]).any()


def test_parameters_are_a_pure_dict_of_float32_arrays(params):
    def check(tree):
        for name, value in tree.items():
            assert type(name) is str
            if type(value) is not dict:
                assert isinstance(value, jax.Array)
                assert value.dtype == jnp.float32
            else:
                check(value)

    check(params)


@pytest.mark.parametrize(("height", "width"), [(17, 30), (1, 5)])
def test_any_image_size_is_read(params, height, width):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    assert segmenter.predict(params, images).shape == (2, height, width)


def test_the_last_batch_may_be_smaller(params):
    images = blocks(7, seed=5)["image"]
    together = segmenter.predict(params, images, batch_size=7)
    np.testing.assert_array_equal(segmenter.predict(params, images, batch_size=4), together)
    np.testing.assert_array_equal(segmenter.predict(params, images), together)


def test_no_images_have_no_masks(params):
    assert segmenter.predict(params, np.zeros((0, SIZE, SIZE, 3), np.uint8)).shape == (0, 16, 16)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_what_is_no_batch_of_images_is_refused(params, images):
    with pytest.raises(ValueError, match="images must be uint8"):
        segmenter.predict(params, images)


def test_saved_parameters_predict_the_same(params, tmp_path):
    path = tmp_path / "segmenter.npz"
    segmenter.save(params, path)
    loaded = segmenter.load(path)
    assert list(tmp_path.iterdir()) == [path]
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    images = blocks(4, seed=3)["image"]
    np.testing.assert_array_equal(segmenter.predict(loaded, images), segmenter.predict(params, images))


def overwrite_middle(data):
    middle = len(data) // 2
    return data[:middle] + b"damaged!" + data[middle + 8 :]


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "overwritten": overwrite_middle,
    "cut_array": lambda data: b"\x93NUMPY",
    "text": lambda data: b"text",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(params, tmp_path, damage):
    path = tmp_path / "segmenter.npz"
    segmenter.save(params, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"segmenter\.npz is damaged"):
        segmenter.load(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"weights": np.zeros(3)},
        {"stem/kernel": np.zeros((12, WIDTH), np.float32)},
        {"stem/kernel": np.float32(1)},
        {"stem/kernel": np.array([None])},
    ],
    ids=["other_names", "too_few", "scalar", "objects"],
)
def test_a_file_with_other_arrays_is_named(tmp_path, arrays):
    path = tmp_path / "segmenter.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"segmenter\.npz is damaged"):
        segmenter.load(path)


def test_an_array_file_is_named(tmp_path):
    path = tmp_path / "segmenter.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match=r"segmenter\.npy is damaged"):
        segmenter.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.npz"):
        segmenter.load(tmp_path / "nothing.npz")
