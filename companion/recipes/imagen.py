"""Imagen's two U-Nets: a base, and an upsampler. A frozen language model (``language``) tells both.

Saharia et al. 2022. Noise on a cosine, the noise as the base's target, one caption in ten left out,
as there; the upsampler's target is the velocity. Smaller than the paper's in every way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import checkpoints, data, diffusion
from companion.adm import CROSS, PLAIN, ADMConfig, ADMUNet
from companion.clip import CLIPText
from companion.imagen import (
    SCHEDULER,
    SUPER_RES_SCHEDULER,
    Imagen,
    Told,
    drawing,
    enlarging,
    laid_over,
    told_of,
)
from companion.judge import Judge
from companion.preparation import scaled
from companion.prompts import Prompt, marks, prompts
from companion.recipes.decoder import HEADS, WIDTHS
from companion.recipes.encoded import (
    GROUP,
    SCENES,
    SIZE,
    SMALL,
    Numbered,
    from_bytes,
    shrunk,
    to_bytes,
)
from companion.recipes.language import usual
from companion.recipes.upsamplers import FACTOR, distances, windows
from companion.schedule import Schedule
from companion.scheduler import Scheduler
from companion.scores import frechet
from companion.storybook import Scene, caption, render, sample
from companion.tokenizer import Tokenizer

NO_CAPTION = 0.1  # share left out, for guidance (section 2.2)
CROP = 32  # of the large picture, that a step of the upsampler sees
MOST = 500  # timestep up to which the small picture is noised in training, mostly far less
STEPS, GUIDANCE = 25, 3.0
OWN = Scheduler.of(Schedule.cosine(), SCHEDULER)
LARGE = Scheduler.of(Schedule.cosine(), SUPER_RES_SCHEDULER)
FRESH = 97  # the seed of scenes for the score, which no training draws from


# --- what the U-Nets train on ---------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Some pictures, at 64 and at 16 pixels, and what can be said of them."""

    about: list[Scene] | list[str]
    large: Tensor  # (G, 3, 64, 64) uint8
    small: Tensor  # (G, 3, 16, 16) uint8


class Read(Numbered):
    """Pictures by number, each drawn once, and captions as the frozen language model reads them."""

    purpose = "scenes of Imagen"

    def __init__(self, folder: Path | None = None, scenes: int = SCENES) -> None:
        super().__init__(folder, scenes)
        where = checkpoints.WEIGHTS / "language-model"
        self.text = CLIPText.from_pretrained(where).requires_grad_(False)
        self.tokenizer = Tokenizer.from_pretrained(where)

    @torch.no_grad()
    def read(self, texts: list[str]) -> Told:
        """Captions to what the U-Nets are told; long ones are cut."""
        tokens = self.tokenizer(texts, truncate=True)
        states = torch.cat([self.text(ids).states for ids in tokens.ids.split(GROUP)])
        return told_of(states, tokens.mask)

    def made(self, about: list[Scene] | list[str], pictures: Tensor) -> Group:
        """The pictures, large and small."""
        return Group(about, (255 * pictures).round().to(torch.uint8), to_bytes(pictures))

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures (B, 3, 64, 64) and (B, 3, 16, 16) in [-1, 1] and captions, one in ten empty."""
        return self._told(self.take(self.places(indices)), generator)

    def kept_batch(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The same of at most ``n`` of a folder's pictures that are not trained on."""
        pictures, texts = self.apart(n)
        group = self.made(texts, pictures)
        return self._told([(group, k) for k in range(len(texts))], generator)

    def _told(
        self, found: list[tuple[Group, int]], generator: torch.Generator
    ) -> dict[str, Tensor]:
        told = self.read(self.captions(found, generator, NO_CAPTION))
        return told._asdict() | {
            "large": from_bytes(torch.stack([group.large[k] for group, k in found])),
            "small": from_bytes(torch.stack([group.small[k] for group, k in found])),
        }


# --- the base -------------------------------------------------------------------------------------


def base(read: Read) -> ADMUNet:
    """The decoder's layout and size, told by states and by their mean."""
    return _unet(read, 3, WIDTHS, SMALL, projection=True, heads=HEADS)


def upsampler(read: Read) -> ADMUNet:
    """Text-conditional, told how noisy the small picture under the noisy one is (section 2.4)."""
    return _unet(read, 6, (16, 32, 48), SIZE, projection=False)


def _unet(
    read: Read,
    channels: int,
    widths: tuple[int, ...],
    size: int,
    projection: bool,
    heads: int | tuple[int, ...] = 16,
) -> ADMUNet:
    n, width = len(widths), read.text.config.hidden_size
    looking = n - 1 if projection else 1  # levels that look at the text, from the lowest
    config = ADMConfig(
        in_channels=channels,
        out_channels=3,
        block_out_channels=widths,
        down_block_types=(PLAIN[0],) * (n - looking) + (CROSS[0],) * looking,
        up_block_types=(CROSS[1],) * looking + (PLAIN[1],) * (n - looking),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        layers_per_block=1,
        attention_head_dim=heads,
        cross_attention_dim=width,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="projection" if projection else "timestep",
        projection_class_embeddings_input_dim=width if projection else None,
        norm_num_groups=8,
        sample_size=size,
    )
    return ADMUNet(config)


def base_batch(indices: Tensor, generator: torch.Generator, read: Read) -> dict[str, Tensor]:
    """Small pictures, captions, and what they are noised with."""
    return for_base(read.batch(indices, generator), generator)


def for_base(found: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Of pictures and captions what the base's loss compares."""
    del found["large"]
    x0 = found.pop("small")
    return found | {
        "x0": x0,
        "noise": torch.randn(x0.shape, generator=generator),
        "t": torch.randint(1000, (len(x0),), generator=generator),
    }


def base_loss(model: ADMUNet, batch: dict[str, Tensor], read: object) -> tuple[Tensor, dict]:
    """L_simple on the cosine schedule."""
    x_t = Schedule.cosine().add_noise(batch["x0"], batch["noise"], batch["t"])
    answer = model(x_t, batch["t"], batch["states"], batch["pooled"], batch["mask"])
    return diffusion.simple_loss(answer.to(x_t.dtype), batch["noise"]), {}


# --- the upsampler --------------------------------------------------------------------------------


def upsampler_batch(indices: Tensor, generator: torch.Generator, read: Read) -> dict[str, Tensor]:
    """Crops of large pictures, the small ones noised to a level that is told, captions."""
    return for_upsampler(read.batch(indices, generator), generator)


def for_upsampler(found: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Of pictures and captions what the upsampler's loss compares."""
    large, small = found.pop("large"), found.pop("small")
    n = len(large)
    corners = FACTOR * torch.randint((SIZE - CROP) // FACTOR + 1, (n, 2), generator=generator)
    level = (MOST * torch.rand(n, generator=generator) ** 2).long()  # half of them below MOST / 4
    noise = torch.randn(small.shape, generator=generator)
    noised = Schedule.cosine().add_noise(small, noise, level)
    x0 = windows(large, corners, CROP)
    return found | {
        "x0": x0,
        "below": windows(scaled(noised, (SIZE, SIZE)), corners, CROP),
        "level": level,
        "noise": torch.randn(x0.shape, generator=generator),
        "t": torch.randint(1000, (n,), generator=generator),
    }


def upsampler_loss(model: ADMUNet, batch: dict[str, Tensor], read: object) -> tuple[Tensor, dict]:
    """Squared error of the velocity; the noised small picture lies under the noisy large one."""
    x0, noise, t, schedule = batch["x0"], batch["noise"], batch["t"], Schedule.cosine()
    x_t = schedule.add_noise(x0, noise, t)
    both = torch.cat([x_t, batch["below"]], dim=1)
    answer = model(both, t, batch["states"], batch["level"], batch["mask"])
    wanted = diffusion.target_for(x0, noise, t, schedule, "v_prediction")
    return diffusion.simple_loss(answer.to(x_t.dtype), wanted), {}


# --- drawing and scoring --------------------------------------------------------------------------


def assemble(read: Read, unet: ADMUNet, super_res: ADMUNet) -> Imagen:
    """The trained networks as one system."""
    return Imagen(
        scheduler=OWN,
        super_res=super_res,
        super_res_scheduler=LARGE,
        text_encoder=read.text,
        tokenizer=read.tokenizer,
        unet=unet,
    )


@torch.no_grad()
def draw_small(
    model: ADMUNet, read: Read, texts: list[str], g: torch.Generator, scale: float = GUIDANCE
) -> Tensor:
    """The base alone: captions to pictures (B, 3, 16, 16) in [0, 1], as the system draws them."""
    timesteps, found = OWN.timesteps("ddpm", STEPS), []
    for i in range(0, len(texts), 50):
        told = read.read(texts[i : i + 50])
        denoise = drawing(model, OWN, told, nothing(read, len(told.mask)), scale, 0.95)
        x = torch.randn(len(told.mask), 3, SMALL, SMALL, generator=g)
        found.append(OWN.walk("ddpm", denoise, x, timesteps, generator=g))
    return data.to_unit(torch.cat(found))


def nothing(read: Read, n: int) -> Told:
    """The empty caption, n times."""
    return Told(*(x.repeat_interleave(n, 0) for x in read.read([""])))


def exam(model: ADMUNet, read: Read, asked: list[Prompt], seed: int = 0) -> dict[str, object]:
    """What the judge reads from 16 x 16 pictures of prompts, enlarged by a bicubic."""
    judge, g = Judge.from_pretrained(), torch.Generator().manual_seed(seed)
    true = render([p.scene for p in asked], SIZE)
    small = shrunk(true)
    drawn = draw_small(model, read, [p.text for p in asked], g)
    found, features = {}, {}
    for name, shown in ((", true pictures", small), ("", drawn)):
        pictures = scaled(shown, (SIZE, SIZE)).clamp(0, 1)
        features[name] = judge.features(pictures)
        found |= {f"{k}{name}": v for k, v in marks(asked, judge.read(pictures)).items()}
    distance = frechet(*features.values())
    return found | {f"Fréchet distance of {len(asked)} from the true ones": distance}


@torch.no_grad()
def base_score(model: ADMUNet, read: Read) -> dict[str, object]:
    """The exam on the first 400 prompts; for a reader's folder, the loss on pictures apart."""
    if read.rows is None:
        return exam(model, read, list(prompts()[:400]))
    return kept_loss(model, read, for_base, base_loss)


@torch.no_grad()
def upsampler_score(model: ADMUNet, read: Read) -> dict[str, object]:
    """Against bicubic enlargement, on 300 pictures that were never trained on."""
    if read.rows is not None:
        return kept_loss(model, read, for_upsampler, upsampler_loss)
    judge, g = Judge.from_pretrained(), torch.Generator().manual_seed(FRESH)
    scenes = sample(300, g)
    real, texts = render(scenes, SIZE), [caption(s, generator=g) for s in scenes]
    small = F.avg_pool2d(real, FACTOR)
    ways = {"bicubic": scaled(small, (SIZE, SIZE)).clamp(0, 1)}
    for level in (0, 100):
        drawn = [
            enlarge(model, read, small[i : i + 50], texts[i : i + 50], g, level)
            for i in range(0, len(small), 50)
        ]
        ways[f"upsampled, noise up to timestep {level}"] = torch.cat(drawn)
    return distances(judge, real, ways)[0]


@torch.no_grad()
def enlarge(
    model: ADMUNet,
    read: Read,
    small: Tensor,
    texts: list[str],
    g: torch.Generator,
    augmentation: int,
    steps: int = 10,
    scale: float = 1.0,
) -> Tensor:
    """Small pictures (B, 3, 16, 16) in [0, 1] to (B, 3, 64, 64), with answers clipped to range."""
    signed, told = data.to_signed(small), read.read(texts)
    null = nothing(read, len(small))
    noise = torch.randn(signed.shape, generator=g)
    below = laid_over(LARGE, signed, noise, augmentation, (SIZE, SIZE))
    denoise = enlarging(model, LARGE, below, augmentation, told, null, scale, None)
    x = torch.randn(len(small), 3, SIZE, SIZE, generator=g)
    timesteps = LARGE.timesteps("ddpm", steps)
    return data.to_unit(LARGE.walk("ddpm", denoise, x, timesteps, generator=g))


def kept_loss(
    model: ADMUNet,
    read: Read,
    compared: Callable[..., dict[str, Tensor]],
    loss: Callable[..., tuple[Tensor, dict]],
) -> dict[str, float]:
    """The loss on pictures of a reader's folder that were kept apart."""
    g = torch.Generator().manual_seed(FRESH)
    value, _ = loss(model, compared(read.kept_batch(200, g), g), read)
    return {"squared error of the answer, pictures kept apart": value.item()}


@torch.no_grad()
def look_at_base(model: ADMUNet, n: int = 8) -> Tensor:
    """Pairs: a true picture of 16 pixels, and what is drawn from its caption."""
    read, g = Read(scenes=GROUP), torch.Generator().manual_seed(FRESH)
    scenes = sample(n, g)
    drawn = draw_small(model.cpu(), read, [caption(s, generator=g) for s in scenes], g)
    true = F.avg_pool2d(render(scenes, SIZE), FACTOR)
    return F.interpolate(torch.stack([true, drawn], 1).flatten(0, 1), scale_factor=4.0)


@torch.no_grad()
def look_at_upsampler(model: ADMUNet, n: int = 4) -> Tensor:
    """Threes: known small, drawn large, true."""
    read, g = Read(scenes=GROUP), torch.Generator().manual_seed(FRESH)
    scenes = sample(n, g)
    true, texts = render(scenes, SIZE), [caption(s, generator=g) for s in scenes]
    small = F.avg_pool2d(true, FACTOR)
    drawn = enlarge(model.cpu(), read, small, texts, g, 0)
    return torch.stack([F.interpolate(small, scale_factor=FACTOR), drawn, true], 1).flatten(0, 1)


# --- the recipes ----------------------------------------------------------------------------------


RECIPES = (
    usual(
        "imagen",
        "Imagen's base: a caption, as a frozen language model reads it, to 16 x 16 pixels. It never"
        " saw the held-out combinations.",
        data=Read,
        model=base,
        batch=base_batch,
        loss=base_loss,
        sample=look_at_base,
        score=base_score,
        needs=("language-model", "judge"),
        steps=4500,
        batch_size=64,
        minutes=80,
        data_about="40,000 Storybook scenes, each with a new caption whenever it is seen",
    ),
    usual(
        "imagen-upsampler",
        "Imagen's upsampler, 16 x 16 pixels to 64 x 64: told the caption again, and how much noise"
        " lies over the small picture. It never saw the held-out combinations.",
        data=Read,
        model=upsampler,
        batch=upsampler_batch,
        loss=upsampler_loss,
        sample=look_at_upsampler,
        score=upsampler_score,
        needs=("language-model", "judge"),
        steps=4500,
        batch_size=32,
        minutes=65,
        data_about="40,000 Storybook scenes, each with a new caption whenever it is seen; crops of"
        " 32 x 32",
    ),
)
