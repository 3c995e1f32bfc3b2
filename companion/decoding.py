"""Chapter 8's experiments: a decoder that is told everything, or only some of it.

``tell`` says what reaches the network, entry by entry; ``draw`` starts every picture from a noise
of its own, so that pictures of one prompt differ only in what was told. The tables come from
``python -m companion measure decoder``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import data, diffusion, errors, guidance, samplers
from companion.judge import Judge
from companion.measure import SEEDS, measurement, over_seeds
from companion.prior import TextProjection
from companion.prompts import Prompt, marks, prompts, right, swapped
from companion.recipes.decoder import GUIDANCE, STEPS, Decoder, legible
from companion.recipes.encoded import SIZE, SMALL, FrozenCLIP, reader, shrunk
from companion.samplers import Denoiser
from companion.schedule import Schedule
from companion.schedule import draw as noise_like
from companion.scores import difference, frechet, interval
from companion.storybook import render
from companion.unclip import Words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How a decoder is told: the picture's place twice, the caption twice.
ENTRIES = ("place to the timestep", "place as tokens", "caption to the timestep",
           "caption as tokens")  # fmt: skip
WAYS: dict[str, tuple[str, ...]] = {
    "place and caption": ENTRIES,
    "place": ENTRIES[:2],
    "caption": ENTRIES[2:],
    "nothing": (),
}
PARTS = 50  # pictures at a time
SCHEDULE = Schedule.cosine()  # the decoder's


class Told(NamedTuple):
    """What the U-Net gets beside the noisy pictures and their timestep."""

    context: Tensor  # (B, 4 + N, K)
    added: Tensor  # (B, T)
    mask: Tensor  # (B, 4 + N)


def tell(
    text_proj: TextProjection,
    place: Tensor,
    words: Words,
    null: Words,
    entries: Collection[str] = ENTRIES,
) -> Told:
    """Everything through the entries that are open, and what stands for nothing through the others.

    Args:
        text_proj: The decoder's projection.
        place: Pictures' places in CLIP's space, (B, D).
        words: Their captions.
        null: The empty caption, B times.
        entries: Some of ``ENTRIES``; all of them is what the decoder was trained on.
    """
    for entry in entries:
        errors.one_of("the entry", entry, ENTRIES)
    nowhere = text_proj.no_image(len(place))
    places = [place if entry in entries else nowhere for entry in ENTRIES[:2]]
    said = [words if entry in entries else null for entry in ENTRIES[2:]]
    _, added = text_proj(places[0], said[0].embedding, null.states)
    context, _ = text_proj(places[1], null.embedding, said[1].states)
    extra = context.shape[1] - said[1].mask.shape[1]
    return Told(context, added, F.pad(said[1].mask, (extra, 0), value=1))


@torch.no_grad()
def draw(
    model: Decoder,
    told: Told,
    nothing: Told,
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    scale: float = GUIDANCE,
    variance: str = "learned_range",
    callback: samplers.Callback = None,
) -> Tensor:
    """Small pictures (B, 3, 16, 16) in [0, 1]; each from its own seed, whoever is drawn beside it.

    Args:
        model: The decoder.
        told: What it is told of each picture.
        nothing: What guidance moves away from: ``tell`` without entries.
        seeds: B of them. Equal seeds get the same noise at the start and on the way.
        steps: Calls of the guided network.
        scale: s = 1 + w.
        variance: As ``samplers.ddpm`` has it.
        callback: As ``samplers.ddpm`` has it.
    """
    guided = guidance.classifier_free(partial(answer, model), told, nothing, scale)
    x = walk(guided, told.context, seeds, steps=steps, variance=variance, callback=callback)
    return data.to_unit(x)


def answer(
    model: Decoder, x: Tensor, t: Tensor, context: Tensor, added: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The clean picture, and the variance's fraction, given what is told."""
    noise, fraction = model.unet(x, t, context, added, mask).chunk(2, dim=1)
    return diffusion.to_x0(noise, x, t, SCHEDULE, "epsilon"), fraction


@torch.no_grad()
def walk(
    guided: Denoiser,
    like: Tensor,
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    variance: str = "learned_range",
    clip: float | None = 1.0,
    callback: samplers.Callback = None,
) -> Tensor:
    """From noise to pictures (B, 3, 16, 16), around [-1, 1]; equal seeds get equal noise.

    Args:
        guided: The decoder, told and guided.
        like: Any tensor of the type and place that pictures are to have.
        seeds: B of them.
        steps: Calls of ``guided``.
        variance: As ``samplers.ddpm`` has it.
        clip: Likewise.
        callback: Likewise.
    """
    sources = [torch.Generator().manual_seed(s) for s in seeds]
    x = noise_like(like.new_empty(len(seeds), 3, SMALL, SMALL), sources)
    t = samplers.timesteps("ddpm", steps, SCHEDULE, "linspace")
    return samplers.ddpm(
        guided, x, t, SCHEDULE, generator=sources, clip=clip, variance=variance, callback=callback
    )


class Examined:
    """Prompts with their true pictures, ready to be told and drawn.

    Args:
        asked: The prompts.
        model: The decoder; by default the shipped one.
        clip: The CLIP that it was trained on; by default the shipped one.
    """

    def __init__(
        self, asked: Sequence[Prompt], model: Decoder | None = None, clip: FrozenCLIP | None = None
    ) -> None:
        self.asked = list(asked)
        self.model = (Decoder.from_pretrained() if model is None else model).eval()
        self.model.requires_grad_(False)
        self.clip = reader() if clip is None else clip
        pictures = render([p.scene for p in self.asked], SIZE)
        self.place, self.words = self.clip.see(pictures), self.clip.read([p.text for p in asked])
        self.true = shrunk(pictures)  # (n, 3, 16, 16) in [0, 1]

    def told(self, rows: Sequence[int], entries: Collection[str] = ENTRIES) -> Told:
        """What the decoder is told of some of the prompts."""
        rows = list(rows)
        null = self.clip.read([""]).each(len(rows))
        words = Words(*(part[rows] for part in self.words))
        return tell(self.model.text_proj, self.place[rows], words, null, entries)

    def drawn(
        self,
        rows: Sequence[int],
        entries: Collection[str] = ENTRIES,
        *,
        seed: int = 0,
        **choices: Any,
    ) -> Tensor:
        """Pictures of some of the prompts; the noise of prompt i is always that of seed and i."""
        rows, found = list(rows), []
        for first in range(0, len(rows), PARTS):
            part = rows[first : first + PARTS]
            seeds = [100_000 * (seed + 1) + i for i in part]
            told, nothing = self.told(part, entries), self.told(part, ())
            found.append(draw(self.model, told, nothing, seeds, **choices))
        return torch.cat(found)


# --- marks ----------------------------------------------------------------------------------------


def share(said: Sequence[bool], known: Sequence[bool]) -> dict[str, float]:
    """The share that is right among the prompts whose combination was not held out."""
    kept = [one for one, old in zip(said, known, strict=True) if old]
    return interval(sum(kept), len(kept))


def unsaid(asked: Sequence[Prompt], read: Sequence[Any]) -> dict[str, dict[str, float]]:
    """What prompts leave open, and pictures show as in the scene behind them: shares of all such.

    "sky" and "place"; and "colour", of a thing whose kind is said and that is the only one of it.
    """
    counts: dict[str, list[bool]] = {}
    for prompt, seen in zip(asked, read, strict=True):
        said, scene = prompt.facts, prompt.scene
        for what in ("sky", "place"):
            if getattr(said, what) is None:
                holds = seen is not None and getattr(seen, what) == getattr(scene, what)
                counts.setdefault(what, []).append(holds)
        for thing in said.things:
            true = [t.colour for t in scene.things if t.kind == thing.kind]
            if thing.colour is None and len(true) == 1:
                shown = [] if seen is None else [(t.kind, t.colour) for t in seen.things]
                counts.setdefault("colour", []).append((thing.kind, true[0]) in shown)
    order = [what for what in ("sky", "place", "colour") if what in counts]
    return {what: interval(sum(counts[what]), len(counts[what])) for what in order}


def exchangeable(prompt: Prompt) -> bool:
    """Whether colours could be exchanged: two kinds in two colours, all four of them said."""
    return not prompt.held_out and swapped(prompt.facts, prompt.facts) is False


def swaps(asked: Sequence[Prompt], read: Sequence[Any]) -> dict[str, Any]:
    """Of prompts with two coloured things: how often both are there, and then whose colours."""
    found = [swapped(p.facts, seen) for p, seen in zip(asked, read, strict=True)]
    both = [one for one in found if one is not None]
    row: dict[str, Any] = {"both things, both colours": interval(len(both), len(found))}
    return row | ({"swapped": interval(sum(both), len(both))} if both else {})


# --- the learned variance -------------------------------------------------------------------------


class Spread(NamedTuple):
    """What the decoder says of true noisy pictures at some timesteps; n pictures each."""

    x_t: Tensor  # (steps, n, 3, H, W)
    x0_hat: Tensor  # the same
    fraction: Tensor  # the same: -1 is the posterior's variance, 1 is beta


@torch.no_grad()
def look_through(examined: Examined, rows: Sequence[int], timesteps: Sequence[int]) -> Spread:
    """Noise true pictures, tell all, and ask; no guidance. The noise is new at each timestep."""
    rows, schedule = list(rows), Schedule.cosine()
    x0, told = data.to_signed(examined.true[rows]), examined.told(rows)
    g, found = torch.Generator().manual_seed(8), []
    for t in timesteps:
        x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=g), t)
        answer = examined.model.unet(x_t, torch.tensor(t).expand(len(x0)), *told)
        noise, fraction = answer.chunk(2, dim=1)
        x0_hat = diffusion.to_x0(noise, x_t, t, schedule, "epsilon").clamp(-1, 1)
        found.append((x_t, x0_hat, fraction))
    return Spread(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def wanted_fraction(error: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The fraction that the bound likes best where the guess of x0 is wrong by this much.

    The divergence of two bells is least where the model's variance is the true one plus the squared
    error of its mean. Where that lies on the scale from the posterior's variance (-1) to beta (1).

    Args:
        error: Mean squared error of x0_hat, any shape.
        t: At least 1.
        schedule: The noise schedule.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    by_x0, small = diffusion.posterior(zero + 1, zero, t, schedule)  # the mean's factor of x0
    best = (small + by_x0.square() * error.double()).log()
    least, most = (
        diffusion.log_variance(torch.full((1,), end, dtype=torch.float64), t, schedule)
        for end in (-1.0, 1.0)
    )
    return 2 * (best - least) / (most - least) - 1


VARIANCES = {"learned": "learned_range", "small": "fixed_small", "large": "fixed_large"}
NOISY = (*range(20), *range(20, 1000, 10))  # where the bound is looked at: closely where it is paid


def bits(examined: Examined, rows: Sequence[int]) -> dict[str, list[float]]:
    """The variational bound of true pictures in bits per value, with three variances: n each.

    Of the thousand terms the first twenty, then every tenth, which stands for ten.
    """
    schedule, x0 = Schedule.cosine(), data.to_signed(examined.true[list(rows)])
    seen = look_through(examined, rows, NOISY)
    ends = {"learned": seen.fraction, "small": -torch.ones_like(seen.fraction)}
    ends["large"] = -ends["small"]
    return {
        name: sum(
            (1 if t < 20 else 10)
            * diffusion.vlb_term(x0, seen.x_t[i], t, schedule, seen.x0_hat[i], part[i])
            for i, t in enumerate(NOISY)
        ).tolist()
        for name, part in ends.items()
    }


# --- the table of chapter 8 -----------------------------------------------------------------------

SCALES, COUNTS = (1.0, 2.0, 3.0, 5.0), (5, 10, 25)


@measurement(
    "decoder",
    "The decoder told its picture's place, the caption, both or nothing, and through some entries"
    " only; by guidance; by variance and steps. Judged on the fixed prompts, one picture each, with"
    " 95 % intervals",
    minutes=15,
    needs=("clip", "text-encoder", "decoder", "decoder/text_proj", "judge", "judge-second"),
)
def decoder(
    n: int = 400, few: int = 150, groups: int = 150, pairs: int | None = None, exact: int = 32
) -> dict[str, Any]:
    """Chapter 8's tables.

    Args:
        n: Prompts for the four ways of telling.
        few: Prompts for single entries and for guidance.
        groups: Prompts for each Fréchet distance by variance; three seeds.
        pairs: How many two-object prompts to draw for the swaps; None: all.
        exact: Pictures whose bound is computed.
    """
    ready = Examined(prompts())
    judges = Judge.from_pretrained(), Judge.from_pretrained("judge-second")

    def mark(rows: Sequence[int], small: Tensor) -> dict[str, Any]:
        """All that is said of one set of pictures."""
        asked, pictures = [ready.asked[i] for i in rows], legible(small)
        read, again = (judge.read(pictures) for judge in judges)
        said, known = right(asked, read), [not p.held_out for p in asked]
        with torch.no_grad():
            features = [judges[0].features(x) for x in (pictures, legible(ready.true[list(rows)]))]
        return {
            "everything said": share(said, known),
            "everything said, second judge": share(right(asked, again), known),
            "marks": marks(asked, read),
            "unsaid": unsaid(asked, read),
            "frechet": frechet(*features),
            "right": "".join(str(int(one)) for one in said),
        }

    all_, first = range(n), range(few)
    drawn = {name: ready.drawn(all_, entries) for name, entries in WAYS.items()}
    ways = {"true": mark(all_, ready.true[:n])}
    ways |= {name: mark(all_, small) for name, small in drawn.items()}
    known = [i for i in all_ if not ready.asked[i].held_out]
    gains = {
        f"{a}, over {b}": difference(*([ways[x]["right"][i] == "1" for i in known] for x in (a, b)))
        for a, b in (("place and caption", "place"), ("place and caption", "caption"))
    }

    entries: dict[str, Any] = {}
    for name in ("place", "caption"):
        for entry in WAYS[name]:
            entries[entry] = mark(first, ready.drawn(first, (entry,)))
        entries[f"{name}, both entries"] = mark(first, drawn[name][:few])
    scales = {
        f"{s:g}": mark(
            first,
            drawn["place and caption"][:few] if s == GUIDANCE else ready.drawn(first, scale=s),
        )
        for s in SCALES
    }

    two = [i for i, p in enumerate(ready.asked) if exchangeable(p)][:pairs]
    asked = [ready.asked[i] for i in two]
    exchanged = {"true": swaps(asked, judges[0].read(legible(ready.true[two])))}
    for name in ("place and caption", "place", "caption"):
        new = [i for i in two if i >= n]
        small = dict(zip(all_, drawn[name], strict=True))
        small |= dict(zip(new, ready.drawn(new, WAYS[name]), strict=True)) if new else {}
        exchanged[name] = swaps(
            asked, judges[0].read(legible(torch.stack([small[i] for i in two])))
        )

    real = judges[0].features(legible(ready.true[:groups])).detach()
    variance: dict[str, dict[str, list[float]]] = {}
    for name, kind in VARIANCES.items():
        for steps in COUNTS:
            for seed in SEEDS:
                small = ready.drawn(range(groups), seed=seed, steps=steps, scale=1, variance=kind)
                with torch.no_grad():
                    distance = frechet(real, judges[0].features(legible(small)))
                variance.setdefault(name, {}).setdefault(str(steps), []).append(distance)
    paid = bits(ready, range(exact))
    return {
        "seeds": [0, *SEEDS],
        "prompts": n,
        "few": few,
        "groups": groups,
        "ways": ways,
        "gains": gains,
        "entries": entries,
        "guidance": scales,
        "swaps": exchanged,
        "variance": {
            name: {k: over_seeds(runs, low=0) for k, runs in columns.items()}
            for name, columns in variance.items()
        },
        "bits": {name: over_seeds(values) for name, values in paid.items()},
        "bits saved": {
            name: over_seeds([b - a for a, b in zip(paid["learned"], paid[name], strict=True)])
            for name in ("small", "large")
        },
    }


# --- a drawing ------------------------------------------------------------------------------------


def diagram(sizes: Mapping[str, Sequence[int]]) -> Figure:
    """The four entries as boxes and arrows; ``sizes`` are shapes of tensors that went through.

    Keys: "place", "caption", "states", "step", "added", "tokens", "words", "context".
    """
    import matplotlib.pyplot as plt

    from companion.show import CARD, COLOURS, QUIET

    told = {name: " × ".join(str(n) for n in size) for name, size in sizes.items()}
    fig, ax = plt.subplots(figsize=(7.2, 3.7), layout="none")
    fig.subplots_adjust(0, 0, 1, 1)
    plt.close(fig)
    ax.set(xlim=(0, 72), ylim=(0, 37))
    ax.set_axis_off()

    def box(x: float, y: float, wide: float, name: str, note: str, colour: str) -> None:
        ax.add_patch(
            plt.Rectangle((x, y - 2.6), wide, 5.2, facecolor=CARD, edgecolor=colour, linewidth=1.6)
        )
        ax.text(x + wide / 2, y + 0.9, name, ha="center", va="center", fontsize=9, weight="bold")
        ax.text(x + wide / 2, y - 1.2, note, ha="center", va="center", fontsize=8, color=QUIET)

    def arrow(x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (to_x, to_y), (x, y), arrowprops=style)

    place, words, time = COLOURS["dusk"], COLOURS["night"], QUIET
    rows = (  # what comes in; its height; through what; where it arrives; its colour
        ("step t", told["step"], 33, "clock hands, MLP", told["added"], 27.5, time),
        ("caption, pooled", told["caption"], 25.5, "linear", told["added"], 25.5, words),
        ("the picture's place", told["place"], 15, "", "", 0, place),
        ("caption, word by word", told["states"], 4.5, "linear, norm", told["words"], 7.5, words),
    )
    for name, note, y, through, gives, to, colour in rows:
        box(1, y, 18, name, note, colour)
        if through:
            arrow(19, y, 27, y, colour)
            box(27, y, 16, through, gives, colour)
            arrow(43, y, 51, to, colour)
    for y, through, gives, to in ((18.5, "linear", told["added"], 23.5),
                                  (11.5, "linear, cut in four", told["tokens"], 9.5)):  # fmt: skip
        arrow(19, 15, 27, y, place)
        box(27, y, 16, through, gives, place)
        arrow(43, y, 51, to, place)
    box(51, 25.5, 20, "added up: " + told["added"], "scale and shift, every block", COLOURS["ink"])
    box(51, 8.5, 20, "tokens: " + told["context"], "looked at from 8 × 8, 4 × 4", COLOURS["ink"])
    return fig
