"""The lock of a run's folder: a second job is refused, what a killed one leaves behind is no obstacle."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from sisma_jax.errors import InputError, Preempted
from sisma_jax.runs import lock
from tests.bucket import make_bucket
from tests.processes import ROOT

# So long that a loaded machine does not miss a renewal three times.
RENEW_SECS = 0.3

HOLDER = textwrap.dedent(
    """
    import pathlib, sys, time
    from sisma_jax.runs import lock

    with lock.hold(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
    """
)


@contextlib.contextmanager
def another_process(path: Path):
    """A process that holds the lock, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_at_once_and_told_who_holds_the_folder(tmp_path):
    path = tmp_path / "lock.json"
    with another_process(path) as holder:
        start = time.monotonic()
        with pytest.raises(InputError) as error, lock.hold(path):
            pass
        assert time.monotonic() - start < 2
        message = str(error.value)
        assert f"{tmp_path} is being written by process {holder.pid} on host {socket.gethostname()}, which" in message
        assert "\n" not in message
        assert json.loads(path.read_text())["process"] == holder.pid
        holder.communicate("")
        assert holder.returncode == 0
    assert not list(tmp_path.iterdir())
    with lock.hold(path):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "lock.json"
    with another_process(path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert json.loads(path.read_text())["process"] == holder.pid  # it is left behind, and says nothing
        with lock.hold(path) as require:
            require()
            assert json.loads(path.read_text())["process"] == os.getpid()


def test_the_same_process_is_refused_too(tmp_path):
    path = tmp_path / "lock.json"
    with (
        lock.hold(path),
        pytest.raises(InputError, match=f"is being written by process {os.getpid()} on"),
        lock.hold(path),
    ):
        pass


@pytest.mark.parametrize("error", [InputError("bad"), Preempted("told to stop"), KeyboardInterrupt()])
def test_the_lock_is_released_however_the_block_ends(error, tmp_path):
    with pytest.raises(type(error)), lock.hold(tmp_path / "lock.json"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_lock_that_says_nothing_yet_is_one_all_the_same(tmp_path):
    path = tmp_path / "lock.json"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written by another process; wait"), lock.hold(path):
            pass


def test_a_lock_whose_file_is_removed_while_it_is_opened_is_made_anew(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    flock, removed = fcntl.flock, []

    def removed_first(file, operation):
        if not removed:  # as by a holder that ends between the two calls of the newcomer
            path.unlink()
            removed.append(path)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with lock.hold(path):
        assert removed
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), lock.hold(path):
            pass


def test_a_place_that_cannot_be_locked_is_the_callers_to_name(tmp_path):
    with pytest.raises(OSError, match=r"lock\.json"), lock.hold(tmp_path / "absent" / "lock.json"):
        pass


# Leases


@pytest.fixture
def lease(monkeypatch):
    """The path of a lease in a bucket, with renewals that tests need not wait for."""
    monkeypatch.setattr(lock, "RENEW_SECS", RENEW_SECS)
    return make_bucket(monkeypatch) / "run" / "lock.json"


def write(path, **values):
    path.write_bytes(json.dumps(values).encode())


OTHER = {"process": 7, "host": "elsewhere", "since": "2026-01-01T00:00:00+00:00", "token": "other", "count": 1}


def test_a_lease_is_renewed_refuses_others_and_is_removed(lease):
    with lock.hold(lease) as require:
        first = json.loads(lease.read_bytes())
        assert first["process"] == os.getpid()
        with pytest.raises(InputError, match=f"gs://bucket/run is being written by process {os.getpid()} on host"):
            with lock.hold(lease):
                pass
        require()
        assert json.loads(lease.read_bytes())["count"] > first["count"]
    assert not lease.exists()


def test_an_abandoned_lease_is_taken_over(lease, caplog):
    write(lease, **OTHER)
    start = time.monotonic()
    with lock.hold(lease) as require:
        assert time.monotonic() - start >= 3 * RENEW_SECS
        require()
        assert json.loads(lease.read_bytes())["process"] == os.getpid()
    assert "process 7 on host elsewhere" in caplog.text
    assert not lease.exists()


def test_a_lease_that_is_returned_while_it_is_watched_is_free(lease):
    write(lease, **OTHER)
    timer = threading.Timer(RENEW_SECS / 2, lease.unlink)
    timer.start()
    start = time.monotonic()
    with lock.hold(lease):
        assert time.monotonic() - start < 2 * RENEW_SECS
    timer.join()


def test_of_two_newcomers_one_is_refused(lease, monkeypatch):
    sleep = time.sleep

    def overwritten(seconds):
        write(lease, **OTHER)  # by one that has found no lease either, and wrote later
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", overwritten)
    with pytest.raises(InputError, match="is being written by process 7 on host elsewhere"), lock.hold(lease):
        pass
    assert json.loads(lease.read_bytes()) == OTHER


@pytest.mark.parametrize("taken", [True, False])
def test_a_lost_lease_is_noticed_and_not_taken_back(lease, taken):
    with lock.hold(lease) as require:
        require()
        if taken:
            write(lease, **OTHER)
            match = r"gs://bucket/run was taken over by process 7 on host elsewhere, .* process no longer writes to it"
        else:  # by one that has ended since
            lease.unlink()
            match = "was taken over by another process"
        with pytest.raises(InputError, match=match):
            require()
        time.sleep(2 * RENEW_SECS)
        with pytest.raises(InputError, match=match):
            require()
    assert lease.exists() == taken
    if taken:
        assert json.loads(lease.read_bytes()) == OTHER


def test_a_network_that_fails_for_a_while_loses_no_lease(lease, monkeypatch):
    def fail(*_):
        raise RuntimeError("503")

    with lock.hold(lease) as require:
        with monkeypatch.context() as patch:
            patch.setattr(type(lease), "read_bytes", fail)
            time.sleep(2 * RENEW_SECS)
            require()  # what is written next tells
        before = json.loads(lease.read_bytes())["count"]
        time.sleep(2 * RENEW_SECS)
        require()
        assert json.loads(lease.read_bytes())["count"] > before
    assert not lease.exists()


def test_a_disk_without_locks_has_leases(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECS", RENEW_SECS)

    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    path = tmp_path / "lock.json"
    start = time.monotonic()
    with lock.hold(path) as require:
        assert time.monotonic() - start < 2 * RENEW_SECS
        require()
        with pytest.raises(InputError, match=f"is being written by process {os.getpid()} on"), lock.hold(path):
            pass
    assert not list(tmp_path.iterdir())
