"""Draw the whole machine, once for each chapter with that chapter's part lit.

``python book/figures/machine.py`` writes ``machine-*.svg`` beside itself. The drawing is plain SVG
with no fonts or pictures from outside. Its colours are CSS variables with the light colours as
defaults, so a page can set dark ones. Sizes are those of this book's models, not the papers'.
"""

from __future__ import annotations

import random
import re
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 800, 668
FOLDER = Path(__file__).resolve().parent

# Parts of the drawing that can be lit, and which of them each chapter lights.
NOISE = {"forward", "denoiser", "guidance", "sampler", "before"}
WORDS = {"tokenizer", "text", "image"}
DALLE = {"prior", "decoder", "upsampler"}
IMAGEN = {"imagen"}
DIFFUSION = {"unet", "latents", "ae-decoder", "ae-encoder"}
ALL = NOISE | WORDS | DALLE | IMAGEN | DIFFUSION
CHAPTERS: dict[str, tuple[str, set[str]]] = {
    "whole": ("every part", ALL),
    "predecessors": ("what came before, a GAN and a VAE on small digits", {"before"}),
    "noise": ("adding noise to a picture, by a schedule", {"forward"}),
    "denoise": ("the denoiser, a U-Net that looks at a noisy picture", {"denoiser"}),
    "sampler": ("the sampler, which calls the denoiser again and again", {"sampler"}),
    "clip": ("CLIP, which brings words and pictures into one space", WORDS),
    "guidance": ("guidance, which pulls the picture towards the words", {"guidance"}),
    "prior": ("DALL·E 2's prior, from words to an image embedding", {"prior"}),
    "decoder": ("DALL·E 2's decoder, from an image embedding to a small picture", {"decoder"}),
    "dalle2": ("the whole of DALL·E 2, with CLIP's text encoder", DALLE | {"tokenizer", "text"}),
    "imagen": ("Imagen, which reads the words with a language model", IMAGEN),
    "autoencoder": (
        "the autoencoder, between pictures and latents",
        {"latents", "ae-decoder", "ae-encoder"},
    ),
    "attention": ("the U-Net that asks the words by cross-attention", {"unet"}),
    "stable-diffusion": (
        "the whole of Stable Diffusion, with CLIP's text encoder",
        DIFFUSION | {"tokenizer", "text"},
    ),
}
SHORT = {
    "whole": "The whole machine",
    "predecessors": "The machine: before diffusion",
    "noise": "The machine: adding noise",
    "denoise": "The machine: the denoiser",
    "sampler": "The machine: the sampler",
    "clip": "The machine: CLIP",
    "guidance": "The machine: guidance",
    "prior": "The machine: the prior",
    "decoder": "The machine: the decoder",
    "dalle2": "The machine: DALL·E 2",
    "imagen": "The machine: Imagen",
    "autoencoder": "The machine: the autoencoder",
    "attention": "The machine: cross-attention",
    "stable-diffusion": "The machine: Stable Diffusion",
}

STYLE = """
.machine{font-family:Figtree,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.machine .ground{fill:var(--m-ground,#fffdf8)}
.machine .band{fill:var(--m-band,#f6f0e4)}
.machine text{fill:var(--m-ink,#232b3e);font-size:13.5px}
.machine .name{font-weight:650}
.machine .note{font-size:11.5px;fill:var(--m-quiet,#555d73)}
.machine .head{font-size:11.5px;font-weight:700;letter-spacing:.07em}
.machine .box{fill:var(--m-box,#fff);stroke-width:1.6}
.machine .wire{fill:none;stroke-width:1.6}
.machine .train{stroke-dasharray:5 4}
.machine .frame{fill:none;stroke:var(--m-line,#c9bda3);stroke-width:1}
.machine .noise{--tone:var(--m-noise,#2a4b97)}
.machine .words{--tone:var(--m-words,#a8470f)}
.machine .dalle{--tone:var(--m-dalle,#6a4399)}
.machine .imagen{--tone:var(--m-imagen,#1b6672)}
.machine .sd{--tone:var(--m-sd,#2c6a3d)}
.machine .tone{stroke:var(--tone)}
.machine .fill,.machine text.head{fill:var(--tone)}
.machine .chip{fill:var(--tone)}
.machine text.on{fill:var(--m-box,#fff);font-size:12px;font-weight:650}
.machine .dim{opacity:.3}
.machine .lit .box{stroke-width:2.4;fill:color-mix(in srgb,var(--tone) 13%,var(--m-box,#fff))}
.machine .lit .wire{stroke-width:2.2}
""".strip().replace("\n", "")


class Drawing:
    """Collects SVG elements; ``lit`` says which parts are lit (all of them: nothing stands out)."""

    def __init__(self, lit: set[str]) -> None:
        self.lit = lit
        self.out: list[str] = []
        self.labels: list[tuple[str, str, float]] = []  # (text, class, room), for the tests
        self.lit_x: list[float] = []

    def part(self, *names: str) -> str:
        """The class of a group that belongs to the named parts."""
        if self.lit == ALL:
            return "plain"
        return "lit" if self.lit & set(names) else "dim"

    def open(self, tone: str, *names: str) -> None:
        """Begin a group."""
        self.state = self.part(*names)
        self.out.append(f'<g class="{tone} {self.state}">')

    def close(self) -> None:
        """End the group."""
        self.out.append("</g>")

    def text(
        self, x: float, y: float, text: str, kind: str = "note", anchor: str = "middle",
        room: float = 1e9,
    ) -> None:  # fmt: skip
        """A line of text; ``_0`` and ``_t`` behind a letter become subscripts."""
        self.labels.append((re.sub(r"_(\w)", r"\1", text), kind, room))
        shown = re.sub(
            r"_(\w)(.)?",
            lambda m: (
                f'<tspan dy="3" font-size="9.5">{m[1]}</tspan>'
                + (f'<tspan dy="-3">{m[2]}</tspan>' if m[2] else "")
            ),
            escape(text, quote=False),
        )
        self.out.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{shown}</text>'
        )

    def box(
        self, x: float, y: float, w: float, name: str, note: str, h: float = 44, train: bool = False
    ) -> None:
        """A network or a rule: its name and one line below."""
        dashed = " train" if train else ""
        self.out.append(
            f'<rect class="box tone{dashed}" x="{x:g}" y="{y:g}" width="{w:g}" '
            f'height="{h:g}" rx="9"/>'
        )
        self.text(x + w / 2, y + h / 2 - 3, name, "name", room=w - 6)
        self.text(x + w / 2, y + h / 2 + 12.5, note, "note", room=w - 6)
        self._see(x, w)

    def chip(self, x: float, y: float, w: float, name: str) -> None:
        """A tensor that goes from one band to another; equal colour, equal tensor."""
        self.out.append(
            f'<rect class="chip" x="{x:g}" y="{y - 11:g}" width="{w:g}" height="22" rx="11"/>'
        )
        self.text(x + w / 2, y + 4.2, name, "on", room=w - 10)
        self._see(x, w)

    def wire(self, *points: float, head: bool = True, train: bool = False) -> None:
        """A line through the points, with an arrow head at its end."""
        pairs = list(zip(points[::2], points[1::2], strict=True))
        dashed = " train" if train else ""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in pairs)
        self.out.append(f'<path class="wire tone{dashed}" d="{path}"/>')
        if head:
            (ax, ay), (bx, by) = pairs[-2:]
            length = ((bx - ax) ** 2 + (by - ay) ** 2) ** 0.5
            ux, uy = (bx - ax) / length, (by - ay) / length
            left = (bx - 7 * ux - 4 * uy, by - 7 * uy + 4 * ux)
            right = (bx - 7 * ux + 4 * uy, by - 7 * uy - 4 * ux)
            tip = (bx + ux, by + uy)
            dots = " ".join(f"{x:.4g},{y:.4g}" for x, y in (tip, left, right))
            self.out.append(f'<polygon class="fill" points="{dots}"/>')

    def scene(self, x: float, y: float, size: float) -> None:
        """A picture: a house on a hill."""
        u = size / 46
        self.out.append(
            f'<g transform="translate({x:g} {y:g}) scale({u:.4g})">'
            '<rect width="46" height="46" rx="5" fill="#bfe0ee"/>'
            '<circle cx="34" cy="12" r="6" fill="#f7c95c"/>'
            '<path d="M0 32q14 -9 26 -4t20 -1V41q0 5 -5 5H5q-5 0 -5 -5z" fill="#6cab66"/>'
            '<path d="M11 36V25l8 -7 8 7v11z" fill="#d4553a"/>'
            '<path d="M9 26l10 -9 10 9" fill="none" stroke="#7a3324" stroke-width="2.4"/>'
            '<rect x="17" y="29" width="4.6" height="7" fill="#fff0c9"/></g>'
            f'<rect class="frame" x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" '
            f'rx="{5 * u:.4g}"/>'
        )
        self._see(x, size)

    def static(
        self, x: float, y: float, size: float, cells: int = 8, over: float = 1.0, hue: bool = False
    ) -> None:
        """Noise: ``over`` < 1 lets what lies below show through; ``hue`` colours it (latents)."""
        draw = random.Random(1000 * cells + round(100 * over) + hue)
        step = size / cells
        squares = []
        for row in range(cells):
            for column in range(cells):
                if hue:
                    fill = draw.choice(["#7fb0a8", "#c9a3c4", "#e3c27c", "#8aa5d6", "#d98f77"])
                else:
                    fill = draw.choice(["#2b3350", "#5c6788", "#8d97b3", "#c4cadb", "#e9ecf3"])
                squares.append(
                    f'<rect x="{x + column * step:.4g}" y="{y + row * step:.4g}" '
                    f'width="{step:.4g}" height="{step:.4g}" fill="{fill}"/>'
                )
        self.out.append(f'<g opacity="{over:g}">{"".join(squares)}</g>')
        self.out.append(
            f'<rect class="frame" x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}"/>'
        )
        self._see(x, size)

    def words(self, x: float, y: float, w: float = 94) -> None:
        """A caption."""
        self.out.append(
            f'<rect class="box tone" x="{x:g}" y="{y:g}" width="{w:g}" height="44" rx="2"/>'
        )
        self.text(x + w / 2, y + 18.5, "“a red house", "note", room=w - 6)
        self.text(x + w / 2, y + 33.5, "by the sea”", "note", room=w - 6)
        self._see(x, w)

    def band(self, y: float, h: float, title: str, tone: str, *names: str) -> None:
        """The ground of one row."""
        self.out.append(
            f'<rect class="band" x="8" y="{y:g}" width="{WIDTH - 16}" height="{h:g}" rx="12"/>'
        )
        self.open(tone, *names)
        self.text(20, y + 20, title, "head", "start")
        self.close()

    def _see(self, x: float, w: float) -> None:
        if self.state == "lit":
            self.lit_x.append(x + w / 2)


def noise_band(d: Drawing, y: float) -> None:
    """Noising, denoising, sampling; and what came before."""
    d.band(y, 126, "NOISE", "noise", *NOISE)
    top, mid = y + 50, y + 72
    d.open("noise", "forward")
    d.scene(20, top, 44)
    d.text(42, top + 60, "x_0  64×64×3")
    d.wire(66, mid, 86, mid)
    d.box(88, top, 96, "add noise", "schedule ᾱ_t")
    d.wire(186, mid, 206, mid)
    d.close()
    d.open("noise", "forward", "denoiser", "sampler")
    d.scene(208, top, 44)
    d.static(208, top, 44, over=0.78)
    d.text(230, top + 60, "x_t  64×64×3")
    d.close()
    d.open("noise", "denoiser")
    d.wire(254, mid, 272, mid)
    d.box(274, top, 98, "denoiser", "U-Net at step t")
    d.wire(374, mid, 390, mid)
    d.close()
    d.open("noise", "guidance")
    d.box(392, top, 106, "guidance", "with, without c")
    d.wire(500, mid, 516, mid)
    d.close()
    d.open("noise", "sampler")
    d.box(518, top, 84, "sampler", "one step")
    d.wire(560, top, 560, top - 14, 230, top - 14, 230, top - 2)
    d.text(396, top - 19, "again, until t = 0")
    d.wire(604, mid, 622, mid)
    d.scene(624, top, 44)
    d.text(646, top + 60, "64×64×3")
    d.text(326, top + 60, "generation starts here, from pure noise x_T", anchor="start")
    d.wire(320, top + 56, 280, top + 56)
    d.close()
    d.open("noise", "before")
    d.wire(684, y + 14, 684, y + 112, head=False, train=True)
    d.text(738, y + 34, "before diffusion", room=98)
    d.box(697, top, 82, "GAN, VAE", "digits 8×8")
    d.close()


def words_band(d: Drawing, y: float) -> None:
    """CLIP: words from the left, a picture from the right, meeting in one space."""
    d.band(y, 112, "WORDS AND PICTURES IN ONE SPACE: CLIP", "words", *WORDS)
    top, mid = y + 44, y + 66
    d.open("words", "tokenizer")
    d.words(20, top)
    d.wire(116, mid, 132, mid)
    d.box(134, top, 82, "tokenizer", "N tokens")
    d.close()
    d.open("words", "text")
    d.wire(218, mid, 234, mid)
    d.box(236, top, 100, "text encoder", "Transformer")
    d.wire(338, mid - 9, 356, mid - 16)
    d.chip(358, mid - 18, 118, "text states  N×D")
    d.wire(338, mid + 9, 356, mid + 16)
    d.chip(358, mid + 18, 50, "z_t  D")
    d.close()
    d.open("words", "image")
    d.wire(430, mid + 18, 412, mid + 18)
    d.wire(498, mid + 18, 516, mid + 18)
    d.text(464, mid + 22, "made near", room=68)
    d.chip(520, mid + 18, 50, "z_i  D")
    d.wire(598, mid + 10, 573, mid + 16)
    d.box(600, top, 108, "image encoder", "ViT, patch 8")
    d.wire(732, mid, 711, mid)
    d.scene(735, top, 44)
    d.text(757, top + 58, "64×64×3")
    d.close()


def dalle_band(d: Drawing, y: float) -> None:
    """Prior, decoder, upsamplers."""
    d.band(y, 134, "DALL·E 2", "dalle", *DALLE)
    top, mid = y + 54, y + 76
    bus = y + 32
    d.open("words", "prior", "decoder")
    d.chip(104, bus, 118, "text states  N×D")
    d.wire(222, bus, 245, bus, 245, top - 2)
    d.close()
    d.open("words", "prior")
    d.chip(20, mid, 50, "z_t  D")
    d.wire(72, mid, 200, mid)
    d.close()
    d.open("words", "decoder")
    d.wire(245, bus, 446, bus, 446, top - 2)
    d.text(346, bus - 5, "caption tokens, kept")
    d.close()
    d.open("dalle", "prior")
    d.box(202, top, 94, "prior", "draws z_i from z_t")
    d.text(249, top + 60, "diffusion or AR")
    d.wire(298, mid, 312, mid)
    d.close()
    d.open("words", "prior", "decoder")
    d.chip(314, mid, 48, "z_i  D")
    d.close()
    d.open("dalle", "decoder")
    d.wire(362, mid - 5, 376, mid - 13, 398, mid - 13)
    d.wire(362, mid + 5, 376, mid + 13, 398, mid + 13)
    d.text(378, mid - 18, "to t", room=30)
    d.text(352, mid + 28, "as extra tokens")
    d.box(400, top, 92, "decoder", "U-Net")
    d.static(410, top + 54, 18, cells=4)
    d.wire(419, top + 53, 419, top + 47)
    d.text(432, top + 67, "noise 16×16×3", anchor="start")
    d.wire(494, mid, 508, mid)
    d.scene(510, mid - 13, 26)
    d.text(523, mid - 18, "16×16×3")
    d.close()
    d.open("dalle", "upsampler")
    d.wire(538, mid, 550, mid)
    d.box(552, top, 82, "upsampler", "64×64×3")
    d.wire(636, mid, 648, mid)
    d.box(650, top, 82, "upsampler", "256×256×3")
    d.wire(734, mid, 743, mid)
    d.scene(745, mid - 17, 34)
    d.text(642, top + 60, "each from noise of its own")
    d.close()


def imagen_band(d: Drawing, y: float) -> None:
    """A language model, then a cascade that reads its states."""
    d.band(y, 122, "IMAGEN", "imagen", *IMAGEN)
    top, mid = y + 44, y + 66
    bus = y + 26
    d.open("imagen", "imagen")
    d.words(20, top)
    d.wire(116, mid, 130, mid)
    d.box(132, top, 116, "language model", "text only, frozen")
    d.wire(250, mid, 264, mid)
    d.chip(266, mid, 96, "states  N×D")
    d.wire(364, mid, 398, mid)
    d.wire(381, mid, 381, bus, 600, bus, 600, top - 2)
    d.text(490, bus - 5, "the words again")
    d.box(400, top, 92, "base", "U-Net")
    d.static(410, top + 54, 18, cells=4)
    d.wire(419, top + 53, 419, top + 47)
    d.text(432, top + 67, "noise 16×16×3", anchor="start")
    d.wire(494, mid, 508, mid)
    d.scene(510, mid - 13, 26)
    d.text(523, mid - 18, "16×16×3")
    d.wire(538, mid, 550, mid)
    d.box(552, top, 116, "super-resolution", "U-Net, from noise")
    d.wire(670, mid, 684, mid)
    d.scene(686, top, 44)
    d.text(734, mid + 4, "64×64×3", anchor="start", room=50)
    d.close()


def diffusion_band(d: Drawing, y: float) -> None:
    """Latents, a U-Net that asks the words, an autoencoder around them."""
    d.band(y, 140, "STABLE DIFFUSION", "sd", *DIFFUSION)
    top, mid = y + 46, y + 68
    low = y + 112
    d.open("words", "unet")
    d.chip(166, y + 24, 118, "text states  N×D")
    d.wire(286, y + 24, 322, y + 24, 322, top - 2)
    d.text(330, y + 28, "keys and values", anchor="start")
    d.close()
    d.open("sd", "unet")
    d.static(150, mid - 16, 32, cells=8)
    d.text(142, mid - 2, "noise", anchor="end")
    d.text(142, mid + 12, "8×8×4", anchor="end")
    d.wire(184, mid, 262, mid)
    d.box(264, top, 116, "U-Net", "cross-attention")
    d.wire(300, top + 46, 300, low - 4, 222, low - 4, 222, mid + 3)
    d.text(216, low, "sampler: again", anchor="end")
    d.wire(382, mid, 410, mid)
    d.close()
    d.open("sd", "latents", "unet")
    d.static(412, mid - 18, 36, cells=8, hue=True)
    d.text(430, mid - 24, "latents 8×8×4")
    d.close()
    d.open("sd", "ae-decoder")
    d.wire(450, mid, 490, mid)
    d.box(492, top, 104, "decoder", "autoencoder’s")
    d.wire(598, mid, 618, mid)
    d.scene(620, top, 44)
    d.text(642, top - 6, "64×64×3")
    d.close()
    d.open("sd", "ae-encoder")
    d.wire(642, top + 46, 642, low, 599, low, train=True)
    d.box(492, low - 18, 104, "encoder", "training, img2img", h=38, train=True)
    d.wire(490, low, 430, low, 430, mid + 21, train=True)
    d.close()
    d.open("sd", "unet")
    d.text(782, mid - 10, "no prior: the", anchor="end")
    d.text(782, mid + 5, "words go straight", anchor="end")
    d.text(782, mid + 20, "to the U-Net", anchor="end")
    d.close()


def draw(chapter: str) -> Drawing:
    """The drawing of one chapter."""
    d = Drawing(CHAPTERS[chapter][1])
    d.out.append(f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="14"/>')
    y = 8.0
    for band, height in (
        (noise_band, 126),
        (words_band, 112),
        (dalle_band, 134),
        (imagen_band, 122),
        (diffusion_band, 140),
    ):
        band(d, y)
        y += height + 4.5
    return d


def svg(chapter: str) -> str:
    """The SVG file of one chapter."""
    d = draw(chapter)
    what, _ = CHAPTERS[chapter]
    centre = sum(d.lit_x) / len(d.lit_x) / WIDTH if d.lit_x else 0.0
    describe = (
        f"Lit here: {what}. The rows, from top to bottom. Noise: a picture of 64×64×3 gets "
        "noise by a schedule; a denoiser, guidance and a sampler lead back, step by step, "
        "from pure noise to a picture; beside it, what came before: GAN and VAE on digits of "
        "8×8. CLIP: words go through a tokenizer and a text encoder to text states (N×D) and "
        "an embedding z_t; a picture goes through an image encoder to z_i, and training makes "
        "the two near. DALL·E 2: the prior draws z_i from the words; the decoder gets z_i "
        "twice, added to the timestep and as extra tokens, and the caption tokens, and makes "
        "16×16×3 from noise; two upsamplers make 64×64 and 256×256. Imagen: a frozen language "
        "model, a base model of 16×16×3, and super-resolution to 64×64×3 that reads the words "
        "again. Stable Diffusion: from noise of 8×8×4 a U-Net with cross-attention to the "
        "text states makes latents, and the autoencoder's decoder a picture of 64×64×3; its "
        "encoder is used in training and image-to-image only."
    )
    body = "\n".join(d.out)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="machine" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-labelledby="title desc" data-lit="{centre:.3f}">\n'
        f'<title id="title">{escape(SHORT[chapter])}</title>\n'
        f'<desc id="desc">{escape(describe, quote=False)}</desc>\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def main() -> None:
    """Write all drawings."""
    for chapter in CHAPTERS:
        (FOLDER / f"machine-{chapter}.svg").write_text(svg(chapter), encoding="utf8", newline="\n")


if __name__ == "__main__":
    main()
