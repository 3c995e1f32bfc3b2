"""The judge: a small network, apart from every generator, that reads facts back from a picture.

Whoever scores a generator with the network that steers it learns little: the one can fool the other.
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

from . import errors
from .storybook import COLOURS, KINDS, PLACES, POSITIONS, SKIES, Facts, Scene, ThingFacts, render

NOTHING = len(KINDS)  # the class of an empty position

# One answer each: a scene at all?, sky, place, stream; at each position a kind or nothing, a colour.
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

    def __init__(self, config: JudgeConfig = JudgeConfig()):  # noqa: B008 - frozen
        super().__init__()
        self.config = config
        backbones = {"convolution": _Convolution, "attention": _Attention}
        self.backbone = backbones[config.architecture](config)
        self.norm = nn.LayerNorm(config.features)
        self.head = nn.Linear(config.features, sum(HEADS.values()))

    @classmethod
    def from_pretrained(cls, folder: str = "judge") -> Judge:
        """Open a folder, or one of the shipped judges: "judge", "judge-second"."""
        from . import checkpoints

        where = checkpoints.shipped(folder)
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


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The right answers of all heads: whole numbers (B,); the colour of an empty position is -1."""
    rows: dict[str, list[int]] = {name: [] for name in HEADS}
    for scene in scenes:
        rows["scene"].append(1)
        rows["sky"].append(SKIES.index(scene.sky))
        rows["place"].append(PLACES.index(scene.place))
        rows["stream"].append(int(scene.stream))
        things = {t.position: t for t in scene.things}
        for where in POSITIONS:
            thing = things.get(where)
            rows[f"kind {where}"].append(NOTHING if thing is None else KINDS.index(thing.kind))
            rows[f"colour {where}"].append(-1 if thing is None else COLOURS.index(thing.colour))
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
    """Cut each picture into squares and lay them in a random order."""
    b, c, h, w = pictures.shape
    rows, columns = h // patch, w // patch
    cut = pictures.view(b, c, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    cut = cut.reshape(b, rows * columns, c, patch, patch)
    order = torch.stack([torch.randperm(rows * columns, generator=generator) for _ in range(b)])
    cut = cut[torch.arange(b).unsqueeze(1), order]
    cut = cut.view(b, rows, columns, c, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(b, c, h, w)


def non_scenes(kind: str, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures of no scene: "noise", "grey" (flat colour), "blended" (two scenes at once), "shuffled"."""
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
        share = 0.35 + 0.3 * torch.rand(b, 1, 1, 1, generator=generator)
        return share * pictures + (1 - share) * pictures.roll(1, 0)
    if kind == "shuffled":
        patch = (8, 16, 32)[int(torch.randint(3, (), generator=generator))]
        return shuffled(pictures, patch, generator)
    raise ValueError(f"unknown kind {kind!r}: expected noise, grey, blended or shuffled")


NON_SCENES = ("noise", "grey", "blended", "shuffled")


def spoiled(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A training batch from clean renders: half stays clean, the rest is spoiled in equal parts.

    Returns:
        pictures (B, 3, 64, 64), and (B,) whole numbers: 1 for a scene, 0 for none.
    """
    x, n = pictures.clone(), pictures.shape[0]
    is_scene = torch.ones(n, dtype=torch.long)
    part = max(1, n // 8)
    strength = torch.rand(3, generator=generator).tolist()
    x[:part] = blur(x[:part], 0.4 + 1.8 * strength[0])
    small = F.avg_pool2d(x[part : 2 * part], 4)
    x[part : 2 * part] = F.interpolate(small, scale_factor=4, mode="bicubic").clamp(0, 1)
    x[2 * part : 3 * part] = noised(x[2 * part : 3 * part], 0.02 + 0.2 * strength[1], generator)
    quarter = max(1, part // 4)
    for k, kind in enumerate(NON_SCENES):
        rows = slice(3 * part + k * quarter, 3 * part + (k + 1) * quarter)
        x[rows] = non_scenes(kind, pictures[rows], generator)
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


def right_answers(read: Sequence[Facts | None], scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of right answers: sky, place, stream, kind, colour, position, and all at once.

    Kinds, colours and positions are counted over the things that are there; a thing seen where
    there is none counts against "all".
    """
    errors.expect(len(read) == len(scenes), f"got {len(read)} readings of {len(scenes)} scenes")
    counts = {
        name: [0, 0] for name in ("sky", "place", "stream", "kind", "colour", "position", "all")
    }

    def count(name: str, right: bool) -> None:
        counts[name][0] += int(right)
        counts[name][1] += 1

    for facts, scene in zip(read, scenes, strict=True):
        seen = facts if facts is not None else Facts()
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
    return {name: right / asked for name, (right, asked) in counts.items() if asked}
