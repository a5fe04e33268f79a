"""Who may ask: host names, origins, the API key, and the headers that restrict what a browser does with a response."""

import dataclasses
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sisma_jax.errors import InputError
from sisma_jax.serving.problems import Problem

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_CORS_HEADERS = "Authorization, Content-Type, X-Request-Id, X-Stream-Id"
_EXPOSED_HEADERS = "X-Request-Id, X-Seeds, Server-Timing, Retry-After"
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?")


def is_loopback(host: str) -> bool:
    """Returns whether a server on this host can only be reached from its own machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclasses.dataclass(frozen=True)
class Policy:
    """Who may ask.

    Attributes:
      hosts: names that the header Host may have; None for any.
      origins: other origins whose pages may send requests (CORS).
      api_key: that /v1 and /metrics require; "" for none.

    Raises:
      InputError: an origin or the key is malformed.
    """

    hosts: frozenset[str] | None
    origins: frozenset[str] = frozenset()
    api_key: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        for origin in self.origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise InputError(f"`cors` {origin!r} is no origin; write it as https://HOST or http://HOST:PORT.")
        if self.api_key and not re.fullmatch(r"[\x21-\x7e]{8,1024}", self.api_key):
            raise InputError("the API key must have 8 to 1024 printable ASCII characters without spaces.")

    @classmethod
    def of(cls, host: str, allowed: tuple[str, ...], origins: tuple[str, ...], api_key: str) -> "Policy":
        """Returns the policy of a server on a host.

        Args:
          host: on which the server listens.
          allowed: further names of the header Host.
          origins: of CORS.
          api_key: "" for none.
        """
        names = frozenset(name.lower() for name in allowed)
        if is_loopback(host):
            hosts: frozenset[str] | None = names | _LOOPBACK_NAMES | {host.lower()}
        else:
            hosts = names or None
        return cls(hosts, frozenset(origins), api_key)

    def check_host(self, headers: Headers) -> None:
        """Raises Problem (421) if the header Host is malformed or names another host."""
        match = _HOST.fullmatch(headers.get("host", ""))
        if len(headers.getlist("host")) != 1 or match is None:
            raise Problem(400, "the header Host is missing or malformed.")
        if self.hosts is not None and (match[1] or match[2]).lower() not in self.hosts:
            raise Problem(421, "the header Host names another host; start the server with it in `allowed_hosts`.")

    def check_origin(self, headers: Headers) -> None:
        """Raises Problem (403) if a page of another site sends the request."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin in self.origins:
            return
        is_own = origin is None or (origin != "null" and urlsplit(origin).netloc == headers["host"])
        if not is_own or site not in ("none", "same-origin"):
            raise Problem(403, "pages of other sites may not send requests; start the server with `cors`.")

    def check_key(self, headers: Headers) -> None:
        """Raises Problem (401) if the API key is missing or wrong."""
        if not self.api_key:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        if not (hmac.compare_digest(given, self.api_key.encode()) and scheme.lower() == "bearer"):
            raise Problem(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
            )


class Secured:
    """ASGI middleware that enforces a `Policy`, answers CORS preflights, and adds headers to every response."""

    def __init__(self, app: ASGIApp, policy: Policy):
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, policy = Headers(scope=scope), self._policy
        origin = headers.get("origin", "")
        allowed = origin if origin in policy.origins else ""

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                response = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    response.setdefault(name, value)
                if policy.origins:
                    response.add_vary_header("Origin")
                if allowed:
                    response["Access-Control-Allow-Origin"] = allowed
                    response["Access-Control-Expose-Headers"] = _EXPOSED_HEADERS
                    response["Cross-Origin-Resource-Policy"] = "cross-origin"
            await send(message)

        try:
            response = self._checked(scope, headers, allowed)
        except Problem as problem:
            response = problem.response(scope["state"]["request_id"])
        await (response or self._app)(scope, receive, send_secured)

    def _checked(self, scope: Scope, headers: Headers, allowed: str) -> Response | None:
        """Returns the response to a preflight; None for a request that may pass."""
        policy = self._policy
        policy.check_host(headers)
        if scope["method"] == "OPTIONS" and allowed and "access-control-request-method" in headers:
            granted = {"Allow-Methods": "GET, POST", "Allow-Headers": _CORS_HEADERS, "Max-Age": "600"}
            return Response(None, 204, {f"Access-Control-{name}": value for name, value in granted.items()})
        if scope["method"] not in ("GET", "HEAD"):
            policy.check_origin(headers)
        if scope["path"].startswith("/v1/") or scope["path"] == "/metrics":
            policy.check_key(headers)
        return None
