"""The README's example runs as written, and its commands name what exists."""

import re
from pathlib import Path

import layershed as ls

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_lightning_example_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = next(block for block in python_blocks() if "class MyModule" in block)
    code_lines = [line for line in example.splitlines() if line.strip()]
    assert len(code_lines) <= 25
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    network = names["trainer"].lightning_module.net
    dropped = ls.bypassed_sublayers(network)
    assert [s.kind for s in dropped] == ["attention", "attention"]
    steps = {line.split(",")[0] for line in (tmp_path / "importance.csv").read_text().splitlines()[1:]}
    assert steps == {"2", "4", "6", "8", "10", "12"}


def test_the_functions_of_the_readme_exist():
    block = next(block for block in python_blocks() if "import layershed as ls" in block)
    for name in re.findall(r"ls\.(\w+)", block):
        assert callable(getattr(ls, name)), name


def test_no_figure_is_left_open():
    assert "<!--" not in README
    assert not [path.name for path in (ROOT / "benchmarks").glob("*.py") if "\nFIGURES\n" in path.read_text("utf-8")]


def test_files_that_the_readme_names_exist():
    for name in set(re.findall(r"(?:configs|benchmarks)/\w+\.(?:yaml|py)", README)):
        assert (ROOT / name).is_file(), name
