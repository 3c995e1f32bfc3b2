"""``{companion}`` lists library modules: those that exist are documented, others are left out.

So the page names all rooms of the house from the start, and grows with them.
"""

from __future__ import annotations

import importlib.util

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Modules(SphinxDirective):
    """Each line of the content is a module's name below ``companion``."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Hand an ``automodule`` for each module that exists to the reStructuredText parser."""
        made: list[nodes.Node] = []
        for line in self.content:
            name = f"companion.{line.strip()}"
            if not line.strip() or importlib.util.find_spec(name) is None:
                continue
            section = nodes.section(ids=[f"module-page-{name.replace('.', '-')}"], names=[name])
            section += nodes.title("", "", nodes.literal(name, name))
            text = StringList([f".. automodule:: {name}", "   :members:", ""], source=name)
            self.state.nested_parse(_rst(text), 0, section)
            made.append(section)
        return made


def _rst(text: StringList) -> StringList:
    """The lines inside MyST's door to reStructuredText."""
    lines = ["````{eval-rst}", *text, "````", ""]
    return StringList(lines, source=text.source(0))


def setup(app: Sphinx) -> None:
    """Register."""
    app.add_directive("companion", Modules)
