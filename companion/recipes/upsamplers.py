"""DALL·E 2's two upsamplers: 16 to 64 pixels, and 64 to 256.

Ramesh et al. 2022, section 2.1: trained on slightly degraded small pictures and on crops of a
quarter of the size, without attention and without a caption, so that they run on any size.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import data, diffusion, samplers
from companion.adm import PLAIN, ADMConfig, ADMUNet
from companion.dalle2 import SCHEDULERS
from companion.judge import Judge, right_answers
from companion.preparation import scaled
from companion.schedule import Schedule
from companion.scores import frechet, interval
from companion.storybook import Scene, render, sample
from companion.train import Recipe, pick

FACTOR = 4
STEPS = 7  # to draw with, as Karlo does
TARGET = SCHEDULERS["super_res_scheduler"]["prediction_type"]  # what the networks answer with
BLURRED = 0.5  # share of the small pictures that are blurred in training
CROPS = 4  # taken from each picture where drawing it costs more than training on it
FRESH = 47  # the seed of pictures for the score, which no training draws from


# --- what the network is told ---------------------------------------------------------------------


def blurred(small: Tensor, sigma: float = 0.6) -> Tensor:
    """Gaussian blur over 3 x 3 pixels, (B, C, H, W): DALL·E 2's degradation (table 3)."""
    weights = torch.exp(-0.5 * (torch.arange(-1.0, 2.0) / sigma) ** 2).to(small)
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    c = small.shape[1]
    padded = F.pad(small, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel.expand(c, 1, 3, 3), groups=c)


def enlarged(small: Tensor, factor: int = FACTOR) -> Tensor:
    """What is stacked under the noisy picture, (B, C, H, W) -> (B, C, 4 H, 4 W): bicubic."""
    h, w = small.shape[2:]
    return scaled(small, (factor * h, factor * w))


def windows(x: Tensor, corners: Tensor, size: int) -> Tensor:
    """A square of each picture (B, C, H, W): rows and columns from ``corners`` (B, 2) on."""
    pairs = zip(x, corners.tolist(), strict=True)
    return torch.stack([p[:, i : i + size, j : j + size] for p, (i, j) in pairs])


# --- data, batch, loss ----------------------------------------------------------------------------


class Pictures:
    """Large pictures to train on: Storybook scenes, drawn afresh, or those of a reader's folder.

    Args:
        folder: The reader's ``imagefolder``, of which every tenth is kept for the score; None for
            scenes without held-out combinations.
        size: Height and width in pixels.
    """

    def __init__(self, folder: Path | None, size: int) -> None:
        self.size = size
        self.rows = None if folder is None else data.ImageFolder(folder, size)
        places = range(0 if self.rows is None else len(self.rows))
        self.kept = [i for i in places if i % 10 == 9]
        self.used = [i for i in places if i % 10 != 9]

    def __len__(self) -> int:
        return len(self.used)

    def take(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 3, size, size) in [0, 1] for the samples with these numbers."""
        if self.rows is None:
            return render(sample(len(indices), generator), self.size)
        return self._read([self.used[i] for i in pick(indices, len(self.used)).tolist()])

    def fresh(self, n: int, size: int) -> tuple[Tensor, list[Scene]]:
        """Squares of at most ``n`` pictures that are never trained on; scenes, where known."""
        g = torch.Generator().manual_seed(FRESH)
        scenes = sample(n, g) if self.rows is None else []
        places = (self.kept or self.used)[:n]
        squares = []
        for i in range(0, len(scenes or places), 50):
            if scenes:
                whole = render(scenes[i : i + 50], self.size)
            else:
                whole = self._read(places[i : i + 50])
            squares.append(windows(whole, self.corners(len(whole), size, g), size))
        return torch.cat(squares), scenes

    def corners(self, n: int, size: int, generator: torch.Generator) -> Tensor:
        """Where ``n`` squares begin, (n, 2): on the grid of small pixels, as whole pictures do."""
        places = (self.size - size) // FACTOR + 1
        return FACTOR * torch.randint(places, (n, 2), generator=generator)

    def _read(self, places: list[int]) -> Tensor:
        return torch.stack([self.rows[i]["picture"] for i in places])


def batch(
    indices: Tensor, generator: torch.Generator, pictures: Pictures, *, crop: int, crops: int = 1
) -> dict[str, Tensor]:
    """Crops of large pictures, what is known of them at a quarter of the size, noise, timesteps.

    Args:
        indices: Numbers of the samples, int64 (B,).
        generator: Source of chance.
        pictures: What to take crops from.
        crop: Height and width of a crop.
        crops: How many come from the same picture.
    """
    whole = pictures.take(indices[::crops] // crops, generator).repeat_interleave(crops, dim=0)
    x0 = data.to_signed(whole[: len(indices)])  # (B, 3, size, size)
    small = F.avg_pool2d(x0, FACTOR)
    chosen = torch.rand(len(x0), generator=generator) < BLURRED
    small = torch.where(chosen[:, None, None, None], blurred(small), small)
    corners = pictures.corners(len(x0), crop, generator)
    x0 = windows(x0, corners, crop)
    return {
        "x0": x0,
        "condition": windows(enlarged(small), corners, crop),
        "noise": torch.randn(x0.shape, generator=generator),
        "t": torch.randint(1000, (len(x0),), generator=generator),
    }


def loss(
    model: nn.Module, batch: dict[str, Tensor], pictures: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error on the cosine schedule; the enlarged small picture lies under the noisy one."""
    x0, noise, t, schedule = batch["x0"], batch["noise"], batch["t"], Schedule.cosine()
    x_t = schedule.add_noise(x0, noise, t)
    answer = model(torch.cat([x_t, batch["condition"]], dim=1), t)
    wanted = diffusion.target_for(x0, noise, t, schedule, TARGET)
    return diffusion.simple_loss(answer.to(x0.dtype), wanted), {}  # half, in mixed precision


# --- drawing and scoring --------------------------------------------------------------------------


@torch.no_grad()
def upsample(model: nn.Module, small: Tensor, generator: torch.Generator) -> Tensor:
    """Small pictures (B, 3, H, W) in [0, 1] to (B, 3, 4 H, 4 W) in [0, 1], as a pipeline would."""
    schedule, device = Schedule.cosine(), next(model.parameters()).device
    condition = enlarged(data.to_signed(small)).to(device)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return diffusion.to_x0(model(torch.cat([x, condition], 1), t), x, t, schedule, TARGET)

    x_T = torch.randn(condition.shape, generator=generator).to(device)
    t = samplers.timesteps("ddpm", STEPS, schedule, "linspace")  # as UnCLIPScheduler has them
    x = samplers.ddpm(denoise, x_T, t, schedule, generator=generator, clip=1.0)
    return data.to_unit(x).cpu()


def bicubic(small: Tensor) -> Tensor:
    """What costs nothing: small pictures in [0, 1], enlarged and clipped."""
    return enlarged(small).clamp(0, 1)


def difference(real: Tensor, one: Tensor, other: Tensor, rounds: int = 200) -> dict[str, float]:
    """Fréchet distance of ``one`` less that of ``other`` from ``real``, features (N, D) each.

    Row i of all three belongs to the same picture, so the bootstrap draws rows with replacement for
    all three at once. Resampled sets lie further apart than the sets themselves (a Fréchet distance
    grows as pictures get fewer), so only the spread of the differences is taken from it: the
    interval (95 %) is the value and 1.96 standard deviations to either side.
    """
    g, n = torch.Generator().manual_seed(FRESH), len(real)
    found = []
    for _ in range(rounds):
        rows = torch.randint(n, (n,), generator=g)
        found.append(frechet(real[rows], one[rows]) - frechet(real[rows], other[rows]))
    value = frechet(real, one) - frechet(real, other)
    half = 1.96 * torch.tensor(found).std().item()
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def distances(
    judge: Judge, real: Tensor, ways: dict[str, Tensor], what: str = "pictures"
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """How far enlarged pictures lie from the true ones, by way; and all features, "real" too."""
    features = {"real": judge.features(real)} | {k: judge.features(x) for k, x in ways.items()}
    found: dict[str, object] = {}
    for name in ways:
        distance = frechet(features["real"], features[name])
        found[f"Fréchet distance from the true {what}, {name}"] = distance
        error = (ways[name] - real).square().flatten(1).mean(1)
        found[f"PSNR in dB, {name}"] = (-10 * error.log10()).mean().item()
    return found, features


@torch.no_grad()
def score(model: nn.Module, pictures: Pictures, n: int = 500) -> dict[str, object]:
    """Against bicubic enlargement, on pictures that were never trained on.

    Distances are in the judge's features, which see 64 x 64 pixels: the whole picture, or a square
    of a larger one, chosen at random for each.
    """
    judge, g = Judge.from_pretrained(), torch.Generator().manual_seed(FRESH)
    size = judge.config.size
    real, scenes = pictures.fresh(n, size)
    small = F.avg_pool2d(real, FACTOR)
    ways = {"bicubic": bicubic(small)}
    ways["upsampled"] = torch.cat([upsample(model, x, g) for x in small.split(50)])
    what = "pictures" if pictures.size == size else f"squares of {size} x {size}"
    found, features = distances(judge, real, ways, what)
    gap = difference(features["real"], features["bicubic"], features["upsampled"])
    found["Fréchet distance, bicubic less upsampled"] = gap
    if pictures.size == size and scenes:
        for name, shown in {"true pictures": real, **ways}.items():
            right, asked = right_answers(judge.read(shown), scenes)["all"]
            found[f"the judge reads everything right, {name}"] = interval(right, asked)
    return found


def look(model: nn.Module, size: int) -> Tensor:
    """Three squares each of four scenes: known small, drawn large, true. (12, 3, 64, 64)."""
    truth, _ = Pictures(None, size).fresh(4, 64)
    small = F.avg_pool2d(truth, FACTOR)
    drawn = upsample(model, small, torch.Generator().manual_seed(FRESH))
    return torch.stack([F.interpolate(small, scale_factor=FACTOR), drawn, truth], 1).flatten(0, 1)


# --- the recipes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One enlargement by four: sizes in pixels, and how large a network it gets."""

    size: int
    crop: int
    widths: tuple[int, ...]
    crops: int = 1

    @property
    def config(self) -> ADMConfig:
        """Karlo's layout: the small picture as three more channels in, no attention, no scale."""
        n = len(self.widths)
        return ADMConfig(
            in_channels=6,
            out_channels=3,
            block_out_channels=self.widths,
            down_block_types=(PLAIN[0],) * n,
            up_block_types=(PLAIN[1],) * n,
            add_attention=False,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=self.size,
        )


FIRST = Stage(size=64, crop=32, widths=(32, 48, 96))
SECOND = Stage(size=256, crop=64, widths=(24, 48, 64), crops=CROPS)


def _recipe(name: str, about: str, stage: Stage, **numbers: object) -> Recipe:
    return Recipe(
        name=name,
        about=about + " Trained on crops, told of the small picture, now and then blurred; it sees"
        " no words. It never saw the held-out combinations.",
        data=partial(Pictures, size=stage.size),
        model=lambda pictures: ADMUNet(stage.config),
        batch=partial(batch, crop=stage.crop, crops=stage.crops),
        loss=loss,
        sample=partial(look, size=stage.size),
        score=score,
        needs=("judge",),
        batch_size=32,
        chunk=16,
        warmup=100,
        decay="late",
        optimiser="muon",
        betas=(0.9, 0.99),
        dtype="float16",
        **numbers,
    )


RECIPES = (
    _recipe(
        "upsampler-64",
        "DALL·E 2's first upsampler: 16 x 16 pixels to 64 x 64.",
        FIRST,
        steps=1600,
        learning_rate=2e-3,
        minutes=25,
        ema=0.999,
    ),
    _recipe(
        "upsampler-256",
        "DALL·E 2's second upsampler: 64 x 64 pixels to 256 x 256.",
        SECOND,
        steps=1000,
        learning_rate=2e-3,
        minutes=30,
        ema=0.998,
    ),
)
