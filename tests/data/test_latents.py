import dataclasses
import functools
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import DataConfig
from sisma_jax.data import celebamask_hq, labels, latents, loading
from sisma_jax.errors import InputError
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig
from sisma_jax.training.autoencoder import encoder_of
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
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("latents")
    write_label_maps(folder / "raw", range(NUM_TRAIN + NUM_TEST), SIZE)
    data = config_in(folder)
    loading.prepare(data)
    latents.prepare(data, encoder())
    return data


@pytest.fixture(scope="module")
def examples(config) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Image and mask by id."""
    batches = [
        *loading.eval_batches(config, "train", batch_size=9),
        *loading.eval_batches(config, "test", batch_size=9),
    ]
    return {int(id): (b["image"][i], b["mask"][i]) for b in batches for i, id in enumerate(b["id"])}


def is_mirrored(example: dict, examples: dict) -> bool:
    """Tells which of the two a training example is, and checks that all of it is."""
    image, mask = examples[int(example["id"])]
    mirrored = not np.array_equal(example["mask"], mask)
    if mirrored:
        image, mask = image[:, ::-1], labels.flip_mask(mask)
    np.testing.assert_array_equal(example["mask"], mask)
    np.testing.assert_array_equal(example["moments"], moments_of(image[None])[0])
    return mirrored


def rows(batches) -> list[dict]:
    return [{key: batch[key][i] for key in batch} for batch in batches for i in range(len(batch["id"]))]


def test_training_batches_are_latents_of_images_or_their_mirror_images(config, examples):
    iterator = latents.train_iterator(config, "squares", batch_size=NUM_TRAIN, seed=0)
    batches = list(itertools.islice(iterator, 12))
    assert {key: (x.shape, x.dtype) for key, x in batches[0].items()} == {
        "moments": ((NUM_TRAIN, 4, 4, 6), np.float16),
        "mask": ((NUM_TRAIN, SIZE, SIZE), np.uint8),
        "id": ((NUM_TRAIN,), np.int64),
    }
    assert all(sorted(batch["id"]) == list(range(NUM_TRAIN)) for batch in batches)
    assert 0.35 < np.mean([is_mirrored(row, examples) for row in rows(batches)]) < 0.65
    still = latents.train_iterator(dataclasses.replace(config, flip=False), "squares", batch_size=8, seed=0)
    assert not any(is_mirrored(row, examples) for row in rows(itertools.islice(still, 6)))


def test_an_iterator_resumes_and_processes_share_its_batches(config):
    def start(**share):
        return latents.train_iterator(config, "squares", batch_size=8, seed=1, **share)

    unbroken = rows(itertools.islice(start(), 9))
    iterator = start()
    next(iterator)
    resumed = start()
    resumed.set_state(iterator.get_state())
    np.testing.assert_equal(rows(itertools.islice(resumed, 8)), unbroken[8:])
    for parts, wanted in (((0, 1), (0, 1, 2, 3)), ((1, 3), (2, 3, 6, 7))):
        share = loading.Share(parts, 4)
        shared = rows(itertools.islice(start(share=share), 9))
        np.testing.assert_equal(shared, [row for i, row in enumerate(unbroken) if i % 8 in wanted])


def test_evaluation_passes_once_in_order(config, examples):
    batches = list(latents.eval_batches(config, "squares", "train", batch_size=10, limit=12))
    assert [len(batch["id"]) for batch in batches] == [10, 2]
    assert [row["id"] for row in rows(batches)] == list(range(12))
    assert not any(is_mirrored(row, examples) for row in rows(batches))


def test_what_lies_beside_them_tells_of_the_autoencoder_and_the_values(config, examples):
    path = latents.prepare(config, encoder())
    statistics = latents.read_statistics(path)
    assert (statistics["autoencoder"], statistics["scale"], statistics["shift"]) == ("squares", 2.0, 0.5)
    mean, log_variance = np.split(
        np.stack([moments_of(examples[i][0][None])[0] for i in range(NUM_TRAIN)]).astype(float), 2, axis=-1
    )
    drawn = mean + np.exp(log_variance / 2) * np.random.default_rng(0).normal(size=(500, *mean.shape))
    np.testing.assert_allclose(statistics["mean"], mean.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(statistics["standard_deviation"], drawn.std((0, 1, 2, 3)), rtol=0.01)


def test_latents_of_another_autoencoder_are_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"no latents of celebamask_hq by this run's autoencoder \(other\).*`latents`"):
        latents.train_iterator(config, "other", batch_size=1, seed=0)
    path = latents.prepare(config, encoder())
    moved = path.parent.with_name(path.parent.name.replace("squares", "other")) / path.name
    moved.parent.mkdir()
    moved.symlink_to(path)
    with pytest.raises(InputError, match="holds latents of the autoencoder squares, this run has other"):
        latents.eval_batches(config, "other", "test", batch_size=1)
    moved.unlink()
    moved.mkdir()
    with pytest.raises(InputError, match=r"latents.json cannot be read .*; delete"):
        latents.eval_batches(config, "other", "test", batch_size=1)
    moved.rmdir()
    with pytest.raises(InputError, match="no split 'val'"):
        latents.eval_batches(config, "squares", "val", batch_size=1)


def test_they_are_made_once(config):
    def fail(_: np.ndarray) -> np.ndarray:
        raise AssertionError("encodes again")

    latents.prepare(config, encoder(encode=fail))


def test_a_damaged_shard_is_an_error_and_no_hang(config, tmp_path):
    damaged = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    shutil.copytree(config.cache_dir, damaged.cache_dir)
    (shard,) = (tmp_path / "cache").glob("latents/*/*/latents-train.*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 8 : len(data) // 4] = bytes(len(data) // 4 - len(data) // 8)
    shard.write_bytes(data)
    iterator = latents.train_iterator(damaged, "squares", batch_size=NUM_TRAIN, seed=0)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        next(iterator)


def whole_way(folder: Path) -> None:
    """Prepares a raw folder and caches its latents, in shards so small that there are several."""
    celebamask_hq.FACES_PER_SHARD = latents.EXAMPLES_PER_SHARD = 6
    data = dataclasses.replace(config_in(folder), stored_size=SIZE)
    loading.prepare(data)
    latents.prepare(data, encoder_of(kl_weights.load(folder.parent / "autoencoder"), batch_size=4))


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
    kl_weights.save(KlAutoencoder(sizes, rngs=nnx.Rngs(0)), tmp_path / "autoencoder")
    interrupted.run(functools.partial(whole_way, tmp_path / "unbroken"))
    # A little further each time, from before anything is written to the last shard, however fast the machine is.
    counts = np.linspace(0, count_files(tmp_path / "unbroken") - 1, 20).astype(int)
    conditions = [functools.partial(has_files, tmp_path / "broken", count) for count in counts]
    assert interrupted.run(functools.partial(whole_way, tmp_path / "broken"), conditions) >= 15
    assert contents(tmp_path / "broken" / "cache") == contents(tmp_path / "unbroken" / "cache")
