"""Optional packages: the core works without them, and each missing one is named by its extra."""

import importlib
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import layershed.callbacks
from layershed.cli.main import main
from layershed.errors import LayershedError, MissingExtraError
from layershed.extras import EXTRAS, needs
from layershed.quantization import check_quantizable

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WITHOUT = """
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackageNotFoundError
found, from_name = PathFinder.find_spec, Distribution.from_name
def known(name):
    if name in {missing!r}: raise PackageNotFoundError(name)
    return from_name(name)
Distribution.from_name = staticmethod(known)
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.partition(".")[0] in {missing!r} else found(name, *more)
)
{code}
"""
# packages that torch and transformers 5 need themselves
THEIRS = ("jinja2", "rich")


def named(requirements):
    return {re.split(r"[\[<>=;! ]", one)[0].lower() for one in requirements}


@pytest.mark.slow
def test_core_and_callbacks_work_without_any_optional_package():
    optional = tuple(package for packages in EXTRAS.values() for package in packages if package not in THEIRS)
    code = "import layershed as ls, layershed.callbacks as c\n"
    code += "for name in ls.__all__: getattr(ls, name)\nc.SublayerDrop; c.Quantization; print('fine')"
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT.format(missing=optional, code=code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["fine"], done.stderr


@pytest.mark.parametrize(
    ("package", "use", "extra"),
    [
        ("matplotlib", lambda: layershed.callbacks.__getattr__("Report"), "report"),
        ("torchdata", lambda: importlib.import_module("layershed.training.text_data"), "data"),
        ("bitsandbytes", lambda: check_quantizable(None), "quantization"),
    ],
)
def test_missing_package_is_named_by_its_extra(monkeypatch, package, use, extra):
    gone = [name for name in sys.modules if name.partition(".")[0] == package]
    for name in {package, *gone}:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("layershed.callbacks.report", "layershed.reporting.figures", "layershed.training.text_data"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # they fail to be imported, and come back as they were
    with pytest.raises(MissingExtraError, match=rf'needs {package}, .*pip install "layershed\[{extra}\]"'):
        use()


def test_command_line_names_its_extra_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "layershed.cli.lightning_cli", None)
    monkeypatch.setattr("layershed.extras.EXTRAS", {"cli": ("layershed",)})
    assert main(["fit"]) == 1
    assert 'The command line needs layershed, which is not installed: pip install "layershed[cli]"' in (
        capsys.readouterr().err
    )


def test_other_failed_imports_stay_what_they_are():
    with pytest.raises(ModuleNotFoundError, match="layershed_nothing"), needs("cli", "It"):
        import layershed_nothing  # noqa: F401


def test_missing_extra_is_both_a_layershed_error_and_an_import_error():
    error = pickle.loads(pickle.dumps(MissingExtraError("It", "rich", "cli")))
    assert isinstance(error, LayershedError)
    assert isinstance(error, ImportError)
    assert str(error) == str(MissingExtraError("It", "rich", "cli"))


def test_extras_of_the_project_bring_what_the_errors_promise():
    extras = PROJECT["optional-dependencies"]
    brought = {"docstring_parser", "typeshed_client"}  # by jsonargparse[signatures]
    for extra, packages in EXTRAS.items():
        assert {package.replace("_", "-") for package in set(packages) - brought} <= named(extras[extra])
    assert extras["all"] == ["layershed[cli,quantization,gguf]"]
    assert {"layershed[data,report]"} <= set(extras["cli"])
    assert not named(PROJECT["dependencies"]) & {package for packages in EXTRAS.values() for package in packages}
