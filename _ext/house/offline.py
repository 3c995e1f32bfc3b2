"""Pages load nothing from elsewhere, over http and from the file system.

* MathJax comes from the Python package ``sphinx-mathjax-offline`` (no Node): the one combined
  script, its fonts and the TeX extensions that it may load later; not its 11 MB of alternatives.
* Jupyter Book adds sphinx-thebe, which announces a script on a public CDN (and announces it
  twice, a ``SyntaxError`` on every page). Thebe needs a remote kernel, so it is dropped.
* The book's style, fonts and script come from ``book/_assets``. They must not lie in a root
  ``_static`` folder: Jupyter Book adds every script and style sheet found there to each page.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError

MATHJAX = "mathjax"
MATHJAX_PARTS = (
    "tex-chtml.js",
    "output/chtml/fonts/woff-v2",
    "input/tex/extensions",
    "a11y/assistive-mml.js",
)


def mathjax_folder() -> Path:
    """The folder of MathJax 3 inside the installed package (its module name has hyphens)."""
    try:
        files = metadata.files("sphinx-mathjax-offline") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "tex-chtml.js":
            return Path(str(file.locate())).parent
    raise ExtensionError(
        "MathJax was not found, so equations could not be set without a network. "
        "Install the book's tools: pip install sphinx-mathjax-offline"
    )


def use_local_files(app: Sphinx, config: Config) -> None:
    """Point Sphinx at the local MathJax and at the book's own assets."""
    config.mathjax_path = f"{MATHJAX}/tex-chtml.js"
    config.numfig = False  # a figure's caption carries its number
    assets = Path(app.srcdir) / config.house_assets
    if assets.is_dir():
        config.html_static_path.append(str(assets))
        app.add_css_file("house.css", priority=900)
        app.add_js_file("house.js", priority=900, defer="defer")


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy the parts of MathJax that the pages may ask for; keep those that are there already."""
    if exception is not None or app.builder.format != "html":
        return
    source, target = mathjax_folder(), Path(app.outdir) / "_static" / MATHJAX
    for name in MATHJAX_PARTS:
        part = source / name
        for file in [part] if part.is_file() else sorted(part.rglob("*")):
            copy = target / file.relative_to(source)
            if file.is_file() and not (
                copy.exists() and copy.stat().st_size == file.stat().st_size
            ):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def _mentions_thebe(asset: Any) -> bool:
    text = str(getattr(asset, "filename", None) or asset)
    attributes = getattr(asset, "attributes", None) or {}
    return "thebe" in text.lower() or "thebe" in str(attributes.get("body", "")).lower()


def drop_thebe_files(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Take thebe's scripts and styles off the page."""
    for key in ("script_files", "css_files"):
        if key in context:
            context[key] = [asset for asset in context[key] if not _mentions_thebe(asset)]


def drop_thebe_nodes(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Take thebe's settings, which it writes into every page, out again."""
    for node in list(doctree.findall(nodes.raw)):
        if "text/x-thebe-config" in node.astext():
            node.parent.remove(node)


def setup(app: Sphinx) -> None:
    """Register."""
    app.add_config_value("house_assets", "book/_assets", "html")
    app.connect("config-inited", use_local_files, priority=900)
    app.connect("doctree-resolved", drop_thebe_nodes, priority=900)
    app.connect("html-page-context", drop_thebe_files, priority=900)
    app.connect("build-finished", copy_mathjax)
