"""Several processes that make one job of JAX, on this machine's CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

_START = """
import sys
import jax

process, port, count = map(int, sys.argv[1:4])
jax.distributed.initialize(f"localhost:{port}", count, process, shutdown_timeout_seconds=20)
arguments = sys.argv[4:]
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_processes(program: str, *arguments: object, count: int = 2, devices: int = 2) -> list[tuple[int, str, str]]:
    """Returns exit status, output and errors of each process that runs the program.

    Args:
      program: finds its number in `process` and the arguments, as strings, in `arguments`.
      count: number of processes.
      devices: of each process.
    """
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _START + program, *map(str, (process, port, count, *arguments))],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
