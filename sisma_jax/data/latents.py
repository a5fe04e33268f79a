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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from sisma_jax.config import DataConfig
from sisma_jax.data import labels, loading, shards
from sisma_jax.data.loading import Record
from sisma_jax.errors import InputError
from sisma_jax.files import write_atomically

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


def prepare(config: DataConfig, encoder: Encoder) -> Path:
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


@dataclasses.dataclass(frozen=True)
class _Cache:
    builder: tfds.core.DatasetBuilder
    moments_shape: tuple[int, ...]
    mask_shape: tuple[int, ...]

    def source(self, split: str) -> Sequence[Record]:
        loading.split_of(self.builder, split)
        return self.builder.as_data_source(split)


def _open(config: DataConfig, fingerprint: str) -> _Cache:
    path = loading.cache_dir_of(config) / NAME / _variant(config, fingerprint) / shards.VERSION
    if not path.exists():
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
    return _Cache(shards.read(path), tuple(statistics["moments_shape"]), tuple(statistics["mask_shape"]))


def read_statistics(path: Path) -> dict[str, Any]:
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


class _Decode:
    """Bytes to arrays, of the image or of its mirror image."""

    def __init__(self, cache: _Cache):
        self._moments_shape, self._mask_shape = cache.moments_shape, cache.mask_shape

    def __call__(self, record: Record, mirrored: bool = False) -> Record:
        prefix = "mirrored_" if mirrored else ""
        moments = np.frombuffer(record[f"{prefix}moments"], np.float16)
        mask = np.frombuffer(zlib.decompress(record[f"{prefix}mask"]), np.uint8)
        return {
            "moments": moments.reshape(self._moments_shape),
            "mask": mask.reshape(self._mask_shape),
            "id": record["id"],
        }


class _DecodeEither(_Decode, grain.transforms.RandomMap):
    """Mirrors every other record at random."""

    def random_map(self, record: Record, rng: np.random.Generator) -> Record:
        return self(record, mirrored=rng.random() >= 0.5)


def train_iterator(
    config: DataConfig, fingerprint: str, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Returns an endless iterator over cached latents, otherwise as `loading.train_iterator`.

    Raises:
      InputError: this autoencoder has not encoded the data set, or as `loading.train_iterator`.
    """
    cache = _open(config, fingerprint)
    dataset = loading.shuffled(cache.source("train"), seed)
    dataset = dataset.random_map(_DecodeEither(cache)) if config.flip else dataset.map(_Decode(cache))
    return loading.dealt(dataset, config, batch_size, process_index, process_count)


def eval_batches(
    config: DataConfig, fingerprint: str, split: str, *, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Returns one pass over cached latents, otherwise as `loading.eval_batches`.

    Raises:
      InputError: this autoencoder has not encoded the data set, or it has no such split.
    """
    cache = _open(config, fingerprint)
    dataset = grain.MapDataset.source(cache.source(split))[:limit].map(_Decode(cache))
    return iter(dataset.batch(batch_size, drop_remainder=False).to_iter_dataset(loading.read_options(config)))
