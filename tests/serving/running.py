"""A real server in a process of its own, on loopback, with one device and all of XLA's optimisations."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from sisma_jax.data.drawing import draw_face

ROOT = Path(__file__).parents[2]
START_SECS = 600


def mask_png(seed: int = 0, size: int = 16) -> bytes:
    """The PNG file of a drawn mask."""
    return png(draw_face(np.random.default_rng(seed), size)[1])


def png(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


class Server:
    """A server process.

    Attributes:
      process: the process.
      url: its address, once it is ready.
      log: the lines of its standard error.
    """

    def __init__(self, weights: Path | None, *options: str, environment: dict[str, str] | None = None):
        # One device and XLA's optimisations, unlike in the tests' own process.
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
        variables.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
        variables |= environment or {}
        model = [] if weights is None else ["--weights", str(weights)]
        command = [sys.executable, "run.py", "serve", *model, "--port", "0", *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.url, self.log = "", []
        self._has_started = threading.Event()
        for read in (self._read_output, self._read_log):
            threading.Thread(target=read, daemon=True).start()

    def _read_output(self) -> None:
        for line in self.process.stdout:
            if match := re.fullmatch(r"Ready: (http://\S+)\n", line):
                self.url = match[1]
                self._has_started.set()
        self._has_started.set()

    def _read_log(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)

    def wait_until_ready(self) -> "Server":
        assert self._has_started.wait(START_SECS), self.log
        assert self.url, "".join(self.log)
        return self

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 120, **options})

    def metric(self, name: str) -> float:
        """The value of a metric, by its name and labels as in the text format; 0 if it is absent."""
        lines = self.client().get("/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.rsplit(" ", 1)[0] == name), 0.0)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        finally:
            self.process.kill()


@contextlib.contextmanager
def serving(weights: Path | None, *options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server(weights, *options, environment=environment)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop(signal.SIGKILL)
