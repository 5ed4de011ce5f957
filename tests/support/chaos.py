"""Kill runs again and again, resume them, and compare the results with those of uninterrupted runs."""

import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from tests.support.chaos_runs import KINDS, MODULES, RESULT, SAVE_EVERY, STEPS, Kill, segment
from tests.support.forked import fork_server

PLACES = ("middle", "fsync", "replace", "after")
WRITES = 2 * (STEPS // SAVE_EVERY)  # the numbered checkpoint and last.ckpt, each time
LIMIT = 300  # seconds of a segment; none takes a tenth of it
# Measured anew in every run, and never equal.
TIMINGS = ("teacher_seconds", "step_seconds", "tokens_per_second")
FILES = ("importance.csv", "drop_plan.json")


@dataclass
class Chain:
    """What came of one run that was killed again and again."""

    kills: list[Kill] = field(default_factory=list)
    while_writing: int = 0
    segments: int = 0
    differences: list[str] = field(default_factory=list)


def run_segment(module: str, kind: str, folder: Path, kill: Kill | None = None) -> tuple[bool, float]:
    """One process.

    Returns:
        Whether it was killed, and the seconds of training.

    Raises:
        RuntimeError: If it ended in any other way than by the kill, or by being done.
    """
    context = fork_server()
    ours, theirs = context.Pipe(duplex=False)
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=segment, args=(module, kind, folder, kill, theirs))
    process.start()
    theirs.close()
    try:
        began = ours.poll(LIMIT) and bool(ours.recv())
    except EOFError:
        began = False
    start = time.monotonic()
    if kill is not None and kill.where == "time" and began:
        process.join(kill.number)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
    process.join(LIMIT)
    seconds = time.monotonic() - start
    if process.exitcode not in (0, -signal.SIGKILL):
        process.kill()
        log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{module}, {kind}, {kill}: exit code {process.exitcode}\n{log[-3000:]}")
    return process.exitcode != 0, seconds


def run_chain(module: str, kind: str, folder: Path, kills: Iterator[Kill], count: int) -> Chain:
    """A run that is killed so many times, and resumed until it is done."""
    chain = Chain()
    while not (folder / RESULT).exists():
        kill = next(kills) if len(chain.kills) < count else None
        killed, _ = run_segment(module, kind, folder, kill)
        chain.segments += 1
        if not killed and not chain.kills and count:  # it came too late: from the start, with the next one
            shutil.rmtree(folder)
            chain = Chain()
        if killed and kill is not None:
            chain.kills.append(kill)
            torn = any(folder.rglob(".*.ckpt.partial"))
            chain.while_writing += kill.where != "time" or torn
    return chain


def random_kills(rng: random.Random, seconds: float, places: Iterator[str]) -> Iterator[Kill]:
    """A kill at a random time and one in a write, by turns."""
    while True:
        yield Kill(next(places), rng.randint(1, WRITES))
        yield Kill("time", rng.uniform(0, 0.9 * seconds))


def compare(whole: Path, killed: Path) -> list[str]:
    """What is not the same, in words; nothing if everything is."""
    results = [torch.load(folder / RESULT, weights_only=True) for folder in (whole, killed)]
    logs = [Path(result.pop("logs")) for result in results]
    found = list(differences(*results))
    for name in FILES:
        texts = [(folder / name).read_bytes() if (folder / name).exists() else None for folder in logs]
        if texts[0] is None or texts[0] != texts[1]:
            found.append(f"{name} is not the same")
    wanted, got = (metrics_of(folder) for folder in (whole, killed))
    for key in wanted.keys() | got.keys():
        if wanted.get(key) != got.get(key):
            found.append(f"step {key[0]}, {key[1]}: {wanted.get(key)} became {got.get(key)}")
    return sorted(found)


def metrics_of(folder: Path) -> dict[tuple[str, str], set[str]]:
    """Everything that any segment logged: the values of (step, name), one unless segments disagree."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(folder.glob("version_*/metrics.csv")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # a line that the kill cut off was not logged
        for row in csv.DictReader(line for line in lines if line.endswith("\n")):
            for name, value in row.items():
                if value and name not in ("step", *TIMINGS):
                    found.setdefault((row["step"], name), set()).add(value)
    return found


def differences(wanted: Any, got: Any, where: str = "result") -> Iterator[str]:
    """Where two nests of dicts, lists, tensors and plain values are not equal to the last bit."""
    if isinstance(wanted, torch.Tensor):
        if not isinstance(got, torch.Tensor) or not torch.equal(wanted, got):
            yield f"{where} is another tensor"
    elif isinstance(wanted, dict) and isinstance(got, dict) and wanted.keys() == got.keys():
        for key, value in wanted.items():
            yield from differences(value, got[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple) and isinstance(got, list | tuple) and len(wanted) == len(got):
        for index, value in enumerate(wanted):
            yield from differences(value, got[index], f"{where}.{index}")
    elif wanted != got or isinstance(wanted, dict | list | tuple):
        yield f"{where}: {wanted!r:.80} became {got!r:.80}"


def main(rounds: int = 4, kills: int = 1, seed: int = 0, folder: str | None = None) -> None:
    """Kill, resume, compare, and print one line.

    Args:
        rounds: Runs that are killed, of every kind of run and module.
        kills: Kills of each of them.
        seed: Of the times and places.
        folder: Where to work and leave everything; a temporary one if not given.
    """
    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="chaos-") if folder is None else folder).absolute()
    tried = same = writing = 0
    for module in MODULES:
        for kind in KINDS:
            whole = root / module / kind / "whole"
            _, seconds = run_segment(module, kind, whole)
            places = (place for _ in iter(int, 1) for place in rng.sample(PLACES, len(PLACES)))
            coming = random_kills(rng, seconds, places)
            for number in range(rounds):
                chain = run_chain(module, kind, whole.with_name(f"killed-{number}"), coming, kills)
                chain.differences = compare(whole, whole.with_name(f"killed-{number}"))
                tried, writing = tried + len(chain.kills), writing + chain.while_writing
                same += 0 if chain.differences else len(chain.kills)
                print(f"{module:8} {kind:10} {chain.segments} segments, killed {said(chain.kills)}", flush=True)
                for line in chain.differences[:5]:
                    print(f"    {line}", flush=True)
    if folder is None:
        shutil.rmtree(root)
    print(f"{tried} kills ({writing} while a checkpoint was written), {same} identical")
    sys.exit(tried != same)


def said(kills: list[Kill]) -> str:
    """Kills in a few words."""
    return ", ".join(
        f"after {kill.number:.2f} s" if kill.where == "time" else f"in write {kill.number:.0f} ({kill.where})"
        for kill in kills
    )
