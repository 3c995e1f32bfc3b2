"""Stable Diffusion's autoencoder for 64 x 64 pictures: f = 8 and 4 channels, 8 x 8 x 4 latents.

Rombach et al. 2022, section 3.1, with two changes for a laptop: no perceptual and no adversarial
term in the loss (flat pictures have sharp edges, so edges are compared instead), and few channels
where the picture is large, since that is where the multiply-adds are.

The comparison of chapter 11 trains its networks by the same parts: ``Pictures``, ``batch``,
``loss``.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from companion import data, judge
from companion.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from companion.resnet import ResnetBlock
from companion.scores import interval, mean_interval
from companion.storybook import Scene, render, sample
from companion.train import Recipe, generator, pick

SIZE = 64
SCENES = 12_000  # rendered once each and then seen again, mirrored or not: drawing costs time too
FRESH = 31  # the seed of pictures for the score, which no training draws from
KL_WEIGHT = 1e-4


class Pictures:
    """Pictures of 64 x 64 by number, kept as bytes once drawn; those for the score are apart.

    Without a folder: ``n`` Storybook scenes, none with a held-out combination, each drawn from its
    own seed when it is first asked for. With one: its pictures, every tenth kept for the score.
    """

    def __init__(self, folder: Path | None = None, n: int = SCENES) -> None:
        self.rows = None if folder is None else data.ImageFolder(folder, SIZE)
        places = range(n if self.rows is None else len(self.rows))
        apart = self.rows is not None and len(places) > 1
        self.places = [i for i in places if not apart or i % 10 != 9 % len(places)]
        self.kept = [i for i in places if apart and i % 10 == 9 % len(places)]
        self._bytes = torch.zeros(len(places), 3, SIZE, SIZE, dtype=torch.uint8)
        self._known = torch.zeros(len(places), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Pictures to train on, (B, 3, 64, 64) in [0, 1], for numbers below ``len``, (B,)."""
        return self._take([self.places[i] for i in numbers.tolist()])

    def fresh(self, n: int) -> tuple[Tensor, list[Scene]]:
        """At most ``n`` pictures that are never trained on, and their scenes, where known."""
        if self.rows is not None:
            return self._take((self.kept or self.places)[:n]), []
        scenes = sample(n, torch.Generator().manual_seed(FRESH))
        return torch.cat([render(scenes[i : i + 50], SIZE) for i in range(0, n, 50)]), scenes

    def scene(self, place: int) -> Scene:
        """The scene with that number."""
        return sample(1, generator(0, "scenes of the autoencoder", place))[0]

    def _take(self, places: list[int]) -> Tensor:
        missing = sorted({i for i in places if not self._known[i]})
        if missing:
            if self.rows is None:
                drawn = render([self.scene(i) for i in missing], SIZE)
            else:
                drawn = torch.stack([self.rows[i]["picture"] for i in missing])
            self._bytes[missing] = (255 * drawn).round().byte()
            self._known[missing] = True
        return self._bytes[places].float() / 255


def batch(
    indices: Tensor,
    generator: torch.Generator,
    pictures: Pictures,
    latent: tuple[int, int, int] = (4, 8, 8),
) -> dict[str, Tensor]:
    """Pictures in [-1, 1], half of them mirrored, and the noise that latents are drawn with."""
    x = data.to_signed(pictures[pick(indices, len(pictures))])
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    noise = torch.randn(len(x), *latent, generator=generator)
    return {"pictures": torch.where(mirrored, x.flip(3), x), "noise": noise}


def distance(y: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """How far pictures (B, 3, H, W) in [-1, 1] are from others: |y - x| + 2 (y - x)^2 + edges / 2.

    ``edges`` is the mean absolute error of differences between neighbours, across plus down.
    """
    error = y - x
    across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
    parts = {"l1": error.abs().mean(), "mse": error.square().mean(), "edges": across + down}
    return parts["l1"] + 2 * parts["mse"] + 0.5 * parts["edges"], parts


def loss(
    model: Autoencoder,
    batch: dict[str, Tensor],
    kl_weight: float = KL_WEIGHT,
    how_far: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]] = distance,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``how_far`` off a round trip through a *drawn* latent is, and KL in nats a latent value."""
    x = batch["pictures"]
    posterior = model.encode(x)
    posterior = Posterior(posterior.mean.float(), posterior.log_variance.float())
    z = posterior.mean + posterior.std * batch["noise"]
    apart, parts = how_far(model.decode(z).float(), x)
    kl = posterior.kl().mean() / z[0].numel()
    parts = {name: value.detach() for name, value in parts.items()}
    return apart + kl_weight * kl, {**parts, "kl": kl.detach()}


# --- scale and score ------------------------------------------------------------------------------


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, for each picture: (B, C, H, W) in [0, 1] -> (B,)."""
    return -10 * (y - x).square().mean((1, 2, 3)).clamp(min=1e-12).log10()


@torch.no_grad()
def means(model: Autoencoder, pictures: Tensor, size: int = 50) -> Tensor:
    """Latents, unscaled, of pictures (B, 3, H, W) in [0, 1]: the means, a few at a time."""
    return torch.cat([model.encode(data.to_signed(x)).mean for x in pictures.split(size)])


@torch.no_grad()
def round_trip(model: Autoencoder, pictures: Tensor, size: int = 50) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] to latents (their means) and back."""
    return torch.cat([data.to_unit(model(data.to_signed(x))) for x in pictures.split(size)])


@torch.no_grad()
def set_scale(model: Autoencoder, pictures: Pictures, n: int = 2000) -> float:
    """Store 1 / (standard deviation of latents drawn for ``n`` training pictures) in the config.

    Rombach et al. 2022, appendix G: one number for all channels, about the common mean.
    """
    g = torch.Generator().manual_seed(0)
    n = min(n, len(pictures))
    drawn = []
    for numbers in torch.arange(n).split(50):
        drawn.append(model.encode(data.to_signed(pictures[numbers])).sample(g))
    scale = 1 / torch.cat(drawn).double().std().item()
    model.config = replace(model.config, scaling_factor=round(scale, 6))
    return model.config.scaling_factor


def facts_right(pictures: Tensor, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """What the judge reads right of pictures (B, 3, 64, 64): single facts, and whole scenes."""
    return in_short(judge.right_answers(judge.Judge.from_pretrained().read(pictures), scenes))


def in_short(answers: dict[str, tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Of ``judge.right_answers`` the shares of all single facts and of whole scenes."""
    single = [value for name, value in answers.items() if name != "all"]
    facts = (sum(column) for column in zip(*single, strict=True))
    return {"facts": interval(*facts), "whole scenes": interval(*answers["all"])}


def score(model: Autoencoder, pictures: Pictures, n: int = 1000) -> dict[str, object]:
    """PSNR, what the judge reads, and what the latents are like; on pictures never trained on."""
    x, scenes = pictures.fresh(n)
    back = round_trip(model, x)
    found: dict[str, object] = {"PSNR in dB, fresh pictures": mean_interval(psnr(back, x))}
    if scenes:
        for where, shown in (("of round trips", back), ("of the pictures themselves", x)):
            for name, value in facts_right(shown, scenes).items():
                found[f"judge reads right {where}, {name}"] = value
        apart = sample(200, torch.Generator().manual_seed(FRESH), held_out=True)
        y = torch.cat([render(apart[i : i + 50], SIZE) for i in range(0, len(apart), 50)])
        found["PSNR in dB, held-out combinations"] = mean_interval(psnr(round_trip(model, y), y))
    with torch.no_grad():
        said = [model.encode(data.to_signed(part)) for part in x.split(50)]
    mean, std = torch.cat([p.mean for p in said]), torch.cat([p.std for p in said])
    kl = torch.cat([p.kl() for p in said]) / mean[0].numel()
    return {
        **found,
        "standard deviation of latents, unscaled": mean.double().std().item(),
        "of which the encoder's own noise": std.double().square().mean().sqrt().item(),
        "KL in nats for a latent value": kl.mean().item(),
        "scaling factor": model.config.scaling_factor,
    }


# --- the recipe -----------------------------------------------------------------------------------


def config(widths: tuple[int, ...], channels: int = 4, layers: int = 1) -> AutoencoderConfig:
    """One width for each size, the largest first: ``len(widths) - 1`` halvings."""
    return AutoencoderConfig(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=1.0,  # until it is measured
    )


def build(config: AutoencoderConfig) -> Autoencoder:
    """A fresh autoencoder, in the memory layout that a CPU convolves fastest.

    It begins with residual branches that add little and an encoder that is sure of itself (standard
    deviation 0.05): torch's own start drowns the latents in noise, and learns more slowly.
    """
    model = Autoencoder(config)
    with torch.no_grad():
        model.quant_conv.bias[config.latent_channels :] = 2 * math.log(0.05)
        for part in model.modules():
            if isinstance(part, ResnetBlock):
                part.conv2.weight.mul_(0.1)
    return model.to(memory_format=torch.channels_last)


def _sample(model: nn.Module) -> Tensor:
    """Eight scenes, and below each what comes back."""
    x, _ = Pictures().fresh(8)
    return torch.cat([x, round_trip(model, x)])


RECIPES = (
    Recipe(
        name="autoencoder",
        about="Stable Diffusion's autoencoder at one eighth of life size: 64 x 64 pictures to"
        " 8 x 8 x 4 latents and back. It never saw the held-out combinations.",
        data=Pictures,
        model=lambda pictures: build(config((16, 32, 64, 96))),
        batch=batch,
        loss=lambda model, batch, pictures: loss(model, batch),
        sample=_sample,
        finish=set_scale,
        score=score,
        steps=4200,
        batch_size=16,
        learning_rate=3e-3,
        minutes=30,
        warmup=50,
        decay="late",
        optimiser="muon",
        betas=(0.9, 0.99),
        ema=0.998,
        chunk=16,
        needs=("judge",),
        dtype="float16",
        data_about=f"{SCENES} Storybook scenes, each seen several times, mirrored or not",
        save_every=100,
        sample_every=250,
    ),
)
