"""The cache of encoded latents: what a data set is to an autoencoder, computed once.

    CACHE/latents/VARIANT/1.0.0/     shards, and latents.json: which autoencoder, and statistics of its latents

A record holds mean and log variance of the latents of an image and of its mirror image, float16, scaled and shifted as
the denoiser sees them, and the mask and its mirror image as zlib-compressed labels, which are read four times as fast
as PNG. It reaches the device as {"moments": float16 (b, h, w, 2 C), "mask": uint8 (b, S, S), "id": int64 (b,)}, the
mean's channels first.
"""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from sisma_jax.config import DataConfig
from sisma_jax.data import labels, loading, shards
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, write_atomically

NAME = "latents"
STATISTICS_NAME = "latents.json"
EXAMPLES_PER_SHARD = 1024
# Enough for two digits of a standard deviation, however much the images differ.
_EXAMPLES_MEASURED = 2048

_BYTES = tfds.features.Tensor(shape=(), dtype=np.object_)
_FEATURES = {name: _BYTES for name in ("moments", "mirrored_moments", "mask", "mirrored_mask")} | {"id": np.int64}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An autoencoder's part in the cache.

    Attributes:
      encode: uint8 images (batch_size, S, S, 3) to moments, float16 (batch_size, h, w, 2 C).
      batch_size: images a call.
      fingerprint: tells this autoencoder from others.
      scale, shift: that the moments have undergone; noted beside them.
    """

    encode: Callable[[np.ndarray], np.ndarray]
    batch_size: int
    fingerprint: str
    scale: float
    shift: float


def prepare(config: DataConfig, encoder: Encoder) -> AnyPath:
    """Encodes the prepared data set, unless this autoencoder has done so; an interrupted call is taken up.

    Returns:
      The folder of the cache.

    Raises:
      InputError: the data set is not prepared, or the cache folder cannot be written.
    """
    data_set, cache_dir = _data_set(config, encoder), loading.cache_dir_of(config)
    with loading.naming_cache_dir(config):
        shards.build(data_set, cache_dir)
    return data_set.path(cache_dir)


def _data_set(config: DataConfig, encoder: Encoder) -> shards.DataSet:
    counts = {split: loading.num_examples(config, split) for split in loading.splits(config)}
    features = tfds.features.FeaturesDict(_FEATURES)
    return shards.DataSet(
        name=NAME,
        variant=_variant(config, encoder.fingerprint),
        features=features,
        jobs={
            split: [
                functools.partial(_encode, config, encoder, split, start, min(start + EXAMPLES_PER_SHARD, count))
                for start in range(0, count, EXAMPLES_PER_SHARD)
            ]
            for split, count in counts.items()
        },
        num_records=sum(counts.values()),
        information={"description": f"Latents of {config.name}."},
        finish=functools.partial(_describe, config, encoder, features),
        in_process=True,
    )


def _variant(config: DataConfig, fingerprint: str) -> str:
    variant = loading.location(config).parent
    return f"{variant.parent.name}-{variant.name}-{config.image_size}px-{fingerprint}"


def _encode(config: DataConfig, encoder: Encoder, split: str, start: int, stop: int) -> Iterator[dict[str, Any]]:
    for batch in loading.eval_batches(config, split, batch_size=encoder.batch_size, start=start, limit=stop - start):
        # The last batch is filled up, so that one shape compiles.
        image = np.resize(batch["image"], (encoder.batch_size, *batch["image"].shape[1:]))
        moments, mirrored = encoder.encode(image), encoder.encode(image[:, :, ::-1])
        for i, mask in enumerate(batch["mask"]):
            yield {
                "moments": moments[i].tobytes(),
                "mirrored_moments": mirrored[i].tobytes(),
                "mask": zlib.compress(mask.tobytes()),
                "mirrored_mask": zlib.compress(labels.flip_mask(mask).tobytes()),
                "id": int(batch["id"][i]),
            }


def _describe(config: DataConfig, encoder: Encoder, features: tfds.features.FeaturesDict, folder: Path) -> None:
    """Writes which autoencoder the latents are of, and what those of the training split are like."""
    shape = encoder.encode(np.zeros((encoder.batch_size, config.image_size, config.image_size, 3), np.uint8)).shape[1:]
    with ArrayRecordDataSource(sorted(map(str, folder.glob(f"{NAME}-train.*")))) as records:
        moments = np.stack(
            [
                np.frombuffer(features.deserialize_example_np(record)["moments"], np.float16).reshape(shape)
                for record in itertools.islice(iter(records), _EXAMPLES_MEASURED)
            ]
        )
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    axes = (0, 1, 2)
    statistics = {
        "autoencoder": encoder.fingerprint,
        "scale": encoder.scale,
        "shift": encoder.shift,
        "moments_shape": shape,
        "mask_shape": (config.image_size, config.image_size),
        "mean": mean.mean(axes).tolist(),
        "standard_deviation": np.sqrt(np.exp(log_variance).mean(axes) + mean.var(axes)).tolist(),
    }
    write_atomically(folder / STATISTICS_NAME, json.dumps(statistics, indent=2) + "\n")


def _open(config: DataConfig, fingerprint: str, split: str) -> "_Load":
    path = loading.cache_dir_of(config) / NAME / _variant(config, fingerprint) / shards.VERSION
    if not shards.exist(path):
        raise InputError(
            f"There are no latents of {config.name} by this run's autoencoder ({fingerprint}) in {path.parent.parent}; "
            "run the `latents` command first."
        )
    statistics = read_statistics(path)
    if statistics["autoencoder"] != fingerprint:
        raise InputError(
            f"{path} holds latents of the autoencoder {statistics['autoencoder']}, this run has {fingerprint}; delete "
            "the folder and run the `latents` command."
        )
    builder = shards.read(path)
    loading.split_of(builder, split)
    return _Load(
        builder.as_data_source(split).data_source, tuple(statistics["moments_shape"]), tuple(statistics["mask_shape"])
    )


def read_statistics(path: AnyPath) -> dict[str, Any]:
    """Returns what `latents.json` of a cache says.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return json.loads((path / STATISTICS_NAME).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path / STATISTICS_NAME} cannot be read ({error}); delete {path} and run the `latents` command."
        ) from error


class _Load(grain.transforms.Map):
    """A batch of record numbers and of flags, whether the mirror image is meant, to the batch itself.

    Whole batches, and the records as protocol buffers: record by record and by the parser of TFDS, Python's own work
    leaves half as many examples a second (see `benchmarks/data.py`).
    """

    def __init__(self, records: ArrayRecordDataSource, moments_shape: tuple[int, ...], mask_shape: tuple[int, ...]):
        self.records = records
        self._moments_shape, self._mask_shape = moments_shape, mask_shape

    def map(self, batch: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        numbers, mirrored = batch
        moments = np.empty((len(numbers), *self._moments_shape), np.float16)
        mask = np.empty((len(numbers), *self._mask_shape), np.uint8)
        ids = np.empty(len(numbers), np.int64)
        for i, record in enumerate(self.records.__getitems__(numbers.tolist())):
            fields = tf_example_pb2.Example.FromString(record).features.feature
            prefix = "mirrored_" if mirrored[i] else ""
            moments[i] = np.frombuffer(_bytes_in(fields, f"{prefix}moments"), np.float16).reshape(self._moments_shape)
            labels_of_pixels = zlib.decompress(_bytes_in(fields, f"{prefix}mask"), bufsize=mask[i].size)
            mask[i] = np.frombuffer(labels_of_pixels, np.uint8).reshape(self._mask_shape)
            ids[i] = fields["id"].int64_list.value[0]
        return {"moments": moments, "mask": mask, "id": ids}


def _bytes_in(fields: Any, name: str) -> bytes:
    return fields[name].bytes_list.value[0]


class _MirrorHalf(grain.transforms.RandomMap):
    """A record's number, and at random whether its mirror image is meant."""

    def random_map(self, number: int, rng: np.random.Generator) -> tuple[int, bool]:
        return number, rng.random() >= 0.5


def _as_it_is(number: int) -> tuple[int, bool]:
    return number, False


def train_iterator(
    config: DataConfig, fingerprint: str, *, batch_size: int, seed: int, share: loading.Share = loading.WHOLE
) -> grain.DatasetIterator:
    """Returns an endless iterator over cached latents, otherwise as `loading.train_iterator`.

    Raises:
      InputError: this autoencoder has not encoded the data set, or as `loading.train_iterator`.
    """
    load = _open(config, fingerprint, "train")
    dataset = loading.shuffled(range(len(load.records)), seed)
    dataset = dataset.random_map(_MirrorHalf()) if config.flip else dataset.map(_as_it_is)
    batches = loading.dealt(dataset, batch_size, share).map(load)
    return iter(batches.to_iter_dataset(loading.read_options(config)))


def eval_batches(
    config: DataConfig, fingerprint: str, split: str, *, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Returns one pass over cached latents, otherwise as `loading.eval_batches`.

    Raises:
      InputError: this autoencoder has not encoded the data set, or it has no such split.
    """
    load = _open(config, fingerprint, split)
    dataset = grain.MapDataset.source(range(len(load.records))[:limit]).map(_as_it_is)
    batches = dataset.batch(batch_size, drop_remainder=False).map(load)
    return iter(batches.to_iter_dataset(loading.read_options(config)))
