"""The guard on notebooks: every rule refuses its planted fault and nothing else."""

import base64
import copy
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from companion import notebooks

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
TEMPLATE = ROOT / "book" / "templates" / "chapter.ipynb"

# A chapter small enough to run in seconds that has one of everything. The control stands in for
# companion.widgets.Scrub: a widget for a kernel, and a twin in HTML with pictures in it.
MARKDOWN = """\
# A chapter

After [DDPM, eq. 4](https://arxiv.org/abs/2006.11239), with $x_{t}$ and `{a}` and `{b}` in code.

```python
:::{note}
```

<details><summary>Solution</summary>

It is *four*.

</details>"""
FIGURE = """\
import matplotlib.pyplot as plt

_ = plt.figure(figsize=(2, 1)).gca().plot([0, 1, 0.5])
plt.show()"""
CAPTION = "*Figure 2.1. A line goes up and comes down again.*\n\nMore prose."
CONTROL = """\
import base64, io, uuid
import numpy as np
from PIL import Image

class Control:
    def _repr_mimebundle_(self, **_):
        file = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "png")
        uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return {
            "text/plain": repr(self),
            "application/vnd.jupyter.widget-view+json": {"model_id": uuid.uuid4().hex},
            "text/html": f'<input type="range"><img alt="Static." src="{uri}">',
        }

Control()"""


def chapter() -> nbformat.NotebookNode:
    cells = [
        new_markdown_cell(MARKDOWN),
        new_code_cell(notebooks.FIRST_CELL),
        new_code_cell("2 + 2"),
        new_code_cell(FIGURE, metadata={"mystnb": {"image": {"alt": "A line."}}}),
        new_markdown_cell(CAPTION),
        new_code_cell(CONTROL),
        new_code_cell("object()"),
    ]
    return new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "nowhere", "display_name": "Mine"}}
    )


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """A folder with one chapter, run by the code under test, and its bibliography."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "references.bib").write_text("@article{ho2020, eprint = {2006.11239}}\n")
    path = folder / "02-a-chapter.ipynb"
    nbformat.write(chapter(), path)
    assert notebooks.execute(path)
    return path


@pytest.fixture
def plant(book, tmp_path):
    """Write a changed copy of the good chapter; return what the guard says of it."""

    def planted(change, *, fresh: bool = True, name: str = book.name) -> list[str]:
        notebook = json.loads(book.read_text(encoding="utf-8"))
        change(notebook)
        if fresh:  # the outputs go with the changed code, so that only the planted fault is one
            notebook["metadata"]["companion"] = {"fingerprint": notebooks.fingerprint(notebook)}
        path = tmp_path / name
        path.write_text(json.dumps(notebook), encoding="utf-8")
        (tmp_path / "references.bib").write_bytes((book.parent / "references.bib").read_bytes())
        return notebooks.problems(path)

    return planted


# ---------------------------------------------------------------------------------------------
# running
# ---------------------------------------------------------------------------------------------


def test_the_good_chapter_has_no_problems(book):
    assert notebooks.problems(book) == []


def test_running_again_changes_nothing(book):
    before = book.read_bytes()
    assert not notebooks.execute(book)
    assert book.read_bytes() == before


def test_running_keeps_ids_and_strips_the_run(book, tmp_path):
    notebook = json.loads(book.read_text(encoding="utf-8"))
    ids = [cell["id"] for cell in notebook["cells"]]
    notebook["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    notebook["metadata"]["language_info"]["version"] = "3.9.1"
    notebook["cells"][2]["metadata"]["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    path = tmp_path / "again.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert notebooks.execute(path)
    again = json.loads(path.read_text(encoding="utf-8"))
    assert [cell["id"] for cell in again["cells"]] == ids
    assert path.read_bytes() == book.read_bytes()
    stored = path.read_text(encoding="utf-8")
    for volatile in ('"model_id":', "iopub", "3.9.1", "nowhere", str(tmp_path)):
        assert volatile not in stored


def picture_of(notebook: dict) -> dict:
    (data,) = [
        output["data"]
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return data


@pytest.mark.parametrize(("levels", "kept"), [(1, True), (2, True), (3, False), (40, False)])
def test_a_picture_is_replaced_only_if_its_pixels_moved(book, tmp_path, levels, kept):
    """A stored picture that differs by rounding stays; a stroke that moved is drawn anew."""
    notebook = json.loads(book.read_text(encoding="utf-8"))
    data = picture_of(notebook)
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    pixels = np.asarray(picture.convert("RGBA")).copy()
    pixels[5, 5, :3] = np.where(pixels[5, 5, :3] > 127, pixels[5, 5, :3] - levels, levels)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    data["image/png"] = base64.b64encode(file.getvalue()).decode()
    path = tmp_path / "moved.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    notebooks.execute(path)
    now = picture_of(json.loads(path.read_text(encoding="utf-8")))["image/png"]
    assert (now == data["image/png"]) == kept
    assert (now == picture_of(json.loads(book.read_text(encoding="utf-8")))["image/png"]) != kept


def test_pictures_inside_html_are_kept_one_by_one():
    def uri(level: int) -> str:
        file = io.BytesIO()
        Image.new("L", (4, 4), level).save(file, "png")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    old = {"data": {"text/html": f'<img alt="" src="{uri(10)}"><img alt="" src="{uri(10)}">'}}
    new = {"data": {"text/html": f'<img alt="" src="{uri(12)}"><img alt="" src="{uri(13)}">'}}
    notebooks._keep_pictures(old, new)
    assert new["data"]["text/html"] == f'<img alt="" src="{uri(10)}"><img alt="" src="{uri(13)}">'


def test_a_failing_cell_stores_nothing(tmp_path):
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "broken.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(path)
    assert path.read_bytes() == before
    assert notebooks.main(["run", str(path)]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["broken.ipynb"]


def test_a_hanging_cell_is_stopped(tmp_path):
    from nbclient.exceptions import CellTimeoutError

    path = tmp_path / "hanging.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("import time; time.sleep(60)")]), path)
    with pytest.raises(CellTimeoutError):
        notebooks.execute(path, timeout=1)


# ---------------------------------------------------------------------------------------------
# the rules
# ---------------------------------------------------------------------------------------------


def code(notebook: dict, number: int) -> dict:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][number - 1]


def set_code(number: int, **values):
    return lambda notebook: code(notebook, number).update(values)


def set_prose(words: str, cell: int = 0):
    return lambda notebook: notebook["cells"][cell].update(source=words)


def add_prose(words: str):
    def change(notebook: dict) -> None:
        prose = notebook["cells"][0]
        prose["source"] = notebooks.text(prose["source"]) + "\n\n" + words

    return change


def add_output(number: int, output: dict):
    return lambda notebook: code(notebook, number)["outputs"].append(output)


def swap_order(notebook: dict) -> None:
    first, second = code(notebook, 2), code(notebook, 3)
    first["execution_count"], second["execution_count"] = 3, 2


def fatten(notebook: dict) -> None:
    code(notebook, 2)["outputs"][0]["data"]["text/plain"] = "4" * 1_500_000


def twin_ids(notebook: dict) -> None:
    notebook["cells"][1]["id"] = notebook["cells"][0]["id"]


def second_figure(notebook: dict) -> None:
    outputs = code(notebook, 3)["outputs"]
    outputs.append(copy.deepcopy(outputs[0]))


def widget_only(notebook: dict) -> None:
    data = code(notebook, 4)["outputs"][0]["data"]
    del data["text/html"]
    data[notebooks.WIDGET] = {"model_id": "0123"}


ERROR = new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
STDERR = new_output("stream", name="stderr", text="UserWarning: careful")
IMAGE = new_output("display_data", data={"text/html": '<img src="figures/a.png">'})

FAULTS = {
    "never_run": (set_code(2, execution_count=None), "code cell 2 was never run"),
    "never_run: empty": (set_code(2, source=" \n"), "code cell 2 is empty"),
    "never_run: skipped": (set_code(2, metadata={"tags": ["nbval-skip"]}), "nbval-skip"),
    "out_of_order": (swap_order, "cells ran in the order [1, 3, 2, 4, 5]"),
    "out_of_order: twice": (set_code(5, execution_count=9), "cells ran in the order"),
    "crashed": (add_output(2, ERROR), "code cell 2 ends in ValueError: no"),
    "stderr": (add_output(2, STDERR), "code cell 2 wrote to stderr: 'UserWarning: careful'"),
    "semicolon": (set_code(2, source="2 + 2;"), "code cell 2 ends in a semicolon"),
    "semicolon: comment": (set_code(2, source="2 + 2;  # four\n"), "ends in a semicolon"),
    "semicolon: magic": (set_code(2, source="!echo 'a;"), ""),
    "unseen": (set_code(2, source="show.table([[1]], ['a'])\n2 + 2"), "show.table(…) that is not"),
    "unseen: control": (set_code(2, source="Scrub(x)\nprint(4)"), "Scrub(…) that is not"),
    "unseen: loop": (
        set_code(2, source="for x in y:\n    show.table(x, y)"),
        "code cell 2 makes a show.table(…) that is not its last line",
    ),
    "widgets": (lambda nb: nb["metadata"].update(widgets={}), "widget state is stored"),
    "widgets: no twin": (widget_only, "code cell 4 shows a widget that is nothing without"),
    "syntax: block": (add_prose(":::{note}\nHear!\n:::"), "a ::: block"),
    "syntax: directive": (add_prose("```{note}\nHear!\n```"), "a directive"),
    "syntax: role": (add_prose("See {ref}`this`."), "a role"),
    "syntax: target": (add_prose("(here)=\n## Here"), "a target"),
    "syntax: substitution": (add_prose("We use {{ version }}."), "a substitution"),
    "syntax: break": (add_prose("+++"), "a block break"),
    "figures: no alt": (set_code(3, metadata={}), "code cell 3 shows a figure without alt text"),
    "figures: blank alt": (
        set_code(3, metadata={"mystnb": {"image": {"alt": " "}}}),
        "code cell 3 shows a figure without alt text",
    ),
    "figures: no caption": (set_prose("More prose.", 4), "a figure without caption"),
    "figures: half a caption": (
        set_prose("*Figure 2.1. A line.* And more in the same paragraph.", 4),
        "a figure without caption",
    ),
    "figures: two": (second_figure, "code cell 3 shows 2 figures"),
    "figures: wrong chapter": (
        set_prose("*Figure 3.1. A line.*", 4),
        "a caption says Figure 3.1 where 2.1 comes next",
    ),
    "figures: wrong number": (
        set_prose("*Figure 2.2. A line.*", 4),
        "a caption says Figure 2.2 where 2.1 comes next",
    ),
    "figures: img": (add_output(2, IMAGE), "code cell 2 shows an <img> without alt text"),
    "long_cells": (set_code(2, source="\n".join(["2 + 2"] * 31)), "code cell 2 has 31 lines"),
    "file_size": (fatten, "it is 1.5 MB, more than 1.5 MB"),
    "details": (add_prose("<details><summary>A</summary>\n\nB"), "opens <details> 2 times"),
    "details: no summary": (add_prose("<details>\n\nB\n\n</details>"), "without <summary>"),
    "details: no blank line": (
        add_prose("<details><summary>A</summary>\nB\n\n</details>"),
        "needs a blank line",
    ),
    "citations": (
        add_prose("[DALL·E 2](https://arxiv.org/abs/2204.06125)"),
        "links arXiv 2204.06125, which is not in references.bib",
    ),
    "citations: pdf": (
        add_prose("[none](https://arxiv.org/pdf/2006.1123)"),
        "links arXiv 2006.1123, which is not in references.bib",
    ),
    "absolute_paths": (
        set_code(2, source="open('/home/me/a.png')"),
        "code cell 2 names a path of one machine, starting '/home/m'",
    ),
    "absolute_paths: output": (
        add_output(2, new_output("stream", name="stdout", text="saved C:\\Users\\me")),
        "code cell 2 names a path of one machine",
    ),
    "absolute_paths: url": (add_prose("[here](file:///a/b.html)"), "'file:///'"),
    "first_cell": (set_code(1, source="import companion"), "its first code cell is not the one"),
    "cell_ids": (twin_ids, "two cells have the id"),
    "cell_ids: none": (lambda nb: nb["cells"][0].pop("id"), "some cells have no id"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_guard_refuses(fault, plant):
    change, message = FAULTS[fault]
    found = plant(change)
    if not message:  # not a fault: an unfinished quote in a shell line is no Python, and no matter
        found = [line for line in found if "semicolon" not in line]
        assert found == []
        return
    assert len(found) == 1, found
    assert message in found[0]


def test_the_guard_refuses_stale_outputs(plant, monkeypatch):
    stale = "its outputs are stale: the code or the companion's version changed"
    (found,) = plant(set_code(2, source="2 + 3"), fresh=False)
    assert found.startswith(stale)
    (found,) = plant(lambda notebook: notebook["metadata"].pop("companion"), fresh=False)
    assert found.startswith(stale)
    monkeypatch.setattr(notebooks, "__version__", "0.0.0")
    (found,) = plant(lambda notebook: None, fresh=False)
    assert found.startswith(stale)


def test_prose_may_change_without_a_run(plant):
    assert plant(add_prose("One more sentence."), fresh=False) == []


def test_an_error_shown_on_purpose_is_fine(plant):
    def change(notebook: dict) -> None:
        code(notebook, 2)["metadata"]["tags"] = ["raises-exception"]
        code(notebook, 2)["outputs"].append(ERROR)

    assert plant(change) == []


def test_every_rule_has_a_planted_fault():
    planted = {name.split(":")[0] for name in FAULTS} | {"stale"}
    assert planted == {rule.__name__ for rule in notebooks.RULES}


@pytest.mark.parametrize("content", ["", "[]", '{"cells": []}', "not JSON"])
def test_what_is_no_notebook_is_said_to_be_none(content, tmp_path):
    path = tmp_path / "none.ipynb"
    path.write_text(content)
    (found,) = notebooks.problems(path)
    assert found.startswith("it is not a notebook")


def test_the_command_line_refuses_and_passes(book, plant, tmp_path, capsys):
    assert notebooks.main(["check", str(book)]) == 0
    plant(set_code(2, execution_count=None))
    assert notebooks.main(["check", str(book), str(tmp_path / book.name)]) == 1
    assert "code cell 2 was never run" in capsys.readouterr().out


@pytest.mark.parametrize("path", [*CHAPTERS, TEMPLATE], ids=lambda path: path.stem)
def test_the_book_is_fit_to_publish(path):
    assert notebooks.problems(path) == []


# ---------------------------------------------------------------------------------------------
# nbval, with our settings
# ---------------------------------------------------------------------------------------------

NUMBER = "from companion.show import number\n\nnumber('height', {}, within=(12, 13))"


def stored(source: str, said: str) -> nbformat.NotebookNode:
    """A notebook of one cell, with ``said`` as its stored standard output."""
    outputs = [new_output("stream", name="stdout", text=said)] if said else []
    cell = new_code_cell(source, execution_count=1, outputs=outputs)
    return new_notebook(cells=[cell])


@pytest.fixture(scope="module")
def number_line() -> str:
    """What companion.show.number prints for 12.5."""
    done = subprocess.run(
        [sys.executable, "-c", NUMBER.format(12.5)], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "≈ 12.5" in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory, number_line) -> dict[str, bool]:
    """Run nbval once over a folder of small notebooks: name -> whether it passed."""
    folder = tmp_path_factory.mktemp("nbval")
    moved = number_line.replace("12.5", "12.8")
    assert moved != number_line
    cases = {
        "right": stored("print('four')", "four\n"),
        "wrong": stored("print('four')", "five\n"),
        "missing": stored("print('four')", ""),
        "address": stored("print(object())", "<object object at 0x7f0000000000>\n"),
        "number_same": stored(NUMBER.format(12.5), number_line),
        "number_moved_in_range": stored(NUMBER.format(12.5), moved),
        "number_outside": stored(NUMBER.format(14.0), number_line),
        "number_of_another_name": stored(NUMBER.format(12.5), number_line.replace("hei", "wei")),
        "number_in_another_range": stored(NUMBER.format(12.5), number_line.replace("13", "14")),
        "plain_number_moved": stored("print('x ≈ 1.25')", "x ≈ 1.26\n"),
        # As large as a filmstrip: a pattern that is quadratic in it would take minutes.
        "picture": stored(
            "print('<img src=\"data:image/png;base64,' + 'A' * 400_000 + '\">')",
            '<img src="data:image/png;base64,' + "B" * 400_000 + '">\n',
        ),
    }
    for name, notebook in cases.items():
        nbformat.write(notebook, folder / f"{name}.ipynb")
    report = folder / "report.xml"
    options = ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["--nbval-sanitize-with", str(ROOT / "tests/book/sanitize.cfg")]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junit-xml={report}", str(folder)],
        cwd=ROOT, capture_output=True, timeout=300,
    )  # fmt: skip
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = re.split(r"[./]", case.get("classname").removesuffix(".ipynb"))[-1]
        results[name] = len(case) == 0
    assert results.keys() == cases.keys()
    return results


@pytest.mark.parametrize(
    ("name", "passes"),
    {
        "right": True,
        "wrong": False,
        "missing": False,
        "address": True,
        "number_same": True,
        "number_moved_in_range": True,
        "number_outside": False,
        "number_of_another_name": False,
        "number_in_another_range": False,
        "plain_number_moved": False,
        "picture": True,
    }.items(),
)
def test_nbval_with_our_settings(verdicts, name, passes):
    assert verdicts[name] == passes
