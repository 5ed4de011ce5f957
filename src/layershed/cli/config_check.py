"""Refuses configs whose YAML aliases expand to billions of values: jsonargparse would expand them for hours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from layershed.errors import ConfigError

MOST_NODES = 100_000


def check_configs(words: Iterable[str]) -> None:
    """Check the configs among the words of a command line.

    Raises:
        ConfigError: If a config is not UTF-8 text, or its aliases expand to more than 100,000 values.
    """
    for word in words:
        path = Path(word.rpartition("=")[2])
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            continue
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start}"
            raise ConfigError(f"{str(path)!r} is not UTF-8 text ({reason}); save it as UTF-8.") from None
        except (yaml.YAMLError, RecursionError):
            continue  # the parser reports the place
        if root is not None and _nodes(root, {}) > MOST_NODES:
            raise ConfigError(
                f"{str(path)!r}: its YAML aliases expand to more than {MOST_NODES:,} values; write the values out."
            )


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of nodes after every alias is expanded."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # a node that contains itself is too large
        inner: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in inner)
    return known[id(node)]
