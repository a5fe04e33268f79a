"""Which masks a path names, what they are called, and what is left out."""

import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.mask_files import find_masks
from sisma_jax.data.photos import encode_png
from sisma_jax.errors import InputError
from tests.data.raw_layout import random_mask


def test_a_file_is_one_mask(tmp_path, monkeypatch):
    mask = random_mask(0, 8)
    (tmp_path / "b.png").write_bytes(encode_png(mask))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / "b.png", "~/b.png"):
        (found,) = find_masks(path, CELEBAMASK_HQ)
        assert found.name == "b"
        np.testing.assert_array_equal(found.read(CELEBAMASK_HQ), mask)


def test_a_folder_is_its_masks_by_name_and_what_is_left_out_is_said(tmp_path, caplog):
    for name in ("b.png", "a.tif", "c.webp", "d.JPG", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    assert [mask.name for mask in find_masks(tmp_path, CELEBAMASK_HQ)] == ["a", "b", "c", "d"]
    assert f"{tmp_path}: 2 entries are left out, which are no mask files: notes.txt, sub." in caplog.text


def test_names_that_differ_in_case_or_kind_alone_stay_apart(tmp_path):
    for name in ("face.png", "face.PNG", "face.tif", "Face-2.png"):
        (tmp_path / name).touch()
    names = [mask.name for mask in find_masks(tmp_path, CELEBAMASK_HQ)]
    assert len({name.casefold() for name in names}) == 4
    assert "face" in names


def test_part_files_are_one_mask_per_face(tmp_path):
    hair, hat = np.zeros((2, 4, 4), np.uint8)
    hair[:2], hat[1:] = 255, 255
    (tmp_path / "00012_hat.png").write_bytes(encode_png(hat))
    (tmp_path / "00012_hair.png").write_bytes(encode_png(hair))
    (tmp_path / "7_hair.png").write_bytes(encode_png(hair))
    first, second = find_masks(tmp_path, CELEBAMASK_HQ)
    assert (first.name, second.name) == ("00012", "7")
    index = CELEBAMASK_HQ.index
    rows = [index["hair"], index["hat"], index["hat"], index["hat"]]  # the hat covers the hair
    np.testing.assert_array_equal(first.read(CELEBAMASK_HQ), np.repeat(np.uint8(rows)[:, None], 4, 1))
    assert (second.read(CELEBAMASK_HQ) == index["hair"]).sum() == 8


def test_part_files_beside_other_masks_are_masks_of_their_own(tmp_path):
    for name in ("00012_hair.png", "mine.png"):
        (tmp_path / name).touch()
    assert [mask.name for mask in find_masks(tmp_path, CELEBAMASK_HQ)] == ["00012_hair", "mine"]


def test_a_folder_without_masks_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no mask \(\.png"):
        find_masks(tmp_path, CELEBAMASK_HQ)
    with pytest.raises(InputError, match=r"absent does not exist"):
        find_masks(tmp_path / "absent", CELEBAMASK_HQ)
