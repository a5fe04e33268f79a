"""Builds a data set as array_record shards that TFDS reads; several processes write, and any may be killed.

    CACHE/NAME/VARIANT/1.0.0/              the data set, once it is complete
    CACHE/NAME/VARIANT/1.0.0.incomplete/   until then
        shards/                            finished shards, each renamed into place
        done/                              what became of each of these, written after it

A build that was interrupted goes on with the first shard that is not in `done`. As the contents of a shard follow from
its job alone, the bytes at the end are those of an unbroken build.

The processes are no `multiprocessing`: its children import the caller's main module, and forking is unsafe beside
JAX's threads. Nor do TFDS's builders write, which start from nothing after an interruption.
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
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, is_bucket, write_atomically

Record = dict[str, Any]
Job = Callable[[], Iterable[Record | InputError]]
"""Yields the records of a shard in order, an error in place of one that cannot be made. Processes get it pickled."""

VERSION = "1.0.0"
SKIPPED_NAME = "skipped.txt"
_LOCK_NAME = ".prepare.lock"
# A process takes seconds to start: fewer records than this for each are made in this one.
_RECORDS_WORTH_A_PROCESS = 256
_REASONS_SHOWN = 10
# One record a chunk, for random access; what is in a record is compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# What a process tells: a record is made, a shard is done. Whatever else is an exception.
_MADE, _DONE = "made", "done"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What is built.

    Attributes:
      name: of the data set.
      variant: tells this selection and form of it from others, and changes when its records would.
      features: of a record.
      jobs: of each split; one makes a shard.
      num_records: that all jobs together try to make, for the progress bar.
      information: keyword arguments of `tfds.core.DatasetInfo`, such as the licence.
      finish: called with the folder of the shards when all are written; adds files that belong to them.
      in_process: the jobs cannot be pickled, or use all cores by themselves.
    """

    name: str
    variant: str
    features: tfds.features.FeaturesDict
    jobs: Mapping[str, Sequence[Job]]
    num_records: int
    information: Mapping[str, str]
    finish: Callable[[Path], None] | None = None
    in_process: bool = False

    def path(self, cache_dir: AnyPath) -> AnyPath:
        """Returns the folder of the complete data set, which may not exist yet."""
        return cache_dir / self.name / self.variant / VERSION


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What became of a shard."""

    num_examples: int
    num_bytes: int
    skipped: tuple[str, ...]
    """Why records are not in it."""


def read(path: AnyPath) -> tfds.core.DatasetBuilder:
    """Returns the reader of a complete data set."""
    return tfds.builder_from_directory(path)


def exist(path: AnyPath) -> bool:
    """Whether the folder of a data set is there, whole but for what an interrupted copy to a bucket leaves out."""
    with bucket_errors(path):
        return path.exists()


def build(
    dataset: DataSet, cache_dir: AnyPath, *, skip_damaged: bool = False, num_processes: int | None = None
) -> None:
    """Writes the shards of a data set, unless it is complete. Callers at the same time wait for each other.

    Args:
      cache_dir: created if need be. One in a bucket is read and not written: locks and renaming need a disk.
      skip_damaged: leave out records that cannot be made; `skipped.txt` beside the shards names them.
      num_processes: that make shards; 0 makes them in this one. By default as many as there are cores, if it is worth
        it.

    Raises:
      InputError: records cannot be made, and are not to be skipped; or a process was killed. Finished shards stay. Or
        the bucket does not hold the data set.
      OSError, RuntimeError: the folder cannot be written.
    """
    final = dataset.path(cache_dir)
    if is_bucket(cache_dir):
        if exist(final):
            return
        raise InputError(
            f"{cache_dir} does not hold {final.relative_to(cache_dir)}, and nothing is prepared in a bucket: do so in "
            f"a --data.cache_dir on a disk, then copy what is in that folder: gcloud storage cp -r DIR/* {cache_dir}"
        )
    incomplete = final.with_name(f"{VERSION}.incomplete")
    if final.exists() and not incomplete.exists():
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Processes of this build hold the lock too, by the file that they inherit: those of a build that was killed are
    # gone when the next one begins.
    with (cache_dir / _LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            _remove_abandoned(cache_dir / dataset.name, incomplete)
            outcomes = _write_shards(dataset, incomplete, num_processes, lock.fileno())
            skipped = [reason for outcome in outcomes.values() for reason in outcome.skipped]
            if skipped and not skip_damaged:
                raise InputError(_damage(skipped))
            _finish(dataset, incomplete / "shards", outcomes, skipped)
            (incomplete / "shards").rename(final)
        shutil.rmtree(incomplete, ignore_errors=True)


def _remove_abandoned(folder: Path, current: Path) -> None:
    """Removes interrupted builds of other variants: of raw files that have changed since, most likely."""
    for path in folder.glob(f"*/{VERSION}.incomplete"):
        if path != current:
            shutil.rmtree(path)
    for path in current.glob("*/.*"):  # files that were being written
        path.unlink()


def _shard_name(dataset: DataSet, split: str, index: int) -> str:
    return f"{dataset.name}-{split}.array_record-{index:05d}-of-{len(dataset.jobs[split]):05d}"


def _write_shards(dataset: DataSet, folder: Path, num_processes: int | None, lock: int) -> dict[str, _Outcome]:
    """Writes the shards that are not there yet. Returns what became of each, by its name."""
    for subfolder in ("shards", "done"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    jobs = {_shard_name(dataset, split, i): job for split, jobs in dataset.jobs.items() for i, job in enumerate(jobs)}
    outcomes = {}
    for name in jobs:
        with contextlib.suppress(FileNotFoundError):
            outcomes[name] = _Outcome(**json.loads((folder / "done" / name).read_text()))
    left = {name: job for name, job in jobs.items() if name not in outcomes}
    if num_processes is None:
        affordable = dataset.num_records * len(left) // len(jobs) // _RECORDS_WORTH_A_PROCESS
        num_processes = min(os.cpu_count() or 1, affordable, len(left))
        num_processes = 0 if num_processes == 1 or dataset.in_process else num_processes
    made = sum(outcome.num_examples + len(outcome.skipped) for outcome in outcomes.values())
    # disable=None: a bar on a terminal, silence elsewhere.
    with tqdm.tqdm(
        desc=dataset.name, total=dataset.num_records, initial=made, unit=" examples", disable=None, smoothing=0.05
    ) as bar:
        if num_processes == 0:
            for name, job in left.items():
                _write_shard(job, folder, name, dataset.features, bar.update)
        else:
            _share_out(left, folder, dataset.features, num_processes, lock, bar.update)
    return {name: _Outcome(**json.loads((folder / "done" / name).read_text())) for name in jobs}


def _write_shard(
    job: Job, folder: Path, name: str, features: tfds.features.FeaturesDict, made: Callable[[], Any]
) -> None:
    partial = folder / "shards" / f".{name}"
    num_examples, num_bytes, skipped = 0, 0, []
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    for record in job():
        if isinstance(record, InputError):
            skipped.append(str(record))
        else:
            # Otherwise its fields would stand in another order in every process.
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
    """Returns the message of all that is damaged: the first few, and a file with the rest."""
    shown = "\n  ".join(reasons[:_REASONS_SHOWN])
    more = ""
    if len(reasons) > _REASONS_SHOWN:
        with tempfile.NamedTemporaryFile("w", prefix="damaged-", suffix=".txt", delete=False) as file:
            file.write("\n".join(reasons) + "\n")
        more = f"\n  and {len(reasons) - _REASONS_SHOWN} more: all are named in {file.name}"
    return (
        f"{len(reasons)} examples cannot be made:\n  {shown}{more}\n"
        "Mend these files, or leave the examples out with --data.skip_damaged."
    )


def _finish(dataset: DataSet, folder: Path, outcomes: Mapping[str, _Outcome], skipped: Sequence[str]) -> None:
    """Adds to the shards what TFDS wants to know of them, and what belongs to them otherwise."""
    if dataset.finish:
        dataset.finish(folder)
    if skipped:
        write_atomically(folder / SKIPPED_NAME, "\n".join(skipped) + "\n")
        logger.warning("%d examples were left out; %s names them.", len(skipped), SKIPPED_NAME)
    splits = []
    for split, jobs in dataset.jobs.items():
        of_split = [outcomes[_shard_name(dataset, split, i)] for i in range(len(jobs))]
        if not any(outcome.num_examples for outcome in of_split):
            raise InputError(f"{dataset.name}: the {split} split has no example left.")
        template = tfds.core.ShardedFileTemplate(
            dataset_name=dataset.name, data_dir=folder, split=split, filetype_suffix="array_record"
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
        features=dataset.features,
        split_infos=splits,
        version=VERSION,
        check_data=False,  # by means of TensorFlow
        disable_shuffling=True,
        **dataset.information,
    )


# Processes


def _share_out(
    jobs: Mapping[str, Job],
    folder: Path,
    features: tfds.features.FeaturesDict,
    num_processes: int,
    lock: int,
    made: Callable[[], Any],
) -> None:
    """Has processes write the shards, each the next one as soon as it is free."""
    left: queue.SimpleQueue = queue.SimpleQueue()
    for item in jobs.items():
        left.put(item)
    workers = []
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
    """A process that writes shards as it is told to."""

    def __init__(self, folder: Path, features: tfds.features.FeaturesDict, lock: int):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[lock],
            # An interrupt from the keyboard goes to this process, which then ends its workers.
            start_new_session=True,
        )
        self._setup = (folder, features)

    def _send(self, message: Any) -> None:
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def work_off(self, jobs: queue.SimpleQueue, made: Callable[[], Any]) -> None:
        """Raises what the process raises, and InputError if it is no more."""
        with contextlib.suppress(queue.Empty):
            while True:
                name, job = jobs.get_nowait()
                try:
                    self._send((*self._setup, name, job))
                    while (message := pickle.load(self._process.stdout)) != _DONE:
                        if isinstance(message, Exception):
                            raise message
                        made()
                except (EOFError, BrokenPipeError):
                    code = self._process.wait()
                    raise InputError(
                        f"The process that wrote {name} ended with code {code}; was it killed for want of memory? The "
                        "same command goes on where this one stopped."
                    ) from None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # of what it was still to be told
            self._process.stdin.close()
        self._process.stdout.close()


def _work(orders: BinaryIO, answers: BinaryIO) -> None:
    """What a worker does: shards until the other side is gone."""

    def answer(message: Any) -> None:
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
