"""Shortens an argument parser's error to one sentence and suggests the nearest known name."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Iterator

# The key or the class in which something is wrong. jsonargparse puts it only into its text.
_PLACE = re.compile(r"""(?:Parser key "|Problem with given class_path ')([\w.]+)""")
# A name that jsonargparse does not know: an option or a class. It, too, is only in the text.
_TAKES = "; it takes "
_UNKNOWN = re.compile(r"(?:[Oo]ption '|unrecognized arguments: (?:--)?|dot import path string: )([^\s=']+)")


def options_of(reason: str, options: Iterable[str]) -> str:
    """The end of a sentence that lists the options of a class, if the text refuses another one and suggests none."""
    return "" if "is not accepted" not in reason or advises(reason) else f"{_TAKES}{', '.join(options)}"


def advises(reason: str) -> bool:
    """Whether a text already says what to write instead."""
    return "did you mean" in reason or _TAKES in reason


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and, in order, the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__


def hint(reason: str, error: BaseException | None, known: Iterable[str]) -> str:
    """Suggest what to write instead of an unknown name.

    Args:
        reason: Text that names an option or a class.
        error: The parser's error.
        known: Names of options and classes.

    Returns:
        The end of a sentence; empty if the text names nothing unknown, or already suggests a name.
    """
    *_, root = causes(error) if error is not None else [None]
    found = _UNKNOWN.search(reason)
    name = found[1] if found else ""
    if isinstance(root, AttributeError) and root.name:  # a module that has no such class
        name, known = root.name, dir(root.obj)
    if not name or advises(reason):
        return ""
    if name.endswith((".yaml", ".yml")):
        return f"; did you mean --config {name}?"
    near = difflib.get_close_matches(name, known, n=1)
    if near and near[0] != name:  # an option of another command is nearest to itself
        return f"; did you mean {near[0]}?"
    return "; give the full path of a class, such as bitsandbytes.optim.AdamW8bit" if "import path" in reason else ""


def in_short(message: str, error: BaseException | None) -> str:
    """Place and innermost reason of jsonargparse's error, such as ``trainer.max_steps: Expected a <class 'int'>...``.

    Args:
        message: The outermost text.
        error: The parser's error, with its causes.
    """
    if message.startswith("Problems parsing config"):
        return one_line(message.replace('"<unicode string>", ', ""))  # its last line says where
    chain = [message, *map(str, causes(error))]
    places = dict.fromkeys(found[1] for found in map(_PLACE.match, chain) if found)
    reason = next(text for text in chain if text.startswith(chain[-1])).strip()  # a cause may add a suggestion
    lines = reason.splitlines()[:1]
    if len(chain) > 1 and chain[-2].startswith("Does not validate against any") and "Got value" in reason:
        union = chain[-2].splitlines()
        # all accepted types, and the value: the reason names only the first type
        lines = [union[1].replace("Subtypes", "Expected one of"), union[-1]]
    return one_line(": ".join([*places, "; ".join(lines).removesuffix(".")]))


def one_line(text: str) -> str:
    """The text on one line, at most 500 characters long."""
    return textwrap.shorten(text, 500, placeholder=" ...")
