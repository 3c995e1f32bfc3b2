"""Chapter 12's experiments: where Stable Diffusion's U-Net looks while it draws, and what it takes.

``recording`` keeps the maps of cross-attention of every call, ``draw`` draws from rows that one has
changed or taken away, ``covered`` says where a thing truly is. Two tables come from here:
``python -m companion measure attention-words`` and ``… sequence-or-pooled``.

Letters: B pictures, S calls of the U-Net, h heads, H×W places, M rows that can be looked at (tokens
of a text, or of a picture), K their width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import data, errors
from companion.attention import watch
from companion.judge import Judge
from companion.measure import mean, measurement
from companion.muon import Muon
from companion.prompts import Prompt, marks, prompts, right, shares_right
from companion.recipes import stable_diffusion as recipe
from companion.recipes.encoded import READERS, FrozenCLIP, reader
from companion.scores import difference, interval
from companion.stable_diffusion import StableDiffusion
from companion.storybook import (
    COLOURS,
    KINDS,
    Facts,
    Scene,
    Thing,
    ThingFacts,
    is_held_out,
    render,
    sample,
    write,
)
from companion.tokenizer import Tokenizer
from companion.train import PRECISIONS, Average, fast_precision, generator, learning_rate
from companion.unclip import Words
from companion.unet import UNet

STEPS, GUIDANCE = 16, recipe.GUIDANCE
PARTS = 50  # pictures at a time
EDGES = {"left": (0.0, 0.38), "middle": (0.38, 0.62), "right": (0.62, 1.0)}  # as Thing.position


# --- where it looks -------------------------------------------------------------------------------


@dataclass
class Looks:
    """The maps of cross-attention, call by call.

    Attributes:
        t: The timestep of each call, S of them.
        maps: By layer, in the order in which they look: S tensors (B, h, H, W, M), each place's
            weights on the rows, which sum to 1.
    """

    t: list[float] = field(default_factory=list)
    maps: dict[str, list[Tensor]] = field(default_factory=dict)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """How many places each layer looks from, (H, W)."""
        return {name: tuple(found[0].shape[2:4]) for name, found in self.maps.items()}

    def of(self, layer: str) -> Tensor:
        """One layer's maps, mean over its heads: (S, B, M, H, W)."""
        errors.one_of("layer", layer, self.maps)
        return torch.stack([x.mean(1).movedim(-1, 1) for x in self.maps[layer]])

    def mean(self, size: int | None = None) -> Tensor:
        """Mean over heads and layers, (S, B, M, H, W), with as many places as the finest layer has.

        Args:
            size: Only the layers of so many places a side.
        """
        sizes = self.sizes()
        chosen = [name for name, (height, _) in sizes.items() if size in (None, height)]
        errors.expect(
            bool(chosen), f"no layer has {size} places a side; there are {sorted(sizes.values())}."
        )
        height, width = max(sizes[name] for name in chosen)
        total = 0
        for name in chosen:
            x = self.of(name)
            finer = height // x.shape[-2]
            total = total + x.repeat_interleave(finer, -2).repeat_interleave(finer, -1)
        return total / len(chosen)


@contextmanager
def recording(unet: UNet, pictures: int, rows: int | None = None) -> Iterator[Looks]:
    """Keep where the U-Net looks at its context, call by call, within the block.

    ::

        with recording(pipe.unet, pictures=1) as looks:
            pipe("a red house by the sea", seed=1)
        looks.mean()  # (50, 1, 40, 8, 8)

    Args:
        unet: The network.
        pictures: How many are drawn. Under guidance a batch holds the untold half first; the last
            ``pictures`` of it are those that were told.
        rows: Only calls with so many rows to look at, where there are others (``image_prompt=``).
    """
    looks = Looks()
    with watch(unet, "attn2") as layers:

        def note(_: nn.Module, given: tuple, __: Tensor) -> None:
            x, t, context = given
            if rows not in (None, context.shape[1]):
                return
            looks.t.append(float(torch.as_tensor(t).flatten()[-1]))
            for name, layer in layers.items():
                seen = layer.map[-pictures:]  # (B, h, N, M)
                fewer = round((x.shape[-2] * x.shape[-1] / seen.shape[2]) ** 0.5)
                seen = seen.unflatten(2, (x.shape[-2] // fewer, x.shape[-1] // fewer))
                looks.maps.setdefault(name, []).append(seen.clone())

        hook = unet.register_forward_hook(note)
        try:
            yield looks
        finally:
            hook.remove()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """How far states lie apart, as a share of their mean length: (…, K) -> (…)."""
    return 2 * (a - b).norm(dim=-1) / (a.norm(dim=-1) + b.norm(dim=-1))


def rows_of(tokenizer: Tokenizer, text: str) -> list[tuple[str, list[int]]]:
    """What each of the context's rows stands for: (word, its rows), in order.

    The first is "start", the last two are "end" and "padding" (which may have no rows).
    """
    found: list[tuple[str, list[int]]] = [("start", [0])]
    word, mine, row = "", [], 0
    for row, piece in enumerate(tokenizer.pieces(text), start=1):
        word, mine = word + piece, [*mine, row]
        if word.endswith("</w>"):
            found.append((word.removesuffix("</w>"), mine))
            word, mine = "", []
    errors.expect(
        row + 2 <= tokenizer.context, f"the text has {row} pieces, more than fit: {text!r}"
    )
    behind = list(range(row + 2, tokenizer.context))
    return [*found, ("end", [row + 1]), ("padding", behind)]


def row_of(tokenizer: Tokenizer, text: str, word: str) -> int:
    """The row of a word that stands once in a text and is a single piece."""
    found = [rows for said, rows in rows_of(tokenizer, text) if said == word]
    errors.expect(
        len(found) == 1 and len(found[0]) == 1,
        f"{word!r} is no single piece, or not once, in {text!r}",
    )
    return found[0][0]


def overlay(pictures: Tensor, maps: Tensor, dark: float = 0.12) -> Tensor:
    """Pictures, dark where a map is low: (B, 3, H, W) and (B, h, w) -> (B, 3, H, W).

    Each map is stretched from its lowest to its highest value: brightness compares places within
    one map, never two maps.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    light = (maps - low) / (high - low).clamp(min=1e-12)
    light = F.interpolate(light[:, None], pictures.shape[-2:], mode="bilinear")
    return pictures * (dark + (1 - dark) * light)


def covered(scenes: Sequence[Scene], thing: int = 0, size: int = 8) -> Tensor:
    """How much of each place a thing covers, its shadow included: (B, size, size) from 0 to 1.

    The difference between the scene and the same scene without it. Scenes with a stream are
    refused, since the stream makes way for things.
    """
    errors.expect(
        not any(scene.stream for scene in scenes), "a stream makes way for things; choose others."
    )
    without = [replace(s, things=s.things[:thing] + s.things[thing + 1 :]) for s in scenes]
    both = render(list(scenes)), render(without)
    changed = (both[0] - both[1]).abs().amax(1, keepdim=True) > 0.02
    return F.avg_pool2d(changed.float(), both[0].shape[-1] // size)[:, 0]


def third(position: str, width: int) -> Tensor:
    """How much of each column lies in the left, middle or right third, (width,)."""
    low, high = EDGES[position]
    edges = torch.arange(width + 1) / width
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * width


def share_inside(maps: Tensor, inside: Tensor) -> Tensor:
    """Share of a map's sum that lies inside: (…, H, W) and (…, H, W) or (W,), 0 to 1 -> (…)."""
    return (maps * inside).sum((-2, -1)) / maps.sum((-2, -1))


# --- drawing from rows ----------------------------------------------------------------------------


def states_of(pipe: StableDiffusion, texts: Sequence[str]) -> Tensor:
    """What the text encoder makes of texts, (B, M, K)."""
    return pipe.encode_prompts(list(texts), None, 1, 1.0)[0]


@torch.no_grad()
def draw(
    pipe: StableDiffusion,
    given: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    null: Tensor | None = None,
    steps: int = STEPS,
    scale: float = GUIDANCE,
) -> Tensor:
    """Pictures from rows to look at, rather than from words.

    Attention has no order and no length, so a row that is not there is a row that nobody can look
    at: to mask it, leave it out.

    Args:
        pipe: The system.
        given: For each picture its rows, (M, K); M may differ from picture to picture.
        seeds: One for each picture: the noise that it starts from.
        null: The rows that guidance moves away from, (M, K); default: those of the empty text.
        steps: Of DDIM.
        scale: s = 1 + w.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    errors.expect(
        len(given) == len(seeds), f"there are {len(given)} contexts and {len(seeds)} seeds."
    )
    null = states_of(pipe, [""])[0] if null is None else null
    size, channels = pipe.unet.config.sample_size, pipe.vae.config.latent_channels
    timesteps = pipe.scheduler.timesteps("ddim", steps, steps_offset=1)

    found: dict[int, Tensor] = {}
    for rows in sorted({len(one) for one in given}):
        alike = [i for i, one in enumerate(given) if len(one) == rows]
        for first in range(0, len(alike), PARTS):
            part = alike[first : first + PARTS]
            sources = [torch.Generator().manual_seed(seeds[i]) for i in part]
            x = pipe.noise((len(part), channels, size, size), sources, None)
            told, nothing = torch.stack([given[i] for i in part]), null.expand(len(part), -1, -1)
            guided = pipe.guided(told, nothing, scale)
            x = pipe.scheduler.walk("ddim", guided, x, timesteps, generator=sources)
            found |= dict(zip(part, data.to_unit(pipe.decode(x)).clamp(0, 1), strict=True))
    return torch.stack([found[i] for i in range(len(given))])


def without(states: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows (M, K) of one text but for some of them."""
    kept = [i for i in range(len(states)) if i not in set(rows)]
    errors.expect(bool(kept), "no row would be left to look at.")
    return states[kept]


def exchanged(states: Tensor, other: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows (M, K) of one text, some of them taken from another text of as many pieces."""
    mixed = states.clone()
    mixed[list(rows)] = other[list(rows)]
    return mixed


# --- attention-words: what is looked at, and what it does -----------------------------------------

PLAIN = tuple(colour for colour in COLOURS if colour[0] not in "aeiou")  # all follow "a", not "an"
SPANS = (
    "its own row", "the next word", "later words", "the end", "the padding", "all of these",
)  # fmt: skip
DROPPED = (
    "nothing", "the colour word", "the kind word", "the padding", "the end",
    "the end and the padding", "all words", "everything but the end",
)  # fmt: skip
GROUPS = ("start", "colour", "kind", "other words", "end", "padding")
TIMES = (50, 250, 500, 750, 950)  # noise levels at which true pictures are looked at


@dataclass(frozen=True)
class Question:
    """A scene with one thing, a text that says its colour and kind, and one other word for each."""

    scene: Scene
    colour: str
    kind: str

    @property
    def thing(self) -> Thing:
        return self.scene.things[0]

    def text(self, colour: str | None = None, kind: str | None = None) -> str:
        """What is said, or what would be said of another colour or kind. Nobody says where."""
        said = ThingFacts(kind or self.thing.kind, colour or self.thing.colour)
        return write(Facts(self.scene.sky, self.scene.place, things=(said,)))

    def other(self, what: str) -> str:
        """The text with the other colour, or with the other kind."""
        return self.text(**{what: getattr(self, what)})


@lru_cache(maxsize=4)
def questions(n: int, seed: int = 12) -> tuple[Question, ...]:
    """``n`` of them, all of combinations that training may see."""
    g, found = torch.Generator().manual_seed(seed), []

    def another(options: Sequence[str], said: str, scene: Scene, what: str) -> str | None:
        changed = [replace(scene.things[0], **{what: option}) for option in options]
        able = [
            option
            for option, thing in zip(options, changed, strict=True)
            if option != said and not is_held_out(replace(scene, things=(thing,)))
        ]
        return able[int(torch.randint(len(able), (), generator=g))]

    while len(found) < n:
        scene = sample(1, g, things=(1,))[0]
        thing = scene.things[0]
        if scene.stream or thing.colour not in PLAIN:
            continue
        colour = another(PLAIN, thing.colour, scene, "colour")
        kind = another(KINDS, thing.kind, scene, "kind")
        found.append(Question(scene, colour, kind))
    return tuple(found)


def spans(tokenizer: Tokenizer, text: str, word: str) -> dict[str, list[int]]:
    """Which rows know a word: its own and, as CLIP looks back only, those behind it."""
    row, rows = row_of(tokenizer, text, word), dict(rows_of(tokenizer, text)[-2:])
    end = rows["end"][0]
    known = [[row], [row + 1], list(range(row + 2, end)), [end], rows["padding"]]
    return dict(zip(SPANS, [*known, sum(known, [])], strict=True))


def grouped(tokenizer: Tokenizer, question: Question) -> dict[str, list[int]]:
    """All rows of a question's text, in the groups that the tables have."""
    text = question.text()
    rows = {what: [row_of(tokenizer, text, getattr(question.thing, what))]
            for what in ("colour", "kind")}  # fmt: skip
    ends = {name: mine for name, mine in rows_of(tokenizer, text) if name in ("end", "padding")}
    said = {0, *rows["colour"], *rows["kind"], *ends["end"], *ends["padding"]}
    others = [i for i in range(tokenizer.context) if i not in said]
    return {"start": [0], **rows, "other words": others, **ends}


def dropped(groups: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Which rows each of ``DROPPED`` takes away."""
    words = groups["colour"] + groups["kind"] + groups["other words"]
    behind = groups["end"] + groups["padding"]
    gone = ([], groups["colour"], groups["kind"], groups["padding"], groups["end"], behind, words,
            groups["start"] + words + groups["padding"])  # fmt: skip
    return dict(zip(DROPPED, gone, strict=True))


def shows(read: Facts | None, what: str, word: str, kind: str) -> bool:
    """Whether a picture shows a thing of this kind or, of the thing ``kind``, this colour."""
    things = () if read is None else read.things
    if what == "kind":
        return any(thing.kind == word for thing in things)
    return any((thing.kind, thing.colour) == (kind, word) for thing in things)


@torch.no_grad()
def looked_at(
    pipe: StableDiffusion, pictures: Tensor, context: Tensor, times: Sequence[int] = TIMES
) -> dict[int, Looks]:
    """Where the U-Net looks in *true* pictures, noised: by timestep, one call, no guidance.

    Args:
        pipe: The system.
        pictures: (B, 3, H, W) in [0, 1].
        context: What it is told of them, (B, M, K).
        times: Timesteps.
    """
    z = pipe.vae.encode(data.to_signed(pictures)).mean * pipe.vae.config.scaling_factor
    found, g = {}, torch.Generator().manual_seed(0)
    for t in times:
        step, noise = torch.tensor([t]).expand(len(z)), torch.randn(z.shape, generator=g)
        with recording(pipe.unet, len(z)) as looks:
            pipe.unet(pipe.scheduler.schedule.add_noise(z, noise, step), step, context)
        found[t] = looks
    return found


def on_the_thing(
    pipe: StableDiffusion, asked: Sequence[Question], times: Sequence[int] = TIMES
) -> dict[str, Any]:
    """How much of the maps of words lies on the thing in true pictures, as times its area.

    By noise level (mean over layers), by places a side (mean over noise levels), and the same
    against the mask of another question whose thing stands elsewhere, which is chance.
    """
    truth = covered([q.scene for q in asked])
    elsewhere = [
        next(j for j in (*range(i + 1, len(asked)), *range(i))
             if asked[j].thing.position != q.thing.position)
        for i, q in enumerate(asked)
    ]  # fmt: skip
    groups = [grouped(pipe.tokenizer, q) for q in asked]
    rows = {name: [g[name][0] for g in groups] for name in ("colour", "kind", "end", "start")}
    rows["a"] = [one - 1 for one in rows["colour"]]
    pictures, said = render([q.scene for q in asked]), [q.text() for q in asked]
    looks = looked_at(pipe, pictures, states_of(pipe, said), times)
    each = torch.arange(len(asked))
    area = truth.mean((1, 2))

    def of(maps: Tensor, word: str, mask: Tensor) -> Tensor:
        finer = mask.shape[-1] // maps.shape[-1]
        mine = maps[0, each, rows[word]].repeat_interleave(finer, -2).repeat_interleave(finer, -1)
        return share_inside(mine, mask)

    def over(word: str, mask: Tensor, shown: Sequence[Tensor]) -> dict[str, float]:
        shares = torch.stack([of(maps, word, mask) for maps in shown]).mean(0)
        return mean(shares / mask.mean((1, 2)))

    sizes = sorted({size for size, _ in looks[times[0]].sizes().values()})

    def by_size(mask: Tensor) -> dict[str, dict[str, dict[str, float]]]:
        shown = {s: [x.mean(s) for x in looks.values()] for s in sizes}
        return {word: {str(s): over(word, mask, shown[s]) for s in sizes} for word in rows}

    return {
        "area of the thing": mean(area),
        "by noise": {
            word: {str(t): over(word, truth, [looks[t].mean()]) for t in times} for word in rows
        },
        "by size": by_size(truth),
        "another scene's mask": by_size(truth[elsewhere]),
    }


@torch.no_grad()
def on_the_patch(
    pipe: StableDiffusion, scenes: Sequence[Scene], times: Sequence[int] = TIMES
) -> dict[str, Any]:
    """Told by pictures: how often a place looks at the patch at the same place.

    Only of layers with as many places as CLIP has patches. ``chance`` is one row in all.
    """
    pictures = render(list(scenes))
    context = pipe.encode_picture_prompts(pictures)  # (B, 1 + patches, K)
    side = round((context.shape[1] - 1) ** 0.5)
    at = torch.stack(torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"), -1).flatten(0, 1)
    apart = (at[:, None] - at[None]).abs().amax(-1)  # (places, patches), in steps
    rows: dict[str, list[Tensor]] = {"same": [], "next to it": [], "whole picture": []}
    for looks in looked_at(pipe, pictures, context, times).values():
        maps = looks.mean(side)[0].flatten(2).transpose(1, 2)  # (B, places, 1 + patches)
        patches = maps[..., 1:]
        rows["same"].append((patches * (apart == 0)).sum(-1).mean(-1))
        rows["next to it"].append((patches * (apart == 1)).sum(-1).mean(-1))
        rows["whole picture"].append(maps[..., 0].mean(-1))
    found = {name: mean(torch.stack(values).mean(0)) for name, values in rows.items()}
    return found | {"chance": 1 / context.shape[1]}


def where_it_goes(
    tokenizer: Tokenizer, asked: Sequence[Question], looks: Looks
) -> dict[str, dict[str, Any]]:
    """Shares of the attention by group of rows: in all, by layer, by step; means over prompts."""
    groups = [grouped(tokenizer, q) for q in asked]
    layers = {name: looks.of(name).mean((-2, -1)) for name in looks.maps}  # (S, B, M)
    pick = {
        name: torch.stack(
            [torch.isin(torch.arange(tokenizer.context), torch.tensor(g[name])) for g in groups]
        ).float()
        for name in GROUPS
    }  # (B, M) each
    everything = torch.stack(list(layers.values()))  # (layers, S, B, M)
    return {
        "in all": {n: mean((everything.mean((0, 1)) * p).sum(-1)) for n, p in pick.items()},
        "rows": {n: mean(p.sum(-1)) for n, p in pick.items()},
        "by layer": {
            layer: {n: (x * p).sum(-1).mean().item() for n, p in pick.items()}
            for layer, x in layers.items()
        },
        "by step": {n: (everything.mean(0) * p).sum(-1).mean(-1).tolist() for n, p in pick.items()},
        "t": looks.t[:],
    }


@measurement(
    "attention-words",
    "Where the U-Net looks while it draws, and what changes if it cannot: rows of a colour or kind"
    " word exchanged for another's, rows left out; attention on true things; one picture a prompt,"
    " the same noise each time, 95 % intervals",
    minutes=7,
    needs=(*StableDiffusion.made_of, "judge"),
)
def attention_words(
    n: int = 100, steps: int = STEPS, pipe: StableDiffusion | None = None
) -> dict[str, Any]:
    """Chapter 12's tables of one network. The notebook draws the first of these pictures again."""
    pipe = StableDiffusion.from_pretrained("storybook") if pipe is None else pipe
    judge, asked = Judge.from_pretrained(), questions(n)
    tokenizer, seeds = pipe.tokenizer, list(range(n))
    states = states_of(pipe, [q.text() for q in asked])
    as_prompts = [Prompt(q.text(), q.scene) for q in asked]

    def read(given: Sequence[Tensor]) -> list[Facts | None]:
        return judge.read(draw(pipe, given, seeds, steps=steps))

    # as told, with all maps kept: those of several parts side by side
    parts = []
    seen: list[Facts | None] = []
    for first in range(0, n, PARTS):
        part = slice(first, first + PARTS)
        with recording(pipe.unet, len(asked[part])) as looks:
            seen += judge.read(draw(pipe, states[part], seeds[part], steps=steps))
        parts.append(looks)
    looks = Looks(
        parts[0].t,
        {
            name: [torch.cat(maps) for maps in zip(*(p.maps[name] for p in parts), strict=True)]
            for name in parts[0].maps
        },
    )
    # of what is drawn: is the kind word's map where the judge sees the thing?
    kinds = [row_of(tokenizer, q.text(), q.thing.kind) for q in asked]
    maps, thirds = looks.mean().mean(0), []
    for i, (q, facts) in enumerate(zip(asked, seen, strict=True)):
        at = [t.position for t in (() if facts is None else facts.things) if t.kind == q.thing.kind]
        if len(at) == 1:
            low, high = EDGES[at[0]]
            inside = share_inside(maps[i, kinds[i]], third(at[0], maps.shape[-1])).item()
            thirds.append(inside / (high - low))

    swaps: dict[str, dict[str, Any]] = {}
    for what in ("colour", "kind"):
        other = states_of(pipe, [q.other(what) for q in asked])
        for span in SPANS:
            rows = [spans(tokenizer, q.text(), getattr(q.thing, what))[span] for q in asked]
            found = read([exchanged(*three) for three in zip(states, other, rows, strict=True)])
            words = [(getattr(q.thing, what), getattr(q, what)) for q in asked]
            old, new = (
                [shows(f, what, w[k], q.thing.kind)
                 for f, w, q in zip(found, words, asked, strict=True)]
                for k in (0, 1)
            )  # fmt: skip
            swaps.setdefault(what, {})[span] = {
                "old": interval(sum(old), n),
                "new": interval(sum(new), n),
                "shows new": "".join(str(int(one)) for one in new),
            }

    gone: dict[str, Any] = {}
    said = {}
    for name in DROPPED:
        rows = [dropped(grouped(tokenizer, q))[name] for q in asked]
        found = seen if name == "nothing" else read([*map(without, states, rows)])
        said[name] = right(as_prompts, found)
        gone[name] = {
            "marks": {
                k: v for k, v in marks(as_prompts, found).items()
                if k in ("sky", "place", "kind", "colour", "no scene")
            },
            "everything said": interval(sum(said[name]), n),
            "right": "".join(str(int(one)) for one in said[name]),
        }  # fmt: skip
    return {
        "seeds": [seeds[0], seeds[-1]],
        "prompts": n,
        "steps": steps,
        "guidance_scale": GUIDANCE,
        "attention": where_it_goes(tokenizer, asked, looks),
        "in the thing's third": (mean(thirds) if len(thirds) > 1 else {}) | {"n": len(thirds)},
        "true things": on_the_thing(pipe, asked),
        "pictures": on_the_patch(pipe, [q.scene for q in asked]),
        "exchanged": swaps,
        "left out": gone,
        "lost": {name: difference(said[name], said["nothing"]) for name in DROPPED[1:]},
    }


# --- sequence-or-pooled: two small networks that differ in what they can look at ------------------

SMALL_WIDTHS = (32, 64)
TELLINGS = ("a row of states", "the end's state")
Telling = Callable[[list[str]], Tensor]  # texts to what a network looks at, (B, M, K)
SMALL_STEPS, SCENES = 1200, 5000
EACH = 250  # prompts with one thing, and with two


def small_recipe(steps: int = SMALL_STEPS) -> Any:
    """The recipe's plan for fewer steps: the same batches, optimiser and fall of the rate."""
    return replace(recipe.RECIPES[0], steps=steps, warmup=50, ema=0.995)


def small_unet(latents: recipe.Latents) -> UNet:
    """A small one of the shipped layout; each call gives the same first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        config = recipe.build(latents).config
        return UNet(replace(config, block_out_channels=SMALL_WIDTHS))


def tell(words: Words, telling: str) -> Tensor:
    """What there is to look at: all states (B, N, K), or the end's alone (B, 1, K).

    The end's state is what CLIP pools: it has looked at the whole text.
    """
    errors.one_of("telling", telling, TELLINGS)
    if telling == TELLINGS[0]:
        return words.states
    end = words.mask.sum(1) - 1
    return words.states[torch.arange(len(end)), end][:, None]


def train_side_by_side(
    latents: recipe.Latents,
    tellings: Mapping[str, Telling],
    stream: str,
    steps: int,
    stop: int | None = None,
    most: float = recipe.MOST,
) -> tuple[dict[str, UNet], dict[str, list[float]]]:
    """Train a small U-Net for each telling, on the same batches, captions and noise.

    Args:
        latents: What to train on.
        tellings: What each network is told of captions.
        stream: Name of the stream of chance.
        steps: Of the plan.
        stop: Break off after so many of them.
        most: As of the recipe's loss; 1 for L_simple.

    Returns:
        Moving averages of the networks, and the loss of every step.
    """
    plan = small_recipe(steps)
    models = {telling: small_unet(latents).train() for telling in tellings}
    averages = {name: Average(model, plan.ema) for name, model in models.items()}
    dtype = PRECISIONS[fast_precision()] or torch.float32
    optimisers = {
        name: Muon(m.parameters(), plan.learning_rate, betas=plan.betas, dtype=dtype)
        for name, m in models.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps if stop is None else stop):
        g = generator(plan.seed, stream, step)
        indices = step * plan.batch_size + torch.arange(plan.batch_size)
        found = latents.take(latents.places(indices))
        said = latents.captions(found, g, recipe.NO_CAPTION)
        batch = recipe.noised(latents.draw(found, g), g)
        for telling, model in models.items():
            for group in optimisers[telling].param_groups:
                group["lr"] = learning_rate(plan, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                told = batch | {"states": tellings[telling](said)}
                error, _ = recipe.loss(model, told, latents, most)
            error.backward()
            nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            optimisers[telling].step()
            optimisers[telling].zero_grad(set_to_none=True)
            averages[telling].update(model, step)
            losses[telling].append(error.item())
    return {telling: average.model.eval() for telling, average in averages.items()}, losses


def by_states(clip: FrozenCLIP) -> dict[str, Telling]:
    """Of each of ``TELLINGS``, what it tells of texts that this CLIP has read."""
    return {name: lambda texts, name=name: tell(clip.read(texts), name) for name in TELLINGS}


def train_both(
    latents: recipe.Latents, steps: int, stop: int | None = None
) -> tuple[dict[str, UNet], dict[str, list[float]]]:
    """Chapter 12's two: one is told all states, one the end's alone; L_simple."""
    tellings = by_states(latents.clip)
    return train_side_by_side(latents, tellings, "sequence or pooled", steps, stop, most=1.0)


def asked_for(things: int, each: int = EACH) -> list[Prompt]:
    """Of the fixed prompts the first with so many things, no combination held out."""
    fit = [p for p in prompts() if len(p.facts.things) == things and not p.held_out]
    return fit[:each]


def apart(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Mean of ``a`` less mean of ``b``, of different prompts, with its 95 % interval (Welch)."""
    from scipy.stats import ttest_ind

    found = ttest_ind(a, b, equal_var=False)
    low, high = found.confidence_interval(0.95)
    value = sum(a) / len(a) - sum(b) / len(b)
    return {"value": value, "low": float(low), "high": float(high)}


def compared(
    models: Mapping[str, UNet],
    tellings: Mapping[str, Telling],
    latents: recipe.Latents,
    each: int,
    draw_steps: int,
) -> dict[str, Any]:
    """What the judge reads in pictures that two networks draw of the same prompts.

    Returns:
        ``things``: by their number, for each network and for a stranger's picture ``facts``,
        ``everything said`` and ``marks``, and what the first gains; ``gain grows with things``;
        ``readings`` of a few.
    """
    judge, found = Judge.from_pretrained(), {}
    a, b = tellings
    gains: dict[int, list[float]] = {}
    readings = []
    for things in (1, 2):
        asked = asked_for(things, each)
        texts = [p.text for p in asked]
        shares, wholes, seen, row = {}, {}, {}, {}
        for telling, unet in models.items():
            pipe = recipe.assemble(latents.clip, latents.vae, unet)
            given, nothing = tellings[telling](texts), tellings[telling]([""])[0]
            drawn = draw(pipe, given, range(len(asked)), null=nothing, steps=draw_steps)
            seen[telling] = judge.read(drawn)
        others = seen[a][1:] + seen[a][:1]
        for name, read in {**seen, "the picture of another prompt": others}.items():
            shares[name], wholes[name] = shares_right(asked, read), right(asked, read)
            row[name] = {
                "facts": mean(shares[name]),
                "everything said": interval(sum(wholes[name]), len(asked)),
                "marks": marks(asked, read),
            }
        gains[things] = [x - y for x, y in zip(shares[a], shares[b], strict=True)]
        found[str(things)] = row | {
            "prompts": len(asked),
            "gain in facts": mean(gains[things]),
            "gain in whole prompts": difference(wholes[a], wholes[b]),
        }
        readings += [
            [p.text, *("no scene" if f is None else write(f) for f in (seen[a][i], seen[b][i]))]
            for i, p in enumerate(asked[:4])
        ]
    return {
        "things": found,
        "gain grows with things": apart(gains[2], gains[1]),
        "readings": readings,
    }


def plan_of(
    models: Mapping[str, UNet], losses: Mapping[str, list[float]], steps: int, scenes: int
) -> dict[str, Any]:
    """How two small networks were trained, for the stored result."""
    return {
        "seeds": [0],
        "steps": steps,
        "pictures": steps * small_recipe(steps).batch_size,
        "scenes": scenes,
        "widths": list(SMALL_WIDTHS),
        "parameters": sum(p.numel() for p in next(iter(models.values())).parameters()),
        "precision": fast_precision(),
        "first losses": {name: values[:3] for name, values in losses.items()},
        "last losses": {name: sum(v[-50:]) / len(v[-50:]) for name, v in losses.items()},
    }


@measurement(
    "sequence-or-pooled",
    "Two small U-Nets on the same batches, one told by all states of the text, one by the end's"
    " alone: what the judge reads in their pictures of prompts with one thing and with two, 95 %"
    " intervals over prompts; one training each",
    minutes=17,
    needs=("autoencoder", "clip", "judge"),
)
def sequence_or_pooled(
    steps: int = SMALL_STEPS, each: int = EACH, scenes: int = SCENES, draw_steps: int = STEPS
) -> dict[str, Any]:
    """Chapter 12's comparison; the text is read by CLIP as it came from its own training."""
    latents = recipe.Latents(clip=FrozenCLIP.open(), scenes=scenes)
    models, losses = train_both(latents, steps)
    found = compared(models, by_states(latents.clip), latents, each, draw_steps)
    return plan_of(models, losses, steps, scenes) | found


# --- readers-exchanged: two small networks that differ in who reads for them ----------------------

READ_STEPS, READ_SCENES, READ_EACH = 800, 20_000, 100


@measurement(
    "readers-exchanged",
    "Two small U-Nets on the same batches, one told by CLIP's own text tower, one by the tower that"
    " was taught on: what the judge reads in their pictures of prompts with one thing and with two,"
    " 95 % intervals over prompts; one training each",
    minutes=17,
    needs=("autoencoder", "clip", "text-encoder", "judge"),
)
def readers_exchanged(
    steps: int = READ_STEPS,
    each: int = READ_EACH,
    scenes: int = READ_SCENES,
    draw_steps: int = STEPS,
) -> dict[str, Any]:
    """Chapter 13's comparison: the reader exchanged and nothing else; the recipe's own loss."""
    latents = recipe.Latents(clip=FrozenCLIP.open(), scenes=scenes)
    clips = dict(zip(READERS, (reader(), latents.clip), strict=True))
    tellings = {
        name: lambda texts, clip=clip: clip.read(texts).states for name, clip in clips.items()
    }
    models, losses = train_side_by_side(latents, tellings, "readers exchanged", steps)
    found = compared(models, tellings, latents, each, draw_steps)
    return plan_of(models, losses, steps, scenes) | found
