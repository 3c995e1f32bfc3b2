"""Chapter 7's measurement: ways from a caption to a place in CLIP's space, side by side.

DALL·E 2's decoder wants a picture's place. A caption has only its own embedding, which lies
elsewhere (chapter 5). ``python -m companion measure priors`` has the decoder draw the committed
prompts from what each way makes of them, with the same noise for all, and lets the judge read.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import checkpoints, errors
from companion.judge import Judge
from companion.measure import measurement
from companion.prior import Prior
from companion.prior_ar import ARPrior
from companion.prompts import Prompt, marks, prompts, right, shares_right, variety
from companion.recipes import priors
from companion.recipes.decoder import Decoder, decode, legible
from companion.recipes.encoded import (
    GROUP,
    SIZE,
    Encoded,
    FrozenCLIP,
    again,
    shrunk,
)
from companion.scores import difference, frechet, interval, mean_interval
from companion.storybook import Facts, parse, render
from companion.unclip import Words

PROMPTS, ALONE = 400, 150  # drawn from place and caption; from the place alone
PART = 25  # prompts that are drawn together, from noise that depends on their number only
PROBED = 200  # prompts for candidates and guidance, which linear probes read from the places
CANDIDATES, SCALES = (1, 2, 4), (1.0, 2.0, 4.0)
OPEN = ("a red house", "a cat", "a tent at night")  # captions that leave much unsaid
DRAWS = 40  # of each of them

NOWHERE = "no place"
OWN, MOVED, LINE = "the caption's own embedding", "moved by the gap", "a straight line"
TOKENS, DIFFUSION, TRUE = "autoregressive prior", "diffusion prior", "the true picture's place"
WAYS = (NOWHERE, OWN, MOVED, LINE, TOKENS, DIFFUSION, TRUE)


def straight_line(texts: Tensor, pictures: Tensor) -> Tensor:
    """The matrix (D + 1, D) that takes captions (n, D) nearest to their pictures (n, D).

    Least squares: its answer is the best guess that a straight line has for the *mean* of the
    pictures that fit a caption. The last row is added to all.
    """
    x = torch.cat([texts, torch.ones(len(texts), 1).to(texts)], dim=1).double()
    found = torch.linalg.lstsq(x, pictures.double(), rcond=1e-5, driver="gelsd")
    return found.solution.to(texts.dtype)


def paired(a: Sequence[bool], b: Sequence[bool]) -> dict[str, float]:
    """How much oftener ``a`` holds than ``b``, asked of the same things, and of how many."""
    return difference(a, b, draws=10_000) | {"n": len(a)}


class Ways:
    """All that lead from captions to places, opened once.

    Args:
        data: Where means, spreads, the gap and the straight line are taken from.
    """

    def __init__(self, data: Encoded | None = None) -> None:
        data = Encoded() if data is None else data
        self.clip: FrozenCLIP = data.clip
        self.pictures, self.captions = data.measured()  # (n, D) twice
        self.mean, self.std = self.pictures.mean(0), self.pictures.std(0)
        self.gap = self.mean - self.captions.mean(0)
        self.line = straight_line(self.captions, self.pictures)
        self.diffusion = Prior.from_pretrained(checkpoints.WEIGHTS / "prior").eval()
        self.tokens = ARPrior.from_pretrained(checkpoints.WEIGHTS / "prior-ar").eval()
        self.decoder = Decoder.from_pretrained().eval()
        self.null = self.clip.read([""])

    @torch.no_grad()
    def places(
        self,
        way: str,
        words: Words,
        seed: int,
        *,
        true: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Places (B, D) for captions.

        Args:
            way: One of ``WAYS``.
            words: The captions.
            seed: Of the priors' chance.
            true: The places of the true pictures, which ``TRUE`` gives back.
            scale: Guidance of the priors.
        """
        errors.one_of("way", way, WAYS)
        null = self.null.each(len(words.mask))
        g = torch.Generator().manual_seed(seed)
        z = words.embedding
        if way == NOWHERE:
            return self.decoder.text_proj.no_image(len(z))
        if way == LINE:
            return torch.cat([z, torch.ones(len(z), 1)], dim=1) @ self.line
        if way == TOKENS:
            return priors.draw_by_tokens(self.tokens, words, null, g, scale)
        if way == DIFFUSION:
            return priors.draw_by_diffusion(self.diffusion, words, null, g, scale)
        if way == TRUE:
            errors.expect(true is not None, "the true places are missing: give true=.")
            return true
        return z + self.gap if way == MOVED else z

    def draw(self, place: Tensor, words: Words, seed: int, alone: bool = False) -> Tensor:
        """What the decoder draws from places, (B, 3, 16, 16) in [0, 1].

        ``alone``: it is not told the caption.
        """
        null = self.null.each(len(place))
        said, g = null if alone else words, torch.Generator().manual_seed(seed)
        return decode(self.decoder, place, said, null, g)

    def units(self, place: Tensor) -> Tensor:
        """Places less their mean, in units of their spread: as the prior sees them."""
        return (place - self.mean) / self.std

    def near(self, place: Tensor, other: Tensor) -> Tensor:
        """Cosines of places (B, D) with others, in these units, (B,)."""
        return F.cosine_similarity(self.units(place), self.units(other))


def facts_right(asked: Sequence[Prompt], seen: Sequence[Facts | None]) -> dict[str, float]:
    """The share of all facts said that are there, with the 95 % interval of a mean of prompts."""
    return mean_interval(torch.tensor(shares_right(asked, seen), dtype=torch.float64))


def best_of(drawn: Tensor, text: Tensor) -> Tensor:
    """Of several places for each caption, (B, n, D), the one with the largest dot product with the
    caption's embedding, (B, D) -> (B, D)."""
    fit = (drawn * text[:, None]).sum(-1)
    return drawn[torch.arange(len(drawn)), fit.argmax(1)]


@measurement(
    "priors",
    "Ways from a caption to a place in CLIP's space: what the judge reads from 16 x 16 pictures"
    " that the decoder draws from each, with the caption and without it, from the same noise;"
    " nearness to the true place; cost; candidates, guidance and variety of the diffusion prior",
    minutes=20,
    needs=("clip", "text-encoder", "decoder", "decoder/text_proj", "judge", "prior", "prior-ar"),
)
def compare(
    n: int = PROMPTS,
    alone: int = ALONE,
    probed: int = PROBED,
    draws: int = DRAWS,
    data: Encoded | None = None,
) -> dict[str, Any]:
    """Chapter 7's tables."""
    data = Encoded() if data is None else data
    ways, judge = Ways(data), Judge.from_pretrained()
    asked = list(prompts()[:n])
    scenes = [p.scene for p in asked]
    pictures = render(scenes, SIZE)
    true = ways.clip.see(pictures)
    g = torch.Generator().manual_seed(7)
    others = ways.clip.see(render([again(scene, g) for scene in scenes], SIZE))
    small = shrunk(pictures)
    readings = {"true pictures": judge.read(legible(small))}
    told = right(asked, readings["true pictures"])
    rows: dict[str, dict[str, Any]] = {
        "true pictures": {"told": _marked(asked, readings["true pictures"], told)},
        "another picture": _nearness(ways, others, true),
    }
    held: dict[str, dict[str, list[bool]]] = {}
    for way in WAYS:
        found: dict[str, Any] = {}
        place, seconds = _all_places(ways, way, asked, true)
        if way != NOWHERE:
            found |= _nearness(ways, place, true) | {"milliseconds a place": 1000 * seconds / n}
        for mode, count in (("told", n), ("alone", alone)):
            if (way, mode) == (NOWHERE, "alone"):
                continue  # told neither, it draws whatever it likes
            drawn = _all_pictures(ways, place[:count], asked[:count], mode == "alone")
            seen = judge.read(legible(drawn))
            held.setdefault(mode, {})[way] = right(asked[:count], seen)
            found[mode] = _marked(asked[:count], seen, held[mode][way])
        rows[way] = found
    differences = {
        mode: {way: paired(by[DIFFUSION], by[way]) for way in by if way != DIFFUSION}
        for mode, by in held.items()
    }
    probe = priors.Probe(ways.pictures, _about(data, len(ways.pictures)))
    parameters = {
        name: sum(p.numel() for p in model.parameters() if p.requires_grad)
        for name, model in ((TOKENS, ways.tokens), (DIFFUSION, ways.diffusion))
    }
    parameters[LINE] = ways.line.numel()
    return {
        "seeds": [0],
        "prompts": n,
        "prompts, place alone": alone,
        "part": PART,
        "parameters": parameters,
        "rows": rows,
        "differences": differences,
        "candidates": _candidates(ways, probe, asked[:probed], true[:probed]),
        "guidance": _guidance(ways, probe, asked[:probed], true[:probed]),
        "variety": _variety(ways, judge, probe, data, draws),
    }


def _marked(
    asked: Sequence[Prompt], seen: Sequence[Facts | None], whole: list[bool]
) -> dict[str, Any]:
    """Everything right, with its interval and prompt by prompt; marks; the share of facts."""
    return {
        "everything": interval(sum(whole), len(whole)),
        "prompt by prompt": "".join("01"[x] for x in whole),
        "facts": facts_right(asked, seen),
        "marks": marks(asked, seen),
    }


def _nearness(ways: Ways, place: Tensor, true: Tensor) -> dict[str, Any]:
    return {
        "cosine": mean_interval(ways.near(place, true)),
        "Fréchet distance": frechet(ways.units(place), ways.units(true)),
        "length": mean_interval(place.norm(dim=1)),
    }


def _parts(asked: Sequence[Prompt]) -> list[tuple[int, list[str]]]:
    texts = [p.text for p in asked]
    return [(k // PART, texts[k : k + PART]) for k in range(0, len(texts), PART)]


def _all_places(
    ways: Ways, way: str, asked: Sequence[Prompt], true: Tensor, scale: float = 1.0
) -> tuple[Tensor, float]:
    """Places of all prompts, and the processor seconds for them (reading the captions apart)."""
    found, seconds = [], 0.0
    for k, texts in _parts(asked):
        words = ways.clip.read(texts)
        there = true[k * PART : k * PART + len(texts)]
        started = time.process_time()
        found.append(ways.places(way, words, k, true=there, scale=scale))
        seconds += time.process_time() - started
    return torch.cat(found), seconds


def _all_pictures(
    ways: Ways, place: Tensor, asked: Sequence[Prompt], alone: bool = False
) -> Tensor:
    found = []
    for k, texts in _parts(asked):
        here = place[k * PART : k * PART + len(texts)]
        found.append(ways.draw(here, ways.clip.read(texts), k, alone))
    return torch.cat(found)


def _about(data: Encoded, n: int) -> list:
    return [scene for k in range(-(-n // GROUP)) for scene in data.group(k).about][:n]


def _probed(
    ways: Ways, probe: priors.Probe, asked: Sequence[Prompt], place: Tensor, true: Tensor
) -> dict[str, Any]:
    text = ways.clip.read([p.text for p in asked]).embedding
    return {
        "facts": facts_right(asked, probe.read(place)),
        "cosine": mean_interval(ways.near(place, true)),
        "dot product": mean_interval((place * text).sum(1)),
        "Fréchet distance": frechet(ways.units(place), ways.units(true)),
    }


def _candidates(
    ways: Ways, probe: priors.Probe, asked: Sequence[Prompt], true: Tensor
) -> dict[str, Any]:
    """The best of several by dot product, read by the probe; beside it the true places."""
    found, drawn, text = {"true": _probed(ways, probe, asked, true, true)}, [], []
    for k, texts in _parts(asked):
        words = ways.clip.read(texts)
        many = ways.places(DIFFUSION, words.each(max(CANDIDATES)), k)
        drawn.append(many.unflatten(0, (len(texts), -1)))
        text.append(words.embedding)
    every, said = torch.cat(drawn), torch.cat(text)
    for n in CANDIDATES:
        found[str(n)] = _probed(ways, probe, asked, best_of(every[:, :n], said), true)
    return found


def _guidance(
    ways: Ways, probe: priors.Probe, asked: Sequence[Prompt], true: Tensor
) -> dict[str, Any]:
    found = {}
    for scale in SCALES:
        place, _ = _all_places(ways, DIFFUSION, asked, true, scale)
        found[f"{scale:g}"] = _probed(ways, probe, asked, place, true)
    return found


def _variety(
    ways: Ways, judge: Judge, probe: priors.Probe, data: Encoded, draws: int
) -> dict[str, Any]:
    """How many skies and places come of captions that name none.

    ``places``: read by the probe from what is drawn in CLIP's space, by prior, guidance and
    candidates. ``pictures``: read by the judge from what is decoded, with the caption told.
    ``true``: of known pictures of which the caption is true.
    """
    settings: dict[str, tuple[str, float, int]] = {
        f"diffusion, guidance {s:g}": (DIFFUSION, s, 1) for s in SCALES
    }
    settings["diffusion, best of 4"] = (DIFFUSION, 1.0, 4)
    settings["autoregressive"] = (TOKENS, 1.0, 1)
    found: dict[str, dict[str, list[dict[str, float]]]] = {"places": {}, "pictures": {}, "true": {}}
    known = _about(data, len(ways.pictures))
    for number, text in enumerate(OPEN):
        words, said = ways.clip.read([text]).each(draws), parse(text)
        for name, (way, scale, best) in settings.items():
            drawn = ways.places(way, words.each(best), 100 + number, scale=scale)
            drawn = best_of(drawn.unflatten(0, (draws, best)), words.embedding)
            found["places"].setdefault(name, []).append(_varied(probe.read(drawn), said))
        for way in (NOWHERE, OWN, MOVED, LINE, TOKENS, DIFFUSION):
            place = ways.places(way, words, 100 + number)
            small = ways.draw(place, words, 100 + number)
            seen = judge.read(legible(small))
            found["pictures"].setdefault(way, []).append(_varied(seen, said))
        fits = [s.facts() for s in known if len(s.things) == 1 and said.holds_for(s.facts())]
        found["true"].setdefault("pictures that fit", []).append(_varied(fits, said))
    return {
        "captions": list(OPEN),
        "draws": draws,
        "rows": {
            kind: {name: _mean_variety(of) for name, of in by.items()} for kind, by in found.items()
        },
    }


def _varied(seen: Sequence[Facts | None], said: Facts) -> dict[str, float]:
    """``variety``, and nothing where no picture shows a scene."""
    return variety(seen, said) if any(facts is not None for facts in seen) else {}


def _mean_variety(found: Sequence[dict[str, float]]) -> dict[str, float]:
    means = {}
    for what in ("sky", "place"):
        values = [one[what] for one in found if what in one]
        if values:
            means[what] = sum(values) / len(values)
    return means
