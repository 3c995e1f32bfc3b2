"""Chapter 16's experiments: what a seed fixes, when a picture is decided, what words can say.

A ``Machine`` is the one walk of a system in which its picture comes about, made so that it can be
told other words half-way; ``MACHINES`` has one entry a system. The judge reads what came of it. The
tables are made by ``python -m companion measure NAME``, with NAME one of ``what-a-seed-fixes``,
``when-decided``, ``said-and-seen``, ``four-forms`` and ``unknown-words``.

Letters: B pictures, S seeds, P prompts, N tokens of K channels, D the width of CLIP's space.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import data, errors, examination, samplers
from companion.asking import distance, rows_of
from companion.changing import apart as away
from companion.dalle2 import DALLE2
from companion.imagen import Imagen, Told, drawing
from companion.judge import Judge
from companion.measure import mean, measurement
from companion.pipeline import System
from companion.prompts import possibilities, swapped
from companion.recipes.decoder import legible
from companion.recipes.encoded import READERS, FrozenCLIP, reader
from companion.scheduler import Scheduler
from companion.scores import difference, interval, mean_interval
from companion.stable_diffusion import StableDiffusion
from companion.storybook import (
    COLOURS,
    KINDS,
    PLACES,
    POSITIONS,
    SKIES,
    Facts,
    Scene,
    ThingFacts,
    is_held_out,
    render,
    sample,
    write,
)
from companion.storybook.words import KIND_NOUNS, PLACE_PHRASES, POSITION_PHRASES, SKY_PHRASES
from companion.unclip import Walk, Words

STEPS = 25  # of DDIM, in every walk here: nothing is random once the noise has been drawn
PARTS = 50  # pictures at a time
WORDS = {"sky": SKIES, "place": PLACES, "kind": KINDS, "colour": COLOURS, "position": POSITIONS}
FACTS = tuple(WORDS)

Given = tuple[Tensor, ...]  # what a walk's network is told, B rows each


# --- the machines ---------------------------------------------------------------------------------


class Machine(ABC):
    """One system's walk from noise to something that the judge can read.

    Attributes:
        needs: The shipped weights that it is made of.
        dice: What is drawn by lot in it. The last is the noise that the walk itself starts from;
            one before it is drawn while the words are told.
    """

    needs: ClassVar[tuple[str, ...]]
    dice: ClassVar[tuple[str, ...]] = ("the noise",)
    pipe: System
    scheduler: Scheduler
    shape: tuple[int, ...]  # of what the walk works on, without B

    @classmethod
    @abstractmethod
    def open(cls) -> Self:
        """With the shipped weights."""

    @abstractmethod
    def tell(self, texts: Sequence[str], seeds: Sequence[int]) -> Given:
        """What the walk is told of each text; ``seeds`` are for the first of two dice."""

    @abstractmethod
    def guided(self, given: Given) -> samplers.Denoiser:
        """The walk's network, told so, and led away from nothing said."""

    @abstractmethod
    def show(self, x: Tensor) -> Tensor:
        """What the walk ends with, or a guess at it, as pictures (B, 3, 64, 64) in [0, 1]."""

    @property
    def timesteps(self) -> Tensor:
        """Of the walk, descending."""
        return self.scheduler.timesteps("ddim", STEPS, **self._spacing)

    _spacing: ClassVar[dict[str, Any]] = {}
    _clip: ClassVar[bool] = True

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """What the walk starts from, (B, …): the same seed, the same noise, whatever is told."""
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.pipe.noise((len(seeds), *self.shape), sources, None)

    @torch.no_grad()
    def draw(
        self,
        given: Given,
        seeds: Sequence[int],
        *,
        then: Given | None = None,
        at: int | None = None,
        start: Tensor | None = None,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """Pictures (B, 3, 64, 64), told one thing at first and perhaps another later.

        Args:
            given: What is told, a row for each picture.
            seeds: The noise that each starts from.
            then: What is told from step ``at`` on, counted from 0.
            at: From 0 to ``STEPS``, which is never; default: never.
            start: Noise (B, …) to start from, instead of the seeds'.
            callback: Called as ``callback(i, t, x, x0_hat)`` in each step, part by part.
        """
        at = STEPS if at is None else at
        errors.number("at", at, low=0, high=STEPS, integer=True)
        errors.expect(
            all(len(part) == len(seeds) for part in (*given, *(then or ()))),
            f"there are {len(seeds)} seeds; expected a row of all that is told for each.",
        )
        found, timesteps = [], self.timesteps
        for first in range(0, len(seeds), PARTS):
            part = slice(first, first + PARTS)
            denoise = self.guided(tuple(x[part] for x in given))
            if then is not None:
                later = self.guided(tuple(x[part] for x in then))
                denoise = switched(denoise, later, timesteps, at)
            x = self.noise(seeds[part]) if start is None else start[part]
            x = self.scheduler.walk(
                "ddim", denoise, x, timesteps, generator=None, callback=callback, clip=self._clip
            )
            found.append(self.show(x))
        return torch.cat(found)

    def say(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures of texts, every die thrown with the same seed."""
        return self.draw(self.tell(texts, seeds), seeds)


def switched(
    first: samplers.Denoiser, then: samplers.Denoiser, timesteps: Tensor, at: int
) -> samplers.Denoiser:
    """A denoiser that is ``first`` in the steps before ``at`` and ``then`` from it on."""
    level = timesteps[at].item() if at < len(timesteps) else -1.0
    return lambda x, t: (then if t.flatten()[0].item() <= level else first)(x, t)


class Latents(Machine):
    """Stable Diffusion: the walk of the latents, by the examination's scale."""

    needs = StableDiffusion.made_of
    _spacing = {"steps_offset": 1}  # as the system itself has it
    _clip = False

    def __init__(self, pipe: StableDiffusion) -> None:
        self.pipe, self.scheduler = pipe, pipe.scheduler
        size = pipe.unet.config.sample_size
        self.shape = (pipe.vae.config.latent_channels, size, size)
        self.null = pipe.encode_prompts([""], None, 1, 1.0)[0]  # (1, N, K)

    @classmethod
    def open(cls) -> Self:
        return cls(examination.stable_diffusion())

    def tell(self, texts: Sequence[str], seeds: Sequence[int]) -> Given:
        return (self.pipe.encode_prompts(list(texts), None, 1, 1.0, truncate=True)[0],)

    def guided(self, given: Given, scale: float = examination.SD_GUIDANCE) -> samplers.Denoiser:
        return self.pipe.guided(given[0], self.null.expand(len(given[0]), -1, -1), scale)

    def show(self, x: Tensor) -> Tensor:
        return data.to_unit(self.pipe.decode(x)).clamp(0, 1)


class Pixels(Machine):
    """A walk of small pictures, which are read without an upsampler."""

    def show(self, x: Tensor) -> Tensor:
        return legible(data.to_unit(x.clamp(-1, 1)))


class Decoding(Pixels):
    """DALL·E 2: the decoder's walk. The prior has drawn its places before; nothing is upsampled."""

    needs = (*DALLE2.made_of, "decoder/text_proj")
    dice = ("the prior's noise", "the decoder's noise")

    def __init__(self, pipe: DALLE2) -> None:
        self.pipe, self.scheduler = pipe, pipe.decoder_scheduler
        size = pipe.decoder.config.sample_size
        self.shape = (3, size, size)
        self.null = pipe.encode_prompts([""])

    @classmethod
    def open(cls) -> Self:
        return cls(examination.dalle2())

    def tell(self, texts: Sequence[str], seeds: Sequence[int]) -> Given:
        scheduler = self.pipe.prior_scheduler
        sampler = scheduler.choose(None)
        walk = Walk(sampler, scheduler.timesteps(sampler, self.pipe.walks["prior"][1]))
        found = []
        for first in range(0, len(texts), PARTS):
            part = slice(first, first + PARTS)
            words = self.pipe.encode_prompts(list(texts[part]), truncate=True)
            sources = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            place = self.pipe.draw_embedding(
                words, self.null.each(len(sources)), walk, examination.PRIOR_GUIDANCE,
                examination.CANDIDATES, sources,
            )  # fmt: skip
            found.append((place, *words))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def guided(self, given: Given) -> samplers.Denoiser:
        place, *words = given
        null = self.null.each(len(place))
        return self.pipe.decoding(place, Words(*words), null, examination.DALLE2_GUIDANCE)


class Base(Pixels):
    """Imagen: the base's walk; nothing is upsampled."""

    needs = Imagen.made_of
    _clip = False  # its answers are brought into range before

    def __init__(self, pipe: Imagen) -> None:
        self.pipe, self.scheduler = pipe, pipe.scheduler
        size = pipe.unet.config.sample_size
        self.shape = (3, size, size)
        self.null = pipe.encode_prompts([""])

    @classmethod
    def open(cls) -> Self:
        return cls(Imagen.from_pretrained("storybook"))

    def tell(self, texts: Sequence[str], seeds: Sequence[int]) -> Given:
        return tuple(self.pipe.encode_prompts(list(texts), truncate=True))

    def guided(self, given: Given, scale: float = 5.0, keep: float = 0.95) -> samplers.Denoiser:
        null = Told(*(part.expand(len(given[0]), *part.shape[1:]) for part in self.null))
        return drawing(self.pipe.unet, self.scheduler, Told(*given), null, scale, keep)


MACHINES: dict[str, type[Machine]] = {"Stable Diffusion": Latents, "DALL·E 2": Decoding}
NEEDS = (*dict.fromkeys(sum((machine.needs for machine in MACHINES.values()), ())), "judge")


def opened(machines: Mapping[str, Machine] | None) -> Mapping[str, Machine]:
    """Those given, or all of ``MACHINES``."""
    return {n: m.open() for n, m in MACHINES.items()} if machines is None else machines


# --- what can be read -----------------------------------------------------------------------------


def answer(seen: Facts | None, what: str, kind: str | None = None) -> str | None:
    """One answer about a picture; None where there is none.

    Args:
        seen: What the judge reads.
        what: "sky", "place", "things" (how many), or "kind", "colour" or "position" of a thing.
        kind: Of the thing of this kind; None: of the only thing there is.
    """
    if seen is None:
        return None
    if what in ("sky", "place"):
        return getattr(seen, what)
    if what == "things":
        return str(len(seen.things))
    fit = [thing for thing in seen.things if kind in (None, thing.kind)]
    return getattr(fit[0], what) if len(fit) == 1 else None


def single(seen: Facts | None, said: Facts, what: str) -> str | None:
    """One answer about a picture that was to show one thing.

    Where two are shown, of the one that looks most as was said: judges of a single slip, not two.
    """
    if seen is None or not seen.things or what in ("sky", "place"):
        return answer(seen, what)
    (asked,) = said.things
    order = sorted(seen.things, key=lambda t: (t.kind == asked.kind, t.colour == asked.colour))
    return getattr(order[-1], what)


# --- what-a-seed-fixes ----------------------------------------------------------------------------

NAMED = tuple(f"a {KIND_NOUNS[kind][0]}" for kind in KINDS)  # prompts that leave all else open
OPEN = ("sky", "place", "things", "colour", "position")
SEEDS = 10
ENOUGH = 5  # seeds, or prompts, that have pictures to compare; else nothing is said of them
BLOCKS, BLENDED = (8, 2), 36  # places a side of whose noise the mean is exchanged; pictures


def agreements(answers: Sequence[Sequence[object]]) -> dict[str, list[float | None]]:
    """How often two pictures have the same answer, answers being (P, S), a None counting nowhere.

    Returns:
        By seed: "same seed", the share of pairs of prompts that agree with this seed; "other seed",
        the share that agree where the second picture has any other seed, which is chance. By
        prompt: "same prompt", the share of pairs of seeds that agree. None where no pair can be
        compared.
    """
    prompts, seeds = range(len(answers)), range(len(answers[0]))

    def agree(pairs: Sequence[tuple[int, int, int, int]]) -> float | None:
        both = [(answers[p][s], answers[q][r]) for p, s, q, r in pairs]
        told = [a == b for a, b in both if a is not None and b is not None]
        return sum(told) / len(told) if told else None

    others = [(p, q) for p in prompts for q in prompts if p != q]
    return {
        "same seed": [agree([(p, s, q, s) for p, q in others]) for s in seeds],
        "other seed": [
            agree([(p, s, q, r) for p, q in others for r in seeds if r != s]) for s in seeds
        ],
        "same prompt": [agree([(p, s, p, r) for s, r in combinations(seeds, 2)]) for p in prompts],
    }


def alike(pictures: Tensor) -> dict[str, list[float]]:
    """The same of pictures (P, S, 3, H, W): how they correlate, the mean of all taken off."""
    x = pictures.flatten(2)
    x = x - x.mean((0, 1))
    x = x / x.norm(dim=2, keepdim=True).clamp(min=1e-12)
    corr = torch.einsum("psc,qrc->psqr", x, x)
    P, S = x.shape[:2]
    off_p, off_s = 1 - torch.eye(P), 1 - torch.eye(S)
    same = torch.einsum("psqs,pq->s", corr, off_p) / off_p.sum()
    other = torch.einsum("psqr,pq,sr->s", corr, off_p, off_s) / (off_p.sum() * (S - 1))
    prompt = torch.einsum("pspr,sr->p", corr, off_s) / off_s.sum()
    return {k: v.tolist() for k, v in zip(("same seed", "other seed", "same prompt"),
                                          (same, other, prompt), strict=True)}  # fmt: skip


def thrown(machine: Machine, die: int, seeds: Sequence[int]) -> Tensor:
    """Pictures (P, S, 3, 64, 64) of ``NAMED``, one die thrown anew by seed, the others not."""
    texts = [text for text in NAMED for _ in seeds]
    turned, still = [*seeds] * len(NAMED), [0] * len(texts)
    walks = die == len(machine.dice) - 1
    if walks:  # whatever comes before is drawn once a prompt
        given = machine.tell(NAMED, [0] * len(NAMED))
        given = tuple(part.repeat_interleave(len(seeds), 0) for part in given)
    else:
        given = machine.tell(texts, turned)
    return machine.draw(given, turned if walks else still).unflatten(0, (len(NAMED), len(seeds)))


def blended(a: Tensor, b: Tensor, side: int) -> Tensor:
    """Noise ``a`` with the means of ``b`` in every block of ``side`` places: (B, C, H, W) twice.

    What is exchanged are a few numbers, each the mean of side² others; still noise of variance 1.
    """

    def means(x: Tensor) -> Tensor:
        coarse = F.avg_pool2d(x, side)
        return coarse.repeat_interleave(side, -2).repeat_interleave(side, -1)

    return a - means(a) + means(b)


def of_two(
    read: Sequence[Facts | None], a: Sequence[Facts | None], b: Sequence[Facts | None], what: str
) -> dict[str, Any]:
    """Where a and b have different answers: how many pictures have that of a, of b, of neither."""
    told = [
        (answer(seen, what), answer(one, what), answer(other, what))
        for seen, one, other in zip(read, a, b, strict=True)
    ]
    told = [(x, y, z) for x, y, z in told if y != z and None not in (y, z)]
    if not told:
        return {}
    counts = [sum(x == y for x, y, _ in told), sum(x == z for x, _, z in told)]
    rest = len(told) - sum(counts)
    return {
        who: interval(count, len(told))
        for who, count in zip(("of a", "of b", "of neither"), (*counts, rest), strict=True)
    }


@torch.no_grad()
def parts_of_noise(
    machine: Latents, n: int = BLENDED, blocks: Sequence[int] = BLOCKS
) -> dict[str, Any]:
    """Pictures from noise with the means of another: which facts come with the means."""
    judge, seeds = Judge.from_pretrained(), [*range(n)]
    given = machine.tell([NAMED[0]] * n, seeds)
    a = machine.noise(seeds)
    b = a.roll(1, 0)

    def read(noise: Tensor) -> list[Facts | None]:
        return judge.read(machine.draw(given, seeds, start=noise))

    of_a = read(a)
    of_b = [*of_a[-1:], *of_a[:-1]]
    found = {}
    for side in blocks:
        mixed = read(blended(a, b, side))
        found[str(side)] = {
            "numbers": a[0].numel() // side**2,
            "of": a[0].numel(),
            "rows": {
                what: of_two(mixed, of_a, of_b, what) for what in ("sky", "place", "position")
            },
        }
    return found


@measurement(
    "what-a-seed-fixes",
    "Pictures of nine prompts that only name a thing, from the same seeds: how often two of them"
    " agree in what was not said if they share the seed, if they share nothing, if they share the"
    " prompt; for each die that a machine throws; and whose facts come with the coarse part of the"
    " noise. 95 % intervals over seeds and prompts",
    minutes=2,
    needs=NEEDS,
)
def what_a_seed_fixes(
    n: int = SEEDS, mixed: int = BLENDED, machines: Mapping[str, Machine] | None = None
) -> dict[str, Any]:
    """Chapter 16's first table; n seeds."""
    judge, machines = Judge.from_pretrained(), opened(machines)
    rows: dict[str, Any] = {}
    for name, machine in machines.items():
        for die, thing in enumerate(machine.dice):
            pictures = thrown(machine, die, range(n))
            read = judge.read(pictures.flatten(0, 1))
            kinds = [kind for kind in KINDS for _ in range(n)]
            cells = {}
            for what in OPEN:
                told = [answer(f, what, kind) for f, kind in zip(read, kinds, strict=True)]
                cells[what] = agreements([told[i : i + n] for i in range(0, len(told), n)])
            cells["pictures"] = alike(pictures)
            row = rows[f"{name}: {thing}"] = {}
            for what, cell in cells.items():
                gains = [
                    a - b
                    for a, b in zip(cell["same seed"], cell["other seed"], strict=True)
                    if a is not None and b is not None
                ]
                shares = {key: [x for x in values if x is not None] for key, values in cell.items()}
                shares["more"] = gains
                row[what] = {k: mean(x) if len(x) >= ENOUGH else {} for k, x in shares.items()}
            named = [answer(f, "kind", kind) for f, kind in zip(read, kinds, strict=True)]
            row["one thing of the kind named"] = interval(
                sum(k is not None for k in named), len(named)
            )
    latents = [machine for machine in machines.values() if isinstance(machine, Latents)]
    return {
        "seeds": [0],
        "noises": n,
        "prompts": list(NAMED),
        "rows": rows,
        "parts": parts_of_noise(latents[0], mixed) if latents else {},
    }


# --- when-decided ---------------------------------------------------------------------------------

PAIRS, PAIRS_SEED = 12, 1602
CHANGES = (0, 3, 6, 9, 12, 15, 18, 21, STEPS)


@lru_cache(maxsize=4)
def opposites(n: int, seed: int = PAIRS_SEED) -> tuple[tuple[Facts, Facts], ...]:
    """Pairs of captions' facts, one thing each, that differ in all; just one has it in the middle.

    Exchange any single fact, and the caption is still one that training may have seen.
    """
    g, found = torch.Generator().manual_seed(seed), []
    while len(found) < n:
        scenes = sample(2, g, things=(1,))
        a, b = (scene.facts() for scene in scenes)
        (s,), (t,) = a.things, b.things
        if (
            not any(scene.stream for scene in scenes)
            and all(said(a, what) != said(b, what) for what in FACTS)
            and (s.position == "middle") != (t.position == "middle")
            and not any(is_held_out(exchanged(a, what, said(b, what))) for what in FACTS)
        ):
            found.append((a, b))
    return tuple(found)


def said(facts: Facts, what: str) -> str | None:
    """One fact of a caption with one thing."""
    return getattr(facts if what in ("sky", "place") else facts.things[0], what)


def exchanged(facts: Facts, what: str, word: str) -> Facts:
    """The facts of a caption with one thing, one of them exchanged."""
    if what in ("sky", "place"):
        return replace(facts, **{what: word})
    return replace(facts, things=(replace(facts.things[0], **{what: word}),))


def shows(seen: Facts | None, what: str, word: str, kind: str) -> bool:
    """Whether a picture shows this: a sky, a place, a kind of thing; a colour or a position of the
    thing ``kind``, and of positions only whether it is the middle or a side."""
    if seen is None:
        return False
    if what in ("sky", "place"):
        return getattr(seen, what) == word
    if what == "kind":
        return any(thing.kind == word for thing in seen.things)
    found = [getattr(thing, what) for thing in seen.things if thing.kind == kind]
    if what == "position":
        return any((one == "middle") == (word == "middle") for one in found)
    return word in found


def crossing(steps: Sequence[int], shares: Sequence[float]) -> float:
    """The step at which falling shares first come down to half of the first, by straight lines."""
    level = shares[0] / 2
    for i in range(1, len(steps)):
        if shares[i] <= level:
            a, b = shares[i - 1], shares[i]
            part = (a - level) / (a - b) if a > b else 0.0
            return steps[i - 1] + part * (steps[i] - steps[i - 1])
    return float(steps[-1])


def halfway(
    steps: Sequence[int], second: Sequence[Sequence[bool]], draws: int = 1000
) -> dict[str, float]:
    """The step from which words come too late for half of the pairs, its interval over pairs.

    Args:
        steps: When the words were exchanged.
        second: For each step, pair by pair, whether the second words' fact is shown.
        draws: Times that pairs are drawn anew (bootstrap).
    """
    x, g = torch.tensor(second, dtype=torch.float64), torch.Generator().manual_seed(0)
    pick = torch.randint(x.shape[1], (draws, x.shape[1]), generator=g)
    again = [crossing(steps, x[:, some].mean(1).tolist()) for some in pick]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(again, dtype=torch.float64), ends).tolist()
    return {"value": crossing(steps, x.mean(1).tolist()), "low": low, "high": high}


@measurement(
    "when-decided",
    "Captions of which one fact is exchanged at step k of 25: whether the judge reads the new one"
    " or the old one, by fact and k, and how much of the rest stays; beside it how early the"
    " network's guess shows what will be drawn. 95 % intervals over pairs",
    minutes=5,
    needs=NEEDS,
)
def when_decided(
    n: int = PAIRS,
    changes: Sequence[int] = CHANGES,
    machines: Mapping[str, Machine] | None = None,
) -> dict[str, Any]:
    """Chapter 16's curves. The last of ``changes`` is never: the picture of the first caption."""
    judge, pairs, seeds = Judge.from_pretrained(), opposites(n), [*range(n)]
    rows: dict[str, Any] = {}
    for name, machine in opened(machines).items():
        told = machine.tell([write(a) for a, _ in pairs], seeds)
        guesses: dict[int, list[Facts | None]] = {}

        def look(
            i: int, t: float, x: Tensor, x0_hat: Tensor, machine=machine, guesses=guesses
        ) -> None:
            if i in changes:
                guesses.setdefault(i, []).extend(judge.read(machine.show(x0_hat)))

        first = judge.read(machine.draw(told, seeds, callback=look))
        row = rows[name] = {
            "t": machine.timesteps.tolist(),
            "signal": machine.scheduler.schedule.signal(machine.timesteps).tolist(),
            **{key: {} for key in ("new", "old", "rest", "halfway", "pairs", "guess")},
        }
        kinds = [said(a, "kind") for a, _ in pairs]
        for what in FACTS:
            olds, news = ([said(both[k], what) for both in pairs] for k in (0, 1))
            texts = [write(exchanged(a, what, w)) for (a, _), w in zip(pairs, news, strict=True)]
            then = machine.tell(texts, seeds)
            others, whats = [one for one in FACTS if one != what], [what] * n
            new, old, rest = {}, {}, {}
            for at in changes:
                read = first
                if at < changes[-1]:
                    read = judge.read(machine.draw(told, seeds, then=then, at=at))
                new[at] = [shows(*x) for x in zip(read, whats, news, kinds, strict=True)]
                old[at] = [shows(*x) for x in zip(read, whats, olds, kinds, strict=True)]
                rest[at] = same(read, first, others)
            for key, found in (("new", new), ("old", old), ("rest", rest)):
                row[key][what] = {str(k): interval(sum(v), len(v)) for k, v in found.items()}
            row["halfway"][what] = halfway(changes, [*new.values()])
            row["pairs"][what] = {
                str(k): "".join(str(int(one)) for one in v) for k, v in new.items()
            }
            row["guess"][what] = {
                str(i): interval(sum(same(found, first, [what])), n) for i, found in guesses.items()
            }
    return {"seeds": [PAIRS_SEED], "pairs": n, "steps": STEPS, "changes": [*changes], "rows": rows}


def same(
    read: Sequence[Facts | None], other: Sequence[Facts | None], facts: Sequence[str]
) -> list[bool]:
    """Of two rows of pictures, which of these facts are the same in both, picture by picture."""

    def all_of(seen: Facts | None, what: str) -> object:
        if seen is None or what in ("sky", "place"):
            return answer(seen, what)
        return sorted(getattr(thing, what) for thing in seen.things)

    both = [*zip(read, other, strict=True)]
    return [all_of(f, what) == all_of(g, what) for f, g in both for what in facts]


# --- said-and-seen: what the text encoder tells apart, and what the machine does ------------------

CAPTIONED, CAPTIONS_SEED = 50, 1603
FRAMES = 30  # captions in which words are exchanged
SIDES, CHOSEN, FAINTER = 12, 300, (0.5, 0.25, 0.125)
PHRASES = {
    "sky": {sky: phrases[0] for sky, phrases in SKY_PHRASES.items()},
    "place": {place: phrases[0] for place, phrases in PLACE_PHRASES.items()},
    "kind": {kind: nouns[0] for kind, nouns in KIND_NOUNS.items()},
    "colour": {colour: colour for colour in COLOURS},
    "position": POSITION_PHRASES,
}


@lru_cache(maxsize=4)
def alone(n: int, seed: int = CAPTIONS_SEED) -> tuple[Scene, ...]:
    """``n`` scenes with one thing and no stream, whose captions say everything."""
    g, found = torch.Generator().manual_seed(seed), []
    while len(found) < n:
        found += [scene for scene in sample(n, g, things=(1,)) if not scene.stream]
    return tuple(found[:n])


def last_row(clip: FrozenCLIP, text: str, phrase: str) -> int:
    """The row of a phrase's last piece in a text that has it once."""
    said, words = rows_of(clip.tokenizer, text)[1:-2], phrase.replace("-", " - ").split()
    at = [i for i in range(len(said)) if [w for w, _ in said[i : i + len(words)]] == words]
    errors.expect(len(at) == 1, f"{phrase!r} does not stand once in {text!r}.")
    return said[at[0] + len(words) - 1][1][-1]


@torch.no_grad()
def told_apart(clip: FrozenCLIP, scenes: Sequence[Scene]) -> dict[str, dict[str, Any]]:
    """By fact and pair of words: how far the text's states lie apart if just this is exchanged.

    Returns:
        Each with "at the word" (its last piece) and "at the end", means over captions.
    """
    found: dict[str, dict[str, Any]] = {}
    for what, words in WORDS.items():
        here, end = [], []
        for scene in scenes:
            texts = [write(exchanged(scene.facts(), what, word)) for word in words]
            states = clip.read(texts).states  # (words, N, K)
            ends = clip.tokenizer(texts).mask.sum(1) - 1
            rows = [last_row(clip, t, PHRASES[what][w]) for t, w in zip(texts, words, strict=True)]
            each = torch.arange(len(words))
            here.append(states[each, rows])
            end.append(states[each, ends])
        here, end = torch.stack(here, 1), torch.stack(end, 1)  # (words, captions, K)
        found[what] = {
            f"{words[i]} / {words[j]}": {
                "at the word": mean(distance(here[i], here[j])),
                "at the end": mean(distance(end[i], end[j])),
            }
            for i, j in combinations(range(len(words)), 2)
        }
    return found


def taken_for(asked: Sequence[str], seen: Sequence[str | None], a: str, b: str) -> dict[str, float]:
    """Of pictures asked for one of two words that show one of the two: how many the other one."""
    both = [(s, t) for s, t in zip(asked, seen, strict=True) if s in (a, b) and t in (a, b)]
    wrong = sum(s != t for s, t in both)
    return interval(wrong, len(both)) if both else {}


@torch.no_grad()
def side_told(
    machine: Latents, scenes: Sequence[Scene], fainter: Sequence[float] = FAINTER
) -> dict[str, Any]:
    """Left and right told by words, by words whose difference is made fainter, and by what CLIP
    sees in a picture. Of the pictures with the thing on a side: how many on the right one."""
    judge, rows = Judge.from_pretrained(), {}
    sides, seeds = ("left", "right"), [*range(len(scenes))]
    texts = {
        side: [write(exchanged(s.facts(), "position", side)) for s in scenes] for side in sides
    }
    states = {side: machine.tell(texts[side], seeds)[0] for side in sides}
    middle = (states["left"] + states["right"]) / 2
    ways = {
        "words": states,
        **{
            f"words, the difference times {share}": {
                s: middle + share * (states[s] - middle) for s in sides
            }
            for share in fainter
        },
    }
    x = {"left": 0.25, "right": 0.75}
    ways["a picture"] = {
        side: machine.pipe.encode_picture_prompts(
            render([replace(s, things=(replace(s.things[0], x=x[side]),)) for s in scenes])
        )
        for side in sides
    }
    for way, given in ways.items():
        told, counts = [], {}
        for side in sides:
            read = judge.read(machine.draw((given[side],), seeds))
            at = [single(f, s.facts(), "position") for f, s in zip(read, scenes, strict=True)]
            counts[side] = dict(Counter("no thing" if one is None else one for one in at))
            told += [one == side for one in at if one in sides]
        rows[way] = {
            "right side": interval(sum(told), len(told)) if told else {},
            "on a side": interval(len(told), 2 * len(scenes)),
            "seen": counts,
        }
    return rows


def pairs_of_things(n: int, seed: int) -> list[Scene]:
    """``n`` scenes with two things of different kinds and colours, no stream."""
    g, found = torch.Generator().manual_seed(seed), []
    while len(found) < n:
        for scene in sample(n, g, things=(2,)):
            a, b = scene.things
            mixed = (replace(a, colour=b.colour), replace(b, colour=a.colour))
            if (
                a.kind != b.kind
                and a.colour != b.colour
                and not scene.stream
                and not is_held_out(replace(scene, things=mixed))
            ):
                found.append(scene)
    return found[:n]


def misreadings(scene: Scene, g: torch.Generator) -> dict[str, str]:
    """Wrong captions of a scene with two things, each wrong in one way, and the right one."""
    facts = scene.facts()
    a, b = (ThingFacts(t.kind, t.colour, t.position) for t in scene.things)

    def other(options: Sequence[str], *taken: str) -> str:
        left = [option for option in options if option not in taken]
        return left[int(torch.randint(len(left), (), generator=g))]

    def of(*things: ThingFacts) -> str:
        return write(replace(facts, things=things))

    return {
        "right": write(facts),
        "another sky": write(replace(facts, sky=other(SKIES, facts.sky))),
        "another kind": of(replace(a, kind=other(KINDS, a.kind, b.kind)), b),
        "another colour": of(replace(a, colour=other(COLOURS, a.colour, b.colour)), b),
        "colours exchanged": of(replace(a, colour=b.colour), replace(b, colour=a.colour)),
        "sides exchanged": of(replace(a, position="right"), replace(b, position="left")),
    }


@torch.no_grad()
def chosen(clip: FrozenCLIP, n: int = CHOSEN) -> dict[str, dict[str, float]]:
    """How often CLIP finds the right caption nearer to a true picture than each wrong one."""
    g = torch.Generator().manual_seed(CAPTIONS_SEED)
    scenes = pairs_of_things(n, CAPTIONS_SEED)
    captions = [misreadings(scene, g) for scene in scenes]
    pictures = torch.cat([clip.see(render(scenes[i : i + PARTS])) for i in range(0, n, PARTS)])
    near = {
        way: F.cosine_similarity(pictures, clip.read([c[way] for c in captions]).embedding, dim=1)
        for way in captions[0]
    }
    return {
        way: interval(int((near["right"] > one).sum()), n)
        for way, one in near.items()
        if way != "right"
    }


@measurement(
    "said-and-seen",
    "How far the states of either text tower lie apart when one word is exchanged for another, and"
    " how often each machine draws the one for the other; left and right told by words, by fainter"
    " ones, and by pictures; which wrong captions either tower takes for the right one. 95 %"
    " intervals",
    minutes=2,
    needs=NEEDS,
)
def said_and_seen(
    n: int = CAPTIONED,
    frames: int = FRAMES,
    sides: int = SIDES,
    choices: int = CHOSEN,
    machines: Mapping[str, Latents | Decoding] | None = None,
) -> dict[str, Any]:
    """Chapter 16's distances, mistakes and causes; ``side_told`` is Stable Diffusion's alone."""
    judge, machines = Judge.from_pretrained(), opened(machines)
    readers = dict(zip(READERS, (reader(), FrozenCLIP.open()), strict=True))
    scenes, seeds = alone(n), [*range(n)]
    facts = [scene.facts() for scene in scenes]
    asked = {w: [said(f, w) for f in facts] for w in FACTS}
    apart = {name: told_apart(clip, scenes[:frames]) for name, clip in readers.items()}
    pairs = apart[READERS[0]]
    rows, right = {}, {}
    for name, machine in machines.items():
        read = judge.read(machine.say([write(f) for f in facts], seeds))
        seen = {w: [single(r, f, w) for r, f in zip(read, facts, strict=True)] for w in FACTS}
        right[name] = {w: [a == b for a, b in zip(asked[w], seen[w], strict=True)] for w in FACTS}
        rows[name] = {
            "right": {w: interval(sum(one), n) for w, one in right[name].items()},
            "taken for": {
                w: {p: taken_for(asked[w], seen[w], *p.split(" / ")) for p in pairs[w]}
                for w in FACTS
            },
        }
    between = {
        f"{a} less {b}": {w: difference(right[a][w], right[b][w]) for w in FACTS}
        for a, b in combinations(rows, 2)
    }
    latents = [machine for machine in machines.values() if isinstance(machine, Latents)]
    return {
        "seeds": [CAPTIONS_SEED],
        "captions": n,
        "frames": frames,
        "apart": apart,
        "rows": rows,
        "between": between,
        "fainter": list(FAINTER),
        "side": side_told(latents[0], alone(sides, CAPTIONS_SEED + 1)) if latents else {},
        "chosen": {name: chosen(clip, choices) for name, clip in readers.items()},
    }


# --- four-forms -----------------------------------------------------------------------------------

FORMED, FORMS_SEED = 32, 1604
FORMS = ("one thing", "two things", "two things, colours", "two things, colours, sides")


def form(scene: Scene, name: str) -> Facts:
    """What is said of a scene with two things in one of the ``FORMS``; never where or when."""
    errors.one_of("form", name, FORMS)
    a, b = (ThingFacts(t.kind, t.colour, t.position) for t in scene.things)
    if name == FORMS[0]:
        return Facts(things=(replace(a, position=None),))
    if name == FORMS[1]:
        return Facts(things=(ThingFacts(a.kind), ThingFacts(b.kind)))
    if name == FORMS[2]:
        return Facts(things=(replace(a, position=None), replace(b, position=None)))
    return Facts(things=(a, b))


def bound(asked: Sequence[Facts], read: Sequence[Facts | None]) -> dict[str, dict[str, float]]:
    """What was kept together of what was said of things.

    Returns:
        "whole": pictures that show all that was said. "kinds": those with every kind. "more
        things": those with a thing that nobody asked for. "colours":
        of things said and shown, those in their colour. "borrowed": of those in a wrong colour, the
        ones in the colour of the other thing. "swapped": of pictures with both kinds and both
        colours, those that exchange them. "first on the left": of pictures with both kinds, one
        left and one right, those with the thing that the text names first on the left.
    """
    counts: dict[str, list[bool]] = {}

    def count(what: str, holds: bool) -> None:
        counts.setdefault(what, []).append(holds)

    for facts, seen in zip(asked, read, strict=True):
        shown = () if seen is None else seen.things
        count("whole", seen is not None and facts.holds_for(seen))
        kinds = [t.kind for t in shown]
        every = all(t.kind in kinds for t in facts.things)
        count("kinds", every)
        count("more things", len(shown) > len(facts.things))
        for thing in facts.things:
            colours = [t.colour for t in shown if t.kind == thing.kind]
            if thing.colour is not None and colours:
                right = thing.colour in colours
                count("colours", right)
                if not right and len(facts.things) == 2:
                    count("borrowed", any(t.colour in colours for t in facts.things))
        exchange = swapped(facts, seen)
        if exchange is not None:
            count("swapped", exchange)
        places = {t.kind: t.position for t in shown}
        if len(facts.things) == 2 and every and {*places.values()} == {"left", "right"}:
            count("first on the left", places[first_named(facts)] == "left")
    return {what: interval(sum(holds), len(holds)) for what, holds in counts.items()}


def first_named(facts: Facts) -> str:
    """The kind that ``write`` names first of two."""
    text = write(facts)
    return min((t.kind for t in facts.things), key=lambda k: text.index(KIND_NOUNS[k][0]))


@measurement(
    "four-forms",
    "The same things asked for in four forms, from one thing to two with colours and sides: what is"
    " shown, in which colour, on which side, and how often two colours are exchanged. 95 %"
    " intervals",
    minutes=2,
    needs=NEEDS,
)
def four_forms(n: int = FORMED, machines: Mapping[str, Machine] | None = None) -> dict[str, Any]:
    """Chapter 16's table of binding; every form from the same noise."""
    judge, scenes, rows = Judge.from_pretrained(), pairs_of_things(n, FORMS_SEED), {}
    for name, machine in opened(machines).items():
        rows[name] = {}
        for what in FORMS:
            asked = [form(scene, what) for scene in scenes]
            read = judge.read(machine.say([write(f) for f in asked], [*range(n)]))
            rows[name][what] = bound(asked, read)
    return {"seeds": [FORMS_SEED], "prompts": n, "rows": rows}


# --- unknown-words --------------------------------------------------------------------------------

TIMES = 8
SLOTS = {
    "kind": "a {}", "colour": "a {} house", "place": "a house by the {}", "sky": "a house at {}",
}  # fmt: skip
NEW = (  # slot, word, what a person would draw for it, where this world has it
    ("kind", "", None),
    ("kind", "house", "house"),
    ("kind", "sailboat", "boat"),
    ("kind", "dog", None),
    ("kind", "blorp", None),
    ("colour", "", None),
    ("colour", "red", "red"),
    ("colour", "crimson", "red"),
    ("place", "", None),
    ("place", "sea", "sea"),
    ("place", "ocean", "sea"),
    ("sky", "", None),
    ("sky", "night", "night"),
    ("sky", "midnight", "night"),
    ("sky", "twilight", "dusk"),
)
LITTLE = (  # prompts that turn on a small word or letter, and the kind that is counted
    ("a meadow at noon", "house"),
    ("a meadow at noon without a house", "house"),
    ("a boat by the sea", "boat"),
    ("two boats by the sea", "boat"),
)


def filled(slot: str, word: str) -> str:
    """The prompt with a word in its place; without one, what is left."""
    return " ".join(SLOTS[slot].format(word).split())


def in_slot(seen: Facts | None, slot: str) -> list[str]:
    """What a picture shows where the word was to be: kinds of things, colours of houses, …"""
    if seen is None:
        return []
    if slot == "kind":
        return [thing.kind for thing in seen.things]
    if slot == "colour":
        return [thing.colour for thing in seen.things if thing.kind == "house"]
    return [getattr(seen, slot)]


@measurement(
    "unknown-words",
    "Pictures of words that no caption of the training has, beside known ones and beside the same"
    " prompt without the word: what is drawn, how varied it is, how often the picture is the one"
    " without the word; and prompts that turn on a small word. 95 % intervals",
    minutes=2,
    needs=NEEDS,
)
def unknown_words(n: int = TIMES, machines: Mapping[str, Machine] | None = None) -> dict[str, Any]:
    """Chapter 16's table of words; all prompts from the same noise."""
    judge, rows, little = Judge.from_pretrained(), {}, {}
    texts = [*(filled(slot, word) for slot, word, _ in NEW), *(text for text, _ in LITTLE)]
    texts = [*dict.fromkeys(texts)]
    seeds = [*range(n)] * len(texts)
    for name, machine in opened(machines).items():
        drawn = machine.say([text for text in texts for _ in range(n)], seeds)
        pictures = dict(zip(texts, drawn.split(n), strict=True))
        read = {text: judge.read(some) for text, some in pictures.items()}
        rows[name], little[name] = [], {}
        for slot, word, meant in NEW:
            text, bare = filled(slot, word), filled(slot, "")
            shown = [in_slot(f, slot) for f in read[text]]
            every = Counter(one for some in shown for one in some)
            alike = sum(f == g for f, g in zip(read[text], read[bare], strict=True))
            row = {
                "slot": slot,
                "word": word,
                "text": text,
                "drawn": dict(every.most_common()),
                "possibilities": possibilities([*every.elements()]),
                "read as without the word": interval(alike, n),
                "distance": mean_interval(away(pictures[text], pictures[bare])),
            }
            if meant is not None:
                row |= {"meant": meant, "shown": interval(sum(meant in s for s in shown), n)}
            rows[name].append(row)
        for text, kind in LITTLE:
            counts = [in_slot(f, "kind").count(kind) for f in read[text]]
            little[name][text] = {
                "kind": kind,
                "shown": interval(sum(count > 0 for count in counts), n),
                "how many": {str(k): counts.count(k) for k in (0, 1, 2)},
            }
    return {"seeds": [0], "noises": n, "rows": rows, "little": little}
