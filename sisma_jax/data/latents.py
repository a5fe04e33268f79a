"""A cache of latents: the output of an autoencoder for each image of a data set, computed once and stored as shards.

    CACHE/latents/VARIANT/1.0.0/     shards, and latents.json with the autoencoder's fingerprint and latent statistics

A record holds the mean and the log variance of the latents, float16, for the image and for the flipped image. They are
scaled and shifted as the denoiser expects. The record also holds the mask and the flipped mask, compressed with zlib,
which decodes four times as fast as PNG. A batch is {"moments": float16 (b, h, w, 2 C), "mask": uint8 (b, S, S),
"id": int64 (b,)}, where the first C channels of the moments are the mean.
"""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from sisma_jax.config import DataConfig
from sisma_jax.data import shards
from sisma_jax.data.dataset import Batch, BatchSource, DataSet, Record
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path, write_atomically

NAME = "latents"
STATISTICS_NAME = "latents.json"
EXAMPLES_PER_SHARD = 1024
# Enough examples to estimate a standard deviation to two digits.
_EXAMPLES_MEASURED = 2048

_BYTES = tfds.features.Tensor(shape=(), dtype=np.object_)
_FEATURES = {name: _BYTES for name in ("moments", "mirrored_moments", "mask", "mirrored_mask")} | {"id": np.int64}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The parts of an autoencoder that the cache needs.

    Attributes:
      encode: function from uint8 images (batch_size, S, S, 3) to moments, float16 (batch_size, h, w, 2 C): mean and log
        variance of the latents, scaled and shifted.
      batch_size: number of images per call of `encode`.
      fingerprint: hash that identifies the autoencoder; part of the name of the cache folder.
      scale: scale that `encode` applies to the latents, recorded in `latents.json`.
      shift: shift that `encode` applies to the latents, recorded in `latents.json`.
    """

    encode: Callable[[np.ndarray], np.ndarray]
    batch_size: int
    fingerprint: str
    scale: float
    shift: float


class LatentDataSet(BatchSource):
    """The latents of a data set; a batch holds "moments", "mask" and "id".

    Attributes:
      statistics: contents of `latents.json`: the autoencoder's fingerprint, scale and shift, the shapes of one example,
        and mean and standard deviation of each latent channel.
    """

    key = "moments"

    def __init__(self, config: DataConfig, path: AnyPath):
        """Reads the metadata of the complete shards in `path`; use `prepare` or `open` instead.

        Raises:
          InputError: `latents.json` cannot be read.
        """
        self.statistics = _read_statistics(path)
        super().__init__(config, path)

    @classmethod
    def prepare(cls, dataset: DataSet, encoder: Encoder) -> "LatentDataSet":
        """Returns the latents after encoding the data set, unless they exist. Resumes after an interruption.

        Raises:
          InputError: the cache folder cannot be written, or it is in a bucket that does not hold the latents.
        """
        return cls(dataset.config, shards.build(_recipe(dataset, encoder), to_path(dataset.config.cache_dir)))

    @classmethod
    def open(cls, dataset: DataSet, fingerprint: str) -> "LatentDataSet":
        """Returns the latents that `prepare` has encoded.

        Args:
          dataset: the data set that was encoded.
          fingerprint: fingerprint of the autoencoder.

        Raises:
          InputError: the latents do not exist, cannot be read, or are those of another autoencoder.
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

    def _to_examples(self, records: grain.MapDataset[int], *, flip: bool) -> grain.MapDataset[Record]:
        return records.random_map(_RandomFlip()) if flip else records.map(_unflipped)

    def _finish(self, batches: grain.MapDataset[Record], split: str) -> grain.MapDataset[Batch]:
        shapes = (tuple(self.statistics[name]) for name in ("moments_shape", "mask_shape"))
        source = self._reader.as_data_source(split)  # pyright: ignore[reportCallIssue]  # TFDS: decorator
        return batches.map(_Load(source.data_source, *shapes))


def _recipe(dataset: DataSet, encoder: Encoder) -> shards.ShardRecipe:
    return shards.ShardRecipe(
        name=NAME,
        variant=_variant(dataset, encoder.fingerprint),
        features=tfds.features.FeaturesDict(_FEATURES),
        jobs={
            split: [
                functools.partial(_encode, dataset, encoder, split, start, min(start + EXAMPLES_PER_SHARD, count))
                for start in range(0, count, EXAMPLES_PER_SHARD)
            ]
            for split, count in dataset.counts.items()
        },
        num_records=sum(dataset.counts.values()),
        information={"description": f"Latents of {dataset.config.name}."},
        finish=functools.partial(_write_statistics, dataset.config.image_size, encoder),
        in_process=True,
    )


def _variant(dataset: DataSet, fingerprint: str) -> str:
    variant = dataset.path.parent
    return f"{variant.parent.name}-{variant.name}-{dataset.config.image_size}px-{fingerprint}"


def _encode(dataset: DataSet, encoder: Encoder, split: str, start: int, stop: int) -> Iterator[dict[str, Any]]:
    for batch in dataset.eval_batches(split, encoder.batch_size, start=start, limit=stop - start):
        # The last batch is padded, so that `encode` compiles for one shape only.
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


def _write_statistics(size: int, encoder: Encoder, folder: Path) -> None:
    """Writes `latents.json`: the autoencoder, the shapes, and statistics of latents of the training split."""
    shape = encoder.encode(np.zeros((encoder.batch_size, size, size, 3), np.uint8)).shape[1:]
    with ArrayRecordDataSource(sorted(map(str, folder.glob(f"{NAME}-train.*")))) as records:
        moments = np.stack(
            [
                np.frombuffer(_bytes_in(_parse(record), "moments"), np.float16).reshape(shape)
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
    """Loads the records of a batch, given their indices and whether each is flipped.

    It reads a whole batch at a time and parses the protocol buffers itself. Reading records one at a time through the
    parser of TFDS yields half as many examples per second because of overhead in Python (see `benchmarks/data.py`).
    """

    def __init__(self, records: ArrayRecordDataSource, moments_shape: tuple[int, ...], mask_shape: tuple[int, ...]):
        self._records, self._moments_shape, self._mask_shape = records, moments_shape, mask_shape

    def map(self, element: Batch) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]  # Grain: untyped
        indices, flipped = element["index"], element["is_flipped"]
        moments = np.empty((len(indices), *self._moments_shape), np.float16)
        mask = np.empty((len(indices), *self._mask_shape), np.uint8)
        ids = np.empty(len(indices), np.int64)
        for i, record in enumerate(self._records.__getitems__(indices.tolist())):
            fields = _parse(record)
            prefix = "mirrored_" if flipped[i] else ""
            moments[i] = np.frombuffer(_bytes_in(fields, f"{prefix}moments"), np.float16).reshape(self._moments_shape)
            labels = zlib.decompress(_bytes_in(fields, f"{prefix}mask"), bufsize=mask[i].size)
            mask[i] = np.frombuffer(labels, np.uint8).reshape(self._mask_shape)
            ids[i] = fields["id"].int64_list.value[0]
        return {"moments": moments, "mask": mask, "id": ids}


def _parse(record: bytes) -> Mapping[str, Any]:
    """Returns the fields of a record by name, as protocol buffers `tf.train.Feature`."""
    message = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]  # protobuf creates it at import
    return message.FromString(record).features.feature


def _bytes_in(fields: Mapping[str, Any], name: str) -> bytes:
    return fields[name].bytes_list.value[0]


class _RandomFlip(grain.transforms.RandomMap):
    """Maps the index of a record to the index, and a flag that selects the flipped image with probability 0.5."""

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]  # Grain: untyped
        self, element: int, rng: np.random.Generator
    ) -> Record:
        return {"index": element, "is_flipped": rng.random() >= 0.5}


def _unflipped(index: int) -> Record:
    return {"index": index, "is_flipped": False}
