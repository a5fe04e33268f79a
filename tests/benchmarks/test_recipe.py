"""The comparison of training recipes: its configurations, and what it measures."""

import numpy as np
import pytest

from benchmarks import recipe


@pytest.mark.parametrize("base", ["demo", "celebamask_sample"])
def test_every_variant_differs_from_the_base(base, tmp_path):
    variants = [recipe.configured(base, options, 100, 3, "", tmp_path) for options in recipe.VARIANTS.values()]
    assert len(set(map(repr, variants))) == len(variants)
    plain = variants[0]
    assert (plain.optim.name, plain.flow.objective) == ("adamw", "flow_matching")
    assert (plain.train.num_steps, plain.train.seed) == (100, 3)
    assert not plain.model.region_pooling
    assert variants[-1].model.region_pooling


def test_tones_are_the_difference_between_left_and_right():
    masks = np.full((1, 8, 8), recipe.HAIR, np.uint8)
    masks[:, 2:6] = recipe.SKIN
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[masks == recipe.SKIN] = 100
    assert recipe.tone_difference(image, masks) == 0
    image[:, :, 4:][masks[:, :, 4:] == recipe.HAIR] = 30  # hair left and right of the face
    assert recipe.tone_difference(image, masks) == pytest.approx((0 + 30) / 2)
