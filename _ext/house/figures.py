"""A picture and the caption paragraph under it become one figure.

In a notebook, a code cell shows a picture (or a control) and the next Markdown cell starts with
the paragraph ``*Figure 2.1. What to see.*``, wholly in emphasis. A picture in Markdown works in
the same way. The page gets ``<figure id="figure-2-1">`` with a ``<figcaption>``, and
``[figure 2.1](#figure-2-1)`` links to it.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

from .drawing import machine_drawing

LABEL = re.compile(r"\s*(Figure ([0-9A-Z]+)\.([0-9]+))\.\s*")
PICTURES = (nodes.image, machine_drawing)
LOGGER = logging.getLogger(__name__)


class Figures(SphinxTransform):
    """Join each caption paragraph with the picture above it."""

    default_priority = 510  # after the drawing is in place, before links are resolved (879)

    def apply(self, **kwargs: object) -> None:
        """Walk all caption paragraphs."""
        for paragraph in list(self.document.findall(nodes.paragraph)):
            if (match := _caption(paragraph)) is None:
                continue
            picture = _picture_above(paragraph)
            if picture is None:
                LOGGER.warning(
                    "the caption of %s has no picture or control directly above it",
                    match[1],
                    location=paragraph,
                )
                continue
            emphasis = next(c for c in paragraph.children if isinstance(c, nodes.emphasis))
            rest = emphasis[0].astext()[match.end() :]
            caption = nodes.caption(
                "", "", nodes.strong("", match[1] + "."), nodes.Text(" " + rest)
            )
            caption += emphasis.children[1:]
            caption.source, caption.line = paragraph.source, paragraph.line
            figure = nodes.figure(names=[f"figure-{match[2].lower()}-{match[3]}"])
            figure.source, figure.line = paragraph.source, paragraph.line
            picture.replace_self(figure)
            figure += [picture, caption]
            self.document.note_explicit_target(figure, figure)
            # where MyST looks up links from other pages: name -> (line, id, title)
            slugs = self.env.metadata[self.env.docname].setdefault("myst_slugs", {})
            slugs[figure["ids"][0]] = (figure.line, figure["ids"][0], match[1])
            paragraph.parent.remove(paragraph)


class Sizes(SphinxTransform):
    """Give a plot the size that it was drawn for: a PNG that says 160 dots an inch is shown so."""

    default_priority = 505

    def apply(self, **kwargs: object) -> None:
        """Walk the pictures that cells show."""
        for image in self.document.findall(nodes.image):
            width = png_width(Path(self.env.srcdir) / image["uri"].lstrip("/"))
            if width and "width" not in image:
                image["width"] = f"{width:.0f}px"


def png_width(path: Path) -> float | None:
    """The width of a PNG in CSS pixels (96 to the inch), if it says how many dots it has."""
    if path.suffix != ".png" or not path.is_file():
        return None
    data = path.read_bytes()[:4096]
    at = data.find(b"pHYs")
    if at < 0 or data[at + 12] != 1:
        return None
    (pixels,) = struct.unpack(">I", data[16:20])
    (per_metre,) = struct.unpack(">I", data[at + 4 : at + 8])
    return 96 * pixels / (per_metre * 0.0254)


def _caption(paragraph: nodes.paragraph) -> re.Match[str] | None:
    """The match of "Figure n.m." if the paragraph is a caption, else None."""
    parts = [c for c in paragraph.children if not (isinstance(c, nodes.Text) and not c.strip())]
    if len(parts) != 1 or not isinstance(parts[0], nodes.emphasis):
        return None
    first = parts[0].children[0] if parts[0].children else None
    return LABEL.match(first.astext()) if isinstance(first, nodes.Text) else None


def _picture_above(paragraph: nodes.paragraph) -> nodes.Element | None:
    """The element to wrap: a code cell's last picture or control, or a picture in the text."""
    index = paragraph.parent.index(paragraph)
    above = paragraph.parent[index - 1] if index else None
    if isinstance(above, nodes.paragraph) and len(above.children) == 1:
        return above if isinstance(above[0], PICTURES) else None
    if isinstance(above, machine_drawing):
        return above
    if not (isinstance(above, nodes.container) and above.get("nb_element") == "cell_code"):
        return None
    shown = [
        bundle
        for bundle in above.findall(nodes.container)
        if bundle.get("nb_element") == "mime_bundle" and _shows_something(bundle)
    ]
    loose = [
        image
        for image in above.findall(nodes.image)
        if not any(bundle in _ancestors(image) for bundle in shown)
    ]
    found = shown + loose
    return found[-1] if found else None


def _shows_something(bundle: nodes.container) -> bool:
    if any(True for _ in bundle.findall(nodes.image)):
        return True
    html = (raw for raw in bundle.findall(nodes.raw) if raw.get("format") == "html")
    return any("<img" in raw.astext() or "<svg" in raw.astext() for raw in html)


def _ancestors(node: nodes.Node) -> list[nodes.Node]:
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def setup(app: Sphinx) -> None:
    """Register."""
    app.add_transform(Sizes)
    app.add_transform(Figures)
