"""A control that moves with a kernel and without one.

``Scrub`` shows one or several strips of frames and a slider that walks through them. In JupyterLab
with a running kernel it is an ipywidget. On a page of the book, or wherever else no kernel runs,
its HTML twin does the same with a native slider over one picture that holds all frames: keyboard,
screen reader, print and no script from anywhere else. Where scripts are taken out (a repository's
web view), the frames stay visible as a filmstrip.

    Scrub(frames, values=[f"t = {t} of 1000" for t in steps], label="noise level",
          alt="a red house, noised")
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import ipywidgets
import torch

from companion import errors

if TYPE_CHECKING:
    from PIL.Image import Image

Frames = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]

STYLE = """
.scrub{margin:.4em 0 .8em;max-width:100%}
.scrub-strips{display:flex;flex-wrap:wrap;gap:.9em}
.scrub-strip{min-width:0;max-width:100%}
.scrub-title{font-weight:600;font-size:.9em;margin:0 0 .3em}
.scrub-view{overflow-x:auto;max-width:100%;border-radius:8px}
.scrub .scrub-view img{display:block;max-width:none;image-rendering:pixelated;margin:0;padding:0;
border:0;border-radius:0}
.scrub-bar{display:none}
.scrub-says{font-variant-numeric:tabular-nums;margin:.4em 0 0;min-height:1.5em}
.scrub-on .scrub-strips{flex-wrap:nowrap}
.scrub-on .scrub-strip{flex:0 1 var(--size)}
.scrub-on .scrub-view{overflow:hidden;width:100%;aspect-ratio:var(--ratio)}
.scrub.scrub-on .scrub-view img{width:calc(100%*var(--n));height:auto}
.scrub-on .scrub-bar{display:flex;flex-wrap:wrap;align-items:center;gap:.5em .9em;margin-top:.7em}
.scrub-bar label{display:flex;align-items:center;gap:.7em;flex:1 1 14em;max-width:36em}
.scrub-bar label.scrub-pick{flex:0 1 auto}
.scrub-bar input{flex:1 1 8em;min-width:6em;height:1.8em;accent-color:currentColor}
.scrub-bar button,.scrub-bar select{font:inherit;color:inherit;background:transparent;
border:1px solid currentColor;border-radius:6px;padding:.15em .7em;min-height:1.9em}
.scrub-bar option{color:#111;background:#fff}
.scrub-bar :focus-visible{outline:3px solid;outline-offset:2px}
@media print{.scrub-on .scrub-strips{display:block}.scrub-on .scrub-view{aspect-ratio:auto}
.scrub.scrub-on .scrub-view img{width:100%;transform:none!important}
.scrub-on .scrub-bar,.scrub-on .scrub-says{display:none}}
""".strip().replace("\n", "")

SCRIPT = """
(function(){function begin(){
document.querySelectorAll(".scrub:not(.scrub-on)").forEach(function(box){
var says=JSON.parse(box.dataset.says),rows=says.length,n=says[0].length,timer=null,
range=box.querySelector("input"),pick=box.querySelector("select"),
play=box.querySelector("button"),note=box.querySelector(".scrub-says"),
images=box.querySelectorAll(".scrub-view img");
function move(){var k=Number(range.value),row=pick?pick.selectedIndex:0,text=says[row][k];
images.forEach(function(image){
image.style.transform="translate("+-100*k/n+"%,"+-100*row/rows+"%)";
image.alt=image.dataset.alt+": "+text;});
note.textContent=text;range.setAttribute("aria-valuetext",text);}
function stop(){clearInterval(timer);timer=null;play.textContent="Play";}
range.addEventListener("input",function(){if(timer)stop();move();});
if(pick)pick.addEventListener("change",move);
if(matchMedia("(prefers-reduced-motion: reduce)").matches)play.hidden=true;
play.addEventListener("click",function(){if(timer)return stop();
if(Number(range.value)===n-1)range.value=0;play.textContent="Stop";
timer=setInterval(function(){range.value=Number(range.value)+1;move();
if(Number(range.value)===n-1)stop();},Math.max(60,4000/n));});
box.classList.add("scrub-on");move();});}
begin();setTimeout(begin,300);})();
""".strip().replace("\n", "")


class Scrub(ipywidgets.VBox):
    """A slider through frames; several strips move together.

    Args:
        frames: (N, C, H, W) in [0, 1], C = 1 or 3; or a list of such tensors, or a dictionary from
            title to tensor, for strips side by side (equal N, sizes may differ); or a function of
            k = 0 … n-1 that gives one picture (C, H, W) or a list of them. With ``choices`` each
            tensor is (R, N, C, H, W), R rows to choose from.
        n: How many frames, needed for a function only.
        label: What the slider changes, such as "noise level".
        alt: What is seen, without the part that moves: one text, or one for each strip.
        values: N short texts, what each position means ("t = 400 of 1000, SNR 0.31"), or a function
            of k. With ``choices``: R lists of N. By default "1 of N".
        titles: A title above each strip.
        choices: Names of the R rows; a menu picks one.
        pick: What the menu chooses, such as "schedule".
        start: The first position shown.
        size: Width of one strip on the page in CSS pixels.

    Raises:
        TypeError: frames are not floating-point tensors.
        ValueError: wrong shapes, values outside [0, 1] or NaN, unequal lengths, no label or alt.
    """

    def __init__(
        self,
        frames: Frames | Callable[[int], torch.Tensor | Sequence[torch.Tensor]],
        *,
        n: int | None = None,
        label: str,
        alt: str | Sequence[str],
        values: Sequence[str] | Sequence[Sequence[str]] | Callable[[int], str] | None = None,
        titles: Sequence[str] | None = None,
        choices: Sequence[str] | None = None,
        pick: str = "choice",
        start: int = 0,
        size: int = 208,
    ) -> None:
        if isinstance(frames, Mapping):
            titles = list(frames) if titles is None else titles
            frames = list(frames.values())
        strips = _strips(frames, n, 1 if choices is None else len(choices))
        rows, count = strips[0].shape[:2]
        self.label, self.count = _said("label", label), count
        self.choices = None if choices is None else [str(choice) for choice in choices]
        self.pick = _said("pick", pick)
        self.alts = _one_each("alt", [alt] * len(strips) if isinstance(alt, str) else alt, strips)
        self.titles = None if titles is None else _one_each("titles", titles, strips)
        self.values = _values(values, rows, count)
        errors.number("start", start, low=0, high=count - 1, integer=True)
        errors.number("size", size, low=16, integer=True)
        self.start, self.size = start, size
        self._strips = strips
        self._sheets = [_encode(_sheet(strip)) for strip in strips]
        super().__init__(children=self._controls())

    def __repr__(self) -> str:
        strips = f", {len(self._strips)} strips" if len(self._strips) > 1 else ""
        return f"Scrub({self.label!r}, {self.count} frames{strips})"

    # ---- with a kernel -----------------------------------------------------------------------

    def _controls(self) -> list[ipywidgets.Widget]:
        slider = ipywidgets.IntSlider(
            self.start, 0, self.count - 1, description=self.label, readout=False,
            style={"description_width": "initial"}, layout={"width": "32em", "max_width": "98%"},
        )  # fmt: skip
        menu = ipywidgets.Dropdown(
            options=[(name, row) for row, name in enumerate(self.choices or [""])],
            value=0, description=self.pick, style={"description_width": "initial"},
        )  # fmt: skip
        views = [ipywidgets.HTML() for _ in self._strips]
        says = ipywidgets.HTML()

        def move(_: object = None) -> None:
            k, row = slider.value, menu.value
            for i, view in enumerate(views):
                view.value = self._frame(i, row, k)
            says.value = escape(self.values[row][k])

        slider.observe(move, "value")
        menu.observe(move, "value")
        move()
        self.slider, self.menu, self.views, self.says = slider, menu, views, says
        bars = [slider] if self.choices is None else [menu, slider]
        return [ipywidgets.HBox(views), *bars, says]

    def _frame(self, i: int, row: int, k: int) -> str:
        title = f"<b>{escape(self.titles[i])}</b><br>" if self.titles else ""
        alt = escape(f"{self.alts[i]}: {self.values[row][k]}")
        source = _encode(_image(self._strips[i][row, k]))
        return (
            f'{title}<img src="{source}" alt="{alt}" width="{self.size}" '
            'style="image-rendering:pixelated;margin-right:.9em">'
        )

    # ---- without one -------------------------------------------------------------------------

    def html(self) -> str:
        """The twin: everything that a page needs, in one piece."""
        first, last = self.values[0][0], self.values[0][-1]
        strips = []
        for i, strip in enumerate(self._strips):
            height, width = strip.shape[-2:]
            title = (
                f'<div class="scrub-title">{escape(self.titles[i])}</div>' if self.titles else ""
            )
            rows = f", {strip.shape[0]} rows" if self.choices else ""
            alt = f"{self.alts[i]}: {self.count} frames{rows}, from {first} to {last}"
            strips.append(
                f'<div class="scrub-strip" style="--size:{self.size}px;--n:{self.count};'
                f'--ratio:{width}/{height}">{title}<div class="scrub-view">'
                f'<img src="{self._sheets[i]}" alt="{escape(alt)}" '
                f'data-alt="{escape(self.alts[i])}"></div></div>'
            )
        menu = ""
        if self.choices:
            options = "".join(f"<option>{escape(name)}</option>" for name in self.choices)
            menu = (
                f'<label class="scrub-pick"><span>{escape(self.pick)}</span>'
                f"<select>{options}</select></label>"
            )
        says = json.dumps(self.values, ensure_ascii=False)
        now = escape(self.values[0][self.start])
        return (
            f'<div class="scrub" role="group" aria-label="{escape(self.label)}" '
            f'data-says="{escape(says)}">\n<div class="scrub-strips">{"".join(strips)}</div>\n'
            f'<div class="scrub-bar">{menu}<label><span>{escape(self.label)}</span>'
            f'<input type="range" min="0" max="{self.count - 1}" step="1" value="{self.start}" '
            f'autocomplete="off" aria-valuetext="{now}"></label>'
            '<button type="button">Play</button></div>\n'
            f'<p class="scrub-says">{escape(first)} … {escape(last)}</p>\n</div>\n'
            f"<style>{STYLE}</style>\n<script>{SCRIPT}</script>"
        )

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        bundle = super()._repr_mimebundle_(**options) or {}
        bundle["text/html"] = self.html()
        return bundle


def _strips(frames: object, n: int | None, rows: int) -> list[torch.Tensor]:
    """All strips as (R, N, C, H, W) on the CPU."""
    if callable(frames):
        if n is None:
            raise ValueError("n is None; a function of k needs n, the number of frames.")
        errors.number("n", n, low=2, integer=True)
        drawn = [frames(k) for k in range(n)]
        drawn = [[d] if isinstance(d, torch.Tensor) else list(d) for d in drawn]
        errors.expect(
            len({len(d) for d in drawn}) == 1 and len(drawn[0]) > 0,
            "the function gave different numbers of pictures; expected the same for every k.",
        )
        for k, d in enumerate(drawn):
            for picture in d:
                errors.tensor(f"frame {k}", picture, "C H W", dtype="float")
        frames = [torch.stack(strip) for strip in zip(*drawn, strict=True)]
    if isinstance(frames, torch.Tensor):
        frames = [frames]
    if not isinstance(frames, Sequence) or isinstance(frames, str):
        kind = type(frames).__name__
        raise TypeError(f"frames is {kind}; expected a tensor, several of them or a function.")
    errors.expect(len(frames) > 0, "frames is empty; expected at least one strip.")
    strips = []
    for i, strip in enumerate(frames):
        name = f"frames[{i}]"
        if isinstance(strip, torch.Tensor) and strip.ndim == 4 and rows == 1:
            strip = strip[None]
        errors.tensor(name, strip, "R N C H W", dtype="float", low=0.0, high=1.0)
        errors.expect(
            strip.shape[0] == rows,
            f"{name} has {strip.shape[0]} rows; expected {rows}, one for each of the choices.",
        )
        errors.expect(
            strip.shape[2] in (1, 3),
            f"{name} has {strip.shape[2]} channels; expected 1 (grey) or 3 (colour).",
        )
        strips.append(strip.detach().to("cpu", torch.float32))
    counts = [strip.shape[1] for strip in strips]
    errors.expect(
        len(set(counts)) == 1, f"the strips have {counts} frames; expected equal numbers."
    )
    errors.expect(counts[0] >= 2, f"there is {counts[0]} frame; expected at least 2.")
    errors.expect(n is None or n == counts[0], f"n is {n}; the strips have {counts[0]} frames.")
    return strips


def _said(name: str, text: object) -> str:
    errors.expect(
        isinstance(text, str) and bool(text.strip()),
        f"{name} is {text!r}; expected words, which readers without a picture get to hear.",
    )
    return str(text)


def _one_each(name: str, texts: Sequence[str], strips: list[torch.Tensor]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    errors.expect(
        len(texts) == len(strips), f"{name} has {len(texts)} texts for {len(strips)} strips."
    )
    return [_said(name, text) for text in texts]


def _values(values: object, rows: int, count: int) -> list[list[str]]:
    """R lists of N texts."""
    if values is None:
        values = [f"{k + 1} of {count}" for k in range(count)]
    if callable(values):
        values = [values(k) for k in range(count)]
    table = [list(values)] * rows if isinstance(next(iter(values), ""), str) else list(values)
    errors.expect(len(table) == rows, f"values has {len(table)} lists; expected {rows}.")
    for row in table:
        errors.expect(len(row) == count, f"values has {len(row)} texts for {count} frames.")
    return [[_said("a value", text) for text in row] for row in table]


def _sheet(strip: torch.Tensor) -> Image:
    """One image with all frames: (R, N, C, H, W) as R rows of N."""
    rows, count, channels, height, width = strip.shape
    return _image(strip.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, count * width))


def _image(picture: torch.Tensor) -> Image:
    from PIL import Image

    array = (picture * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _encode(image: Image) -> str:
    """A data address: PNG, or JPEG where noise makes PNG half as large again.

    The JPEG keeps the full resolution of colours: without it, coloured static turns grey.
    """
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "png", optimize=True)
    image.save(jpeg, "jpeg", quality=60, subsampling=0)
    use_jpeg = 1.5 * len(jpeg.getvalue()) < len(png.getvalue())
    kind, data = ("jpeg", jpeg) if use_jpeg else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
