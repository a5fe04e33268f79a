"""One server for the tests that do not change it."""

import pytest

from tests.serving.running import serving


@pytest.fixture(scope="module")
def server(weights):
    """A server with small limits."""
    with serving(weights, "--max_batch", "4", "--max_steps", "1000", "--body_timeout", "3") as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
