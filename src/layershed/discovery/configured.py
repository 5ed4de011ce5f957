"""Fields of a model's configs, set for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from layershed.spellings import PreTrainedConfig


def configs_of(transformer: nn.Module) -> list[PreTrainedConfig]:
    """The configs of a model and of its parts, each once."""
    found: dict[int, PreTrainedConfig] = {}
    for module in transformer.modules():
        found |= {id(config): config for config in _configs_in(module.__dict__.get("config"))}
    return list(found.values())


@contextmanager
def configured(configs: Iterable[object], wanted: Mapping[str, object]) -> Iterator[None]:
    """Within the context, configs have these values where they hold others.

    Args:
        configs: The configs.
        wanted: Values by field. A field that a config lacks, or that is None there, stays as it is.
    """
    before = [
        (vars(config), name, vars(config)[name])
        for config in configs
        for name, value in wanted.items()
        if vars(config).get(name, value) not in (value, None)
    ]
    try:
        for fields, name, _ in before:
            fields[name] = wanted[name]
        yield
    finally:
        for fields, name, value in before:
            fields[name] = value


def _configs_in(config: object) -> Iterator[PreTrainedConfig]:
    if isinstance(config, PreTrainedConfig):
        yield config
        for value in vars(config).values():
            yield from _configs_in(value)
