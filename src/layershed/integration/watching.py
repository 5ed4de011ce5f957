"""What a watching callback does when something fails during training: it warns once, and leaves it out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from layershed.errors import LayershedError, RevivedSublayerError
from layershed.integration.namespaces import rank_zero_warn
from layershed.integration.warning_place import levels_outside


class Watcher:
    """Keeps the errors of a watching callback away from the run.

    Args:
        name: Name of the callback, for the warnings.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()

    def forget(self) -> None:
        """Warn of everything anew, in another run."""
        self._said.clear()

    def warned_of(self, what: str) -> bool:
        """Whether something was left out or warned of."""
        return what in self._said

    @contextmanager
    def leaving_out(self, what: str) -> Iterator[None]:
        """Turn an error within the context into one warning for each ``what``.

        Args:
            what: What is left out after an error, as the beginning of a sentence.

        Raises:
            RevivedSublayerError: The run itself is no longer what it was meant to be.
        """
        try:
            yield
        except RevivedSublayerError:
            raise
        except Exception as error:
            if what not in self._said:  # on the rank where it failed, be it the first or not
                self._said.add(what)
                kind = "" if isinstance(error, LayershedError) else f"{type(error).__name__}: "
                text = f"{kind}{error}".strip().rstrip(".")
                said = f"{self._name}: {what} left out. {text}. Training goes on."
                warnings.warn(said, stacklevel=levels_outside())

    def warn_once(self, what: str, text: str) -> None:
        """Warn on the first rank, once for each ``what``."""
        if what not in self._said:
            self._said.add(what)
            rank_zero_warn(f"{self._name}{text}")
