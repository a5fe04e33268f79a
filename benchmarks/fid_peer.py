"""The Fréchet Inception distance of the package pytorch-fid, computed by a process of its own.

This project does not depend on it: `pip install torch torchvision pytorch-fid`. Its process never imports JAX, so that
neither library's threads disturb the other, and its workers, which read images, may be forked.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

PACKAGES = ("torch", "torchvision", "pytorch_fid")
BATCH_SIZE = 50
"""The default of pytorch-fid."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """What one computation of the distance took.

    Attributes:
      fid: the distance.
      features: wall time of the features of both sets, and processor time of all threads and worker processes, seconds.
      distance: the same, from the features to the distance.
    """

    fid: float
    features: tuple[float, float]
    distance: tuple[float, float]


def clocks() -> tuple[float, float]:
    """Returns the time, and the processor time of this process and its child processes that have ended, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Returns the seconds by both clocks since `start`."""
    now = clocks()
    return now[0] - start[0], now[1] - start[1]


def absent() -> str:
    """Returns a message if the packages are not installed, else ""."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    names = " and ".join(missing)
    install = " ".join(package.replace("_", "-") for package in PACKAGES)
    return f"peer 'pytorch-fid' left out: {names} not installed (pip install {install})" if missing else ""


class Peer:
    """A process that has loaded pytorch-fid's network.

    Args:
      weights: npz file of the network's weights by their names.
    """

    def __init__(self, weights: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.fid_peer", str(weights)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            env=os.environ | {"TQDM_DISABLE": "1"},  # no progress bars
        )
        self._read()

    def measure(self, first: Path, second: Path) -> Timed:
        """Returns the distance of the PNG images of two folders, and its times.

        Args:
          first: folder of images.
          second: folder of images.
        """
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(json.dumps([str(first), str(second)]) + "\n")
        self._process.stdin.flush()
        return Timed(**self._read())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process of pytorch-fid ended with exit code {self._process.wait()}.")
        return json.loads(line)


def _serve(weights: Path, answers: TextIO) -> None:
    """Reads pairs of folders from standard input, one JSON list a line, and writes a `Timed` for each."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]  optional, not in the development environment
    from pytorch_fid import fid_score, inception  # pyright: ignore[reportMissingImports]  optional, as torch

    with np.load(weights) as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    inception.load_state_dict_from_url = lambda *args, **kwargs: state  # in place of the download
    model = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 299, 299))  # loads libraries
    print("{}", file=answers, flush=True)
    num_workers = min(len(os.sched_getaffinity(0)), 8)  # as the command of pytorch-fid chooses it
    for line in sys.stdin:
        start = clocks()
        activations = [
            fid_score.get_activations(sorted(Path(folder).glob("*.png")), model, BATCH_SIZE, num_workers=num_workers)
            for folder in json.loads(line)
        ]
        features, start = since(start), clocks()
        moments = [(np.mean(x, axis=0), np.cov(x, rowvar=False)) for x in activations]
        fid = float(fid_score.calculate_frechet_distance(*moments[0], *moments[1]))
        timed = Timed(fid, features, since(start))
        print(json.dumps(dataclasses.asdict(timed)), file=answers, flush=True)


if __name__ == "__main__":
    answers_to = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # pytorch-fid prints warnings
        _serve(Path(sys.argv[1]), answers_to)
