"""DALL·E 2, as Karlo built it in the open: words to a picture in three walks from noise.

Ramesh et al. 2022 (arXiv 2204.06125), figure 2. The **prior** draws a place in CLIP's space that
fits the caption; the **decoder** draws a small picture that CLIP would put there; the **upsampler**
draws it large. Given a picture instead of a caption, its own place replaces the prior's answer:
a variation.

Letters: B pictures, N tokens, D the width of CLIP's space.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import errors, guidance, samplers
from companion.adm import ADMUNet
from companion.checkpoints import CheckpointError, read_json, write_json
from companion.clip import MEAN, STD, CLIPTextProjected, CLIPVisionProjected, normalise
from companion.data import to_unit
from companion.diffusion import to_x0
from companion.pipeline import Generators, Scheduler, System, generators, prompts
from companion.pretrained import locate
from companion.prior import Prior, TextProjection
from companion.tokenizer import Tokenizer

NAMES = ("prior", "decoder", "upsampler")  # the walks, in the order of steps= and latents=


class Words(NamedTuple):
    """What the text encoder makes of captions."""

    embedding: Tensor  # (B, D) projected into CLIP's space, not normalised
    states: Tensor  # (B, N, D)
    mask: Tensor  # (B, N) bool: True up to the end token


class Preparation:
    """``preprocessor_config.json``: how CLIP's picture encoder wants its pictures.

    Args:
        stored: The file's keys; of these only the colours' mean and spread matter here.
    """

    published = "CLIPImageProcessor"

    def __init__(self, stored: dict[str, object]) -> None:
        self.stored = stored
        self.mean = tuple(stored.get("image_mean", MEAN))
        self.std = tuple(stored.get("image_std", STD))

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> Self:
        """Open a folder; only the usual preparation (scale, crop, normalise) is built here."""
        path = locate(folder, subfolder) / "preprocessor_config.json"
        stored = read_json(path)
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if stored.get(key, True) is not True:
                raise CheckpointError(f"{path}: {key} is {stored[key]!r}; only true is built here.")
        return cls(stored)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file as it was read."""
        write_json(Path(folder) / "preprocessor_config.json", self.stored)

    def __call__(self, pictures: Tensor, size: int) -> Tensor:
        """Square pictures (B, 3, H, H) in [0, 1] to what the encoder takes, (B, 3, size, size)."""
        errors.tensor("image", pictures, "B 3 H H", "float", low=0, high=1)
        if pictures.shape[-1] != size:
            pictures = _scaled(pictures, (size, size)).clamp(0, 1)
        return normalise(pictures, self.mean, self.std)


class DALLE2(System):
    """diffusers' ``UnCLIPPipeline`` and ``UnCLIPImageVariationPipeline``."""

    opens = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
    parts = {
        "decoder": ADMUNet,
        "decoder_scheduler": Scheduler,
        "feature_extractor": Preparation,
        "image_encoder": CLIPVisionProjected,
        "prior": Prior,
        "prior_scheduler": Scheduler,
        "super_res_first": ADMUNet,
        "super_res_last": ADMUNet,
        "super_res_scheduler": Scheduler,
        "text_encoder": CLIPTextProjected,
        "text_proj": TextProjection,
        "tokenizer": Tokenizer,
    }
    optional = ("prior", "prior_scheduler", "image_encoder", "feature_extractor")

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        for one, other in (("prior", "prior_scheduler"), ("image_encoder", "feature_extractor")):
            there = getattr(self, one) is not None, getattr(self, other) is not None
            errors.expect(there[0] == there[1], f"{one} and {other} go together.")
        c, common = self.decoder.config, self.text_encoder.config.projection_dim
        learned = self.decoder_scheduler.config.variance_type == "learned_range"
        errors.expect(
            c.out_channels == (2 if learned else 1) * c.in_channels,
            f"the decoder has {c.in_channels} channels in and {c.out_channels} out, and its"
            f" scheduler's variance_type is {self.decoder_scheduler.config.variance_type!r}:"
            " learned_range needs twice as many out, anything else as many.",
        )
        for name, width in (
            ("text_encoder's states", self.text_encoder.config.hidden_size),
            ("text_proj", self.text_proj.config.clip_embeddings_dim),
            ("prior", self.prior and self.prior.config.embedding_dim),
            ("image_encoder", self.image_encoder and self.image_encoder.config.projection_dim),
        ):
            errors.expect(
                width in (None, common),
                f"the space of {name} has {width} directions, the text encoder's {common}.",
            )
        for upsampler in (self.super_res_first.config, self.super_res_last.config):
            errors.expect(
                upsampler.in_channels == 2 * c.in_channels
                and upsampler.out_channels == c.in_channels,
                f"an upsampler has {upsampler.in_channels} channels in and"
                f" {upsampler.out_channels} out; expected {2 * c.in_channels} and {c.in_channels}.",
            )

    def index(self) -> dict[str, object]:
        return super().index() | {"_class_name": self.opens[0 if self.prior else 1]}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        steps: Sequence[int] = (25, 25, 7),
        guidance_scale: float = 8.0,
        prior_guidance_scale: float = 4.0,
        candidates: int = 1,
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
            steps: Timesteps of prior, decoder and upsampler, at least 2 each.
            guidance_scale: Of the decoder, s = 1 + w; at most 1: it is asked once a step.
            prior_guidance_scale: Of the prior.
            candidates: Embeddings that the prior draws for each picture; the one with the greatest
                dot product with the caption's goes on. The paper (section 2.2) draws 2.
            sampler: One of ``samplers`` for all three walks; default: the folder's (``ddpm``).
            negative_prompt: What to move away from, instead of the empty text.
            num_images_per_prompt: Pictures of each prompt, next to each other in the result.
            height: Of the large picture, in pixels; default: what the upsampler was trained at.
            width: Likewise.
            generator: Source of all noise, or a list with one for each picture.
            seed: Instead of a generator.
            latents: The noise that prior (B · candidates, D), decoder and upsampler start from;
                None, as a whole or for one of them: drawn.
            callback: Called as ``callback(i, t, x, x0_hat)`` in each step of each walk.
            truncate: Cut prompts that are too long, rather than refuse them.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        errors.expect(self.prior is not None, "this folder has no prior: it draws .variations().")
        errors.number("candidates", candidates, low=1, integer=True)
        errors.number("prior_guidance_scale", prior_guidance_scale)
        errors.number("guidance_scale", guidance_scale)
        errors.expect(
            negative_prompt is None or max(guidance_scale, prior_guidance_scale) > 1,
            "negative_prompt does nothing without guidance; choose a scale above 1.",
        )
        walks = self._walks(NAMES, steps, sampler)
        noise = _each("latents", latents, NAMES)
        sizes = self._sizes(height, width)
        texts = prompts("prompt", prompt)
        source = generators(generator, seed, len(texts) * num_images_per_prompt)
        words = self.encode_prompts(texts, num_images_per_prompt, truncate)
        against = prompts("negative_prompt", negative_prompt or "", len(texts))
        null = self.encode_prompts(against, num_images_per_prompt, truncate)
        embedding = self.draw_embedding(
            words, null, walks[0], prior_guidance_scale, candidates, source, noise[0], callback
        )
        small = self.draw_small(
            embedding, words, null, walks[1], guidance_scale, sizes[0], source, noise[1], callback
        )
        return to_unit(self.draw_large(small, walks[2], sizes[1], source, noise[2], callback))

    @torch.no_grad()
    def variations(
        self,
        image: Tensor,
        *,
        steps: Sequence[int] = (25, 7),
        guidance_scale: float = 8.0,
        sampler: str | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators | None = None,
        seed: int | None = None,
        latents: Sequence[Tensor | None] | None = None,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """Draw other pictures of what a picture shows (section 3.1).

        Args:
            image: (B, 3, H, H) square pictures in [0, 1], of any size.
            steps: Timesteps of decoder and upsampler.
            num_images_per_prompt: Variations of each picture.
            latents: The noise that decoder and upsampler start from.

        The others are those of a call with words.

        Returns:
            (B · num_images_per_prompt, 3, H, W) in [0, 1].
        """
        errors.expect(
            self.image_encoder is not None,
            "this folder has no image_encoder, which variations need; Karlo's image variations are"
            " a folder of their own.",
        )
        walks = self._walks(NAMES[1:], steps, sampler)
        noise = _each("latents", latents, NAMES[1:])
        sizes = self._sizes(height, width)
        embedding = self.encode_image(image).repeat_interleave(num_images_per_prompt, dim=0)
        source = generators(generator, seed, len(embedding))
        nothing = self.encode_prompts([""] * len(image), num_images_per_prompt)
        small = self.draw_small(
            embedding, nothing, nothing, walks[0], guidance_scale, sizes[0], source, noise[0],
            callback,
        )  # fmt: skip
        return to_unit(self.draw_large(small, walks[1], sizes[1], source, noise[1], callback))

    # --- the stages ------------------------------------------------------------------------------

    def encode_prompts(self, texts: list[str], each: int = 1, truncate: bool = False) -> Words:
        """Captions to what prior and decoder are told, ``each`` times each."""
        tokens = self.tokenizer(texts, truncate)
        x = self.text_encoder(tokens.ids.to(self.device))
        parts = x.embedding.to(self.dtype), x.states.to(self.dtype), tokens.mask.to(self.device)
        return Words(*(part.repeat_interleave(each, dim=0) for part in parts))

    def encode_image(self, image: Tensor) -> Tensor:
        """Square pictures in [0, 1] to their places in CLIP's space, (B, D), not normalised."""
        ready = self.feature_extractor(image, self.image_encoder.config.image_size)
        own = self.image_encoder.visual_projection.weight
        return self.image_encoder(ready.to(own.device, own.dtype)).embedding.to(self.dtype)

    @torch.no_grad()
    def draw_embedding(
        self,
        words: Words,
        null: Words,
        walk: tuple[str, Tensor],
        scale: float,
        candidates: int,
        source: Generators,
        latents: Tensor | None = None,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """The prior: captions to places in CLIP's space, (B, D), on CLIP's own scale."""
        words = Words(*(part.repeat_interleave(candidates, dim=0) for part in words))
        null = Words(*(part.repeat_interleave(candidates, dim=0) for part in null))
        if isinstance(source, list):
            source = [one for one in source for _ in range(candidates)]
        own, scheduler = self.prior.proj_in.weight.dtype, self.prior_scheduler

        def denoise(
            x: Tensor, t: Tensor, embedding: Tensor, states: Tensor, mask: Tensor
        ) -> Tensor:
            output = self.prior(x.to(own), t, embedding.to(own), states.to(own), mask).to(x.dtype)
            return to_x0(output, x, t, scheduler.schedule, scheduler.config.prediction_type)

        guided = guidance.classifier_free(denoise, words, null, scale)
        x = self.noise(tuple(words.embedding.shape), source, latents)
        x = scheduler.walk(
            walk[0], guided, x, walk[1], generator=source, callback=callback, clip=True
        )
        # Trap: neither embedding is normalised; the prior's own mean and spread restore the scale.
        drawn = self.prior.restore(x).unflatten(0, (-1, candidates))  # (B, candidates, D)
        fit = (drawn * words.embedding.unflatten(0, (-1, candidates))).sum(-1)
        return drawn[torch.arange(len(drawn)), fit.argmax(dim=1)]

    @torch.no_grad()
    def draw_small(
        self,
        embedding: Tensor,
        words: Words,
        null: Words,
        walk: tuple[str, Tensor],
        scale: float,
        size: tuple[int, int],
        source: Generators,
        latents: Tensor | None = None,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """The decoder: places in CLIP's space to small pictures in [-1, 1]."""
        own, scheduler = self.decoder.conv_in.weight.dtype, self.decoder_scheduler

        def told(image_embedding: Tensor, said: Words) -> tuple[Tensor, Tensor, Tensor]:
            parts = image_embedding.to(own), said.embedding.to(own), said.states.to(own)
            context, added = self.text_proj(*parts)
            extra = context.shape[1] - said.mask.shape[1]
            return context, added, F.pad(said.mask, (extra, 0), value=True)  # (B, 4 + N)

        def denoise(
            x: Tensor, t: Tensor, context: Tensor, added: Tensor, mask: Tensor
        ) -> Tensor | tuple[Tensor, Tensor]:
            output = self.decoder(x.to(own), t, context, added, mask).to(x.dtype)
            output, *fraction = output.split(x.shape[1], dim=1)  # 3 channels, or twice 3
            target = scheduler.config.prediction_type
            x0 = to_x0(output, x, t, scheduler.schedule, target)
            return (x0, *fraction) if fraction else x0

        nowhere = self.text_proj.no_image(len(embedding))
        guided = guidance.classifier_free(
            denoise, told(embedding, words), told(nowhere, null), scale
        )
        x = self.noise((len(embedding), self.decoder.config.in_channels, *size), source, latents)
        x = scheduler.walk(
            walk[0], guided, x, walk[1], generator=source, callback=callback, clip=True
        )
        return x.clamp(-1, 1)

    @torch.no_grad()
    def draw_large(
        self,
        small: Tensor,
        walk: tuple[str, Tensor],
        size: tuple[int, int],
        source: Generators,
        latents: Tensor | None = None,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """The upsampler: small pictures in [-1, 1] to large ones, not clamped. No words now."""
        scheduler = self.super_res_scheduler
        blurred = _scaled(small, size)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            # Trap: "first" and "last" are one stage at one size; "last" does the last step only.
            last = t[0].item() == walk[1][-1].item()
            unet = self.super_res_last if last else self.super_res_first
            own = unet.conv_in.weight.dtype
            output = unet(torch.cat([x, blurred], dim=1).to(own), t).to(x.dtype)
            return to_x0(output, x, t, scheduler.schedule, scheduler.config.prediction_type)

        x = self.noise((*small.shape[:2], *size), source, latents)
        return scheduler.walk(
            walk[0], denoise, x, walk[1], generator=source, callback=callback, clip=True
        )

    # --- checks ----------------------------------------------------------------------------------

    def _walks(
        self, names: Sequence[str], steps: Sequence[int], sampler: str | None
    ) -> list[tuple[str, Tensor]]:
        """Sampler and timesteps of each walk."""
        schedulers = {
            "prior": self.prior_scheduler,
            "decoder": self.decoder_scheduler,
            "upsampler": self.super_res_scheduler,
        }
        walks = []
        for name, count in zip(names, _each("steps", steps, names), strict=True):
            chosen = sampler or schedulers[name].sampler
            walks.append((chosen, schedulers[name].timesteps(chosen, count)))
        return walks

    def _sizes(
        self, height: int | None, width: int | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the small and of the large picture."""
        own, large = (
            size if isinstance(size, tuple) else (size, size)
            for size in (self.decoder.config.sample_size, self.super_res_first.config.sample_size)
        )
        small_, large_ = [], []
        for name, asked, a, b in zip(("height", "width"), (height, width), own, large, strict=True):
            asked = b if asked is None else asked
            errors.number(name, asked, low=1, integer=True)
            steps = [2 ** (len(u.config.block_out_channels) - 1) for u in
                     (self.decoder, self.super_res_first)]  # fmt: skip
            little = asked * a // b
            errors.expect(
                asked * a % b == 0 and little % steps[0] == 0 and asked % steps[1] == 0,
                f"{name} is {asked}; the decoder draws at {a}/{b} of it, which must be a multiple"
                f" of {steps[0]}, and the upsampler needs a multiple of {steps[1]}.",
            )
            small_.append(little)
            large_.append(asked)
        return (small_[0], small_[1]), (large_[0], large_[1])


def _scaled(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Another size, bicubic with antialiasing; on the CPU, so that it is the same everywhere."""
    scaled = F.interpolate(
        pictures.cpu(), size, mode="bicubic", align_corners=False, antialias=True
    )
    return scaled.to(pictures.device)


def _each(name: str, values: Sequence[Any] | None, names: Sequence[str]) -> list[Any]:
    """One value for each walk; None stands for all of them."""
    if values is None:
        return [None] * len(names)
    if not isinstance(values, list | tuple) or len(values) != len(names):
        raise ValueError(
            f"{name} is {values!r:.60}; expected {len(names)} values, for {', '.join(names)}."
        )
    return list(values)
