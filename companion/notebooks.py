"""Running the book's notebooks, storing what they show, and refusing those not fit to publish.

``execute`` runs a notebook in a fresh kernel and writes it back so that running it twice changes
nothing. ``problems`` reads a notebook and says, in one sentence each, what would mislead or stop a
reader; the build and the tests refuse a notebook with problems. From a shell::

    python -m companion.notebooks run [NOTEBOOK …]
    python -m companion.notebooks check [NOTEBOOK …]
"""

import argparse
import ast
import base64
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from companion import __version__

BOOK = Path(__file__).resolve().parents[1] / "book"
REPOSITORY = "https://github.com/noise-to-pictures/noise-to-pictures"

# The first code cell of every notebook. `--no-deps` leaves an installed torch alone, whatever its
# version; the second line adds only what is missing.
FIRST_CELL = f"""\
try:
    import companion
except ModuleNotFoundError:  # on Colab and the like: add it, and leave an installed torch as it is
    %pip install --quiet --no-deps git+{REPOSITORY}
    %pip install --quiet accelerate ipywidgets matplotlib pillow safetensors scikit-image
    %pip install --quiet scikit-learn tokenizers torch tqdm
    import companion"""

LONGEST_CELL = 30  # lines
LARGEST_FILE = 1_500_000  # bytes
CELL_TIMEOUT = 900  # seconds; every chapter runs in minutes, so a cell that takes this long hangs

# Colours within this many of 255 levels count as the same picture. Another CPU or thread count
# moves a float by about 1e-6, which flips the rounding of a pixel by one level, and blending two
# such pixels can add a second. A stroke or a letter that really moved changes its edge by tens.
SAME_COLOUR = 2
PALETTE_SLIP = 64  # and this many: no longer a neighbour in a palette
FEW_COLOURS = 4  # and a palette may be so far off on average

PICTURES = ("image/png", "image/jpeg", "image/webp")
WIDGET = "application/vnd.jupyter.widget-view+json"
DATA_URI = re.compile(r"data:image/(?:png|jpeg|webp);base64,([A-Za-z0-9+/=]+)")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,16}\b")
CAPTION = re.compile(r"\*Figure (\d+|[A-Z])\.(\d+)\. \S.*\*", re.DOTALL)  # letters: appendices

Notebook = dict  # a notebook as its JSON says it


def text(value: str | list[str]) -> str:
    """A notebook stores long text as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def fingerprint(notebook: Notebook) -> str:
    """What stored outputs belong to: the code, cell by cell, and the companion's version."""
    sources = [text(cell["source"]) for cell in _code(notebook)]
    return hashlib.sha256(json.dumps([__version__, sources]).encode()).hexdigest()


def _code(notebook: Notebook) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


# ---------------------------------------------------------------------------------------------
# running and storing
# ---------------------------------------------------------------------------------------------


def small_picture(png: bytes) -> bytes:
    """The same PNG in fewer bytes: tightly packed, and with 256 colours where that shows nothing.

    A palette takes a third of the room. It holds a plot, which has a few colours and their blends,
    to about a level of 255 on average, and a sheet of drawn pictures to three: side by side nobody
    tells them apart. A field of noise keeps all its colours.
    """
    from PIL import Image, ImageChops, ImageStat

    picture = Image.open(io.BytesIO(png))
    if picture.mode == "RGBA" and picture.getextrema()[3] == (255, 255):
        picture = picture.convert("RGB")
    packed = io.BytesIO()
    picture.save(packed, "png", optimize=True)
    best = min(packed.getvalue(), png, key=len)
    if picture.mode == "RGB":
        few = picture.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=0)
        lost = ImageStat.Stat(ImageChops.difference(picture, few.convert("RGB"))).mean
        packed = io.BytesIO()
        few.save(packed, "png", optimize=True)
        if max(lost) <= FEW_COLOURS and len(packed.getvalue()) < 0.7 * len(best):
            best = packed.getvalue()
    return best


def same_picture(old: bytes, new: bytes) -> bool:
    """Whether two encoded pictures show the same, to within what no eye sees.

    In a picture with a palette, a blend at the edge of a stroke may be given to its neighbour among
    the 256 colours: there a few points may differ by more, if hardly anything differs in all.
    """
    from PIL import Image, ImageChops, ImageStat

    if old == new:
        return True
    before, after = (Image.open(io.BytesIO(data)) for data in (old, new))
    if before.size != after.size or max(getattr(p, "n_frames", 1) for p in (before, after)) > 1:
        return False
    difference = ImageChops.difference(before.convert("RGBA"), after.convert("RGBA"))
    if max(high for _, high in difference.getextrema()) <= SAME_COLOUR:
        return True
    if (before.mode, after.mode) != ("P", "P"):
        return False
    moved = sum(sum(band.histogram()[PALETTE_SLIP:]) for band in difference.split())
    return moved <= 4 and max(ImageStat.Stat(difference).mean) < 0.05


def _keep_pictures(old: dict, new: dict) -> None:
    """In output ``new``, put back each picture of ``old`` that still shows the same."""
    before, after = old.get("data", {}), new.get("data", {})
    for kind in PICTURES:
        if kind in before and kind in after:
            pair = [base64.b64decode(text(data[kind])) for data in (before, after)]
            if same_picture(*pair):
                after[kind] = before[kind]
    if "text/html" in before and "text/html" in after:
        stored = iter(DATA_URI.findall(text(before["text/html"])))

        def put_back(match: re.Match) -> str:
            known = next(stored, None)
            if known and same_picture(base64.b64decode(known), base64.b64decode(match[1])):
                return match[0].replace(match[1], known)
            return match[0]

        after["text/html"] = DATA_URI.sub(put_back, text(after["text/html"]))


def _tidy(notebook: Notebook, previous: Notebook) -> None:
    """Strip what changes from run to run, and keep the pictures that did not."""
    kept = {"mystnb", "title", "authors"}
    notebook["metadata"] = {k: v for k, v in notebook["metadata"].items() if k in kept} | {
        "companion": {"fingerprint": fingerprint(notebook)},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {
            "file_extension": ".py",
            "mimetype": "text/x-python",
            "name": "python",
            "pygments_lexer": "ipython3",
        },
    }
    before = {cell["id"]: cell for cell in _code(previous)}
    kept = {"mystnb", "tags", "jupyter", "slideshow", "editable", "deletable"}
    for cell in notebook["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k in kept}
    for cell in _code(notebook):
        old_outputs = before[cell["id"]]["outputs"]
        for position, output in enumerate(cell["outputs"]):
            output.get("metadata", {}).pop("nbval", None)
            if "text" in output:
                output["text"] = ADDRESS.sub("at 0x000000000000", text(output["text"]))
            data = output.get("data", {})
            if "image/png" in data:
                packed = small_picture(base64.b64decode(text(data["image/png"])))
                data["image/png"] = base64.b64encode(packed).decode() + "\n"
            for kind in ("text/plain", "text/html"):
                if kind in data:
                    data[kind] = ADDRESS.sub("at 0x000000000000", text(data[kind]))
            if "text/html" in data:
                data.pop(WIDGET, None)  # names a model in a kernel that is gone
            if position < len(old_outputs):
                _keep_pictures(old_outputs[position], output)


def execute(path: str | Path, *, timeout: float = CELL_TIMEOUT) -> bool:
    """Run a notebook from top to bottom in a fresh kernel and store its outputs.

    Cell ids stay, timings, widget state and version details go, and a picture is replaced only if
    its pixels moved. The file is written whole or not at all, and only if something changed.

    Args:
        path: the notebook; its folder is the working directory of the run.
        timeout: seconds that one cell may take.

    Returns:
        Whether the file changed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed that is not tagged
            ``raises-exception``; the file is left as it was.
        nbclient.exceptions.CellTimeoutError: a cell took longer than ``timeout``.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    from companion.checkpoints import write_text

    class ThisPython(KernelSpecManager):
        """Whatever kernel the notebook names, run the Python that runs this."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR"]
            command += ["-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    path = Path(path)
    stored = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(stored, as_version=4)
    previous = nbformat.reads(stored, as_version=4)
    for old, new in zip(previous["cells"], notebook["cells"], strict=True):
        old["id"] = new["id"]  # equal already, unless the file is from before cells had ids
    notebook["nbformat_minor"] = 5
    with tempfile.TemporaryDirectory() as folder:
        # The reader's own IPython profile, with what it imports at the start, stays outside.
        own = {"PYTHONHASHSEED": "0", "IPYTHONDIR": folder}
        NotebookClient(
            notebook,
            km=AsyncKernelManager(kernel_spec_manager=ThisPython()),
            resources={"metadata": {"path": str(path.resolve().parent)}},
            timeout=timeout,
            store_widget_state=False,
            record_timing=False,
            coalesce_streams=True,
        ).execute(cleanup_kc=True, env={**os.environ, **own})
    _tidy(notebook, previous)
    nbformat.validate(notebook)
    # Sorted keys and one space of indent, as Jupyter writes it.
    result = nbformat.writes(notebook) + "\n"
    if result == stored:
        return False
    write_text(path, result)
    return True


# ---------------------------------------------------------------------------------------------
# the guard: each rule yields one sentence per fault
# ---------------------------------------------------------------------------------------------


def _numbered(notebook: Notebook, kind: str = "code") -> Iterator[tuple[str, dict, str]]:
    """``(name for messages, cell, source)`` of every cell of one kind."""
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == kind:
            number += 1
            yield f"{kind} cell {number}", cell, text(cell["source"])


def never_run(notebook: Notebook, path: Path) -> Iterator[str]:
    """Every code cell has run."""
    for name, cell, source in _numbered(notebook):
        if not source.strip():
            yield f"{name} is empty: remove it"
        elif cell.get("execution_count") is None:
            yield f"{name} was never run: run `make notebooks`"
        if "nbval-skip" in cell["metadata"].get("tags", []):
            yield f"{name} is tagged nbval-skip, so nothing would ever run it"


def out_of_order(notebook: Notebook, path: Path) -> Iterator[str]:
    """The cells ran once each, from top to bottom, in a fresh kernel."""
    counts = [cell.get("execution_count") for cell in _code(notebook)]
    if None not in counts and counts != list(range(1, len(counts) + 1)):
        yield f"cells ran in the order {counts}, not from top to bottom in a fresh kernel"


def stale(notebook: Notebook, path: Path) -> Iterator[str]:
    """The stored outputs belong to this code and to this version of the companion."""
    if notebook["metadata"].get("companion", {}).get("fingerprint") != fingerprint(notebook):
        yield (
            "its outputs are stale: the code or the companion's version changed since they were "
            "stored; run `make notebooks`"
        )


def crashed(notebook: Notebook, path: Path) -> Iterator[str]:
    """No output is an error, unless the cell shows one on purpose."""
    for name, cell, _ in _numbered(notebook):
        meant = "raises-exception" in cell["metadata"].get("tags", [])
        for output in cell["outputs"]:
            if output["output_type"] == "error" and not meant:
                yield f"{name} ends in {output['ename']}: {output['evalue']}"


def stderr(notebook: Notebook, path: Path) -> Iterator[str]:
    """Nothing was written to stderr: no warning, no bar."""
    for name, cell, _ in _numbered(notebook):
        for output in cell["outputs"]:
            if output["output_type"] == "stream" and output["name"] == "stderr":
                start = text(output["text"]).strip().splitlines() or [""]
                yield f"{name} wrote to stderr: {start[0][:80]!r}"


def semicolon(notebook: Notebook, path: Path) -> Iterator[str]:
    """No cell ends in a semicolon: nbval shows the value that it hides, and so fails."""
    for name, _, source in _numbered(notebook):
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        except (tokenize.TokenError, SyntaxError):  # a magic that is not Python
            last = source.rstrip()[-1:]
        else:
            blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER,
                     tokenize.DEDENT}  # fmt: skip
            last = next((t.string for t in reversed(tokens) if t.type not in blank), "")
        if last == ";":
            yield f"{name} ends in a semicolon: write `_ = …` or end with plt.show()"


def unseen(notebook: Notebook, path: Path) -> Iterator[str]:
    """A table or control is the last thing in its cell: of any other, Jupyter shows nothing."""
    for name, _, source in _numbered(notebook):
        try:
            statements = ast.parse(source).body
        except SyntaxError:  # a magic that is not Python
            continue
        last = statements[-1] if statements else None
        for part in (part for whole in statements for part in ast.walk(whole)):
            if part is last or not isinstance(part, ast.Expr):
                continue
            called = ast.unparse(part.value.func) if isinstance(part.value, ast.Call) else ""
            if called in ("show.table", "Scrub"):
                yield f"{name} makes a {called}(…) that is not its last line: nobody sees it"


def widgets(notebook: Notebook, path: Path) -> Iterator[str]:
    """No widget state is stored, and every control has a twin that moves without a kernel."""
    if "widgets" in notebook["metadata"]:
        yield "widget state is stored in its metadata: run `make notebooks`"
    for name, cell, _ in _numbered(notebook):
        for output in cell["outputs"]:
            data = output.get("data", {})
            if WIDGET in data and "text/html" not in data:
                yield (
                    f"{name} shows a widget that is nothing without a kernel: use companion.widgets"
                )
            elif WIDGET in data:
                yield f"{name} stores the number of a widget in a kernel: run `make notebooks`"


SYNTAX = {
    r"^\s*:{3,}": "a ::: block",
    r"^\s*(?:`{3,}|~{3,})\{": "a directive",
    r"(?<![`\w$\\}])\{[A-Za-z][\w:.+-]*\}`[^`\n]+`": "a role",
    r"^\([\w-]+\)=\s*$": "a target",
    r"\{\{[^{}\n]+\}\}": "a substitution",
    r"^\+\+\+": "a block break",
}


def syntax(notebook: Notebook, path: Path) -> Iterator[str]:
    """Markdown only: MyST syntax is soup in Lab, on GitHub and on Colab."""
    for name, _, source in _numbered(notebook, "markdown"):
        prose = re.sub(r"(?ms)^(```+|~~~+)(?!\{)[^\n]*\n.*?^\1\s*$", "", source)
        for pattern, what in SYNTAX.items():
            if found := re.search(pattern, prose, re.MULTILINE):
                yield (
                    f"{name} has {what}, {found[0].strip()!r}: only plain Markdown shows everywhere"
                )


def figures(notebook: Notebook, path: Path) -> Iterator[str]:
    """A figure has a text for those who do not see it, and a numbered caption right after it."""
    cells, number, expected = notebook["cells"], 0, 0
    chapter = re.match(r"(\d\d)-", path.name)
    for position, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            for found in re.finditer(r"(?m)^\*Figure (\d+|[A-Z])\.(\d+)\.", text(cell["source"])):
                expected += 1
                here = str(int(chapter[1])) if chapter else found[1]
                if (found[1], int(found[2])) != (here, expected):
                    yield (
                        f"a caption says Figure {found[1]}.{found[2]} where "
                        f"{here}.{expected} comes next"
                    )
        if cell["cell_type"] != "code":
            continue
        number += 1
        name = f"code cell {number}"
        shown = [
            kind
            for output in cell["outputs"]
            for kind in output.get("data", {})
            if kind in (*PICTURES, "image/svg+xml")
        ]
        for output in cell["outputs"]:
            html = text(output.get("data", {}).get("text/html", ""))
            if re.search(r"<img\b(?![^>]*\balt\s*=)", html):
                yield f"{name} shows an <img> without alt text"
        if not shown:
            continue
        if len(shown) > 1:
            yield f"{name} shows {len(shown)} figures: one a cell, each with its caption"
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if not alt.strip():
            yield f"{name} shows a figure without alt text (metadata: mystnb.image.alt)"
        after = cells[position + 1] if position + 1 < len(cells) else {"cell_type": None}
        first = text(after.get("source", "")).strip().split("\n\n")[0]
        if after["cell_type"] != "markdown" or not CAPTION.fullmatch(first):
            yield (
                f"{name} shows a figure without caption: the next cell has to start with the "
                "paragraph *Figure n.m. What to see.*"
            )


def long_cells(notebook: Notebook, path: Path) -> Iterator[str]:
    """A cell is one idea."""
    for name, _, source in _numbered(notebook):
        lines = len(source.splitlines())
        if lines > LONGEST_CELL:
            yield (
                f"{name} has {lines} lines, more than {LONGEST_CELL}: move code into the "
                "companion, or split it"
            )


def file_size(notebook: Notebook, path: Path) -> Iterator[str]:
    """The page loads on a telephone, and the repository stays small."""
    size = path.stat().st_size
    if size > LARGEST_FILE:
        yield (
            f"it is {size / 1e6:.1f} MB, more than {LARGEST_FILE / 1e6} MB: fewer or smaller "
            "pictures"
        )


def details(notebook: Notebook, path: Path) -> Iterator[str]:
    """Solutions open and close, and their Markdown is read as Markdown."""
    for name, _, source in _numbered(notebook, "markdown"):
        opened, closed = len(re.findall(r"<details\b", source)), source.count("</details>")
        if opened != closed:
            yield f"{name} opens <details> {opened} times and closes it {closed} times"
        elif opened != len(re.findall(r"<summary>.+?</summary>", source)):
            yield f"{name} has a <details> without <summary>…</summary>"
        elif re.search(r"</summary>[ \t]*\n(?![ \t]*\n)|\S[ \t]*\n</details>", source):
            yield f"{name} needs a blank line after <summary>…</summary> and before </details>"


def citations(notebook: Notebook, path: Path) -> Iterator[str]:
    """Every arXiv paper that is linked stands in the bibliography beside or above the notebook."""
    files = [folder / "references.bib" for folder in path.resolve().parents[:2]]
    known = "".join(file.read_text(encoding="utf-8") for file in files if file.exists())
    pattern = r"arxiv\.org/(?:abs|pdf|html)/((?:[a-z-]+/\d{7})|(?:\d{4}\.\d{4,5}))"
    for name, _, source in _numbered(notebook, "markdown"):
        for paper in dict.fromkeys(re.findall(pattern, source)):
            if not re.search(rf"(?<![\d.]){re.escape(paper)}(?!\d)", known):
                yield f"{name} links arXiv {paper}, which is not in references.bib"


def absolute_paths(notebook: Notebook, path: Path) -> Iterator[str]:
    """Nothing names a folder of the machine that ran it."""
    places = r"home|root|Users|tmp|work|mnt|opt|usr|var|private|content|kaggle"
    pattern = re.compile(rf"(?<![\w./:~-])/(?:{places})/[\w.]|\bfile:///|\b[A-Z]:\\\w")
    for kind in ("code", "markdown"):
        for name, cell, source in _numbered(notebook, kind):
            said = [source]
            for output in cell.get("outputs", []):
                said.append(text(output.get("text", "")))
                said += output.get("traceback", [])
                for mime, value in output.get("data", {}).items():
                    if mime.startswith("text/"):
                        said.append(text(value))
            if found := pattern.search(DATA_URI.sub("", "\n".join(said))):
                yield f"{name} names a path of one machine, starting {found[0]!r}"


def first_cell(notebook: Notebook, path: Path) -> Iterator[str]:
    """The first code cell fetches the companion where it is missing."""
    code = _code(notebook)
    if not code or text(code[0]["source"]).strip() != FIRST_CELL:
        yield (
            "its first code cell is not the one that fetches the companion where it is missing "
            "(companion.notebooks.FIRST_CELL)"
        )


def cell_ids(notebook: Notebook, path: Path) -> Iterator[str]:
    """Cells have ids, each its own, so that a change in one is a change in one."""
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids:
        yield "some cells have no id: run `make notebooks`"
    for twice in sorted({i for i in ids if i is not None and ids.count(i) > 1}):
        yield f"two cells have the id {twice!r}"


RULES: tuple[Callable[[Notebook, Path], Iterator[str]], ...] = (
    never_run, out_of_order, stale, crashed, stderr, semicolon, unseen, widgets, syntax, figures,
    long_cells, file_size, details, citations, absolute_paths, first_cell, cell_ids,
)  # fmt: skip


def problems(path: str | Path) -> list[str]:
    """Everything that makes a notebook unfit to publish, one sentence each; empty if it is fit."""
    path = Path(path)
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        format_ = notebook["nbformat"], notebook["nbformat_minor"]
        notebook["cells"], notebook["metadata"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"it is not a notebook: {error!r}"]
    if format_ < (4, 5):
        return [f"it is in notebook format {format_[0]}.{format_[1]}, older than 4.5: run "
                "`make notebooks`"]  # fmt: skip
    return [fault for rule in RULES for fault in rule(notebook, path)]


# ---------------------------------------------------------------------------------------------
# from a shell
# ---------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run or check notebooks; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m companion.notebooks", description=__doc__)
    parser.add_argument("action", choices=("run", "check"))
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--timeout", type=float, default=CELL_TIMEOUT, help="seconds for one cell")
    chosen = parser.parse_args(arguments)
    everything = [*sorted(BOOK.glob("*.ipynb")), *sorted(BOOK.glob("templates/*.ipynb"))]
    paths = chosen.notebooks or everything
    failed = 0
    for path in paths:
        if chosen.action == "check":
            for fault in problems(path):
                failed = 1
                print(f"{path.name}: {fault}")
            continue
        started = time.monotonic()
        print(f"{path.name} … ", end="", flush=True)
        try:
            result = "stored" if execute(path, timeout=chosen.timeout) else "unchanged"
        except Exception as error:  # a failing cell, a dead kernel: say so, go on with the next
            failed, result = 1, f"FAILED, nothing stored\n{error}\n"
        print(f"{result} ({time.monotonic() - started:.0f} s)", flush=True)
    if chosen.action == "check" and not failed:
        print(f"the guard: {len(paths)} notebooks, nothing to complain of")
    return failed


if __name__ == "__main__":
    sys.exit(main())
