"""One exported model for all tests of the server, and one server for those that do not change it."""

import pytest

from tests.serving.running import export_model, serving


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The file of a tiny model with a face parser."""
    file = tmp_path_factory.mktemp("served") / "tiny.safetensors"
    export_model(file)
    return file


@pytest.fixture(scope="module")
def server(weights):
    """A server with small limits."""
    with serving(weights, "--max_batch", "4", "--max_steps", "1000", "--body_timeout", "3") as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
