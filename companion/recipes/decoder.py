"""DALL·E 2's decoder: from a place in CLIP's space to a picture of 16 x 16 pixels.

Ramesh et al. 2022, section 2.1. What it is told goes through a network of its own, which stock
keeps in another folder (``text_proj``); both are trained together.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import checkpoints, data, diffusion, guidance, samplers
from companion.adm import CROSS, PLAIN, ADMConfig, ADMUNet
from companion.dalle2 import DALLE2, own_parts
from companion.judge import Judge
from companion.preparation import scaled
from companion.prior import Prior, TextProjection, TextProjectionConfig
from companion.prompts import Prompt, marks, prompts
from companion.recipes.encoded import MOST, SIZE, SMALL, Encoded, FrozenCLIP, reader, shrunk
from companion.schedule import Schedule
from companion.scores import frechet
from companion.storybook import Scene, caption, render, sample
from companion.train import Recipe
from companion.unclip import Words

WIDTHS = (24, 48, 72)  # at 16 x 16, 8 x 8 and 4 x 4; the last two look at the text
HEADS = (18, 16, 18)  # their widths, four where 72 channels attend: stock counts twice from the top
CONTEXT = 128  # K, the width of what it looks at
NO_PICTURE, NO_CAPTION = 0.1, 0.5  # shares left out in training (section 2.1)
STEPS, GUIDANCE = 25, 3.0
FRESH = 59  # the seed of scenes to look at, which no training draws from


class Decoder(nn.Module):
    """The U-Net, and the projection that tells it of picture and caption.

    Args:
        unet: Draws 3 channels and their variances.
        text_proj: Karlo's.
    """

    def __init__(self, unet: ADMUNet, text_proj: TextProjection) -> None:
        super().__init__()
        self.unet, self.text_proj = unet, text_proj

    def forward(
        self, x: Tensor, t: Tensor, embedding: Tensor, text: Tensor, states: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noise, and how much variance, in noisy pictures (B, 3, H, W).

        Args:
            x: Noisy pictures.
            t: Timesteps, (B,).
            embedding: The picture's place, (B, D).
            text: The caption's embedding, (B, D).
            states: Its states, (B, N, D).
            mask: 1 where the caption has a token, (B, N).
        """
        context, added = self.text_proj(embedding, text, states)
        mask = F.pad(mask, (context.shape[1] - mask.shape[1], 0), value=1)
        noise, fraction = self.unet(x, t, context, added, mask).chunk(2, dim=1)
        return noise, fraction

    @classmethod
    def from_pretrained(cls, folder: str | Path = "decoder") -> "Decoder":
        """Open a folder that the recipe wrote; by default the shipped one."""
        shipped = checkpoints.WEIGHTS / folder
        where = shipped if shipped.is_dir() else checkpoints.find_folder(folder)
        parts = ADMUNet.from_pretrained(where), TextProjection.from_pretrained(where, "text_proj")
        return cls(*parts)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        card: Mapping[str, object] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """The U-Net's folder, with the projection's in ``text_proj/``; each has the card."""
        about = None if card is None else {**card, "recipe": f"{card.get('recipe')}, text_proj"}
        self.text_proj.save_pretrained(Path(folder) / "text_proj", card=about, dtype=dtype)
        return self.unet.save_pretrained(folder, card=card, dtype=dtype)


def build(encoded: Encoded) -> Decoder:
    """Karlo's layout at a small size: attention below the finest level, learned variance."""
    # Trap: stock mistakes the text for a picture where N + 4 is the number of places of a level.
    places = {(SMALL >> level) ** 2 for level in range(len(WIDTHS))}
    context = encoded.clip.tokenizer.context
    if context + 4 in places:
        raise ValueError(
            f"captions have {context} tokens, and with the picture's 4 that is the number of places"
            f" of one level ({sorted(places)}), where stock would mistake one for the other. Train"
            " CLIP with another context."
        )
    n = len(WIDTHS)
    unet = ADMConfig(
        in_channels=3,
        out_channels=6,
        block_out_channels=WIDTHS,
        down_block_types=(PLAIN[0],) + (CROSS[0],) * (n - 1),
        up_block_types=(CROSS[1],) * (n - 1) + (PLAIN[1],),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        layers_per_block=1,
        attention_head_dim=HEADS,
        cross_attention_dim=CONTEXT,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
        norm_num_groups=8,
        sample_size=SMALL,
    )
    told = TextProjectionConfig(
        time_embed_dim=4 * WIDTHS[0],
        cross_attention_dim=CONTEXT,
        clip_embeddings_dim=encoded.clip.width,
    )
    return Decoder(ADMUNet(unet), TextProjection(told))


def batch(indices: Tensor, generator: torch.Generator, encoded: Encoded) -> dict[str, Tensor]:
    """Small pictures and what is known of them; now and then the place, or the caption, is not."""
    batch = encoded.batch(indices, generator, NO_CAPTION)
    x0 = batch.pop("small")
    return batch | {
        "x0": x0,
        "noise": torch.randn(x0.shape, generator=generator),
        "t": torch.randint(1000, (len(x0),), generator=generator),
        "no picture": torch.rand(len(x0), generator=generator) < NO_PICTURE,
    }


def loss(
    model: Decoder, batch: dict[str, Tensor], encoded: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_hybrid on the cosine schedule: the noise by squares, the variance by the bound.

    The squares are weighed by the noise level (``diffusion.noise_weight``), as in
    ``stable_diffusion``.
    """
    x0, noise, t, schedule = batch["x0"], batch["noise"], batch["t"], Schedule.cosine()
    nothing = model.text_proj.no_image(len(x0))
    place = torch.where(batch["no picture"][:, None], nothing, batch["embedding"])
    x_t = schedule.add_noise(x0, noise, t)
    told = place, batch["text"], batch["states"], batch["mask"]
    answer, fraction = (x.to(x0.dtype) for x in model(x_t, t, *told))  # half, in mixed precision
    weight = diffusion.noise_weight(t, schedule, MOST)
    total = diffusion.hybrid_loss(answer, fraction, x0, noise, t, schedule, counts=weight)
    return total, {"simple": diffusion.simple_loss(answer.detach(), noise)}


# --- drawing and scoring --------------------------------------------------------------------------


@torch.no_grad()
def decode(
    model: Decoder,
    embedding: Tensor,
    words: Words,
    null: Words,
    generator: torch.Generator,
    scale: float = GUIDANCE,
) -> Tensor:
    """Places (B, D) and captions to small pictures (B, 3, 16, 16) in [0, 1], as a pipeline would.

    Args:
        model: The decoder.
        embedding: Places in CLIP's space.
        words: The captions; those of "" leave all to the places.
        null: The empty caption, as often.
        generator: Source of chance.
        scale: s = 1 + w, of classifier-free guidance.
    """
    schedule = Schedule.cosine()

    def denoise(x: Tensor, t: Tensor, *told: Tensor) -> tuple[Tensor, Tensor]:
        noise, fraction = model(x, t, *told)
        return diffusion.to_x0(noise, x, t, schedule, "epsilon"), fraction

    given = (embedding, *words)
    nothing = (model.text_proj.no_image(len(embedding)), *null)
    guided = guidance.classifier_free(denoise, given, nothing, scale)
    shape = (len(embedding), 3, SMALL, SMALL)
    x = torch.randn(shape, generator=generator).to(embedding)
    t = samplers.timesteps("ddpm", STEPS, schedule, "linspace")  # as UnCLIPScheduler has them
    x = samplers.ddpm(
        guided, x, t, schedule, generator=generator, clip=1.0, variance="learned_range"
    )
    return data.to_unit(x)


def legible(small: Tensor) -> Tensor:
    """Small pictures as the judge learned to read them: enlarged to 64 pixels by a bicubic."""
    return scaled(small, (SIZE, SIZE)).clamp(0, 1)


def in_parts(
    model: Decoder, clip: FrozenCLIP, embedding: Tensor, texts: list[str], g: torch.Generator
) -> Tensor:
    """``decode``, fifty at a time."""
    null, found = clip.read([""]), []
    for i in range(0, len(texts), 50):
        words = clip.read(texts[i : i + 50])
        place = embedding[i : i + 50]
        found.append(decode(model, place, words, null.each(len(place)), g))
    return torch.cat(found)


def exam(model: Decoder, clip: FrozenCLIP, asked: list[Prompt], seed: int = 0) -> dict:
    """What the judge reads from 16 x 16 pictures of prompts, enlarged by a bicubic.

    The decoder is told the place of a true picture, with the prompt or with "" (a variation), or
    the prompt and no place. The ceiling is what the judge reads from the true pictures at 16 x 16.
    """
    judge, found = Judge.from_pretrained(), {}
    true = render([p.scene for p in asked], SIZE)
    place, texts = clip.see(true), [p.text for p in asked]
    nowhere = model.text_proj.no_image(len(place)).detach()
    shown = {"true": shrunk(true)}
    for name, embedding, said in (
        ("from place and caption", place, texts),
        ("from the place", place, [""] * len(texts)),
        ("from the caption", nowhere, texts),
    ):
        g = torch.Generator().manual_seed(seed)
        shown[name] = in_parts(model, clip, embedding, said, g)
    real = judge.features(legible(shown["true"]))
    for name, small in shown.items():
        pictures = legible(small)
        for what, share in marks(asked, judge.read(pictures)).items():
            if what not in ("swapped", "no thing"):
                found[f"{what}, {name}"] = share
        if name != "true":
            distance = frechet(real, judge.features(pictures))
            found[f"Fréchet distance of {len(asked)} from the true ones, {name}"] = distance
    return found


@torch.no_grad()
def score(model: Decoder, encoded: Encoded) -> dict[str, object]:
    """The exam on the first 400 prompts; for a reader's folder, how near to the true picture.

    There, the number is the mean squared error of what is decoded from true places, beside that of
    the mean picture: below it, the place tells what is in the picture.
    """
    if encoded.rows is None:
        return exam(model, encoded.clip, list(prompts()[:400]))
    pictures, texts = encoded.apart(100)
    true = shrunk(pictures)
    g = torch.Generator().manual_seed(FRESH)
    drawn = in_parts(model, encoded.clip, encoded.clip.see(pictures), texts, g)
    return {
        "squared error of decoded pictures": (drawn - true).square().mean().item(),
        "squared error of the mean picture": (true.mean(0) - true).square().mean().item(),
    }


@torch.no_grad()
def look(model: Decoder, n: int = 8) -> Tensor:
    """Pairs: a true picture of 16 pixels, and what is drawn from its place and its caption."""
    clip, g = reader(), torch.Generator().manual_seed(FRESH)
    scenes: list[Scene] = sample(n, g)
    pictures = render(scenes, SIZE)
    device = next(model.parameters()).device
    words, null = clip.read([caption(s, generator=g) for s in scenes]), clip.read([""]).each(n)
    words, null = (Words(*(x.to(device) for x in w)) for w in (words, null))
    drawn = decode(model, clip.see(pictures).to(device), words, null, g).cpu()
    pairs = torch.stack([F.avg_pool2d(pictures, SIZE // SMALL), drawn], 1).flatten(0, 1)
    return F.interpolate(pairs, scale_factor=4.0)


# --- the whole system -----------------------------------------------------------------------------


def assemble(clip: FrozenCLIP, prior: Prior, decoder: Decoder, upsampler: ADMUNet) -> DALLE2:
    """The trained networks as one system, whose folder stock's unCLIP pipelines open."""
    own = clip.clip, clip.tokenizer, clip.preparation
    return DALLE2(**own_parts(*own, prior, decoder.unet, decoder.text_proj, upsampler))


RECIPES = (
    Recipe(
        name="decoder",
        about="DALL·E 2's decoder: a place in CLIP's space, and the caption, to 16 x 16 pixels. The"
        " folder text_proj beside it tells it of both. CLIP is frozen. It never saw the held-out"
        " combinations.",
        data=Encoded,
        model=build,
        batch=batch,
        loss=loss,
        sample=look,
        score=score,
        needs=("clip", "text-encoder", "judge"),
        steps=3400,
        batch_size=64,
        chunk=64,
        learning_rate=2e-3,
        minutes=30,
        warmup=200,
        decay="late",
        optimiser="muon",
        betas=(0.9, 0.99),
        ema=0.999,
        dtype="float16",
        data_about="40,000 Storybook scenes, each with a new caption whenever it is seen",
    ),
)
