"""Kills a job at random moments, for tests of what is left: `python interrupted.py < pickle`.

The job runs in a fork of this process, which has imported all that it needs and started no thread, so that most of its
time is the job's own. The pickle: (job, moments), the latter in seconds. Prints how many of the kills came before the
end of the job, which in the last run is left alone.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def run(job: Callable[[], None], moments: Sequence[float]) -> int:
    """Returns the number of moments at which the job was killed while it ran. Raises if it fails by itself."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(
        [sys.executable, __file__],
        input=pickle.dumps((job, list(moments))),
        capture_output=True,
        env=environment,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr.decode()
    return int(finished.stdout.split()[-1])


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


def _main() -> None:
    job, moments = pickle.load(sys.stdin.buffer)
    hits = 0
    for moment in moments:
        pid = _forked(job)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        hits += os.WIFSIGNALED(status)
    _, status = os.waitpid(_forked(job), 0)
    print(hits)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    _main()
