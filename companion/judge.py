"""The judge: a small network, apart from every generator, that reads facts back from pictures.

Whoever scores a generator with the network that steers it learns little: one can fool the other.
So the judge is trained on Storybook renders alone (clean, blurred, noised, and pictures that are no
scene at all), is never part of any generator, and a second judge of another architecture checks it.
Both are instruments: unlike everything else they are trained on *all* combinations, the held-out
ones included, since they must read those too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoints, errors
from .scores import interval
from .storybook import (
    COLOURS,
    KINDS,
    PLACES,
    POSITIONS,
    SKIES,
    Facts,
    Scene,
    ThingFacts,
    render,
    sample,
)

NOTHING = len(KINDS)  # the class of an empty position
NON_SCENES = ("noise", "grey", "blended", "shuffled")

# One answer each: a scene at all?, sky, place, stream; at each position a kind (or nothing) and
# a colour.
HEADS = {"scene": 2, "sky": len(SKIES), "place": len(PLACES), "stream": 2}
HEADS |= {f"kind {where}": len(KINDS) + 1 for where in POSITIONS}
HEADS |= {f"colour {where}": len(COLOURS) for where in POSITIONS}


@dataclass(frozen=True)
class JudgeConfig:
    """``architecture`` is "convolution" (the judge) or "attention" (the second judge)."""

    architecture: str = "convolution"
    width: int = 32
    depth: int = 4
    features: int = 128
    size: int = 64

    def __post_init__(self) -> None:
        errors.expect(
            self.architecture in ("convolution", "attention"),
            f"unknown judge architecture {self.architecture!r}: "
            "expected 'convolution' or 'attention'",
        )


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class _Convolution(nn.Module):
    """Halve the picture three times, twice the channels each time: (B, 3, 64, 64) -> (B, F)."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        w = config.width
        self.stages = nn.Sequential(
            nn.Conv2d(3, w, 4, stride=2, padding=1),  # (B, w, 32, 32)
            nn.SiLU(),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1),  # (B, 2w, 16, 16)
            _Residual(2 * w),
            nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1),  # (B, 4w, 8, 8)
            *(_Residual(4 * w) for _ in range(config.depth - 3)),
            nn.GroupNorm(8, 4 * w),
            nn.SiLU(),
            nn.Conv2d(4 * w, w, 1),
        )
        self.out = nn.Linear(w * (config.size // 8) ** 2, config.features)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stages(x).flatten(1))


class _Attention(nn.Module):
    """A small Transformer over 8 x 8 patches: (B, 3, 64, 64) -> (B, F)."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        w = config.width
        self.patch = nn.Conv2d(3, w, 8, stride=8)
        self.place = nn.Parameter(torch.randn((config.size // 8) ** 2, w) * 0.02)
        layer = nn.TransformerEncoderLayer(
            w, w // 32, 4 * w, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(w)
        self.squeeze = nn.Linear(w, 32)
        self.out = nn.Linear(32 * (config.size // 8) ** 2, config.features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)  # (B, N, w)
        h = self.norm(self.layers(h + self.place))
        return self.out(self.squeeze(h).flatten(1))


class Judge(nn.Module):
    """Reads sky, place, stream and things from pictures (B, 3, 64, 64) in [0, 1]."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig = JudgeConfig()):
        super().__init__()
        self.config = config
        backbones = {"convolution": _Convolution, "attention": _Attention}
        self.backbone = backbones[config.architecture](config)
        self.norm = nn.LayerNorm(config.features)
        self.head = nn.Linear(config.features, sum(HEADS.values()))

    @classmethod
    def from_pretrained(cls, folder: str = "judge") -> Judge:
        """Open a folder, or one of the shipped judges: "judge", "judge-second"."""
        where = checkpoints.WEIGHTS / folder
        if not where.is_dir():
            where = checkpoints.find_folder(folder)
        judge = cls(checkpoints.read_config(where, JudgeConfig))
        checkpoints.load_into(judge, where)
        return judge.eval()

    def features(self, pictures: Tensor) -> Tensor:
        """What the answers are read from, (B, F): the space of the Fréchet distance."""
        s = self.config.size
        errors.tensor("pictures", pictures, shape=f"B 3 {s} {s}")
        return self.norm(F.silu(self.backbone(pictures * 2 - 1)))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits, one entry a head: see ``HEADS``."""
        logits = self.head(self.features(pictures)).split(list(HEADS.values()), dim=1)
        return dict(zip(HEADS, logits, strict=True))

    @torch.no_grad()
    def read(self, pictures: Tensor, batch: int = 256) -> list[Facts | None]:
        """What each picture shows; None where it is no Storybook scene.

        Args:
            pictures: (B, 3, 64, 64), from 0 to 1 (values beyond are clipped).
            batch: how many at a time.
        """
        errors.tensor("pictures", pictures, finite=True)
        found: list[Facts | None] = []
        for part in pictures.clamp(0, 1).split(batch):
            found += facts_from(self(part))
        return found


def facts_from(logits: dict[str, Tensor]) -> list[Facts | None]:
    """The likeliest answer of each head as Facts; of three things the likeliest two."""
    best = {name: value.argmax(1).tolist() for name, value in logits.items()}
    present = torch.stack([1 - logits[f"kind {w}"].softmax(1)[:, NOTHING] for w in POSITIONS], 1)
    found: list[Facts | None] = []
    for i, scene in enumerate(best["scene"]):
        if not scene:
            found.append(None)
            continue
        spots = [k for k, w in enumerate(POSITIONS) if best[f"kind {w}"][i] != NOTHING]
        spots = sorted(spots, key=lambda k: -present[i, k].item())[:2]
        things = tuple(
            ThingFacts(
                KINDS[best[f"kind {POSITIONS[k]}"][i]],
                COLOURS[best[f"colour {POSITIONS[k]}"][i]],
                POSITIONS[k],
            )
            for k in spots
        )
        sky, place = SKIES[best["sky"][i]], PLACES[best["place"][i]]
        found.append(Facts(sky, place, bool(best["stream"][i]), things))
    return found


def labels(scenes: Sequence[Scene | Facts]) -> dict[str, Tensor]:
    """The right answers of all heads: whole numbers (B,); -1 where the answer is not known.

    A scene answers everything (but for the colour of an empty position). Facts, read from a
    caption of the reader's own pictures, answer what was said.
    """
    rows: dict[str, list[int]] = {name: [] for name in HEADS}
    for scene in scenes:
        whole = isinstance(scene, Scene)
        things = {t.position: t for t in scene.things if t.position is not None}
        rows["scene"].append(1)
        rows["sky"].append(SKIES.index(scene.sky) if scene.sky else -1)
        rows["place"].append(PLACES.index(scene.place) if scene.place else -1)
        rows["stream"].append(int(scene.stream) if whole or scene.stream else -1)
        for where in POSITIONS:
            thing, kind, colour = things.get(where), NOTHING if whole else -1, -1
            if thing is not None:
                kind = KINDS.index(thing.kind)
                colour = COLOURS.index(thing.colour) if thing.colour else -1
            rows[f"kind {where}"].append(kind)
            rows[f"colour {where}"].append(colour)
    return {name: torch.tensor(row) for name, row in rows.items()}


# ---------------------------------------------------------------- what the judge is trained on


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; ``sigma`` in pixels."""
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=pictures.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)  # (3, 1, 1, K)
    padded = F.pad(pictures, [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def noised(pictures: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise and clip to [0, 1]."""
    return (pictures + sigma * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def shuffled(pictures: Tensor, patch: int, generator: torch.Generator) -> Tensor:
    """Cut each picture into squares and lay them in a random order.

    At least one piece leaves its row: left and right halves alone may change places and still make
    a scene.
    """
    b, c, h, w = pictures.shape
    rows, columns = h // patch, w // patch
    cut = pictures.view(b, c, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    cut = cut.reshape(b, rows * columns, c, patch, patch)
    home = torch.arange(rows * columns) // columns
    orders: list[Tensor] = []
    while len(orders) < b:
        order = torch.randperm(rows * columns, generator=generator)
        if (order // columns != home).any():
            orders.append(order)
    order = torch.stack(orders)
    cut = cut[torch.arange(b).unsqueeze(1), order]
    cut = cut.view(b, rows, columns, c, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(b, c, h, w)


def non_scenes(
    kind: str, pictures: Tensor, generator: torch.Generator, others: Tensor | None = None
) -> Tensor:
    """Pictures of no scene, made from pictures of scenes (B, 3, 64, 64).

    Args:
        kind: "noise", "grey" (one flat colour), "blended" (two scenes at once) or "shuffled" (cut
            into squares of 8, 16 or 32 pixels that lie in a random order).
        pictures: renders, from 0 to 1.
        generator: source of chance.
        others: what to blend with; default: each picture with the one before it.
    """
    errors.one_of("kind", kind, NON_SCENES)
    b = pictures.shape[0]
    if kind == "noise":
        mean, spread = torch.rand(2, b, 1, 1, 1, generator=generator)
        noise = torch.randn(pictures.shape, generator=generator)
        return (mean + (0.1 + spread) * noise).clamp(0, 1)
    if kind == "grey":
        level = torch.rand(b, 1, 1, 1, generator=generator)
        tint = 0.1 * torch.randn(b, 3, 1, 1, generator=generator)
        return (level + tint + torch.zeros_like(pictures)).clamp(0, 1)
    if kind == "blended":
        if others is None:
            errors.expect(b > 1, "blending needs two pictures or more, got one; or give others=")
            others = pictures.roll(1, 0)
        share = 0.35 + 0.3 * torch.rand(b, 1, 1, 1, generator=generator)
        return share * pictures + (1 - share) * others
    patch = (8, 16, 32)[int(torch.randint(3, (), generator=generator))]
    return shuffled(pictures, patch, generator)


def spoiled(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A training batch from clean renders: half stays clean, the rest is spoiled in equal parts.

    Returns:
        pictures (B, 3, 64, 64), and (B,) whole numbers: 1 for a scene, 0 for none.
    """
    x, n = pictures.clone(), pictures.shape[0]
    errors.expect(n >= 8, f"a batch to spoil holds at least 8 pictures, got {n}")
    is_scene = torch.ones(n, dtype=torch.long)
    part = n // 8
    strength = torch.rand(3, generator=generator).tolist()
    x[:part] = blur(x[:part], 0.4 + 1.8 * strength[0])
    small = F.avg_pool2d(x[part : 2 * part], 4)
    x[part : 2 * part] = F.interpolate(small, scale_factor=4, mode="bicubic").clamp(0, 1)
    x[2 * part : 3 * part] = noised(x[2 * part : 3 * part], 0.02 + 0.2 * strength[1], generator)
    quarter = max(1, part // 4)
    for k, kind in enumerate(NON_SCENES):
        rows = slice(3 * part + k * quarter, 3 * part + (k + 1) * quarter)
        x[rows] = non_scenes(kind, pictures[rows], generator, pictures[:quarter])
        is_scene[rows] = 0
    return x, is_scene


def loss(judge: Judge, pictures: Tensor, answers: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """Cross-entropy summed over the heads; where there is no scene, only that is asked.

    Returns:
        the loss, and {"right": the share of scenes read without any mistake}.
    """
    logits = judge(pictures)
    shown = answers["scene"] == 1
    total = F.cross_entropy(logits["scene"], answers["scene"])
    whole = torch.ones_like(shown)
    for name in HEADS:
        if name == "scene":
            continue
        asked = shown & (answers[name] >= 0)
        if not asked.any():  # a mean over nothing is no number
            continue
        wanted = answers[name].where(asked, torch.full_like(answers[name], -100))
        share = asked.sum().clamp(min=1) / shown.sum().clamp(min=1)
        total = total + share * F.cross_entropy(logits[name], wanted, ignore_index=-100)
        whole &= (logits[name].argmax(1) == answers[name]) | ~asked
    right = (whole & shown).sum() / shown.sum().clamp(min=1)
    return total, {"right": right.detach()}


def training_batch(scenes: Sequence[Scene], generator: torch.Generator) -> dict[str, Tensor]:
    """Render, spoil, label: {"pictures": (B, 3, 64, 64), head: (B,), ...}."""
    pictures, is_scene = spoiled(render(scenes, 64), generator)
    return {"pictures": pictures, **labels(scenes), "scene": is_scene}


# ---------------------------------------------------------------- how good is the judge?

ASKED = ("sky", "place", "stream", "kind", "colour", "position", "all")


def right_answers(
    read: Sequence[Facts | None], scenes: Sequence[Scene]
) -> dict[str, tuple[int, int]]:
    """How many answers are right, out of how many, for each of ``ASKED``.

    Kinds, colours and positions are counted over the things that are there. "all" counts pictures
    that are read without any mistake; a thing seen where there is none is one.
    """
    errors.expect(len(read) == len(scenes), f"got {len(read)} readings of {len(scenes)} scenes")
    right, asked = dict.fromkeys(ASKED, 0), dict.fromkeys(ASKED, 0)

    def count(name: str, holds: bool) -> None:
        right[name] += int(holds)
        asked[name] += 1

    for facts, scene in zip(read, scenes, strict=True):
        seen = Facts() if facts is None else facts
        count("sky", seen.sky == scene.sky)
        count("place", seen.place == scene.place)
        count("stream", facts is not None and seen.stream == scene.stream)
        at = {t.position: t for t in seen.things}
        for thing in scene.things:
            found = at.get(thing.position)
            count("position", found is not None)
            count("kind", found is not None and found.kind == thing.kind)
            count("colour", found is not None and found.colour == thing.colour)
        count("all", seen == scene.facts())
    return {name: (right[name], asked[name]) for name in ASKED if asked[name]}


@torch.no_grad()
def exam(judge: Judge, n: int = 2000, seed: int = 2_026) -> dict[str, dict[str, float]]:
    """Examine a judge on ``n`` fresh scenes, clean and spoiled: one share with interval a question.

    "clean sky", "blurred kind" (Gaussian, one pixel), "noised colour" (sigma 0.1), "small place"
    (averaged to 16 pixels and scaled up again), …; and "none: grey" and its kin, the share of
    non-scenes that were recognised as such.
    """
    g = torch.Generator().manual_seed(seed)
    scenes = sample(n, g, held_out=None)
    clean = render(scenes)
    small = F.interpolate(F.avg_pool2d(clean, 4), scale_factor=4, mode="bicubic")
    shown = {"clean": clean, "blurred": blur(clean, 1.0), "noised": noised(clean, 0.1, g)}
    shown["small"] = small.clamp(0, 1)
    report: dict[str, dict[str, float]] = {}
    for how, pictures in shown.items():
        for name, (right, asked) in right_answers(judge.read(pictures), scenes).items():
            report[f"{how} {name}"] = interval(right, asked)
    for kind in NON_SCENES:
        read = judge.read(torch.cat([non_scenes(kind, x, g) for x in clean.split(50)]))
        report[f"none: {kind}"] = interval(sum(facts is None for facts in read), n)
    return report


def confusion(
    read: Sequence[Facts | None], scenes: Sequence[Scene], what: str
) -> tuple[Tensor, tuple[str, ...]]:
    """What is taken for what: counts (true, read) and the names of rows and columns.

    Args:
        read: a judge's readings.
        scenes: the truth.
        what: "sky", "place", "kind" or "colour"; the last column counts "none" (no scene, or
            nothing where something stands).
    """
    options = {"sky": SKIES, "place": PLACES, "kind": KINDS, "colour": COLOURS}
    errors.one_of("what", what, options)
    names = options[what]
    counts = torch.zeros(len(names), len(names) + 1, dtype=torch.long)

    def count(true: str, said: str | None) -> None:
        counts[names.index(true), len(names) if said is None else names.index(said)] += 1

    for facts, scene in zip(read, scenes, strict=True):
        if what in ("sky", "place"):
            count(getattr(scene, what), None if facts is None else getattr(facts, what))
            continue
        at = {} if facts is None else {t.position: t for t in facts.things}
        for thing in scene.things:
            found = at.get(thing.position)
            count(getattr(thing, what), None if found is None else getattr(found, what))
    return counts, (*names, "none")
