import dataclasses
import functools
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import AutoencoderConfig, Config, DataConfig
from sisma_jax.data import celebamask_hq, latents
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.dataset import DataSet, Share
from sisma_jax.data.latents import LatentDataSet
from sisma_jax.errors import InputError
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig
from sisma_jax.runs.folder import RunFolder
from sisma_jax.training import autoencoder as autoencoders
from tests import interrupted
from tests.data.raw_layout import write_label_maps
from tests.data.test_shards import contents

NUM_TRAIN, NUM_TEST, SIZE = 23, 5, 16


def moments_of(image: np.ndarray) -> np.ndarray:
    """Stands in for an autoencoder: mean and log variance from 4 x 4 squares of pixels."""
    squares = image.astype(np.float32).reshape(len(image), SIZE // 4, 4, SIZE // 4, 4, 3).mean(axis=(2, 4)) / 127.5 - 1
    return np.concatenate([squares, np.log(0.01 + squares**2)], axis=-1).astype(np.float16)


def encoder(fingerprint: str = "squares", encode=moments_of) -> latents.Encoder:
    return latents.Encoder(encode, batch_size=4, fingerprint=fingerprint, scale=2.0, shift=0.5)


def config_in(folder: Path) -> DataConfig:
    return DataConfig(
        name="celebamask_hq",
        root=str(folder / "raw"),
        cache_dir=str(folder / "cache"),
        num_test=NUM_TEST,
        image_size=SIZE,
        num_threads=2,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DataSet:
    folder = tmp_path_factory.mktemp("latents")
    write_label_maps(folder / "raw", range(NUM_TRAIN + NUM_TEST), SIZE)
    return DataSet.prepare(config_in(folder))


@pytest.fixture(scope="module")
def encoded(dataset) -> LatentDataSet:
    return LatentDataSet.prepare(dataset, encoder())


@pytest.fixture(scope="module")
def examples(dataset) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Image and mask by id."""
    batches = [
        *dataset.eval_batches("train", 9),
        *dataset.eval_batches("test", 9),
    ]
    return {int(id): (b["image"][i], b["mask"][i]) for b in batches for i, id in enumerate(b["id"])}


def is_mirrored(example: dict, examples: dict) -> bool:
    """Tells which of the two a training example is, and checks that all of it is."""
    image, mask = examples[int(example["id"])]
    mirrored = not np.array_equal(example["mask"], mask)
    if mirrored:
        image, mask = image[:, ::-1], CELEBAMASK_HQ.flip(mask)
    np.testing.assert_array_equal(example["mask"], mask)
    np.testing.assert_array_equal(example["moments"], moments_of(image[None])[0])
    return mirrored


def rows(batches) -> list[dict]:
    return [{key: batch[key][i] for key in batch} for batch in batches for i in range(len(batch["id"]))]


def test_training_batches_are_latents_of_images_or_their_mirror_images(dataset, encoded, examples):
    batches = list(itertools.islice(encoded.train_batches(NUM_TRAIN, 0), 12))
    assert {key: (x.shape, x.dtype) for key, x in batches[0].items()} == {
        "moments": ((NUM_TRAIN, 4, 4, 6), np.float16),
        "mask": ((NUM_TRAIN, SIZE, SIZE), np.uint8),
        "id": ((NUM_TRAIN,), np.int64),
    }
    assert all(sorted(batch["id"]) == list(range(NUM_TRAIN)) for batch in batches)
    assert 0.35 < np.mean([is_mirrored(row, examples) for row in rows(batches)]) < 0.65
    unflipped = DataSet.open(dataclasses.replace(dataset.config, flip=False))
    still = LatentDataSet.open(unflipped, "squares").train_batches(8, 0)
    assert not any(is_mirrored(row, examples) for row in rows(itertools.islice(still, 6)))


def test_they_are_described_as_the_data_set_is(dataset, encoded):
    for one in (encoded, LatentDataSet.open(dataset, "squares")):
        assert one.key == "moments"
        assert one.path == encoded.path
        assert one.path.parents[1] == Path(dataset.config.cache_dir) / "latents"
        for name in ("config", "classes", "splits", "counts"):
            assert getattr(one, name) == getattr(dataset, name)


def test_an_iterator_resumes_and_processes_share_its_batches(encoded):
    def start(**share):
        return encoded.train_batches(8, 1, **share)

    unbroken = rows(itertools.islice(start(), 9))
    iterator = start()
    next(iterator)
    resumed = start()
    resumed.set_state(iterator.get_state())
    np.testing.assert_equal(rows(itertools.islice(resumed, 8)), unbroken[8:])
    for parts, wanted in (((0, 1), (0, 1, 2, 3)), ((1, 3), (2, 3, 6, 7))):
        share = Share(parts, 4)
        shared = rows(itertools.islice(start(share=share), 9))
        np.testing.assert_equal(shared, [row for i, row in enumerate(unbroken) if i % 8 in wanted])


def test_evaluation_passes_once_in_order(encoded, examples):
    batches = list(encoded.eval_batches("train", 10, limit=12))
    assert [len(batch["id"]) for batch in batches] == [10, 2]
    assert [row["id"] for row in rows(batches)] == list(range(12))
    assert not any(is_mirrored(row, examples) for row in rows(batches))
    assert [row["id"] for row in rows(encoded.eval_batches("test", 2, start=1, limit=3))] == [24, 25, 26]


def test_what_lies_beside_them_tells_of_the_autoencoder_and_the_values(dataset, encoded, examples):
    statistics = LatentDataSet.open(dataset, "squares").statistics
    assert statistics == encoded.statistics
    assert (statistics["autoencoder"], statistics["scale"], statistics["shift"]) == ("squares", 2.0, 0.5)
    mean, log_variance = np.split(
        np.stack([moments_of(examples[i][0][None])[0] for i in range(NUM_TRAIN)]).astype(float), 2, axis=-1
    )
    drawn = mean + np.exp(log_variance / 2) * np.random.default_rng(0).normal(size=(500, *mean.shape))
    np.testing.assert_allclose(statistics["mean"], mean.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(statistics["standard_deviation"], drawn.std((0, 1, 2, 3)), rtol=0.01)


def test_latents_of_another_autoencoder_are_refused(dataset, encoded):
    with pytest.raises(InputError, match=r"no latents of celebamask_hq by this run's autoencoder \(other\).*`latents`"):
        LatentDataSet.open(dataset, "other")
    path = encoded.path
    moved = path.parent.with_name(path.parent.name.replace("squares", "other")) / path.name
    moved.parent.mkdir()
    moved.symlink_to(path)
    with pytest.raises(InputError, match="holds latents of the autoencoder squares, this run has other"):
        LatentDataSet.open(dataset, "other")
    moved.unlink()
    moved.mkdir()
    with pytest.raises(InputError, match=r"latents.json cannot be read .*; delete"):
        LatentDataSet.open(dataset, "other")
    moved.rmdir()
    with pytest.raises(InputError, match="no split 'val'"):
        encoded.eval_batches("val", 1)


def test_they_are_made_once(dataset, encoded):
    def fail(_: np.ndarray) -> np.ndarray:
        raise AssertionError("encodes again")

    assert LatentDataSet.prepare(dataset, encoder(encode=fail)).path == encoded.path


def test_a_damaged_shard_is_an_error_and_no_hang(dataset, encoded, tmp_path):
    shutil.copytree(dataset.config.cache_dir, tmp_path / "cache")
    damaged = DataSet.open(dataclasses.replace(dataset.config, cache_dir=str(tmp_path / "cache")))
    (shard,) = (tmp_path / "cache").glob("latents/*/*/latents-train.*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 8 : len(data) // 4] = bytes(len(data) // 4 - len(data) // 8)
    shard.write_bytes(data)
    iterator = LatentDataSet.open(damaged, "squares").train_batches(NUM_TRAIN, 0)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        next(iterator)


AUTOENCODER = AutoencoderConfig(kind="kl", block_channels=(4, 8), norm_groups=4, encode_batch_size=4)


def whole_way(folder: Path) -> None:
    """Prepares a raw folder and caches its latents, in shards so small that there are several."""
    celebamask_hq.FACES_PER_SHARD = latents.EXAMPLES_PER_SHARD = 6
    data = dataclasses.replace(config_in(folder), stored_size=SIZE)
    run = RunFolder(folder.parent, Config(data=data, autoencoder=AUTOENCODER))
    LatentDataSet.prepare(DataSet.prepare(data), autoencoders.encoder(run))


def count_files(folder: Path) -> int:
    """Shards of the data set and of its latents, that being written included."""
    return sum(1 for _ in folder.glob("cache/**/*array_record*"))


def has_files(folder: Path, count: int, elapsed: float) -> bool:
    return count_files(folder) >= count


@pytest.mark.slow
def test_killed_at_twenty_moments_the_whole_way_ends_with_the_bytes_of_an_unbroken_one(tmp_path):
    write_label_maps(tmp_path / "unbroken" / "raw", range(60), 96)
    shutil.copytree(tmp_path / "unbroken" / "raw", tmp_path / "broken" / "raw")
    sizes = KlConfig(block_channels=(4, 8), layers_per_block=1, norm_groups=4)
    kl_weights.save(
        KlAutoencoder(sizes, rngs=nnx.Rngs(0)), RunFolder(tmp_path, Config(autoencoder=AUTOENCODER)).autoencoder_path
    )
    interrupted.run(functools.partial(whole_way, tmp_path / "unbroken"))
    # A little further each time, from before anything is written to the last shard, however fast the machine is.
    counts = np.linspace(0, count_files(tmp_path / "unbroken") - 1, 20).astype(int)
    conditions = [functools.partial(has_files, tmp_path / "broken", count) for count in counts]
    assert interrupted.run(functools.partial(whole_way, tmp_path / "broken"), conditions) >= 15
    assert contents(tmp_path / "broken" / "cache") == contents(tmp_path / "unbroken" / "cache")
