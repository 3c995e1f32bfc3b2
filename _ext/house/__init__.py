"""What the book adds to its Sphinx theme.

``offline``  every file a page needs lies beside it: no request leaves the reader's machine.
``boxes``    block quotes such as "**In the paper.** …" become boxes; exercises get their style.
``figures``  picture + caption paragraph become one ``<figure>`` that can be linked.
``drawing``  the machine drawing is put into the page, so that it follows light and dark.
``api``      the page of library modules lists those that exist.
"""

from __future__ import annotations

from sphinx.application import Sphinx

from . import api, boxes, drawing, figures, offline


def setup(app: Sphinx) -> dict[str, object]:
    """Register the four parts."""
    for part in (offline, drawing, boxes, figures, api):
        part.setup(app)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
