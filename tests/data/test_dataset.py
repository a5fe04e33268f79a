import concurrent.futures
import dataclasses
import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_data_source

from sisma_jax.config import DataConfig
from sisma_jax.data import celebamask_hq, masks, photos, synthetic_faces
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.dataset import DataSet, Decode, Resize, Share
from sisma_jax.errors import InputError
from tests.bucket import make_bucket
from tests.data.raw_layout import write_label_maps

NUM_TRAIN = 23
NUM_TEST = 5
SIZE = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DataSet:
    """A prepared data set of random faces at the size at which they are read, so that pixels compare exactly."""
    folder = tmp_path_factory.mktemp("dataset")
    write_label_maps(folder / "raw", range(NUM_TRAIN + NUM_TEST), SIZE)
    data = DataConfig(
        name="celebamask_hq",
        root=str(folder / "raw"),
        cache_dir=str(folder / "cache"),
        num_test=NUM_TEST,
        image_size=SIZE,
        num_threads=2,
    )
    return DataSet.prepare(data)


def take(iterator, num: int) -> list[dict]:
    return list(itertools.islice(iterator, num))


def ids(batches) -> list[int]:
    return [int(id) for batch in batches for id in batch["id"]]


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def raw_face(dataset: DataSet, id: int) -> tuple[np.ndarray, np.ndarray]:
    root = Path(dataset.config.root)
    image = photos.read_image_file(root / "images" / f"{id}.jpg")
    return image, masks.read_mask_file(root / "labels" / f"{id:05d}.png", CELEBAMASK_HQ)


def is_flipped(dataset: DataSet, batch: dict, index: int) -> bool:
    """Tells how one example was augmented, and checks that it was augmented in no other way."""
    image, mask = raw_face(dataset, int(batch["id"][index]))
    flipped = not np.array_equal(batch["mask"][index], mask)
    np.testing.assert_array_equal(batch["mask"][index], CELEBAMASK_HQ.flip(mask) if flipped else mask)
    np.testing.assert_array_equal(batch["image"][index], image[:, ::-1] if flipped else image)
    return flipped


def opened(dataset: DataSet, **changes) -> DataSet:
    return DataSet.open(dataclasses.replace(dataset.config, **changes))


def test_a_data_set_knows_its_classes_splits_and_counts(dataset):
    assert dataset.key == "image"
    assert dataset.classes == CELEBAMASK_HQ
    assert dataset.splits == ("train", "test")
    assert dataset.counts == {"train": NUM_TRAIN, "test": NUM_TEST}
    assert (opened(dataset).path, opened(dataset).counts) == (dataset.path, dataset.counts)


def test_unknown_split_is_refused(dataset):
    with pytest.raises(InputError, match="celebamask_hq has no split 'val'; it has train, test"):
        dataset.eval_batches("val", 1)


def test_the_raw_folder_is_listed_once(dataset, monkeypatch):
    listings = []
    list_raw_folder = celebamask_hq.list_raw_folder
    monkeypatch.setattr(
        celebamask_hq,
        "list_raw_folder",
        lambda *args, **options: listings.append(args) or list_raw_folder(*args, **options),
    )
    for start in (DataSet.prepare, DataSet.open):
        data = start(dataset.config)
        next(data.train_batches(2, 0))
        list(data.eval_batches("test", 2))
        assert data.counts["test"] == NUM_TEST
        assert len(listings) == 1
        listings.clear()


def test_the_home_folder_is_expanded(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "raw").symlink_to(dataset.config.root)
    home = dataclasses.replace(dataset.config, root="~/raw", cache_dir="~/cache")
    assert DataSet.prepare(home).path.is_relative_to(tmp_path / "cache")
    assert DataSet.open(home).counts["train"] == NUM_TRAIN


def test_reading_before_preparing_is_refused(dataset, tmp_path):
    with pytest.raises(InputError, match=f"not prepared in data.cache_dir {tmp_path}"):
        opened(dataset, cache_dir=str(tmp_path))


def test_batch_has_the_agreed_form(dataset):
    batch = next(dataset.train_batches(6, 0))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((6, SIZE, SIZE, 3), np.uint8),
        "mask": ((6, SIZE, SIZE), np.uint8),
        "id": ((6,), np.int64),
    }


def test_half_of_the_examples_are_flipped_and_nothing_else_is_done_to_them(dataset):
    batches = take(dataset.train_batches(20, 0), 20)
    flips = [is_flipped(dataset, batch, index) for batch in batches for index in range(20)]
    assert abs(np.mean(flips) - 0.5) < 0.1  # Four standard deviations of the mean of 400 coin tosses.


def test_an_example_is_flipped_in_one_epoch_and_not_in_another(dataset):
    batches = take(dataset.train_batches(NUM_TRAIN, 0), 8)
    flips = [{int(id): is_flipped(dataset, batch, i) for i, id in enumerate(batch["id"])} for batch in batches]
    assert all(len({epoch[id] for epoch in flips}) == 2 for id in (0, 1, 2))


def test_flip_can_be_turned_off(dataset):
    still = opened(dataset, flip=False)
    for batch in take(still.train_batches(8, 0), 4):
        assert not any(is_flipped(dataset, batch, index) for index in range(8))


def test_every_epoch_has_each_example_once_in_a_new_order(dataset):
    sequence = ids(take(dataset.train_batches(7, 3), 4 * NUM_TRAIN // 7 + 1))
    epochs = [sequence[start : start + NUM_TRAIN] for start in range(0, 4 * NUM_TRAIN, NUM_TRAIN)]
    assert all(sorted(epoch) == list(range(NUM_TRAIN)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] != sorted(epochs[0])


def test_same_seed_gives_the_same_batches_with_any_number_of_threads(dataset):
    threads = opened(dataset, num_threads=7)
    assert_same(take(dataset.train_batches(6, 5), 12), take(threads.train_batches(6, 5), 12))


def test_another_seed_gives_another_order(dataset):
    first = ids(take(dataset.train_batches(NUM_TRAIN, 0), 1))
    assert ids(take(dataset.train_batches(NUM_TRAIN, 1), 1)) != first


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_resumed_iterator_continues_the_unbroken_one(dataset, steps):
    unbroken = take(dataset.train_batches(6, 0), steps + 6)
    iterator = dataset.train_batches(6, 0)
    take(iterator, steps)
    state = iterator.get_state()
    take(iterator, 3)
    resumed = dataset.train_batches(6, 0)
    resumed.set_state(state)
    assert_same(take(resumed, 6), unbroken[steps:])


SHARES = {
    "two processes": [((0,), 2), ((1,), 2)],
    "four processes": [((0,), 4), ((1,), 4), ((2,), 4), ((3,), 4)],
    "two processes of two devices": [((0, 1), 4), ((2, 3), 4)],
    "devices in turn": [((0, 2), 4), ((1, 3), 4)],
    "unequal processes": [((0, 1, 2), 4), ((3,), 4)],
    "the same rows twice": [((0, 1), 2), ((0, 1), 2)],
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_processes_share_the_global_batches_of_one_process(dataset, shares):
    """Row for row, so that neither the batches nor their order tell how many processes there are."""
    alone = take(dataset.train_batches(8, 0), 9)
    for parts, of in shares:
        share = Share(parts, of)
        rows = np.concatenate([np.arange(8).reshape(of, -1)[part] for part in parts])
        own = take(dataset.train_batches(8, 0, share=share), 9)
        assert_same(own, [{name: x[rows] for name, x in batch.items()} for batch in alone])


def test_state_means_the_same_batch_for_another_number_of_processes(dataset):
    iterator = dataset.train_batches(8, 0)
    take(iterator, 4)
    parts = [dataset.train_batches(8, 0, share=Share((i,), 2)) for i in (0, 1)]
    for part in parts:
        part.set_state(iterator.get_state())
    assert ids(next(part) for part in parts) == ids([next(iterator)])


def test_a_batch_may_be_larger_than_the_data_set(dataset):
    (batch,) = take(dataset.train_batches(2 * NUM_TRAIN, 0), 1)
    assert sorted(ids([batch])) == sorted([*range(NUM_TRAIN), *range(NUM_TRAIN)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "share": Share((0,), 4)}, "train.batch_size 6 is not a multiple of the 4 parts"),
        ({"batch_size": 6, "seed": -1}, "train.seed must be in"),
        ({"batch_size": 6, "seed": 2**32}, "train.seed must be in"),
    ],
)
def test_impossible_iterators_are_refused(dataset, arguments, message):
    with pytest.raises(InputError, match=message):
        dataset.train_batches(**({"seed": 0} | arguments))


def test_eval_batches_pass_once_in_order_unflipped(dataset):
    batches = list(dataset.eval_batches("train", 10))
    assert [len(batch["id"]) for batch in batches] == [10, 10, 3]
    assert ids(batches) == list(range(NUM_TRAIN))
    assert not any(is_flipped(dataset, batch, i) for batch in batches for i in range(len(batch["id"])))


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (2, [2]), (3, [2, 1]), (99, [2, 2, 1]), (None, [2, 2, 1])])
def test_eval_batches_stop_at_the_limit(dataset, limit, sizes):
    batches = dataset.eval_batches("test", 2, limit=limit)
    assert [len(batch["id"]) for batch in batches] == sizes


def test_shards_in_a_bucket_are_read_there_and_not_made(dataset, monkeypatch):
    """ArrayRecord, which is no Python, reads gs:// by itself: what it is given are the right paths."""
    bucket = make_bucket(monkeypatch)
    remote = dataclasses.replace(dataset.config, cache_dir=str(bucket / "data"))
    with pytest.raises(InputError, match=r"gs://bucket/data does not hold celebamask_hq/.*gcloud storage cp -r DIR/\*"):
        DataSet.prepare(remote)
    with pytest.raises(InputError, match=r"is not prepared in data.cache_dir gs://bucket/data"):
        DataSet.open(remote)
    local = dataset.path
    target = bucket / "data" / local.relative_to(dataset.config.cache_dir)
    for file in local.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for start in (DataSet.prepare, DataSet.open):
        assert start(remote).path == target
        assert start(remote).counts["train"] == NUM_TRAIN
    # A host of a pod has no raw folder.
    without_root = dataclasses.replace(remote, root="absent")
    for start in (DataSet.prepare, DataSet.open):
        assert start(without_root).path == target
    (target.parent.with_name("by_id-5-0123456789") / target.name / "shard").write_bytes(b"")
    with pytest.raises(InputError, match=r"of several raw folders .*by_id-5-0123456789.* data.root absent is not"):
        DataSet.open(without_root)
    names = []

    def open_records(instructions):
        names.extend(one.filename for one in instructions)
        return local_source(
            [dataclasses.replace(one, filename=str(local / Path(one.filename).name)) for one in instructions]
        )

    local_source = array_record_data_source.ArrayRecordDataSource
    monkeypatch.setattr(array_record_data_source, "ArrayRecordDataSource", open_records)
    first = [next(DataSet.open(one).eval_batches("train", 1)) for one in (remote, dataset.config)]
    assert_same(first[:1], first[1:])
    assert str(names[0]).startswith("gs://bucket/data/celebamask_hq/")
    assert len(names) == 2


def test_images_and_masks_are_resized_to_image_size(dataset):
    small = opened(dataset, image_size=8, flip=False)
    batch = next(small.train_batches(4, 0))
    for index, id in enumerate(batch["id"]):
        image, mask = raw_face(dataset, int(id))
        np.testing.assert_array_equal(batch["image"][index], photos.resize_image(image, 8))
        np.testing.assert_array_equal(batch["mask"][index], masks.resize_mask(mask, 8))


def test_transforms_are_record_in_record_out(dataset):
    image, mask = raw_face(dataset, 0)
    record = {"image": photos.encode_png(image), "mask": photos.encode_png(mask), "id": 0}
    decoded = Decode(CELEBAMASK_HQ).map(record)
    np.testing.assert_array_equal(decoded["image"], image)
    np.testing.assert_array_equal(decoded["mask"], mask)
    assert Resize(8).map(decoded)["mask"].shape == (8, 8)
    assert record["mask"] == photos.encode_png(mask)


def test_tensorflow_is_not_imported(dataset):
    take(dataset.train_batches(2, 0), 1)
    assert "tensorflow" not in sys.modules


def test_preparing_twice_at_once_does_not_collide(dataset, tmp_path):
    # The lock is of the open file, so threads exclude one another as processes do.
    data = dataclasses.replace(dataset.config, cache_dir=str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        prepared = list(pool.map(DataSet.prepare, [data] * 4))
    assert [one.counts["train"] for one in prepared] == [NUM_TRAIN] * 4


def test_synthetic_faces_are_prepared_and_read(tmp_path):
    data = DataSet.prepare(DataConfig(cache_dir=str(tmp_path), image_size=32, num_train=6, num_test=3))
    batch = next(data.train_batches(6, 0))
    assert sorted(ids([batch])) == list(range(6))
    assert batch["image"].shape == (6, 32, 32, 3)
    assert len(np.unique(batch["mask"])) > 5
    assert ids(data.eval_batches("test", 2)) == [6, 7, 8]


def test_another_data_set_is_one_module(tmp_path, monkeypatch):
    module = types.ModuleType("sisma_jax.data.dots")
    module.recipe = lambda config: dataclasses.replace(synthetic_faces.recipe(config), name="dots", variant="few")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = DataConfig(cache_dir=str(tmp_path), image_size=16, num_train=3, num_test=1)
    object.__setattr__(config, "name", "dots")  # which has to be added to the names that `DataConfig` takes
    for data in (DataSet.prepare(config), DataSet.open(config)):
        assert data.path == tmp_path / "dots" / "few" / "1.0.0"
        assert ids(data.eval_batches("train", 2)) == [0, 1, 2]


def test_a_class_set_of_the_users_own_is_read(tmp_path):
    colors = tuple((10 * i, 0, 0) for i in range(4))
    classes = ClassSet("Own", ("none", "left", "right", "rest"), colors, mirrored=(("left", "right"),), ignored=255)
    raw = write_label_maps(tmp_path / "raw", range(8), SIZE, classes)
    for id, mask in raw.items():
        mask[0, id] = 255
        (tmp_path / "raw" / "labels" / f"{id:05d}.png").write_bytes(photos.encode_png(mask))
    config = DataConfig(
        name="celebamask_hq",
        classes=classes,
        root=str(tmp_path / "raw"),
        cache_dir=str(tmp_path / "cache"),
        num_test=2,
        image_size=SIZE,
    )
    data = DataSet.prepare(config)
    assert data.classes == classes
    batches = take(data.train_batches(6, 0), 8)
    flips = 0
    for batch in batches:
        for id, mask in zip(batch["id"].tolist(), batch["mask"], strict=True):
            flipped = not np.array_equal(mask, raw[id])
            np.testing.assert_array_equal(mask, classes.flip(raw[id]) if flipped else raw[id])
            flips += flipped
    assert 10 < flips < 38
    # Other classes are another data set, and only their meaning counts.
    with pytest.raises(InputError, match=r"label 255 is outside 0\.\.3"):
        DataSet.prepare(dataclasses.replace(config, classes=dataclasses.replace(classes, ignored=None)))
    renamed = dataclasses.replace(classes, title="Other", colors=colors[::-1])
    assert DataSet.open(dataclasses.replace(config, classes=renamed)).path == data.path
    with pytest.raises(InputError, match="not prepared"):
        DataSet.open(dataclasses.replace(config, classes=dataclasses.replace(classes, mirrored=())))
