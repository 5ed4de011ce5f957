"""Two gloo processes on this machine, started as torchrun would start them."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path


def run_two_ranks(module, folder, *words, timeout=180):
    """Run ``python -m module folder words`` on both ranks; fails with what they printed if one of them fails."""
    with two_ranks(module, folder, *words) as processes:
        codes = [process.wait(timeout=timeout) for process in processes]
    assert codes == [0, 0], said(folder)


def seconds_to_follow(module, folder, *words, dies, timeout=180):
    """Start both ranks, of which one is to die; the other's exit code, and the seconds it lived on.

    Args:
        module: What both run.
        folder: Where they write.
        words: More words of the command line.
        dies: Number of the rank that dies.
        timeout: Seconds for the first to die.
    """
    with two_ranks(module, folder, *words) as processes:
        first = processes[dies].wait(timeout=timeout)
        start = time.monotonic()
        try:
            second = processes[1 - dies].wait(timeout=60)
        except subprocess.TimeoutExpired:
            second = None
    return first, second, time.monotonic() - start


@contextmanager
def two_ranks(module, folder, *words):
    """The processes of both ranks; none of them outlives the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for rank in (0, 1):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
            with (folder / f"output-{rank}.txt").open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "ignore", "-m", module, str(folder), *words],
                        env={**os.environ, **shared, **own},
                        cwd=Path(__file__).parents[2],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def said(folder):
    """What both ranks printed."""
    return "\n".join((folder / f"output-{rank}.txt").read_text() for rank in (0, 1))
