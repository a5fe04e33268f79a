"""Requests that nobody should send: truncated files, bombs, wrong types, path tricks. For tests and benchmarks."""

import base64
import json
import socket
import struct
import time
import zlib

import numpy as np

from tests.serving.running import Server, mask_png, png

_JUNK = [None, True, -1, 1e308, 10**400, "", "\0", "../../etc/passwd", "file:///etc/passwd", [], {}, [[]], "1", 1.5]
_PATHS = [
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static//etc/passwd",
    "/static/%2e%2e/%2e%2e/config.py",
    "/v1/sample/",
    "/v1/%00",
    "//v1/sample",
    "/" + "a" * 5000,
]


def png_header(width: int, height: int, data: bytes = b"", depth: int = 8, color: int = 0) -> bytes:
    """A PNG file that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", data or zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


BOMBS = {
    "huge": png_header(60_000, 60_000),
    "wide": png_header(2**31 - 1, 1),
    "empty": png_header(0, 0),
    "deflate": png_header(4096, 4096, zlib.compress(b"\0" * (1 << 26), 9)),
    "short": png_header(64, 64),
    "depth": png_header(16, 16, depth=77),
}


def requests(count: int, seed: int = 0):
    """Yields (method, path, options of httpx) of hostile requests."""
    rng = np.random.default_rng(seed)
    good = mask_png()
    for _ in range(count):
        yield _one(rng, good)


def _one(rng: np.random.Generator, good: bytes) -> tuple[str, str, dict]:
    path = str(rng.choice(["/v1/sample", "/v1/edit", "/v1/segment"]))
    kind = rng.integers(9)
    if kind == 0:
        return str(rng.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS"])), str(rng.choice(_PATHS)), {}
    if kind == 1:
        return "POST", path, {"content": _damaged(rng, good), "headers": {"Content-Type": "image/png"}}
    if kind == 2:
        bomb = BOMBS[str(rng.choice(list(BOMBS)))]
        name = {"/v1/segment": "photo", "/v1/sample": "mask", "/v1/edit": "image"}[path]
        return "POST", path, {"files": {name: bomb, **({"mask": bomb} if name == "image" else {})}}
    if kind == 3:
        body = rng.choice(
            ["[" * 100_000, '{"mask":' * 5000, "{", '{"seed": NaN}', '{"a":1,"a":2}', "\ud800", "1" * 9999]
        )
        return "POST", path, {"content": str(body).encode("utf-8", "surrogatepass"), "headers": _json()}
    if kind == 4:
        fields = [
            "mask",
            "image",
            "photo",
            "seed",
            "seeds",
            "steps",
            "solver",
            "guidance",
            "num_samples",
            "square",
            "x",
        ]
        values = {str(name): _JUNK[rng.integers(len(_JUNK))] for name in rng.choice(fields, 4)}
        return "POST", path, {"content": json.dumps({"mask": [[0]], **values}), "headers": _json()}
    if kind == 5:
        content = (
            b'--x\r\nContent-Disposition: form-data; name=mask; filename="../../a"\r\n\r\n' + good[: rng.integers(99)]
        )
        boundary = rng.choice(["x", "", "y", "x; charset=none"])
        return (
            "POST",
            path,
            {"content": content, "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}},
        )
    if kind == 6:
        names = ["Host", "Origin", "Content-Encoding", "Accept", "X-Stream-Id", "Authorization", "Sec-Fetch-Site"]
        values = ["evil.example", "", "gzip", "a/b;q=x", "é".encode("latin-1"), "x" * 9000, "null"]
        headers = {str(rng.choice(names)): values[rng.integers(len(values))], "Content-Type": "image/png"}
        return "POST", path, {"content": good, "headers": headers}
    if kind == 7:
        query = str(rng.choice(["seed=x", "seed=1&seed=2", "steps=1e9", "seeds=1,,2", "mask=1", "a" * 9000, "%ff=%00"]))
        return "POST", f"{path}?{query}", {"content": good, "headers": {"Content-Type": "image/png"}}
    rows = rng.integers(-5, 400, (rng.integers(4), rng.integers(4))).tolist()
    image = base64.b64encode(png(np.zeros((8, 8, 3), np.uint8))).decode()
    return "POST", path, {"json": {"mask": rows, "image": image, "region": rows, "photo": image[: rng.integers(40)]}}


def slow_body(server: Server) -> int:
    """The status for a body of which a byte arrives now and then; 0 if the connection is closed."""
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/sample HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=0.5) as sock:
        sock.sendall(head.encode())
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                sock.sendall(b"x")
                answer = sock.recv(100)
            except TimeoutError:
                continue
            except OSError:
                return 0
            return int(answer.split()[1]) if answer else 0
    raise AssertionError("a slow body keeps its connection for a minute")


def _json() -> dict[str, str]:
    return {"Content-Type": "application/json"}


def _damaged(rng: np.random.Generator, good: bytes) -> bytes:
    data = bytearray(good)
    for _ in range(rng.integers(1, 9)):
        data[rng.integers(len(data))] = rng.integers(256)
    return bytes(data[: rng.integers(len(data))] if rng.random() < 0.5 else data)
