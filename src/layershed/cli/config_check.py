"""Refuses configs whose YAML aliases expand to billions of values: jsonargparse would expand them for hours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from layershed.files.run_config import checked_text


def check_configs(words: Iterable[str]) -> None:
    """Check the configs among the words of a command line; the parser reports what is no YAML.

    Raises:
        ConfigError: If a config is not UTF-8 text, or its aliases expand to more than 100,000 values.
    """
    for word in words:
        path = Path(word.rpartition("=")[2])
        if path.suffix in (".yaml", ".yml") and path.is_file():
            checked_text(path)
