"""Prometheus metrics, one line of JSON per request on stderr, and request ids."""

import contextvars
import datetime
import json
import logging
import re
import time
import uuid
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = contextvars.ContextVar("request_id", default="")
"""Id of the request that the current task or thread serves."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")

requests_log = logging.getLogger("sisma_jax.serving.requests")


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("sisma_requests", "Requests.", ("route", "method", "status"), registry=registry)
        self.duration = Histogram(
            "sisma_request_duration_seconds", "Time of a request.", ("route",), registry=registry, buckets=_SECS
        )
        self.queue = Gauge("sisma_queue_images", "Images that wait.", registry=registry)
        self.queue_wait = Histogram(
            "sisma_queue_wait_seconds", "Time of a job in the queue.", registry=registry, buckets=_SECS
        )
        self.batch_images = Histogram(
            "sisma_batch_images", "Images of a batch.", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.batch_duration = Histogram(
            "sisma_batch_duration_seconds", "Time of a batch.", registry=registry, buckets=_SECS
        )
        self.images = Counter("sisma_images", "Images that were sent.", ("route",), registry=registry)
        self.programs = Gauge("sisma_programs", "Compiled programs of the network.", registry=registry)
        self.warm_programs = Gauge("sisma_programs_at_start", "Those compiled at start.", registry=registry)
        self.superseded = Counter("sisma_superseded", "Requests that a newer one superseded.", registry=registry)
        self.abandoned = Counter("sisma_abandoned", "Jobs that their clients have left.", registry=registry)

    def text(self) -> bytes:
        """Returns the metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, with the fields of its attribute `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "request_id": REQUEST_ID.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value != ""})


class Observed:
    """ASGI middleware: gives every request an id, counts it, and logs it when its response ends."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        state = scope.setdefault("state", {})
        state["request_id"], state["images"], start, status = request_id, 0, time.monotonic(), 499

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            secs, route = time.monotonic() - start, state.get("route", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(route, method, str(status)).inc()
            self._metrics.duration.labels(route).observe(secs)
            if 200 <= status < 300:
                self._metrics.images.labels(route).inc(state["images"])
            fields = {
                "method": method,
                "route": route,
                "status": status,
                "duration_ms": round(1000 * secs, 1),
                "images": state["images"],
                "client": (scope.get("client") or [""])[0],
            }
            requests_log.info("request", extra={"fields": fields})
