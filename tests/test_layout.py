"""The direction of imports: every module of layershed imports strictly lower ranks, and none is too long."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "layershed"
RANKS = [
    {"errors", "intervals", "memory", "style", "thinning", "usage"},
    {"folders", "vetting", "config_files"},
    {"plan", "adapter", "standins", "tape", "roofline"},
    {
        "schedule",
        "functional",
        "overrides",
        "batches",
        "epoch_sampler",
        "packing",
        "dataflow",
        "replay",
        "wording",
        "checkpoint_io",
    },
    {"probe", "metrics", "selection", "kinds", "resuming", "shards"},
    {"substitution", "quantized_linear"},
    {"branches"},
    {"trial"},
    {"discovery"},
    {"surgery", "stopwatch"},
    {"calibration", "standalone", "lora_targets"},
    {"recovery"},
    {"quantization", "distillation", "optimizers", "adapter_folder", "weights"},
    {"costs", "latency"},
    {"pruning", "quality", "speed", "export", "checkpoint"},
    {"targeting", "prediction", "building", "benchmarking"},
    {"figures", "frontier"},
    {"report", "console"},
    {"callbacks"},
    {"module", "data"},
    {"running"},
    {"comparing"},
    {"commands"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
MAX_LINES = 350

# layershed/__init__.py re-exports from everywhere and stands above all
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (SOURCE, SOURCE / "callbacks")
    for path in sorted(folder.glob("*.py"))
    if path != SOURCE / "__init__.py"
}
files = pytest.mark.parametrize("name", FILES)


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
    """The modules of layershed among them, by their keys in FILES; the bare package as ``""``."""
    found = set()
    for name in imports(tree):
        if name == "layershed":
            found.add("")
        elif name.startswith("layershed."):
            found.add(name.removeprefix("layershed."))
    known = {name for name in found if name in FILES}
    # "from layershed import plan" names the package and the module; "import layershed" the package alone
    return known | ({""} if "" in found and not known else set())


def parse(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def runs_on_import(tree):
    """The tree without what stands inside functions."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

        visit_AsyncFunctionDef = visit_FunctionDef

    return Strip().visit(tree)


def test_there_is_something_to_check():
    assert {"errors", "plan", "selection", "calibration", "callbacks"} <= set(FILES)
    assert own_imports(parse("selection")) == {"errors", "plan"}
    assert own_imports(ast.parse("import layershed as ls")) == {""}
    assert own_imports(ast.parse("from layershed import plan")) == {"plan"}
    assert own_imports(runs_on_import(ast.parse("def f():\n import layershed.plan"))) == set()


@files
def test_every_module_has_a_rank(name):
    assert name.partition(".")[0] in RANK


@files
def test_imports_go_to_strictly_lower_ranks(name):
    top = name.partition(".")[0]
    for other in own_imports(parse(name)):
        below = other.partition(".")[0]
        assert other, f"{name} imports the package itself, which imports everything"
        # among themselves the callbacks need only be free of circles
        assert RANK[below] < RANK[top] or top == below == "callbacks", f"{name} must not import {other}"


@files
def test_nobody_imports_the_callbacks_by_their_folder(name):
    assert not [other for other in imports(parse(name)) if other.partition(".")[0] == "callbacks"]


def test_no_module_imports_itself_in_a_circle():
    graph = {name: own_imports(runs_on_import(parse(name))) & set(FILES) for name in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", ["errors", "plan", "schedule", "selection"])
def test_deciding_needs_no_torch(name):
    """So that a plan can be made, read and checked without a model; the same on every rank."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        tree = parse(current)
        heavy = {other.partition(".")[0] for other in imports(tree)} & {"torch", "transformers", "numpy", "lightning"}
        assert not heavy, f"{current} imports {heavy}"
        todo += own_imports(tree)


@files
def test_no_file_is_too_long(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) < MAX_LINES
