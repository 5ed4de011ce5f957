"""The house: which room may import which, what needs no torch or Lightning, and how long a file may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from layershed.integration.namespaces import NAMESPACES

ROOT = Path(__file__).parents[1]
# Each room imports only what stands before it. layershed/__init__.py re-exports from everywhere and is no room.
ROOMS = [
    "errors",
    "arguments",
    "extras",
    "progress",
    "spellings",
    "stand_ins",
    "files",
    "batches",
    "devices",
    "planning",
    "formatting",
    "discovery",
    "dropped_config",
    "map_checks",
    "surgery",
    "quality",
    "evaluation",
    "continuation",
    "importance",
    "compensation",
    "recovery",
    "search",
    "drop",
    "quantization",
    "performance",
    "saving",
    "reporting",
    "integration",
    "callbacks",
    "training",
    "cli",
]
WITHOUT_LIGHTNING = ROOMS[: ROOMS.index("integration")]
WITHOUT_TORCH = ("errors", "arguments", "progress", "planning")
LONGEST = 350


def modules():
    """Path of every file by its dotted name within layershed."""
    found = {}
    for folder, prefix in ((ROOT / "src" / "layershed", ()), (ROOT / "callbacks", ("callbacks",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    del found["__init__"]
    return found


MODULES = modules()


def parse(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(tree):
    """Dotted names of what a syntax tree imports; of ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree):
    """The modules of layershed among them; the bare package as an empty name."""
    names = {name for name in imports(tree) if name.partition(".")[0] == "layershed"}
    found = {name.removeprefix("layershed").removeprefix(".") for name in names}
    known = {name for name in found if name in MODULES}
    # "from layershed import surgery" names the package and the module; "import layershed" the package alone
    return known | ({""} if "" in found and not known else set())


def runs_on_import(tree):
    """The tree without what stands inside functions, or is only for type checkers."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

        def visit_If(self, node):
            return ast.Pass() if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

        visit_AsyncFunctionDef = visit_FunctionDef

    return Strip().visit(tree)


def room(name):
    return name.partition(".")[0]


def test_import_reader_sees_every_form_of_import():
    assert {"errors", "planning.plan", "importance.tracker", "callbacks.sublayer_drop"} <= set(MODULES)
    assert own_imports(parse("planning.selection")) == {"arguments", "errors", "planning.arguments", "planning.plan"}
    assert own_imports(ast.parse("import layershed as ls")) == {""}
    assert own_imports(ast.parse("from layershed import surgery")) == {"surgery"}
    assert own_imports(ast.parse("from layershed.planning import plan")) == {"planning", "planning.plan"}
    assert own_imports(runs_on_import(ast.parse("def f():\n import layershed.surgery"))) == set()


def test_room_imports_only_rooms_before_it():
    for name in MODULES:
        assert room(name) in ROOMS, f"{name} stands in no room"
        for other in own_imports(parse(name)):
            assert other, f"{name} imports the package itself, which imports everything"
            assert ROOMS.index(room(other)) <= ROOMS.index(room(name)), f"{name} must not import {other}"


def test_package_has_no_circular_imports():
    graph = {name: own_imports(parse(name)) & set(MODULES) - {name} for name in MODULES}
    packages = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}
    for name in graph:
        graph[name] -= packages - {"callbacks"}  # the __init__ of a room imports nothing
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_room_init_files_import_nothing():
    """Else a file of the room would bring all of it along."""
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "callbacks":
            assert not list(imports(parse(name))), f"layershed/{name}/__init__.py imports something"


def test_rooms_before_integration_import_no_lightning():
    for name in MODULES:
        if room(name) in WITHOUT_LIGHTNING:
            found = {other for other in imports(parse(name)) if other.partition(".")[0].endswith("lightning")}
            assert not found, f"{name} imports {found}"


def test_one_file_imports_lightning_under_either_name_for_the_callbacks():
    """The command line is a program of its own: it has one name."""
    for name, path in MODULES.items():
        if name != "integration.namespaces":
            assert NAMESPACES[1].pytorch not in path.read_text(encoding="utf-8"), name
            if room(name) != "cli":
                found = {other for other in imports(parse(name)) if other.partition(".")[0] == "lightning"}
                assert not found, f"{name} imports {found}"


def test_errors_and_planning_import_no_torch():
    """So that a plan can be made, read and checked without a model; the same on every rank."""
    for name in MODULES:
        if room(name) in WITHOUT_TORCH:
            heavy = {other.partition(".")[0] for other in imports(parse(name))} & {"torch", "transformers", "numpy"}
            assert not heavy, f"{name} imports {heavy}"


def test_callbacks_folder_is_imported_as_layershed_callbacks():
    """A bare ``import callbacks`` would import every class twice."""
    for name in MODULES:
        assert not [other for other in imports(parse(name)) if other.partition(".")[0] == "callbacks"], name


def test_source_files_are_within_the_line_limit():
    for name, path in MODULES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST, name


def test_test_files_lie_in_the_rooms_that_they_test():
    rooms = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert rooms - {"support", "distributed", "simulated"} <= set(ROOMS)


def test_tests_share_code_only_through_support():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        shared = {other for other in imports(tree) if other.partition(".")[0] in ("tests", "benchmarks")}
        strangers = {other for other in shared if not f"{other}.".startswith("tests.support.")} - {"tests"}
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"
