"""Builds a data set as array_record shards that TFDS reads; several processes write, and any may be killed.

    CACHE/NAME/VARIANT/1.0.0/              the data set, once it is complete
    CACHE/NAME/VARIANT/1.0.0.incomplete/   until then
        shards/                            finished shards, each renamed into place
        done/                              what became of each of these, written after it

An interrupted build resumes with the first shard that is not in `done`. As the contents of a shard follow from its job
alone, the result is bit-identical to that of an uninterrupted build.

The processes do not use `multiprocessing`: its children import the caller's main module, and forking is unsafe beside
JAX's threads. Nor are TFDS's builders used to write, because they start from nothing after an interruption.
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
"""Yields the records of a shard in order, an error in place of one that cannot be made. Workers get it pickled."""

VERSION = "1.0.0"
SKIPPED_NAME = "skipped.txt"
_LOCK_NAME = ".prepare.lock"
# A process takes seconds to start: with fewer records than this for each, all are made in this process.
_RECORDS_WORTH_A_PROCESS = 256
_REASONS_SHOWN = 10
# One record per chunk, for random access; what is in a record is compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# What a worker answers: a record is made, a shard is done. Any other answer is an exception.
_MADE, _DONE = "made", "done"
# ArrayRecord reports a full disk as a RuntimeError: "write() failed: No space left on device; writing ...".
_ARRAY_RECORD_FAILURE = re.compile(r"[a-z]+\(\) failed: ")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardRecipe:
    """How a data set is built.

    Attributes:
      name: of the data set.
      variant: distinguishes this selection and form of it from others, and changes when its records would.
      features: of a record.
      jobs: of each split; each makes one shard.
      num_records: that all jobs together try to make, for the progress bar.
      information: keyword arguments of `tfds.core.DatasetInfo`, such as the licence.
      finish: called with the folder of the shards when all are written; adds files that belong to them.
      in_process: whether the jobs cannot be pickled, or use all cores by themselves.
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
    """Returns TFDS's reader of a complete data set."""
    return tfds.builder_from_directory(path)


def exist(path: AnyPath) -> bool:
    """Whether the folder of a data set is there; only an interrupted copy to a bucket leaves it incomplete."""
    with bucket_errors(path):
        return path.exists()


def build(
    recipe: ShardRecipe, cache_dir: AnyPath, *, skip_damaged: bool = False, num_processes: int | None = None
) -> AnyPath:
    """Writes the shards of a data set, unless it is complete. Concurrent callers wait for each other.

    Args:
      recipe: of the data set.
      cache_dir: created if need be. One in a bucket is read and not written: locks and renaming need a disk.
      skip_damaged: leave out records that cannot be made; `skipped.txt` beside the shards names them.
      num_processes: that make shards; 0 makes them in this process. By default as many as there are cores, if there
        are records enough.

    Returns:
      The folder of the complete data set.

    Raises:
      InputError: records cannot be made, now or when the shards were written, and are not to be skipped; or a process
        was killed. Finished shards stay. Or the folder cannot be written, or the bucket does not hold the data set.
    """
    final = recipe.path(cache_dir)
    if is_bucket(cache_dir):
        if not exist(final):
            raise InputError(
                f"{cache_dir} does not hold {final.relative_to(cache_dir)}, and nothing is prepared in a bucket: "
                "prepare it in a data.cache_dir on a disk, then copy the contents of that folder: "
                f"gcloud storage cp -r DIR/* {cache_dir}"
            )
    else:
        with _naming_cache_dir(cache_dir):
            _build_on_disk(recipe, cache_dir, final, num_processes, skip_damaged)
    check_skipped(final, skip_damaged)
    return final


@contextlib.contextmanager
def _naming_cache_dir(cache_dir: Path) -> Iterator[None]:
    """Turns failures to write into InputErrors that name the folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _ARRAY_RECORD_FAILURE.match(str(error)):
            raise
        raise InputError(
            f"data.cache_dir {cache_dir} cannot be written ({error}); free some space or name another folder."
        ) from error


def _build_on_disk(
    recipe: ShardRecipe, cache_dir: Path, final: Path, num_processes: int | None, skip_damaged: bool
) -> None:
    incomplete = final.with_name(f"{VERSION}.incomplete")
    if final.exists() and not incomplete.exists():
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    # The processes of this build hold the lock too, by the file that they inherit: those of a build that was killed
    # are gone when the next one begins.
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
    """Logs how many examples a complete data set leaves out.

    Raises:
      InputError: it leaves some out, and they are not to be skipped.
    """
    with bucket_errors(path):
        file = path / SKIPPED_NAME
        skipped = file.read_text().splitlines() if file.exists() else []
    if skipped and not skip_damaged:
        raise InputError(_damage(skipped))
    if skipped:
        logger.warning("%d examples are left out; %s names them.", len(skipped), file)


def _remove_abandoned(folder: Path, current: Path) -> None:
    """Removes interrupted builds of other variants: of raw files that have changed since, most likely."""
    for path in folder.glob(f"*/{VERSION}.incomplete"):
        if path != current:
            shutil.rmtree(path)
    for path in current.glob("*/.*"):  # files that were being written
        path.unlink()


def _shard_name(recipe: ShardRecipe, split: str, index: int) -> str:
    return f"{recipe.name}-{split}.array_record-{index:05d}-of-{len(recipe.jobs[split]):05d}"


def _write_shards(recipe: ShardRecipe, folder: Path, num_processes: int | None, lock: int) -> dict[str, _Outcome]:
    """Writes the shards that are not there yet. Returns what became of each, by its name."""
    for subfolder in ("shards", "done"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    jobs = {_shard_name(recipe, split, i): job for split, jobs in recipe.jobs.items() for i, job in enumerate(jobs)}
    outcomes = {}
    for name in jobs:
        with contextlib.suppress(FileNotFoundError):
            outcomes[name] = _Outcome(**json.loads((folder / "done" / name).read_text()))
    left = {name: job for name, job in jobs.items() if name not in outcomes}
    if num_processes is None:
        affordable = recipe.num_records * len(left) // len(jobs) // _RECORDS_WORTH_A_PROCESS
        num_processes = min(os.cpu_count() or 1, affordable, len(left))
        num_processes = 0 if num_processes == 1 or recipe.in_process else num_processes
    made = sum(outcome.num_examples + len(outcome.skipped) for outcome in outcomes.values())
    # disable=None: a bar on a terminal, silence elsewhere.
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
        "Fix these files, or leave the examples out with data.skip_damaged."
    )


def _finish(recipe: ShardRecipe, folder: Path, outcomes: Mapping[str, _Outcome], skipped: Sequence[str]) -> None:
    """Adds to the shards what TFDS wants to know of them, and what belongs to them otherwise."""
    if recipe.finish:
        recipe.finish(folder)
    if skipped:
        write_atomically(folder / SKIPPED_NAME, "\n".join(skipped) + "\n")
    splits = []
    for split, jobs in recipe.jobs.items():
        of_split = [outcomes[_shard_name(recipe, split, i)] for i in range(len(jobs))]
        if not any(outcome.num_examples for outcome in of_split):
            raise InputError(f"{recipe.name}: the {split} split has no example left.")
        template = tfds.core.ShardedFileTemplate(
            dataset_name=recipe.name, data_dir=folder, split=split, filetype_suffix="array_record"
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
        check_data=False,  # by means of TensorFlow
        disable_shuffling=True,
        **recipe.information,
    )


def _share_out(
    jobs: Mapping[str, Job],
    folder: Path,
    features: tfds.features.FeaturesDict,
    num_processes: int,
    lock: int,
    made: Callable[[], Any],
) -> None:
    """Lets worker processes write the shards, each taking the next one as soon as it is free."""
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
    """A process that writes the shards it is given."""

    def __init__(self, folder: Path, features: tfds.features.FeaturesDict, lock: int):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[lock],
            # A keyboard interrupt goes to this process, which then ends its workers.
            start_new_session=True,
        )
        self._setup = (folder, features)

    def _send(self, message: Any) -> None:
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def work_off(self, jobs: queue.SimpleQueue, made: Callable[[], Any]) -> None:
        """Lets the process write jobs until none is left. Raises what it raises, and InputError if it has ended."""
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
                        f"The process that wrote {name} ended with code {code}; was it killed for lack of memory? The "
                        "same command resumes where this one stopped."
                    ) from None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # of orders that were not sent yet
            self._process.stdin.close()
        self._process.stdout.close()


def _work(orders: BinaryIO, answers: BinaryIO) -> None:
    """Runs a worker: writes shards until the other side is gone."""

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
