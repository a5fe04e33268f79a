import concurrent.futures
import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_data_source

from sisma_jax.config import DataConfig
from sisma_jax.data import images, labels, loading
from sisma_jax.errors import InputError
from tests.bucket import make_bucket
from tests.data.raw_layout import write_label_maps

NUM_TRAIN = 23
NUM_TEST = 5
SIZE = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    """A prepared data set of random faces at the size at which they are read, so that pixels compare exactly."""
    folder = tmp_path_factory.mktemp("loading")
    write_label_maps(folder / "raw", range(NUM_TRAIN + NUM_TEST), SIZE)
    data = DataConfig(
        name="celebamask_hq",
        root=str(folder / "raw"),
        cache_dir=str(folder / "cache"),
        num_test=NUM_TEST,
        image_size=SIZE,
        num_threads=2,
    )
    loading.prepare(data)
    return data


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


def raw_face(config: DataConfig, id: int) -> tuple[np.ndarray, np.ndarray]:
    root = Path(config.root)
    image = images.read_image_file(root / "images" / f"{id}.jpg")
    return image, images.read_mask_file(root / "labels" / f"{id:05d}.png")


def is_flipped(config: DataConfig, batch: dict, index: int) -> bool:
    """Tells how one example was augmented, and checks that it was augmented in no other way."""
    image, mask = raw_face(config, int(batch["id"][index]))
    flipped = not np.array_equal(batch["mask"][index], mask)
    np.testing.assert_array_equal(batch["mask"][index], labels.flip_mask(mask) if flipped else mask)
    np.testing.assert_array_equal(batch["image"][index], image[:, ::-1] if flipped else image)
    return flipped


def test_num_examples(config):
    assert loading.num_examples(config, "train") == NUM_TRAIN
    assert loading.num_examples(config, "test") == NUM_TEST


def test_unknown_split_is_refused(config):
    with pytest.raises(InputError, match="celebamask_hq has no split 'val'; it has train, test"):
        loading.num_examples(config, "val")
    with pytest.raises(InputError, match="no split 'val'"):
        loading.eval_batches(config, "val", batch_size=1)


def test_reading_before_preparing_is_refused(config, tmp_path):
    empty = DataConfig(name="celebamask_hq", root=config.root, cache_dir=str(tmp_path), num_test=NUM_TEST)
    with pytest.raises(InputError, match=f"not prepared in --data.cache_dir {tmp_path}"):
        loading.train_iterator(empty, batch_size=1, seed=0)


def test_batch_has_the_agreed_form(config):
    batch = next(loading.train_iterator(config, batch_size=6, seed=0))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((6, SIZE, SIZE, 3), np.uint8),
        "mask": ((6, SIZE, SIZE), np.uint8),
        "id": ((6,), np.int64),
    }


def test_half_of_the_examples_are_flipped_and_nothing_else_is_done_to_them(config):
    batches = take(loading.train_iterator(config, batch_size=20, seed=0), 20)
    flips = [is_flipped(config, batch, index) for batch in batches for index in range(20)]
    assert abs(np.mean(flips) - 0.5) < 0.1  # Four standard deviations of the mean of 400 coin tosses.


def test_an_example_is_flipped_in_one_epoch_and_not_in_another(config):
    batches = take(loading.train_iterator(config, batch_size=NUM_TRAIN, seed=0), 8)
    flips = [{int(id): is_flipped(config, batch, i) for i, id in enumerate(batch["id"])} for batch in batches]
    assert all(len({epoch[id] for epoch in flips}) == 2 for id in (0, 1, 2))


def test_flip_can_be_turned_off(config):
    still = DataConfig(**(vars(config) | {"flip": False}))
    for batch in take(loading.train_iterator(still, batch_size=8, seed=0), 4):
        assert not any(is_flipped(config, batch, index) for index in range(8))


def test_every_epoch_has_each_example_once_in_a_new_order(config):
    sequence = ids(take(loading.train_iterator(config, batch_size=7, seed=3), 4 * NUM_TRAIN // 7 + 1))
    epochs = [sequence[start : start + NUM_TRAIN] for start in range(0, 4 * NUM_TRAIN, NUM_TRAIN)]
    assert all(sorted(epoch) == list(range(NUM_TRAIN)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] != sorted(epochs[0])


def test_same_seed_gives_the_same_batches_with_any_number_of_threads(config):
    threads = DataConfig(**(vars(config) | {"num_threads": 7}))
    assert_same(
        take(loading.train_iterator(config, batch_size=6, seed=5), 12),
        take(loading.train_iterator(threads, batch_size=6, seed=5), 12),
    )


def test_another_seed_gives_another_order(config):
    first = ids(take(loading.train_iterator(config, batch_size=NUM_TRAIN, seed=0), 1))
    assert ids(take(loading.train_iterator(config, batch_size=NUM_TRAIN, seed=1), 1)) != first


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_resumed_iterator_continues_the_unbroken_one(config, steps):
    unbroken = take(loading.train_iterator(config, batch_size=6, seed=0), steps + 6)
    iterator = loading.train_iterator(config, batch_size=6, seed=0)
    take(iterator, steps)
    state = iterator.get_state()
    take(iterator, 3)
    resumed = loading.train_iterator(config, batch_size=6, seed=0)
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
def test_processes_share_the_global_batches_of_one_process(config, shares):
    """Row for row, so that neither the batches nor their order tell how many processes there are."""
    alone = take(loading.train_iterator(config, batch_size=8, seed=0), 9)
    for parts, of in shares:
        share = loading.Share(parts, of)
        rows = np.concatenate([np.arange(8).reshape(of, -1)[part] for part in parts])
        own = take(loading.train_iterator(config, batch_size=8, seed=0, share=share), 9)
        assert_same(own, [{name: x[rows] for name, x in batch.items()} for batch in alone])


def test_state_means_the_same_batch_for_another_number_of_processes(config):
    iterator = loading.train_iterator(config, batch_size=8, seed=0)
    take(iterator, 4)
    parts = [loading.train_iterator(config, batch_size=8, seed=0, share=loading.Share((i,), 2)) for i in (0, 1)]
    for part in parts:
        part.set_state(iterator.get_state())
    assert ids(next(part) for part in parts) == ids([next(iterator)])


def test_a_batch_may_be_larger_than_the_data_set(config):
    (batch,) = take(loading.train_iterator(config, batch_size=2 * NUM_TRAIN, seed=0), 1)
    assert sorted(ids([batch])) == sorted([*range(NUM_TRAIN), *range(NUM_TRAIN)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "share": loading.Share((0,), 4)}, "--train.batch_size 6 is not a multiple of the 4 parts"),
        ({"batch_size": 6, "seed": -1}, "--train.seed must be in"),
        ({"batch_size": 6, "seed": 2**32}, "--train.seed must be in"),
    ],
)
def test_impossible_iterators_are_refused(config, arguments, message):
    with pytest.raises(InputError, match=message):
        loading.train_iterator(config, **({"seed": 0} | arguments))


def test_eval_batches_pass_once_in_order_unflipped(config):
    batches = list(loading.eval_batches(config, "train", batch_size=10))
    assert [len(batch["id"]) for batch in batches] == [10, 10, 3]
    assert ids(batches) == list(range(NUM_TRAIN))
    assert not any(is_flipped(config, batch, i) for batch in batches for i in range(len(batch["id"])))


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (2, [2]), (3, [2, 1]), (99, [2, 2, 1]), (None, [2, 2, 1])])
def test_eval_batches_stop_at_the_limit(config, limit, sizes):
    batches = loading.eval_batches(config, "test", batch_size=2, limit=limit)
    assert [len(batch["id"]) for batch in batches] == sizes


def test_shards_in_a_bucket_are_read_there_and_not_made(config, monkeypatch):
    """ArrayRecord, which is no Python, reads gs:// by itself: what it is given are the right paths."""
    bucket = make_bucket(monkeypatch)
    remote = DataConfig(**(vars(config) | {"cache_dir": str(bucket / "data")}))
    with pytest.raises(InputError, match=r"gs://bucket/data does not hold celebamask_hq/.*gcloud storage cp -r DIR/\*"):
        loading.prepare(remote)
    with pytest.raises(InputError, match=r"is not prepared in --data.cache_dir gs://bucket/data"):
        loading.train_iterator(remote, batch_size=2, seed=0)
    local = loading.location(config)
    target = bucket / "data" / local.relative_to(config.cache_dir)
    for file in local.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    loading.prepare(remote)
    assert loading.location(remote) == target
    assert loading.num_examples(remote, "train") == NUM_TRAIN
    # A host of a pod has no raw folder.
    without_root = DataConfig(**(vars(remote) | {"root": "absent"}))
    loading.prepare(without_root)
    assert loading.location(without_root) == target
    (target.parent.with_name("by_id-5-0123456789") / target.name / "shard").write_bytes(b"")
    with pytest.raises(InputError, match=r"of several raw folders .*by_id-5-0123456789.* --data.root absent is not"):
        loading.location(without_root)
    opened = []

    def open_records(instructions):
        opened.extend(one.filename for one in instructions)
        return local_source(
            [dataclasses.replace(one, filename=str(local / Path(one.filename).name)) for one in instructions]
        )

    local_source = array_record_data_source.ArrayRecordDataSource
    monkeypatch.setattr(array_record_data_source, "ArrayRecordDataSource", open_records)
    assert loading.source(remote, "train")[0]["id"] == loading.source(config, "train")[0]["id"]
    assert all(str(path).startswith("gs://bucket/data/celebamask_hq/") for path in opened[:1])
    assert len(opened) == 2


def test_images_and_masks_are_resized_to_image_size(config):
    small = DataConfig(**(vars(config) | {"image_size": 8, "flip": False}))
    batch = next(loading.train_iterator(small, batch_size=4, seed=0))
    for index, id in enumerate(batch["id"]):
        image, mask = raw_face(config, int(id))
        np.testing.assert_array_equal(batch["image"][index], images.resize_image(image, 8))
        np.testing.assert_array_equal(batch["mask"][index], images.resize_mask(mask, 8))


def test_transforms_are_record_in_record_out(config):
    image, mask = raw_face(config, 0)
    record = {"image": images.encode_png(image), "mask": images.encode_png(mask), "id": 0}
    decoded = loading.Decode().map(record)
    np.testing.assert_array_equal(decoded["image"], image)
    np.testing.assert_array_equal(decoded["mask"], mask)
    assert loading.Resize(8).map(decoded)["mask"].shape == (8, 8)
    assert record["mask"] == images.encode_png(mask)


def test_tensorflow_is_not_imported(config):
    take(loading.train_iterator(config, batch_size=2, seed=0), 1)
    assert "tensorflow" not in sys.modules


def test_preparing_twice_at_once_does_not_collide(config, tmp_path):
    # The lock is of the open file, so threads exclude one another as processes do.
    data = DataConfig(**(vars(config) | {"cache_dir": str(tmp_path)}))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(loading.prepare, [data] * 4))
    assert loading.num_examples(data, "train") == NUM_TRAIN


def test_synthetic_faces_are_prepared_and_read(tmp_path):
    data = DataConfig(cache_dir=str(tmp_path), image_size=32, num_train=6, num_test=3)
    loading.prepare(data)
    batch = next(loading.train_iterator(data, batch_size=6, seed=0))
    assert sorted(ids([batch])) == list(range(6))
    assert batch["image"].shape == (6, 32, 32, 3)
    assert len(np.unique(batch["mask"])) > 5
    assert ids(loading.eval_batches(data, "test", batch_size=2)) == [6, 7, 8]
