import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sisma_jax.config import DataConfig
from sisma_jax.data import celebamask_hq, masks, photos, shards
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.dataset import DataSet
from sisma_jax.errors import InputError
from tests.data.raw_layout import official_mask, part_file, random_mask, write_label_maps, write_official, write_png

SAMPLE = Path(__file__).parents[2] / ".." / "shared" / "celebamask_sample"


def config(tmp_path: Path, **fields) -> DataConfig:
    defaults = {
        "name": "celebamask_hq",
        "root": str(tmp_path / "raw"),
        "cache_dir": str(tmp_path / "cache"),
        "num_test": 2,
        "image_size": 16,
    }
    return DataConfig(**(defaults | fields))


def records(data: DataConfig, split: str) -> list[dict]:
    skip = {key: tfds.decode.SkipDecoding() for key in ("image", "mask")}
    return list(shards.read(DataSet.open(data).path).as_data_source(split, decoders=skip))


def write_mapping(root: Path, original: dict[int, int], header: bool = False) -> None:
    rows = ["idx         orig_idx    orig_file"] if header else []
    rows += [f"{id:<11} {index:<11} {index + 1:06d}.jpg" for id, index in original.items()]
    (root / celebamask_hq.MAPPING_FILE).write_text("\n".join(rows) + "\n")


def test_label_maps_are_read_with_the_image_bytes_unchanged(tmp_path):
    data = config(tmp_path)
    label_maps = write_label_maps(Path(data.root), range(5))
    DataSet.prepare(data)
    train, test = records(data, "train"), records(data, "test")
    assert [record["id"] for record in train] == [0, 1, 2]
    assert [record["id"] for record in test] == [3, 4]
    for record in train + test:
        assert record["image"] == (Path(data.root) / "images" / f"{record['id']}.jpg").read_bytes()
        np.testing.assert_array_equal(masks.decode_mask(record["mask"], "x", CELEBAMASK_HQ), label_maps[record["id"]])
    assert "tensorflow" not in sys.modules


def test_png_images_are_read(tmp_path):
    data = config(tmp_path, num_test=1)
    write_label_maps(Path(data.root), range(2))
    (Path(data.root) / "images" / "0.jpg").unlink()
    write_png(Path(data.root) / "images" / "000000.png", np.full((16, 16, 3), 7, np.uint8))
    DataSet.prepare(data)
    (record,) = records(data, "train")
    np.testing.assert_array_equal(photos.decode_image(record["image"], "x"), 7)


def test_parts_are_painted_in_class_order(tmp_path):
    data = config(tmp_path)
    write_official(Path(data.root), [7, 1999, 2000, 29999])
    DataSet.prepare(data)
    train, test = records(data, "train"), records(data, "test")
    assert [record["id"] for record in train + test] == [7, 1999, 2000, 29999]
    for record in train + test:
        np.testing.assert_array_equal(masks.decode_mask(record["mask"], "x", CELEBAMASK_HQ), official_mask())


def test_faces_fill_several_shards_in_the_order_of_their_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(celebamask_hq, "FACES_PER_SHARD", 3)
    data = config(tmp_path)
    write_label_maps(Path(data.root), [11, 2, 5, 3, 20, 100, 9, 8, 4, 6])
    DataSet.prepare(data)
    assert [record["id"] for record in records(data, "train")] == [2, 3, 4, 5, 6, 8, 9, 11]
    assert shards.read(DataSet.open(data).path).info.splits["train"].num_shards == 3


def test_a_changed_folder_is_prepared_anew_and_an_unchanged_one_is_not(tmp_path):
    data = config(tmp_path)
    root = Path(data.root)
    write_label_maps(root, range(4))
    before = celebamask_hq.recipe(data).variant
    assert celebamask_hq.recipe(data).variant == before
    write_png(root / "labels" / "00003.png", random_mask(99, 16))
    changed = celebamask_hq.recipe(data).variant
    assert changed != before
    (tmp_path / "moved").mkdir()
    root.rename(tmp_path / "moved" / "raw")
    assert celebamask_hq.recipe(config(tmp_path, root=str(tmp_path / "moved" / "raw"))).variant == changed


def test_splits_and_sizes_are_data_sets_of_their_own(tmp_path):
    write_label_maps(tmp_path / "raw", range(5))
    write_mapping(tmp_path / "raw", {0: 0, 1: 1, 2: 2, 3: 3, 4: 190000})
    changes = [{}, {"num_test": 1}, {"split": "celeba"}, {"stored_size": 16}]
    assert len({celebamask_hq.recipe(config(tmp_path, **change)).variant for change in changes}) == len(changes)


@pytest.mark.parametrize("header", [True, False])
def test_celeba_splits_follow_the_mapping(tmp_path, header):
    data = config(tmp_path, split="celeba")
    write_label_maps(Path(data.root), range(6))
    write_mapping(Path(data.root), dict(enumerate([202598, 162770, 162771, 182637, 182638, 0])), header)
    DataSet.prepare(data)
    found = {split: [record["id"] for record in records(data, split)] for split in ("train", "val", "test")}
    assert found == {"train": [1, 5], "val": [2, 3], "test": [0, 4]}


def test_full_mapping_gives_the_published_sizes():
    if not SAMPLE.is_dir():
        pytest.skip("the sample of CelebAMask-HQ, which may not be distributed, is not on this machine")
    faces = [celebamask_hq.Face(id, "", "") for id in range(30_000)]
    splits = celebamask_hq.split_by_celeba(faces, SAMPLE / celebamask_hq.MAPPING_FILE)
    assert {name: len(members) for name, members in splits.items()} == {"train": 24_183, "val": 2_993, "test": 2_824}


def test_by_id_takes_the_last_ids_for_the_test():
    faces = [celebamask_hq.Face(id, "", "") for id in range(30_000)]
    splits = celebamask_hq.split_by_id(faces, 2_000)
    assert [face.id for face in splits["test"]] == list(range(28_000, 30_000))
    assert len(splits["train"]) == 28_000


def test_a_split_without_a_face_is_refused(tmp_path):
    write_label_maps(tmp_path / "raw", range(3))
    with pytest.raises(InputError, match=r"data.num_test 3 .* holds 3"):
        celebamask_hq.recipe(config(tmp_path, num_test=3))
    write_mapping(tmp_path / "raw", {0: 1, 1: 2, 2: 170000})
    with pytest.raises(InputError, match="none of the 3 faces is in the test split"):
        celebamask_hq.recipe(config(tmp_path, split="celeba"))


def test_celeba_split_wants_its_mapping(tmp_path):
    data = config(tmp_path, split="celeba")
    write_label_maps(Path(data.root), range(8))
    with pytest.raises(InputError, match=r"data.split celeba needs .*mapping.txt"):
        celebamask_hq.recipe(data)
    write_mapping(Path(data.root), {0: 1, 7: 190000})
    with pytest.raises(InputError, match=r"no row for these ids: 6 \(1, 2, 3, 4, 5, ...\)"):
        celebamask_hq.recipe(data)
    (Path(data.root) / celebamask_hq.MAPPING_FILE).write_text("0 1 000002.jpg\n1 one 000003.jpg\n")
    with pytest.raises(InputError, match=r"mapping.txt, line 2: expected `idx orig_idx orig_file`, got '1 one"):
        celebamask_hq.recipe(data)


def test_missing_folder_is_refused_with_the_way_to_obtain_it(tmp_path):
    with pytest.raises(InputError, match=r"(?s)data.root: there is no folder .*raw.*github.com/switchablenorms"):
        celebamask_hq.recipe(config(tmp_path))
    (tmp_path / "raw" / "CelebAMask-HQ").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no images and no labels folder. Did you mean .*raw/CelebAMask-HQ\?"):
        celebamask_hq.recipe(config(tmp_path))
    (tmp_path / "raw" / "images").mkdir()
    with pytest.raises(InputError, match="has no labels folder"):
        celebamask_hq.recipe(config(tmp_path))
    (tmp_path / "raw" / "labels").mkdir()
    with pytest.raises(InputError, match=r"hold no faces.*non-commercial"):
        celebamask_hq.recipe(config(tmp_path))


def test_image_without_mask_and_mask_without_image_are_named(tmp_path):
    root = tmp_path / "raw"
    write_label_maps(root, range(12))
    for id in range(3, 10):
        (root / "labels" / f"{id:05d}.png").unlink()
    with pytest.raises(InputError, match=r"no mask for these files .* 7 \(3.jpg, 4.jpg, 5.jpg, 6.jpg, 7.jpg, ...\)"):
        celebamask_hq.recipe(config(tmp_path))
    for id in range(3, 11):
        (root / "images" / f"{id}.jpg").unlink()
    with pytest.raises(InputError, match=r"no image for these files .* 1 \(00010.png\)"):
        celebamask_hq.recipe(config(tmp_path))


def test_face_without_any_part_is_named(tmp_path):
    write_official(tmp_path / "raw", range(3))
    for part in ("skin", "nose", "hair"):
        part_file(tmp_path / "raw", 1, part).unlink()
    with pytest.raises(InputError, match=r"no mask for these files .* 1 \(1.jpg\)"):
        celebamask_hq.recipe(config(tmp_path))


@pytest.mark.parametrize(
    ("folder", "name", "message"),
    [
        ("images", "face.jpg", r"no mask for these files .* 1 \(face.jpg\)"),
        ("images", "0001.png", "are of the same face; keep one"),
        ("labels", "1.png", "are of the same face; keep one"),
    ],
)
def test_stray_files_are_named(tmp_path, folder, name, message):
    write_label_maps(tmp_path / "raw", range(3))
    (tmp_path / "raw" / folder / name).write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        celebamask_hq.recipe(config(tmp_path))


def test_hidden_files_and_other_suffixes_are_no_data(tmp_path):
    write_label_maps(tmp_path / "raw", range(3))
    for name in (".DS_Store", "._0.jpg", "Thumbs.db", "README.txt"):
        (tmp_path / "raw" / "images" / name).write_bytes(b"x")
    assert len(celebamask_hq.list_raw_folder(tmp_path / "raw", CELEBAMASK_HQ).faces) == 3


@pytest.mark.parametrize("name", ["00001_beard.png", "00001_background.png", "skin.png"])
def test_unknown_part_is_named(tmp_path, name):
    write_official(tmp_path / "raw", range(3))
    part_file(tmp_path / "raw", 1, "skin").with_name(name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"{name} is not named <id>_<part>.png"):
        celebamask_hq.recipe(config(tmp_path))


def test_part_that_occurs_twice_is_named(tmp_path):
    write_official(tmp_path / "raw", range(3))
    part_file(tmp_path / "raw", 1, "skin").with_name("1_skin.png").write_bytes(b"x")
    with pytest.raises(InputError, match="are the same part of the same face"):
        celebamask_hq.recipe(config(tmp_path))


def test_empty_files_are_named_before_anything_is_read(tmp_path):
    write_label_maps(tmp_path / "raw", range(4))
    (tmp_path / "raw" / "images" / "2.jpg").write_bytes(b"")
    (tmp_path / "raw" / "labels" / "00001.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"Empty files \(0 bytes\): 2 \(.*images/2.jpg, .*labels/00001.png\)"):
        celebamask_hq.recipe(config(tmp_path))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: _truncate(root / "images" / "2.jpg"), "2.jpg is truncated"),
        (lambda root: _truncate(root / "labels" / "00002.png"), "00002.png is truncated"),
        (lambda root: (root / "images" / "2.jpg").write_bytes(b"no picture"), "2.jpg cannot be decoded"),
        (
            lambda root: write_png(root / "labels" / "00002.png", np.full((16, 16), 19, np.uint8)),
            "00002.png: label 19 is outside 0..18",
        ),
        (
            lambda root: write_png(root / "labels" / "00002.png", np.zeros((16, 24), np.uint8)),
            "2.jpg is 16x16 pixels and .*00002.png is 24x16",
        ),
    ],
)
def test_damaged_file_is_named_and_nothing_stays_of_the_folder_that_had_it(tmp_path, damage, message):
    data = config(tmp_path)
    write_label_maps(Path(data.root), range(6))
    damage(Path(data.root))
    with pytest.raises(InputError, match=message):
        DataSet.prepare(data)
    with pytest.raises(InputError, match="not prepared"):
        DataSet.open(data)
    write_label_maps(Path(data.root), range(6))
    DataSet.prepare(data)
    assert len(records(data, "train")) == 4
    assert len(list(Path(data.cache_dir).glob("**/*array_record*"))) == 2


def test_damaged_and_missing_files_are_named_together_and_skipped_if_so_wished(tmp_path, caplog):
    data = config(tmp_path, num_test=4)
    root = Path(data.root)
    write_official(root, range(12))
    _truncate(root / "CelebA-HQ-img" / "3.jpg")
    _truncate(part_file(root, 5, "hair"))
    with pytest.raises(
        InputError, match=r"(?s)2 examples are damaged or incomplete:.*3.jpg is truncated.*00005_hair.png is trunc"
    ):
        DataSet.prepare(data)
    (root / "CelebA-HQ-img" / "9.jpg").unlink()
    (root / "CelebA-HQ-img" / "10.jpg").write_bytes(b"")
    for part in ("skin", "nose", "hair"):
        part_file(root, 0, part).unlink()
    with pytest.raises(InputError, match=r"no mask for these files .* 1 \(0.jpg\). data.skip_damaged"):
        DataSet.prepare(data)
    skipping = config(tmp_path, num_test=4, skip_damaged=True)
    DataSet.prepare(skipping)
    # Who is in which split does not depend on what is damaged.
    assert [record["id"] for record in records(skipping, "train")] == [1, 2, 4, 6, 7]
    assert [record["id"] for record in records(skipping, "test")] == [8, 11]
    assert "5 examples are left out" in caplog.text
    named = (DataSet.open(skipping).path / shards.SKIPPED_NAME).read_text()
    for reason in (
        "no mask for 0.jpg",
        "3.jpg is trunc",
        "00005_hair.png is trunc",
        "no image for 00009_skin.png",
        "10.jpg is empty",
    ):
        assert reason in named


def test_faces_that_were_left_out_are_named_again_without_the_flag(tmp_path, caplog):
    data, skipping = config(tmp_path), config(tmp_path, skip_damaged=True)
    root = Path(data.root)
    write_label_maps(root, range(6))
    _truncate(root / "labels" / "00002.png")
    assert DataSet.prepare(skipping).counts == {"train": 3, "test": 2}
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"(?s)1 examples are damaged or incomplete:\n.*00002.png is trunc.*data.skip_damaged"
        ):
            DataSet.prepare(data)
    caplog.clear()
    assert DataSet.prepare(skipping).counts == {"train": 3, "test": 2}
    assert "1 examples are left out" in caplog.text
    # On a host that has a copy of the shards alone.
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"00002.png is truncated"):
        DataSet.prepare(data)
    assert DataSet.prepare(skipping).counts == DataSet.open(data).counts == {"train": 3, "test": 2}
    (tmp_path / "elsewhere").rename(root)
    write_label_maps(root, range(6))
    caplog.clear()
    assert DataSet.prepare(data).counts == {"train": 4, "test": 2}
    assert not caplog.text


def test_parts_of_other_classes_are_painted_in_their_order(tmp_path):
    names = ("nothing", "hair", "skin", "nose")
    classes = ClassSet("Four", names, tuple((i, i, i) for i in range(4)))
    data = config(tmp_path, classes=classes)
    write_official(Path(data.root), range(4))
    DataSet.prepare(data)
    (record, _) = records(data, "train")
    half = 8
    expected = np.zeros((16, 16), np.uint8)
    expected[: half + 1] = classes.index["hair"]
    expected[2:] = classes.index["skin"]
    expected[half : half + 2, half : half + 4] = classes.index["nose"]
    np.testing.assert_array_equal(masks.decode_mask(record["mask"], "x", classes), expected)
    default = celebamask_hq.recipe(config(tmp_path)).variant
    assert celebamask_hq.recipe(data).variant == f"{default}-{classes.fingerprint}"


def test_the_default_classes_do_not_show_in_the_name_of_the_shards(tmp_path):
    write_label_maps(tmp_path / "raw", range(5))
    raw = celebamask_hq.list_raw_folder(tmp_path / "raw", CELEBAMASK_HQ)
    fingerprint = raw.fingerprint(tmp_path / "raw")
    assert celebamask_hq.recipe(config(tmp_path)).variant == f"by_id-2-{fingerprint}"
    assert celebamask_hq.recipe(config(tmp_path, stored_size=16)).variant == f"by_id-2-{fingerprint}-16px"


def test_a_split_of_damaged_faces_alone_is_refused(tmp_path):
    data = config(tmp_path, num_test=1, skip_damaged=True)
    write_label_maps(Path(data.root), range(4))
    _truncate(Path(data.root) / "images" / "3.jpg")
    with pytest.raises(InputError, match="the test split has no example left"):
        DataSet.prepare(data)


def test_faces_are_stored_smaller_than_their_files(tmp_path):
    data = config(tmp_path, stored_size=24, image_size=16)
    write_official(Path(data.root), range(4), image_size=96, mask_size=48)
    DataSet.prepare(data)
    for record in records(data, "train") + records(data, "test"):
        image = photos.read_image_file(Path(data.root) / "CelebA-HQ-img" / f"{record['id']}.jpg")
        stored = photos.decode_image(record["image"], "x").astype(int)
        assert np.abs(stored - photos.resize_image(image, 24)).mean() < 6  # noise is what JPEG keeps worst
        mask = masks.decode_mask(record["mask"], "x", CELEBAMASK_HQ)
        np.testing.assert_array_equal(mask, masks.resize_mask(official_mask(48), 24))
    with pytest.raises(InputError, match=r"data.stored_size must be 0 or no less than data.image_size, 16"):
        config(tmp_path, stored_size=8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: _truncate(file), "00001_nose.png is truncated"),
        (lambda file: write_png(file, np.zeros((8, 8), np.uint8)), r"00001_nose.png has height and width \(8, 8\)"),
    ],
)
def test_damaged_part_is_named(tmp_path, damage, message):
    data = config(tmp_path)
    write_official(Path(data.root), range(3))
    damage(part_file(Path(data.root), 1, "nose"))
    with pytest.raises(InputError, match=message):
        DataSet.prepare(data)


def test_preparing_twice_builds_once(tmp_path):
    data = config(tmp_path)
    write_label_maps(Path(data.root), range(4))
    DataSet.prepare(data)
    times = {path: path.stat().st_mtime_ns for path in Path(data.cache_dir).glob("celebamask_hq/**/*")}
    DataSet.prepare(data)
    assert times == {path: path.stat().st_mtime_ns for path in Path(data.cache_dir).glob("celebamask_hq/**/*")}


def test_a_prepared_folder_need_not_be_writable(tmp_path):
    data = config(tmp_path)
    write_label_maps(Path(data.root), range(4))
    DataSet.prepare(data)
    lock = Path(data.cache_dir) / ".prepare.lock"
    lock.unlink()
    lock.mkdir()  # Permissions would not stop a test that runs as root.
    DataSet.prepare(data)
    assert DataSet.open(data).counts["train"] == 2


def test_preparing_is_quiet_off_the_terminal(tmp_path, capfd):
    data = config(tmp_path)
    write_label_maps(Path(data.root), range(4))
    DataSet.prepare(data)
    assert capfd.readouterr() == ("", "")


def test_cache_dir_that_cannot_be_written_is_named(tmp_path):
    write_label_maps(tmp_path / "raw", range(4))
    (tmp_path / "file").touch()
    data = config(tmp_path, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"data.cache_dir .*file/cache cannot be written"):
        DataSet.prepare(data)


def test_full_disk_is_named(tmp_path, monkeypatch):
    data = config(tmp_path)
    write_label_maps(Path(data.root), range(4))

    def fail(*_):
        raise RuntimeError("write() failed: No space left on device; writing shard; at byte 2097152")

    monkeypatch.setattr(celebamask_hq, "read_faces", fail)
    with pytest.raises(InputError, match=r"data.cache_dir .*cache cannot be written .*No space left"):
        DataSet.prepare(data)


def test_real_faces_are_read(tmp_path):
    if not SAMPLE.is_dir():
        pytest.skip("the sample of CelebAMask-HQ, which may not be distributed, is not on this machine")
    data = config(tmp_path, image_size=64, num_test=4)
    for folder, suffix in (("images", "jpg"), ("labels", "png")):
        (Path(data.root) / folder).mkdir(parents=True)
        for id in range(12):
            source = (SAMPLE / folder / f"{id:05d}.{suffix}").resolve()
            (Path(data.root) / folder / source.name).symlink_to(source)
    DataSet.prepare(data)
    (batch,) = DataSet.open(data).eval_batches("test", 4)
    assert batch["id"].tolist() == [8, 9, 10, 11]
    # Skin, nose and hair; skin is not dark.
    assert {1, 2, 13} <= set(np.unique(batch["mask"]))
    assert batch["image"][batch["mask"] == 1].mean() > 80
