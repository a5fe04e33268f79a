"""Named weights: those in the package, and those on a stand-in of the Hugging Face Hub."""

import hashlib
import http.server
import importlib.resources
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sisma_jax.errors import InputError
from sisma_jax.runs import named_weights

ROOT = Path(__file__).parents[2]
CONTENT = b"safetensors" * 1000
COMMIT = "c" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one repository, owner/faces: model.safetensors in LFS, and README.md."""

    sha256 = hashlib.sha256(CONTENT).hexdigest()

    def do_GET(self):
        if self.path.startswith("/api/models/owner/faces"):
            lfs = {"sha256": self.sha256, "size": len(CONTENT), "pointerSize": 130}
            files = [
                {"rfilename": "README.md", "size": 3, "blobId": "0" * 40},
                {"rfilename": "model.safetensors", "size": len(CONTENT), "blobId": "1" * 40, "lfs": lfs},
            ]
            self._send(json.dumps({"id": "owner/faces", "sha": COMMIT, "siblings": files}).encode())
        elif self.path == f"/owner/faces/resolve/{COMMIT}/model.safetensors":
            self._send(CONTENT)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _send(self, content):
        self.send_response(200)
        for name, value in (("ETag", f'"{self.sha256}"'), ("X-Repo-Commit", COMMIT), ("Content-Length", len(content))):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *values):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def found(hub, cache, address):
    """What a process of its own finds, because huggingface_hub reads its environment when it is imported."""
    code = (
        "import sys; from sisma_jax.errors import InputError; from sisma_jax.runs import named_weights\n"
        "try: print(named_weights.find(sys.argv[1]))\n"
        "except InputError as error: print('InputError:', error)\n"
    )
    variables = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, address]
    return subprocess.run(command, env=variables, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("address", ["hf://owner/faces", "hf://owner/faces/model.safetensors@main"])
def test_a_file_of_the_hub_is_downloaded_and_checked(hub, tmp_path, address):
    pytest.importorskip("huggingface_hub")
    assert Path(found(hub, tmp_path, address)).read_bytes() == CONTENT


def test_a_file_with_another_checksum_is_refused(hub, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(Hub, "sha256", "0" * 64)
    assert "damaged (checksum)" in found(hub, tmp_path, "hf://owner/faces")


def test_what_the_hub_does_not_have_is_an_error(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    assert "must name one .safetensors file" in found(hub, tmp_path, "hf://owner/faces/other.safetensors")
    assert "cannot be downloaded" in found(hub, tmp_path, "hf://owner/nothing")


@pytest.mark.parametrize(
    "address",
    [
        "hf://owner",
        "hf://owner/faces/model.bin",
        "hf://owner/../x.safetensors",
        "hf:///x",
        "hf://a/b/../../x.safetensors",
    ],
)
def test_other_addresses_are_refused_before_anything_is_asked(address):
    with pytest.raises(InputError, match="is no address of weights"):
        named_weights.find(address)


def test_paths_are_no_names(tmp_path):
    assert named_weights.find(tmp_path) == tmp_path
    assert named_weights.find("demo/x.safetensors") == "demo/x.safetensors"


def test_a_package_without_the_demo_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path / package)
    with pytest.raises(InputError, match="the package has no demo weights"):
        named_weights.find("demo")
