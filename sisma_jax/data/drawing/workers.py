"""Draws many faces at once, in processes of their own.

Threads would wait for one another, as most of the time goes into short NumPy calls under the interpreter's lock. Nor
is this `multiprocessing`: its children import the caller's main module, and forking is unsafe beside JAX's threads.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator

import cv2
import numpy as np

from sisma_jax.data.drawing.portrait import draw_face

# A process takes seconds to start; fewer faces than this for each are drawn here.
_FACES_WORTH_A_WORKER = 256


def encoded_faces(
    seed: int, ids: range, size: int, num_workers: int | None = None
) -> Iterator[tuple[int, bytes, bytes]]:
    """Yields id, image and mask of each face, the pictures as PNG bytes; the same for any number of workers.

    Args:
      seed: of the data set; with an id it determines a face.
      ids: in the order in which they are yielded.
      size: height and width in pixels.
      num_workers: processes; 0 draws in this one. By default as many as there are cores, if it is worth it.

    Raises:
      RuntimeError: a worker failed; what it wrote to stderr says why.
    """
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, len(ids) // _FACES_WORTH_A_WORKER)
        num_workers = 0 if num_workers == 1 else num_workers
    if num_workers == 0:
        yield from (_encoded_face(seed, index, size) for index in ids)
        return
    workers: list[subprocess.Popen] = []
    try:
        for first in range(num_workers):
            workers.append(_start(seed, ids[first::num_workers], size))
        for position in range(len(ids)):
            # A worker that is ahead waits until its pipe is read.
            worker = workers[position % num_workers]
            try:
                yield pickle.load(worker.stdout)
            except EOFError:
                raise RuntimeError(f"a process drawing faces ended with code {worker.wait()}") from None
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()


def _start(seed: int, ids: range, size: int) -> subprocess.Popen:
    arguments = [str(value) for value in (seed, ids.start, ids.stop, ids.step, size)]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        # An interrupt from the keyboard goes to this process, which then ends its workers.
        start_new_session=True,
    )


def _encoded_face(seed: int, index: int, size: int) -> tuple[int, bytes, bytes]:
    image, mask = draw_face((seed, index), size)
    return index, _png(cv2.cvtColor(image, cv2.COLOR_RGB2BGR)), _png(mask)


def _png(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", picture)[1].tobytes()


def _main(seed: int, start: int, stop: int, step: int, size: int) -> None:
    cv2.setNumThreads(1)
    for index in range(start, stop, step):
        pickle.dump(_encoded_face(seed, index, size), sys.stdout.buffer)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
