"""Refuses a config whose YAML aliases stand for billions of values: jsonargparse would write them out for hours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from layershed.errors import ConfigError

MOST_NODES = 100_000


def check_configs(words: Iterable[str]) -> None:
    """Check the configs among the words of a command line.

    Raises:
        ConfigError: If a config is not text, or its aliases stand for more than 100,000 values.
    """
    for word in words:
        path = Path(word.rpartition("=")[2])
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            continue
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
        except (yaml.YAMLError, RecursionError):
            continue  # the parser says where
        if root is not None and _nodes(root, {}) > MOST_NODES:
            raise ConfigError(f"{str(path)!r}: its aliases stand for more than {MOST_NODES:,} values; write them out.")


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a node stands for once every alias is written out."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # for one that holds itself
        inner: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in inner)
    return known[id(node)]
