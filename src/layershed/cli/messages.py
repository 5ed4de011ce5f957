"""What argument parsers say of wrong usage, in one sentence, with the nearest name that would have been right."""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def hint(message: str, options: Iterable[str]) -> str:
    """The nearest name there is, where a message tells of one that there is not."""
    config = re.search(r"arguments: (\S+\.ya?ml)", message)
    if config:
        return f"; did you mean --config {config[1]}?"
    wrong = re.search(r"(?:option '|arguments: --)([\w.]+)", message, re.IGNORECASE)
    if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        wrong, options = missing, dir(sys.modules[missing[1]])
    name = wrong[wrong.lastindex or 0] if wrong else ""
    near = difflib.get_close_matches(name, options, n=1)
    # an option of another command has itself for its nearest name
    return f"; did you mean {near[0]}?" if near and near[0] != name and "did you mean" not in message else ""


def in_short(message: str, error: BaseException | None) -> str:
    """What jsonargparse tells in nested paragraphs: where it went wrong, and the innermost reason."""
    if message.startswith("Problems parsing config"):
        return one_line(message.replace('"<unicode string>", ', ""))
    chain = [message, *(str(cause) for cause in causes(error))]
    reason = next(text for text in chain if text.startswith(chain[-1]))
    found = [re.match(r"""(?:Parser key "|Problem with given class_path ')([\w.]+)""", text) for text in chain]
    places = dict.fromkeys(match[1] for match in found if match)
    reason = re.sub(
        r"Expected a dot import path string: (.*)",
        r"there is no class \1 among those with short names; give its full path, as bitsandbytes.optim.AdamW8bit",
        reason,
    )
    if reason.startswith("Expected a") and len(chain) > 1:
        # of several types that would do, the reason names only the first
        types = re.findall(r"^\s*- Expected an? (.+)$", chain[-2], re.MULTILINE)
        expected = " or ".join(types) or r"\1"
        reason = re.sub(r"Expected an? (.*?)\. Got value: ", rf"expected {expected}, got ", reason)
        reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason)
        reason = reason.replace("collections.abc.Sequence", "a list in square brackets")
        reason = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", reason).replace("NoneType", "null")
    return one_line(": ".join([*places, reason]))


def one_line(text: str) -> str:
    """The text without line breaks, and not endless."""
    return textwrap.shorten(text, 500, placeholder=" ...")
