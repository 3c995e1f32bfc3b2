"""What a place in CLIP's space says of two things, and what the decoder makes of it (chapter 9).

A picture of two things is varied from its place alone. Which kinds and colours it shows can be read
from the place by a small network that learns nothing else; whether the decoder draws them too, the
judge says. Where both halves of a picture draw the same thing, CLIP is asked to choose among
several (``python -m companion measure doubles``), or the decoder is taught on (``decoder-longer``).

Letters: B pictures, D the width of CLIP's space.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from companion import checkpoints
from companion.changing import (
    NEEDS,
    SCALE,
    TRIES,
    TUNED,
    VARIED_SEED,
    decode,
    known,
    marks,
    see,
    told,
)
from companion.examination import dalle2
from companion.judge import Judge
from companion.measure import measurement
from companion.recipes import RECIPES
from companion.recipes.decoder import Decoder, legible
from companion.recipes.encoded import SIZE
from companion.repeating import run
from companion.scores import interval
from companion.storybook import COLOURS, KINDS, POSITIONS, Facts, Scene, render, sample

FITTED = 16_384  # places that the small network learns from
TWO, TWO_SEED = 300, 906  # scenes of two things that differ in kind and in colour
ANY = 600  # scenes of any kind; the first of them are those of ``variations``
DRAWN = 4  # variations of each, of which CLIP chooses one
LONGER_SEED = 1  # of the batches that the decoder is taught on with: other ones than it has seen

# What can be true of a picture: a kind, a colour, a kind in a colour, a kind at a position.
SAYINGS: tuple[Hashable, ...] = (
    *KINDS, *COLOURS, *product(KINDS, COLOURS), *product(KINDS, POSITIONS)
)  # fmt: skip
COLUMN = {saying: i for i, saying in enumerate(SAYINGS)}


def true_of(scenes: Sequence[Scene]) -> np.ndarray:
    """Which of SAYINGS are true of which scene: (n, len(SAYINGS)), 0 or 1."""
    found = np.zeros((len(scenes), len(SAYINGS)), dtype=int)
    for row, scene in zip(found, scenes, strict=True):
        for t in scene.things:
            sayings = (t.kind, t.colour, (t.kind, t.colour), (t.kind, t.position))
            row[[COLUMN[saying] for saying in sayings]] = 1
    return found


class Sayings:
    """A small network that says of a place what the picture there shows, wherever it stands.

    Unlike the straight lines of ``recipes.priors.Probe`` it can bend, and is not asked for each
    position by itself: kinds and colours first, then what belongs to what.

    Args:
        places: (n, D).
        scenes: What they show.
    """

    def __init__(self, places: Tensor, scenes: Sequence[Scene]) -> None:
        from sklearn.neural_network import MLPClassifier

        self.mean, self.std = places.mean(0), places.std(0)
        self.network = MLPClassifier(
            (512,), alpha=0.01, batch_size=128, max_iter=80,
            early_stopping=True, n_iter_no_change=5, random_state=0,
        )  # fmt: skip
        self.network.fit(self._of(places), true_of(scenes))

    def _of(self, places: Tensor) -> np.ndarray:
        return ((places - self.mean) / self.std).numpy()

    def odds(self, places: Tensor) -> np.ndarray:
        """Log odds of each of SAYINGS, (B, len(SAYINGS))."""
        p = self.network.predict_proba(self._of(places)).clip(1e-6, 1 - 1e-6)
        return np.log(p / (1 - p))


def of_two(odds: np.ndarray, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """How much of two things that differ in kind and in colour is believed: shares, intervals.

    Returns:
        "kinds", "colours": of the things', those among the two that are believed most. "whose
        colour", "which side": scenes whose things are believed as they are rather than with their
        colours, or their positions, exchanged; by chance one half.
    """
    right: Counter[str] = Counter()
    for row, scene in zip(odds, scenes, strict=True):
        a, b = scene.things
        believed = lambda *sayings, row=row: sum(row[COLUMN[s]] for s in sayings)  # noqa: E731
        for name, words, true in (
            ("kinds", KINDS, {a.kind, b.kind}),
            ("colours", COLOURS, {a.colour, b.colour}),
        ):
            likeliest = sorted(words, key=believed)[-2:]
            right[name] += len(true & set(likeliest))
        for name, x, y in (
            ("whose colour", a.colour, b.colour),
            ("which side", a.position, b.position),
        ):
            as_is = believed((a.kind, x), (b.kind, y))
            right[name] += int(as_is > believed((a.kind, y), (b.kind, x)))
    n = len(scenes)
    return {
        name: interval(right[name], 2 * n if name in ("kinds", "colours") else n)
        for name in ("kinds", "colours", "whose colour", "which side")
    }


def of_drawings(
    read: Sequence[Facts | None], scenes: Sequence[Scene]
) -> dict[str, dict[str, float]]:
    """What pictures show in place of two things that differ in kind and in colour.

    Returns:
        Of all: "kinds, both", "kinds, one twice", "kinds, a stranger", the same for colours, and
        "not two things". "whose colour": of those with both kinds and both colours, as it was;
        "which side": of those with both kinds.
    """
    counts: Counter[str] = Counter()
    for seen, scene in zip(read, scenes, strict=True):
        if seen is None or len(seen.things) != 2:
            counts["not two things"] += 1
            continue
        whole = True
        for name, what in (("kinds", "kind"), ("colours", "colour")):
            true = {getattr(t, what) for t in scene.things}
            here = {getattr(t, what) for t in seen.things}
            found = "both" if here == true else "one twice" if here < true else "a stranger"
            counts[f"{name}, {found}"] += 1
            whole &= found == "both"
            if what == "kind" and found == "both":
                at = {t.kind: t.position for t in scene.things}
                counts["asked which side"] += 1
                counts["which side"] += all(at[t.kind] == t.position for t in seen.things)
        if whole:
            owner = {t.kind: t.colour for t in scene.things}
            counts["asked whose"] += 1
            counts["whose colour"] += all(owner[t.kind] == t.colour for t in seen.things)
    ways = ("both", "one twice", "a stranger")
    names = [f"{name}, {way}" for name in ("kinds", "colours") for way in ways]
    found = {name: interval(counts[name], len(scenes)) for name in (*names, "not two things")}
    for name, asked in (("whose colour", "asked whose"), ("which side", "asked which side")):
        if counts[asked]:
            found[name] = interval(counts[name], counts[asked])
    return found


def chosen(drawn: Tensor, there: Tensor, wanted: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of several pictures for each place the one that CLIP puts nearest to it.

    Args:
        drawn: (k, B, 3, H, W).
        there: Where CLIP puts them, (k, B, D).
        wanted: The places that they were drawn from, (B, D).
        mean: Of places, (D,); nearness is the cosine of what is left without it,
        std: in units of their spread, (D,).

    Returns:
        (B, 3, H, W).
    """
    near = F.cosine_similarity((there - mean) / std, (wanted - mean) / std, dim=-1)  # (k, B)
    return drawn[near.argmax(0), torch.arange(drawn.shape[1])]


def two_things(n: int) -> list[Scene]:
    """Scenes of two things that differ in kind and in colour."""
    g, found = torch.Generator().manual_seed(TWO_SEED), []
    while len(found) < n:
        (scene,) = sample(1, g, things=(2,))
        a, b = scene.things
        if a.kind != b.kind and a.colour != b.colour:
            found.append(scene)
    return found


def any_scenes(n: int) -> list[Scene]:
    """Scenes of up to two things, those of ``changing.variations`` first."""
    return sample(n, torch.Generator().manual_seed(VARIED_SEED))


@measurement(
    "doubles",
    "What a small network reads of two things from a picture's place; what is drawn in their stead"
    " from the place alone, by one variation and by the one of four that CLIP puts nearest; and"
    " which facts of any scene those two ways keep. 95 % intervals over pictures",
    minutes=10,
    needs=NEEDS,
)
def doubles(
    n: int = TWO, fitted: int = FITTED, varied: int = ANY, tries: int = DRAWN
) -> dict[str, Any]:
    """Chapter 9: where the kinds and colours of two things get lost."""
    pipe, judge = dalle2(), Judge.from_pretrained()
    places, scenes = known(pipe, fitted)
    reader = Sayings(places, scenes)
    two, any_ = two_things(n), any_scenes(varied)

    def ways(of: Sequence[Scene]) -> dict[str, list[Facts | None]]:
        wanted = see(pipe, render(of, SIZE))
        drawn = torch.stack(
            [legible(decode(pipe, wanted, scale=SCALE, seed=k)) for k in range(tries)]
        )
        there = torch.stack([see(pipe, pictures) for pictures in drawn])
        best = chosen(drawn, there, wanted, reader.mean, reader.std)
        return {"one": judge.read(drawn[0]), "the nearest": judge.read(best)}

    return {
        "seeds": [TWO_SEED],
        "scale": SCALE,
        "fitted": fitted,
        "tries": tries,
        "said": of_two(reader.odds(see(pipe, render(two, SIZE))), two),
        "drawn": {way: of_drawings(read, two) for way, read in ways(two).items()},
        "kept": {way: marks(read, any_) for way, read in ways(any_).items()},
    }


@measurement(
    "decoder-longer",
    "The shipped decoder taught on by its own recipe for as many steps as it had: what it draws"
    " from the places of two things, and which facts of any scene it keeps, as in doubles; and the"
    " changes told in words, as in text-diffs. 95 % intervals over pictures",
    minutes=50,
    needs=NEEDS,
)
def decoder_longer(
    steps: int = RECIPES["decoder"].steps,
    n: int = TWO,
    varied: int = ANY,
    tried: int = TRIES,
    out: Path = Path("runs/decoder-longer"),
) -> dict[str, Any]:
    """Whether more of the same training brings the lost kinds and colours. The run can resume."""
    card = checkpoints.read_card(checkpoints.WEIGHTS / "decoder")
    # From the shipped weights on; what matters of the result is measured here, and not for a card.
    recipe = replace(
        RECIPES["decoder"], model=lambda encoded: Decoder.from_pretrained(), score=None
    )
    final = run(recipe, out, steps, LONGER_SEED, card["precision"])
    pipe, judge, longer = dalle2(), Judge.from_pretrained(), Decoder.from_pretrained(final)
    pipe.decoder, pipe.text_proj = longer.unet, longer.text_proj

    def read(of: Sequence[Scene]) -> list[Facts | None]:
        drawn = decode(pipe, see(pipe, render(of, SIZE)), scale=SCALE)
        return judge.read(legible(drawn))

    two, any_ = two_things(n), any_scenes(varied)
    return {
        "seeds": [TWO_SEED],
        "steps": steps,
        "drawn": of_drawings(read(two), two),
        "kept": marks(read(any_), any_),
        "told": {
            way: cell["both"]
            for way, cell in told(pipe, judge, tried, min(TUNED, tried))["rows"]["all"].items()
        },
    }
