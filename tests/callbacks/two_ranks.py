"""Two gloo processes on this machine, started as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two_ranks(module, folder, timeout=180):
    """Run ``python -m module folder`` on both ranks; fails with what they printed if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    outputs = [folder / f"output-{rank}.txt" for rank in (0, 1)]
    processes = []
    for rank, output in enumerate(outputs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
        with output.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", module, str(folder)],
                    env={**os.environ, **shared, **own},
                    cwd=Path(__file__).parents[2],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(output.read_text() for output in outputs)
