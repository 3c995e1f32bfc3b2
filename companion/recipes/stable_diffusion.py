"""Stable Diffusion's U-Net: noise in latents of 8 x 8 x 4, told of by CLIP's text states.

Rombach et al. 2022, with the choices of Stable Diffusion 1: a frozen autoencoder, a frozen CLIP
text encoder (``text_encoder`` trained it) whose last states are looked at, the noise as target, one
caption in ten left out. One batch in five is told by the states of CLIP's picture tower instead,
for ``image_prompt=``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from companion import checkpoints, data, diffusion
from companion.autoencoder import Autoencoder, Posterior
from companion.judge import Judge
from companion.prompts import Prompt, marks, prompts
from companion.recipes.encoded import MOST, SIZE, FrozenCLIP, Numbered, reader
from companion.schedule import Schedule
from companion.scores import frechet
from companion.stable_diffusion import StableDiffusion, own_parts
from companion.storybook import Scene, caption, render, sample
from companion.train import Recipe
from companion.unet import UNet, UNetConfig

WIDTHS = (48, 80)  # at 8 x 8 and at 4 x 4, both looking at the text
SHOWN = 0.2  # share of the batches that are told by the pictures themselves
NO_CAPTION = 0.1  # share left out, for guidance (model card of Stable Diffusion 1.4)
STEPS, GUIDANCE = 25, StableDiffusion.asked_with["guidance_scale"]
FRESH = 83  # the seed of scenes to look at, which no training draws from


@dataclass(frozen=True)
class Folded:
    """Some pictures: what can be said of them, and the clouds of their latents, unscaled."""

    about: list[Scene] | list[str]
    mean: Tensor  # (G, 4, 8, 8)
    log_variance: Tensor


class Latents(Numbered):
    """Pictures by number, each drawn and folded by the frozen autoencoder once.

    Args:
        folder: The reader's ``imagefolder``.
        clip: Who reads captions and pictures; the shipped reader if None.
        options: ``scenes``, as for :class:`Numbered`.
    """

    purpose = "scenes of Stable Diffusion"

    def __init__(
        self, folder: Path | None = None, clip: FrozenCLIP | None = None, **options: int
    ) -> None:
        super().__init__(folder, **options)
        self.clip = reader() if clip is None else clip
        self.vae = Autoencoder.from_pretrained(checkpoints.WEIGHTS / "autoencoder")
        self.vae.requires_grad_(False)

    def made(self, about: list[Scene] | list[str], pictures: Tensor) -> Folded:
        """The clouds of the pictures' latents."""
        said = self.vae.encode(data.to_signed(pictures))
        return Folded(about, said.mean, said.log_variance)

    def batch(
        self, indices: Tensor, generator: torch.Generator, dropped: float
    ) -> dict[str, Tensor]:
        """Latents, and the states of captions or, now and then, of the pictures.

        Args:
            indices: Numbers of the samples, (B,).
            generator: Source of chance.
            dropped: Share of the captions that are replaced by the empty one.

        Returns:
            ``x0`` (B, 4, 8, 8), drawn from its cloud and scaled; ``states`` (B, N, K), or all of
            the pictures (B, 1 + patches, K).
        """
        places = self.places(indices)
        found = self.take(places)
        said = self.captions(found, generator, dropped)
        shown = torch.rand((), generator=generator) < SHOWN
        states = self.show(places) if shown else self.clip.read(said).states
        return {"x0": self.draw(found, generator), "states": states}

    def draw(self, found: Sequence[tuple[Folded, int]], generator: torch.Generator) -> Tensor:
        """A scaled latent from the cloud of each, (B, 4, 8, 8); ``found`` is as from ``take``."""
        mean, log_variance = (
            torch.stack([getattr(group, name)[k] for group, k in found])
            for name in ("mean", "log_variance")
        )
        return self.vae.config.scaling_factor * Posterior(mean, log_variance).sample(generator)

    @torch.no_grad()
    def show(self, places: list[int]) -> Tensor:
        """The states of CLIP's picture tower for pictures by number, (B, 1 + patches, K)."""
        if self.rows is None:
            pictures = render([group.about[k] for group, k in self.take(places)], SIZE)
        else:
            pictures = self._read([self.used[i] for i in places])[1]
        tower, size = self.clip.clip.vision_model, self.clip.clip.config.vision_config.image_size
        # CLIP norms only the first, which it compares; all are, as in ``encode_picture_prompts``
        return tower.post_layernorm(tower(self.clip.preparation(pictures, size)).states)


def build(latents: Latents) -> UNet:
    """The published layout: attention to the text at each size, four heads everywhere."""
    vae, text = latents.vae.config, latents.clip.clip.config.text_config
    return UNet(
        UNetConfig(
            sample_size=SIZE // latents.vae.factor,
            in_channels=vae.latent_channels,
            out_channels=vae.latent_channels,
            block_out_channels=WIDTHS,
            down_block_types=("CrossAttnDownBlock2D",) * len(WIDTHS),
            up_block_types=("CrossAttnUpBlock2D",) * len(WIDTHS),
            layers_per_block=1,
            cross_attention_dim=text.hidden_size,
            attention_head_dim=4,  # trap: the number of heads
            norm_num_groups=16,
        )
    )


def batch(indices: Tensor, generator: torch.Generator, latents: Latents) -> dict[str, Tensor]:
    """Latents, captions, and what they are noised with."""
    found = latents.batch(indices, generator, NO_CAPTION)
    return found | noised(found["x0"], generator)


def noised(x0: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Scaled latents (B, 4, 8, 8), and noise and timestep for each."""
    return {
        "x0": x0,
        "noise": torch.randn(x0.shape, generator=generator),
        "t": torch.randint(1000, (len(x0),), generator=generator),
    }


def loss(
    model: UNet, batch: dict[str, Tensor], latents: object, most: float = MOST
) -> tuple[Tensor, dict]:
    """Squared error of the noise on Stable Diffusion's schedule, weighed by its level.

    What stands where is settled while x_t is nearly all noise (``diffusion.noise_weight``).
    """
    schedule = Schedule.scaled_linear()
    x_t = schedule.add_noise(batch["x0"], batch["noise"], batch["t"])
    answer = model(x_t, batch["t"], batch["states"])
    weight = diffusion.noise_weight(batch["t"], schedule, most)
    return diffusion.simple_loss(answer.float(), batch["noise"], weight), {}


# --- drawing and scoring --------------------------------------------------------------------------


def assemble(clip: FrozenCLIP, vae: Autoencoder, unet: UNet) -> StableDiffusion:
    """The trained networks as one system, whose folder stock's pipelines open."""
    parts = own_parts(clip.clip, clip.tokenizer, clip.preparation, vae, unet)
    return StableDiffusion(**parts)


def exam(pipe: StableDiffusion, asked: list[Prompt], seed: int = 0) -> dict[str, object]:
    """What the judge reads from pictures of prompts, one each; and from true ones sent through the
    autoencoder, which is the ceiling."""
    judge, found = Judge.from_pretrained(), {}
    true = render([p.scene for p in asked], SIZE)
    g, drawn, back = torch.Generator().manual_seed(seed), [], []
    for i in range(0, len(asked), 50):
        texts = [p.text for p in asked[i : i + 50]]
        drawn.append(
            pipe(texts, steps=STEPS, guidance_scale=GUIDANCE, generator=g, truncate=True).cpu()
        )
        x = data.to_signed(true[i : i + 50]).to(pipe.device)
        back.append(data.to_unit(pipe.vae(x)).cpu())
    real = judge.features(true)
    for name, pictures in (("", torch.cat(drawn)), (", true pictures, folded", torch.cat(back))):
        found |= {
            f"{what}{name}": share for what, share in marks(asked, judge.read(pictures)).items()
        }
        distance = frechet(real, judge.features(pictures))
        found[f"Fréchet distance of {len(asked)} from the true ones{name}"] = distance
    return found


@torch.no_grad()
def score(model: UNet, latents: Latents) -> dict[str, object]:
    """The exam on the first 400 prompts; for a reader's folder, the loss on pictures kept apart."""
    if latents.rows is None:
        pipe = assemble(latents.clip, latents.vae, model)
        return exam(pipe, list(prompts()[:400]))
    pictures, texts = latents.apart(200)
    z = latents.vae.encode(data.to_signed(pictures)).mean
    kept = noised(latents.vae.config.scaling_factor * z, torch.Generator().manual_seed(FRESH))
    kept["states"] = latents.clip.read(texts).states
    return {"squared error of the noise, pictures kept apart": loss(model, kept, latents)[0].item()}


@torch.no_grad()
def look(model: UNet, n: int = 8) -> Tensor:
    """Pairs: a scene that a caption describes, and what is drawn from the caption."""
    g = torch.Generator().manual_seed(FRESH)
    scenes = sample(n, g)
    device = next(model.parameters()).device
    vae = Autoencoder.from_pretrained(checkpoints.WEIGHTS / "autoencoder")
    pipe = assemble(reader(), vae, model)
    for part in (pipe.vae, pipe.text_encoder):
        part.to(device)
    texts = [caption(scene, generator=g) for scene in scenes]
    drawn = pipe(texts, steps=STEPS, guidance_scale=GUIDANCE, generator=g, truncate=True).cpu()
    return torch.stack([render(scenes, SIZE), drawn], 1).flatten(0, 1)


RECIPES = (
    Recipe(
        name="stable-diffusion",
        about="Stable Diffusion's U-Net for latents of 8 x 8 x 4, which the shipped autoencoder"
        " makes of 64 x 64 pictures. Its words are the states of the shipped text-encoder; both are"
        " frozen. It never saw the held-out combinations.",
        data=Latents,
        model=build,
        batch=batch,
        loss=loss,
        sample=look,
        score=score,
        needs=("autoencoder", "clip", "text-encoder", "judge"),
        steps=3000,
        batch_size=64,
        chunk=64,
        learning_rate=2e-3,
        minutes=60,
        warmup=200,
        decay="late",
        optimiser="muon",
        betas=(0.9, 0.99),
        ema=0.999,
        dtype="float16",
        data_about="40,000 Storybook scenes, each with a new caption whenever it is seen",
    ),
)
