"""Masks in another order of classes are recognized by where their labels lie; unusual masks are not refused."""

import dataclasses
import logging

import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.errors import InputError
from tests.data import hand_drawn

MASKS = [draw_face((0, i), 64)[1] for i in range(160)]
HELD_OUT = [draw_face((1, i), 64)[1] for i in range(40)]
OTHERS = ("face_parsing_pytorch", "face_parsing_background_last", "lapa", "ibugmask")


@pytest.fixture(scope="module")
def prior():
    return LocationPrior.fit(MASKS, CELEBAMASK_HQ)


def in_order_of(mask: np.ndarray, other: ClassSet) -> np.ndarray:
    """The mask as a tool with these classes writes it; what it does not know is its background."""
    table = [other.index.get(name, other.index["background"]) for name in CELEBAMASK_HQ.names]
    return np.uint8(table)[mask]


def test_masks_of_the_data_set_pass_without_a_word(prior, caplog):
    for mask in HELD_OUT:
        prior.check(mask, CELEBAMASK_HQ, "mask")
    assert not caplog.text


@pytest.mark.parametrize("name", OTHERS)
def test_masks_in_another_order_are_refused_with_its_name(prior, name):
    other = ClassSet.load(name)
    for mask in HELD_OUT:
        found = prior.more_probable_order(in_order_of(mask, other), CELEBAMASK_HQ)
        # The classes of LaPa are the first eleven of iBugMask's, so both read such a mask alike.
        assert found == name or {found, name} == {"lapa", "ibugmask"}
    with pytest.raises(InputError, match=r"a\.png: its classes lie where those of .* would, .*`mask_classes`"):
        prior.check(in_order_of(HELD_OUT[0], other), CELEBAMASK_HQ, "a.png")


@pytest.mark.parametrize("name", OTHERS)
def test_a_named_order_gives_the_mask_back(name):
    other = ClassSet.load(name)
    known = np.isin(MASKS[0], [CELEBAMASK_HQ.index[class_name] for class_name in other.names])
    table = other.table_to(CELEBAMASK_HQ)
    np.testing.assert_array_equal(table[in_order_of(MASKS[0], other)], np.where(known, MASKS[0], 0))


def test_extreme_masks_are_not_refused(prior):
    """Empty ones, one class alone, a face at the edge: a drawing may be anything."""
    skin = np.where(HELD_OUT[0] == CELEBAMASK_HQ.index["skin"], HELD_OUT[0], 0)
    shifted = np.roll(HELD_OUT[0], 24, axis=1)
    shifted[:, :24] = 0
    for mask in (np.zeros((64, 64), np.uint8), skin, shifted, HELD_OUT[0][:, ::-1]):
        prior.check(np.ascontiguousarray(mask), CELEBAMASK_HQ, "mask")


def test_an_unusual_mask_is_warned_of_and_a_named_one_never_refused(prior, caplog):
    lip = np.full((64, 64), CELEBAMASK_HQ.index["u_lip"], np.uint8)
    prior.check(lip, CELEBAMASK_HQ, "mask", named=CELEBAMASK_HQ)
    assert "mask: its classes lie where they hardly ever do in the training masks" in caplog.text
    prior.check(in_order_of(HELD_OUT[0], ClassSet.load("lapa")), CELEBAMASK_HQ, "mask", named=CELEBAMASK_HQ)


def test_the_prior_comes_back_from_its_file(prior, tmp_path):
    prior.save(tmp_path / "prior.npz")
    loaded = LocationPrior.load(tmp_path / "prior.npz")
    np.testing.assert_array_equal(loaded.log_probabilities, prior.log_probabilities)
    assert loaded.usual_score == prior.usual_score
    (tmp_path / "prior.npz").write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match=r"prior\.npz is damaged"):
        LocationPrior.load(tmp_path / "prior.npz")


def test_ignored_pixels_do_not_count(prior):
    classes = dataclasses.replace(CELEBAMASK_HQ, ignored=255)
    mask = HELD_OUT[0].copy()
    mask[:8] = 255
    assert np.isfinite(prior.score(mask))
    prior.check(mask, classes, "mask")


@pytest.mark.parametrize("mask", HELD_OUT[:8])
def test_exchanged_sides_are_noticed_and_those_of_another_tool_are_put_right(prior, mask, caplog):
    assert not prior.has_exchanged_sides(mask, CELEBAMASK_HQ)
    exchanged = CELEBAMASK_HQ.exchange_sides(mask)
    lapa = ClassSet.load("lapa")
    np.testing.assert_array_equal(prior.check(exchanged, CELEBAMASK_HQ, "mask", named=lapa), mask)
    np.testing.assert_array_equal(prior.check(mask, CELEBAMASK_HQ, "mask", named=lapa), mask)
    assert all(record.levelno < logging.WARNING for record in caplog.records)  # the exchange is told, not warned of
    np.testing.assert_array_equal(prior.check(exchanged, CELEBAMASK_HQ, "mask"), exchanged)
    assert "mask: its left parts lie where right ones do" in caplog.text


def test_a_mask_without_sides_has_none_exchanged(prior):
    skin = np.where(HELD_OUT[0] == CELEBAMASK_HQ.index["skin"], HELD_OUT[0], 0)
    assert not prior.has_exchanged_sides(skin, CELEBAMASK_HQ)


def test_masks_that_are_drawn_by_hand_are_not_refused(prior):
    refused = [seed for seed in range(200) if prior.more_probable_order(hand_drawn.draw(seed), CELEBAMASK_HQ)]
    exchanged = [seed for seed in range(200) if prior.has_exchanged_sides(hand_drawn.draw(seed), CELEBAMASK_HQ)]
    assert not refused
    assert not exchanged
