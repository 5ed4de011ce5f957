"""The optional packages: which extra brings them, and the error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from layershed.errors import MissingExtraError

EXTRAS = {
    "data": ("datasets", "torchdata", "jinja2"),
    "report": ("matplotlib", "jinja2", "rich"),
    "quantization": ("bitsandbytes",),
    "eval": ("lm_eval", "datasets"),
    "cli": ("jsonargparse", "docstring_parser", "typeshed_client", "tensorboard"),
}
"""By extra of pyproject.toml, the packages that it brings; ``cli`` brings those of ``data`` and ``report``, too."""


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Within the context, the failed import of an optional package is an error that names its extra.

    Args:
        extra: The extra that brings every optional package that is imported within the context.
        what: What needs them, for the error.

    Raises:
        MissingExtraError: If such a package is missing. Any other failed import stays what it is.
    """
    optional = {package for packages in EXTRAS.values() for package in packages}
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in optional:
            raise
        raise MissingExtraError(what, package, extra) from error
