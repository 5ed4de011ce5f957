"""Runs the tour of docs/tour.md in a clone of this repository and writes down what a person sees.

    python benchmarks/tour.py [--only NUMBER]

It takes about ten minutes on two CPU cores. Every command is typed as shown; ``python`` is the interpreter that runs
this script. Long outputs are cut in their middle, and the cut says how many lines are left out. Pictures of the report
and of the comparison go to docs/pictures; they need chromium.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tour.md"
PICTURES = ROOT / "docs" / "pictures"
RUN = "runs/quickstart/version_0"
LINES = 44


@dataclass(frozen=True)
class Stop:
    """One command of the tour.

    Args:
        title: What it is for.
        command: The words to type.
        fails: Whether it shows a mistake.
        sentence: One sentence before it.
    """

    title: str
    command: str
    fails: bool = False
    sentence: str = ""


STOPS = (
    Stop("Train, drop, measure, save, report", "python train.py fit --config configs/quickstart.yaml"),
    Stop(
        "A run that is too short for its drop",
        "python train.py fit --config configs/quickstart.yaml --trainer.max_steps 100",
        fails=True,
        sentence="The mistake is found before the model is built.",
    ),
    Stop(
        "The same, shorter",
        "python train.py fit --config configs/quickstart.yaml --trainer.max_steps 100"
        " --trainer.callbacks.drop.start 60",
        sentence="Every option of a config has a name on the command line, those of callbacks included.",
    ),
    Stop("Evaluate what the run left", f"python train.py test --ckpt_path {RUN}/checkpoints/last.ckpt"),
    Stop(
        "Let it write, the dense model beside it",
        f'python train.py generate --model.pretrained {RUN}/checkpoints/last.ckpt --prompt "The list is" --dense',
    ),
    Stop("Two runs side by side", "python train.py compare runs/quickstart/version_0 runs/quickstart/version_1"),
    Stop("How redundant is each sublayer?", f"python train.py score --model.pretrained {RUN}/pruned"),
    Stop("How many to drop?", f"python train.py recommend {RUN}"),
    Stop("What would a drop gain?", "python train.py plan --model.pretrained configs/models/llama-2-70b --count 32"),
    Stop("Recover a chat model", "python train.py fit --config configs/chat_recovery.yaml"),
)


def shown(output: str) -> str:
    """The output as a terminal leaves it, cut in the middle."""
    lines = [line.rpartition("\r")[2].rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).split("\n")]
    lines = "\n".join(lines).strip("\n").split("\n")
    if len(lines) > LINES:
        half = LINES // 2
        lines = [*lines[:half], f"    ... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    return "\n".join(lines)


def ask(stop: Stop, folder: Path) -> str:
    """Type the command; its part of the page."""
    words = [sys.executable if word == "python" else word for word in shlex.split(stop.command)]
    environment = {**os.environ, "COLUMNS": "110", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if (done.returncode != 0) != stop.fails:
        raise RuntimeError(f"{stop.command} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    output = shown(done.stdout.replace(str(folder), "."))
    sentence = f"{stop.sentence}\n\n" if stop.sentence else ""
    return f"## {stop.title}\n\n{sentence}```console\n$ {stop.command}\n{output}\n```\n"


def photograph(page: Path, name: str, *, width: int = 1100, dark: bool = False) -> None:
    """A picture of a page in headless chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise RuntimeError("The pictures need chromium. Install it.")
    PICTURES.mkdir(exist_ok=True)
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},2400"]
    if dark:
        flags.append("--blink-settings=preferredColorScheme=0")
    picture = PICTURES / f"{name}.png"
    subprocess.run([browser, *flags, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes docs/tour.md from real runs.")
    parser.add_argument("--only", type=int, help="number of a stop, from 1: print it and write nothing")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "layershed"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        if only is not None:
            print(ask(STOPS[only - 1], folder))
            return
        parts = [ask(stop, folder) for stop in STOPS]
        report = folder / RUN / "report.html"
        photograph(report, "report-light")
        photograph(report, "report-dark", dark=True)
        photograph(report, "report-phone", width=400)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    head = (
        "# A tour\n\n"
        f"What a person sees, written by `python benchmarks/tour.py` from real runs: commit {commit.strip()}, "
        f"{os.cpu_count()} cores of {platform.machine()}, no GPU. Other machines round differently.\n"
    )
    pictures = (
        "## The report of the first run\n\n"
        "![The report in light colours](pictures/report-light.png)\n\n"
        "[In dark colours](pictures/report-dark.png) · [On a phone](pictures/report-phone.png)\n"
    )
    PAGE.write_text("\n".join([head, *parts, pictures]), encoding="utf-8")
    print(f"{PAGE}: {len(STOPS)} commands")


if __name__ == "__main__":
    main()
