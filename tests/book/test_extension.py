"""The Sphinx extension in ``_ext/house``, on a small book of its own.

Sphinx runs in a process of its own, as in a real build. One book must build without a warning and
shows what each transform does and what it leaves alone; another one is wrong and must fail.
"""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]

CONF = """
extensions = ["myst_nb", "sphinx_thebe", "house"]
nb_execution_mode = "off"
nb_mime_priority_overrides = [["html", "text/html", 5]]
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath"]
html_theme = "basic"
thebe_config = {}
house_assets = "assets"
nitpicky = True
"""

INDEX = """# Book

```{toctree}
page
notebook
```

Across pages: [that figure](notebook.ipynb#figure-1-1).
"""

PAGE = """# A page

> **In the paper.** The *schedule* is linear.
>
> A second paragraph.

> **In diffusers.** `x`

> **Predict.** What?

> **Often said.** That.

> **Try it.**

> **You will be able to.**
>
> - do this

> **In the paper, section 4.** More.

> **In the paperwork.** An ordinary quotation.

> Not first: **In the paper.** An ordinary quotation.

> Quoted without a lead.

Text with **In the paper.** in it, $x$.

![What is lit.](figures/machine-noise.svg)

*Figure 0.1. The drawing with $x$ in its caption.*

![Again, & other words.](figures/machine-noise.svg)

![A plain drawing.](figures/other.svg)

*Figure 0.2. A plain picture.*

*Figure 0.3 is only mentioned.* And more text.

*Wholly in emphasis.*

See [figure 0.1](#figure-0-1).

## Exercises

### Exercise 1.1: a title

Do it.

<details><summary>Solution</summary>

Done with $x$.

</details>

### Exercised
"""


def png(dots_an_inch: int | None, width: int = 320) -> bytes:
    """A grey PNG, with or without its resolution."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress((b"\0" + b"\x80" * width) * 10)
    density = round(dots_an_inch / 0.0254) if dots_an_inch else 0
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 10, 8, 0, 0, 0, 0))
        + (chunk(b"pHYs", struct.pack(">IIB", density, density, 1)) if dots_an_inch else b"")
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def picture(data: bytes) -> dict:
    import base64

    return {"image/png": base64.b64encode(data).decode(), "text/plain": "<Figure>"}


def notebook(*cells: str | tuple[dict, dict]) -> nbformat.NotebookNode:
    """A notebook of Markdown (text) and executed code cells (their output, their metadata)."""
    v4 = nbformat.v4
    made = []
    for i, cell in enumerate(cells):
        if isinstance(cell, str):
            made.append(v4.new_markdown_cell(cell, id=f"cell-{i}"))
            continue
        data, metadata = cell
        outputs = [v4.new_output("display_data", data=data)] if data else []
        made.append(v4.new_code_cell("1", outputs=outputs, execution_count=1, id=f"cell-{i}"))
        made[-1].metadata.update(metadata)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=made, metadata={"kernelspec": kernel})


ALT = {"mystnb": {"image": {"alt": "a grey field"}}}
WIDGET = {
    "application/vnd.jupyter.widget-view+json": {"model_id": "0", "version_major": 2},
    "text/html": '<div class="scrub"><img src="data:," alt="twin"></div>',
    "text/plain": "Scrub()",
}
NOTEBOOK = notebook(
    "# A notebook\n\nText.",
    (picture(png(160)), ALT),
    "*Figure 1.1. What to see.*\n\nMore text.",
    (picture(png(None)), ALT),
    "No caption here.",
    (WIDGET, {}),
    "*Figure 1.2. A control.*\n\n> **Predict.** In a notebook too.",
    ({"text/markdown": "| a | b |\n| --- | ---: |\n| $x$ | 2 |", "text/plain": "a b"}, {}),
)


def build(folder: Path, pages: dict[str, str]) -> subprocess.CompletedProcess:
    """A book of these files, built by Sphinx; warnings fail."""
    (folder / "figures").mkdir(parents=True)
    (folder / "assets").mkdir()
    drawing = (ROOT / "book/figures/machine-noise.svg").read_text("utf8")
    (folder / "figures/machine-noise.svg").write_text(drawing, "utf8")
    (folder / "figures/other.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>', "utf8"
    )
    (folder / "assets/house.css").write_text("p {}", "utf8")
    (folder / "assets/house.js").write_text("", "utf8")
    for name, text in pages.items():
        (folder / name).write_text(text, "utf8")
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", folder,
         folder / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "_ext"), "PYTHONUTF8": "1"},
        capture_output=True, text=True, encoding="utf8",
    )  # fmt: skip


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("book")
    pages = {"conf.py": CONF, "index.md": INDEX, "page.md": PAGE}
    done = build(folder, pages | {"notebook.ipynb": nbformat.writes(NOTEBOOK)})
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def page(book) -> BeautifulSoup:
    return BeautifulSoup((book / "page.html").read_text("utf8"), "html.parser")


@pytest.fixture(scope="module")
def shown(book) -> BeautifulSoup:
    return BeautifulSoup((book / "notebook.html").read_text("utf8"), "html.parser")


# ---- boxes ------------------------------------------------------------------------------------


def test_known_leads_become_boxes_with_a_title_and_the_rest(page):
    boxes = page.select("div.callout")
    assert [box["class"][1].removeprefix("callout-") for box in boxes] == [
        "paper", "diffusers", "predict", "said", "try", "goals", "paper",
    ]  # fmt: skip
    titles = [box.select_one("p.callout-title") for box in boxes]
    assert [title.text for title in titles] == [
        "In the paper", "In diffusers", "Predict", "Often said", "Try it", "You will be able to",
        "In the paper, section 4",
    ]  # fmt: skip
    first = [p.text for p in boxes[0].select("p")[1:]]
    assert first == ["The schedule is linear.", "A second paragraph."]
    assert boxes[0].select_one("em").text == "schedule"
    assert len(boxes[4].select("p")) == 1  # a lead alone leaves no empty paragraph
    assert boxes[5].select_one("li").text.strip() == "do this"


def test_boxes_are_announced(page):
    ids = [element["id"] for element in page.select("[id]")]
    assert len(ids) == len(set(ids))
    for box in page.select("div.callout"):
        assert box["role"] == "note"
        assert page.find(id=box["aria-labelledby"]) is box.select_one("p.callout-title")


def test_other_quotations_stay(page):
    quotes = [quote.text.strip() for quote in page.select("blockquote")]
    assert quotes == [
        "In the paperwork. An ordinary quotation.",
        "Not first: In the paper. An ordinary quotation.",
        "Quoted without a lead.",
    ]


def test_boxes_work_in_notebooks(shown):
    assert shown.select_one("div.callout-predict p:nth-of-type(2)").text == "In a notebook too."


# ---- exercises and solutions ------------------------------------------------------------------


def test_only_exercises_get_the_class(page):
    (exercise,) = page.select("section.exercise")
    assert exercise.select_one("h3").text.startswith("Exercise 1.1")


def test_a_solution_stays_folded_and_whole(page):
    (solution,) = page.select("section.exercise details")
    assert solution.select_one("summary").text == "Solution"
    assert "Done with" in solution.text and not solution.has_attr("open")


# ---- figures ----------------------------------------------------------------------------------


def test_a_cell_s_picture_and_the_paragraph_below_become_a_figure(shown):
    figure = shown.find(id="figure-1-1")
    assert figure.name == "figure"
    assert figure.select_one("img")["alt"] == "a grey field"
    caption = figure.select_one("figcaption").text.strip()
    assert caption.startswith("Figure 1.1. What to see.")
    assert figure.select_one("figcaption strong").text == "Figure 1.1."
    assert not figure.select("figcaption em")
    assert "More text." in shown.text and "More text." not in figure.text
    assert shown.text.count("What to see.") == 1


def test_a_control_becomes_a_figure_and_its_twin_is_shown(shown):
    figure = shown.find(id="figure-1-2")
    assert figure.select_one("div.scrub img")["alt"] == "twin"
    assert "widget-view" not in str(shown)


def test_a_picture_without_caption_is_no_figure(shown):
    images = [image for image in shown.select("img") if image.get("alt") == "a grey field"]
    assert [image.find_parent("figure") is not None for image in images] == [True, False]


def test_a_plot_has_the_size_that_it_was_drawn_for(shown):
    images = [image for image in shown.select("img") if image.get("alt") == "a grey field"]
    assert images[0]["style"] == "width: 192px;"  # 320 dots, 160 to the inch, 96 to the CSS inch
    assert not images[1].has_attr("style")


def test_pictures_in_the_text_become_figures_too(page):
    assert page.find(id="figure-0-1").select_one("svg.machine")
    assert page.find(id="figure-0-1").select_one("figcaption .math")
    assert page.find(id="figure-0-2").select_one("img")["alt"] == "A plain drawing."


def test_other_emphasis_stays(page):
    assert page.find(id="figure-0-3") is None
    paragraphs = [p.text for p in page.select("p") if p.find_parent("figure") is None]
    assert "Figure 0.3 is only mentioned. And more text." in paragraphs
    assert "Wholly in emphasis." in paragraphs


def test_figures_can_be_linked_on_the_page_and_across(book, page):
    assert page.find("a", string="figure 0.1")["href"] == "#figure-0-1"
    index = BeautifulSoup((book / "index.html").read_text("utf8"), "html.parser")
    assert index.find("a", string="that figure")["href"] == "notebook.html#figure-1-1"


def test_a_shown_table_is_a_table(shown):
    (table,) = shown.select("table")
    assert table.select_one("td .math") and len(table.select("td")) == 2


# ---- the drawing ------------------------------------------------------------------------------


def test_the_machine_is_inlined_with_names_of_its_own(page):
    first, second = page.select("div.machine-frame svg")
    for svg, description in ((first, "What is lit."), (second, "Again, & other words.")):
        assert svg["role"] == "img"
        title, text = (page.find(id=name) for name in svg["aria-labelledby"].split())
        assert title.name == "title" and title.text.startswith("The machine")
        assert text.text == description and title.find_parent("svg") is svg
    assert first["aria-labelledby"] != second["aria-labelledby"]


def test_other_drawings_stay_pictures(page):
    assert page.select_one('img[src$="other.svg"]')


# ---- offline ----------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere(book):
    for file in book.rglob("*.html"):
        soup = BeautifulSoup(file.read_text("utf8"), "html.parser")
        for element in soup.select("script[src], link[href], img[src], iframe[src]"):
            address = element.get("src") or element.get("href")
            assert "//" not in address, (file.name, address)
            if element.name == "script":
                assert (file.parent / address.split("?")[0]).is_file(), address


def test_equations_come_from_the_page_s_own_folder(book, page):
    (script,) = [s for s in page.select("script[src]") if "mathjax" in s["src"]]
    assert script["src"].startswith("_static/mathjax/tex-chtml.js")
    fonts = list((book / "_static/mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))
    assert len(fonts) > 20


def test_thebe_is_gone_and_the_book_s_style_is_there(book, page):
    text = str(page)
    assert "thebe" not in text.lower() and "unpkg" not in text
    assert "_static/house.css" in text and (book / "_static/house.css").is_file()


# ---- a wrong book -----------------------------------------------------------------------------


def test_a_caption_without_picture_or_a_missing_drawing_fails_the_build(tmp_path):
    wrong = "# Wrong\n\nText.\n\n*Figure 9.9. Of nothing.*\n\n![Lit](figures/machine-none.svg)\n"
    done = build(tmp_path / "wrong", {"conf.py": CONF, "index.md": wrong})
    assert done.returncode != 0
    assert "caption of Figure 9.9 has no picture" in done.stderr
    assert "figures/machine-none.svg does not exist" in done.stderr
