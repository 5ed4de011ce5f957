"""What a user installs: wheel and sdist hold every room and the callbacks, and work outside the checkout."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import layershed.callbacks
from tests.support.forked import run_code

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "tests", "benchmarks")
IMPORT_ALL = """
import importlib, pkgutil, sys
import layershed
for module in pkgutil.walk_packages(layershed.__path__, "layershed."):
    importlib.import_module(module.name)
from layershed import callbacks
assert all(isinstance(getattr(callbacks, name), type) for name in callbacks.__all__)
assert all(getattr(layershed, name) is not None for name in layershed.__all__)
print(layershed.__file__, callbacks.__file__, len([name for name in sys.modules if name.startswith("layershed")]))
"""


def build(source, target, what):
    """Call a hook of the build backend, as pip does."""
    script = f"from setuptools import build_meta; print(build_meta.build_{what}({str(target)!r}))"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target / run.stdout.splitlines()[-1]


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, as a build leaves folders in it."""
    copy = tmp_path_factory.mktemp("source") / "layershed"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build(source, tmp_path_factory.mktemp("wheel"), "wheel")


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    wanted = {
        f"layershed/{path.relative_to(ROOT / 'src' / 'layershed').as_posix()}"
        for path in (ROOT / "src" / "layershed").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    wanted |= {f"layershed/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    found = {name for name in names_in(wheel) if ".dist-info/" not in name}
    assert found == wanted
    assert {"layershed/py.typed", "layershed/callbacks/__init__.py"} <= found
    assert sum("/templates/" in name for name in found) == 7


def extract(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def in_a_fork(wheel, folder):
    """Import everything in a process that has the other libraries already and finds the wheel's files first."""
    extract(wheel, folder)
    # not what is left of the checkout, which may have been put there for this run
    others = [path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT)]
    libraries = [path for path in sys.path if "site-packages" in path]
    first = f"import sys; sys.path[:] = {[str(folder), *dict.fromkeys([*others, *libraries])]!r}\n"
    return run_code(first + IMPORT_ALL, [], folder.with_suffix(".txt"))


def in_a_fresh_environment(wheel, folder):
    """Import everything in a virtual environment that the wheel is installed into."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    extract(wheel, packages)
    outer = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "outer.pth").write_text("\n".join(outer), encoding="utf-8")  # for torch and the like
    python = folder / "bin" / "python"
    run = subprocess.run([python, "-W", "ignore", "-c", IMPORT_ALL], cwd=folder, capture_output=True, text=True, env={})
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("import_all", [in_a_fork, pytest.param(in_a_fresh_environment, marks=pytest.mark.slow)])
def test_every_module_of_the_wheel_is_imported_outside_the_checkout(import_all, wheel, tmp_path):
    package, callbacks, count = import_all(wheel, tmp_path / "place").split()[-3:]
    assert Path(package).is_relative_to(tmp_path / "place")
    assert Path(callbacks) == Path(package).parent / "callbacks" / "__init__.py"
    assert int(count) > 100


def test_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    sdist = build(source, tmp_path, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names_in(build(unpacked, tmp_path, "wheel")) == names_in(wheel)


def test_pyproject_lists_every_room():
    """The mapping of callbacks/ takes an explicit list; a forgotten room would be missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    source = ROOT / "src"
    rooms = [*(path.parent for path in source.rglob("__init__.py")), *source.rglob("templates")]
    found = {".".join(room.relative_to(source).parts) for room in rooms}
    assert set(listed) == found | {"layershed.callbacks"}


def test_editable_install_takes_the_callbacks_from_the_top_level():
    assert Path(layershed.callbacks.__file__) == ROOT / "callbacks" / "__init__.py"
