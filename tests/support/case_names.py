"""Names of parametrized cases, as a log shows them: `count=9` and not `arguments4`."""

from collections.abc import Mapping
from typing import Any

_LONGEST = 100  # characters; a longer case needs an id of its own


def case_name(value: Any, argument: str) -> str | None:
    """The name of a parameter in a test's id, or None for pytest's own.

    Args:
        value: The parameter. Mappings, sequences and dtypes are written out.
        argument: Its name, which an empty value needs: ``no cuts``.
    """
    if not isinstance(value, Mapping | tuple | list | set | frozenset) and not _is_dtype(value):
        return None
    name = _written(value) or f"no {argument}"
    return name if len(name) <= _LONGEST else None


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_written(inner)}" for key, inner in value.items())
    if isinstance(value, tuple | list):
        return "+".join(map(_written, value))
    if isinstance(value, set | frozenset):
        return "+".join(sorted(map(_written, value)))
    if _is_dtype(value):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, str | int | float):
        return str(value)
    return getattr(value, "__name__", type(value).__name__)


def _is_dtype(value: Any) -> bool:
    """Without importing torch, which the process that hands out the tests does not need."""
    return f"{type(value).__module__}.{type(value).__name__}" == "torch.dtype"
