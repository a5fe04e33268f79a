"""From prepared shards to batches: Grain shuffles, decodes, resizes, mirrors, batches and shares them among processes.

A record is a dict. It leaves the disk as {"image": bytes, "mask": bytes, "id": int} and reaches the device as
{"image": uint8 (b, S, S, 3), "mask": uint8 (b, S, S), "id": int64 (b,)}; the transforms between are record in,
record out.

A data set that `config.name` may name is a module `sisma_jax/data/NAME.py`. Its function `recipe(config)` returns the
`shards.ShardRecipe`; if hosts without the raw files can use a copy of the shards, its function
`find_copy(config, cache_dir)` returns the folder of the copy, or None if the raw files are there or no copy is.
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


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of every batch that one process reads: some of its equal parts.

    Attributes:
      parts: numbers of the parts, rising.
      of: number of parts of a batch.
    """

    parts: tuple[int, ...]
    of: int


WHOLE = Share((0,), 1)


class Decode(grain.transforms.Map):
    """Encoded bytes to arrays: image uint8 (H, W, 3), mask uint8 (H, W)."""

    def __init__(self, classes: ClassSet, size_needed: int | None = None):
        self._classes, self._size_needed = classes, size_needed

    def map(self, record: Record) -> Record:
        source = f"record {record['id']}"
        return record | {
            "image": photos.decode_image(record["image"], source, size_needed=self._size_needed),
            "mask": masks.decode_mask(record["mask"], source, self._classes),
        }


class Resize(grain.transforms.Map):
    """The central square of image and mask at `size` pixels a side."""

    def __init__(self, size: int):
        self._size = size

    def map(self, record: Record) -> Record:
        return record | {
            "image": photos.resize_image(record["image"], self._size),
            "mask": masks.resize_mask(record["mask"], self._size),
        }


class RandomFlip(grain.transforms.RandomMap):
    """Mirrors half of the records at random, and exchanges the mirrored classes of their masks."""

    def __init__(self, classes: ClassSet):
        self._classes = classes

    def random_map(self, record: Record, rng: np.random.Generator) -> Record:
        if rng.random() < 0.5:
            return record
        return record | {"image": record["image"][:, ::-1], "mask": self._classes.flip(record["mask"])}


class BatchSource(abc.ABC):
    """Prepared shards and the batches in them: a `DataSet`, or its `LatentDataSet`.

    Attributes:
      config: what it was opened with.
      path: folder of the shards, which may be a copy from a host that had the raw files.
      classes: of the masks.
      counts: number of examples of each split.
      key: of that in a batch which a model learns to generate.
    """

    key: ClassVar[str]

    def __init__(self, config: DataConfig, path: AnyPath):
        """Reads the metadata of complete shards."""
        self.config = config
        self.path = path
        self.classes = config.classes
        self._reader = shards.read(path)
        self.counts: dict[str, int] = {name: info.num_examples for name, info in self._reader.info.splits.items()}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.counts)

    def train_batches(self, batch_size: int, seed: int, share: Share = WHOLE) -> grain.DatasetIterator:
        """Returns an endless iterator over a share of the training batches, by default all of each.

        Every epoch goes through all examples in a new order. The order and the flips belong to the place in the global
        sequence: row i of the k-th global batch is the same example whatever the share that reads it, and an iterator's
        state (`get_state`, `set_state`: one counter) means the same batch for each. A batch may straddle two epochs, so
        a data set smaller than a batch is no obstacle.

        Args:
          batch_size: examples in a global batch.
          seed: of the order and the flips, 0 to 2**32 - 1.
          share: of each batch, with b = batch_size * len(share.parts) // share.of.

        Raises:
          InputError: the seed is out of range, or the batch does not divide into the parts.
        """
        if not 0 <= seed < 2**32:
            raise InputError(f"train.seed must be in 0..2**32 - 1, got {seed}.")
        if batch_size % share.of:
            raise InputError(f"train.batch_size {batch_size} is not a multiple of the {share.of} parts that share it.")
        records = grain.MapDataset.source(self._records("train")).seed(seed).shuffle().repeat()
        examples = self._to_examples(records, flip=self.config.flip)
        return self._read(_deal(examples, batch_size, share), "train")

    def eval_batches(
        self, split: str, batch_size: int, *, start: int = 0, limit: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns one pass over a split in the order of the ids, unmirrored; the last batch may be smaller.

        Args:
          split: one of `splits`.
          batch_size: examples per batch.
          start: number of the first example.
          limit: stop after this many examples.

        Raises:
          InputError: there is no such split.
        """
        if split not in self.counts:
            raise InputError(f"{self.config.name} has no split {split!r}; it has {', '.join(self.splits)}.")
        stop = None if limit is None else start + limit
        records = grain.MapDataset.source(self._records(split))[start:stop]
        return self._read(self._to_examples(records, flip=False).batch(batch_size, drop_remainder=False), split)

    def _read(self, batches: grain.MapDataset, split: str) -> grain.DatasetIterator:
        threads = self.config.num_threads
        # The elements are whole batches, so Grain's default buffer of 500 would hold gigabytes.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(self._finish(batches, split).to_iter_dataset(options))

    @abc.abstractmethod
    def _records(self, split: str) -> Sequence:
        """Returns what is shuffled: one element per example."""

    @abc.abstractmethod
    def _to_examples(self, records: grain.MapDataset, *, flip: bool) -> grain.MapDataset:
        """Returns what each record becomes before it is batched: a dict of arrays or numbers."""

    def _finish(self, batches: grain.MapDataset, split: str) -> grain.MapDataset:
        """Returns what each batch becomes."""
        return batches


class DataSet(BatchSource):
    """A data set of images and masks; a batch holds "image", "mask" and "id"."""

    key = "image"

    @classmethod
    def prepare(cls, config: DataConfig) -> "DataSet":
        """Builds the shards unless they exist, and opens them; resumes a build that was interrupted.

        Raises:
          InputError: the raw files are missing or damaged, or the cache folder cannot be written.
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
        """Opens shards that `prepare` has built.

        Raises:
          InputError: there are none, or the raw files cannot be listed.
        """
        module, cache_dir = _module(config), to_path(config.cache_dir)
        path = _find_copy(module, config, cache_dir) or module.recipe(config).path(cache_dir)
        if not shards.exist(path):
            raise InputError(
                f"{config.name} is not prepared in data.cache_dir {config.cache_dir}; run the `prepare` command first."
            )
        return cls(config, path)

    def _records(self, split: str) -> Sequence[Record]:
        skip = tfds.decode.SkipDecoding
        return self._reader.as_data_source(split, decoders={"image": skip(), "mask": skip()})

    def _to_examples(self, records: grain.MapDataset, *, flip: bool) -> grain.MapDataset:
        size = self.config.image_size
        examples = records.map(Decode(self.classes, size)).map(Resize(size))
        return examples.random_map(RandomFlip(self.classes)) if flip else examples


def _module(config: DataConfig) -> ModuleType:
    return importlib.import_module(f"sisma_jax.data.{config.name}")


def _find_copy(module: ModuleType, config: DataConfig, cache_dir: AnyPath) -> AnyPath | None:
    return module.find_copy(config, cache_dir) if hasattr(module, "find_copy") else None


def _deal(examples: grain.MapDataset, batch_size: int, share: Share) -> grain.MapDataset:
    """Returns a share of the global batches of endless examples."""
    share = _widest(share)
    parts = examples.batch(batch_size // share.of, drop_remainder=True)
    # Access is random, so what comes before the slice is computed for this share's examples only, yet keyed by their
    # global index. All slices have one length.
    parts = parts[: len(parts) - len(parts) % share.of]
    own = [parts[part :: share.of] for part in share.parts]
    return own[0] if len(own) == 1 else grain.experimental.ZipMapDataset(own).map(_joined)


def _widest(share: Share) -> Share:
    """Returns the same rows as one part where they are one: parts 2 and 3 of 4 are part 1 of 2."""
    first, count = share.parts[0], len(share.parts)
    is_one = share.parts == tuple(range(first, first + count)) and first % count == 0 and share.of % count == 0
    return Share((first // count,), share.of // count) if is_one else share


def _joined(parts: tuple[Record, ...]) -> Record:
    """Returns the rows of all parts."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
