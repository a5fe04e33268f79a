import dataclasses
import json
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError
from sisma_jax.evaluation import mask_agreement
from sisma_jax.models.face_parser import FaceParser, make_graph

NUM_CLASSES = len(CELEBAMASK_HQ)


def label_maps(shape):
    # Few classes, so that some are shared, some are in one mask only, and most are absent.
    return hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, 13, NUM_CLASSES - 1]))


def test_scores_of_a_hand_computed_example():
    target = np.array([[[0, 0, 1, 1], [0, 0, 1, 1]]], np.uint8)
    predicted = np.array([[[0, 0, 0, 1], [0, 2, 1, 1]]], np.uint8)
    agreement = mask_agreement.measure(predicted, target, CELEBAMASK_HQ)
    # background: 3 correct of 4 true and 4 given; skin: 3 of 4 true and 3 given; nose: given once, never true.
    assert agreement.iou_per_class["background"] == pytest.approx(3 / 5)
    assert agreement.iou_per_class["skin"] == pytest.approx(3 / 4)
    assert math.isnan(agreement.iou_per_class["nose"])
    assert agreement.miou == pytest.approx((3 / 5 + 3 / 4) / 2)
    assert agreement.pixel_accuracy == pytest.approx(6 / 8)


@hypothesis.given(label_maps((2, 3, 4)), label_maps((2, 3, 4)))
def test_confusion_matrix_counts_every_pair_of_labels(predicted, target):
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for true, given in zip(target.ravel(), predicted.ravel(), strict=True):
        expected[true, given] += 1
    actual = mask_agreement.confusion_matrix(predicted, target, CELEBAMASK_HQ)
    assert actual.dtype == np.int64
    np.testing.assert_array_equal(actual, expected)


@hypothesis.given(label_maps((3, 2, 4)), label_maps((3, 2, 4)))
def test_scores_equal_those_of_sets_of_pixels(predicted, target):
    agreement = mask_agreement.measure(predicted, target, CELEBAMASK_HQ)
    ious = []
    for index, name in enumerate(CELEBAMASK_HQ.names):
        true = set(zip(*np.nonzero(target == index), strict=True))
        given = set(zip(*np.nonzero(predicted == index), strict=True))
        if true:
            ious.append(len(true & given) / len(true | given))
            assert agreement.iou_per_class[name] == pytest.approx(ious[-1])
        else:
            assert math.isnan(agreement.iou_per_class[name])
    assert agreement.miou == pytest.approx(np.mean(ious))
    assert agreement.pixel_accuracy == pytest.approx(np.mean(predicted == target))


def test_a_perfect_prediction_scores_one():
    target = np.random.default_rng(0).integers(0, NUM_CLASSES, (3, 32, 32)).astype(np.uint8)
    agreement = mask_agreement.measure(target, target, CELEBAMASK_HQ)
    assert agreement.miou == 1.0
    assert agreement.pixel_accuracy == 1.0
    assert set(agreement.iou_per_class.values()) == {1.0}


def test_confusion_matrices_of_batches_add_up_to_that_of_the_set():
    generator = np.random.default_rng(0)
    predicted, target = generator.integers(0, NUM_CLASSES, (2, 6, 8, 8)).astype(np.uint8)
    batches = zip(predicted.reshape(3, 2, 8, 8), target.reshape(3, 2, 8, 8), strict=True)
    added = sum(mask_agreement.confusion_matrix(*batch, CELEBAMASK_HQ) for batch in batches)
    np.testing.assert_array_equal(added, mask_agreement.confusion_matrix(predicted, target, CELEBAMASK_HQ))


def test_no_pixels_have_no_score():
    empty = np.zeros((0, 8, 8), np.uint8)
    agreement = mask_agreement.measure(empty, empty, CELEBAMASK_HQ)
    assert math.isnan(agreement.miou)
    assert math.isnan(agreement.pixel_accuracy)


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).*\(1, 2, 3\)"):
        mask_agreement.measure(np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 3), np.uint8), CELEBAMASK_HQ)


def test_a_label_outside_the_classes_is_refused():
    with pytest.raises(InputError, match="target: label 19"):
        mask_agreement.measure(np.zeros((1, 2, 2), np.uint8), np.full((1, 2, 2), NUM_CLASSES, np.uint8), CELEBAMASK_HQ)


def test_ignored_pixels_do_not_count():
    classes = dataclasses.replace(CELEBAMASK_HQ, ignored=255)
    target = np.array([[[0, 0, 255, 1], [1, 255, 255, 1]]], np.uint8)
    predicted = np.array([[[0, 1, 1, 1], [1, 0, 2, 0]]], np.uint8)
    assert mask_agreement.confusion_matrix(predicted, target, classes).sum() == 5
    agreement = mask_agreement.measure(predicted, target, classes)
    assert agreement.iou_per_class["background"] == pytest.approx(1 / 3)
    assert agreement.iou_per_class["skin"] == pytest.approx(2 / 4)
    assert agreement.pixel_accuracy == pytest.approx(3 / 5)
    assert math.isnan(mask_agreement.measure(predicted, np.full_like(target, 255), classes).pixel_accuracy)
    with pytest.raises(InputError, match="predicted: label 255"):
        mask_agreement.measure(target, target, classes)


def test_a_report_of_other_classes_has_their_names():
    classes = ClassSet("Three", ("none", "a" * 40, "b"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), ignored=3)
    masks = np.arange(3, dtype=np.uint8).repeat(8).reshape(6, 2, 2)
    report = mask_agreement.agreement_report(
        faces_with(masks),
        faces_with(masks),
        np.where(masks == 2, 3, masks),
        RedIsTheClass(make_graph(8, 3), {}, classes, 2),
    )
    assert report["samples"]["iou_per_class"] == {"none": 1.0, "a" * 40: 1.0, "b": None}
    text = mask_agreement.format_report(report)
    rows = [line for line in text.splitlines() if line.startswith(classes.names)]
    assert len(rows) == 3
    assert len({len(row) for row in rows}) == 1


@hypothesis.given(st.integers(2, 50), st.integers(0, 2**32 - 1))
def test_a_derangement_moves_every_element(size, seed):
    permutation = mask_agreement.derangement(size, seed)
    np.testing.assert_array_equal(np.sort(permutation), np.arange(size))
    assert (permutation != np.arange(size)).all()
    np.testing.assert_array_equal(permutation, mask_agreement.derangement(size, seed))


@pytest.mark.parametrize("size", [0, 1])
def test_fewer_than_two_elements_have_no_derangement(size):
    with pytest.raises(ValueError, match=f"size {size}"):
        mask_agreement.derangement(size, 0)


class RedIsTheClass(FaceParser):
    """Reads the class from the red channel, so that what is in an image is known."""

    def predict(self, images):
        return images[..., 0] % NUM_CLASSES


PARSER = RedIsTheClass(make_graph(8, NUM_CLASSES), {}, CELEBAMASK_HQ, 4)


def faces_with(masks):
    return np.repeat(masks[..., None], 3, axis=-1)


def test_the_report_holds_samples_between_ceiling_and_floor():
    # Image i is all of class i, so no two people's masks agree in a single pixel.
    masks = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None], (6, 4, 4)).copy()
    samples = faces_with(masks)
    samples[:, :1] = 18
    report = mask_agreement.agreement_report(samples, faces_with(masks), masks, PARSER, seed=3)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["num_images"] == 6
    assert report["ceiling"]["miou"] == report["ceiling"]["pixel_accuracy"] == 1.0
    assert report["samples"]["miou"] == report["samples"]["pixel_accuracy"] == 0.75
    assert report["floor"]["miou"] == report["floor"]["pixel_accuracy"] == 0.0
    assert report["samples"]["iou_per_class"]["skin"] == 0.75
    assert report["samples"]["iou_per_class"]["cloth"] is None


def test_a_single_image_has_no_floor():
    masks = np.ones((1, 4, 4), np.uint8)
    report = mask_agreement.agreement_report(faces_with(masks), faces_with(masks), masks, PARSER)
    assert report["floor"] is None
    assert "others' masks" not in mask_agreement.format_report(report)


def test_images_without_a_mask_are_refused():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="3, 3 and 2"):
        mask_agreement.agreement_report(images, images, np.zeros((2, 4, 4), np.uint8), PARSER)


def test_the_table_is_aligned_and_says_what_it_is_worth():
    masks = np.random.default_rng(0).integers(0, 3, (4, 8, 8)).astype(np.uint8)
    report = mask_agreement.agreement_report(faces_with(masks), faces_with(masks), masks, PARSER)
    text = mask_agreement.format_report(report)
    assert "only with those of the same parser" in text
    rows = [line for line in text.splitlines() if line.startswith(CELEBAMASK_HQ.names)]
    assert len(rows) == NUM_CLASSES
    assert len({len(row) for row in rows}) == 1
    assert rows[0].split() == ["background", "1.000", "1.000", f"{report['floor']['iou_per_class']['background']:.3f}"]
    assert rows[-1].split() == ["cloth", "-", "-", "-"]
