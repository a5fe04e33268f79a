"""From prepared shards to batches: Grain shuffles, decodes, resizes, mirrors, shards by process and batches.

A record is a dict. It leaves the disk as {"image": bytes, "mask": bytes, "id": int} and reaches the device as
{"image": uint8 (b, S, S, 3), "mask": uint8 (b, S, S), "id": int64 (b,)}; the transforms between are record in,
record out.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds

from sisma_jax.config import DataConfig
from sisma_jax.data import celebamask_hq, images, labels, shards, synthetic_faces
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, to_path

Record = dict

_DATA_SETS = {"synthetic_faces": synthetic_faces.dataset, celebamask_hq.NAME: celebamask_hq.dataset}

# ArrayRecord reports a full disk as a RuntimeError: "write() failed: No space left on device; writing ...".
_ARRAY_RECORD_FAILURE = re.compile(r"[a-z]+\(\) failed: ")


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

    def __init__(self, size_needed: int | None = None):
        self._size_needed = size_needed

    def map(self, record: Record) -> Record:
        source = f"record {record['id']}"
        return record | {
            "image": images.decode_image(record["image"], source, size_needed=self._size_needed),
            "mask": images.decode_mask(record["mask"], source),
        }


class Resize(grain.transforms.Map):
    """The central square of image and mask at `size` pixels a side."""

    def __init__(self, size: int):
        self._size = size

    def map(self, record: Record) -> Record:
        return record | {
            "image": images.resize_image(record["image"], self._size),
            "mask": images.resize_mask(record["mask"], self._size),
        }


class RandomFlip(grain.transforms.RandomMap):
    """Mirrors every other record at random, and exchanges the left and right classes of its mask."""

    def random_map(self, record: Record, rng: np.random.Generator) -> Record:
        if rng.random() < 0.5:
            return record
        return record | {"image": record["image"][:, ::-1], "mask": labels.flip_mask(record["mask"])}


def prepare(config: DataConfig) -> None:
    """Builds the shards that `config` reads, unless they exist; safe to call again, also after an interruption.

    Raises:
      InputError: the raw files are missing or damaged, or the cache folder cannot be written.
    """
    _prepared.cache_clear()
    if _copied(config):
        return
    with naming_cache_dir(config):
        shards.build(_DATA_SETS[config.name](config), cache_dir_of(config), skip_damaged=config.skip_damaged)


def cache_dir_of(config: DataConfig) -> AnyPath:
    """Returns the folder that holds prepared data sets."""
    return to_path(config.cache_dir).expanduser()


@contextlib.contextmanager
def naming_cache_dir(config: DataConfig) -> Iterator[None]:
    """Turns failures to write into InputErrors that name the folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _ARRAY_RECORD_FAILURE.match(str(error)):
            raise
        raise InputError(
            f"--data.cache_dir {config.cache_dir} cannot be written ({error}); free some space or name another folder."
        ) from error


def location(config: DataConfig) -> AnyPath:
    """Returns the folder of the prepared data set, which may be a copy from a host that had the raw files.

    Raises:
      InputError: it is not prepared, or the raw files cannot be listed.
    """
    path = _copied(config) or _DATA_SETS[config.name](config).path(cache_dir_of(config))
    if not shards.exist(path):
        raise InputError(
            f"{config.name} is not prepared in --data.cache_dir {config.cache_dir}; run the `prepare` command first."
        )
    return path


def _copied(config: DataConfig) -> AnyPath | None:
    return celebamask_hq.copied(config, cache_dir_of(config)) if config.name == celebamask_hq.NAME else None


# The listing of a large raw folder takes seconds.
@functools.lru_cache(maxsize=8)
def _prepared(config: DataConfig) -> tfds.core.DatasetBuilder:
    return shards.read(location(config))


def split_of(builder: tfds.core.DatasetBuilder, split: str) -> tfds.core.SplitInfo:
    """Returns what is known of a split. Raises InputError if the data set has none of this name."""
    if split not in builder.info.splits:
        raise InputError(f"{builder.name} has no split {split!r}; it has {', '.join(builder.info.splits)}.")
    return builder.info.splits[split]


def source(config: DataConfig, split: str) -> Sequence[Record]:
    """Returns the encoded records of a split: random access, safe to share among threads.

    Raises:
      InputError: the data set is not prepared, or has no such split.
    """
    builder, skip = _prepared(config), tfds.decode.SkipDecoding
    split_of(builder, split)
    return builder.as_data_source(split, decoders={"image": skip(), "mask": skip()})


def num_examples(config: DataConfig, split: str) -> int:
    """Returns the number of examples in a split of a prepared data set.

    Raises:
      InputError: the data set is not prepared, or has no such split.
    """
    return split_of(_prepared(config), split).num_examples


def splits(config: DataConfig) -> tuple[str, ...]:
    """Returns the names of a prepared data set's splits."""
    return tuple(_prepared(config).info.splits)


def train_iterator(config: DataConfig, *, batch_size: int, seed: int, share: Share = WHOLE) -> grain.DatasetIterator:
    """Returns an endless iterator over a share of the training batches, by default all of each.

    Every epoch goes through all examples in a new order. The order and the flips belong to the place in the global
    sequence: row i of the k-th global batch is the same example whatever the share that reads it, and an iterator's
    state (`get_state`, `set_state`: one counter) means the same batch for each. A batch may straddle two epochs, so a
    data set smaller than a batch is no obstacle.

    Args:
      config: what to read; `prepare` must have built it.
      batch_size: examples in a global batch.
      seed: of the order and the flips, 0 to 2**32 - 1.
      share: of each batch, with b = batch_size * len(share.parts) // share.of.

    Raises:
      InputError: the data set is not prepared, or the batch does not divide into the parts.
    """
    dataset = shuffled(source(config, "train"), seed)
    dataset = dataset.map(Decode(config.image_size)).map(Resize(config.image_size))
    if config.flip:
        dataset = dataset.random_map(RandomFlip())
    batches = dealt(dataset, batch_size, share)
    return iter(batches.to_iter_dataset(read_options(config)))


def shuffled(records: Sequence[Record], seed: int) -> grain.MapDataset:
    """Returns the endless sequence of all epochs, each in an order of its own.

    Raises:
      InputError: the seed is not in 0..2**32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--train.seed must be in 0..2**32 - 1, got {seed}.")
    return grain.MapDataset.source(records).seed(seed).shuffle().repeat()


def dealt(dataset: grain.MapDataset, batch_size: int, share: Share) -> grain.MapDataset:
    """Returns a share of the global batches of an endless `dataset`.

    Raises:
      InputError: the batch does not divide into the parts.
    """
    if batch_size % share.of:
        raise InputError(f"--train.batch_size {batch_size} is not a multiple of the {share.of} parts that share it.")
    share = _widest(share)
    parts = dataset.batch(batch_size // share.of, drop_remainder=True)
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


def _joined(parts: tuple[Record | tuple[np.ndarray, ...], ...]) -> Record | tuple[np.ndarray, ...]:
    """Returns the rows of all parts."""
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def eval_batches(
    config: DataConfig, split: str, *, batch_size: int, start: int = 0, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Returns one pass over a split in the order of the ids, unmirrored; the last batch may be smaller.

    Args:
      config: what to read; `prepare` must have built it.
      split: "train", "test", or "val" where the data set has one.
      batch_size: examples in a batch.
      start: number of the first example.
      limit: stop after this many examples.

    Raises:
      InputError: the data set is not prepared, or has no such split.
    """
    stop = None if limit is None else start + limit
    dataset = grain.MapDataset.source(source(config, split))[start:stop]
    dataset = dataset.map(Decode(config.image_size)).map(Resize(config.image_size))
    dataset = dataset.batch(batch_size, drop_remainder=False)
    return iter(dataset.to_iter_dataset(read_options(config)))


def read_options(config: DataConfig) -> grain.ReadOptions:
    """Returns how many threads read ahead, and how far."""
    # The elements are whole batches, so Grain's default buffer of 500 would hold gigabytes.
    return grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=2 * config.num_threads)
