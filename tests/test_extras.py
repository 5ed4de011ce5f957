"""Optional packages: the core works without them, and each missing one is named by its extra."""

import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from layershed.errors import LayershedError, MissingExtraError
from layershed.extras import EXTRAS, needs

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


def without(packages, code):
    """What a fresh interpreter prints in which packages are missing."""
    script = WITHOUT.format(missing=tuple(packages), code=code)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def named(requirements):
    return {re.split(r"[\[<>=;! ]", one)[0].lower() for one in requirements}


def test_core_and_callbacks_work_without_any_optional_package():
    optional = [
        package for packages in EXTRAS.values() for package in packages if package != "jinja2"
    ]  # torch needs it
    code = "import layershed as ls, layershed.callbacks as c\n"
    code += "for name in ls.__all__: getattr(ls, name)\nc.SublayerDrop; c.Quantization; print('fine')"
    assert without(optional, code).splitlines()[-1] == "fine"


@pytest.mark.parametrize(
    ("package", "code", "extra"),
    [
        ("matplotlib", "from layershed.callbacks import Report", "report"),
        ("torchdata", "import layershed.training.text_data", "data"),
        ("jsonargparse", "from layershed.cli.main import main; main(['fit'])", "cli"),
        ("bitsandbytes", "import layershed.quantization as q; q.check_quantizable(None)", "quantization"),
    ],
)
def test_missing_package_is_named_by_its_extra(package, code, extra):
    assert f'needs {package}, which is not installed: pip install "layershed[{extra}]"' in without([package], code)


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
        assert set(packages) - brought <= named(extras[extra])
    assert extras["all"] == ["layershed[cli,quantization,gguf]"]
    assert {"layershed[data,report]"} <= set(extras["cli"])
    assert not named(PROJECT["dependencies"]) & {package for packages in EXTRAS.values() for package in packages}
