"""The thousand prompts, drawn by a whole system and read by the judge at 64 x 64 pixels.

One picture a prompt, no second try (``prompts``). Beside each system's marks stand those of true
pictures of the same prompts, and of true pictures sent through the system's last stages: no system
can do better than its own way back to large pictures lets it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from companion.dalle2 import DALLE2
from companion.imagen import Imagen
from companion.judge import Judge
from companion.measure import measurement
from companion.prompts import Prompt, marks, prompts, right, variety
from companion.recipes.autoencoder import round_trip
from companion.recipes.imagen import enlarge
from companion.recipes.stable_diffusion import GUIDANCE as SD_GUIDANCE
from companion.recipes.stable_diffusion import STEPS as SD_STEPS
from companion.recipes.upsamplers import FACTOR, upsample
from companion.scores import frechet, interval
from companion.stable_diffusion import StableDiffusion
from companion.storybook import Facts, render

SIZE, TOGETHER, SEED = 64, 50, 0
DALLE2_GUIDANCE = DALLE2.asked_with["guidance_scale"]
PRIOR_GUIDANCE = DALLE2.asked_with["prior_guidance_scale"]
CANDIDATES = 2
SD_SAMPLER = "dpmpp_2m"
CEILINGS = 400  # prompts whose true pictures go through CLIP, upsampler or autoencoder
OPEN, EACH = 16, 30  # prompts that leave things open, and pictures of each, for variety

Draw = Callable[[Sequence[Prompt], torch.Generator], Tensor]


def in_parts(draw: Draw, asked: Sequence[Prompt], seed: int = SEED) -> Tensor:
    """``draw`` for all prompts, fifty at a time; every way starts from the same seed."""
    g = torch.Generator().manual_seed(seed)
    parts = range(0, len(asked), TOGETHER)
    return torch.cat([draw(asked[i : i + TOGETHER], g).cpu() for i in parts])


def agreement(one: Sequence[Facts | None], other: Sequence[Facts | None]) -> list[bool]:
    """Of all facts that the first judge reads, which the second one reads alike."""
    same = []
    for a, b in zip(one, other, strict=True):
        if a is None or b is None:
            same.append(a is b)
            continue
        same += [a.sky == b.sky, a.place == b.place, a.stream == b.stream]
        same.append(len(a.things) == len(b.things))
        for s, t in zip(a.things, b.things, strict=False):
            same += [s.kind == t.kind, s.colour == t.colour, s.position == t.position]
    return same


@torch.no_grad()
def examine(ways: dict[str, Draw], asked: Sequence[Prompt]) -> dict[str, Any]:
    """Marks for every way of making pictures, beside those of the true pictures.

    Args:
        ways: By name, prompts to pictures (B, 3, 64, 64) in [0, 1].
        asked: The prompts.

    Returns:
        For each way and for "true pictures": ``marks``; the judges' ``agreement``, and how far
        apart the two judges' shares of wholly right pictures are; the Fréchet distance from the
        true pictures in the judge's features.
    """
    judge, second = Judge.from_pretrained(), Judge.from_pretrained("judge-second")
    true = in_parts(lambda part, _: render([p.scene for p in part], SIZE), asked)
    real, found = judge.features(true), {}
    drawn = {name: in_parts(draw, asked) for name, draw in ways.items()}
    for name, shown in {"true pictures": true, **drawn}.items():
        read, again = judge.read(shown), second.read(shown)
        same = agreement(read, again)
        found[name] = {
            "marks": marks(asked, read),
            "judges agree on facts": interval(sum(same), len(same)),
            "wholly right, second judge less first": (
                sum(right(asked, again)) - sum(right(asked, read))
            )
            / len(asked),
            "Fréchet distance": frechet(real, judge.features(shown)),
        }
    return found


@torch.no_grad()
def varied(draw: Draw, asked: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """How varied what prompts leave open is, as drawn: mean of ``variety`` over prompts."""
    judge, found = Judge.from_pretrained(), {}
    for prompt in asked:
        shown = in_parts(draw, [prompt] * EACH)
        for what, count in variety(judge.read(shown), prompt.facts).items():
            found.setdefault(what, []).append(count)
    return {
        what: {"possibilities": sum(counts) / len(counts), "prompts": len(counts)}
        for what, counts in found.items()
    }


def loose(asked: Sequence[Prompt], n: int = OPEN) -> list[Prompt]:
    """Prompts that leave sky or place open, ``n`` of them."""
    return [p for p in asked if None in (p.facts.sky, p.facts.place) and not p.held_out][:n]


def all_prompts(draw: Draw, returns: dict[str, Draw]) -> dict[str, Any]:
    """What ``examine`` and ``varied`` find of one system.

    Args:
        draw: From words to pictures: all prompts.
        returns: Ceilings: from true pictures to pictures, the first prompts only.
    """
    asked = prompts()
    ceilings = examine(returns, asked[:CEILINGS])
    del ceilings["true pictures"]  # counted with all prompts
    return {
        "seeds": [SEED],
        "prompts": len(asked),
        "prompts for pictures of true ones": CEILINGS,
        "ways": examine({"from words": draw}, asked) | ceilings,
        "variety": varied(draw, loose(asked)),
    }


# --- DALL·E 2 -------------------------------------------------------------------------------------


def dalle2() -> DALLE2:
    """The book's own, up to 64 x 64: without the second upsampler."""
    return DALLE2.from_pretrained(
        "storybook", super_res_second=None, super_res_second_scheduler=None
    )


def dalle2_draws(pipe: DALLE2) -> Draw:
    """Text to picture, as the examination has it."""

    def draw(asked: Sequence[Prompt], generator: torch.Generator) -> Tensor:
        return pipe(
            [p.text for p in asked],
            guidance_scale=DALLE2_GUIDANCE,
            prior_guidance_scale=PRIOR_GUIDANCE,
            candidates=CANDIDATES,
            generator=generator,
            truncate=True,
        )

    return draw


def dalle2_returns(pipe: DALLE2) -> Draw:
    """A true picture to its place in CLIP's space, and from there back to a picture."""

    def draw(asked: Sequence[Prompt], generator: torch.Generator) -> Tensor:
        true = render([p.scene for p in asked], SIZE)
        return pipe.variations(true, guidance_scale=DALLE2_GUIDANCE, generator=generator)

    return draw


def dalle2_enlarges(pipe: DALLE2) -> Draw:
    """A true picture at 16 x 16, drawn large: the ceiling."""

    def draw(asked: Sequence[Prompt], generator: torch.Generator) -> Tensor:
        small = F.avg_pool2d(render([p.scene for p in asked], SIZE), FACTOR)
        return upsample(pipe.super_res_first, small, generator)

    return draw


@measurement(
    "text-to-picture",
    "DALL·E 2 on the thousand prompts at 64 x 64 pixels, one picture each, read by the judge; true"
    " pictures through CLIP's space and back, and through the upsampler; what the prompts leave"
    " open",
    minutes=25,
    needs=(*DALLE2.made_of, "decoder/text_proj", "judge", "judge-second"),
)
def text_to_picture() -> dict[str, Any]:
    """What chapter 9 prints, and ``make scores``."""
    pipe = dalle2()
    returns = {
        "true pictures, through CLIP and back": dalle2_returns(pipe),
        "true pictures, small and enlarged": dalle2_enlarges(pipe),
    }
    settings = {
        "guidance_scale": DALLE2_GUIDANCE,
        "prior_guidance_scale": PRIOR_GUIDANCE,
        "candidates": CANDIDATES,
    }
    return settings | all_prompts(dalle2_draws(pipe), returns)


# --- Imagen ---------------------------------------------------------------------------------------


def imagen() -> Imagen:
    """The book's own."""
    return Imagen.from_pretrained("storybook")


def imagen_draws(pipe: Imagen) -> Draw:
    """Text to picture, as the examination has it: with the system's own settings."""

    def draw(asked: Sequence[Prompt], generator: torch.Generator) -> Tensor:
        return pipe([p.text for p in asked], generator=generator, truncate=True)

    return draw


def imagen_enlarges(pipe: Imagen) -> Draw:
    """A true picture at 16 x 16, drawn large with its prompt: the ceiling."""

    def draw(asked: Sequence[Prompt], generator: torch.Generator) -> Tensor:
        small = F.avg_pool2d(render([p.scene for p in asked], SIZE), FACTOR)
        return enlarge(pipe.super_res, pipe, small, [p.text for p in asked], generator, 0)

    return draw


@measurement(
    "imagen",
    "Imagen on the thousand prompts at 64 x 64 pixels, one picture each, read by the judge; true"
    " pictures through the upsampler; what the prompts leave open",
    minutes=12,
    needs=(*Imagen.made_of, "judge", "judge-second"),
)
def words_to_pixels() -> dict[str, Any]:
    """What chapter 10 prints, and ``make scores``."""
    pipe = imagen()
    returns = {"true pictures, small and enlarged": imagen_enlarges(pipe)}
    return all_prompts(imagen_draws(pipe), returns)


# --- Stable Diffusion -----------------------------------------------------------------------------


def stable_diffusion() -> StableDiffusion:
    """The book's own."""
    return StableDiffusion.from_pretrained("storybook")


def stable_diffusion_draws(
    pipe: StableDiffusion, *, sampler: str = SD_SAMPLER, steps: int = SD_STEPS
) -> Draw:
    """Text to picture, as the examination has it."""

    def draw(asked: Sequence[Prompt], generator: torch.Generator) -> Tensor:
        return pipe(
            [p.text for p in asked],
            steps=steps,
            sampler=sampler,
            guidance_scale=SD_GUIDANCE,
            generator=generator,
            truncate=True,
        )

    return draw


def stable_diffusion_returns(pipe: StableDiffusion) -> Draw:
    """What CLIP sees in a true picture, and from there back to a picture."""

    def draw(asked: Sequence[Prompt], generator: torch.Generator) -> Tensor:
        return pipe(
            image_prompt=render([p.scene for p in asked], SIZE),
            steps=SD_STEPS,
            sampler=SD_SAMPLER,
            guidance_scale=SD_GUIDANCE,
            generator=generator,
        )

    return draw


def stable_diffusion_unfolds(pipe: StableDiffusion) -> Draw:
    """A true picture to a latent and back: the ceiling."""
    return lambda asked, _: round_trip(pipe.vae, render([p.scene for p in asked], SIZE))


@measurement(
    "stable-diffusion",
    "Stable Diffusion on the thousand prompts at 64 x 64 pixels, one picture each, read by the"
    " judge; true pictures through CLIP's picture tower and back, and through the autoencoder; what"
    " the prompts leave open",
    minutes=7,
    needs=(*StableDiffusion.made_of, "judge", "judge-second"),
)
def words_to_latents() -> dict[str, Any]:
    """What chapter 13 prints, and ``make scores``."""
    pipe = stable_diffusion()
    returns = {
        "true pictures, through CLIP and back": stable_diffusion_returns(pipe),
        "true pictures, folded and unfolded": stable_diffusion_unfolds(pipe),
    }
    settings = {"guidance_scale": SD_GUIDANCE, "steps": SD_STEPS, "sampler": SD_SAMPLER}
    return settings | all_prompts(stable_diffusion_draws(pipe), returns)
