"""Lightning under both of its names: what recognizes its classes, and what inherits from them.

The first tests know two packages of their own, ``first_name`` and ``second_name``. The last ones run tests of the suite
in a process where the tests import the second name of Lightning; tests/support/namespaces.py says how.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from layershed.errors import LayershedError, MissingLightningError
from layershed.integration import namespaces
from layershed.integration.namespaces import (
    Namespace,
    base,
    classes,
    follow_trainer,
    function,
    installed,
    kind,
    own,
)
from tests.support.forked import start_module
from tests.support.namespaces import ONLY_SECOND, SECOND, VARIABLE

ROOT = Path(__file__).parents[2]
SOURCE = Path(namespaces.__file__)
PACKAGE = """
from {name} import things
class Callback:
    def hook(self): return {name!r}
class Trainer: pass
class Module:
    trainer = property(lambda self: self._trainer, lambda self, trainer: setattr(self, "_trainer", trainer))
    def hook(self): return {name!r}
class DataModule:
    trainer = None
    def hook(self): return {name!r}
"""
THINGS = "class Old: pass\ndef said(): return {name!r}\n"


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two packages of the same classes; the second lacks one. None is imported."""
    for name in ("first_name", "second_name"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(PACKAGE.format(name=name))
        (tmp_path / name / "things.py").write_text(THINGS.format(name=name))
    with (tmp_path / "first_name" / "things.py").open("a") as file:
        file.write("class New: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = tuple(Namespace(name, name) for name in ("first_name", "second_name"))
    monkeypatch.setattr(namespaces, "NAMESPACES", names)
    namespaces._import.cache_clear()
    yield names
    namespaces._import.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("first_name", "second_name")]:
        del sys.modules[name]


def load(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("before", [(), ("first_name",), ("second_name",), ("second_name", "first_name")])
def test_namespace_imported_before_is_the_first_and_classes_are_of_both_in_every_order(two, before):
    for name in before:
        load(name)
    first = "second_name" if before == ("second_name",) else "first_name"
    assert own().pytorch == first
    assert set(installed()) == set(two)
    assert function("pytorch.things", "said")() == first
    inherited = base("pytorch", "Callback")
    assert [each.__module__ for each in inherited.__bases__] == [each.pytorch for each in installed()]
    for name in ("second_name", "first_name"):  # the program's own imports come afterwards
        assert issubclass(inherited, load(name).Callback)
        assert isinstance(inherited(), load(name).Callback)
        assert isinstance(load(name).Trainer(), kind("pytorch", "Trainer"))


@pytest.mark.parametrize("name", ["first_name", "second_name"])
def test_one_namespace_is_enough(two, tmp_path, name):
    (other,) = {"first_name", "second_name"} - {name}
    (tmp_path / other).rename(tmp_path / "gone")
    importlib.invalidate_caches()
    assert [each.pytorch for each in installed()] == [name]
    assert base("pytorch", "Callback").__bases__ == (load(name).Callback,)
    assert kind("pytorch", "Callback") is load(name).Callback


def test_namespace_that_cannot_be_imported_is_left_out_and_an_error_if_it_is_the_only_one(two, tmp_path):
    (tmp_path / "second_name" / "__init__.py").write_text("raise AttributeError('older than this torch')")
    assert [each.pytorch for each in installed()] == ["first_name"]
    del sys.modules["first_name"]
    (tmp_path / "first_name").rename(tmp_path / "gone")
    importlib.invalidate_caches()
    namespaces._import.cache_clear()
    with pytest.raises(AttributeError, match="older than this torch"):
        installed()


def test_missing_lightning_is_an_error_that_names_what_to_install(two, monkeypatch):
    monkeypatch.setattr(namespaces, "NAMESPACES", (Namespace("no_such_name", "no_such_name"),))
    with pytest.raises(MissingLightningError, match="pip install lightning") as caught:
        own()
    assert isinstance(caught.value, LayershedError)
    assert isinstance(caught.value, ImportError)


def test_kind_recognizes_the_classes_of_every_namespace(two):
    first, second = load("first_name.things"), load("second_name.things")
    old, new, none = kind("pytorch.things", "Old"), kind("pytorch.things", "New"), kind("pytorch.nothing", "Old")
    assert not isinstance(object(), old)
    assert isinstance(first.Old(), old)
    assert isinstance(second.Old(), old)
    assert isinstance(second.Old(), new | old)
    assert isinstance(second.Old(), (new, old))
    assert issubclass(type("Mine", (second.Old,), {}), old)
    assert isinstance(first.New(), new)
    assert not isinstance(second.Old(), new)
    assert classes(old) == (first.Old, second.Old)
    assert classes(new) == (first.New,), "an older version may lack a class"
    assert not isinstance(first.Old(), none)
    assert not isinstance(object(), none)


@pytest.mark.parametrize("name", ["Module", "DataModule"])
def test_each_instance_has_the_methods_of_its_trainers_namespace_and_no_class_changes(two, name, monkeypatch):
    monkeypatch.setattr(namespaces, "Trainer", kind("pytorch", "Trainer"))
    first, second = load("first_name"), load("second_name")

    class Ours(follow_trainer(base("pytorch", name))):
        def own(self):
            return super().hook()

    order = Ours.__mro__
    modules = {first: Ours(), second: Ours()}
    assert modules[second].hook() == "first_name"
    for _ in range(2):
        for place, module in modules.items():
            module.trainer = place.Trainer()
            assert isinstance(module, getattr(place, name))
        for place, module in modules.items():
            assert module.hook() == module.own() == place.__name__
            assert module.hook.__code__ is getattr(place, name).hook.__code__
    assert Ours.hook is getattr(first, name).hook
    assert Ours.__mro__ == order
    modules[second].trainer = None
    assert modules[second].hook() == "first_name"


def test_names_for_type_checkers_are_those_that_exist_when_it_runs():
    guarded = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If) and node.orelse)
    typed, real = (
        {alias.asname for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
        | {node.targets[0].id for node in body if isinstance(node, ast.Assign)}
        for body in (guarded.body, guarded.orelse)
    )
    assert typed - {"LightningDataModule"} == real


def test_every_class_that_is_recognized_exists_in_the_namespace():
    guarded = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If) and node.orelse)
    kinds = [node.targets[0].id for node in guarded.orelse if node.value.func.id == "kind"]
    assert len(kinds) > 10
    missing = {name for name in kinds if len(classes(getattr(namespaces, name))) < len(installed())}
    missing |= {name for name in kinds if classes(getattr(namespaces, name))[0].__module__ == namespaces.__name__}
    assert missing <= {"WeightAveraging"}  # from Lightning 2.6 on


# ---- tests of the suite under the second name ----

PRIVATE = "tests/integration/test_lightning_private.py"
CHOSEN = [
    PRIVATE,
    "tests/integration/test_namespaces.py::test_every_class_that_is_recognized_exists_in_the_namespace",
    "tests/integration/test_checkpoint_io.py::test_atomic_checkpoint_io_replaces_only_lightnings_own",
    "tests/distributed/test_strategies.py::test_strategy_that_holds_the_weights_is_refused",
    "tests/callbacks/test_sublayer_drop.py::test_losses_around_the_drop_equal_an_evaluation_by_hand",
    "tests/callbacks/test_given_plan.py::test_resumed_run_with_a_given_plan_equals_the_uninterrupted_one",
    "tests/callbacks/test_setups.py::test_monitor_that_looks_before_the_drop_is_refused_before_training",
    "tests/callbacks/test_lora_recovery.py::test_lora_recovery_refuses_averaged_weights",
    "tests/callbacks/test_sublayer_drop.py::test_optimizer_forgets_dropped_parameters_and_its_schedule_goes_on",
    "tests/callbacks/test_exact_resume.py::test_run_resumed_in_a_copied_moved_or_linked_directory_keeps_its_rows",
]
MORE = [
    "tests/callbacks/test_order.py::test_all_callbacks_together_resumed_equal_uninterrupted",
    "tests/callbacks/test_exact_resume.py::test_lost_rows_and_rows_of_another_run_are_warned_of",
]
FEW = ["tests/callbacks/test_sublayer_drop.py::test_sublayer_drop_takes_one_of_two_transformers_by_name", *CHOSEN[1:4]]
WHOLE = ["tests/callbacks", "tests/distributed", "tests/integration"]
OPTIONS = ["-q", "-p", "no:cacheprovider", f"--deselect={Path(__file__).relative_to(ROOT)}::test_suites"]


def passed(text):
    """How many tests passed in the output of a run that is expected to have no other outcome."""
    (count,) = re.findall(r"^(\d+) passed", text, re.MULTILINE)
    return int(count)


def forked(how, output, *words):
    """Run tests in a fork, which has the libraries already."""
    # the plugins' modules are there already, and pytest warns that it cannot rewrite them
    environment = {VARIABLE: how, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    process = start_module("pytest", [*OPTIONS, *words], environment, output, anew=how == ONLY_SECOND)
    process.join(300)
    assert process.exitcode == 0, output.read_text()
    return passed(output.read_text())


def test_suites_chosen_tests_pass_under_the_second_name(tmp_path):
    # two of the contract tests read the sources of Lightning, which are the same
    assert forked(SECOND, tmp_path / "output.txt", *CHOSEN, "-k", "not private_name") > 40


def under(how, *words):
    environment = {**os.environ, VARIABLE: how}
    command = [sys.executable, "-m", "pytest", *OPTIONS, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return passed(done.stdout)


def test_suites_chosen_tests_pass_where_only_the_second_name_is_installed(tmp_path):
    assert forked(ONLY_SECOND, tmp_path / "output.txt", *FEW) > 10


@pytest.mark.slow
@pytest.mark.parametrize("folder", WHOLE)
def test_suites_folder_passes_under_the_second_name(folder):
    assert under(SECOND, folder) > 30


@pytest.mark.slow
def test_suites_chosen_tests_and_two_ranks_pass_where_only_the_second_name_is_installed():
    assert under(ONLY_SECOND, *CHOSEN, *MORE, "tests/distributed/test_ranks.py") > 40
