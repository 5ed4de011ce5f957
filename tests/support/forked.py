"""Child processes that begin at once: a server imports the libraries one time, and each child is a fork of it."""

import os
import runpy
import sys
import warnings
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support import namespaces

ROOT = Path(__file__).parents[2]
LIBRARIES = ["tests.support.chaos_runs", "tests.support.ranks.sharded"]


def fork_server() -> ForkServerContext:
    """The context whose processes are forks of a server with everything imported."""
    # Python 3.11 does not tell the server where its parent finds modules, and it skips modules that it does not find
    if str(ROOT) not in os.environ.get("PYTHONPATH", ""):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    context = get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def start_module(
    module: str, words: list[str], environment: dict[str, str], output: Path, *, anew: bool = False
) -> BaseProcess:
    """Start ``python -m module words`` as a fork; what it prints goes to a file.

    Args:
        module: The module.
        words: Its arguments.
        environment: What to change in the environment.
        output: The file.
        anew: Begin as if neither Lightning nor layershed were imported.
    """
    process = fork_server().Process(target=_run, args=(module, words, environment, output, anew))
    process.start()
    return process


def run_code(code: str, words: list[str], output: Path, *, forgotten: tuple[str, ...] = (), hidden: str = "") -> str:
    """Run ``python -c code words`` as a fork that has imported neither Lightning nor layershed; returns what it prints.

    Modules that others import stay imported, so a fresh process can see more: the tests have one of these as well.

    Args:
        code: The program.
        words: Its arguments.
        output: A file for what it prints.
        forgotten: More packages that it has not imported.
        hidden: A package that it cannot import.
    """
    process = fork_server().Process(target=_run_code, args=(code, words, output, forgotten, hidden))
    process.start()
    process.join(300)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def _run_code(code: str, words: list[str], output: Path, forgotten: tuple[str, ...], hidden: str) -> None:
    _print_to(output)
    namespaces.forget(*forgotten)
    if hidden:
        sys.modules[hidden] = None  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})
    sys.stdout.flush()


def _print_to(output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _run(module: str, words: list[str], environment: dict[str, str], output: Path, anew: bool) -> None:
    _print_to(output)
    os.environ.update(environment)
    if anew:
        namespaces.forget()
    namespaces.begin()
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
