"""Chapter 10's experiments: what a reader of captions holds, and what Imagen makes of it.

Two text encoders side by side: Imagen's, trained to have its captions written back, and CLIP's,
trained to tell pictures apart. Then what guidance does to pixels, and what noise over a small
picture does to the upsampler. Three tables come from here: ``python -m companion measure NAME``,
with NAME one of ``thresholding``, ``noise-augmentation`` and ``sides``.

Letters: B pictures or texts, N tokens, K the width of their states, S steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from companion import errors, guidance, samplers
from companion.asking import Question, distance, questions, shows
from companion.changing import psnr, small
from companion.dalle2 import DALLE2
from companion.data import to_unit
from companion.examination import (
    Draw,
    dalle2,
    dalle2_draws,
    imagen,
    imagen_draws,
    in_parts,
    stable_diffusion,
    stable_diffusion_draws,
)
from companion.imagen import Imagen, answering, told_of
from companion.judge import Judge
from companion.measure import measurement
from companion.prompts import Prompt, marks, prompts, right
from companion.recipes import imagen as recipe
from companion.recipes.decoder import legible
from companion.recipes.encoded import SIZE, again
from companion.recipes.priors import Probe
from companion.scores import frechet, interval, mean_interval
from companion.stable_diffusion import StableDiffusion
from companion.storybook import POSITIONS, Facts, Scene, render, write
from companion.tokenizer import Tokenizer

PART = 50  # pictures at a time
PAIRS = (
    ("left", "right"), ("red", "blue"), ("house", "tree"), ("noon", "night"), ("snow", "desert"),
)  # fmt: skip

# How answers are kept in range: nothing done, cut off, or scaled by this percentile.
WAYS: dict[str, float | str | None] = {
    "none": "none", "static": None, "dynamic, 99.5 %": 0.995, "dynamic, 95 %": 0.95,
}  # fmt: skip
SCALES = (1.0, 3.0, 5.0, 10.0, 20.0)
SCALE = 5.0  # of the base, as the system has it
GUIDED = 60  # prompts, at each scale in each way

LEVELS = (0, 50, 100, 200, 400)
NOISED, TOLD = 36, 24  # pictures at each level; of these, how many are told something else too
SIDED = 20  # prompts that say left, middle, right, of each


class Reader(Protocol):
    """A tokenizer and a text encoder; ``Imagen`` and ``FrozenCLIP`` are."""

    tokenizer: Tokenizer

    def read(self, texts: list[str]) -> Any:
        """Something with ``states`` (B, N, K) and ``mask`` (B, N)."""


# --- what states hold -----------------------------------------------------------------------------


def replaced(texts: Sequence[str], old: str, new: str) -> tuple[list[str], list[str]]:
    """The texts in which a word stands once, and the same with another in its place."""
    split = [text.split() for text in texts]
    have = [words for words in split if words.count(old) == 1]
    other = [[new if word == old else word for word in words] for words in have]
    return [" ".join(words) for words in have], [" ".join(words) for words in other]


def by_row(reader: Reader, before: str, after: str) -> Tensor:
    """Row by row up to the end, how far the states of two texts of equal length lie apart."""
    one, other = reader.read([before]), reader.read([after])
    rows = int(one.mask.sum())
    errors.expect(
        rows == int(other.mask.sum()), f"{before!r} and {after!r} have not equally many pieces."
    )
    return distance(one.states[0, :rows], other.states[0, :rows])


def moved(reader: Reader, before: Sequence[str], after: Sequence[str]) -> dict[str, Tensor]:
    """How far states move when one word changes, as shares of their length, (B,) each.

    Returns:
        "own row": of the word that changed. "end": of the end token, which is what CLIP compares
        with pictures. "mean": of all rows, which is what Imagen's base gets beside them.
    """
    ids = [reader.tokenizer(list(texts)).ids for texts in (before, after)]
    own = (ids[0] != ids[1]).int().argmax(1)
    one, other = (reader.read(list(texts)) for texts in (before, after))
    each, end = torch.arange(len(before)), one.mask.sum(1) - 1
    return {
        "own row": distance(one.states[each, own], other.states[each, own]),
        "end": distance(one.states[each, end], other.states[each, end]),
        "mean": distance(told_of(*_rows(one)).pooled, told_of(*_rows(other)).pooled),
    }


def _rows(read: Any) -> tuple[Tensor, Tensor]:
    """States (B, N, K) and mask (B, N) of what a reader makes of texts."""
    return read.states, read.mask.bool()


def means(reader: Reader, texts: Sequence[str]) -> Tensor:
    """The mean of the states of all that was said, (B, K)."""
    parts = [list(texts[i : i + PART]) for i in range(0, len(texts), PART)]
    return torch.cat([told_of(*_rows(reader.read(part))).pooled for part in parts])


def readable(
    reader: Reader, known: Sequence[Scene], fresh: Sequence[Scene]
) -> dict[str, dict[str, float]]:
    """What straight lines read off the mean state of captions that say everything.

    Args:
        reader: Whose states.
        known: Scenes whose captions the lines are fitted to.
        fresh: Those that they are tried on.

    Returns:
        ``prompts.marks``: sky, place, kind, colour, position and so on.
    """
    probe = Probe(means(reader, [write(scene.facts()) for scene in known]), known)
    asked = [Prompt(write(scene.facts()), scene) for scene in fresh]
    return marks(asked, probe.read(means(reader, [prompt.text for prompt in asked])))


# --- guidance, and what becomes of pixels ---------------------------------------------------------


def kept(denoise: samplers.Denoiser, way: str) -> samplers.Denoiser:
    """The denoiser with its answers kept in range, or not, in one of ``WAYS``."""
    errors.one_of("way", way, WAYS)
    percentile = WAYS[way]
    return denoise if percentile == "none" else guidance.thresholded(denoise, percentile)


@torch.no_grad()
def draw_small(
    pipe: Imagen,
    texts: Sequence[str],
    scale: float,
    way: str = "dynamic, 95 %",
    seed: int = 0,
    answers: list[Tensor] | None = None,
) -> Tensor:
    """The base alone, as the system walks, in one of ``WAYS``; the same noise for all of them.

    Args:
        pipe: The system.
        texts: Captions.
        scale: s = 1 + w.
        way: How answers are kept in range.
        seed: Of all noise.
        answers: A list to which the network's answers are added, step by step, as they came.

    Returns:
        (B, 3, 16, 16) in [0, 1]; what lies outside is cut off at the end in any case.
    """
    scheduler, side = pipe.scheduler, pipe.unet.config.sample_size
    timesteps = scheduler.timesteps("ddpm", pipe.walks["base"][1])
    g, found = torch.Generator().manual_seed(seed), []
    for i in range(0, len(texts), PART):
        part = list(texts[i : i + PART])
        told, null = pipe.read(part), pipe.read([""] * len(part))
        asked = answering(pipe.unet, scheduler, told, null, scale)

        def denoise(x: Tensor, t: Tensor, asked: samplers.Denoiser = asked) -> Tensor:
            x0 = asked(x, t)
            if answers is not None:
                answers.append(x0)
            return x0

        x = torch.randn(len(part), 3, side, side, generator=g)
        x = scheduler.walk("ddpm", kept(denoise, way), x, timesteps, generator=g)
        found.append(to_unit(x.clamp(-1, 1)))
    return torch.cat(found)


def reach(answers: Sequence[Tensor], percentile: float = 0.995) -> Tensor:
    """How far from grey answers in [-1, 1] go, step by step: mean over pictures, (S,)."""
    return torch.stack([x.flatten(1).abs().quantile(percentile, dim=1).mean() for x in answers])


def saturated(pictures: Tensor, edge: float = 0.01) -> Tensor:
    """Share of the values of pictures in [0, 1] that lie at either end, (B,)."""
    return ((pictures <= edge) | (pictures >= 1 - edge)).float().flatten(1).mean(1)


def colourfulness(pictures: Tensor) -> Tensor:
    """Mean over pixels of the largest less the smallest of red, green and blue, (B,)."""
    return (pictures.amax(1) - pictures.amin(1)).flatten(1).mean(1)


def one_thing(n: int) -> list[Prompt]:
    """Of the fixed prompts the first ``n`` with one thing, no combination held out."""
    return [p for p in prompts() if len(p.facts.things) == 1 and not p.held_out][:n]


@measurement(
    "thresholding",
    "16 x 16 pictures by Imagen's base of prompts with one thing, by guidance scale and by what is"
    " done with answers out of range: wholly right, read by the judge after a bicubic; saturated"
    " values, colourfulness, Fréchet distance from the true pictures. The same noise throughout, 95"
    " % intervals over prompts",
    minutes=5,
    needs=("language-model", "imagen", "judge"),
)
def thresholding(
    n: int = GUIDED, scales: Sequence[float] = SCALES, pipe: Imagen | None = None
) -> dict[str, Any]:
    """Chapter 10's table of guidance and thresholding. The notebook draws a part of it again."""
    pipe, judge, asked = imagen() if pipe is None else pipe, Judge.from_pretrained(), one_thing(n)
    true = small(render([p.scene for p in asked], SIZE))
    real = judge.features(legible(true))

    def row(pictures: Tensor) -> dict[str, Any]:
        shown = legible(pictures)
        read = judge.read(shown)
        return {
            "right": interval(sum(right(asked, read)), n),
            "no scene": interval(sum(facts is None for facts in read), n),
            "saturated": mean_interval(saturated(pictures)),
            "colourfulness": mean_interval(colourfulness(pictures)),
            "Fréchet distance": frechet(real, judge.features(shown)),
        }

    rows = {
        way: {f"{s:g}": row(draw_small(pipe, [p.text for p in asked], s, way)) for s in scales}
        for way in WAYS
    }
    return {"seeds": [0], "prompts": n, "true pictures": row(true), "rows": rows}


# --- noise over the small picture -----------------------------------------------------------------


def caption_of(question: Question, **changed: str) -> str:
    """All that can be said of a question's scene; ``colour=`` or ``kind=`` say something else."""
    thing = replace(question.thing, **changed)
    return write(replace(question.scene, things=(thing,)).facts())


def enlarged(
    pipe: Imagen,
    pictures: Tensor,
    texts: Sequence[str],
    level: int,
    *,
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Small pictures (B, 3, 16, 16) in [0, 1] through the upsampler, told ``texts``.

    Args:
        pipe: The system.
        pictures: What to enlarge.
        texts: What it is told, a caption each.
        level: Timestep up to which noise is laid over the small pictures.
        seed: Of all noise; it is the same for each part of ``PART`` pictures.
        scale: Of the upsampler's guidance.
    """
    found = []
    for i in range(0, len(pictures), PART):
        g, part = torch.Generator().manual_seed(seed), pictures[i : i + PART]
        said = list(texts[i : i + PART])
        found.append(recipe.enlarge(pipe.super_res, pipe, part, said, g, level, scale=scale))
    return torch.cat(found)


@measurement(
    "noise-augmentation",
    "Imagen's upsampler, unguided, by the noise laid over the small picture: on true small pictures"
    " and on those that the base draws, told the caption, or another colour or kind; facts that the"
    " judge reads, Fréchet distance from true pictures, PSNR. 95 % intervals over pictures",
    minutes=3,
    needs=("language-model", "imagen", "imagen-upsampler", "judge"),
)
def noise_augmentation(
    n: int = NOISED,
    told: int = TOLD,
    levels: Sequence[int] = LEVELS,
    pipe: Imagen | None = None,
) -> dict[str, Any]:
    """Chapter 10's table of the upsampler."""
    pipe, judge = imagen() if pipe is None else pipe, Judge.from_pretrained()
    asked = questions(n, seed=10)
    texts = [caption_of(q) for q in asked]
    as_prompts = [Prompt(text, q.scene) for text, q in zip(texts, asked, strict=True)]
    true = render([q.scene for q in asked], SIZE)
    real, little = judge.features(true), small(true)

    def row(pictures: Tensor, own: bool = True) -> dict[str, Any]:
        read = judge.read(pictures)
        found = {k: v for k, v in marks(as_prompts, read).items() if k not in ("swapped", "stream")}
        found["right"] = interval(sum(right(as_prompts, read)), n)
        found["Fréchet distance"] = frechet(real, judge.features(pictures))
        return found | ({"PSNR": mean_interval(psnr(pictures, true))} if own else {})

    g = torch.Generator().manual_seed(10)
    drawn = draw_small(pipe, texts, SCALE)
    rows: dict[str, Any] = {
        "the same facts, drawn anew": row(render([again(q.scene, g) for q in asked], SIZE), False),
        "true, bicubic": row(legible(little)),
        "drawn, bicubic": row(legible(drawn), False),
    }
    for level in levels:
        rows[f"true, {level}"] = row(enlarged(pipe, little, texts, level))
        rows[f"drawn, {level}"] = row(enlarged(pipe, drawn, texts, level), False)
    some, beliefs = asked[:told], {}
    for what in ("colour", "kind"):
        other = [caption_of(q, **{what: getattr(q, what)}) for q in some]
        for level in levels:
            read = judge.read(enlarged(pipe, little[:told], other, level))
            beliefs.setdefault(what, {})[str(level)] = believed(some, read, what)
    return {
        "seeds": [0],
        "pictures": n,
        "told something else": told,
        "levels": list(levels),
        "rows": rows,
        "beliefs": beliefs,
    }


def believed(
    asked: Sequence[Question], read: Sequence[Facts | None], what: str
) -> dict[str, dict[str, float]]:
    """Where picture and caption disagree in one word, which of the two is shown: shares."""
    n, found = len(asked), {}
    for name, words in (
        ("the picture's", [getattr(q.thing, what) for q in asked]),
        ("the caption's", [getattr(q, what) for q in asked]),
    ):
        shown = [shows(f, what, w, q.thing.kind)
                 for f, w, q in zip(read, words, asked, strict=True)]  # fmt: skip
        found[name] = interval(sum(shown), n)
    return found


# --- left and right -------------------------------------------------------------------------------


def sided(n: int) -> dict[str, list[Prompt]]:
    """Of the fixed prompts with one thing those that say where it stands, ``n`` of each."""
    found = {where: [p for p in one_thing(1000) if p.facts.things[0].position == where]
             for where in POSITIONS}  # fmt: skip
    return {where: asked[:n] for where, asked in found.items()}


def where_it_stands(read: Sequence[Facts | None]) -> dict[str, dict[str, float]]:
    """Of pictures of one thing each: where the judge sees it; "none" if it is not one thing."""
    spots = [f.things[0].position if f is not None and len(f.things) == 1 else "none"
             for f in read]  # fmt: skip
    return {spot: interval(spots.count(spot), len(spots)) for spot in (*POSITIONS, "none")}


def sides_right(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Of the pictures that were asked for on a side, the share that have the thing on it."""
    cells = [table[side][side] for side in ("left", "right")]
    return interval(sum(round(c["value"] * c["n"]) for c in cells), int(sum(c["n"] for c in cells)))


@measurement(
    "sides",
    "Where the three systems put one thing that was asked for on the left, in the middle or on the"
    " right: one picture a prompt, read by the judge at 64 x 64 pixels, 95 % intervals",
    minutes=3,
    needs=(
        *Imagen.made_of,
        *DALLE2.made_of,
        "decoder/text_proj",
        *StableDiffusion.made_of,
        "judge",
    ),
)
def sides(n: int = SIDED, ways: Mapping[str, Draw] | None = None) -> dict[str, Any]:
    """Chapter 10's table of positions."""
    judge = Judge.from_pretrained()
    if ways is None:
        ways = {
            "Imagen": imagen_draws(imagen()),
            "DALL·E 2": dalle2_draws(dalle2()),
            "Stable Diffusion": stable_diffusion_draws(stable_diffusion()),
        }
    rows: dict[str, Any] = {}
    for name, draw in ways.items():
        table = {
            where: where_it_stands(judge.read(in_parts(draw, asked)))
            for where, asked in sided(n).items()
        }
        rows[name] = {"asked for": table, "side right": sides_right(table)}
    return {"seeds": [0], "prompts of each": n, "rows": rows}
