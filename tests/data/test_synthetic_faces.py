import dataclasses
import sys

import cv2
import numpy as np
import pytest

from sisma_jax.config import DataConfig
from sisma_jax.data import shards, synthetic_faces
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.drawing import draw_face

SIZE = 64


@pytest.fixture(scope="module")
def faces() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_face((7, index), SIZE) for index in range(300)]


def majority_of_blocks(mask: np.ndarray) -> np.ndarray:
    """The most frequent class in each block of 2 × 2 pixels."""
    one_hot = np.eye(len(CELEBAMASK_HQ), dtype=int)[mask]
    return (one_hot[::2, ::2] + one_hot[1::2, ::2] + one_hot[::2, 1::2] + one_hot[1::2, 1::2]).argmax(-1)


def explained_variance(image: np.ndarray, mask: np.ndarray) -> float:
    """Share of an image's variance that the mean colours of the mask's classes account for."""
    pixels = image.reshape(-1, 3).astype(float)
    residual = pixels.copy()
    for index in np.unique(mask):
        inside = mask.ravel() == index
        residual[inside] -= pixels[inside].mean(0)
    return 1 - residual.var() / (pixels - pixels.mean(0)).var()


def test_a_seed_gives_the_same_face_again(faces):
    for index in (0, 1, 299):
        image, mask = draw_face((7, index), SIZE)
        np.testing.assert_array_equal(image, faces[index][0])
        np.testing.assert_array_equal(mask, faces[index][1])


def test_seeds_and_ids_give_different_faces(faces):
    assert len({image.tobytes() for image, _ in faces}) == len(faces)
    assert not np.array_equal(draw_face((8, 0), SIZE)[0], faces[0][0])


@pytest.mark.parametrize("size", [8, 50, 256])
def test_images_and_masks_have_the_size_asked_for(size):
    image, mask = draw_face((7, 0), size)
    assert image.shape == (size, size, 3)
    assert mask.shape == (size, size)
    assert image.dtype == mask.dtype == np.uint8
    CELEBAMASK_HQ.check(mask, "drawn")


def test_every_class_is_drawn(faces):
    assert set(np.unique([mask for _, mask in faces])) == set(range(len(CELEBAMASK_HQ)))


def test_every_face_shows_its_inner_parts(faces):
    for _, mask in faces:
        assert {CELEBAMASK_HQ.index[name] for name in ("background", "skin", "nose", "u_lip", "l_lip")} <= set(
            np.unique(mask)
        )


def test_sides_are_the_subjects_own(faces):
    for left, right in CELEBAMASK_HQ.mirrored:
        seen = 0
        for _, mask in faces:
            columns = [np.flatnonzero((mask == CELEBAMASK_HQ.index[name]).any(0)) for name in (left, right)]
            if all(map(len, columns)):
                seen += 1
                assert columns[0].mean() > columns[1].mean()
        assert seen > 50


def test_parts_lie_as_in_celebamask_hq(faces):
    # Mean centres (x, y) and shares of the area over 3,000 label maps of the data set.
    for name, x, y, area in [
        ("l_eye", 0.616, 0.474, 0.0023),
        ("r_eye", 0.375, 0.474, 0.0023),
        ("nose", 0.494, 0.573, 0.0207),
        ("l_lip", 0.495, 0.764, 0.0068),
        ("skin", 0.500, 0.550, 0.2542),
    ]:
        _, rows, columns = np.nonzero(np.stack([mask for _, mask in faces]) == CELEBAMASK_HQ.index[name])
        assert columns.mean() / SIZE == pytest.approx(x, abs=0.02)
        assert rows.mean() / SIZE == pytest.approx(y, abs=0.02)
        assert len(rows) / (len(faces) * SIZE**2) == pytest.approx(area, rel=0.25)


def test_another_resolution_shows_the_same_face(faces):
    for index in range(20):
        image, mask = draw_face((7, index), 2 * SIZE)
        assert (majority_of_blocks(mask) == faces[index][1]).mean() > 0.97
        small = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        # Only edges differ, by what box filters of two sizes make of them.
        assert np.abs(small.astype(float) - faces[index][0]).mean() < 3


def test_the_mask_fits_the_image(faces):
    shares = [explained_variance(image, mask) for image, mask in faces]
    assert np.mean(shares) > 0.6
    shifts = [np.roll(mask, shift, axis) for _, mask in faces for shift in (-4, 4) for axis in (0, 1)]
    moved = [explained_variance(image, shifts[4 * i + j]) for i, (image, _) in enumerate(faces) for j in range(4)]
    assert (np.repeat(shares, 4) > moved).mean() > 0.99


def test_small_parts_differ_from_the_skin_around_them(faces):
    for name in ("l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip"):
        distances = [
            np.abs(
                image[mask == CELEBAMASK_HQ.index[name]].mean(0) - image[mask == CELEBAMASK_HQ.index["skin"]].mean(0)
            ).max()
            for image, mask in faces
            if (mask == CELEBAMASK_HQ.index[name]).sum() > 3
        ]
        assert np.median(distances) > 20


def test_shards_keep_masks_exact_without_tensorflow(tmp_path):
    config = DataConfig(cache_dir=str(tmp_path), image_size=32, num_train=5, num_test=3)
    builder = shards.read(DataSet.prepare(config).path)
    train, test = (list(builder.as_data_source(split)) for split in ("train", "test"))
    assert "tensorflow" not in sys.modules
    assert [record["id"] for record in train + test] == list(range(8))
    for record in train + test:
        image, mask = draw_face((synthetic_faces.SEED, int(record["id"])), 32)
        np.testing.assert_array_equal(record["image"], image)
        np.testing.assert_array_equal(record["mask"][..., 0], mask)


def test_each_selection_has_a_name_of_its_own():
    config = DataConfig()
    changes = [{}, {"image_size": 128}, {"num_train": 5}, {"num_test": 5}]
    variants = {synthetic_faces.recipe(dataclasses.replace(config, **change)).variant for change in changes}
    assert len(variants) == len(changes)
    assert f"size64_train{config.num_train}_test{config.num_test}_seed0" in variants
