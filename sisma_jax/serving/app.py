"""The routes of the server."""

import asyncio
import base64
import concurrent.futures
import contextvars
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from sisma_jax.errors import InputError
from sisma_jax.pipeline import Pipeline
from sisma_jax.serving import images, openapi
from sisma_jax.serving.accept import chosen
from sisma_jax.serving.batching import Batcher, Job
from sisma_jax.serving.bodies import BodyReader
from sisma_jax.serving.calls import Call, Calls, refusal
from sisma_jax.serving.fields import edit_fields, parse, sample_fields, segment_fields, setting_fields
from sisma_jax.serving.limits import Limits
from sisma_jax.serving.observing import Metrics, Observed
from sisma_jax.serving.page import Page
from sisma_jax.serving.problems import Problem, busy
from sisma_jax.serving.security import Policy, Secured
from sisma_jax.serving.streams import EventStream, multipart_response
from sisma_jax.serving.superseding import Superseding, Ticket

logger = logging.getLogger(__name__)

_STREAM_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PNG, _JSON, _PARTS, _EVENTS = "image/png", "application/json", "multipart/mixed", "text/event-stream"

Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """A pipeline behind HTTP.

    Attributes:
      app: the ASGI application.
      batcher: its thread must be started.
      in_flight: requests under `/v1` that are being served.
    """

    def __init__(self, pipe: Pipeline, policy: Policy, limits: Limits | None = None):
        """Prepares the service; nothing is compiled yet.

        Args:
          pipe: the model.
          policy: who may ask.
          limits: what is accepted.
        """
        self._pipe = pipe
        self._limits = limits = limits or Limits()
        self._metrics = Metrics()
        self.batcher = Batcher(pipe, limits, self._metrics)
        self._calls = Calls(pipe, limits)
        self._bodies = BodyReader(limits)
        self._superseding = Superseding(self._metrics.superseded.inc)
        self._workers = concurrent.futures.ThreadPoolExecutor(2, "images")
        self._state = "starting"
        self.in_flight = 0
        self._fields = {
            "sample": sample_fields(limits, self._calls.class_sets),
            "edit": edit_fields(limits, self._calls.class_sets),
            "segment": segment_fields(),
        }
        self._page = Page.load()
        self.app = self._make_app(policy)

    @property
    def state(self) -> str:
        """Whether the service is "starting", "ready" or "stopping"."""
        return self._state

    def ready(self) -> None:
        """Lets requests in, unless the service is stopping already."""
        if self._state == "starting":
            self._state = "ready"

    def stop_accepting(self) -> None:
        """Refuses new requests with 503."""
        self._state = "stopping"

    def _make_app(self, policy: Policy) -> ASGIApp:
        routes = [
            self._route("/v1/sample", "sample", self._sample, "POST"),
            self._route("/v1/edit", "edit", self._edit, "POST"),
            self._route("/v1/segment", "segment", self._segment, "POST"),
            self._route("/v1/classes", "classes", _constant(self._classes())),
            self._route("/openapi.json", "openapi", _constant(openapi.document(self._fields))),
            self._route("/healthz", "healthz", self._healthz),
            self._route("/readyz", "readyz", self._readyz),
            self._route("/metrics", "metrics", self._scrape),
            self._route("/", "page", self._page.serve),
            self._route("/static/{name:path}", "page", self._page.serve),
        ]
        middleware = [Middleware(Observed, metrics=self._metrics), Middleware(Secured, policy=policy)]
        return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error})

    def _route(self, path: str, name: str, handler: Handler, method: str = "GET") -> Route:
        @functools.wraps(handler)
        async def serve(request: Request) -> Response:
            request.scope["state"]["route"] = name
            request_id = request.state.request_id
            try:
                if method == "POST":
                    return await self._counted(request, handler)
                return await handler(request)
            except Problem as problem:
                return problem.response(request_id)
            except InputError as error:
                return refusal(error).response(request_id)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                logger.exception("A request failed.")
                return Problem(500, "the request failed; the log of the server says why.").response(request_id)

        return Route(path, serve, methods=[method])

    async def _counted(self, request: Request, handler: Handler) -> Response:
        if self._state != "ready":
            raise busy(503, f"the server is {self._state}; try again later.", 5)
        self.in_flight += 1
        try:
            response = await handler(request)
        except BaseException:
            self.in_flight -= 1
            raise
        if isinstance(response, EventStream):  # which counts until its last event
            response.on_end.append(self._end_stream)
        else:
            self.in_flight -= 1
        return response

    def _end_stream(self) -> None:
        self.in_flight -= 1

    async def _sample(self, request: Request) -> Response:
        return await self._images(request, "sample", "mask", self._calls.sample, (_PNG, _JSON, _PARTS, _EVENTS))

    async def _edit(self, request: Request) -> Response:
        return await self._images(request, "edit", None, self._calls.edit, (_PNG, _JSON, _PARTS))

    async def _images(
        self,
        request: Request,
        name: str,
        image: str | None,
        make: Callable[[Mapping[str, Any]], Call],
        forms: tuple[str, ...],
    ) -> Response:
        arrival = time.monotonic()
        form = chosen(request.headers, forms)
        ticket = self._superseding.enter(self._stream_id(request))
        is_handed_over = False
        try:
            given = parse(await self._bodies.fields(request, image), self._fields[name])
            call = await self._in_worker(make, given)
            ticket.check()
            count = len(call.faces)
            if form == "any":
                form = _PNG if count == 1 else _JSON
            if form == _PNG and count > 1:
                raise Problem(406, f"image/png holds one image, not {count}; accept {_JSON} or {_PARTS}.")
            if form == _EVENTS and count > self._limits.max_batch:
                raise Problem(422, f"a stream has at most {self._limits.max_batch} images, got {count}.")
            job = Job(call.faces, call.settings, call.every if form == _EVENTS else 0)
            ticket.job = job
            self.batcher.submit(job)
            request.scope["state"]["images"] = count
            deadline = arrival + self._limits.timeout_secs
            if form == _EVENTS:
                is_handed_over = True
                stream = EventStream(self._events(request, call, job, deadline))
                stream.on_end.append(functools.partial(self._drop, job, ticket))
                return stream
            pngs = await self._result(request, call, job, deadline)
            return _response(form, call, job, pngs)
        finally:
            if not is_handed_over:
                self._superseding.leave(ticket)

    async def _result(self, request: Request, call: Call, job: Job, deadline: float) -> list[bytes]:
        """Returns the images of a job; stops it when the client leaves or the time is over."""
        waiting = asyncio.ensure_future(_last_event(job))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait(
                {waiting, leaving}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if waiting.done():
                return await self._in_worker(call.encode, waiting.result())
            if leaving.done():
                self._metrics.abandoned.inc()
                raise ClientDisconnect
            raise self._late()
        finally:
            waiting.cancel()
            leaving.cancel()
            job.cancel()
            self.batcher.wake()

    async def _events(self, request: Request, call: Call, job: Job, deadline: float) -> AsyncGenerator[tuple[str, Any]]:
        """Yields the events of a stream, whose last one is "done" or "error"."""
        request_id, steps = request.state.request_id, call.settings.steps
        while True:
            name, value = await self._event_before(deadline, job)
            if name == "start":
                about = {"request_id": request_id, "steps": steps, "seeds": call.seeds}
                yield name, {**about, "settings": call.shown_settings()}
            elif name == "step":
                step, predicted = value
                pngs = _base64(await self._in_worker(call.encode, predicted))
                yield name, {"step": step, "steps": steps, "images": pngs}
            elif name == "done":
                yield name, _result_json(call, _base64(await self._in_worker(call.encode, value)))
                return
            else:
                yield name, value.body(request_id)
                return

    async def _event_before(self, deadline: float, job: Job) -> tuple[str, Any]:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await job.event()
        except TimeoutError:
            return "error", self._late()

    def _late(self) -> Problem:
        return Problem(504, f"the images were not ready within {self._limits.timeout_secs:g} seconds.")

    def _drop(self, job: Job, ticket: Ticket) -> None:
        """Stops a job that is not needed any more, and forgets its request."""
        job.cancel()
        self.batcher.wake()
        self._superseding.leave(ticket)

    async def _segment(self, request: Request) -> Response:
        form = chosen(request.headers, (_PNG, _JSON))
        given = parse(await self._bodies.fields(request, "photo"), self._fields["segment"])
        mask = await self._in_worker(self._calls.segment, given)
        png = await self._in_worker(images.png_of, mask)
        height, width = mask.shape
        if form == _JSON:
            [text] = _base64([png])
            return _json({"mask": text, "width": width, "height": height})
        return Response(png, media_type=_PNG, headers={"Cache-Control": "no-store"})

    async def _in_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function in a thread for images, with the request id in its log."""
        run = functools.partial(contextvars.copy_context().run, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._workers, run)

    def _stream_id(self, request: Request) -> str:
        given = request.headers.get("x-stream-id", "")
        if given and not _STREAM_ID.fullmatch(given):
            raise Problem(400, "X-Stream-Id must be 1 to 64 of the characters A-Z a-z 0-9 . _ -.")
        return given

    async def _healthz(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        return _json({"status": self._state}, 200 if self._state == "ready" else 503)

    async def _scrape(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def _classes(self) -> dict[str, Any]:
        """Returns the response of `/v1/classes`."""
        config, limits = self._pipe.config, self._limits
        classes, settings = config.data.classes, setting_fields(limits)
        ranges = {field.name: list(field.choices) if field.choices else [field.low, field.high] for field in settings}
        defaults = {field.name: getattr(config.sample, field.name) for field in settings}
        return {
            "title": classes.title,
            "names": classes.names,
            "colors": classes.colors,
            "mirrored": classes.mirrored,
            "ignored": classes.ignored,
            "resolution": config.data.image_size,
            "class_sets": self._calls.class_sets,
            "segment": self._pipe.parser is not None,
            "step": self._pipe.step,
            "defaults": {"num_samples": 1, "seed": config.sample.seed, **defaults},
            "limits": {
                "num_samples": [1, limits.max_samples],
                "seed": [0, 2**32 - 1],
                **ranges,
                "stream_images": limits.max_batch,
                "body_bytes": limits.body_bytes,
                "mask_pixels": limits.mask_pixels,
                "photo_pixels": limits.photo_pixels,
                "queue": limits.max_queue,
                "timeout_secs": limits.timeout_secs,
            },
        }


async def _last_event(job: Job) -> Any:
    while True:
        name, value = await job.event()
        if name == "done":
            return value
        if name == "error":
            raise value


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: "there is no such path; see /openapi.json.", 405: "this path has another method; see Allow."}
    problem = Problem(error.status_code, texts.get(error.status_code, error.detail), error.headers)
    return problem.response(request.state.request_id)


def _constant(value: Any) -> Handler:
    content = json.dumps(value).encode()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def serve(request: Request) -> Response:
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_JSON, headers=headers)

    return serve


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, {"Cache-Control": "no-store"}, _JSON)


def _base64(pngs: list[bytes]) -> list[str]:
    return [base64.b64encode(png).decode("ascii") for png in pngs]


def _result_json(call: Call, pngs: list[str]) -> dict[str, Any]:
    width, height = call.size
    size = {"width": width, "height": height}
    return {"images": pngs, "seeds": call.seeds, **size, "settings": call.shown_settings()}


def _response(form: str, call: Call, job: Job, pngs: list[bytes]) -> Response:
    if form == _PNG:
        response = Response(pngs[0], media_type=_PNG)
    elif form == _PARTS:
        response = multipart_response(pngs)
    else:
        response = _json(_result_json(call, _base64(pngs)))
    queue, compute = 1000 * job.queue_secs, 1000 * job.compute_secs
    response.headers["Server-Timing"] = f"queue;dur={queue:.1f}, compute;dur={compute:.1f}"
    response.headers["X-Seeds"] = ",".join(map(str, call.seeds))
    response.headers["Cache-Control"] = "no-store"
    return response
