"""The YAML files that a command line names, read before they are parsed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from layershed.errors import ConfigError

MOST_NODES = 100_000


def read_configs(words: Iterable[str]) -> Iterator[str]:
    """The texts of the configs among the words of a command line.

    Raises:
        ConfigError: If one is no text, or its aliases stand for more than anybody has written: a few lines can stand
            for billions.
    """
    for word in words:
        path = Path(word.rpartition("=")[2])
        if path.suffix in (".yaml", ".yml") and path.is_file():
            yield _checked(path)


def _checked(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is no text in UTF-8 ({error.reason} at byte {error.start}).") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return text  # the parser says where
    if root is not None and _nodes(root, {}) > MOST_NODES:
        raise ConfigError(f"{str(path)!r}: its aliases stand for more than {MOST_NODES:,} values; write them out.")
    return text


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are once every alias is written out."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # for one that holds itself
        inner: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in inner)
    return known[id(node)]
