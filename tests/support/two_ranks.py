"""Two gloo processes on this machine, started as torchrun would start them."""

import socket
import time
from contextlib import contextmanager

from tests.support.forked import start_module


def run_two_ranks(module, folder, *words, timeout=180, environment=None):
    """Run ``python -m module folder words`` on both ranks; fails with what they printed if one of them fails."""
    with two_ranks(module, folder, *words, environment=environment) as processes:
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
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
        processes[dies].join(timeout)
        start = time.monotonic()
        processes[1 - dies].join(60)
        seconds = time.monotonic() - start
        first, second = processes[dies].exitcode, processes[1 - dies].exitcode
    return first, second, seconds


@contextmanager
def two_ranks(module, folder, *words, environment=None):
    """The processes of both ranks; none of them outlives the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for rank in (0, 1):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
            output = folder / f"output-{rank}.txt"
            processes.append(
                start_module(module, [str(folder), *words], {**shared, **own, **(environment or {})}, output)
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def said(folder):
    """What both ranks printed."""
    return "\n".join((folder / f"output-{rank}.txt").read_text() for rank in (0, 1))
