"""The README's example runs as written, and its commands name what exists."""

import re
from pathlib import Path

import layershed as ls

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


DOCS = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))


def python_blocks(text=README):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_readme_lightning_example_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = next(block for block in python_blocks() if "class MyModule" in block)
    code_lines = [line for line in example.splitlines() if line.strip()]
    assert len(code_lines) <= 25
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    network = names["trainer"].lightning_module.net
    dropped = ls.bypassed_sublayers(network)
    assert [s.kind for s in dropped] == ["attention", "attention"]
    steps = {
        line.split(",")[0] for line in (tmp_path / "runs" / "mine" / "importance.csv").read_text().splitlines()[1:]
    }
    assert steps == {"2", "4", "6", "8", "10", "12"}


def test_functions_named_in_the_readme_exist():
    names = set(re.findall(r"\bls\.(\w+)", "".join(python_blocks(DOCS))))
    assert {"bypass", "quantize", "inject_lora", "self_distillation_loss"} <= names
    for name in names:
        assert callable(getattr(ls, name)), name


def test_callback_examples_of_the_docs_can_be_constructed():
    blocks = [block for block in python_blocks(DOCS) if "callbacks = [" in block]
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "docs", "exec"), names)
        assert names["callbacks"]


def test_readme_and_docs_have_no_figure_left_open():
    assert "<!--" not in DOCS
    assert "BENCHMARK" not in DOCS
    assert not [path.name for path in (ROOT / "benchmarks").glob("*.py") if "\nFIGURES\n" in path.read_text("utf-8")]


def test_files_named_in_the_readme_exist():
    for name in set(re.findall(r"(?:configs|benchmarks|docs)/\w+\.(?:yaml|py|md)", DOCS)):
        assert (ROOT / name).is_file(), name
