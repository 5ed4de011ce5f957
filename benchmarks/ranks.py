"""Are the results of two ranks those of one process, and does the death of one rank end the other?

Starts pairs of gloo processes on this machine's CPU: DDP and FSDP2 runs, of which everything is compared (between the
ranks, with one process, with formulas, and resumed with uninterrupted), and runs of which one rank is killed at a place
in the middle, by the environment of torchrun and by Lightning's own launcher. Prints a line per check.

    python benchmarks/ranks.py

Seen at commit a50d049 on two busy cores of a shared Intel Xeon, torch 2.13.0, in 355 s:

    82 checks on 2 ranks, 82 equal; 14 deaths of a rank, 14 ended the other with an error within 4 s
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

ROOT = Path(__file__).parents[1]


def main(folder: str | None = None) -> int:
    """Run every check.

    Args:
        folder: Where the runs write; null for a temporary folder.

    Returns:
        Exit code: 0 if everything was equal and no rank outlived the other by a minute.
    """
    sys.path.insert(0, str(ROOT))  # the runs stand beside the tests, which try some of them
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        equal = _checks(place)
        seconds = _deaths(place)
    followed = [found for found in seconds if found is not None]
    longest = f" within {max(followed):.0f} s" if followed else ""
    print(
        f"{len(equal)} checks on 2 ranks, {sum(equal)} equal; {len(seconds)} deaths of a rank, {len(followed)} ended "
        f"the other with an error{longest}"
    )
    return 0 if all(equal) and len(followed) == len(seconds) else 1


def _checks(place: Path) -> list[bool]:
    checks, launched = import_module("tests.support.ranks.checks"), import_module("tests.support.ranks.launched")
    equal: list[bool] = []
    for name, which in (("replicated", ()), ("sharded", ("every",))):
        found = getattr(checks, f"run_{name}")(_fresh(place, name), *which)
        own: dict[str, Callable[[Any], None]] = getattr(checks, f"checks_of_{name}")(*which)
        equal += [_holds(title, partial(check, found)) for title, check in own.items()]
    unfreezing = import_module("tests.support.ranks.unfreezing_checks")
    for name in ("replicated", "sharded"):
        ranks = getattr(unfreezing, f"run_{name}")(_fresh(place, f"unfreezing-{name}"))
        own = getattr(unfreezing, f"checks_of_{name}")()
        equal += [_holds(title, partial(check, ranks)) for title, check in own.items()]

    def by_lightning() -> None:
        code, said = launched.fit(_fresh(place, "launched"))
        assert code == 0, said

    return [*equal, _holds("DDP, started by Lightning from the command line: runs to its end", by_lightning)]


def _holds(name: str, check: Callable[[], Any]) -> bool:
    try:
        check()
    except AssertionError as error:
        print(f"{name}: DIFFERENT ({' '.join(str(error).split())[:300]})", flush=True)
        return False
    print(f"{name}: equal", flush=True)
    return True


def _deaths(place: Path) -> list[float | None]:
    """The seconds that each other rank lived on; None where it did not end with an error."""
    deaths, ranks = import_module("tests.support.ranks.deaths"), import_module("tests.support.two_ranks")
    launched = import_module("tests.support.ranks.launched")
    found: list[float | None] = []
    for dies in (0, 1):
        for where in deaths.PLACES:
            folder = _fresh(place, f"death-{len(found)}")
            killed, other, seconds = ranks.seconds_to_follow(deaths.__name__, folder, where, str(dies), dies=dies)
            ended = killed == -9 and other not in (None, 0)
            if where == deaths.SHARDS:
                check = import_module("tests.support.ranks.checks").former_shards_are_left
                ended &= _holds(
                    f"rank {dies} killed at: {where}: the former checkpoint is left", partial(check, folder)
                )
            found.append(_told(f"rank {dies} killed at: {where}", ended, seconds))
        ended, seconds = launched.seconds_to_follow(_fresh(place, f"death-{len(found)}"), dies)
        found.append(_told(f"rank {dies} of Lightning's launcher killed", ended, seconds))
    return found


def _told(what: str, ended: bool, seconds: float) -> float | None:
    print(f"{what}: the other {f'ended with an error after {seconds:.1f} s' if ended else 'DID NOT END'}", flush=True)
    return seconds if ended else None


def _fresh(place: Path, name: str) -> Path:
    folder = place / name
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    start = time.monotonic()
    code = auto_cli(main, as_positional=False)
    print(f"({time.monotonic() - start:.0f} s)", file=sys.stderr)
    sys.exit(code)
