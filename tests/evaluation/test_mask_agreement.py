import dataclasses
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError
from sisma_jax.evaluation import mask_agreement

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
    expected = np.zeros((len(target), NUM_CLASSES, NUM_CLASSES), np.int32)
    for index, true in np.ndenumerate(target):
        expected[index[0], true, predicted[index]] += 1
    actual = mask_agreement.confusion_matrices(predicted, target, CELEBAMASK_HQ)
    assert actual.dtype == np.int32
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
    assert mask_agreement.confusion_matrices(predicted, target, classes).sum() == 5
    agreement = mask_agreement.measure(predicted, target, classes)
    assert agreement.iou_per_class["background"] == pytest.approx(1 / 3)
    assert agreement.iou_per_class["skin"] == pytest.approx(2 / 4)
    assert agreement.pixel_accuracy == pytest.approx(3 / 5)
    assert math.isnan(mask_agreement.measure(predicted, np.full_like(target, 255), classes).pixel_accuracy)
    with pytest.raises(InputError, match="predicted: label 255"):
        mask_agreement.measure(target, target, classes)


def report(masks, predicted, classes=CELEBAMASK_HQ):
    """The agreement of samples in which a face parser sees `predicted`, beside perfect originals."""
    own = mask_agreement.confusion_matrices(predicted, masks, classes)
    original = mask_agreement.confusion_matrices(np.where(masks < len(classes), masks, 0), masks, classes)
    other = mask_agreement.confusion_matrices(predicted, np.roll(masks, -1, axis=0), classes)
    return {
        "num_images": len(masks),
        "samples": mask_agreement.scores(own, classes),
        "ceiling": mask_agreement.scores(original, classes),
        "floor": mask_agreement.scores(other, classes) if len(masks) > 1 else None,
    }


def test_scores_have_intervals_around_the_values_of_the_sum():
    generator = np.random.default_rng(0)
    target = generator.integers(0, 3, (40, 8, 8)).astype(np.uint8)
    predicted = np.where(generator.random(target.shape) < generator.random((40, 1, 1)), target, 0).astype(np.uint8)
    confusion = mask_agreement.confusion_matrices(predicted, target, CELEBAMASK_HQ)
    scores = mask_agreement.scores(confusion, CELEBAMASK_HQ)
    whole = mask_agreement.measure(predicted, target, CELEBAMASK_HQ)
    for name in ("miou", "pixel_accuracy"):
        score = scores[name]
        assert score["value"] == pytest.approx(getattr(whole, name))
        assert score["low"] < score["value"] < score["high"]
    nose = scores["iou_per_class"]["nose"]
    assert nose["value"] == pytest.approx(whole.iou_per_class["nose"])
    assert nose["low"] < nose["value"] < nose["high"]
    assert scores["iou_per_class"]["cloth"] is None


def test_no_pixels_have_no_scores_and_one_image_has_no_interval():
    empty = np.zeros((3, NUM_CLASSES, NUM_CLASSES), np.int32)
    assert mask_agreement.scores(empty, CELEBAMASK_HQ)["miou"] is None
    one = empty.copy()
    one[1, 0, 0], one[1, 1, 0] = 3, 1
    score = mask_agreement.scores(one, CELEBAMASK_HQ)["pixel_accuracy"]
    assert score == {"value": 0.75, "low": 0.75, "high": 0.75, "level": 0.0}


def test_a_report_of_other_classes_has_their_names():
    classes = ClassSet("Three", ("none", "a" * 40, "b"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), ignored=3)
    masks = np.arange(3, dtype=np.uint8).repeat(8).reshape(6, 2, 2)
    masks = np.where(masks == 2, 3, masks).astype(np.uint8)
    result = report(masks, np.where(masks == 3, 0, masks).astype(np.uint8), classes)
    values = {name: score and score["value"] for name, score in result["samples"]["iou_per_class"].items()}
    assert values == {"none": 1.0, "a" * 40: 1.0, "b": None}
    rows = [line for line in mask_agreement.format_report(result).splitlines() if line.startswith(classes.names)]
    assert len(rows) == 3
    assert len({len(row) for row in rows}) == 1


def test_a_single_image_has_no_floor():
    masks = np.ones((1, 4, 4), np.uint8)
    assert "others' masks" not in mask_agreement.format_report(report(masks, masks))


def test_the_table_is_aligned_and_says_what_it_is_worth():
    masks = np.random.default_rng(0).integers(0, 3, (4, 8, 8)).astype(np.uint8)
    result = report(masks, masks)
    text = mask_agreement.format_report(result)
    assert "only with those of the same parser" in text
    rows = [line for line in text.splitlines() if line.startswith(CELEBAMASK_HQ.names)]
    assert len(rows) == NUM_CLASSES
    assert len({len(row) for row in rows}) == 1
    assert rows[0].split() == [
        "background",
        "1.000",
        "1.000",
        f"{result['floor']['iou_per_class']['background']['value']:.3f}",
    ]
    assert rows[-1].split() == ["cloth", "-", "-", "-"]
