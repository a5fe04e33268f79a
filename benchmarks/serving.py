"""The HTTP server under load, under hostile requests, and after `kill -9`.

    python -m benchmarks.serving --weights faces.safetensors load --clients 50 --secs 60
    python -m benchmarks.serving --weights faces.safetensors fuzz --requests 10000
    python -m benchmarks.serving --weights faces.safetensors kill --times 3

Needs the packages of the group `dev`. `load` compares many clients with one client that waits for each face. It fails
if any status is neither 200 nor 429, `fuzz` at any 5xx, and `kill` if a restarted server does not answer.
"""

import argparse
import collections
import contextlib
import json
import statistics
import threading
import time
from pathlib import Path

import httpx

from tests.serving.hostile import requests, slow_body
from tests.serving.running import Server, mask_png, serving

_PNG = {"Content-Type": "image/png"}
# In place of a status: httpx did not send the request, or the server closed the connection.
_NOT_SENT, _CLOSED = -1, 0


def _ask(client: httpx.Client, seed: int, steps: int) -> tuple[int, float]:
    """Returns the status and the seconds of a request for one face."""
    start = time.perf_counter()
    response = client.post(f"/v1/sample?seed={seed}&steps={steps}", content=mask_png(seed % 8), headers=_PNG)
    return response.status_code, time.perf_counter() - start


def _clients(server: Server, count: int, secs: float, steps: int) -> dict[str, object]:
    """Returns what `count` clients measure, each of which sends its next request after the answer to the last."""
    statuses, times, lock = collections.Counter[int](), list[float](), threading.Lock()
    end = time.perf_counter() + secs

    def work(number: int) -> None:
        with server.client() as client:
            seed = number
            while time.perf_counter() < end:
                status, secs = _ask(client, seed, steps)
                with lock:
                    statuses[status] += 1
                    if status == 200:
                        times.append(secs)
                if status == 429:
                    time.sleep(0.5)
                seed += count

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - start
    cuts = statistics.quantiles(times, n=20) if len(times) > 1 else [float("nan")] * 19
    return {
        "clients": count,
        "secs": round(passed, 1),
        "statuses": dict(statuses),
        "p50_secs": round(statistics.median(times), 3) if times else None,
        "p95_secs": round(cuts[18], 3),
        "images_per_sec": round(len(times) / passed, 2),
    }


def load(server: Server, clients: int, secs: float, steps: int) -> None:
    """Prints throughput and latency of one client and of many, alternately, in two rounds."""
    for _ in range(2):
        for count in (1, clients):
            row = _clients(server, count, secs / 2, steps)
            print(json.dumps(row), flush=True)
            statuses = row["statuses"]
            assert isinstance(statuses, dict)
            assert set(statuses) <= {200, 429}, statuses


def memory_mib(server: Server) -> float:
    """Returns the resident memory of a server process."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def fuzz(server: Server, count: int, steps: int) -> None:
    """Sends hostile requests by several clients, with slow bodies beside them; prints statuses and memory.

    The memory is that of the server before the first request and after each tenth of them. It may not grow from the
    second tenth on: before, the allocator gets its arenas and the libraries load what they need.
    """
    statuses, lock, memory = collections.Counter[int](), threading.Lock(), [memory_mib(server)]
    hostile, is_over = requests(count, seed=1), threading.Event()

    def work() -> None:
        with server.client() as client:
            while True:
                with lock:
                    request = next(hostile, None)
                if request is None:
                    return
                method, path, options = request
                try:
                    status = client.request(method, path, **options).status_code
                except (httpx.LocalProtocolError, httpx.InvalidURL):
                    status = _NOT_SENT  # httpx refuses
                except httpx.RemoteProtocolError:
                    status = _CLOSED
                if status >= 500:
                    print(method, path, repr(options)[:2000], flush=True)
                with lock:
                    statuses[status] += 1
                    if statuses.total() % max(count // 10, 1) == 0:
                        memory.append(memory_mib(server))

    def trickle() -> None:
        while not is_over.is_set():
            status = slow_body(server)
            with lock:
                slow[status] += 1

    slow = collections.Counter[int]()
    slow_clients = [threading.Thread(target=trickle) for _ in range(8)]
    clients = [threading.Thread(target=work) for _ in range(4)]
    for thread in slow_clients + clients:
        thread.start()
    for thread in clients:
        thread.join()
    is_over.set()
    for thread in slow_clients:
        thread.join()
    with server.client() as client:
        status, _ = _ask(client, 0, steps)
    row = {
        "statuses": dict(sorted(statuses.items())),
        "slow_bodies": dict(sorted(slow.items())),
        "mib": [round(size) for size in memory],
        "then": status,
    }
    print(json.dumps(row), flush=True)
    assert status == 200
    assert max(statuses | slow) < 500, statuses
    assert memory[-1] < 1.1 * memory[2], memory


def kill(weights: Path, options: list[str], times: int, steps: int) -> None:
    """Kills the server under load, and prints how long each restart takes until a face arrives."""
    for number in range(times):
        server = Server(weights, *options).wait_until_ready()
        working = threading.Thread(target=_until_closed, args=(server, steps))
        working.start()
        time.sleep(2)
        server.process.kill()
        working.join()
        start = time.perf_counter()
        with serving(weights, *options) as restarted, restarted.client() as client:
            status, _ = _ask(client, 0, steps)
        assert status == 200
        print(json.dumps({"kill": number + 1, "restart_secs": round(time.perf_counter() - start, 1)}), flush=True)


def _until_closed(server: Server, steps: int) -> None:
    with contextlib.suppress(httpx.TransportError), server.client() as client:
        while True:
            _ask(client, 0, steps)


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "fuzz", "kill"])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--secs", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_batch", type=int, default=8)
    given = parser.parse_args()
    options = ["--max_batch", str(given.max_batch)] + ["--body_timeout", "3"] * (given.what == "fuzz")
    if given.what == "kill":
        kill(given.weights, options, given.times, given.steps)
        return
    with serving(given.weights, *options) as server:
        if given.what == "load":
            load(server, given.clients, given.secs, given.steps)
        else:
            fuzz(server, given.requests, given.steps)


if __name__ == "__main__":
    main()
