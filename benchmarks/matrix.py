"""Runs a core selection of the tests in environments of old and new versions, and writes docs/compatibility.md.

``python -m benchmarks.matrix`` makes the environments of CORNERS in build/matrix and takes about ten minutes;
``--corner NAME`` runs one, ``--neighbours`` only resolves layershed beside other packages. It needs uv, and on Linux a
CPU build of torch (``--torch "torch==2.13.0"``, with ``--find-links FOLDER`` where a wheel lies).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "compatibility.md"
CORE = [
    "tests/test_spellings.py",
    "tests/discovery/test_find.py",
    "tests/stand_ins/test_stand_in.py",
    "tests/test_surgery.py",  # cached decoding, dynamic and static
    "tests/saving/test_pretrained.py",
    "tests/integration/test_lightning_private.py",
    "tests/callbacks/test_sublayer_drop.py",  # a drop in a fit
    "tests/callbacks/test_exact_resume.py",
    "tests/distributed/test_ranks.py",  # DDP on two ranks
]
TOOLS = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "filelock>=3", "accelerate"]
CORNERS = {
    "oldest": [
        "transformers==4.57.6",
        "lightning==2.5.6",
        "pytorch-lightning==2.5.6",
        "peft==0.18.0",
        "datasets==4.0.0",
    ],
    "lightning 2.4": ["transformers==5.23.0", "lightning==2.4.0", "pytorch-lightning==2.4.0"],
    "transformers 5.20": ["transformers==5.20.2"],
    "newest": ["transformers>=5.24,<6", "lightning>=2.6", "peft>=0.21"],
}
NEIGHBOURS = [
    "trl",
    "lm-eval",
    "vllm",
    "axolotl",
    "litgpt",
    "llamafactory",
    "nemo-toolkit",
    "sentence-transformers",
]
SHOWN = ("transformers", "torch", "lightning", "peft", "datasets", "bitsandbytes", "jsonargparse")
HEADER = """# Compatibility

`make matrix` writes this page. A corner is an environment of its own in `build/matrix`; the tests are a core selection
(discovery, surgery, cached decoding, saving, a drop in a fit, exact resume, DDP on two ranks).

Limits that are no failure of a test:

- torch: only 2.13 has a CPU wheel for this machine's Python 3.11, so every corner runs on it. The lower bound 2.6 is
  that of the names we use (`torch.accelerator`, `FSDPModule`); no older and no newer build was run.
- Python: 3.11 alone was run, for the same reason.
- Lightning before 2.5.3: ExactResume refuses it, as its loops do not say where they resume.
- transformers before 5.2: an extra output (attention weights) has no entry for a dropped sublayer; later it is None.
- transformers 4.57: a model without weights (meta device) whose masks read numbers (GPT-2, OPT, BERT) cannot be proven.
- pytorch_lightning: `lightning` is required and brings it. The callbacks work under both names, in any order of imports
  (tests/integration/test_both_names.py): they import both, which takes 0.15 s. `LAYERSHED_LIGHTNING=second` before
  pytest runs any test under the second.

"""


def _run(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def _folder(name: str) -> Path:
    return PLACE / re.sub(r"\W+", "-", name)


def make(name: str, pins: list[str], torch: str, links: list[str]) -> Path:
    """Make the environment of a corner; returns its Python."""
    folder = _folder(name)
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    extra = [word for link in links for word in ("--find-links", link)]
    install = ["uv", "pip", "install", "-q", "--python", str(python), *extra, torch, *pins, *TOOLS, "-e", ".[all]"]
    subprocess.run(install, cwd=ROOT, check=True)
    return python


def row(name: str, python: Path) -> dict[str, str]:
    """Run the core selection in an environment; returns the row of the table."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning", *CORE]
    done = _run(command, cwd=ROOT)
    _folder(name).with_suffix(".txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    code = "import json, sys; from importlib.metadata import version as v; "
    code += f"print(json.dumps({{n: v(n) for n in {SHOWN!r}}} | {{'python': sys.version.split()[0]}}))"
    versions: dict[str, str] = json.loads(_run([str(python), "-c", code]).stdout)
    counts = (done.stdout.strip().splitlines() or ["no output"])[-1].split(" in ")[0].strip("= ")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {"corner": name, **versions, "tests": counts, "failed": "; ".join(sorted(failed))}


def _resolved(requirements: list[str]) -> tuple[dict[str, str], str]:
    """The versions that uv resolves requirements to, without installing any, and why it does not."""
    command = ["uv", "pip", "compile", "-q", "--python-version", "3.11", "-"]
    done = _run(command, cwd=ROOT, input="\n".join(requirements))
    found = re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", done.stdout, re.MULTILINE)
    return {name.lower(): version for name, version in found}, " ".join(done.stderr.split())


def neighbour(package: str) -> dict[str, str]:
    """Resolve layershed, and layershed with all its extras, beside another package."""
    alone, _ = _resolved([package])
    core, why = _resolved([package, f"layershed @ {ROOT.as_uri()}"])
    everything, why_all = _resolved([package, f"layershed[all] @ {ROOT.as_uri()}"])
    newest = alone.get(package, "none")
    if everything and everything.get(package) != newest:  # an older version is taken: ask why the newest is not
        _, why_all = _resolved([f"{package}=={newest}", f"layershed[all] @ {ROOT.as_uri()}"])
    reasons = [f"{what}: {reason[-400:]}" for what, reason in (("core", why), ("all", why_all)) if reason]
    return {
        "package": package,
        "newest alone": newest,
        "beside layershed": core.get(package, "does not resolve"),
        "beside layershed[all]": everything.get(package, "does not resolve"),
        "transformers there": core.get("transformers", ""),
        "torch there": core.get("torch", ""),
        "what stands in the way": "; ".join(reasons) or "nothing",
    }


def table(rows: list[dict[str, str]]) -> str:
    """Rows as Markdown."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(one[name] for name in names) + " |" for one in rows)]) + "\n"


def main() -> int:
    """Run the corners, resolve the neighbours, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corner", choices=CORNERS, action="append")
    parser.add_argument("--neighbours", action="store_true", help="only resolve beside other packages")
    parser.add_argument("--torch", default="torch")
    parser.add_argument("--find-links", action="append", default=[])
    given = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    corners: dict[str, dict[str, str]] = {}
    beside: dict[str, dict[str, str]] = {}
    for name in [] if given.neighbours else given.corner or CORNERS:
        corners[name] = row(name, make(name, CORNERS[name], given.torch, given.find_links))
        print(name, corners[name]["tests"], flush=True)
    for package in NEIGHBOURS if given.neighbours or not given.corner else ():
        beside[package] = neighbour(package)
        print(*beside[package].values(), sep=" | ", flush=True)
    kept = PLACE / "results.json"  # read late: other corners may have run beside this one
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"corners": {}, "beside": {}}
    corners = results["corners"] = {**results["corners"], **corners}
    beside = results["beside"] = {**results["beside"], **beside}
    kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
    rows = [{**one, "failed": one["failed"] or "none"} for one in corners.values()]
    failures = [
        f"- {one['corner']}: {name}" for one in rows for name in one.pop("failed").split("; ") if name != "none"
    ]
    page = HEADER + table(rows) + "\n" + "\n".join(failures) + "\n\n## Beside other packages\n\n"
    PAGE.write_text(page + table(list(beside.values())), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
