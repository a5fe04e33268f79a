"""Kills a job again and again, for tests of what is left: `python -m tests.interrupted < pickle`.

The job runs in a fork of this process, which has imported all that it needs and started no thread, so that most of its
time is the job's own. The pickle: (job, conditions). Prints how many of the kills came before the end of the job, which
in the last run is left alone.
"""

import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Condition = Callable[[float], bool]
"""Whether to kill now, after so many seconds."""


def run(job: Callable[[], None], conditions: Sequence[Condition] = (), **environment: str) -> int:
    """Returns how often the job was killed while it ran. Raises if it fails by itself."""
    root = Path(__file__).parents[1]
    variables = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"} | environment
    finished = subprocess.run(
        [sys.executable, "-m", "tests.interrupted"],
        input=pickle.dumps((job, list(conditions))),
        capture_output=True,
        cwd=root,
        env=variables,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr.decode()
    return int(finished.stdout.split()[-1])


def after(seconds: float) -> Condition:
    return functools.partial(_is_later, seconds)


def _is_later(seconds: float, elapsed: float) -> bool:
    return elapsed >= seconds


def _forked(job: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            job()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def _killed(job: Callable[[], None], condition: Condition) -> bool:
    """Whether the job was still running when the condition was met."""
    pid, start = _forked(job), time.monotonic()
    while not condition(time.monotonic() - start):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                sys.exit(1)
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _main() -> None:
    job, conditions = pickle.load(sys.stdin.buffer)
    hits = sum(_killed(job, condition) for condition in conditions)
    _, status = os.waitpid(_forked(job), 0)
    print(hits)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    _main()
