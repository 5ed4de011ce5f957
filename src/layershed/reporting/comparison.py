"""Runs side by side: what differs in their configurations, and their figures in rows. Pure, no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layershed.formatting import printable
from layershed.reporting.run_files import RunFiles, callbacks_in

ABSENT = "-"
SECTIONS = ("Drop", "Quality", "Metrics and tasks", "Speed", "SDR", "Size")
_CALLBACKS = "trainer.callbacks"


@dataclass(frozen=True)
class Row:
    """One row of the table: a value for each run."""

    label: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        names: Short names of the runs, all different.
        kinds: Their kinds.
        sections: Rows by section; the first section is what differs in the configurations.
        notes: What is missing or unfinished, by run.
        without_config: Names of the runs whose configuration is unknown.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    sections: Mapping[str, tuple[Row, ...]]
    notes: Mapping[str, tuple[str, ...]]
    without_config: tuple[str, ...]


def compare_runs(runs: Sequence[RunFiles]) -> Comparison:
    """Put runs side by side.

    Args:
        runs: At least one.
    """
    names = short_names([run.folder for run in runs])
    kinds = [run.kind for run in runs]
    commands = ["fit" if kind == "control" else kind for kind in kinds]
    sections = {"Configuration": tuple(differences([run.config for run in runs], commands))}
    for section in SECTIONS:
        labels = dict.fromkeys(label for run in runs for label in run.sections.get(section, {}))
        rows = (
            Row(printable(label), tuple(printable(run.sections.get(section, {}).get(label, ABSENT)) for run in runs))
            for label in labels
        )
        sections[section] = tuple(rows)
    return Comparison(
        names,
        tuple(kinds),
        {section: rows for section, rows in sections.items() if rows},
        {name: tuple(map(printable, run.notes)) for name, run in zip(names, runs, strict=True) if run.notes},
        tuple(name for name, run in zip(names, runs, strict=True) if not run.config),
    )


def differences(configs: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Iterator[Row]:
    """The options that differ between configurations; an empty one is unknown and does not count.

    - An option that a command does not have is compared between the others. Of one kind of run, its absence differs.
    - A callback that some runs do not list is one row; its options are compared between those that list it.

    Args:
        configs: The configurations.
        kinds: The kind of each run, which says what options its command has.
    """
    known = [config for config in configs if config]
    flat = [_flat(config) for config in configs]
    aliases = _common_names(known)
    for key in sorted({key for each in flat for key in each}):
        having = {kind for each, kind in zip(flat, kinds, strict=True) if key in each}
        compared = {
            each.get(key, ABSENT)
            for each, config, kind in zip(flat, configs, kinds, strict=True)
            if config and kind in having and _holds_parent(each, key)
        }
        if len(compared) > 1:
            values = (each.get(key, ABSENT) if config else "?" for each, config in zip(flat, configs, strict=True))
            found = (f"{_CALLBACKS}.{new}{key[len(old) :]}" for old, new in aliases.items() if _below(key, old))
            yield Row(printable(next(found, key)), tuple(map(printable, values)))


def short_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The folders without what all of them begin with."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    shared = 0
    while all(len(parts) > shared + 1 for parts in paths) and len({parts[shared] for parts in paths}) == 1:
        shared += 1
    return tuple(printable("/".join(parts[shared:])) for parts in paths)


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names of all options, with their values as texts; callbacks by their class."""
    found: dict[str, str] = {}

    def walk(value: object, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        else:
            found[key] = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    walk({name: value for name, value in config.items() if name != "trainer"}, "")
    trainer = config.get("trainer")
    if isinstance(trainer, Mapping):
        for name, value in trainer.items():
            if name != "callbacks":
                walk(value, f"trainer.{name}")
    for key, _, options in _callbacks(config):
        found[key] = "listed"
        for name, value in options.items():
            walk(value, f"{key}.{name}")
    return {key.replace(".init_args.", "."): value for key, value in found.items() if key}


def _callbacks(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Key, own name and options; a second callback of one class has a number."""
    seen: dict[str, int] = {}
    for kind, name, options in callbacks_in(config):
        seen[kind] = seen.get(kind, 0) + 1
        number = "" if seen[kind] == 1 else f"#{seen[kind]}"
        yield f"{_CALLBACKS}.{kind}{number}", name, options


def _common_names(configs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The name of each callback, by its key, where all configurations give it the same one."""
    names: dict[str, set[str]] = {}
    for config in configs:
        for key, name, _ in _callbacks(config):
            names.setdefault(key, set()).add(name)
    return {key: next(iter(found)) for key, found in names.items() if len(found) == 1 and found != {""}}


def _holds_parent(flat: Mapping[str, str], key: str) -> bool:
    """Whether the callback to which an option belongs is listed; true for every other option."""
    parts = key.split(".")
    return not key.startswith(f"{_CALLBACKS}.") or len(parts) == 3 or ".".join(parts[:3]) in flat


def _below(key: str, parent: str) -> bool:
    return key == parent or key.startswith(f"{parent}.")
