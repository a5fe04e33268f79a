"""A server under load: full queue, superseded and abandoned requests, time limits, and SIGTERM."""

import concurrent.futures
import json
import signal
import threading
import time

import httpx
import pytest

from tests.serving.running import Server, mask_png, pixels, serving

MASK = pixels(mask_png()).tolist()
# About a second or more of steps on the test machine, so that others wait meanwhile.
SLOW = {"mask": MASK, "steps": 1000, "solver": "midpoint", "guidance": 2.0}


@pytest.fixture(scope="module")
def busy(weights):
    """A server of single images and a short queue."""
    options = ("--max_batch", "1", "--max_steps", "1000", "--max_queue", "2", "--max_samples", "2", "--timeout", "100")
    with serving(weights, *options) as server:
        yield server


def later(server, body, **headers):
    """Sends a request in a thread; returns its future."""

    def ask():
        with server.client() as client:
            return client.post("/v1/sample", json=body, headers=headers)

    return _THREADS.submit(ask)


_THREADS = concurrent.futures.ThreadPoolExecutor(16)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_requests_beyond_the_queue_get_429_with_retry_after(busy):
    answers = [later(busy, {**SLOW, "seed": i}) for i in range(8)]
    answers = [answer.result() for answer in answers]
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert "queue is full" in refused[0].json()["error"]
    assert busy.metric("sisma_queue_images") == 0


def test_a_newer_request_of_a_stream_id_supersedes_older_ones(busy):
    before = busy.metric("sisma_superseded_total")
    first = later(busy, SLOW, **{"X-Stream-Id": "page"})
    time.sleep(0.2)
    second = later(busy, {**SLOW, "seed": 2}, **{"X-Stream-Id": "page"})
    time.sleep(0.2)
    other = later(busy, {"mask": MASK, "steps": 1}, **{"X-Stream-Id": "another"})
    last = later(busy, {"mask": MASK, "steps": 1, "seed": 3}, **{"X-Stream-Id": "page"})
    assert last.result().status_code == 200
    assert other.result().status_code == 200
    for answer in (first, second):
        assert answer.result().status_code == 409
        assert "superseded" in answer.result().json()["error"]
    assert busy.metric("sisma_superseded_total") == before + 2


def test_a_superseded_stream_ends_with_an_error(busy):
    lines, started = [], threading.Event()

    def read():
        headers = {"Accept": "text/event-stream", "X-Stream-Id": "stream"}
        with busy.client() as client, client.stream("POST", "/v1/sample", json=SLOW, headers=headers) as response:
            for line in response.iter_lines():
                lines.append(line)
                started.set()

    reading = _THREADS.submit(read)
    assert started.wait(60)
    assert later(busy, {"mask": MASK, "steps": 1}, **{"X-Stream-Id": "stream"}).result().status_code == 200
    reading.result()
    shown = [line for line in lines if line]
    assert shown[0] == "event: start"
    assert "event: done" not in shown
    assert shown[-2] == "event: error"
    assert json.loads(shown[-1].removeprefix("data: "))["status"] == 409


def test_a_request_whose_client_has_left_is_not_computed(busy):
    batches = busy.metric("sisma_batch_images_count")
    running = later(busy, SLOW)
    time.sleep(0.2)
    with busy.client(timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/sample", json={**SLOW, "seed": 9})
    assert running.result().status_code == 200
    wait_for(lambda: busy.metric("sisma_queue_images") == 0)
    assert later(busy, {"mask": MASK, "steps": 1}).result().status_code == 200
    assert busy.metric("sisma_batch_images_count") == batches + 2  # `running` and the last one


def test_a_running_batch_that_everybody_has_left_is_stopped(busy):
    before = busy.metric("sisma_abandoned_total")
    with busy.client(timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/sample", json={**SLOW, "num_samples": 2})
    wait_for(lambda: busy.metric("sisma_abandoned_total") > before)


def test_results_that_take_too_long_get_504(weights):
    with serving(weights, "--max_batch", "1", "--max_steps", "1000000", "--timeout", "0.5") as server:
        answer = later(server, {**SLOW, "steps": 1_000_000}).result()
        assert answer.status_code == 504
        assert "0.5 seconds" in answer.json()["error"]
        with server.client() as client:  # the batch is stopped, and the next one is computed
            assert client.get("/readyz").status_code == 200


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(weights):
    server = Server(weights, "--max_batch", "1", "--max_steps", "1000").wait_until_ready()
    with server.client() as client:
        answer = later(server, SLOW)
        wait_for(lambda: server.metric("sisma_queue_wait_seconds_count") == 1)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: any("Stopping" in line for line in server.log))
        if server.process.poll() is None and not answer.done():
            refused = client.post("/v1/sample", json={"mask": MASK})
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert client.get("/readyz").status_code == 503
            assert client.get("/healthz").status_code == 200
        assert answer.result().status_code == 200
    assert server.stop() == 0
    assert not any("Traceback" in line for line in server.log)


def test_sigterm_ends_at_the_limit_what_takes_longer(weights):
    options = ("--max_batch", "1", "--max_steps", "1000000", "--shutdown_timeout", "0.5")
    server = Server(weights, *options).wait_until_ready()
    answer = later(server, {**SLOW, "steps": 1_000_000})
    wait_for(lambda: server.metric("sisma_queue_wait_seconds_count") == 1)
    assert server.stop(timeout=60) == 0
    try:
        assert answer.result().status_code >= 500
    except httpx.TransportError:
        pass
