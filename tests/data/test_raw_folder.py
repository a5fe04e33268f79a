"""Folders of other data sets: names that are no numbers, classes of their own, images of any size."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from sisma_jax.data import celebamask_hq, masks, photos, shards
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.dataset import DataSet
from sisma_jax.data.raw_folder import list_raw_folder
from sisma_jax.errors import InputError
from tests.data.encoded import png_that_declares
from tests.data.raw_layout import random_image, random_mask, write_label_maps, write_official, write_png
from tests.data.test_celebamask_hq import config

LAPA = ClassSet.load("lapa")
# As in LaPa: the number of a photograph on Flickr, and that of a face in it.
LAPA_NAMES = ("10007657274_0", "10009865324_1", "10009865324_0", "218823411_0", "9990331_12")
TOO_LONG = "12345678901234567890"  # more than int64 holds


def write_named(root: Path, names, classes: ClassSet = CELEBAMASK_HQ, size: int = 16) -> dict[str, np.ndarray]:
    """Writes images/<name>.jpg and labels/<name>.png, and returns the masks by name."""
    label_maps = {name: random_mask(seed, size, classes) for seed, name in enumerate(names)}
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for seed, (name, mask) in enumerate(label_maps.items()):
        # OpenCV does not write to names that are no UTF-8.
        (root / "images" / f"{name}.jpg").write_bytes(photos.encode_jpeg(random_image(seed, size)))
        (root / "labels" / f"{name}.png").write_bytes(photos.encode_png(mask))
    return label_maps


def ids(root: Path) -> dict[str, int]:
    return {Path(face.image).name: face.id for face in list_raw_folder(root, CELEBAMASK_HQ).faces}


def test_names_of_lapa_get_ids_in_their_order_and_go_through_to_batches(tmp_path):
    data = config(tmp_path, classes=LAPA)
    label_maps = write_named(Path(data.root), LAPA_NAMES, LAPA)
    prepared = DataSet.prepare(data)
    assert prepared.counts == {"train": 3, "test": 2}
    in_order = sorted(LAPA_NAMES)
    (train,) = prepared.eval_batches("train", 5)
    (test,) = prepared.eval_batches("test", 5)
    assert train["id"].tolist() + test["id"].tolist() == [0, 1, 2, 3, 4]
    for name, mask in zip(in_order, np.concatenate([train["mask"], test["mask"]]), strict=True):
        np.testing.assert_array_equal(mask, label_maps[name])
    rows = (prepared.path / celebamask_hq.IDS_FILE).read_text().splitlines()
    assert rows == [f"{id}\timages/{name}.jpg" for id, name in enumerate(in_order)]
    batch = next(prepared.train_batches(8, seed=0))
    for id, mask in zip(batch["id"], batch["mask"], strict=True):
        label_map = label_maps[in_order[id]]
        assert (mask == label_map).all() or (mask == LAPA.flip(label_map)).all()


def test_ids_do_not_depend_on_the_order_in_which_the_disk_lists_files(tmp_path, monkeypatch):
    write_named(tmp_path, LAPA_NAMES)
    in_order = ids(tmp_path)
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self._entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self._entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert ids(tmp_path) == in_order


def test_names_that_are_numbers_stay_ids(tmp_path):
    write_named(tmp_path, ["00012", "7", str(2**63 - 1)])
    assert ids(tmp_path) == {"7.jpg": 7, "00012.jpg": 12, f"{2**63 - 1}.jpg": 2**63 - 1}
    assert list_raw_folder(tmp_path, CELEBAMASK_HQ).is_numbered


def test_a_number_that_is_too_long_for_an_id_is_a_name(tmp_path):
    data = config(tmp_path, num_test=1)
    write_named(Path(data.root), [TOO_LONG, "99", "00100"])
    assert ids(Path(data.root)) == {"99.jpg": 0, "00100.jpg": 1, f"{TOO_LONG}.jpg": 2}
    (test,) = DataSet.prepare(data).eval_batches("test", 4)
    assert test["id"].tolist() == [2]


def test_numbers_come_before_other_names(tmp_path):
    write_named(tmp_path, ["face", "10", "9", "Face"])
    assert ids(tmp_path) == {"9.jpg": 0, "10.jpg": 1, "Face.jpg": 2, "face.jpg": 3}


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".JPG"])
def test_images_have_any_of_three_suffixes(tmp_path, suffix):
    write_named(tmp_path, ["a", "b"])
    (tmp_path / "images/b.jpg").unlink()
    encoded = cv2.imencode(suffix.lower(), random_image(0, 16))[1].tobytes()
    (tmp_path / f"images/b{suffix}").write_bytes(encoded)
    assert ids(tmp_path) == {"a.jpg": 0, f"b{suffix}": 1}


def test_a_name_with_two_suffixes_is_refused(tmp_path):
    write_named(tmp_path, LAPA_NAMES)
    write_png(tmp_path / "images/9990331_12.png", random_image(0, 16))
    with pytest.raises(InputError, match=r"9990331_12.* and .*9990331_12.* are of the same face; keep one of them"):
        list_raw_folder(tmp_path, CELEBAMASK_HQ)


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    name = os.fsdecode(b"Ren\xe9e")
    data = config(tmp_path, num_test=1)
    write_named(Path(data.root), ["a", "b", name])
    rows = (DataSet.prepare(data).path / celebamask_hq.IDS_FILE).read_bytes()
    assert rows == b"0\timages/Ren\xe9e.jpg\n1\timages/a.jpg\n2\timages/b.jpg\n"


@pytest.mark.parametrize("name", ["218823411_0", os.fsdecode(b"Ren\xe9e")])
def test_errors_name_the_file_of_a_face(tmp_path, name):
    data = config(tmp_path, num_test=4)
    root = Path(data.root)
    write_named(root, [*LAPA_NAMES, "a", "b", name])
    (root / "labels" / f"{name}.png").write_bytes(photos.encode_png(np.full((16, 16), 23, np.uint8)))
    with pytest.raises(InputError, match=r"1 examples are damaged or incomplete:\n .*: label 23 is outside") as refused:
        DataSet.prepare(data)
    assert f"labels/{name}.png: label 23" in str(refused.value)
    (root / "labels/10009865324_1.png").unlink()
    with pytest.raises(InputError, match=r"labels has no mask for these files of .*images: 1 \(10009865324_1.jpg\)"):
        DataSet.prepare(data)
    write_png(root / "labels/10009865324_1.png", random_mask(0, 16))
    (root / "images/9990331_12.jpg").unlink()
    with pytest.raises(InputError, match=r"images has no image for these files of .*labels: 1 \(9990331_12.png\)"):
        DataSet.prepare(data)
    skipping = DataSet.prepare(config(tmp_path, num_test=4, skip_damaged=True))
    skipped = os.fsdecode((skipping.path / shards.SKIPPED_NAME).read_bytes())
    assert f"labels/{name}.png: label 23" in skipped
    assert "images has no image for 9990331_12.png." in skipped
    # The ids of the others are those that they have in the complete folder.
    in_order = sorted({*LAPA_NAMES, "a", "b", name})
    left = [in_order.index(stem) for stem in in_order if stem not in (name, "9990331_12")]
    batches = [batch for split in ("train", "test") for batch in skipping.eval_batches(split, 8)]
    assert np.concatenate([batch["id"] for batch in batches]).tolist() == left


def test_a_split_by_celeba_needs_names_that_are_its_ids(tmp_path):
    write_named(tmp_path / "raw", LAPA_NAMES)
    with pytest.raises(InputError, match=r"data.split celeba: not all files of .*raw are named by ids .*by_id"):
        celebamask_hq.recipe(config(tmp_path, split="celeba"))


def test_classes_of_the_folder_must_be_given(tmp_path):
    root = tmp_path / "raw"
    write_named(root, LAPA_NAMES, LAPA)
    values = {"title": "LaPa", "names": LAPA.names, "colors": LAPA.colors, "mirrored": LAPA.mirrored}
    (root / "classes.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"raw/classes.json describes other classes .* give data.classes=.*/classes.j"):
        celebamask_hq.recipe(config(tmp_path))
    own = ClassSet.load(root / "classes.json")
    assert DataSet.prepare(config(tmp_path, classes=own)).counts == {"train": 3, "test": 2}


def test_a_file_of_the_default_classes_changes_nothing(tmp_path):
    root = tmp_path / "raw"
    write_label_maps(root, range(5))
    values = {"title": "Mine", "names": CELEBAMASK_HQ.names, "colors": CELEBAMASK_HQ.colors}
    (root / "classes.json").write_text(json.dumps(values | {"mirrored": CELEBAMASK_HQ.mirrored}))
    assert DataSet.prepare(config(tmp_path)).counts == {"train": 3, "test": 2}
    (root / "classes.json").write_text(json.dumps(values))  # without mirrored pairs, flips would be others
    with pytest.raises(InputError, match=r"describes other classes than data\.classes"):
        celebamask_hq.recipe(config(tmp_path))
    (root / "classes.json").write_text("[1]")
    with pytest.raises(InputError, match=r"classes\.json: a class set is a JSON object with title, names"):
        celebamask_hq.recipe(config(tmp_path))


def test_a_folder_above_a_split_is_refused_with_a_hint(tmp_path):
    write_named(tmp_path / "raw/train", LAPA_NAMES)
    with pytest.raises(InputError, match=r"no images and no labels folder. Did you mean .*raw/train\?"):
        celebamask_hq.recipe(config(tmp_path))


def test_only_the_official_layout_has_the_terms_of_its_download(tmp_path):
    write_named(tmp_path / "raw", LAPA_NAMES)
    write_official(tmp_path / "official", range(3))
    own = celebamask_hq.recipe(config(tmp_path)).information
    official = celebamask_hq.recipe(config(tmp_path, root=str(tmp_path / "official"))).information
    assert "homepage" not in own
    assert own["license"].startswith("That of the raw files")
    assert official["license"].startswith("Non-commercial research only")


@pytest.mark.parametrize("path", ["images/face_0.png", "labels/face_0.png"])
def test_an_image_that_training_would_not_read_is_refused_by_prepare(tmp_path, path):
    data = config(tmp_path)
    write_named(Path(data.root), ["face_1", "face_2", "face_3"])
    write_named(Path(data.root), ["face_0"])
    if path.startswith("images"):
        (Path(data.root) / "images/face_0.jpg").unlink()
    color_type = 2 if path.startswith("images") else 0
    (Path(data.root) / path).write_bytes(png_that_declares(13_500, 13_500, color_type))
    message = (
        r"face_0.png is 13500x13500 pixels, and the limit is 178,956,970 pixels; shrink it, or give data.stored_size"
    )
    with pytest.raises(InputError, match=message):
        DataSet.prepare(data)


def test_a_stored_size_reduces_images_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "MAX_PIXELS", 40 * 40)
    root = tmp_path / "raw"
    label_maps = write_named(root, ["small", "large", "other"], size=16)
    label_maps |= write_named(root, ["large"], size=48)
    narrow = np.zeros((20, 100), np.uint8)  # too many pixels, although the shorter side is below stored_size
    narrow[:, 40:60] = 3
    write_png(root / "images/narrow.png", np.repeat(narrow[..., None], 3, -1))
    write_png(root / "labels/narrow.png", narrow)
    with pytest.raises(InputError, match=r"(?s)2 examples are damaged.*large.jpg is 48x48.*narrow.png is 100x20"):
        DataSet.prepare(config(tmp_path))
    prepared = DataSet.prepare(config(tmp_path, stored_size=24, num_test=3))
    (batch,) = prepared.eval_batches("test", 3)  # narrow, other, small
    assert (batch["mask"][0] == 3).all()
    (batch,) = prepared.eval_batches("train", 3)
    stored = masks.resize_mask(label_maps["large"], 24)
    np.testing.assert_array_equal(batch["mask"][0], masks.resize_mask(stored, 16))


@pytest.mark.slow
def test_a_real_image_of_too_many_pixels_is_refused_or_reduced(tmp_path):
    root = tmp_path / "raw"
    write_named(root, ["a", "b"], size=64)
    write_png(root / "images/huge.jpg", np.full((13_500, 13_500), 128, np.uint8))
    write_png(root / "labels/huge.png", np.full((64, 64), 1, np.uint8))
    with pytest.raises(InputError, match=r"huge.jpg is 13500x13500 pixels, and the limit is 178,956,970 pixels"):
        DataSet.prepare(config(tmp_path, num_test=1))
    (batch,) = DataSet.prepare(config(tmp_path, num_test=1, stored_size=64)).eval_batches("test", 1)
    np.testing.assert_allclose(batch["image"], 128, atol=1)  # what JPEG keeps of grey
