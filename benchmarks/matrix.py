"""Runs a core selection of the tests in environments of old and new versions, and writes docs/compatibility.md.

``python -m benchmarks.matrix`` runs all CORNERS and takes about fifteen minutes; ``--corner NAME`` runs one,
``--neighbours`` only resolves layershed beside other packages, ``--quick`` runs the corners of QUICK with a few dozen
tests and writes no page. It needs uv.

A corner is a virtual environment in build/matrix that holds only what differs from the environment that runs this
command. Everything else, torch first of all, it sees there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import distributions
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
_CACHED = "tests/test_surgery.py::test_cached_logits_equal_uncached_ones_with_block_0_attention_dropped"
_SAVED = "tests/saving/test_pretrained.py::test_saved_model_loads_exactly_after_bypass_and_after_remove"
_DUE = "tests/callbacks/test_exact_resume.py::test_row_validation_and_epoch_end_due_at_the_checkpoint_are_done_once"
SMALL = [
    "tests/test_spellings.py",
    "tests/discovery/test_find.py::test_sublayers_found_equal_those_of_known_models",
    "tests/stand_ins/test_stand_in.py",
    *(f"{_CACHED}[{name}]" for name in ("llama-bypass-dynamic", "llama-remove-static", "gpt2-bypass-dynamic")),
    "tests/test_surgery.py::test_generate_with_cache_equals_generate_without[qwen3-attention]",
    *(f"{_SAVED}[{name}]" for name in ("llama-None", "gpt2-False")),
    "tests/integration/test_lightning_private.py",
    "tests/callbacks/test_sublayer_drop.py::test_losses_around_the_drop_equal_an_evaluation_by_hand",
    "tests/callbacks/test_sublayer_drop.py::test_foreign_module_resumed_at_an_epochs_end_equals_uninterrupted[12-1+2]",
    f"{_DUE}[step 6]",
    "tests/distributed/test_ranks.py::test_ddp_run_under_lightnings_second_name_equals_one_process[lora]",
]


@dataclass(frozen=True)
class Corner:
    """An environment.

    Args:
        pins: Requirements beside layershed's own.
        lowest: Whether layershed's own requirements take their lowest versions; else the highest.
        beside: A package whose requirements hold, too, without being installed.
        variables: Environment variables of its tests.
    """

    pins: tuple[str, ...]
    lowest: bool = False
    beside: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


NEWEST = ("transformers>=5.24,<6", "lightning>=2.6", "pytorch-lightning>=2.6", "peft>=0.21")
CORNERS = {
    "oldest": Corner(("lightning==2.4.0", "pytorch-lightning==2.4.0"), lowest=True),
    # the oldest that ExactResume takes
    "lightning 2.5.3": Corner(("lightning==2.5.3", "pytorch-lightning==2.5.3", "transformers==4.57.6")),
    "transformers 5.20, vLLM's pins": Corner(("transformers==5.20.2",), beside="vllm"),
    "newest": Corner(NEWEST),
    "pytorch_lightning": Corner(NEWEST, variables={"LAYERSHED_LIGHTNING": "only second"}),
}
QUICK = ("oldest", "pytorch_lightning")
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
SHOWN = ("transformers", "torch", "lightning", "peft", "datasets", "torchmetrics", "bitsandbytes")
HEADER = """# Compatibility

`make matrix` writes this page. A corner is an environment of its own in `build/matrix`; the tests are a core selection
(discovery, surgery, cached decoding, saving, a drop in a fit, exact resume, DDP on two ranks). CI runs a few dozen of
them in two corners: `make corners`.

Tests skip what an old version cannot do. These limits are known:

- torch: only 2.13 has a CPU wheel for this machine's Python 3.11, so every corner runs on it. The lower bound 2.6 is
  that of the names we use (`torch.accelerator`, `FSDPModule`); no older and no newer build was run.
- Python: 3.11 alone was run, for the same reason.
- Lightning before 2.5.3: ExactResume refuses it, as its loops do not say where they resume. Without ExactResume, a run
  that is resumed at the end of an epoch does not continue exactly. The command line adds ExactResume to every fit, so
  the extra `cli` requires 2.5.3.
- jsonargparse before 4.53 was not made to work: 4.41, which litgpt requires, cannot build Lightning's RichProgressBar
  from a config, as it reads the colours of its theme as comments.
- transformers before 5.2: an extra output (attention weights) has no entry for a dropped sublayer; later it is None.
- transformers 4.57: a model without weights (meta device) whose masks read numbers (GPT-2, OPT, BERT) cannot be proven.
- transformers 4.57: a static cache stores no values of another size than the keys (multi-head latent attention).
- transformers 4.57: `load_pretrained` allocates each dropped weight for a moment, without filling it.
- pytorch_lightning: `lightning` is required and brings it. The callbacks work under both names, in any order of imports
  (tests/integration/test_both_names.py): they import both, which takes 0.15 s. In the corner pytorch_lightning,
  `lightning` cannot be imported at all.

"""


def _run(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def _folder(name: str) -> Path:
    return PLACE / re.sub(r"\W+", "-", name)


def make(name: str) -> Path:
    """Make the environment of a corner; returns its Python."""
    corner, folder = CORNERS[name], _folder(name)
    python = folder / "bin" / "python"
    subprocess.run(["uv", "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
    here = {one.name.lower().replace("_", "-"): one.version.partition("+")[0] for one in distributions()}
    constraints = _resolved([corner.beside, *corner.pins])[0] if corner.beside else {}
    wanted, why = _resolved(
        [f"layershed[data,report,quantization] @ {ROOT.as_uri()}", f"torch=={here['torch']}", *corner.pins],
        "--resolution",
        "lowest-direct" if corner.lowest else "highest",
        constraints=[f"{package}=={version}" for package, version in constraints.items() if not _OF_TORCH(package)],
    )
    assert wanted, why
    others = [
        f"{package}=={version}"
        for package, version in wanted.items()
        if here.get(package) != version and not _OF_TORCH(package)
    ]
    if others:
        subprocess.run(["uv", "pip", "install", "-q", "--no-deps", "--python", str(python), *others], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


_OF_TORCH = re.compile(r"torch$|torchvision|torchaudio|triton|nvidia-|cuda-").match


def run_tests(name: str, python: Path, tests: Sequence[str]) -> str:
    """Run tests in a corner; returns what pytest printed."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
    done = _run([*command, *tests], cwd=ROOT, env={**os.environ, **CORNERS[name].variables})
    _folder(name).with_suffix(".txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return done.stdout


def _counts(printed: str) -> tuple[str, list[str]]:
    """The last line of pytest, and what failed."""
    counts = (printed.strip().splitlines() or ["no output"])[-1].split(" in ")[0].strip("= ")
    return counts, sorted(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE))


def row(name: str, python: Path) -> dict[str, str]:
    """Run the core selection in an environment; returns the row of the table."""
    counts, failed = _counts(run_tests(name, python, CORE))
    code = "import json, sys; from importlib.metadata import version as v; "
    code += f"print(json.dumps({{n: v(n) for n in {SHOWN!r}}} | {{'python': sys.version.split()[0]}}))"
    versions: dict[str, str] = json.loads(_run([str(python), "-c", code]).stdout)
    return {"corner": name, **versions, "tests": counts, "failed": "; ".join(failed)}


def quick() -> int:
    """Run a few dozen tests in the corners of QUICK, side by side; prints what fails."""
    wrong = 0
    with ThreadPoolExecutor() as pool:
        for name, printed in zip(QUICK, pool.map(lambda name: run_tests(name, make(name), SMALL), QUICK), strict=True):
            counts, failed = _counts(printed)
            print(f"{name}: {counts}", flush=True)
            if failed or " passed" not in counts:
                wrong = 1
                print(_folder(name).with_suffix(".txt").read_text(encoding="utf-8"))
    return wrong


def _resolved(requirements: list[str], *options: str, constraints: Sequence[str] = ()) -> tuple[dict[str, str], str]:
    """The versions that uv resolves requirements to, without installing any, and why it does not."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        command = ["uv", "pip", "compile", "-q", "--python-version", "3.11", *options, "-c", file.name, "-"]
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


def keep(part: str, name: str, found: dict[str, str]) -> None:
    """Add a row to the results, in which a stopped or a second run keeps its own, and write the page.

    Args:
        part: ``corners`` or ``beside``.
        name: The corner, or the package.
        found: The row.
    """
    kept = PLACE / "results.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"corners": {}, "beside": {}}
    results[part][name] = found
    kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
    corners = [results["corners"][name] for name in CORNERS if name in results["corners"]]
    failures = [f"- {one['corner']}: {test}" for one in corners for test in one["failed"].split("; ") if test]
    shown = [{title: value for title, value in one.items() if title != "failed"} for one in corners]
    sections = [HEADER.rstrip(), table(shown).rstrip(), "\n".join(failures), "## Beside other packages"]
    sections.append(table([results["beside"][name] for name in NEIGHBOURS if name in results["beside"]]).rstrip())
    PAGE.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")


def main() -> int:
    """Run the corners and resolve the neighbours; each of them is written to the page at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corner", choices=CORNERS, action="append")
    parser.add_argument("--neighbours", action="store_true", help="only resolve beside other packages")
    parser.add_argument("--quick", action="store_true", help="a few dozen tests in two corners, for CI")
    given = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    if given.quick:
        return quick()
    failed = False
    for name in [] if given.neighbours else given.corner or CORNERS:
        found = row(name, make(name))
        keep("corners", name, found)
        failed |= bool(found["failed"])
        print(name, found["tests"], flush=True)
    for package in NEIGHBOURS if given.neighbours or not given.corner else ():
        beside = neighbour(package)
        keep("beside", package, beside)
        print(*beside.values(), sep=" | ", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
