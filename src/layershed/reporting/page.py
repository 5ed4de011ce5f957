"""Self-contained HTML pages: how their templates are filled, and how they are written."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from layershed.files.atomic import as_export_error, write_text


def page_environment() -> Environment:
    """The templates, with everything that is filled in escaped, and an error for what is missing."""
    return Environment(
        loader=PackageLoader("layershed.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: Path, html: str) -> Path:
    """Write a page; folders are created as needed, and an existing file is replaced in one step.

    Raises:
        ExportError: If nothing can be written there.
    """
    with as_export_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path
