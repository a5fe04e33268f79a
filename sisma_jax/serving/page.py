"""The files of the page, which are read once from the package."""

import dataclasses
import hashlib
import importlib.resources
import mimetypes
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from typing import Self

from starlette.requests import Request
from starlette.responses import Response

from sisma_jax.serving.problems import Problem
from sisma_jax.serving.security import PAGE_POLICY

_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".webmanifest": "application/manifest+json"}


@dataclasses.dataclass(frozen=True)
class Page:
    """The files of the page by name, with their media types and tags."""

    files: Mapping[str, tuple[bytes, str, str]]

    @classmethod
    def load(cls) -> Self:
        """Returns the page of the package; it may have no files."""
        root = importlib.resources.files("sisma_jax.serving") / "static"
        return cls(dict(_read(root, ""))) if root.is_dir() else cls({})

    async def serve(self, request: Request) -> Response:
        """Returns the file that the path names; `/` is index.html.

        Raises:
          Problem: the page has no such file (404).
        """
        name = request.path_params.get("name", "index.html")
        if name not in self.files:
            raise Problem(404, "the page has no such file.")
        content, kind, tag = self.files[name]
        headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)


def _read(folder: Traversable, prefix: str) -> Iterator[tuple[str, tuple[bytes, str, str]]]:
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            yield from _read(entry, f"{name}/")
        else:
            content, suffix = entry.read_bytes(), f".{entry.name.rsplit('.', 1)[-1]}"
            kind = _TYPES.get(suffix) or mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
            yield name, (content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
