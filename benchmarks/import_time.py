"""What importing layershed and asking for help costs, each beside what it builds on, in fresh interpreters by turns.

    python benchmarks/import_time.py [PAIRS]

Each line: median seconds of wall-clock and of processor time with their smallest and largest, and the median ratio of
the paired processor times.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAIRS = 7
TORCH = ["-c", "import torch"]
STACK = ["-c", "import torch, lightning, transformers"]
COMPARED = {
    "import layershed": (["-c", "import layershed"], TORCH),
    "import layershed; layershed.find_sublayers": (["-c", "import layershed; layershed.find_sublayers"], TORCH),
    "from transformers import PreTrainedModel": (["-c", "from transformers import PreTrainedModel"], TORCH),
    "train.py --help": ([str(ROOT / "train.py"), "--help"], TORCH),
    "train.py fit --help": ([str(ROOT / "train.py"), "fit", "--help"], STACK),
}


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of a fresh interpreter."""
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        redirect = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)]
        process = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ, file_actions=redirect)
        _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"python {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main(pairs: int) -> None:
    for name, (asked, base) in COMPARED.items():
        seconds(asked), seconds(base)  # the files are in the page cache from here on
        own, other = [], []
        for _ in range(pairs):
            other.append(seconds(base))
            own.append(seconds(asked))
        ratio = statistics.median(a[1] / b[1] for a, b in zip(own, other, strict=True))
        for what, times in ((name, own), (f"  beside: {base[-1]}", other)):
            print(f"{what:52s} wall {spread([t[0] for t in times])} s, processor {spread([t[1] for t in times])} s")
        print(f"{'':52s} x{ratio:.2f} of its processor time, {pairs} pairs", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS)
