"""Imagen: words to a small picture, and to a large one, told by a network that has only read.

Saharia et al. 2022 (arXiv 2205.11487). No space is shared by words and pictures, and there is no
prior: a language model, trained on text alone and frozen, turns the caption into states, and both
U-Nets look at them. The **base** draws 16 x 16 pixels, the **upsampler** 64 x 64; it is told the
words again, and how much noise was laid over the small picture that it enlarges.

The paper's U-Nets are not published, and diffusers has no such pipeline. So this class is ours by
name; but each of its networks is one that diffusers or transformers opens.

Letters: B pictures, N tokens of K channels, s the guidance scale.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion import checkpoints, errors, guidance, samplers
from companion.adm import ADMUNet
from companion.clip import CLIPText
from companion.data import to_unit
from companion.diffusion import to_x0
from companion.pipeline import System, for_each, generators, prompts
from companion.preparation import scaled
from companion.schedule import Schedule, draw
from companion.scheduler import Generators, Scheduler
from companion.tokenizer import Tokenizer

# The book's own: a cosine, and steps that end at noise alone (appendix B; the paper's time is
# continuous). Answers are clipped or scaled here, not by the scheduler.
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "variance_type": "fixed_small",
}
# The upsampler answers with velocity, as in Imagen Video by many of the same authors (Ho et al.
# 2022). Told to answer with noise it drew false colours: at t = 950 an error of 3 % in the noise is
# one of 40 % in the picture, most of which it was shown from the start.
SUPER_RES_SCHEDULER = SCHEDULER | {"prediction_type": "v_prediction"}
THRESHOLDINGS = ("dynamic", "static")


class Told(NamedTuple):
    """What both U-Nets are told."""

    states: Tensor  # (B, N, K)
    pooled: Tensor  # (B, K): the mean of the states of real tokens
    mask: Tensor  # (B, N) bool: True up to the end token


class Imagen(System):
    """A frozen language model, a base and an upsampler."""

    opens = ("Imagen",)
    shipped = "imagen"
    made_of = ("language-model", "imagen", "imagen-upsampler")
    parts = {
        "scheduler": Scheduler,
        "super_res": ADMUNet,
        "super_res_scheduler": Scheduler,
        "text_encoder": CLIPText,
        "tokenizer": Tokenizer,
        "unet": ADMUNet,
    }
    walks = {"base": ("unet", 25), "upsampler": ("super_res", 10)}
    # The parts, as __init__ sets them.
    scheduler: Scheduler
    super_res: ADMUNet
    super_res_scheduler: Scheduler
    text_encoder: CLIPText
    tokenizer: Tokenizer
    unet: ADMUNet

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        width = self.text_encoder.config.hidden_size
        for name, channels, kind, size in (
            ("unet", 3, "projection", width),
            ("super_res", 6, "timestep", None),
        ):
            c = getattr(self, name).config
            errors.expect(
                (c.in_channels, c.out_channels) == (channels, 3),
                f"{name} has {c.in_channels} channels in and {c.out_channels} out; expected"
                f" {channels} and 3.",
            )
            errors.expect(
                c.cross_attention_dim == width
                and c.class_embed_type == kind
                and c.projection_class_embeddings_input_dim == size,
                f"{name} looks at states of width {c.cross_attention_dim} and has class_embed_type"
                f" {c.class_embed_type!r} of {c.projection_class_embeddings_input_dim}; expected"
                f" {width}, as the text encoder makes, and {kind!r} of {size}.",
            )

    @classmethod
    def _assembled(cls, dtype: torch.dtype) -> dict[str, Any]:
        words, base, upsampler = (checkpoints.WEIGHTS / name for name in cls.made_of)
        return {
            "scheduler": Scheduler.of(Schedule.cosine(), SCHEDULER),
            "super_res": ADMUNet.from_pretrained(upsampler, dtype=dtype),
            "super_res_scheduler": Scheduler.of(Schedule.cosine(), SUPER_RES_SCHEDULER),
            "text_encoder": CLIPText.from_pretrained(words, dtype=dtype),
            "tokenizer": Tokenizer.from_pretrained(words),
            "unet": ADMUNet.from_pretrained(base, dtype=dtype),
        }

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        steps: Sequence[int] | None = None,
        guidance_scale: float = 5.0,
        super_res_guidance_scale: float = 1.0,
        thresholding: str = "dynamic",
        percentile: float = 0.95,
        augmentation: int = 0,
        sampler: str | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators | None = None,
        seed: int | None = None,
        latents: Sequence[Tensor | None] | None = None,
        callback: samplers.Callback = None,
        truncate: bool = False,
    ) -> Tensor:
        """Draw from words.

        Args:
            prompt: One text or several.
            steps: Timesteps of base and upsampler; default: 25 and 10.
            guidance_scale: Of the base, s = 1 + w; at most 1: it is asked once a step.
            super_res_guidance_scale: Of the upsampler.
            thresholding: What becomes of answers that guidance drives beyond [-1, 1] (section 2.3):
                "static" clips them, "dynamic" scales the picture down until most of it fits.
            percentile: How much of a picture "dynamic" leaves in range; the paper shows 0.995.
            augmentation: Timestep up to which noise is laid over the small picture before it is
                enlarged (section 2.4): 0 trusts it in every pixel, more lets the upsampler mend it.
            sampler: One of ``samplers`` for both walks; default: the folder's (``ddpm``).
            negative_prompt: What to move away from, instead of the empty text.
            num_images_per_prompt: Pictures of each prompt, next to each other in the result.
            height: Of the large picture, in pixels; default: what the upsampler was trained at.
            width: Likewise.
            generator: Source of all noise, or a list with one for each picture.
            seed: Instead of a generator.
            latents: The noise that each walk starts from; None, as a whole or for one: drawn.
            callback: Called as ``callback(i, t, x, x0_hat)`` in each step of both walks.
            truncate: Cut prompts that are too long, rather than refuse them.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        errors.number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        errors.number("guidance_scale", guidance_scale)
        errors.number("super_res_guidance_scale", super_res_guidance_scale)
        errors.one_of("thresholding", thresholding, THRESHOLDINGS)
        errors.number("percentile", percentile, low=0, high=1)
        errors.number("augmentation", augmentation, low=0, high=999, integer=True)
        errors.expect(
            negative_prompt is None or max(guidance_scale, super_res_guidance_scale) > 1,
            "negative_prompt does nothing without guidance; choose a scale above 1.",
        )
        usual = [count for _, count in self.walks.values()]
        counts = for_each("steps", usual if steps is None else steps, self.walks)
        start = for_each("latents", latents, self.walks)
        small, large = self._sizes(height, width)
        plan = []
        for scheduler, count in zip(
            (self.scheduler, self.super_res_scheduler), counts, strict=True
        ):
            chosen = scheduler.choose(sampler)
            timesteps = scheduler.timesteps(chosen, count)
            plan.append(partial(scheduler.walk, chosen, timesteps=timesteps))
        keep = percentile if thresholding == "dynamic" else None
        texts = prompts("prompt", prompt)
        source = generators(generator, seed, len(texts) * num_images_per_prompt)
        told = self.encode_prompts(texts, num_images_per_prompt, truncate)
        against = prompts("negative_prompt", negative_prompt or "", len(texts))
        null = self.encode_prompts(against, num_images_per_prompt, truncate)

        shape = (len(told.states), 3)
        x = self.noise((*shape, *small), source, start[0])
        denoise = drawing(self.unet, self.scheduler, told, null, guidance_scale, keep)
        x = plan[0](denoise, x, generator=source, callback=callback).clamp(-1, 1)
        noise = draw(x, source)
        below = laid_over(self.super_res_scheduler, x, noise, augmentation, large)
        denoise = enlarging(
            self.super_res, self.super_res_scheduler, below, augmentation, told, null,
            super_res_guidance_scale, keep,
        )  # fmt: skip
        x = self.noise((*shape, *large), source, start[1])
        return to_unit(plan[1](denoise, x, generator=source, callback=callback))

    @torch.no_grad()
    def encode_prompts(self, texts: list[str], each: int = 1, truncate: bool = False) -> Told:
        """Captions to what the U-Nets are told, ``each`` times each."""
        tokens = self.tokenizer(texts, truncate)
        states = self.text_encoder(tokens.ids.to(self.device)).states.to(self.dtype)
        told = told_of(states, tokens.mask.to(self.device))
        return Told(*(part.repeat_interleave(each, dim=0) for part in told))

    def read(self, texts: list[str]) -> Told:
        """Captions to what the U-Nets are told; long ones are cut."""
        return self.encode_prompts(texts, truncate=True)

    def _sizes(self, height: int | None, width: int | None) -> tuple[tuple[int, int], ...]:
        """Height and width of the small picture and of the large one."""
        configs = [self.unet.config, self.super_res.config]
        own = [
            c.sample_size if isinstance(c.sample_size, int) else c.sample_size[0] for c in configs
        ]
        factor = own[1] // own[0]
        steps = [2 ** (len(c.block_out_channels) - 1) for c in configs]
        step = max(factor * steps[0], steps[1])
        found = []
        for name, asked in (("height", height), ("width", width)):
            asked = own[1] if asked is None else asked
            errors.number(name, asked, low=1, integer=True)
            errors.expect(asked % step == 0, f"{name} is {asked}; expected a multiple of {step}.")
            found.append((asked // factor, asked))
        return tuple(zip(*found, strict=True))


def told_of(states: Tensor, mask: Tensor) -> Told:
    """States (B, N, K) and mask (B, N) with the mean of the states that are words."""
    weight = mask.to(states)[..., None]
    return Told(states, (states * weight).sum(1) / weight.sum(1), mask)


def drawing(
    unet: ADMUNet,
    scheduler: Scheduler,
    told: Told,
    null: Told,
    scale: float,
    percentile: float | None,
) -> samplers.Denoiser:
    """The base, guided; its answers brought back into range."""
    return guidance.thresholded(answering(unet, scheduler, told, null, scale), percentile)


def answering(
    unet: ADMUNet, scheduler: Scheduler, told: Told, null: Told, scale: float
) -> samplers.Denoiser:
    """The base, guided, its answers as they come."""
    own, target = unet.conv_in.weight.dtype, scheduler.config.prediction_type

    def denoise(x: Tensor, t: Tensor, states: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        output = unet(x.to(own), t, states.to(own), pooled.to(own), mask).to(x.dtype)
        return to_x0(output, x, t, scheduler.schedule, target)

    return guidance.classifier_free(denoise, told, null, scale)


def laid_over(
    scheduler: Scheduler, small: Tensor, noise: Tensor, augmentation: int, size: tuple[int, int]
) -> Tensor:
    """Small pictures in [-1, 1], noised and enlarged: what lies under the noisy large one."""
    t = torch.full((len(small),), augmentation, device=small.device)
    noised = scheduler.schedule.add_noise(small, noise, t) if augmentation else small
    return scaled(noised, size)


def enlarging(
    unet: ADMUNet,
    scheduler: Scheduler,
    below: Tensor,
    augmentation: int,
    told: Told,
    null: Told,
    scale: float,
    percentile: float | None,
) -> samplers.Denoiser:
    """The upsampler, guided; it knows what lies below, and how noisy that is."""
    own, target = unet.conv_in.weight.dtype, scheduler.config.prediction_type

    def denoise(x: Tensor, t: Tensor, under: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        level = torch.full((len(x),), augmentation, device=x.device)
        both = torch.cat([x, under], dim=1).to(own)
        output = unet(both, t, states.to(own), level, mask).to(x.dtype)
        return to_x0(output, x, t, scheduler.schedule, target)

    given, nothing = (below, told.states, told.mask), (below, null.states, null.mask)
    return guidance.thresholded(
        guidance.classifier_free(denoise, given, nothing, scale), percentile
    )
