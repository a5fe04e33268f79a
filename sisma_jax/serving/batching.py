"""The queue of images, and the thread that samples them in batches."""

import asyncio
import collections
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sisma_jax.config import Sampling
from sisma_jax.pipeline import Pipeline
from sisma_jax.sampler import Faces
from sisma_jax.serving.limits import Limits
from sisma_jax.serving.observing import Metrics
from sisma_jax.serving.problems import Problem, busy

logger = logging.getLogger(__name__)

# Predictions that wait for a client of a stream; further ones are left out until it has read them.
_MAX_WAITING_STEPS = 2


@dataclasses.dataclass
class Job:
    """The images of one request, from its event loop to the device and back.

    Attributes:
      faces: what to sample.
      settings: how.
      every: predictions of every so many steps; 0 for none.
    """

    faces: Faces
    settings: Sampling
    every: int = 0

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.arrival = time.monotonic()
        self.queue_secs = self.compute_secs = 0.0
        self.is_alive = True
        self._has_started = False

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs of equal groups share batches."""
        return dataclasses.replace(self.settings, seed=0, batch_size=1), self.faces.image is None

    async def event(self) -> tuple[str, Any]:
        """Returns the next event: ("start", None), ("step", (step, images)), ("done", images) or ("error", Problem)."""
        return await self._events.get()

    def cancel(self, problem: Problem | None = None) -> None:
        """Takes the job out of the queue, or stops it after the current step. Called in the event loop.

        Args:
          problem: for the request that waits; None if nobody waits.
        """
        self.is_alive = False
        if problem is not None:
            self._events.put_nowait(("error", problem))

    def begin(self) -> None:
        """Tells the request that its computation starts. Called in the thread of the device, as are the others."""
        if not self._has_started:
            self._has_started = True
            self.queue_secs = time.monotonic() - self.arrival
            self._send("start", None)

    def show(self, step: int, images: np.ndarray) -> None:
        """Sends the predictions of a step.

        Args:
          step: number of the solver step, from 1.
          images: uint8, one row per image of the job.
        """
        if self._events.qsize() < _MAX_WAITING_STEPS:
            self._send("step", (step, images))

    def finish(self, images: np.ndarray) -> None:
        """Sends the sampled images.

        Args:
          images: uint8, one row per image of the job.
        """
        self.compute_secs = time.monotonic() - self.arrival - self.queue_secs
        self._send("done", images)

    def fail(self, problem: Problem) -> None:
        """Sends an error in place of the images."""
        self._send("error", problem)

    def _send(self, name: str, value: Any) -> None:
        if self.is_alive:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (name, value))
            except RuntimeError:  # the server has stopped, and its event loop is closed
                self.is_alive = False


class Batcher:
    """Samples jobs in batches of a pipeline's compiled programs, in the order of their arrival."""

    def __init__(self, pipe: Pipeline, limits: Limits, metrics: Metrics):
        self.pipe = pipe
        self._limits = limits
        self._metrics = metrics
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._is_stopped = False
        self._secs_per_image = 0.1
        self.thread = threading.Thread(target=self._work, name="device", daemon=True)
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failure: Callable[[BaseException], None] = lambda error: None

    def submit(self, job: Job) -> None:
        """Puts a job into the queue.

        Raises:
          Problem: the queue is full (429).
        """
        with self._changed:
            waiting = self._waiting()
            if waiting + len(job.faces) > self._limits.max_queue:
                wait = max(1, math.ceil(waiting * self._secs_per_image))
                raise busy(429, f"{waiting} images wait already; the queue is full, try again later.", min(wait, 60))
            self._jobs.append(job)
            self._metrics.queue.set(waiting + len(job.faces))
            self._changed.notify()

    def wake(self) -> None:
        """Lets the thread drop jobs that were cancelled."""
        with self._changed:
            self._metrics.queue.set(self._waiting())

    def stop(self) -> None:
        """Lets the thread end after the current step."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def _waiting(self) -> int:
        """The number of images of jobs that nobody has left; forgets the other jobs."""
        if not all(job.is_alive for job in self._jobs):
            self._jobs = collections.deque(job for job in self._jobs if job.is_alive)
        return sum(len(job.faces) for job in self._jobs)

    def _take(self) -> list[Job]:
        """Returns the jobs of the next batch; none if the batcher is stopped."""
        with self._changed:
            while not self._is_stopped and not self._waiting():
                self._changed.wait(timeout=1.0)
            if self._is_stopped:
                return []
            first = self._jobs[0]
            taken, count, left = [], 0, collections.deque[Job]()
            for job in self._jobs:
                # A job of more images than a batch has a series of batches of its own.
                fits = not taken or count + len(job.faces) <= self._limits.max_batch
                if fits and job.group == first.group:
                    taken.append(job)
                    count += len(job.faces)
                else:
                    left.append(job)
            self._jobs = left
            self._metrics.queue.set(self._waiting())
            return taken

    def _work(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:
            self.on_failure(error)
            return
        self.on_ready()
        while jobs := self._take():
            try:
                self._run(jobs)
            except Exception:
                logger.exception("A batch failed.")
                for job in jobs:
                    job.fail(Problem(500, "the images could not be computed; the log of the server says why."))

    def _run(self, jobs: Sequence[Job]) -> None:
        start = time.monotonic()
        for job in jobs:
            job.begin()
            self._metrics.queue_wait.observe(job.queue_secs)
        ends = list(itertools.accumulate(len(job.faces) for job in jobs))
        parts = [slice(end - len(job.faces), end) for job, end in zip(jobs, ends, strict=True)]
        faces = Faces.joined([job.faces for job in jobs])
        done = []
        for first in range(0, len(faces), self._limits.max_batch):
            rows = range(first, min(first + self._limits.max_batch, len(faces)))
            images = self._sample(faces.take(rows), jobs, parts)
            if images is None:
                self._metrics.abandoned.inc()
                return
            done.append(images)
        images = np.concatenate(done)
        secs = time.monotonic() - start
        self._secs_per_image = 0.8 * self._secs_per_image + 0.2 * secs / len(images)
        self._metrics.batch_images.observe(len(images))
        self._metrics.batch_duration.observe(secs)
        for job, part in zip(jobs, parts, strict=True):
            job.finish(images[part])

    def _sample(self, faces: Faces, jobs: Sequence[Job], parts: Sequence[slice]) -> np.ndarray | None:
        """Returns the images of a batch; None if no client is left."""
        settings = jobs[0].settings
        size = self.pipe.sampler.batch_size(len(faces), self._limits.max_batch)
        streams = [(job, part) for job, part in zip(jobs, parts, strict=True) if job.every]
        for step, state in self.pipe.sampler.trajectory(faces, settings, size, range(1, settings.steps + 1)):
            state.wait()
            if self._is_stopped or not any(job.is_alive for job in jobs):
                return None
            if step == settings.steps:
                return state.images()
            shown = [(job, part) for job, part in streams if step % job.every == 0 and job.is_alive]
            if shown:
                images = state.images()
                for job, part in shown:
                    job.show(step, images[part])
        raise AssertionError("a trajectory ends with its last step")

    def _warm_up(self) -> None:
        """Compiles all programs, and compares batches of all sizes."""
        start, pipe = time.monotonic(), self.pipe
        size = pipe.config.data.image_size
        rng = np.random.default_rng(0)
        masks = rng.integers(len(pipe.config.data.classes), size=(self._limits.max_batch, size, size), dtype=np.uint8)
        key_data = rng.integers(1 << 32, size=(len(masks), 2), dtype=np.uint32)
        faces, sizes = Faces(key_data, masks), []
        for guidance in (1.5, 1.0):
            settings = dataclasses.replace(
                pipe.config.sample, steps=2, guidance=guidance, guidance_low=0.0, guidance_high=1.0
            )
            alone = None
            for exponent in range(self._limits.max_batch.bit_length()):
                count = pipe.sampler.batch_size(1 << exponent, self._limits.max_batch)
                *_, (_, state) = pipe.sampler.trajectory(faces.take(range(1 << exponent)), settings, count, [1, 2])
                state.images()
                latents = np.asarray(state.latents)
                alone = latents[:1] if alone is None else alone
                if (alone[0] != latents[0]).any():
                    logger.warning("Faces in batches of %d differ by rounding from single faces here.", count)
                sizes.append(count)
        image = np.zeros((1, size, size, 3), np.uint8)
        edited = dataclasses.replace(faces.take([0]), image=image, region=np.ones((1, size, size), bool))
        for _ in pipe.sampler.steps(edited, settings, pipe.sampler.batch_size(1, self._limits.max_batch)):
            pass
        if pipe.parser is not None:
            pipe.parser.predict(image)
        self._metrics.warm_programs.set(pipe.sampler.num_programs())
        self._metrics.programs.set_function(pipe.sampler.num_programs)
        logger.info(
            "Compiled the sampler for batches of %s in %.1f s.",
            ", ".join(str(count) for count in sorted(set(sizes))),
            time.monotonic() - start,
        )
