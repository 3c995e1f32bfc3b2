"""Show things in one style: plots, grids of pictures, numbers with their range, small tables.

A side door: any chapter may use it, no model does. Pictures are float tensors in [0, 1].

    from companion import show

    show.style()                                   # once, at the top of a notebook
    show.pictures(batch, captions=prompts)         # a grid
    show.number("mean", x.mean(), within=(-0.01, 0.01))
    show.table([["linear", 1e-4], ["cosine", 4e-5]], ["schedule", "first beta"])
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from companion import errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.2  # inches: the width of the book's column
DPI = 160

# Told apart with normal sight and without red or green cones (tested); lines differ in dash too.
COLOURS = {
    "night": "#24489b",
    "dusk": "#d9601a",
    "meadow": "#1f9e77",
    "plum": "#a85a9c",
    "ink": "#232b3e",
}
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
CARD, LINE, QUIET = "#fffdf8", "#ddd2bb", "#555d73"


def style() -> None:
    """Set the book's style for all matplotlib plots that follow.

    Type is Figtree, which comes with this package; signs that it lacks fall back to matplotlib's
    own DejaVu Sans. Line colours and dashes change together, so a plot also reads in grey.
    """
    import matplotlib
    import matplotlib.pyplot as plt  # in a notebook this also switches inline pictures on
    from cycler import cycler
    from matplotlib import font_manager

    known = {font.fname for font in font_manager.fontManager.ttflist}
    for file in sorted((Path(__file__).parent / "fonts").glob("*.ttf")):
        if str(file) not in known:
            font_manager.fontManager.addfont(str(file))
    cycle = cycler(color=list(COLOURS.values())) + cycler(linestyle=list(DASHES))
    ink = COLOURS["ink"]
    plt.rcParams.update(matplotlib.rcParamsDefault | _kept_by_the_notebook(matplotlib.rcParams))
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.6),
            "figure.dpi": DPI,
            "savefig.dpi": DPI,
            "figure.facecolor": CARD,
            "savefig.facecolor": CARD,
            "figure.constrained_layout.use": True,
            "axes.facecolor": CARD,
            "axes.edgecolor": QUIET,
            "axes.labelcolor": ink,
            "axes.titlecolor": ink,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycle,
            "grid.color": LINE,
            "grid.linewidth": 0.7,
            "lines.linewidth": 2.0,
            "lines.solid_capstyle": "round",
            "patch.edgecolor": CARD,
            "xtick.color": QUIET,
            "ytick.color": QUIET,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "xtick.labelcolor": ink,
            "ytick.labelcolor": ink,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "legend.handlelength": 2.8,
            "text.color": ink,
            "font.family": ["Figtree", "DejaVu Sans"],
            "font.size": 10,
            "mathtext.fontset": "stix",
            "image.cmap": "gray",
            "image.interpolation": "nearest",
        }
    )


def _kept_by_the_notebook(params: dict) -> dict:
    """What must survive going back to the defaults: where plots are drawn."""
    return {key: params[key] for key in ("backend", "backend_fallback", "interactive")}


def pictures(
    batch: torch.Tensor,
    titles: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    size: float | None = None,
) -> Figure:
    """A grid of pictures, enlarged without smoothing.

    Args:
        batch: (B, C, H, W) in [0, 1], C = 1 (grey) or 3 (colour).
        titles: B short texts above the pictures, or one per column, which go above the first row.
        captions: B texts below the pictures, such as prompts; long ones are wrapped.
        columns: Pictures in a row; by default up to 8.
        size: Width of one picture in inches; by default what fits, at most 1.6.

    Returns:
        The figure. As the last line of a cell it is shown once.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong shape, values outside [0, 1] or NaN, wrong number of texts.
    """
    errors.tensor("batch", batch, "B C H W", dtype="float", low=0.0, high=1.0)
    count, channels, height, width = batch.shape
    errors.expect(
        channels in (1, 3), f"batch has {channels} channels; expected 1 (grey) or 3 (colour)."
    )
    if columns is None:
        columns = min(count, 8)
    errors.number("columns", columns, low=1, integer=True)
    columns = min(columns, count)
    if size is None:
        size = min(1.6, WIDTH / columns - 0.06)
    errors.number("size", size, low=0.1, high=WIDTH)
    above = _texts("titles", titles, {count, columns})
    below = _texts("captions", captions, {count})

    import matplotlib.pyplot as plt

    gap, edge, title_high, line_high = 10 / DPI, 6 / DPI, 36 / DPI, 23 / DPI
    # Whole screen pixels for each picture's pixel, where there is room: sharp, and stored in less.
    room = min(size, (WIDTH - 2 * edge + gap) / columns - gap)
    if room * DPI >= width:
        size = int(room * DPI / width + 1e-6) * width / DPI
    fit = max(8, int(size * 15))  # letters of 8 points in a line of this width
    below = ["\n".join(textwrap.wrap(text, fit)) for text in below]
    lines = max((text.count("\n") + 1 for text in below if text), default=0)
    rows = math.ceil(count / columns)
    tall = size * height / width
    title_rows = (rows if len(above) > columns else 1) if above else 0
    text_high = lines * line_high + (gap if lines else 0)
    wide = columns * (size + gap) - gap + 2 * edge
    high = rows * (tall + text_high + gap) - gap + title_rows * title_high + 2 * edge
    figure = plt.figure(figsize=(wide, high), layout="none")
    plt.close(figure)  # it is returned, so pyplot must not show it a second time
    array = batch.detach().to("cpu", torch.float32).movedim(1, -1).numpy()
    top = high - edge
    for i in range(count):
        row, column = divmod(i, columns)
        if column == 0:
            top -= (tall + text_high + gap) if row else 0
            top -= title_high if row < title_rows else 0
        left = edge + column * (size + gap)
        place = (left / wide, (top - tall) / high, size / wide, tall / high)
        axes = figure.add_axes(place)
        axes.imshow(array[i], vmin=0.0, vmax=1.0, cmap="gray", interpolation="nearest")
        axes.set_axis_off()
        if i < len(above):
            axes.set_title(above[i], fontsize=9, loc="center", pad=4)
        if below:
            figure.text(
                (left + size / 2) / wide, (top - tall - 0.05) / high, below[i],
                ha="center", va="top", fontsize=8, linespacing=1.2,
            )  # fmt: skip
    return figure


def _texts(name: str, texts: Sequence[str] | None, counts: set[int]) -> list[str]:
    if texts is None:
        return []
    if isinstance(texts, str):
        raise TypeError(f"{name} is one string; expected a list of strings.")
    texts = [str(text) for text in texts]
    expected = " or ".join(str(n) for n in sorted(counts))
    errors.expect(len(texts) in counts, f"{name} has {len(texts)} texts; expected {expected}.")
    return texts


def picture(x: torch.Tensor, title: str | None = None, caption: str | None = None) -> Figure:
    """One picture, (C, H, W) or (1, C, H, W) in [0, 1], three inches wide."""
    if isinstance(x, torch.Tensor) and x.ndim == 3:
        x = x[None]
    errors.tensor("picture", x, "1 C H W", dtype="float", low=0.0, high=1.0)
    return pictures(
        x, None if title is None else [title], None if caption is None else [caption], size=3.0
    )


def number(
    name: str,
    value: float | torch.Tensor,
    *,
    within: tuple[float, float],
    unit: str = "",
    digits: int = 4,
) -> None:
    """Print a number that may move a little between machines, and hold it to its range.

    Prints one line, ``name ≈ value unit (expected low … high: yes)``. The stored output of a
    notebook is compared without the value; that the value lies in its range is checked here.

    Args:
        name: What it is.
        value: A number, or a tensor with one element.
        within: The lowest and the highest value that are right, both included.
        unit: Printed behind the value.
        digits: Significant digits to print.

    Raises:
        AssertionError: outside the range, or NaN (the line is printed first, with "no").
        ValueError: a range that is empty, reversed or not finite.
    """
    try:
        low, high = (float(end) for end in within)
    except (TypeError, ValueError) as error:
        raise ValueError(f"within is {within!r}; expected two numbers, (low, high).") from error
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"within is ({low:g}, {high:g}); expected finite low <= high.")
    errors.number("digits", digits, low=1, high=17, integer=True)
    if isinstance(value, torch.Tensor):
        errors.expect(
            value.numel() == 1, f"{name} has {value.numel()} values; expected a single one."
        )
    value = float(value)
    inside = low <= value <= high  # False for NaN
    behind = f" {unit}" if unit else ""
    says = f"expected {low:.{digits}g} … {high:.{digits}g}: {'yes' if inside else 'no'}"
    print(f"{name} ≈ {value:.{digits}g}{behind} ({says})")
    if not inside:
        raise AssertionError(f"{name} is {value:g}{behind}, outside {low:g} … {high:g}.")


class Table:
    """A small table that a notebook shows as a table and a terminal as aligned text."""

    def __init__(self, rows: list[list[str]], headers: list[str], right: list[bool]) -> None:
        self.rows, self.headers, self.right = rows, headers, right

    def _repr_markdown_(self) -> str:
        rule = ["---:" if right else "---" for right in self.right]
        lines = [self.headers, rule, *self.rows]
        return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)

    def __repr__(self) -> str:
        lines = [self.headers, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]
        padded = [
            "  ".join(
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(line, widths, self.right, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([padded[0], "  ".join("-" * width for width in widths), *padded[1:]])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], digits: int = 4) -> Table:
    """A small table, as the last line of a cell.

    Args:
        rows: Cells, row by row. Numbers are rounded; other things are written as they are.
        headers: One name a column. Markdown such as ``$\\bar\\alpha_t$`` is allowed.
        digits: Significant digits of numbers with a fraction.

    Raises:
        ValueError: no rows or headers, or a row of another length.
    """
    headers = [str(header) for header in headers]
    rows = [list(row) for row in rows]
    errors.expect(bool(headers) and bool(rows), "a table needs headers and at least one row.")
    for i, row in enumerate(rows):
        errors.expect(
            len(row) == len(headers),
            f"row {i} of the table has {len(row)} cells; expected {len(headers)}.",
        )
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    return Table([[_written(cell, digits) for cell in row] for row in rows], headers, right)


def _is_number(cell: object) -> bool:
    if isinstance(cell, torch.Tensor):
        return cell.numel() == 1 and cell.dtype != torch.bool
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _written(cell: object, digits: int) -> str:
    if isinstance(cell, torch.Tensor) and cell.numel() == 1:
        cell = cell.item()
    if isinstance(cell, float):
        return f"{cell:.{digits}g}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return str(cell)
