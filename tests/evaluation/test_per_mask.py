"""Terms per mask are those of single images, in any chunks, and are read again from the cache."""

import dataclasses

import jax
import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face
from sisma_jax.errors import InputError
from sisma_jax.evaluation import chunk_cache, mask_agreement, per_mask
from sisma_jax.evaluation.image_sets import ArrayImages, cyclic_masks
from sisma_jax.evaluation.networks import lpips_from_weights
from sisma_jax.models.face_parser import FaceParser, init_params, make_graph
from tests.evaluation.test_lpips import weights

FACES = [draw_face((0, i), 32) for i in range(7)]
IMAGES = ArrayImages(np.stack([image for image, _ in FACES]), "faces")


@dataclasses.dataclass(frozen=True)
class ArrayMasks:
    array: np.ndarray
    fingerprint: str = "masks"

    def __len__(self):
        return len(self.array)

    def masks(self, start, stop):
        return iter(self.array[start:stop])


MASKS = ArrayMasks(np.stack([mask for _, mask in FACES]))


@pytest.fixture(scope="module")
def parser():
    classes = CELEBAMASK_HQ
    params = init_params(jax.random.key(0), 8, len(classes))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    return FaceParser(make_graph(8, len(classes)), params, classes, 32)


@pytest.fixture(scope="module")
def lpips():
    return lpips_from_weights(weights("alex"), "random", network="alex")


def test_agreement_is_that_of_each_image_with_its_own_and_with_the_next_mask(parser, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_cache, "IMAGES_PER_CHUNK", 3)
    terms = per_mask.agreement_terms(parser, IMAGES, MASKS, cache=tmp_path)
    predicted = parser.predict(IMAGES.array)
    for name, targets in (("own", MASKS.array), ("other", np.roll(MASKS.array, -1, axis=0))):
        expected = mask_agreement.confusion_matrices(predicted, targets, CELEBAMASK_HQ)
        np.testing.assert_array_equal(terms[name], expected)
    assert len(list(tmp_path.iterdir())) == 3

    def refuse(*arguments, **options):
        raise AssertionError("the cache holds these terms")

    monkeypatch.setattr(FaceParser, "predict", refuse)
    again = per_mask.agreement_terms(parser, IMAGES, MASKS, cache=tmp_path)
    np.testing.assert_array_equal(again["own"], terms["own"])


def test_masks_that_are_not_square_are_refused(parser):
    with pytest.raises(InputError, match="32 x 20; masks must be square"):
        per_mask.agreement_terms(parser, IMAGES, ArrayMasks(MASKS.array[:, :, :20]), cache=None)


@pytest.mark.parametrize(("start", "count"), [(0, 7), (3, 7), (6, 2), (7, 3), (8, 1), (2, 0)])
def test_masks_begin_again_after_the_last(start, count):
    expected = np.roll(MASKS.array, -start, axis=0)[:count]
    np.testing.assert_array_equal(np.array(list(cyclic_masks(MASKS, start, count))).reshape(expected.shape), expected)


def test_diversity_is_the_mean_over_all_pairs(lpips, monkeypatch):
    monkeypatch.setattr(chunk_cache, "IMAGES_PER_CHUNK", 2)
    sets = [ArrayImages(np.roll(IMAGES.array, shift, axis=0), str(shift)) for shift in range(3)]
    terms = per_mask.diversity_terms(sets, 5, lpips, cache=None)
    assert {name: values.shape for name, values in terms.items()} == {"pixel_diversity": (5,), "lpips_diversity": (5,)}
    for mask in range(5):
        faces = np.stack([one.array[mask] for one in sets])
        pairs = [(0, 1), (0, 2), (1, 2)]
        compared = lpips.compare(faces[[i for i, _ in pairs]], faces[[j for _, j in pairs]], batch_size=3)
        assert terms["lpips_diversity"][mask] == pytest.approx(compared.mean(), rel=1e-4)
        squares = [np.mean((faces[i] / 255.0 - faces[j] / 255.0) ** 2) for i, j in pairs]
        assert terms["pixel_diversity"][mask] == pytest.approx(np.mean(np.sqrt(squares)), rel=1e-6)


def test_a_model_that_repeats_itself_has_no_diversity(lpips):
    terms = per_mask.diversity_terms([IMAGES] * 2, 3, lpips, cache=None)
    np.testing.assert_array_equal(terms["pixel_diversity"], 0)
    np.testing.assert_allclose(terms["lpips_diversity"], 0, atol=1e-6)
    with pytest.raises(InputError, match="at least 2 samples per mask, got 1"):
        per_mask.diversity_terms([IMAGES], 3, lpips, cache=None)


def test_lpips_of_pairs_is_that_of_the_arrays(lpips, tmp_path, monkeypatch):
    monkeypatch.setattr(per_mask, "_BATCH_SIZE", 7)
    others = ArrayImages(IMAGES.array[::-1].copy(), "others")
    terms = per_mask.lpips_terms(lpips, IMAGES, others, cache=tmp_path)
    np.testing.assert_allclose(terms, lpips.compare(IMAGES.array, others.array, batch_size=7), rtol=1e-5)
    assert terms[3] == pytest.approx(0, abs=1e-6)  # the middle one is its own counterpart
