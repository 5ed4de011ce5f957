"""The file in which a search keeps its finished rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layershed.arguments import as_path
from layershed.errors import SelectionError
from layershed.files.atomic import write_text


def load_state(file: str | Path | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`save_state` wrote; nothing without a file, or if it does not exist yet.

    Args:
        file: The file.
        about: What is searched, and how. A file about another search is refused.

    Raises:
        SelectionError: If the file is about another search, or not readable.
    """
    if file is None or not (path := as_path(file, "state: the file of a search", SelectionError)).is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known, rounds = content["about"], dict(content["rounds"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SelectionError(
            f"state: {str(path)!r} is no state of a search ({error}). Delete it, or name another."
        ) from None
    if known != json.loads(json.dumps(about)):
        changed = next((key for key in about if known.get(key) != about[key]), "search")
        raise SelectionError(
            f"state: {str(path)!r} is about another search: {changed} differs. Delete it, or name another file."
        )
    return rounds


def save_state(file: str | Path | None, about: Mapping[str, Any], rounds: Mapping[str, Any]) -> None:
    """Write the finished rounds, atomically; nothing without a file."""
    if file is not None:
        path = as_path(file, "state: the file of a search", SelectionError)
        write_text(path, json.dumps({"about": about, "rounds": rounds}) + "\n")
