"""The stages of DALL·E 2, one after another: what a prior, a decoder and an upsampler do.

Ramesh et al. 2022 (arXiv 2204.06125), section 2, as Karlo built it in the open. Each stage is a
walk from noise, and all walks are planned, and checked, before the first step of the first.
``dalle2`` and ``manipulations`` put them together.

Letters: B pictures, N tokens, D the width of CLIP's space.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import errors, guidance, samplers
from companion.adm import ADMUNet
from companion.clip import CLIPTextProjected, CLIPVisionProjected
from companion.data import to_unit
from companion.diffusion import to_x0
from companion.pipeline import System, for_each
from companion.preparation import Preparation, scaled
from companion.prior import Prior, TextProjection
from companion.scheduler import Generators, Scheduler
from companion.tokenizer import Tokenizer

Latents = Sequence[Tensor | None] | None


class Words(NamedTuple):
    """What the text encoder makes of captions."""

    embedding: Tensor  # (B, D) projected into CLIP's space, not normalised
    states: Tensor  # (B, N, D)
    mask: Tensor  # (B, N) bool: True up to the end token

    def each(self, times: int) -> "Words":
        """Every caption ``times`` times, next to each other."""
        return Words(*(part.repeat_interleave(times, dim=0) for part in self))


class Walk(NamedTuple):
    """One walk from noise, planned before any work is done."""

    sampler: str
    timesteps: Tensor
    size: tuple[int, int] | None = None  # height and width in pixels; the prior has none
    latents: Tensor | None = None  # the noise to start from; None: drawn


class UnCLIP(System):
    """The stages. Pictures between them run from -1 to 1."""

    # The parts, as the system's __init__ sets them; None where a folder has no such part.
    decoder: ADMUNet
    decoder_scheduler: Scheduler
    feature_extractor: Preparation | None
    image_encoder: CLIPVisionProjected | None
    prior: Prior | None
    prior_scheduler: Scheduler | None
    super_res_first: ADMUNet
    super_res_last: ADMUNet
    super_res_scheduler: Scheduler
    super_res_second: ADMUNet | None
    super_res_second_scheduler: Scheduler | None
    text_encoder: CLIPTextProjected
    text_proj: TextProjection
    tokenizer: Tokenizer

    @torch.no_grad()
    def encode_prompts(self, texts: list[str], each: int = 1, truncate: bool = False) -> Words:
        """Captions to what prior and decoder are told, ``each`` times each."""
        tokens = self.tokenizer(texts, truncate)
        x = self.text_encoder(tokens.ids.to(self.device))
        parts = x.embedding.to(self.dtype), x.states.to(self.dtype), tokens.mask.to(self.device)
        return Words(*parts).each(each)

    @torch.no_grad()
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
        walk: Walk,
        scale: float,
        candidates: int,
        source: Generators,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """The prior: captions to places in CLIP's space, (B, D), on CLIP's own scale."""
        words, null = words.each(candidates), null.each(candidates)
        if isinstance(source, list):
            source = [one for one in source for _ in range(candidates)]
        own, scheduler = self.prior.proj_in.weight.dtype, self.prior_scheduler

        def denoise(
            x: Tensor, t: Tensor, embedding: Tensor, states: Tensor, mask: Tensor
        ) -> Tensor:
            output = self.prior(x.to(own), t, embedding.to(own), states.to(own), mask).to(x.dtype)
            return to_x0(output, x, t, scheduler.schedule, scheduler.config.prediction_type)

        guided = guidance.classifier_free(denoise, words, null, scale)
        x = self.noise(tuple(words.embedding.shape), source, walk.latents)
        x = scheduler.walk(
            walk.sampler, guided, x, walk.timesteps, generator=source, callback=callback, clip=True
        )
        # Trap: neither embedding is normalised; the prior's own mean and spread restore the scale.
        drawn = self.prior.restore(x).unflatten(0, (-1, candidates))  # (B, candidates, D)
        fit = (drawn * words.embedding.unflatten(0, (-1, candidates))).sum(-1)
        return drawn[torch.arange(len(drawn)), fit.argmax(dim=1)]  # section 2.2 keeps one of two

    @torch.no_grad()
    def draw_small(
        self,
        embedding: Tensor,
        words: Words,
        null: Words,
        walk: Walk,
        scale: float,
        source: Generators,
        callback: samplers.Callback = None,
        eta: float = 0.0,
    ) -> Tensor:
        """The decoder: places in CLIP's space to small pictures in [-1, 1]."""
        shape = (len(embedding), self.decoder.config.in_channels, *walk.size)
        x = self.noise(shape, source, walk.latents)
        x = self.decoder_scheduler.walk(
            walk.sampler, self.decoding(embedding, words, null, scale), x, walk.timesteps,
            generator=source, callback=callback, clip=True, eta=eta,
        )  # fmt: skip
        return x.clamp(-1, 1)

    @torch.no_grad()
    def invert_small(
        self,
        small: Tensor,
        embedding: Tensor,
        words: Words,
        null: Words,
        timesteps: Tensor,
        scale: float,
        iterations: int,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """Small pictures in [-1, 1] back to the noise from which DDIM decodes them (section 3)."""
        return self.decoder_scheduler.walk_back(
            self.decoding(embedding, words, null, scale),
            small.to(self.device, self.dtype),
            timesteps,
            iterations=iterations,
            callback=callback,
        )

    def decoding(
        self, embedding: Tensor, words: Words, null: Words, scale: float
    ) -> samplers.Denoiser:
        """The guided decoder: it knows a place in CLIP's space and a caption, or neither."""
        scheduler = self.decoder_scheduler
        own, between = self.decoder.conv_in.weight.dtype, self.text_proj.embedding_proj.weight.dtype

        def told(image_embedding: Tensor, said: Words) -> tuple[Tensor, Tensor, Tensor]:
            parts = (part.to(between) for part in (image_embedding, said.embedding, said.states))
            context, added = self.text_proj(*parts)
            extra = context.shape[1] - said.mask.shape[1]
            mask = F.pad(said.mask, (extra, 0), value=True)  # (B, 4 + N)
            return context.to(own), added.to(own), mask

        def denoise(
            x: Tensor, t: Tensor, context: Tensor, added: Tensor, mask: Tensor
        ) -> Tensor | tuple[Tensor, Tensor]:
            output = self.decoder(x.to(own), t, context, added, mask).to(x.dtype)
            output, *fraction = output.split(x.shape[1], dim=1)  # 3 channels, or twice 3
            target = scheduler.config.prediction_type
            x0 = to_x0(output, x, t, scheduler.schedule, target)
            return (x0, *fraction) if fraction else x0

        nowhere = self.text_proj.no_image(len(embedding))
        return guidance.classifier_free(denoise, told(embedding, words), told(nowhere, null), scale)

    @torch.no_grad()
    def draw_large(
        self,
        small: Tensor,
        walk: Walk,
        source: Generators,
        callback: samplers.Callback = None,
        second: bool = False,
    ) -> Tensor:
        """An upsampler: pictures in [-1, 1] to larger ones, not clamped. No words now."""
        first, last = self.super_res_first, self.super_res_last
        scheduler = self.super_res_scheduler
        if second:
            first = last = self.super_res_second
            scheduler = self.super_res_second_scheduler
        blurred = scaled(small, walk.size)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            # Trap: "first" and "last" are one stage at one size; "last" does the last step only.
            unet = last if t[0].item() == walk.timesteps[-1].item() else first
            own = unet.conv_in.weight.dtype
            output = unet(torch.cat([x, blurred], dim=1).to(own), t).to(x.dtype)
            return to_x0(output, x, t, scheduler.schedule, scheduler.config.prediction_type)

        x = self.noise((*small.shape[:2], *walk.size), source, walk.latents)
        return scheduler.walk(
            walk.sampler, denoise, x, walk.timesteps, generator=source, callback=callback, clip=True
        )

    def _enlarge(
        self,
        small: Tensor,
        plan: Sequence[Walk],
        source: Generators,
        callback: samplers.Callback,
    ) -> Tensor:
        """Through one or both upsamplers to pictures in [0, 1]."""
        large = self.draw_large(small, plan[0], source, callback)
        for walk in plan[1:]:
            large = self.draw_large(large.clamp(-1, 1), walk, source, callback, second=True)
        return to_unit(large)

    # --- the plan ---------------------------------------------------------------------------------

    @property
    def _pixels(self) -> tuple[str, ...]:
        """The walks that draw pixels."""
        return ("decoder", "upsampler", *["second upsampler"] * bool(self.super_res_second))

    def _plan(
        self,
        names: Sequence[str],
        steps: Sequence[int] | None,
        sampler: str | None,
        latents: Latents,
        height: int | None,
        width: int | None,
        own: bool = False,
    ) -> list[Walk]:
        """All walks, checked; ``own``: the decoder starts from a picture's own noise."""
        sizes = {"prior": None, **dict(zip(self._pixels, self._sizes(height, width), strict=True))}
        counts = [self.walks[name][1] for name in names] if steps is None else steps
        plan = []
        counts = for_each("steps", counts, names)
        noises = for_each("latents", latents, names)
        for name, count, noise in zip(names, counts, noises, strict=True):
            scheduler = {
                "prior": self.prior_scheduler,
                "decoder": self.decoder_scheduler,
                "upsampler": self.super_res_scheduler,
                "second upsampler": self.super_res_second_scheduler,
            }[name]
            chosen = "ddim" if own and name == "decoder" else scheduler.choose(sampler)
            # There and back again only works where something of the picture is left: in its last
            # row, 999, Karlo's schedule leaves a signal of 5e-5. Leading timesteps keep away.
            spacing = "leading" if own and name == "decoder" else None
            timesteps = scheduler.timesteps(chosen, count, spacing=spacing)
            plan.append(Walk(chosen, timesteps, sizes[name], noise))
        return plan

    def _sizes(self, height: int | None, width: int | None) -> list[tuple[int, int]]:
        """Height and width of the small picture and of all larger ones."""
        unets = [self.decoder, self.super_res_first, self.super_res_second]
        configs = [unet.config for unet in unets if unet is not None]
        owns = [c.sample_size for c in configs]
        owns = [own if isinstance(own, tuple) else (own, own) for own in owns]
        found = []
        for i, (name, asked) in enumerate((("height", height), ("width", width))):
            last = owns[-1][i]
            asked = last if asked is None else asked
            errors.number(name, asked, low=1, integer=True)
            steps = [2 ** (len(c.block_out_channels) - 1) for c in configs]
            shares = [own[i] for own in owns]
            errors.expect(
                all(
                    asked * share % last == 0 and asked * share // last % step == 0
                    for share, step in zip(shares, steps, strict=True)
                ),
                f"{name} is {asked}; the pictures are drawn one after another at"
                f" {', '.join(f'{share}/{last}' for share in shares)} of it, which must be"
                f" multiples of {', '.join(map(str, steps))}.",
            )
            found.append([asked * share // last for share in shares])
        return list(zip(*found, strict=True))
