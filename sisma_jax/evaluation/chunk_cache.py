"""A cache of arrays that are computed chunk by chunk, so that an interrupted evaluation resumes.

Each chunk of images is one file, named by a hash of everything on which its arrays depend. The processes of a job share
the chunks among them. A process that does not see the file of another one, because its disk is not shared or the folder
cannot be written, computes the chunk itself.
"""

import hashlib
import io
import logging
import zipfile
import zlib
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from sisma_jax.files import AnyPath, bucket_errors, to_npz, write_atomically
from sisma_jax.parallel.agreement import is_primary, together

logger = logging.getLogger(__name__)

IMAGES_PER_CHUNK = 512
"""Images per file of the cache: an interruption loses at most the work of one file."""

Arrays = dict[str, np.ndarray]


def compute(
    meaning: tuple[object, ...],
    count: int,
    make: Callable[[int, int], Arrays],
    *,
    cache: AnyPath | None,
    title: str,
    unit: str = "image",
) -> Arrays:
    """Returns arrays with one row per image, computed in chunks or read from the cache.

    Every process of a job must call this. With a cache, each one computes a part of the chunks.

    Args:
      meaning: everything on which the arrays depend; its `repr` identifies the chunks.
      count: number of images.
      make: (start, stop) -> arrays by name, each with stop - start rows.
      cache: folder for the chunks, which is created; None: nothing is kept, and every process computes everything.
      title: of the progress bar.
      unit: what the progress bar counts.

    Raises:
      InputError: an image cannot be read.
    """
    ranges = [(start, min(start + IMAGES_PER_CHUNK, count)) for start in range(0, count, IMAGES_PER_CHUNK)]
    chunks: list[Arrays | None] = [None] * len(ranges)
    share = range(len(ranges)) if cache is None else range(jax.process_index(), len(ranges), jax.process_count())
    hidden, can_write = None if is_primary() else True, True
    with together(), tqdm(total=count, desc=title, unit=unit, disable=hidden) as progress:
        for index in share:
            start, stop = ranges[index]
            file = None if cache is None else cache / _file_name(meaning, start, stop)
            chunk = None if file is None else _read(file, stop - start)
            if chunk is None:
                chunk = make(start, stop)
                if file is not None and can_write:
                    can_write = _write(file, chunk)
            chunks[index] = chunk
            progress.update((stop - start) * (1 if cache is None else jax.process_count()))
    with together():
        complete = [
            _of_another_process(cache, meaning, span, make) if chunk is None else chunk
            for span, chunk in zip(ranges, chunks, strict=True)
        ]
    return {name: np.concatenate([chunk[name] for chunk in complete]) for name in complete[0]}


def _of_another_process(
    cache: AnyPath | None, meaning: tuple[object, ...], span: tuple[int, int], make: Callable[[int, int], Arrays]
) -> Arrays:
    chunk = None if cache is None else _read(cache / _file_name(meaning, *span), span[1] - span[0])
    return make(*span) if chunk is None else chunk


def _file_name(meaning: tuple[object, ...], start: int, stop: int) -> str:
    return f"{hashlib.sha256(repr((*meaning, start, stop)).encode()).hexdigest()[:24]}.npz"


def _write(file: AnyPath, chunk: Arrays) -> bool:
    """Writes a chunk, and returns whether it could be written."""
    try:
        with bucket_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, to_npz(chunk))
    except OSError as error:
        logger.warning("%s cannot be written (%s); what is computed is not kept.", file.parent, error)
        return False
    return True


def _read(file: AnyPath, count: int) -> Arrays | None:
    """Returns the arrays in a file of the cache; None if there is no such file, or it is damaged."""
    try:
        with bucket_errors(file), np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as content:
            chunk = dict(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s); its values are computed again.", file, error)
        return None
    return chunk if chunk and all(len(array) == count for array in chunk.values()) else None
