"""Chapter 6's experiments: the decoder led by a caption, and led by a classifier.

All pictures are those of the recipe ``decoder``, 16 x 16 pixels, told a caption and no place, or
told nothing. ``python -m companion measure guidance`` draws the same requests at many scales, each
time from the same noise, and writes down what is gained and what is paid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from companion import data, errors, guidance
from companion.decoding import SCHEDULE, WAYS, Told, answer, tell, walk
from companion.judge import Judge
from companion.measure import mean, measurement
from companion.prompts import Prompt, marks, possibilities, prompts, right, shares_right
from companion.recipes.decoder import Decoder, legible
from companion.recipes.encoded import SIZE, FrozenCLIP, reader, shrunk
from companion.recipes.noised import NoisedClassifier
from companion.samplers import Denoiser
from companion.scores import difference, frechet, interval
from companion.storybook import Facts, Scene, ThingFacts, parse, render, sample

SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0)  # of the words; 0 is told nothing
PUSHES = (1.0, 2.0, 4.0, 8.0, 16.0)  # of the classifier
# Each says two of sky, place and kind, which the classifier can be asked for too.
REQUESTS = (
    "a boat at night",
    "a cat in the snow",
    "a tree by the sea",
    "a meadow at dusk",
    "a house under the northern lights",
    "a tent in the desert",
    "a mushroom in the woods",
    "mountains in the rain",
)
COPIES = 18  # pictures of each
BLOCKS = 9  # in which pictures are left out for an interval
PARTS = 50  # pictures at a time
EXAM = 150  # prompts of the fixed list, of combinations that were not held out
WAY_SCALE = 3.0  # at which the two ways of telling a caption are compared


class Guided:
    """The decoder and the CLIP that reads for it, asked in words.

    Args:
        model: The decoder; by default the shipped one.
        clip: The CLIP that it was trained on; by default the shipped one.
    """

    def __init__(self, model: Decoder | None = None, clip: FrozenCLIP | None = None) -> None:
        self.model = (Decoder.from_pretrained() if model is None else model).eval()
        self.model.requires_grad_(False)
        self.clip = reader() if clip is None else clip
        self.schedule = SCHEDULE

    def told(self, texts: Sequence[str], entries: Collection[str] = WAYS["caption"]) -> Told:
        """What the network gets of captions alone; no entries: of nothing."""
        null = self.clip.read([""]).each(len(texts))
        nowhere = self.model.text_proj.no_image(len(texts))
        return tell(self.model.text_proj, nowhere, self.clip.read(texts), null, entries)

    def untold(self, n: int) -> Told:
        """What it gets where nothing is said."""
        return self.told([""] * n, ())

    def denoise(
        self, x: Tensor, t: Tensor, context: Tensor, added: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The clean picture, and the variance's fraction, given what is told."""
        return answer(self.model, x, t, context, added, mask)

    def walk(self, guided: Denoiser, seeds: Sequence[int], **choices: Any) -> Tensor:
        """From noise to pictures (B, 3, 16, 16): ``decoding.walk``."""
        return walk(guided, torch.empty(0), seeds, **choices)

    def draw(
        self,
        texts: Sequence[str],
        seeds: Sequence[int],
        scale: float,
        *,
        null: Sequence[str] | None = None,
        entries: Collection[str] = WAYS["caption"],
        **choices: Any,
    ) -> Tensor:
        """Pictures (B, 3, 16, 16) in [0, 1], led by their captions.

        Args:
            texts: The captions.
            seeds: One each.
            scale: s = 1 + w; 0 tells nothing at all.
            null: What guidance moves away from, if not from nothing: negative prompts.
            entries: Through which the caption comes.
            choices: For ``walk``.
        """
        errors.expect(
            scale == 0 or scale >= 1, f"scale is {scale}; expected 0, or a number of at least 1."
        )
        found = []
        for first in range(0, len(texts), PARTS):
            part = slice(first, first + PARTS)
            said, n = texts[part], len(texts[part])
            told = self.told(said, entries) if scale else self.untold(n)
            away = self.untold(n) if null is None else self.told(null[part])
            guided = guidance.classifier_free(self.denoise, told, away, max(scale, 1.0))
            found.append(self.walk(guided, seeds[part], **choices))
        return data.to_unit(torch.cat(found)).clamp(0, 1)

    def steer(
        self,
        classifier: NoisedClassifier,
        said: Mapping[str, str],
        seeds: Sequence[int],
        scale: float,
        **choices: Any,
    ) -> Tensor:
        """Pictures (B, 3, 16, 16) in [0, 1], told nothing, led by a classifier's gradient.

        Args:
            classifier: Reads noisy pictures.
            said: What to ask of it, such as ``{"sky": "dusk"}``.
            seeds: One each.
            scale: By which the gradient is multiplied.
            choices: For ``walk``.
        """
        nothing = self.untold(len(seeds))
        guided = guidance.classifier_guided(
            lambda x, t: self.denoise(x, t, *nothing),
            lambda x, t: classifier.log_prob(x, t, **said),
            scale,
            self.schedule,
        )
        return data.to_unit(self.walk(guided, seeds, **choices)).clamp(0, 1)


def askable(facts: Facts) -> dict[str, str]:
    """The part of a caption that a ``NoisedClassifier`` can be asked for."""
    said = {"sky": facts.sky, "place": facts.place}
    said["kind"] = facts.things[0].kind if facts.things else None
    return {question: answer for question, answer in said.items() if answer}


def fitting(facts: Facts, n: int, seed: int) -> list[Scene]:
    """Scenes of the world that show these facts, everything else drawn by lot."""
    g, found = torch.Generator().manual_seed(seed), []
    for _ in range(200):
        found += [scene for scene in sample(500, g) if facts.holds_for(scene.facts())]
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"Of 100,000 scenes, {len(found)} show {facts}; wanted {n}.")


def small(scenes: Sequence[Scene]) -> Tensor:
    """True pictures as a perfect decoder would draw them: (B, 3, 16, 16) in [0, 1]."""
    return shrunk(render(scenes, SIZE))


# --- what is measured of a set of pictures --------------------------------------------------------


def blocked(statistic: Callable[[Tensor], float], blocks: Tensor) -> dict[str, float]:
    """A number of a whole set, with its 95 % interval by leaving blocks of it out (jackknife).

    Args:
        statistic: ``statistic(kept)`` of the rows where ``kept`` (N,) is True.
        blocks: Which block each row belongs to, (N,) whole numbers.
    """
    from scipy.stats import t

    names = blocks.unique().tolist()
    value = statistic(torch.ones_like(blocks, dtype=torch.bool))
    without = torch.tensor([statistic(blocks != name) for name in names], dtype=torch.float64)
    n = len(names)
    spread_ = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt().item()
    half = t.ppf(0.975, n - 1) * spread_
    return {"value": value, "low": value - half, "high": value + half}


def openness(read: Sequence[Facts | None], said: Facts) -> dict[str, float]:
    """How many possibilities pictures of one request show of what it leaves open.

    The exponential of the entropy of what is seen: of sky and place, and of the kinds and colours
    of things (where the request names a kind, of those of that kind). 1: always the same.
    """
    seen = [facts for facts in read if facts is not None]
    wanted = said.things[0] if said.things else None
    found = {what: [getattr(facts, what) for facts in seen] for what in ("sky", "place")}
    found = {what: values for what, values in found.items() if getattr(said, what) is None}
    things = [t for facts in seen for t in facts.things if wanted in (None, ThingFacts(t.kind))]
    if wanted is None:
        found["kind"] = [thing.kind for thing in things]
    found["colour"] = [thing.colour for thing in things]
    return {what: possibilities(values) for what, values in found.items()}


class Requests:
    """The requests, how they are marked, and what true pictures of them get.

    Args:
        texts: Each says two of sky, place and kind.
        copies: Pictures of each; picture i of request k has seed 1000 (k + 1) + i.
        reference: True pictures of each, to which the Fréchet distance is taken.
    """

    def __init__(
        self, texts: Sequence[str] = REQUESTS, copies: int = COPIES, reference: int = 50
    ) -> None:
        self.texts, self.copies, self.judge = list(texts), copies, Judge.from_pretrained()
        self.facts = [parse(text) for text in texts]
        for text, facts in zip(texts, self.facts, strict=True):
            errors.expect(len(askable(facts)) == 2, f"{text!r} does not say two askable things.")
        n = len(self.texts)
        self.rows = [text for text in self.texts for _ in range(copies)]
        self.seeds = [1000 * (k + 1) + i for k in range(n) for i in range(copies)]
        self.blocks = torch.arange(copies).repeat(n) * min(BLOCKS, copies) // copies
        true = [fitting(f, reference, 600 + k) for k, f in enumerate(self.facts)]
        with torch.no_grad():
            shown = legible(small([scene for scenes in true for scene in scenes]))
            self.real = torch.cat([self.judge.features(part) for part in shown.split(100)])
        # The entropy of few pictures comes out too low: the measure is true scenes, as few.
        self.truth = [self._possible(k) for k in range(n)]

    def _possible(self, k: int, times: int = 20) -> dict[str, float]:
        """Possibilities in ``copies`` true scenes of request k, on average."""
        scenes = fitting(self.facts[k], self.copies * times, 700 + k)
        found: dict[str, list[float]] = {}
        for i in range(times):
            part = [s.facts() for s in scenes[i * self.copies : (i + 1) * self.copies]]
            for what, value in openness(part, self.facts[k]).items():
                found.setdefault(what, []).append(value)
        return {what: sum(values) / len(values) for what, values in found.items()}

    def true(self) -> Tensor:
        """As many true pictures, not those of the reference."""
        scenes = [s for k, f in enumerate(self.facts) for s in fitting(f, self.copies, 800 + k)]
        return small(scenes)

    @torch.no_grad()
    def look(self, pictures: Tensor) -> dict[str, Any]:
        """All that is needed of a set of pictures: readings and features."""
        shown = legible(pictures)
        read = self.judge.read(shown)
        whole = [facts is not None and said.holds_for(facts)
                 for said, facts in zip(self._said(), read, strict=True)]  # fmt: skip
        return {"right": whole, "open": self._open(read), "features": self.judge.features(shown)}

    def _said(self) -> list[Facts]:
        return [facts for facts in self.facts for _ in range(self.copies)]

    def _open(self, read: Sequence[Facts | None]) -> list[float]:
        """For each request, how much of the world's variety is left, on average of what is open.

        In logarithms, so as entropies: 1 is as varied as the world, 0 always the same.
        """
        shares = []
        for k, said in enumerate(self.facts):
            found = openness(read[k * self.copies : (k + 1) * self.copies], said)
            parts = [
                math.log(found[what]) / math.log(most)
                for what, most in self.truth[k].items()
                if most > 1
            ]
            shares.append(sum(parts) / len(parts))
        return shares

    def distance(self, features: Tensor) -> dict[str, float]:
        """Fréchet distance from true pictures of the requests."""
        return blocked(lambda kept: frechet(self.real, features[kept]), self.blocks)

    def farther(self, a: Tensor, b: Tensor) -> dict[str, float]:
        """How much farther from true pictures a is than b, drawn from the same noise."""
        return blocked(
            lambda kept: frechet(self.real, a[kept]) - frechet(self.real, b[kept]), self.blocks
        )


def compare(asked: Requests, seen: Mapping[str, Mapping[str, Any]], first: str) -> dict[str, Any]:
    """A table of sets of pictures from the same noise.

    Args:
        asked: The requests.
        seen: What ``look`` says of each set, by its scale.
        first: The scale that variety is held against.

    Returns:
        ``rows``, and for each row the differences to the most faithful, to the nearest to true
        pictures, and to ``first``, each with its interval.
    """
    rows: dict[str, Any] = {}
    for name, one in seen.items():
        rows[name] = {
            "faithful": interval(sum(one["right"]), len(one["right"])),
            "variety": mean(one["open"]),
            "frechet": asked.distance(one["features"]),
            "right": "".join(str(int(x)) for x in one["right"]),
        }
    best = max(rows, key=lambda name: rows[name]["faithful"]["value"])
    near = min(rows, key=lambda name: rows[name]["frechet"]["value"])
    for name, one in seen.items():
        rows[name]["less faithful"] = difference(seen[best]["right"], one["right"])
        rows[name]["farther"] = asked.farther(one["features"], seen[near]["features"])
        lost = [a - b for a, b in zip(seen[first]["open"], one["open"], strict=True)]
        rows[name]["variety lost"] = mean(lost)
    return {"most faithful": best, "nearest": near, "first": first, "rows": rows}


@measurement(
    "guidance",
    "The decoder told a caption at many guidance scales, and told nothing and led by a classifier:"
    " faithfulness, what is left of the world's variety in what the caption leaves open, and"
    " Fréchet distance from true pictures, with 95 % intervals; the same noise at every scale",
    minutes=12,
    needs=("clip", "text-encoder", "decoder", "decoder/text_proj", "judge", "noised-classifier"),
)
def guidance_bill(
    scales: Sequence[float] = SCALES,
    pushes: Sequence[float] = PUSHES,
    copies: int = COPIES,
    exam: int = EXAM,
    ways: int = 100,
    texts: Sequence[str] = REQUESTS,
) -> dict[str, Any]:
    """Chapter 6's tables.

    Args:
        scales: Of classifier-free guidance.
        pushes: Of classifier guidance.
        copies: Pictures of each request.
        exam: Prompts of the fixed list.
        ways: Of these, how many are told through one entry only.
        texts: The requests.
    """
    drawer, asked = Guided(), Requests(texts, copies)
    classifier = NoisedClassifier.from_pretrained().requires_grad_(False)

    seen = {f"{s:g}": asked.look(drawer.draw(asked.rows, asked.seeds, s)) for s in scales}
    led = {"0": seen["0"]}
    for scale in pushes:
        parts = [
            drawer.steer(classifier, askable(facts), asked.seeds[k * copies :][:copies], scale)
            for k, facts in enumerate(asked.facts)
        ]
        led[f"{scale:g}"] = asked.look(torch.cat(parts))
    truth = asked.look(asked.true())

    listed = [p for p in prompts() if not p.held_out][:exam]
    captions, seeds = [p.text for p in listed], list(range(exam))
    real = small([p.scene for p in listed])
    drawn = {f"{s:g}": drawer.draw(captions, seeds, s) for s in scales}
    table = {name: examined(asked.judge, listed, x, real) for name, x in drawn.items()}
    by_way = {"both": drawn[f"{WAY_SCALE:g}"][:ways]} if WAY_SCALE in scales else {}
    for name, entry in (
        ("a vector", WAYS["caption"][:1]),
        ("a row of tokens", WAYS["caption"][1:]),
    ):
        by_way[name] = drawer.draw(captions[:ways], seeds[:ways], WAY_SCALE, entries=entry)
    return {
        "seeds": [*asked.seeds[::copies], seeds[0]],  # of the first picture of each row
        "requests": list(asked.texts),
        "copies": copies,
        "words": compare(asked, seen, "1"),
        "classifier": compare(asked, led, "0"),
        "true": {
            "faithful": interval(sum(truth["right"]), len(truth["right"])),
            "variety": mean(truth["open"]),
            "frechet": asked.distance(truth["features"]),
        },
        "exam": {"true": examined(asked.judge, listed, real, real), **table},
        "ways": {
            name: examined(asked.judge, listed[:ways], x, real[:ways]) for name, x in by_way.items()
        },
    }  # fmt: skip


@torch.no_grad()
def examined(
    judge: Judge, asked: Sequence[Prompt], pictures: Tensor, true: Tensor
) -> dict[str, Any]:
    """The exam on prompts of the fixed list: what is right, and the distance from true pictures."""
    shown = legible(pictures)
    read = judge.read(shown)
    features, real = judge.features(shown), judge.features(legible(true))
    blocks = torch.arange(len(asked)) % BLOCKS
    return {
        "facts": mean(shares_right(asked, read)),
        "everything said": interval(sum(right(asked, read)), len(asked)),
        "marks": marks(asked, read),
        "frechet": blocked(lambda kept: frechet(real, features[kept]), blocks),
    }


def verdicts(table: Mapping[str, Any]) -> list[str]:
    """What ``compare`` found, in sentences; a difference counts where its interval leaves out 0."""
    rows = table["rows"]
    names = sorted(rows, key=float)
    best, near, first = table["most faithful"], table["nearest"], table["first"]
    enough = next(n for n in names if rows[n]["less faithful"]["low"] <= 0)
    tied = [n for n in names if rows[n]["farther"]["low"] <= 0]
    lost = [n for n in names if float(n) > float(first) and rows[n]["variety lost"]["low"] > 0]
    said = [f"Faithfulness is highest at {best}; the smallest scale that cannot be told from it is"
            f" {enough}."]  # fmt: skip
    said.append(
        f"Variety is measurably lower than at {first} from {lost[0]} on."
        if lost
        else f"No scale measurably loses variety against {first}."
    )
    said.append(
        f"The Fréchet distance is lowest at {near}; within the noise of this many pictures, so is"
        f" it at {' and '.join(n for n in tied if n != near)}."
        if len(tied) > 1
        else f"The Fréchet distance is lowest at {near}, and measurably higher everywhere else."
    )
    return said
