"""The body of a request to named values, within limits of size, time, number and depth."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from sisma_jax.serving.limits import MAX_FIELDS, MAX_TEXT, Limits
from sisma_jax.serving.problems import Problem, busy

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")


class Text(str):
    """A value that is written as text: in a query, or in a text part of multipart/form-data."""

    __slots__ = ()


class Upload(bytes):
    """The bytes of an image, as a body or a file part."""

    __slots__ = ()


class BodyReader:
    """Reads bodies, whose bytes in memory are bounded for all requests together."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._buffered = 0

    async def fields(self, request: Request, image: str | None) -> dict[str, Any]:
        """Returns the fields of a request by name: `Upload`, `Text`, or values of JSON.

        Args:
          request: its body has not been read.
          image: name of the field that an image as body gives; None if the body cannot be an image.

        Raises:
          Problem: the body has another type, is malformed, too large or too slow, or a field is given twice.
          ClientDisconnect: the client has left.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Problem(415, "Content-Encoding is not supported; send the body as it is.")
        accepted = ["application/json", "multipart/form-data"] + [*IMAGE_TYPES] * (image is not None)
        if kind not in accepted:
            raise Problem(415, f"Content-Type must be one of {', '.join(accepted)}, got {kind[:100]!r}.")
        if kind not in IMAGE_TYPES and request.url.query:
            raise Problem(422, "query parameters are accepted only with an image as body; put them into the body.")
        data = await self._read(request)
        try:
            if kind == "application/json":
                return await asyncio.to_thread(_from_json, data)
            if kind == "multipart/form-data":
                return await _from_multipart(request.headers, data)
            assert image is not None
            return {image: Upload(data), **_from_query(request, image)}
        finally:
            self._buffered -= len(data)

    async def _read(self, request: Request) -> bytes:
        limits = self._limits
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > limits.body_bytes:
            raise self._too_large()
        chunks, size = [], 0
        try:
            async with asyncio.timeout(limits.body_secs):
                async for chunk in request.stream():
                    size += len(chunk)
                    self._buffered += len(chunk)
                    if size > limits.body_bytes:
                        raise self._too_large()
                    if self._buffered > limits.buffered_bytes:
                        raise busy(429, "the server is reading too many bodies at once; try again later.")
                    chunks.append(chunk)
        except BaseException as error:
            self._buffered -= size
            if isinstance(error, TimeoutError):
                raise Problem(
                    408, f"the body did not arrive within {limits.body_secs:g} seconds.", {"Connection": "close"}
                ) from error
            raise
        if not size:
            raise Problem(400, "the body is empty.")
        return b"".join(chunks)

    def _too_large(self) -> Problem:
        return Problem(
            413, f"the body has more than {self._limits.body_bytes} bytes, the limit.", {"Connection": "close"}
        )


def _from_json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except RecursionError:
        raise Problem(413, "the JSON body is nested too deeply.") from None
    except ValueError as error:
        raise Problem(400, f"the body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise Problem(422, "the body must be a JSON object.")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_FIELDS:
        raise Problem(413, f"a JSON object has more than {MAX_FIELDS} members.")
    return _once(pairs)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if any(name == other for other, _ in pairs[:i]))
        raise Problem(422, f"{twice[:100]!r} is given twice.")
    return values


def _from_query(request: Request, image: str) -> dict[str, Any]:
    if len(request.url.query) > MAX_TEXT:
        raise Problem(413, f"the query has more than {MAX_TEXT} characters.")
    pairs = [(name, Text(value)) for name, value in request.query_params.multi_items()]
    if any(name == image for name, _ in pairs):
        raise Problem(422, f"{image!r} is given twice: as body and in the query.")
    return _once(pairs)


async def _from_multipart(headers: Headers, data: bytes) -> dict[str, Any]:
    async def stream() -> AsyncGenerator[bytes]:
        yield data

    parser = MultiPartParser(headers, stream(), max_files=8, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT)
    parser.spool_max_size = len(data) + 1  # parts stay in memory, which the limit of the body bounds
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, ValueError, LookupError) as error:
        what = error.message if isinstance(error, MultiPartException) else str(error)
        raise Problem(400, f"the body is not valid multipart/form-data: {what[:200]}") from None
    pairs = []
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            pairs.append((name, Upload(part.file.read())))
        else:
            pairs.append((name, Text(part)))
    await form.close()
    return _once(pairs)
