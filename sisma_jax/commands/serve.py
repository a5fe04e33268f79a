"""The command `serve`: answers HTTP requests with a trained model; see docs/http_api.md."""

import dataclasses
import logging
import os
import sys
from pathlib import Path

from sisma_jax import pipeline
from sisma_jax.commands.report import tell
from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath
from sisma_jax.parallel import sharding
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs.folder import Checkpoint, RunFolder

API_KEY = "SISMA_API_KEY"
"""Environment variable of the API key."""


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serves a model over HTTP: samples, edits and segments for other programs."""

    weights: str = ""
    """File that the command `export` wrote, hf://OWNER/NAME[/FILE][@REVISION], or demo. If empty: the run in workdir;
    without config and workdir: demo, the weights in the package."""
    checkpoint: Checkpoint = "newest"
    """Checkpoint of the run: the newest, the best (see train.best), or the one of a step."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than a loopback address needs an API key, or insecure."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    api_key_file: str = ""
    """File with the API key that requests must send. If empty: SISMA_API_KEY of the environment, if it is set."""
    insecure: bool = False
    """Listen on other than loopback addresses without an API key."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names of the server that the header Host may have, for example behind a proxy."""
    cors: tuple[str, ...] = ()
    """Origins of other sites whose pages may send requests, such as https://example.org."""
    max_batch: int = 8
    """Images per batch; a power of two."""
    max_queue: int = 64
    """Images that may wait. Further requests get status 429."""
    max_steps: int = 100
    """Solver steps that a request may ask for."""
    max_samples: int = 16
    """Images that a request may ask for."""
    max_body_mib: int = 32
    """Size of a request's body, in MiB."""
    timeout: float = 60.0
    """Seconds from a request to its result; then it gets status 504."""
    body_timeout: float = 20.0
    """Seconds for the arrival of a body."""
    shutdown_timeout: float = 30.0
    """Seconds that accepted requests have after SIGTERM."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Serves the model until SIGTERM or Ctrl-C.

        Raises:
          InputError: an option is out of range, the model cannot be read, the address cannot be listened on, or it is
            no loopback address and there is no API key.
        """
        try:
            from sisma_jax.serving import app, limits, observing, security, server
        except ModuleNotFoundError as error:
            raise InputError(f"serve needs the package {error.name}; install with: pip install '.[serve]'") from error
        self._check()
        key = self._api_key()
        if not (key or self.insecure or security.is_loopback(self.host)):
            raise InputError(
                f"`host` {self.host} is no loopback address: give an API key by `api_key_file` or the environment "
                f"variable {API_KEY}, or allow everybody by `insecure`."
            )
        bounds = limits.Limits(
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            max_steps=max(self.max_steps, config.sample.steps),
            max_samples=self.max_samples,
            body_bytes=self.max_body_mib << 20,
            buffered_bytes=max(256, 2 * self.max_body_mib) << 20,
            timeout_secs=self.timeout,
            body_secs=self.body_timeout,
            shutdown_secs=self.shutdown_timeout,
        )
        policy = security.Policy.of(self.host, self.allowed_hosts, self.cors, key)
        pipe = self._load(config, workdir)
        tell("Compiling the sampler; the first start takes a minute or more, later ones take seconds.")
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(observing.JsonFormatter())
        logging.getLogger().handlers[:] = [handler]
        with server.listen(self.host, self.port) as sock:
            service = app.Service(pipe, policy, bounds)
            made = server.Server(service, bounds, self.host, lambda address: tell(f"Ready: {address}"))
            made.run(sockets=[sock])
        if made.failure is not None:
            raise made.failure

    def _check(self) -> None:
        whole = {
            name: getattr(self, name) for name in ("max_batch", "max_queue", "max_steps", "max_samples", "max_body_mib")
        }
        for name, value in whole.items():
            if value < 1:
                raise InputError(f"`{name}` must be positive, got {value}.")
        for name in ("timeout", "body_timeout", "shutdown_timeout"):
            if not 0 < getattr(self, name) < 86_400:
                raise InputError(f"`{name}` must be in (0, 86400) seconds, got {getattr(self, name)}.")
        if not 0 <= self.port < 1 << 16:  # the C library takes its lower 16 bits
            raise InputError(f"`port` must be in [0, 65535], got {self.port}.")
        if self.max_batch & (self.max_batch - 1):
            raise InputError(f"`max_batch` must be a power of two, got {self.max_batch}.")
        if self.max_queue < self.max_samples:
            raise InputError(f"`max_queue` {self.max_queue} must not be below `max_samples` {self.max_samples}.")

    def _api_key(self) -> str:
        if not self.api_key_file:
            return os.environ.get(API_KEY, "")
        try:
            key = Path(self.api_key_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"`api_key_file` {self.api_key_file} cannot be read ({error}).") from error
        if not key:
            raise InputError(f"`api_key_file` {self.api_key_file} is empty; write the key into it.")
        return key

    def _load(self, config: Config, workdir: AnyPath) -> Pipeline:
        mesh = sharding.make_mesh(config.mesh)
        if self.weights:
            return pipeline.from_exported(self.weights, config, mesh=mesh)
        return pipeline.from_run(RunFolder.open(workdir, config), checkpoint=self.checkpoint, mesh=mesh)
