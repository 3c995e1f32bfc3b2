"""The machine drawing becomes part of the page, so that it follows light and dark.

``![What is lit](figures/machine-noise.svg)`` is an ordinary picture everywhere else. Here the
file is read and put into the page: its colours are CSS variables with the drawing's own colours
as defaults. The alternative text of the Markdown becomes the drawing's description.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

DRAWING = re.compile(r"(?:.*/)?machine-[a-z0-9-]+\.svg")
LOGGER = logging.getLogger(__name__)


class machine_drawing(nodes.General, nodes.Element):
    """An inlined drawing: ``svg`` (its text) and ``label`` (its name for screen readers)."""


class Drawings(SphinxTransform):
    """Replace pictures of the machine by their SVG."""

    default_priority = 490

    def apply(self, **kwargs: object) -> None:
        """Walk all pictures."""
        count = 0
        for image in list(self.document.findall(nodes.image)):
            if not DRAWING.fullmatch(image["uri"]):
                continue
            path = Path(self.env.doc2path(self.env.docname)).parent / image["uri"]
            if not path.is_file():
                LOGGER.warning("the drawing %s does not exist", image["uri"], location=image)
                continue
            self.env.note_dependency(str(path))
            count += 1
            svg = inline(path.read_text("utf8"), prefix=f"drawing-{count}", alt=image.get("alt"))
            made = machine_drawing(svg=svg, label=_title(svg))
            alone = isinstance(image.parent, nodes.paragraph) and len(image.parent.children) == 1
            (image.parent if alone else image).replace_self(made)


def inline(svg: str, prefix: str, alt: str | None) -> str:
    """The SVG for use inside a page.

    Args:
        svg: the file's text; its ``<title>`` and ``<desc>`` have the ids "title" and "desc".
        prefix: put before every id, so that several drawings may stand on one page.
        alt: replaces the description, if given.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(?<= id=")(?=[^"]+")', f"{prefix}-", svg)
    svg = re.sub(r"(?<=url\(#)", f"{prefix}-", svg)
    svg = re.sub(r'(?<=href="#)', f"{prefix}-", svg)
    svg = svg.replace(
        'aria-labelledby="title desc"', f'aria-labelledby="{prefix}-title {prefix}-desc"'
    )
    if alt:
        svg = re.sub(
            r"(<desc[^>]*>).*?(</desc>)",
            lambda match: match[1] + escape(alt, quote=False) + match[2],
            svg,
            flags=re.DOTALL,
        )
    return svg.strip()


def _title(svg: str) -> str:
    match = re.search(r"<title[^>]*>(.*?)</title>", svg, flags=re.DOTALL)
    return match[1].strip() if match else "The whole machine"


def _visit(self: nodes.NodeVisitor, node: machine_drawing) -> None:
    # The wrapper scrolls sideways on a narrow screen, so it must be reachable by keyboard.
    self.body.append(
        f'<div class="machine-frame" tabindex="0" role="region" aria-label="{node["label"]}">\n'
        f"{node['svg']}\n</div>\n"
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register."""
    app.add_node(machine_drawing, html=(_visit, None))
    app.add_transform(Drawings)
