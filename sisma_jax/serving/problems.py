"""Errors as responses: application/problem+json with the key "error"."""

import http
import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """A request that is refused or has failed.

    Attributes:
      status: HTTP status code.
      error: what is wrong, and the fix.
      headers: of the response.
    """

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None):
        super().__init__(error)
        self.status = status
        self.error = error
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """Returns the JSON object of the response.

        Args:
          request_id: of the request that is refused or has failed.
        """
        title = http.HTTPStatus(self.status).phrase
        return {"error": self.error, "status": self.status, "title": title, "request_id": request_id}

    def response(self, request_id: str) -> Response:
        """Returns the response.

        Args:
          request_id: of the request that is refused or has failed.
        """
        # What is wrong may quote the request, which need not be valid Unicode.
        content = json.dumps(self.body(request_id)).encode()
        return Response(content, self.status, self.headers, MEDIA_TYPE)


def busy(status: int, error: str, retry_secs: int = 1) -> Problem:
    """Returns a problem that goes away, with the header Retry-After.

    Args:
      status: 429 or 503.
      error: what is wrong.
      retry_secs: value of the header.
    """
    return Problem(status, error, {"Retry-After": str(retry_secs)})
