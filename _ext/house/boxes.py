"""Block quotes with a known bold lead become boxes, so a notebook stays plain Markdown.

``> **In the paper.** The schedule is linear …`` turns into a box with the title "In the paper".
Any other block quote stays as it is. A heading "Exercise 2.1 …" opens a section with the class
``exercise``.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

LEADS = {
    "You will be able to": "goals",
    "In the paper": "paper",
    "In diffusers": "diffusers",
    "Predict": "predict",
    "Often said": "said",
    "Try it": "try",
}
LEAD = re.compile(rf"({'|'.join(LEADS)})\b(.*?)[.:?]?", re.DOTALL)
EXERCISE = re.compile(r"Exercise \d+\.\d+\b")


class box(nodes.General, nodes.Element):
    """A box: ``kind`` (its class), ``ids`` of its title; children are a title and a body."""


class box_title(nodes.General, nodes.TextElement):
    """The box's title."""


class Boxes(SphinxTransform):
    """Turn block quotes with a known lead into boxes."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        """Walk all block quotes."""
        count = 0
        for quote in list(self.document.findall(nodes.block_quote)):
            if (found := _lead(quote)) is None:
                continue
            kind, title = found
            paragraph = quote[0]
            paragraph.remove(_written(paragraph)[0])
            if (rest := _written(paragraph)) and isinstance(rest[0], nodes.Text):
                paragraph.replace(rest[0], nodes.Text(rest[0].astext().lstrip()))
            count += 1
            made = box(kind=kind, title_id=f"box-{count}")
            made += box_title(title, title)
            made += [child for child in quote if child is not paragraph or _written(paragraph)]
            quote.replace_self(made)


def _lead(quote: nodes.block_quote) -> tuple[str, str] | None:
    """The box's kind and title, or None if this is an ordinary block quote."""
    if not quote.children or not isinstance(quote[0], nodes.paragraph):
        return None
    first = next(iter(_written(quote[0])), None)
    match = LEAD.fullmatch(first.astext().strip()) if isinstance(first, nodes.strong) else None
    if match is None:
        return None
    return LEADS[match[1]], match[1] + match[2]


def _written(paragraph: nodes.paragraph) -> list[nodes.Node]:
    """The children that are not empty text (the parser may put some at the beginning)."""
    return [c for c in paragraph if not (isinstance(c, nodes.Text) and not c.strip())]


class Exercises(SphinxTransform):
    """Give sections that are exercises their class."""

    default_priority = 501

    def apply(self, **kwargs: object) -> None:
        """Walk all sections."""
        for section in self.document.findall(nodes.section):
            if isinstance(section[0], nodes.title) and EXERCISE.match(section[0].astext()):
                section["classes"].append("exercise")


def _visit_box(self: nodes.NodeVisitor, node: box) -> None:
    kind, title = node["kind"], node["title_id"]
    self.body.append(
        f'<div class="callout callout-{kind}" role="note" aria-labelledby="{title}">\n'
    )


def _depart_box(self: nodes.NodeVisitor, node: box) -> None:
    self.body.append("</div>\n")


def _visit_title(self: nodes.NodeVisitor, node: box_title) -> None:
    self.body.append(f'<p class="callout-title" id="{node.parent["title_id"]}">')


def _depart_title(self: nodes.NodeVisitor, node: box_title) -> None:
    self.body.append("</p>\n")


def setup(app: Sphinx) -> None:
    """Register."""
    app.add_node(box, html=(_visit_box, _depart_box))
    app.add_node(box_title, html=(_visit_title, _depart_title))
    app.add_transform(Boxes)
    app.add_transform(Exercises)
