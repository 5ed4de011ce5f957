"""The ``config.yaml`` of a run, which may be a stranger's. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from layershed.errors import ConfigError

CONFIG_FILE = "config.yaml"
MOST_NODES = 100_000


def read_config(path: str | Path) -> Mapping[str, Any]:
    """Read a config; empty if it is no mapping.

    Raises:
        OSError: If the file cannot be read.
        yaml.YAMLError, RecursionError: If it is no YAML.
        ConfigError: If it is not UTF-8 text, or its aliases expand to more than 100,000 values.
    """
    content = yaml.safe_load(checked_text(path))
    return content if isinstance(content, Mapping) else {}


def config_in(folder: str | Path) -> Mapping[str, Any] | None:
    """The config of a run; None if it is not there, or is no YAML.

    Raises:
        ConfigError: If it is not UTF-8 text, or its aliases expand to more than 100,000 values.
    """
    try:
        return read_config(Path(folder) / CONFIG_FILE)
    except (OSError, yaml.YAMLError, RecursionError):
        return None


def checked_text(path: str | Path) -> str:
    """The text of a config whose aliases expand to few values; the caller's parser reports what is no YAML.

    Raises:
        OSError: If the file cannot be read.
        ConfigError: If it is not UTF-8 text, or its aliases expand to more than 100,000 values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{str(path)!r} is not UTF-8 text ({reason}); save it as UTF-8.") from None
    except (yaml.YAMLError, RecursionError):
        return text
    if root is not None and _nodes(root, {}) > MOST_NODES:
        raise ConfigError(
            f"{str(path)!r}: its YAML aliases expand to more than {MOST_NODES:,} values; write the values out."
        )
    return text


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of nodes after every alias is expanded."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # a node that contains itself is too large
        inner: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in inner)
    return known[id(node)]


def named_entries(given: Any) -> list[tuple[str | None, Any]]:
    """The callbacks of a config with their names; None where one stands alone or they are listed."""
    if isinstance(given, Mapping) and "class_path" not in given:
        return list(given.items())
    return [(None, entry) for entry in (given if isinstance(given, list) else [given])]
