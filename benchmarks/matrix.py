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
TOOLS = ["pytest>=8", "hypothesis>=6.100", "filelock>=3", "accelerate"]
CORNERS = {
    "oldest": [
        "transformers==4.57.6",
        "lightning==2.5.6",
        "pytorch-lightning==2.5.6",
        "peft==0.17.1",
        "datasets==3.6.0",
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


def neighbour(package: str, torch: str) -> dict[str, str]:
    """Resolve layershed beside another package, without installing either."""
    requirements = f"{package}\nlayershed @ {ROOT.as_uri()}\n"
    command = ["uv", "pip", "compile", "-q", "--python-version", "3.11", "-"]
    both = _run(command, input=requirements)
    alone = _run(command, input=f"{package}\n")
    found = re.search(rf"^{package}==(\S+)", both.stdout, re.MULTILINE | re.IGNORECASE)
    newest = re.search(rf"^{package}==(\S+)", alone.stdout, re.MULTILINE | re.IGNORECASE)
    reason = " ".join(both.stderr.split())
    pinned = re.search(r"^transformers==(\S+)", both.stdout, re.MULTILINE)
    same = found is not None and newest is not None and found[1] == newest[1]
    return {
        "package": package,
        "newest alone": newest[1] if newest else "does not resolve",
        "beside layershed": found[1] if found else "does not resolve",
        "transformers": pinned[1] if pinned else "",
        "what stands in the way": "" if same else (reason[:400] or "an older version is taken"),
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
    kept = PLACE / "results.json"
    results: dict[str, dict[str, dict[str, str]]] = json.loads(kept.read_text()) if kept.exists() else {}
    corners, beside = results.setdefault("corners", {}), results.setdefault("beside", {})
    for name in [] if given.neighbours else given.corner or CORNERS:
        corners[name] = row(name, make(name, CORNERS[name], given.torch, given.find_links))
        print(name, corners[name]["tests"], flush=True)
    for package in NEIGHBOURS if given.neighbours or not given.corner else ():
        beside[package] = neighbour(package, given.torch)
        print(*beside[package].values(), sep=" | ", flush=True)
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
