"""Builds a data set as array_record shards that TFDS reads. Several processes write, and the build can be interrupted.

    CACHE/NAME/VARIANT/1.0.0/              the complete data set
    CACHE/NAME/VARIANT/1.0.0.incomplete/   a build in progress
        shards/                            finished shards; each is renamed into place
        done/                              one JSON file per finished shard, written after the shard

An interrupted build resumes with the shards that are not in `done`. The contents of a shard depend on its job alone, so
a resumed build is bit-identical to an uninterrupted one.

The workers do not use `multiprocessing`: its children import the caller's main module, and a fork is unsafe while JAX's
threads run. TFDS's own builders are not used to write, because they cannot resume.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pickle
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import cv2
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs
from etils import epath
from tensorflow_datasets.core import example_serializer

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, write_atomically

_PathT = TypeVar("_PathT", bound=AnyPath)
Record = dict[str, Any]
Job = Callable[[], Iterable[Record | InputError]]
"""Yields the records of a shard in order, or an InputError in place of a damaged record. It must be picklable."""

VERSION = "1.0.0"
SKIPPED_NAME = "skipped.txt"
_LOCK_NAME = ".prepare.lock"
# A worker takes seconds to start, so a build starts at most one per this many records.
_MIN_RECORDS_PER_PROCESS = 256
_REASONS_SHOWN = 10
# One record per chunk gives random access. The fields of a record are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# The messages of a worker: a record is processed, a shard is finished. Any other message is an exception.
_MADE, _DONE = "made", "done"
# ArrayRecord reports a full disk as a RuntimeError: "write() failed: No space left on device; writing ...".
_ARRAY_RECORD_FAILURE = re.compile(r"[a-z]+\(\) failed: ")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardRecipe:
    """The description of a data set from which `build` writes its shards.

    Attributes:
      name: name of the data set.
      variant: name of this selection and form of the data set. It must change whenever the records change.
      features: TFDS features of a record.
      jobs: jobs of each split, by the name of the split; each job yields the records of one shard.
      num_records: number of records that all jobs yield, damaged ones included; for the progress bar.
      information: keyword arguments of `tfds.core.DatasetInfo`, such as the licence.
      finish: function that is called with the folder of the shards after all are written, to add files to it; or None.
      in_process: whether the jobs always run in the calling process, because they cannot be pickled or because one of
        them uses all cores.
    """

    name: str
    variant: str
    features: tfds.features.FeaturesDict
    jobs: Mapping[str, Sequence[Job]]
    num_records: int
    information: Mapping[str, str]
    finish: Callable[[Path], None] | None = None
    in_process: bool = False

    def path(self, cache_dir: _PathT) -> _PathT:
        """Returns the folder of the complete data set in `cache_dir`; it may not exist yet."""
        return cache_dir / self.name / self.variant / VERSION


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The result of writing a shard."""

    num_examples: int
    num_bytes: int
    skipped: tuple[str, ...]
    """Error message of each damaged record."""


def read(path: AnyPath) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder that reads the complete data set in `path`."""
    return tfds.builder_from_directory(path)


def exist(path: AnyPath) -> bool:
    """Returns whether the folder of a data set exists.

    On the disk, the folder exists only if the data set is complete. In a bucket, an interrupted copy may be incomplete.

    Raises:
      OSError: the bucket cannot be read.
    """
    with bucket_errors(path):
        return path.exists()


def build(
    recipe: ShardRecipe, cache_dir: AnyPath, *, skip_damaged: bool = False, num_processes: int | None = None
) -> AnyPath:
    """Returns the folder of a data set after writing its shards, unless they are complete.

    An interrupted build resumes. Concurrent calls with the same `cache_dir` wait for each other.

    Args:
      recipe: description of the data set.
      cache_dir: folder of the prepared data sets, created if it does not exist. A folder in a bucket is only read,
        because locks and renaming need a disk.
      skip_damaged: whether to leave out damaged records; `skipped.txt` beside the shards lists them.
      num_processes: number of worker processes; 0 writes the shards in this process. None chooses a number from the
        numbers of cores and of records.

    Raises:
      InputError: records are damaged and `skip_damaged` is False, even if an earlier build left them out; a worker was
        killed; a split has no example; the folder cannot be written; or the bucket does not hold the data set. Finished
        shards are kept.
      Exception: any other exception of a job.
    """
    final = recipe.path(cache_dir)
    if is_bucket(cache_dir):
        if not exist(final):
            raise InputError(
                f"data.cache_dir {cache_dir} does not hold {final.relative_to(cache_dir)}, and a data set cannot be "
                "prepared in a bucket. Prepare it in a data.cache_dir on a disk, then copy the contents of that "
                f"folder: gcloud storage cp -r DIR/* {cache_dir}"
            )
    else:
        with _naming_cache_dir(cache_dir):
            _build_on_disk(recipe, cache_dir, num_processes, skip_damaged)
    check_skipped(final, skip_damaged)
    return final


@contextlib.contextmanager
def _naming_cache_dir(cache_dir: Path) -> Iterator[None]:
    """Turns an error in writing to `cache_dir` into an InputError that names the folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _ARRAY_RECORD_FAILURE.match(str(error)):
            raise
        raise InputError(
            f"data.cache_dir {cache_dir} cannot be written ({error}); free some space or name another folder."
        ) from error


def _build_on_disk(recipe: ShardRecipe, cache_dir: Path, num_processes: int | None, skip_damaged: bool) -> None:
    final = recipe.path(cache_dir)
    incomplete = final.with_name(f"{VERSION}.incomplete")
    if final.exists() and not incomplete.exists():
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    # The workers inherit the open file and so hold the lock too. The next build therefore starts only after all workers
    # of a killed build have ended.
    with (cache_dir / _LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            _remove_abandoned(cache_dir / recipe.name, incomplete)
            outcomes = _write_shards(recipe, incomplete, num_processes, lock.fileno())
            skipped = [reason for outcome in outcomes.values() for reason in outcome.skipped]
            if skipped and not skip_damaged:
                raise InputError(_damage(skipped))
            _finish(recipe, incomplete / "shards", outcomes, skipped)
            (incomplete / "shards").rename(final)
        shutil.rmtree(incomplete, ignore_errors=True)


def check_skipped(path: AnyPath, skip_damaged: bool) -> None:
    """Checks whether a complete data set leaves out damaged examples, and logs their number.

    Args:
      path: folder of the complete data set.
      skip_damaged: whether the data set may leave out examples.

    Raises:
      InputError: examples are left out and `skip_damaged` is False.
      OSError: the list of these examples cannot be read.
    """
    with bucket_errors(path):
        file = path / SKIPPED_NAME
        skipped = os.fsdecode(file.read_bytes()).splitlines() if file.exists() else []
    if skipped and not skip_damaged:
        raise InputError(_damage(skipped))
    if skipped:
        logger.warning("%d examples are left out; %s lists them.", len(skipped), file)


def _remove_abandoned(folder: Path, current: Path) -> None:
    """Removes interrupted builds of other variants, whose raw files have probably changed, and partial files."""
    for path in folder.glob(f"*/{VERSION}.incomplete"):
        if path != current:
            shutil.rmtree(path)
    for path in current.glob("*/.*"):  # partially written files
        path.unlink()


def _shard_name(recipe: ShardRecipe, split: str, index: int) -> str:
    return f"{recipe.name}-{split}.array_record-{index:05d}-of-{len(recipe.jobs[split]):05d}"


def _write_shards(recipe: ShardRecipe, folder: Path, num_processes: int | None, lock: int) -> dict[str, _Outcome]:
    """Writes the shards that are not finished, and returns the outcome of each shard by its name."""
    for subfolder in ("shards", "done"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    jobs = {_shard_name(recipe, split, i): job for split, jobs in recipe.jobs.items() for i, job in enumerate(jobs)}
    outcomes: dict[str, _Outcome] = {}
    for name in jobs:
        with contextlib.suppress(FileNotFoundError):
            outcomes[name] = _Outcome(**json.loads((folder / "done" / name).read_text()))
    left = {name: job for name, job in jobs.items() if name not in outcomes}
    if num_processes is None:
        most = recipe.num_records * len(left) // len(jobs) // _MIN_RECORDS_PER_PROCESS
        num_processes = min(os.cpu_count() or 1, most, len(left))
        num_processes = 0 if num_processes == 1 or recipe.in_process else num_processes
    made = sum(outcome.num_examples + len(outcome.skipped) for outcome in outcomes.values())
    # disable=None shows the bar only on a terminal.
    with tqdm.tqdm(
        desc=recipe.name, total=recipe.num_records, initial=made, unit=" examples", disable=None, smoothing=0.05
    ) as bar:
        if num_processes == 0:
            for name, job in left.items():
                _write_shard(job, folder, name, recipe.features, bar.update)
        else:
            _share_out(left, folder, recipe.features, num_processes, lock, bar.update)
    return {name: _Outcome(**json.loads((folder / "done" / name).read_text())) for name in jobs}


def _write_shard(
    job: Job, folder: Path, name: str, features: tfds.features.FeaturesDict, made: Callable[[], object]
) -> None:
    """Writes one shard, and calls `made` after each record."""
    partial = folder / "shards" / f".{name}"
    num_examples, num_bytes = 0, 0
    skipped: list[str] = []
    specs = features.get_serialized_info()
    serializer = example_serializer.ExampleSerializer(specs)  # pyright: ignore[reportArgumentType]  # TFDS: untyped
    writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    for record in job():
        if isinstance(record, InputError):
            skipped.append(str(record))
        else:
            # Without `deterministic`, the order of the fields differs between processes.
            message = serializer.get_tf_example(features.encode_example(record))
            example = message.SerializeToString(deterministic=True)
            writer.write(example)
            num_examples += 1
            num_bytes += len(example)
        made()
    writer.close()
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(folder / "shards" / name)
    outcome = _Outcome(num_examples, num_bytes, tuple(skipped))
    write_atomically(folder / "done" / name, json.dumps(dataclasses.asdict(outcome)))


def _damage(reasons: Sequence[str]) -> str:
    """Returns the error message for damaged records: the first ones, and the name of a file that lists all."""
    shown = "\n  ".join(reasons[:_REASONS_SHOWN])
    more = ""
    if len(reasons) > _REASONS_SHOWN:
        with tempfile.NamedTemporaryFile(prefix="damaged-", suffix=".txt", delete=False) as file:
            file.write(os.fsencode("\n".join(reasons) + "\n"))
        more = f"\n  and {len(reasons) - _REASONS_SHOWN} more: all are listed in {file.name}"
    return (
        f"{len(reasons)} examples are damaged or incomplete:\n  {shown}{more}\n"
        "Fix these files, or leave out the examples with data.skip_damaged."
    )


def _finish(recipe: ShardRecipe, folder: Path, outcomes: Mapping[str, _Outcome], skipped: Sequence[str]) -> None:
    """Adds the TFDS metadata and the files of the recipe to the folder of the shards."""
    if recipe.finish:
        recipe.finish(folder)
    if skipped:
        write_atomically(folder / SKIPPED_NAME, os.fsencode("\n".join(skipped) + "\n"))
    splits = []
    for split, jobs in recipe.jobs.items():
        of_split = [outcomes[_shard_name(recipe, split, i)] for i in range(len(jobs))]
        if not any(outcome.num_examples for outcome in of_split):
            raise InputError(
                f"{recipe.name}: the {split} split has no example left, because all of them are damaged; fix their "
                "files or change the split."
            )
        template = tfds.core.ShardedFileTemplate(
            dataset_name=recipe.name, data_dir=epath.Path(folder), split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[outcome.num_examples for outcome in of_split],
                num_bytes=sum(outcome.num_bytes for outcome in of_split),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=recipe.features,
        split_infos=splits,
        version=VERSION,
        check_data=False,  # the check needs TensorFlow
        disable_shuffling=True,
        **recipe.information,
    )


def _share_out(
    jobs: Mapping[str, Job],
    folder: Path,
    features: tfds.features.FeaturesDict,
    num_processes: int,
    lock: int,
    made: Callable[[], object],
) -> None:
    """Writes the shards in worker processes. A worker that is free takes the next shard from a queue."""
    left: queue.SimpleQueue[tuple[str, Job]] = queue.SimpleQueue()
    for item in jobs.items():
        left.put(item)
    workers: list[_Worker] = []
    try:
        for _ in range(num_processes):
            workers.append(_Worker(folder, features, lock))
        with concurrent.futures.ThreadPoolExecutor(num_processes) as pool:
            running = [pool.submit(worker.work_off, left, made) for worker in workers]
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                for worker in workers:
                    worker.kill()
            for future in done:
                future.result()
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """A worker process that writes shards; it inherits the file descriptor `lock`."""

    def __init__(self, folder: Path, features: tfds.features.FeaturesDict, lock: int):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[lock],
            # A keyboard interrupt then reaches only this process, which ends its workers.
            start_new_session=True,
        )
        assert self._process.stdin is not None, "stdin is a pipe"
        assert self._process.stdout is not None, "stdout is a pipe"
        self._orders, self._answers = self._process.stdin, self._process.stdout
        self._setup = (folder, features)

    def _send(self, message: object) -> None:
        pickle.dump(message, self._orders)
        self._orders.flush()

    def work_off(self, jobs: queue.SimpleQueue[tuple[str, Job]], made: Callable[[], object]) -> None:
        """Sends jobs to the process until the queue is empty, and calls `made` after each record.

        Raises:
          InputError: the process ended.
          Exception: any exception of a job.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                name, job = jobs.get_nowait()
                try:
                    self._send((*self._setup, name, job))
                    while (message := pickle.load(self._answers)) != _DONE:
                        if isinstance(message, Exception):
                            raise message
                        made()
                except (EOFError, BrokenPipeError):
                    code = self._process.wait()
                    raise InputError(
                        f"The process that wrote {name} ended with code {code}, possibly because the host ran out of "
                        "memory. The same command resumes where this one stopped."
                    ) from None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # closing flushes orders that are still buffered
            self._orders.close()
        self._answers.close()


def _work(orders: BinaryIO, answers: BinaryIO) -> None:
    """Runs a worker: writes the shards that it is sent, until the parent process closes the pipe."""

    def answer(message: object) -> None:
        pickle.dump(message, answers)
        answers.flush()

    cv2.setNumThreads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            folder, features, name, job = pickle.load(orders)
            try:
                _write_shard(job, folder, name, features, lambda: answer(_MADE))
            except BrokenPipeError:
                raise
            except Exception as error:
                answer(error)
            else:
                answer(_DONE)


if __name__ == "__main__":
    _work(sys.stdin.buffer, sys.stdout.buffer)
