"""What the book's machines are held to: every bar with what was found, and whether it was met.

``make scores`` prints this. Numbers come from the cards of the shipped weights and from
``book/results``; nothing is computed here. A bar counts the *lower* end of the 95 % interval where
its name says so, else the value; a bar that was missed says so, and stays where it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from companion import checkpoints, measure
from companion.scores import together

Found = dict[str, float]


@dataclass(frozen=True)
class Bar:
    """One promise: what, where it was found, and how much was promised.

    Attributes:
        about: What is counted.
        chapter: Where the book tells of it.
        find: Reads card or results: a number, or {"value", "low", "high", "n"}.
        least: What was promised; None: printed whatever it is.
        low: Whether the lower end of the interval counts.
        unit: "%" for shares, else what stands behind the number.
    """

    about: str
    chapter: int
    find: Callable[[], float | Found]
    least: float | None = None
    low: bool = False
    unit: str = "%"


@dataclass(frozen=True)
class Line:
    """A bar and what came of it; where it was not measured ``found`` is None, and ``why`` tells."""

    bar: Bar
    found: Found | None
    why: str = ""

    @property
    def passed(self) -> bool | None:
        """None where nothing was promised or nothing found."""
        if self.found is None or self.bar.least is None:
            return None
        return self.found["low" if self.bar.low else "value"] >= self.bar.least

    def __str__(self) -> str:
        def number(x: float) -> str:
            return f"{100 * x:.1f} %" if self.bar.unit == "%" else f"{x:.1f}{self.bar.unit}"

        verdict = {True: "pass", False: "MISSED", None: ""}[self.passed]
        if self.found is None:
            return f"{'?':<7} {self.bar.chapter:>2}  {self.bar.about}: {self.why}"
        said = number(self.found["value"])
        if "low" in self.found:
            said += f" [{number(self.found['low'])}, {number(self.found['high'])}]"
        if self.bar.least is not None:
            said += f", promised {number(self.bar.least)}" + (
                " at the lower end" if self.bar.low else ""
            )
        return f"{verdict:<7} {self.bar.chapter:>2}  {self.bar.about}: {said}"


def card(name: str, entry: str) -> Callable[[], float | Found]:
    """An entry of the score on the card of shipped weights."""
    return lambda: checkpoints.read_json(checkpoints.WEIGHTS / name / "card.json")["score"][entry]


@cache
def _stored(name: str) -> dict[str, Any]:
    return measure.load(name)  # which hashes all weights that it was measured with


def result(name: str, *path: str) -> Callable[[], float | Found]:
    """A number of a stored measurement, which must have been made with the shipped weights."""

    def find() -> float | Found:
        found: Any = _stored(name)
        for key in path:
            found = found[key]
        return found

    return find


MARKS = {
    "sky": "sky right",
    "place": "place right",
    "one thing": "prompts with one thing wholly right",
    "two things": "prompts with two things wholly right",
    "swapped": "colours exchanged, of those with both kinds and both colours",
}


def _marks(name: str, way: str, about: str, chapter: int, least: dict[str, float]) -> list[Bar]:
    """Of an examination's marks those that are shown; what is promised holds at the lower end."""
    return [
        Bar(
            f"{about}, {what}",
            chapter,
            result(name, "ways", way, "marks", mark),
            least.get(mark),
            low=mark in least,
        )
        for mark, what in MARKS.items()
    ]


def _text_to_picture() -> list[Bar]:
    promised = {"sky": 0.95, "place": 0.95, "one thing": 0.85}
    found = _marks("text-to-picture", "from words", "text to picture", 9, promised)
    for way, about in (
        ("true pictures, through CLIP and back", "a picture's place back to a picture"),
        ("true pictures, small and enlarged", "true pictures at 16, enlarged"),
        ("true pictures", "true pictures"),
    ):
        found += _marks("text-to-picture", way, about, 9, {})
    return found


def _held_out() -> Found:
    """Prompts for combinations that no training saw, with one thing or two."""
    found = _stored("stable-diffusion")["ways"]["from words"]["marks"]
    return together([found[f"{count}, held out"] for count in ("one thing", "two things")])


def _imagen() -> list[Bar]:
    found = _marks("imagen", "from words", "Imagen", 10, {"one thing": 0.85})
    way = "true pictures, small and enlarged"
    return found + _marks("imagen", way, "true pictures at 16, enlarged with their words", 10, {})


def _stable_diffusion() -> list[Bar]:
    promised = {"one thing": 0.95, "two things": 0.8}
    found = _marks("stable-diffusion", "from words", "Stable Diffusion", 13, promised)
    ten = ("latent-steps", "rows", "dpmpp_2m, 10 steps")
    found += [
        Bar("the same for combinations that no training saw", 13, _held_out, 0.6),
        Bar(
            "ten steps of DPM-Solver++ less a hundred of DDIM, prompts wholly right",
            13,
            result(*ten, "more wholly right"),
            -0.02,
        ),
    ]
    for what, about in (
        ("distance", "the distance from the picture grows"),
        ("of b", "more facts are the words'"),
        ("of a", "fewer facts are the picture's"),
    ):
        number = result("image-to-image", "least step", what)
        found.append(Bar(f"image to image, at each greater strength {about}, by", 13, number, 0.0))
    shown = ("image-prompt", "rows", "the picture for words, s = 4", "facts")
    found.append(Bar("facts of a picture that stands for words", 13, result(*shown), 0.8))
    for what in ("inside", "outside"):
        number = result("inpainting", "rows", "all, repainted, pasted", what)
        about = {"inside": "obeyed inside the mask", "outside": "facts outside as they were"}[what]
        found.append(Bar(f"inpainting, {about}", 13, number))
    return found


def bars() -> list[Bar]:
    """All of them, by chapter."""
    found = [
        Bar(f"CLIP, zero-shot {what}", 5, card("clip", f"zero-shot {what}"), 0.95)
        for what in ("sky", "place", "kind")
    ]
    for way in ("picture finds its caption", "caption finds its picture"):
        found.append(Bar(f"CLIP, {way} among 100", 5, card("clip", f"{way} among 100"), 0.85))
    found += [
        Bar(
            f"the diffusion prior, prompts wholly right more than by {way}, points",
            7,
            result("priors", "differences", "told", way),
            least,
        )
        for way, least in (("the caption's own embedding", 0.05), ("moved by the gap", None))
    ]
    found.append(
        Bar(
            "the same beside the caption's own embedding, the paired interval above zero",
            7,
            result("priors", "differences", "told", "the caption's own embedding"),
            0.0,
            low=True,
        )
    )
    found += _text_to_picture()
    for size in (64, 256):
        entry = "Fréchet distance, bicubic less upsampled"
        found.append(
            Bar(
                f"upsampler to {size}, Fréchet distance less than bicubic's, by",
                9,
                card(f"upsampler-{size}", entry),
                0.0,
                low=True,
                unit="",
            )
        )
    for what in ("kind", "colour", "place"):
        keep = result("variations", "rows", "any noise", what)
        found.append(Bar(f"variations keep the {what}", 9, keep, 0.85))
    way = ("rows", "own noise, along the arc", "never no scene")
    found += [
        Bar(
            "interpolations that never pass through no scene",
            9,
            result("interpolations", *way),
            1.0,
        ),
        Bar(
            "text diffs that change what was said and nothing else",
            9,
            result("text-diffs", "rows", "all", "as chosen", "both"),
            0.8,
        ),
        *_imagen(),
        Bar(
            "autoencoder, fresh pictures",
            11,
            card("autoencoder", "PSNR in dB, fresh pictures"),
            35.0,
            unit=" dB",
        ),
        Bar(
            "autoencoder, facts the judge reads from round trips",
            11,
            card("autoencoder", "judge reads right of round trips, facts"),
            0.98,
        ),
    ]
    found += _stable_diffusion()
    return found


def lines(wanted: Sequence[Bar] | None = None) -> list[Line]:
    """Every bar, with what stands on cards and in results."""
    _stored.cache_clear()
    found = []
    for bar in bars() if wanted is None else wanted:
        try:
            value = bar.find()
        except (FileNotFoundError, ValueError, KeyError) as error:
            missing = isinstance(error, KeyError)
            why = f"no entry {error}" if missing else f"not measured. {error}"
            found.append(Line(bar, None, why))
            continue
        found.append(Line(bar, value if isinstance(value, dict) else {"value": float(value)}))
    return found
