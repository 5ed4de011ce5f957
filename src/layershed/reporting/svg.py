"""A matplotlib figure as SVG that is part of an HTML page: it follows the page's colours and type."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

from layershed.reporting.plot_style import ADAPTIVE, HOVER

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_MARKS = {f"{{{_SVG}}}path", f"{{{_SVG}}}use", f"{{{_SVG}}}rect"}
_COORDINATES = {"d", "x", "y", "width", "height", "transform"}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def inline_svg(figure: Figure, name: str) -> str:
    """Convert a figure to an ``<svg>`` element.

    - The colours of ``ADAPTIVE`` become the page's CSS variables of those names.
    - Text stays text, in the page's own type.
    - The titles of :func:`~layershed.reporting.plot_style.with_titles` are shown by a browser on hovering.

    Args:
        figure: The figure.
        name: A name that no other picture of the page has; all ids begin with it.

    Returns:
        The element, the same for the same figure and name.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    for prefix, address in (("", _SVG), ("xlink", _XLINK)):
        ElementTree.register_namespace(prefix, address)
    root = ElementTree.fromstring(buffer.getvalue())
    for number, titles in enumerate(getattr(figure, "layershed_titles", [])):
        _set_titles(root, f"{HOVER}-{number}", titles)
    _shorten(root)
    _drop(root, "metadata")
    _drop(root, "style")  # it would style the whole page
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("aria-hidden", "true")  # the alternative text is beside it
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(ADAPTIVE), lambda found: f"var(--{ADAPTIVE[found[0]]})", text)
    return re.sub(r">\s+<", "><", text)


def _set_titles(root: ElementTree.Element, gid: str, titles: list[str]) -> None:
    group = next((each for each in root.iter() if each.get("id") == gid), None)
    for mark, title in zip(_marks(group) if group is not None else (), titles, strict=False):
        ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = title


def _marks(group: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """What is drawn, in order; definitions are not."""
    for child in group:
        if child.tag in _MARKS:
            yield child
        elif not child.tag.endswith("}defs"):
            yield from _marks(child)


def _drop(root: ElementTree.Element, tag: str) -> None:
    for parent in list(root.iter()):
        for child in [each for each in parent if each.tag.endswith(f"}}{tag}")]:
            parent.remove(child)


def _shorten(root: ElementTree.Element) -> None:
    """Coordinates to a hundredth of a point; texts stay as they are."""
    for each in root.iter():
        for name in _COORDINATES & set(each.attrib):
            each.set(name, re.sub(r"(\d+\.\d\d)\d+", r"\1", each.attrib[name]))
