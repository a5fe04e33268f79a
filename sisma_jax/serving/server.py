"""The server's sockets and signals: uvicorn with a time limit for headers, and a shutdown that finishes requests."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sisma_jax.errors import InputError
from sisma_jax.serving.app import Service
from sisma_jax.serving.limits import Limits

logger = logging.getLogger(__name__)

_POLL_SECS = 0.05


def _protocol(limits: Limits) -> type[H11Protocol]:
    class LimitedProtocol(H11Protocol):
        """HTTP/1.1 that closes connections without a request, or whose headers do not arrive in time."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.close()
                return
            self._idle_since: object = None
            self._watch()

        def _watch(self) -> None:
            if self.transport.is_closing():
                return
            cycle = self.cycle  # None until the first request
            is_idle = not cycle or cycle.response_complete
            if is_idle and self._idle_since is (cycle or self):
                self.transport.close()
                return
            self._idle_since = (cycle or self) if is_idle else None
            self.loop.call_later(limits.body_secs, self._watch)

    return LimitedProtocol


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then refuses new requests, and ends when those that it accepted have ended."""

    def __init__(self, service: Service, limits: Limits, host: str, on_ready: Callable[[str], None]):
        """Prepares the server.

        Args:
          service: whose requests it serves.
          limits: of time and of connections.
          host: on which it listens, for its address.
          on_ready: is called with the address when all programs are compiled.
        """
        config = uvicorn.Config(
            service.app,
            http=_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=64 << 10,
        )
        super().__init__(config)
        self._service, self._limits, self._host, self._on_ready = service, limits, host, on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and lets the programs be compiled."""
        await super().startup(sockets)
        assert sockets
        port = sockets[0].getsockname()[1]
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self._loop = asyncio.get_running_loop()
        batcher = self._service.batcher
        batcher.on_ready = lambda: self._call(self._ready, f"http://{shown}:{port}")
        batcher.on_failure = lambda error: self._call(self._fail, error)
        batcher.thread.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts the shutdown; a second signal ends it at once.

        Args:
          sig: number of the signal; all have the same effect.
          frame: not used.
        """
        if self._loop is None or self._ending is not None:
            self.force_exit = self.should_exit = True
            return
        self._call(self._end)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _ready(self, address: str) -> None:
        self._service.ready()
        if self._service.state == "ready":
            self._on_ready(address)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.should_exit = True

    def _end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        logger.info("Stopping: %d requests are left.", self._service.in_flight)
        self._service.stop_accepting()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.shutdown_secs):
                while self._service.in_flight:
                    await asyncio.sleep(_POLL_SECS)
        self._service.batcher.stop()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Args:
      host: name or address.
      port: 0 picks a free one.

    Raises:
      InputError: the host is unknown, or the port is taken or not allowed.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"`host` {host} and `port` {port} cannot be listened on ({error}); choose others.") from error
    return sock
