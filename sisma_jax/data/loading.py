"""From prepared shards to batches: Grain shuffles, decodes, resizes, mirrors, shards by process and batches.

A record is a dict. It leaves the disk as {"image": bytes, "mask": bytes, "id": int} and reaches the device as
{"image": uint8 (b, S, S, 3), "mask": uint8 (b, S, S), "id": int64 (b,)}; the transforms between are record in,
record out.
"""

import contextlib
import fcntl
import functools
import io
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from sisma_jax.config import DataConfig
from sisma_jax.data import celebamask_hq, images, labels, synthetic_faces
from sisma_jax.errors import InputError

Record = dict

_BUILDERS = {"synthetic_faces": synthetic_faces.builder, "celebamask_hq": celebamask_hq.builder}

# ArrayRecord reports a full disk as a RuntimeError: "write() failed: No space left on device; writing ...".
_ARRAY_RECORD_FAILURE = re.compile(r"[a-z]+\(\) failed: ")


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
    cache_dir = Path(config.cache_dir).expanduser()
    _builder.cache_clear()
    with _naming_cache_dir(config):
        # TFDS builds in a folder beside this one and renames it at the end: if it exists, it is complete.
        if _builder(config).data_path.exists():
            return
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Processes that share the folder wait here for the first of them to build.
        with (cache_dir / ".prepare.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # A builder knows what was on disk when it was made.
            _builder.cache_clear()
            builder = _builder(config)
            if builder.data_path.exists():
                return
            for abandoned in builder.data_path.parent.glob("incomplete.*"):
                shutil.rmtree(abandoned)
            tfds.display_progress_bar(sys.stderr.isatty())
            # TFDS announces downloads on stdout, of which there are none.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


@contextlib.contextmanager
def _naming_cache_dir(config: DataConfig) -> Iterator[None]:
    """Turns failures to write into InputErrors that name the folder, and unwraps those that TFDS has wrapped."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            if isinstance(cause, OSError) or _ARRAY_RECORD_FAILURE.match(str(cause)):
                raise InputError(
                    f"--data.cache_dir {config.cache_dir} cannot be written ({cause}); free some space or name "
                    "another folder."
                ) from error
            cause = cause.__cause__
        raise


@functools.lru_cache(maxsize=8)
def _builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    # TFDS warns that the builder's config is none of its own.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        return _BUILDERS[config.name](config)
    finally:
        logging.set_verbosity(verbosity)


def _prepared(config: DataConfig, split: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a prepared data set that has the split."""
    builder = _builder(config)
    if not builder.data_path.exists():
        raise InputError(
            f"{config.name} is not prepared in --data.cache_dir {config.cache_dir}; run the `prepare` command first."
        )
    if split not in builder.info.splits:
        raise InputError(f"{config.name} has no split {split!r}; it has {', '.join(builder.info.splits)}.")
    return builder


def _source(config: DataConfig, split: str) -> Sequence[Record]:
    """Returns the encoded records of a split: random access, safe to share among threads."""
    skip = tfds.decode.SkipDecoding
    return _prepared(config, split).as_data_source(split, decoders={"image": skip(), "mask": skip()})


def num_examples(config: DataConfig, split: str) -> int:
    """Returns the number of examples in a split of a prepared data set.

    Raises:
      InputError: the data set is not prepared, or has no such split.
    """
    return _prepared(config, split).info.splits[split].num_examples


def train_iterator(
    config: DataConfig, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Returns an endless iterator over this process's part of the training batches.

    Every epoch goes through all examples in a new order. The order and the flips belong to the place in the global
    sequence, which the processes deal out in turn: the k-th global batch is the same set for any `process_count`, and
    an iterator's state (`get_state`, `set_state`: one counter) means the same batch for each. A batch may straddle
    two epochs, so a data set smaller than a batch is no obstacle.

    Args:
      config: what to read; `prepare` must have built it.
      batch_size: examples in a global batch; b = batch_size // process_count.
      seed: of the order and the flips, 0 to 2**32 - 1.
      process_index: 0 to process_count - 1.
      process_count: number of processes that share a global batch.

    Raises:
      InputError: the data set is not prepared, or the batch does not divide among the processes.
    """
    if batch_size % process_count:
        raise InputError(
            f"--train.batch_size {batch_size} is not a multiple of the number of processes, {process_count}."
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"--train.seed must be in 0..2**32 - 1, got {seed}.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0..process_count - 1 = {process_count - 1}")
    dataset = grain.MapDataset.source(_source(config, "train")).seed(seed).shuffle().repeat()
    dataset = dataset.map(Decode(config.image_size)).map(Resize(config.image_size))
    if config.flip:
        dataset = dataset.random_map(RandomFlip())
    # Access is random, so what comes before the slice is computed for this process's examples only, yet keyed by
    # their global index.
    dataset = dataset[process_index::process_count].batch(batch_size // process_count, drop_remainder=True)
    return iter(dataset.to_iter_dataset(_read_options(config)))


def eval_batches(
    config: DataConfig, split: str, *, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Returns one pass over a split in the order of the ids, unmirrored; the last batch may be smaller.

    Args:
      config: what to read; `prepare` must have built it.
      split: "train", "test", or "val" where the data set has one.
      batch_size: examples in a batch.
      limit: stop after this many examples.

    Raises:
      InputError: the data set is not prepared, or has no such split.
    """
    dataset = grain.MapDataset.source(_source(config, split))[:limit]
    dataset = dataset.map(Decode(config.image_size)).map(Resize(config.image_size))
    dataset = dataset.batch(batch_size, drop_remainder=False)
    return iter(dataset.to_iter_dataset(_read_options(config)))


def _read_options(config: DataConfig) -> grain.ReadOptions:
    # The elements are whole batches, so Grain's default buffer of 500 would hold gigabytes.
    return grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=2 * config.num_threads)
