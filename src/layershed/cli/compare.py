"""``train.py compare``: runs side by side, as a table in the terminal and as a page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layershed.errors import ResultError
from layershed.formatting import printable
from layershed.reporting.comparison import Comparison, compare_runs
from layershed.reporting.comparison_page import check_page, write_comparison
from layershed.reporting.run_files import is_run, read_run

PAGE = "comparison.html"
# What validate, test and predict leave beside the runs that they evaluate.
_NO_RESULT = {"evaluation": "it evaluates a model", "unknown": "it has a configuration and no result"}


def compare(runs: Sequence[str], *, page: str | None = None) -> Comparison:
    """Print a table of runs, and write a page with their curves on one axis.

    Args:
        runs: Folders of runs, or folders that hold several (version_0, version_1, ...). Of several, those of validate,
            test and predict are left out.
        page: The HTML file to write; null writes comparison.html into the folder that holds all runs.

    Returns:
        The comparison.

    Raises:
        ResultError: If a folder is none of a run, there is only one, or the page would replace another file.
    """
    given = [folder for run in runs for folder in _folders(Path(run).expanduser())]
    folders = list(dict.fromkeys(folder for folder, _ in given))
    read = [read_run(folder) for folder in folders]
    named = {folder for folder, named in given if named}
    left_out = [run for run in read if run.kind in _NO_RESULT and run.folder not in named]
    if len(left_out) < len(read):  # a folder of nothing else is meant as it is
        read = [run for run in read if run not in left_out]
        for run in left_out:
            print(printable(f"note: {run.folder} is left out: {_NO_RESULT[run.kind]}. To compare it, name it."))
    folders = [run.folder for run in read]
    if len(folders) < 2:
        raise ResultError(f"compare: {' '.join(runs)} is one run. Give two or more, or a folder that holds several.")
    path = Path(page).expanduser() if page is not None else _common(folders) / PAGE
    check_page(path)
    comparison = compare_runs(read)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(120, 36 + 24 * len(folders)))
    console.print(_table(comparison))
    for line in _notes(comparison):
        console.print(line, highlight=False, markup=False)
    write_comparison(comparison, read, path)
    console.print(printable(f"Page: {path}"), soft_wrap=True, highlight=False, markup=False)
    return comparison


def _folders(path: Path) -> Iterator[tuple[Path, bool]]:
    """A run, or the runs in a folder, by number; and whether it is named."""
    if not path.is_dir():
        raise ResultError(
            f"compare: there is no folder {str(path)!r}. Give the folder of a run, such as runs/version_0."
        )
    inner = [each for each in path.glob("version_*") if each.name[8:].isdigit() and is_run(each)]
    if is_run(path) or not inner:
        yield path, True
    else:
        yield from ((each, False) for each in sorted(inner, key=lambda each: int(each.name[8:])))


def _common(folders: Sequence[Path]) -> Path:
    return Path(os.path.relpath(os.path.commonpath([os.path.abspath(folder.parent) for folder in folders])))


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    longest = max((len(row.label) + 2 for rows in comparison.sections.values() for row in rows), default=0)
    table.add_column("", overflow="fold", min_width=min(44, longest))
    for name in comparison.names:
        table.add_column(Text(name), overflow="fold")
    table.add_row("kind", *comparison.kinds)
    for section, rows in comparison.sections.items():
        table.add_section()
        table.add_row(Text("differs in the configuration" if section == "Configuration" else section, style="bold"))
        for row in rows:
            table.add_row(Text(f"  {row.label}"), *map(Text, row.values))
    return table


def _notes(comparison: Comparison) -> Iterator[str]:
    if "Configuration" not in comparison.sections:
        yield "The known configurations are equal."
    for name, notes in comparison.notes.items():
        yield f"{name} {'; '.join(notes)}."
    for name in comparison.without_config:
        yield f"The configuration of {name} is unknown, so it is not compared."
