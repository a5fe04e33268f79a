import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.models import face_parser
from sisma_jax.models.face_parser import FaceParser, init_params, make_graph

WIDTH, SIZE = 8, 32


def make_parser(classes=CELEBAMASK_HQ, image_size=SIZE, seed=0):
    params = init_params(jax.random.key(seed), WIDTH, len(classes))
    return FaceParser(make_graph(WIDTH, len(classes)), params, classes, image_size)


def photos(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_parameters_are_a_pure_dict_of_float32_arrays():
    leaves = jax.tree_util.tree_leaves_with_path(make_parser().params)
    assert all(isinstance(key, jax.tree_util.DictKey) for path, _ in leaves for key in path)
    assert {leaf.dtype for _, leaf in leaves} == {np.dtype(np.float32)}


def test_a_label_depends_on_the_complete_face():
    parser = make_parser(image_size=128)
    network = face_parser.nnx.merge(parser.graph, jax.tree.map(lambda x: x + 0.01, parser.params))
    image = jax.random.uniform(jax.random.key(1), (1, 128, 128, 3), minval=-1)

    def corner(image):
        return network(image)[0, 0, 0].sum()

    reach = jnp.abs(jax.grad(corner)(image)).sum(axis=(0, 3))
    assert (reach > 0).mean() > 0.99


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 30), (1, 5)])
def test_the_network_takes_any_size(height, width):
    parser = make_parser()
    image = jnp.zeros((2, height, width, 3), jnp.float32)
    assert face_parser.nnx.merge(parser.graph, parser.params)(image).shape == (2, height, width, 19)


def test_a_mask_has_the_size_of_its_image_or_the_one_that_is_asked_for():
    parser = make_parser()
    assert parser.predict(photos(3)).shape == (3, SIZE, SIZE)
    assert parser.predict(photos(2, size=50)).shape == (2, 50, 50)
    assert parser.predict(photos(1, size=50), size=7).shape == (1, 7, 7)
    assert parser.predict(photos(3)).dtype == np.uint8


def test_labels_of_interpolated_logits_are_those_of_all_classes_at_once():
    logits = np.random.default_rng(0).normal(size=(8, 8, 5)).astype(np.float32)
    whole = face_parser.cv2.resize(logits, (24, 24), interpolation=face_parser.cv2.INTER_LINEAR)
    np.testing.assert_array_equal(face_parser._labels(logits, 24), whole.argmax(axis=-1))
    np.testing.assert_array_equal(face_parser._labels(logits, 8), logits.argmax(axis=-1))


def test_an_image_is_resized_to_the_size_that_the_parser_was_trained_for():
    parser = make_parser()
    images = photos(2)
    enlarged = images.repeat(4, axis=1).repeat(4, axis=2)  # averaging 4x4 equal pixels restores them
    np.testing.assert_array_equal(parser.predict(enlarged, size=SIZE), parser.predict(images))


def test_the_last_batch_may_be_smaller():
    parser, images = make_parser(), photos(7)
    together = parser.predict(images, batch_size=7)
    np.testing.assert_array_equal(parser.predict(images, batch_size=4), together)
    np.testing.assert_array_equal(parser.predict(images), together)


def test_no_images_have_no_masks():
    assert make_parser().predict(photos(0)).shape == (0, SIZE, SIZE)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 9, 3), np.uint8)]
)
def test_what_is_no_batch_of_square_images_is_refused(images):
    with pytest.raises(ValueError, match="images must be uint8"):
        make_parser().predict(images)


def test_another_class_set_has_its_own_number_of_classes():
    classes = ClassSet("Three", ("none", "red", "blue"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)))
    parser = make_parser(classes)
    assert parser.params["head"]["bias"].size == 3 * 2**2
    assert parser.predict(photos(4)).max() <= 2


def test_x64_does_not_change_it():
    parser, images = make_parser(), photos(2)
    masks = parser.predict(images)
    with jax.enable_x64(True):
        # An orthogonal or truncated draw may round its last bit differently where constants have 64 bits.
        chex.assert_trees_all_close(make_parser().params, parser.params, rtol=1e-6, atol=1e-7)
        assert (
            np.mean(dataclasses.replace(parser).predict(images) == masks) > 0.999
        )  # rounding decides between equal logits


def test_the_mask_of_a_mirror_image_is_the_flipped_mask():
    parser, images = make_parser(), photos(3)
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), parser.params)
    parser = dataclasses.replace(parser, params=params)
    flipped = parser.predict(np.ascontiguousarray(images[:, :, ::-1]))
    same = flipped == CELEBAMASK_HQ.flip(parser.predict(images))
    assert same.mean() > 0.999  # rounding decides between equal logits
