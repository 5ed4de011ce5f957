"""import layershed: what it brings along, and that every public name is there without having been imported."""

import ast
import gc
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import layershed as ls
from layershed.cli.main import main
from tests.support.forked import run_code

SOURCE = Path(ls.__file__)
HEAVY = {"torch", "lightning", "torchmetrics", "peft", "matplotlib", "bitsandbytes", "datasets", "transformers"}


def fresh(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_importing_layershed_imports_no_heavy_library():
    loaded = set(fresh("import sys, layershed; print(*sys.modules)").split())
    assert "layershed" in loaded
    assert not HEAVY & loaded


FIND = "import sys, layershed; layershed.find_sublayers; print(*sys.modules)"
NOT_TO_FIND = ("lightning", "torchmetrics", "peft", "matplotlib", "bitsandbytes", "datasets")


@pytest.mark.parametrize("process", ["fork", pytest.param("fresh", marks=pytest.mark.slow)])
def test_finding_sublayers_imports_no_lightning_and_no_optional_library(process, tmp_path):
    said = fresh(FIND) if process == "fresh" else run_code(FIND, [], tmp_path / "said.txt", forgotten=NOT_TO_FIND)
    loaded = set(said.split())
    assert {"torch", "transformers", "layershed.discovery.find"} <= loaded, "the reader of modules sees them"
    assert not set(NOT_TO_FIND) & loaded


def test_dunder_all_lazy_table_and_type_checking_imports_agree():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (guarded,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert typed == ls._MODULES
    assert sorted(ls.__all__) == sorted(typed)
    assert len(set(ls.__all__)) == len(ls.__all__)


@pytest.mark.parametrize("name", ls.__all__)
def test_public_name_is_the_object_of_its_module(name):
    value = getattr(ls, name)
    assert value is getattr(sys.modules[ls._MODULES[name]], name)
    assert getattr(ls, name) is value
    assert name in dir(ls)


def test_star_import_brings_every_public_name():
    names = {}
    exec("from layershed import *", names)
    assert set(ls.__all__) <= set(names)


def test_public_class_survives_pickling():
    plan = ls.DropPlan()
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert pickle.loads(pickle.dumps(ls.DropPlan)) is ls.DropPlan


def test_modules_are_attributes_of_the_package():
    assert fresh("import layershed; print(layershed.errors.PlanError.__name__)") == "PlanError"


def test_misspelt_public_name_raises_an_error_with_the_nearest_one():
    with pytest.raises(AttributeError, match=r"no attribute 'find_sublayer'; did you mean 'find_sublayers'\?"):
        _ = ls.find_sublayer
    with pytest.raises(AttributeError, match=r"no attribute 'zzz'$"):
        _ = ls.zzz
    with pytest.raises(ImportError):
        from layershed import bypas  # noqa: F401


def test_command_overview_is_printed_without_torch():
    code = "\n".join(
        [
            "import sys",
            "from layershed.cli.main import main",
            "try: main([{!r}])",
            "except SystemExit: print(*sys.modules)",
        ]
    )
    for word in ("--help", "fti"):
        loaded = set(fresh(code.format(word)).split())
        assert "layershed.cli.commands" in loaded
        assert not HEAVY & loaded


@pytest.mark.parametrize("enabled", [True, False])
def test_command_line_leaves_garbage_collection_as_it_was(enabled, capsys):
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(SystemExit):
            main(["plan", "--help"])
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
