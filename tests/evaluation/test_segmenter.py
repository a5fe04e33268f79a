import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.dataset import DataSet
from sisma_jax.errors import InputError
from sisma_jax.evaluation import segmenter
from sisma_jax.evaluation.segmenter import Segmenter

WIDTH = 32
SIZE = 16


def blocks(count, seed, classes=CELEBAMASK_HQ, labels=(1, 4, 13)):
    """Images of two squares of three classes, in those classes' colours, on a background."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, SIZE, SIZE), np.uint8)
    for mask in masks:
        for label in generator.choice(labels, 2, replace=False):
            y, x = generator.integers(0, SIZE - 6, 2)
            mask[y : y + 8, x : x + 8] = label
    return {"image": classes.colorize(masks), "mask": masks}


class Blocks(DataSet):
    """A data set of such images, in batches of 8 whatever is asked for; `change` replaces labels of the masks."""

    def __init__(self, classes=CELEBAMASK_HQ, labels=(1, 4, 13), change=lambda masks: masks):
        self.classes, self.labels, self.change = classes, labels, change

    def train_batches(self, batch_size, seed):
        for step in itertools.count():
            batch = blocks(8, 1000 * seed + step, self.classes, self.labels)
            yield batch | {"mask": self.change(batch["mask"])}


def train(steps, *, seed=0, dataset=None):
    return segmenter.train(dataset or Blocks(), steps=steps, width=WIDTH, seed=seed)


@pytest.fixture(scope="module")
def trained() -> Segmenter:
    return train(400)


def test_the_segmenter_learns_blocks_of_colour(trained):
    held_out = blocks(64, seed=10**6)
    predicted = trained.predict(held_out["image"], batch_size=4)
    assert predicted.dtype == np.uint8
    assert np.mean(predicted == held_out["mask"]) > 0.9


def test_training_twice_gives_the_same_bits():
    first, second = train(3).params, train(3).params
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other = train(3, seed=1).params
    assert (first["stem"]["kernel"] != other["stem"]["kernel"]).any()


def test_x64_does_not_change_it(trained):
    def start():
        return segmenter._init_params(jax.random.key(0), width=WIDTH, num_classes=19)

    images = blocks(8, seed=3)["image"]
    plain, masks = start(), trained.predict(images)
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, start(), plain)
        np.testing.assert_array_equal(trained.predict(images), masks)
        wide = train(3).params
    for params in (plain, wide):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


def test_ignored_pixels_are_not_learned_from():
    classes = dataclasses.replace(CELEBAMASK_HQ, ignored=200)

    def hide(masks):
        """Marks a part of each mask as ignored."""
        return np.where(np.arange(SIZE) < 6, 200, masks).astype(np.uint8)

    def lie(masks):
        """Gives that part another class."""
        return np.where(np.arange(SIZE) < 6, 18, masks).astype(np.uint8)

    hidden, told = (train(5, dataset=Blocks(classes, change=change)) for change in (hide, lie))
    assert (hidden.params["head"]["bias"] != told.params["head"]["bias"]).any()
    # What an ignored pixel's label is does not matter.
    other = dataclasses.replace(classes, ignored=255)
    same = train(
        5, dataset=Blocks(other, change=lambda masks: np.where(np.arange(SIZE) < 6, 255, masks).astype(np.uint8))
    )
    jax.tree.map(np.testing.assert_array_equal, hidden.params, same.params)
    # Nothing is learned from masks without a class, and nothing breaks.
    empty = train(2, dataset=Blocks(classes, change=lambda masks: np.full_like(masks, 200)))
    start = segmenter._init_params(jax.random.split(jax.random.key(0))[0], width=WIDTH, num_classes=19)
    jax.tree.map(np.testing.assert_array_equal, empty.params, start)


def test_another_class_set_has_its_own_number_of_classes():
    classes = ClassSet("Three", ("none", "red", "blue"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)))
    trained = train(2, dataset=Blocks(classes, (1, 2)))
    assert trained.params["head"]["bias"].size == 3 * 4**2
    assert trained.predict(blocks(4, 0, classes, (1, 2))["image"]).max() <= 2


def test_parameters_are_a_pure_dict_of_float32_arrays(trained):
    def check(tree):
        for name, value in tree.items():
            assert type(name) is str
            if type(value) is not dict:
                assert isinstance(value, jax.Array)
                assert value.dtype == jnp.float32
            else:
                check(value)

    check(trained.params)


@pytest.mark.parametrize(("height", "width"), [(17, 30), (1, 5)])
def test_any_image_size_is_read(trained, height, width):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    assert trained.predict(images).shape == (2, height, width)


def test_the_last_batch_may_be_smaller(trained):
    images = blocks(7, seed=5)["image"]
    together = trained.predict(images, batch_size=7)
    np.testing.assert_array_equal(trained.predict(images, batch_size=4), together)
    np.testing.assert_array_equal(trained.predict(images), together)


def test_no_images_have_no_masks(trained):
    assert trained.predict(np.zeros((0, SIZE, SIZE, 3), np.uint8)).shape == (0, 16, 16)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_what_is_no_batch_of_images_is_refused(trained, images):
    with pytest.raises(ValueError, match="images must be uint8"):
        trained.predict(images)


def test_a_saved_segmenter_predicts_the_same(trained, tmp_path):
    path = tmp_path / "segmenter.safetensors"
    segmenter.save(trained, path)
    loaded = segmenter.load(path, CELEBAMASK_HQ)
    assert list(tmp_path.iterdir()) == [path]
    assert loaded.classes == CELEBAMASK_HQ
    assert jax.tree.structure(loaded.params) == jax.tree.structure(trained.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.params)
    images = blocks(4, seed=3)["image"]
    np.testing.assert_array_equal(loaded.predict(images), trained.predict(images))


def overwrite_middle(data):
    middle = len(data) // 2
    return data[:middle] + b"damaged!" + data[middle + 8 :]


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "overwritten": overwrite_middle,
    "overwritten_at_the_start": lambda data: b"damaged!" + data[8:],
    "array_file": lambda data: b"\x93NUMPY",
    "text": lambda data: b"text",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(trained, tmp_path, damage):
    path = tmp_path / "segmenter.safetensors"
    segmenter.save(trained, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"segmenter\.safetensors is damaged .*; delete it to train a new one"):
        segmenter.load(path, CELEBAMASK_HQ)


@pytest.mark.parametrize(
    "arrays",
    [
        {"weights": np.zeros(3)},
        {"norm.bias": np.zeros(WIDTH, np.float32)},
        {"norm.bias": np.array(1, np.float32)},
        {"weights": np.zeros(3, jnp.bfloat16)},
        {},
    ],
    ids=["other_names", "too_few", "scalar", "bfloat16", "none"],
)
def test_a_file_with_other_arrays_is_named(tmp_path, arrays):
    path = tmp_path / "segmenter.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(InputError, match=r"segmenter\.safetensors is damaged or not a segmenter"):
        segmenter.load(path, CELEBAMASK_HQ)
    segmenter.save(Segmenter(arrays, CELEBAMASK_HQ), path)
    with pytest.raises(InputError, match=r"segmenter\.safetensors"):
        segmenter.load(path, CELEBAMASK_HQ)


def test_a_segmenter_of_other_classes_is_refused(trained, tmp_path):
    path = tmp_path / "segmenter.safetensors"
    segmenter.save(trained, path)
    fewer = ClassSet("Two", ("a", "b"), ((0, 0, 0), (1, 1, 1)))
    renamed = dataclasses.replace(CELEBAMASK_HQ, title="Renamed", names=CELEBAMASK_HQ.names[::-1])
    for classes in (fewer, renamed):
        with pytest.raises(
            InputError, match=f"does not contain a segmenter of the classes of {classes.title}; delete it"
        ):
            segmenter.load(path, classes)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors: no such file"):
        segmenter.load(tmp_path / "nothing.safetensors", CELEBAMASK_HQ)
