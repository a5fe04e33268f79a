"""Fields to calls of the pipeline. Without a server."""

import numpy as np
import pytest

import sisma_jax
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.errors import InputError
from sisma_jax.serving.calls import OWN_CLASSES, Calls
from sisma_jax.serving.limits import Limits


@pytest.fixture(scope="module")
def calls(weights):
    pipe = sisma_jax.load(weights)
    pipe.mask_prior = LocationPrior.fit([draw_face((0, i), 32)[1] for i in range(16)], CELEBAMASK_HQ)
    return Calls(pipe, Limits())


def in_other_order(mask):
    other = ClassSet.load("face_parsing_pytorch")
    return np.array([other.names.index(name) for name in CELEBAMASK_HQ.names], np.uint8)[mask]


def test_a_mask_that_looks_like_another_order_is_refused_unless_its_classes_are_named(calls):
    mask = in_other_order(draw_face((0, 3), 16)[1])
    with pytest.raises(InputError, match="mask: its classes lie where those of"):
        calls.sample({"mask": mask.tolist()})
    assert OWN_CLASSES in calls.class_sets
    call = calls.sample({"mask": mask.tolist(), "classes": OWN_CLASSES})
    np.testing.assert_array_equal(call.faces.masks[0], mask)


def test_a_mask_in_another_order_is_converted(calls):
    mask = draw_face((0, 3), 16)[1]
    call = calls.sample({"mask": in_other_order(mask).tolist(), "classes": "face_parsing_pytorch"})
    np.testing.assert_array_equal(call.faces.masks[0], mask)
