"""What a server refuses: bad input, bombs, slow bodies, strangers. It answers with 4xx, and goes on."""

import json
import socket
import time
import zlib

import httpx
import numpy as np
import pytest

from sisma_jax import cli
from tests.serving.hostile import BOMBS, png_header, requests
from tests.serving.running import mask_png, png, serving

PNG, JSON = {"Content-Type": "image/png"}, {"Content-Type": "application/json"}
ROWS = [[0, 1], [2, 3]]


def refused(response, status, *texts):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    for text in texts:
        assert text in problem["error"], problem["error"]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "not valid JSON"),
        (b'{"mask": NaN}', 400, "NaN"),
        (b"[" * 100_000, 413, "nested too deeply"),
        (b"[]", 422, "JSON object"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b'{"seed": 1, "seed": 2}', 422, "given twice"),
        (b"{}", 422, "'mask' is missing"),
        (b'{"mask": null}', 422, "'mask' is missing"),
        (b'{"mask": "$$"}', 400, "not base64"),
        (b'{"mask": "AAAA"}', 415, "no PNG file"),
        (b'{"mask": 3}', 422, "'mask' must be base64"),
        (b'{"mask": [[0], [1, 2]]}', 422, "rows of the same length"),
        (b'{"mask": [[0, 255]]}', 422, "mask"),
        (b'{"mask": [[0, 1e9]]}', 422, "whole numbers"),
        (b'{"mask": [[0]], "steps": 1001}', 422, "'steps' must be in [1, 1000]"),
        (b'{"mask": [[0]], "steps": true}', 422, "'steps' must be a whole number"),
        (b'{"mask": [[0]], "solver": "rk9"}', 422, "euler"),
        (b'{"mask": [[0]], "guidance_low": 0.9, "guidance_high": 0.1}', 422, "guidance_high"),
        (b'{"mask": [[0]], "seeds": []}', 422, "'seeds' is empty"),
        (b'{"mask": [[0]], "seeds": [1], "seed": 1}', 422, "takes the place of"),
        (b'{"mask": [[0]], "seed": 1' + b"0" * 5000 + b"}", 400, "not valid JSON"),
    ],
)
def test_a_wrong_json_body_is_named(client, body, status, text):
    refused(client.post("/v1/sample", content=body, headers=JSON), status, text)


def test_wrong_forms_are_refused(client):
    refused(client.post("/v1/sample", content=b"", headers=PNG), 400, "empty")
    refused(client.post("/v1/sample", content=b"a", headers={"Content-Type": "text/plain"}), 415, "Content-Type")
    gzip = {**PNG, "Content-Encoding": "gzip"}
    refused(client.post("/v1/sample", content=mask_png(), headers=gzip), 415, "Content-Encoding")
    refused(client.post("/v1/sample?seed=1", json={"mask": ROWS}), 422, "query parameters")
    refused(client.post("/v1/sample?seed=1&seed=2", content=mask_png(), headers=PNG), 422, "given twice")
    refused(client.post("/v1/sample", json={"mask": ROWS}, headers={"Accept": "text/html"}), 406, "image/png")
    several = {"mask": ROWS, "num_samples": 2}
    refused(client.post("/v1/sample", json=several, headers={"Accept": "image/png"}), 406, "application/json")
    refused(client.post("/v1/edit", content=mask_png(), headers=PNG), 415)
    refused(client.put("/v1/sample"), 405, "Allow")
    assert client.put("/v1/sample").headers["allow"] == "POST"
    refused(client.get("/nowhere"), 404, "/openapi.json")
    refused(client.post("/v1/sample", files={"mask": mask_png()}, data={"steps": "two"}), 422, "'steps'")
    refused(client.post("/v1/sample", data={"mask": "/etc/passwd"}), 415)
    refused(client.post("/v1/sample", files={"mask": ("x", mask_png()), "seed": ("y", b"1")}), 422, "text part")
    refused(client.post("/v1/sample", json={"mask": ROWS}, headers={"X-Stream-Id": "a b"}), 400, "X-Stream-Id")


def test_the_library_names_what_is_wrong_with_an_image(client):
    refused(client.post("/v1/sample", content=png(np.full((4, 4), 200, np.uint8)), headers=PNG), 422, "mask")
    refused(client.post("/v1/sample", content=mask_png()[:-30], headers=PNG), 422, "truncated")
    photo = png(np.zeros((16, 16, 3), np.uint8))
    same = {"image": photo, "mask": mask_png(), "image_mask": mask_png()}
    refused(client.post("/v1/edit", files=same), 422)
    refused(client.post("/v1/segment", content=b"GIF89a" + b"\0" * 50, headers={"Content-Type": "image/png"}), 415)


@pytest.mark.parametrize("bomb", BOMBS)
def test_image_bombs_take_no_memory_and_claims_without_data_are_refused(server, client, bomb):
    used = [_memory(server)]
    for _ in range(2):
        for path, name in (("/v1/sample", "mask"), ("/v1/segment", "photo")):
            response = client.post(path, files={name: BOMBS[bomb]})
            # `deflate` is a valid image of zeros of as many pixels as a mask may have, with excess data behind them.
            wanted = (200, 413, 415, 422) if bomb == "deflate" else (413, 415, 422)
            assert response.status_code in wanted, response.text
        used.append(_memory(server))
    assert used[1] < used[0] + ((512 if bomb == "deflate" else 50) << 20)
    assert used[2] < used[1] + (20 << 20)  # freed memory is used again


def _memory(server):
    pages = int(open(f"/proc/{server.process.pid}/statm").read().split()[1])
    return pages * 4096


def test_a_body_that_is_too_large_is_refused_at_its_header(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        lines = ("POST /v1/sample HTTP/1.1", f"Host: {host}", "Content-Type: image/png", "Content-Length: 99999999999")
        head = "\r\n".join([*lines, "", ""])
        sock.sendall(head.encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_a_slow_body_gets_408_and_slow_headers_are_cut_off(server):
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/sample HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\nab"
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(head.encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 408")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(head[:30].encode())
        assert sock.recv(100) == b""


def test_other_sites_and_other_names_are_refused(client, server):
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/sample", json={"mask": ROWS}, headers=own).status_code == 200
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        refused(client.post("/v1/sample", json={"mask": ROWS}, headers=headers), 403, "other sites")
    port = server.url.rsplit(":", 1)[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil"):
        refused(client.get("/v1/classes", headers={"Host": host}), 421, "allowed_hosts")
    for host in ("localhost", f"127.0.0.1:{port}", "[::1]"):
        assert client.get("/v1/classes", headers={"Host": host}).status_code == 200
    refused(client.get("/healthz", headers={"Host": "a b"}), 400, "Host")


def test_every_response_has_the_headers_of_security(client):
    for path in ("/", "/nowhere", "/v1/classes", "/healthz"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/..%2fapp.py", "/static//etc/passwd", "/static/"])
def test_the_page_opens_no_paths(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert b"import" not in response.content


@pytest.mark.slow
def test_hostile_requests_get_4xx_and_the_server_lives(server):
    counts: dict[int, int] = {}
    with server.client() as client:
        for method, path, options in requests(400):
            try:
                status = client.request(method, path, **options).status_code
            except (httpx.LocalProtocolError, httpx.InvalidURL):  # httpx refuses to send it
                continue
            except httpx.RemoteProtocolError:  # the connection was closed
                status = 0
            counts[status] = counts.get(status, 0) + 1
            assert status < 500, (method, path, options)
        assert client.get("/readyz").status_code == 200
        assert client.post("/v1/sample", json={"mask": ROWS}).status_code == 200
    assert sum(counts.values()) > 300
    lines = [json.loads(line) for line in server.log if line.startswith("{")]
    assert lines
    assert not [line for line in lines if line["level"] in ("error", "critical")]


def test_an_api_key_is_required_where_it_is_set(weights):
    key = "correct-horse-battery"
    with serving(weights, "--max_batch", "1", environment={"SISMA_API_KEY": key}) as server, server.client() as client:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        for headers in ({}, {"Authorization": f"Bearer {key}x"}, {"Authorization": key}, {"Authorization": "Basic x"}):
            for path in ("/v1/classes", "/metrics"):
                response = client.get(path, headers=headers)
                refused(response, 401, "Bearer")
                assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/classes", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert not any(key in line for line in server.log)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--host", "0.0.0.0"], "is no loopback address"),
        (["--api_key_file", "/nonexistent"], "cannot be read"),
        (["--max_batch", "3"], "power of two"),
        (["--cors", "example.org"], "is no origin"),
        (["--port", "99999"], "must be in [0, 65535]"),
        (["--host", "..", "--insecure"], "cannot be listened on"),
    ],
)
def test_options_that_do_not_fit_stop_with_one_clear_line(weights, capsys, options, text):
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--weights", str(weights), *options])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert text in told
    assert "Traceback" not in told
    assert options[0] in told


def test_zip_bombs_in_text_chunks_are_harmless(client):
    text = zlib.compress(b"a" * (1 << 26))
    good = mask_png()
    bomb = b"iTXt" + b"k\0\1\0\0\0" + text
    chunk = len(bomb[4:]).to_bytes(4, "big") + bomb + zlib.crc32(bomb).to_bytes(4, "big")
    start = time.monotonic()
    status = client.post("/v1/sample", content=good[:33] + chunk + good[33:], headers=PNG).status_code
    assert status in (200, 422)
    assert time.monotonic() - start < 60
    assert png_header(1, 1)
