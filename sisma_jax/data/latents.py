"""The cache of encoded latents: a data set as an autoencoder encodes it, computed once.

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
from tensorflow_datasets.proto import tf_example_pb2

from sisma_jax.config import DataConfig
from sisma_jax.data import shards
from sisma_jax.data.dataset import BatchSource, DataSet
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path, write_atomically

NAME = "latents"
STATISTICS_NAME = "latents.json"
EXAMPLES_PER_SHARD = 1024
# Enough for two digits of a standard deviation, however much the images differ.
_EXAMPLES_MEASURED = 2048

_BYTES = tfds.features.Tensor(shape=(), dtype=np.object_)
_FEATURES = {name: _BYTES for name in ("moments", "mirrored_moments", "mask", "mirrored_mask")} | {"id": np.int64}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What the cache needs of an autoencoder.

    Attributes:
      encode: uint8 images (batch_size, S, S, 3) to moments, float16 (batch_size, h, w, 2 C).
      batch_size: images per call.
      fingerprint: distinguishes this autoencoder from others.
      scale, shift: that were applied to the moments; stored beside them.
    """

    encode: Callable[[np.ndarray], np.ndarray]
    batch_size: int
    fingerprint: str
    scale: float
    shift: float


class LatentDataSet(BatchSource):
    """The latents of a data set; a batch holds "moments", "mask" and "id".

    Attributes:
      statistics: what `latents.json` says.
    """

    key = "moments"

    def __init__(self, config: DataConfig, path: AnyPath):
        """Reads the metadata of complete shards; see `prepare` and `open`."""
        self.statistics = _read_statistics(path)
        super().__init__(config, path)

    @classmethod
    def prepare(cls, dataset: DataSet, encoder: Encoder) -> "LatentDataSet":
        """Encodes the data set unless this autoencoder has done so, and opens the latents; resumes after interruption.

        Raises:
          InputError: the cache folder cannot be written.
        """
        return cls(dataset.config, shards.build(_recipe(dataset, encoder), to_path(dataset.config.cache_dir)))

    @classmethod
    def open(cls, dataset: DataSet, fingerprint: str) -> "LatentDataSet":
        """Opens the latents that the autoencoder with a fingerprint has encoded.

        Raises:
          InputError: there are none, or they cannot be read.
        """
        config = dataset.config
        path = to_path(config.cache_dir) / NAME / _variant(dataset, fingerprint) / shards.VERSION
        if not shards.exist(path):
            raise InputError(
                f"There are no latents of {config.name} by this run's autoencoder ({fingerprint}) in "
                f"{path.parent.parent}; run the `latents` command first."
            )
        latents = cls(config, path)
        if latents.statistics["autoencoder"] != fingerprint:
            raise InputError(
                f"{path} holds latents of the autoencoder {latents.statistics['autoencoder']}, this run has "
                f"{fingerprint}; delete the folder and run the `latents` command."
            )
        return latents

    def _records(self, split: str) -> Sequence[int]:
        return range(self.counts[split])

    def _to_examples(self, records: grain.MapDataset, *, flip: bool) -> grain.MapDataset:
        return records.random_map(_MirrorHalf()) if flip else records.map(_unmirrored)

    def _finish(self, batches: grain.MapDataset, split: str) -> grain.MapDataset:
        shapes = (tuple(self.statistics[name]) for name in ("moments_shape", "mask_shape"))
        return batches.map(_Load(self._reader.as_data_source(split).data_source, *shapes))


def _recipe(dataset: DataSet, encoder: Encoder) -> shards.ShardRecipe:
    features = tfds.features.FeaturesDict(_FEATURES)
    return shards.ShardRecipe(
        name=NAME,
        variant=_variant(dataset, encoder.fingerprint),
        features=features,
        jobs={
            split: [
                functools.partial(_encode, dataset, encoder, split, start, min(start + EXAMPLES_PER_SHARD, count))
                for start in range(0, count, EXAMPLES_PER_SHARD)
            ]
            for split, count in dataset.counts.items()
        },
        num_records=sum(dataset.counts.values()),
        information={"description": f"Latents of {dataset.config.name}."},
        finish=functools.partial(_write_statistics, dataset.config.image_size, encoder, features),
        in_process=True,
    )


def _variant(dataset: DataSet, fingerprint: str) -> str:
    variant = dataset.path.parent
    return f"{variant.parent.name}-{variant.name}-{dataset.config.image_size}px-{fingerprint}"


def _encode(dataset: DataSet, encoder: Encoder, split: str, start: int, stop: int) -> Iterator[dict[str, Any]]:
    for batch in dataset.eval_batches(split, encoder.batch_size, start=start, limit=stop - start):
        # The last batch is padded, so that one shape compiles.
        image = np.resize(batch["image"], (encoder.batch_size, *batch["image"].shape[1:]))
        moments, mirrored = encoder.encode(image), encoder.encode(image[:, :, ::-1])
        for i, mask in enumerate(batch["mask"]):
            yield {
                "moments": moments[i].tobytes(),
                "mirrored_moments": mirrored[i].tobytes(),
                "mask": zlib.compress(mask.tobytes()),
                "mirrored_mask": zlib.compress(dataset.classes.flip(mask).tobytes()),
                "id": int(batch["id"][i]),
            }


def _write_statistics(size: int, encoder: Encoder, features: tfds.features.FeaturesDict, folder: Path) -> None:
    """Writes which autoencoder encoded the latents, and the statistics of those of the training split."""
    shape = encoder.encode(np.zeros((encoder.batch_size, size, size, 3), np.uint8)).shape[1:]
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
        "mask_shape": (size, size),
        "mean": mean.mean(axes).tolist(),
        "standard_deviation": np.sqrt(np.exp(log_variance).mean(axes) + mean.var(axes)).tolist(),
    }
    write_atomically(folder / STATISTICS_NAME, json.dumps(statistics, indent=2) + "\n")


def _read_statistics(path: AnyPath) -> dict[str, Any]:
    try:
        return json.loads((path / STATISTICS_NAME).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path / STATISTICS_NAME} cannot be read ({error}); delete {path} and run the `latents` command."
        ) from error


class _Load(grain.transforms.Map):
    """A batch of record numbers and of flags, whether the mirror image is meant, to the batch itself.

    Whole batches, and the records as protocol buffers: record by record and by the parser of TFDS, Python's own work
    leaves half as many examples per second (see `benchmarks/data.py`).
    """

    def __init__(self, records: ArrayRecordDataSource, moments_shape: tuple[int, ...], mask_shape: tuple[int, ...]):
        self._records, self._moments_shape, self._mask_shape = records, moments_shape, mask_shape

    def map(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        numbers, mirrored = batch["number"], batch["is_mirrored"]
        moments = np.empty((len(numbers), *self._moments_shape), np.float16)
        mask = np.empty((len(numbers), *self._mask_shape), np.uint8)
        ids = np.empty(len(numbers), np.int64)
        for i, record in enumerate(self._records.__getitems__(numbers.tolist())):
            fields = tf_example_pb2.Example.FromString(record).features.feature
            prefix = "mirrored_" if mirrored[i] else ""
            moments[i] = np.frombuffer(_bytes_in(fields, f"{prefix}moments"), np.float16).reshape(self._moments_shape)
            labels = zlib.decompress(_bytes_in(fields, f"{prefix}mask"), bufsize=mask[i].size)
            mask[i] = np.frombuffer(labels, np.uint8).reshape(self._mask_shape)
            ids[i] = fields["id"].int64_list.value[0]
        return {"moments": moments, "mask": mask, "id": ids}


def _bytes_in(fields: Any, name: str) -> bytes:
    return fields[name].bytes_list.value[0]


class _MirrorHalf(grain.transforms.RandomMap):
    """A record's number, and at random whether its mirror image is meant."""

    def random_map(self, number: int, rng: np.random.Generator) -> dict[str, int | bool]:
        return {"number": number, "is_mirrored": rng.random() >= 0.5}


def _unmirrored(number: int) -> dict[str, int | bool]:
    return {"number": number, "is_mirrored": False}
