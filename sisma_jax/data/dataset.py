"""Reads batches from prepared shards with Grain: shuffles, decodes, resizes, flips and batches records.

Each process reads its own rows of every batch.

A record is a dict. On disk it is {"image": bytes, "mask": bytes, "id": int}. A batch on the device is
{"image": uint8 (b, S, S, 3), "mask": uint8 (b, S, S), "id": int64 (b,)}. Each transform in between maps a record to a
record.

Each value of `config.name` is the name of a module `sisma_jax/data/NAME.py`. The module defines `recipe(config)`, which
returns a `shards.ShardRecipe`. It may also define `find_copy(config, cache_dir)`, for hosts that have a copy of the
shards but not the raw files. `find_copy` returns the folder of the copy, or None if the raw files exist or there is no
copy.
"""

import abc
import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, ClassVar

import grain
import numpy as np
import tensorflow_datasets as tfds

from sisma_jax.config import DataConfig
from sisma_jax.data import masks, photos, shards
from sisma_jax.data.classes import ClassSet
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path

Record = dict[str, Any]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of each global batch that one process reads.

    A global batch is divided into `of` equal parts. The process reads some of these parts.

    Attributes:
      parts: indices of the parts that the process reads, in increasing order.
      of: number of parts in a global batch.
    """

    parts: tuple[int, ...]
    of: int


WHOLE = Share((0,), 1)


class Decode(grain.transforms.Map):
    """Decodes the image to uint8 (H, W, 3) and the mask to uint8 (H, W).

    Args:
      classes: class set of the masks.
      size_needed: resolution to which the caller resizes the image; a large JPEG is then decoded at half size.
    """

    def __init__(self, classes: ClassSet, size_needed: int | None = None):
        self._classes, self._size_needed = classes, size_needed

    def map(self, element: Record) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]  # Grain: untyped
        """Returns the record with decoded image and mask.

        Raises:
          InputError: the image or the mask is damaged.
        """
        source = f"record {element['id']}"
        return element | {
            "image": photos.decode_image(element["image"], source, size_needed=self._size_needed),
            "mask": masks.decode_mask(element["mask"], source, self._classes),
        }


class Resize(grain.transforms.Map):
    """Crops image and mask to their central squares and resizes both to (size, size)."""

    def __init__(self, size: int):
        self._size = size

    def map(self, element: Record) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]  # Grain: untyped
        """Returns the record with resized image and mask."""
        return element | {
            "image": photos.resize_image(element["image"], self._size),
            "mask": masks.resize_mask(element["mask"], self._size),
        }


class RandomFlip(grain.transforms.RandomMap):
    """Flips image and mask horizontally with probability 0.5, and exchanges the mirrored classes of a flipped mask."""

    def __init__(self, classes: ClassSet):
        self._classes = classes

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]  # Grain: untyped
        self, element: Record, rng: np.random.Generator
    ) -> Record:
        """Returns the record, flipped or unchanged."""
        if rng.random() < 0.5:
            return element
        return element | {"image": element["image"][:, ::-1], "mask": self._classes.flip(element["mask"])}


class BatchSource(abc.ABC):
    """Prepared shards that yield batches; the base class of `DataSet` and `LatentDataSet`.

    Attributes:
      config: configuration with which the data set was opened.
      path: folder of the shards; it may be a copy from a host that has the raw files.
      classes: class set of the masks.
      counts: number of examples in each split.
      key: key in a batch of the array that a model learns to generate.
    """

    key: ClassVar[str]

    def __init__(self, config: DataConfig, path: AnyPath):
        """Reads the metadata of the complete shards in `path`."""
        self.config = config
        self.path = path
        self.classes = config.classes
        self._reader = shards.read(path)
        self.counts: dict[str, int] = {name: info.num_examples for name, info in self._reader.info.splits.items()}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.counts)

    def train_batches(self, batch_size: int, seed: int, share: Share = WHOLE) -> grain.DatasetIterator[Batch]:
        """Returns an endless iterator over the training batches, or over the rows of each batch that `share` selects.

        Each epoch visits all examples in a new order. The order and the flips depend only on the seed and on the
        position in the global sequence, so row i of global batch k is the same example for every `share`. The state of
        an iterator (`get_state`, `set_state`) is a single counter, which identifies the same global batch for every
        `share`. A batch may span epochs, so `batch_size` may exceed the number of examples.

        Args:
          batch_size: number of examples in a global batch.
          seed: seed of the order and the flips, in [0, 2**32 - 1].
          share: rows of each global batch that the iterator yields; by default all.

        Returns:
          Iterator over dicts of arrays, each with batch_size * len(share.parts) // share.of rows.

        Raises:
          InputError: `seed` is out of range, or `batch_size` is not a multiple of `share.of`.
        """
        if not 0 <= seed < 2**32:
            raise InputError(f"train.seed must be in 0..2**32 - 1, got {seed}.")
        if batch_size % share.of:
            raise InputError(
                f"train.batch_size {batch_size} is not a multiple of the {share.of} parts into which each batch is "
                f"divided; choose a multiple of {share.of}."
            )
        records = grain.MapDataset.source(self._records("train")).seed(seed).shuffle().repeat()
        examples = self._to_examples(records, flip=self.config.flip)
        return self._read(_deal(examples, batch_size, share), "train")

    def eval_batches(self, split: str, batch_size: int, *, start: int = 0, limit: int | None = None) -> Iterator[Batch]:
        """Returns an iterator over one pass of a split, in order of id and without flips, as dicts of arrays.

        Args:
          split: one of `splits`.
          batch_size: number of examples per batch; the last batch may be smaller.
          start: index of the first example, 0 <= start.
          limit: maximum number of examples; None for all that follow `start`.

        Raises:
          InputError: the data set has no split of this name.
        """
        if split not in self.counts:
            raise InputError(f"{self.config.name} has no split {split!r}; it has {', '.join(self.splits)}.")
        stop = None if limit is None else start + limit
        records = grain.MapDataset.source(self._records(split))[start:stop]
        return self._read(self._to_examples(records, flip=False).batch(batch_size, drop_remainder=False), split)

    def _read(self, batches: grain.MapDataset[Record], split: str) -> grain.DatasetIterator[Batch]:
        threads = self.config.num_threads
        # Each element is a batch: Grain's default buffer of 500 elements would take gigabytes.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(self._finish(batches, split).to_iter_dataset(options))

    @abc.abstractmethod
    def _records(self, split: str) -> Sequence[Any]:
        """Returns the elements to shuffle, one per example; a subclass chooses their type."""

    @abc.abstractmethod
    def _to_examples(self, records: grain.MapDataset[Any], *, flip: bool) -> grain.MapDataset[Record]:
        """Maps each element of `_records` to an example, a dict of arrays or numbers that can be batched."""

    def _finish(self, batches: grain.MapDataset[Record], split: str) -> grain.MapDataset[Batch]:
        """Maps batched examples to the batches that the iterators yield."""
        return batches


class DataSet(BatchSource):
    """A data set of images and masks; a batch holds "image", "mask" and "id"."""

    key = "image"

    @classmethod
    def prepare(cls, config: DataConfig) -> "DataSet":
        """Returns the data set after building its shards, unless they exist. Resumes an interrupted build.

        Raises:
          InputError: the raw files are missing or damaged, the cache folder cannot be written, or the cache is in a
            bucket that does not hold the shards.
        """
        module, cache_dir = _module(config), to_path(config.cache_dir)
        path = _find_copy(module, config, cache_dir)
        if path is not None:
            shards.check_skipped(path, config.skip_damaged)
        else:
            path = shards.build(module.recipe(config), cache_dir, skip_damaged=config.skip_damaged)
        return cls(config, path)

    @classmethod
    def open(cls, config: DataConfig) -> "DataSet":
        """Returns the data set whose shards `prepare` has built.

        Raises:
          InputError: the shards do not exist, or the raw files cannot be listed.
        """
        module, cache_dir = _module(config), to_path(config.cache_dir)
        path = _find_copy(module, config, cache_dir) or module.recipe(config).path(cache_dir)
        if not shards.exist(path):
            raise InputError(
                f"{config.name} is not prepared in data.cache_dir {config.cache_dir}; run the `prepare` command first."
            )
        return cls(config, path)

    def _records(self, split: str) -> Sequence[Record]:
        skip = {"image": tfds.decode.SkipDecoding(), "mask": tfds.decode.SkipDecoding()}
        return self._reader.as_data_source(split, decoders=skip)  # pyright: ignore[reportCallIssue]  # TFDS: decorator

    def training_masks(self, limit: int) -> Iterator[np.ndarray]:
        """Yields masks of the training split, uint8 (S, S), evenly spaced over it.

        Args:
          limit: largest number of masks.
        """
        records = self._records("train")
        for index in np.linspace(0, len(records) - 1, min(limit, len(records))).astype(int).tolist():
            record = records[index]
            mask = masks.decode_mask(record["mask"], f"record {record['id']}", self.classes)
            yield masks.resize_mask(mask, self.config.image_size)

    def _to_examples(self, records: grain.MapDataset[Record], *, flip: bool) -> grain.MapDataset[Record]:
        size = self.config.image_size
        examples = records.map(Decode(self.classes, size)).map(Resize(size))
        return examples.random_map(RandomFlip(self.classes)) if flip else examples


def _module(config: DataConfig) -> ModuleType:
    return importlib.import_module(f"sisma_jax.data.{config.name}")


def _find_copy(module: ModuleType, config: DataConfig, cache_dir: AnyPath) -> AnyPath | None:
    return module.find_copy(config, cache_dir) if hasattr(module, "find_copy") else None


def _deal(examples: grain.MapDataset[Record], batch_size: int, share: Share) -> grain.MapDataset[Record]:
    """Batches endless examples into global batches, and returns the rows of each that `share` selects."""
    share = _merge_parts(share)
    parts = examples.batch(batch_size // share.of, drop_remainder=True)
    # A MapDataset has random access. The transforms before the slice therefore run only for the examples of this share,
    # and their random numbers follow from the global index. The cut gives all slices the same length.
    parts = parts[: len(parts) - len(parts) % share.of]
    own = [parts[part :: share.of] for part in share.parts]
    return own[0] if len(own) == 1 else grain.experimental.ZipMapDataset(own).map(_concatenate)


def _merge_parts(share: Share) -> Share:
    """Returns an equal share with a single part if there is one: parts 2 and 3 of 4 are part 1 of 2."""
    first, count = share.parts[0], len(share.parts)
    is_one = share.parts == tuple(range(first, first + count)) and first % count == 0 and share.of % count == 0
    return Share((first // count,), share.of // count) if is_one else share


def _concatenate(parts: tuple[Record, ...]) -> Record:
    """Returns one batch with the rows of all parts."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
