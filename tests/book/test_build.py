"""A new chapter from the template goes through the book's own machinery, and faults stop it.

Its folder, configuration and Sphinx extension are the book's; the table of contents has only it.
"""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from companion import notebooks

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
NAME = "19-a-new-chapter"

pytestmark = pytest.mark.slow  # one notebook run and some builds of one page: half a minute


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make.py at work in a folder with one chapter, made from the template as CONTRIBUTING says."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = tmp_path_factory.mktemp("project")
    for name in ("_ext", "book/_assets", "book/figures"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "book/references.bib", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "_toc.yml").write_text(f"format: jb-book\nroot: book/{NAME}\n")
    template = (ROOT / "book" / "templates" / "chapter.ipynb").read_text(encoding="utf-8")
    path = folder / "book" / f"{NAME}.ipynb"
    path.write_text(re.sub(r"(Figure|Exercise) 0\.", r"\1 19.", template), encoding="utf-8")
    make.ROOT, make.BOOK, make.BUILD = folder, folder / "book", folder / "_build"
    make.chapter = path
    return make


def edit(make, old: str, new: str) -> None:
    text = make.chapter.read_text(encoding="utf-8")
    assert text.count(old) == 1
    make.chapter.write_text(text.replace(old, new), encoding="utf-8")


def test_a_chapter_from_the_template_builds(make, capfd):
    notebooks.execute(make.chapter)
    assert make.guard(PYTHON, [make.chapter]) == 0
    status = make.build(PYTHON)
    assert status == 0, capfd.readouterr()
    page = (make.BUILD / "html" / "book" / f"{NAME}.html").read_text(encoding="utf-8")
    assert page.count("<figcaption") == 3
    assert "<details>" in page
    assert 'type="range"' in page
    boxes = re.findall(r'<p [^>]*id="box-\d+">([^<]+)</p>', page)
    assert boxes == [
        "You will be able to", "Predict", "In the paper", "In diffusers", "Often said"
    ]  # fmt: skip
    assert "Traceback" not in page
    assert str(make.ROOT) not in page


def test_a_warning_fails_the_build_each_time(make, capfd):
    """Sphinx takes a page that warned as read: without care the second build would pass."""
    edit(make, "## And something to move", "## And [gone](gone.md)")
    try:
        assert make.build(PYTHON) != 0
        assert make.build(PYTHON) != 0
        assert "gone.md" in "".join(capfd.readouterr())
    finally:
        edit(make, "## And [gone](gone.md)", "## And something to move")
    assert make.build(PYTHON) == 0


def test_a_picture_of_the_machine_that_is_missing_fails_the_build(make):
    edit(make, "machine-whole.svg", "machine-gone.svg")
    try:
        assert make.build(PYTHON) != 0
    finally:
        edit(make, "machine-gone.svg", "machine-whole.svg")


def test_a_stale_or_crashed_cell_stops_before_the_build(make, capfd):
    whole = make.chapter.read_text(encoding="utf-8")
    edit(make, "within=(0.52, 0.525)", "within=(0.52, 0.526)")
    assert make.guard(PYTHON, [make.chapter]) != 0
    assert "outputs are stale" in capfd.readouterr().out

    notebook = json.loads(whole)
    cell = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][2]
    cell["outputs"] = [
        {"output_type": "error", "ename": "AssertionError", "evalue": "no", "traceback": []}
    ]
    make.chapter.write_text(json.dumps(notebook), encoding="utf-8")
    assert make.guard(PYTHON, [make.chapter]) != 0
    assert "code cell 3 ends in AssertionError: no" in capfd.readouterr().out
    make.chapter.write_text(whole, encoding="utf-8")


def test_a_change_of_style_reaches_pages_that_did_not_change(make):
    assert make.build(PYTHON) == 0
    page = make.BUILD / "html" / "book" / f"{NAME}.html"
    before = page.stat().st_mtime_ns
    assert make.build(PYTHON) == 0
    assert page.stat().st_mtime_ns == before
    with (make.ROOT / "book" / "_assets" / "house.css").open("a") as file:
        file.write("\n/* one rule more */\n")
    assert make.build(PYTHON) == 0
    assert page.stat().st_mtime_ns != before
