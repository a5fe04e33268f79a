"""Responses of several parts: server-sent events, and multipart/mixed."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_WAIT_SECS = 5.0


class EventStream(Response):
    """Sends events as they come, and closes their source when the client leaves.

    Attributes:
      on_end: functions that are called when the stream has ended, or if it never starts.
    """

    def __init__(self, events: AsyncGenerator[tuple[str, Any]] | AsyncIterator[tuple[str, Any]]):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(None, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self.on_end: list[Callable[[], None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending
        finally:
            sending.cancel()
            leaving.cancel()
            for function in self.on_end:
                function()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        events = aiter(self._events)
        upcoming: asyncio.Task[tuple[str, Any]] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(anext(events))
                done, _ = await asyncio.wait({upcoming}, timeout=_WAIT_SECS)
                if not done:
                    await _part(send, b": wait\n\n")
                    continue
                try:
                    name, value = upcoming.result()
                except StopAsyncIteration:
                    break
                upcoming = None
                await _part(send, f"event: {name}\ndata: {json.dumps(value)}\n\n".encode())
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if upcoming is not None:
                upcoming.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                    await upcoming
            if isinstance(self._events, AsyncGenerator):
                await self._events.aclose()


async def _part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def multipart_response(pngs: Sequence[bytes]) -> Response:
    """Returns a response of the type multipart/mixed (RFC 2046), with one part per image.

    Args:
      pngs: the bytes of the PNG files.
    """
    boundary = secrets.token_hex(16)
    parts = [
        f"--{boundary}\r\nContent-Type: image/png\r\nContent-Location: {i}.png\r\n\r\n".encode() + png + b"\r\n"
        for i, png in enumerate(pngs)
    ]
    content = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return Response(content, media_type=f"multipart/mixed; boundary={boundary}")
