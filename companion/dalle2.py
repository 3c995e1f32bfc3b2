"""DALL·E 2, as Karlo built it in the open: words to a picture in three or four walks from noise.

Ramesh et al. 2022 (arXiv 2204.06125), figure 2. The **prior** draws a place in CLIP's space that
fits the caption; the **decoder** draws a small picture that CLIP would put there; the **upsampler**
draws it large, and a second one, where a folder has it, larger still. Given a picture instead of a
caption, its own place replaces the prior's answer; what can be done then is in ``manipulations``,
and the stages themselves are in ``unclip``.

Letters: B pictures, D the width of CLIP's space.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from companion import checkpoints, errors, samplers
from companion.adm import ADMUNet
from companion.clip import CLIP, CLIPTextProjected, CLIPVisionProjected, halves
from companion.manipulations import Manipulations
from companion.pipeline import generators, own_clip, prompts
from companion.preparation import Preparation
from companion.prior import Prior, TextProjection
from companion.schedule import Schedule
from companion.scheduler import Generators, Scheduler
from companion.tokenizer import Tokenizer
from companion.unclip import Latents

TOGETHER = (
    ("prior", "prior_scheduler"),
    ("image_encoder", "feature_extractor"),
    ("super_res_second", "super_res_second_scheduler"),
)
_UNCLIP = {
    "_class_name": "UnCLIPScheduler",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small_log",
}
# The book's own, in the keys of Karlo's files; their table of betas is always the cosine's. Karlo's
# upsamplers predict the noise: at the first of so few steps, where nothing but noise is left, that
# says nothing of the picture.
SCHEDULERS = {
    "prior_scheduler": _UNCLIP | {"clip_sample_range": 5.0, "prediction_type": "sample"},
    "decoder_scheduler": _UNCLIP | {"variance_type": "learned_range"},
    "super_res_scheduler": _UNCLIP | {"prediction_type": "sample"},
    "super_res_second_scheduler": _UNCLIP | {"prediction_type": "sample"},
}


class DALLE2(Manipulations):
    """diffusers' ``UnCLIPPipeline`` and ``UnCLIPImageVariationPipeline``, and what both lack.

    A folder with ``prior/`` and ``image_encoder/`` opens in both; each takes what it knows. Only
    this class knows ``super_res_second/``, an upsampler after the upsampler. Karlo came as two
    folders that share most parts: open one with the picture encoder of the other,
    ``DALLE2.from_pretrained(texts, image_encoder=…, feature_extractor=…)``.
    """

    opens = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
    shipped = "dalle2"
    made_of = ("clip", "text-encoder", "prior", "decoder", "upsampler-64")
    asked_with = {"guidance_scale": 3.0, "prior_guidance_scale": 1.0}
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
        "super_res_second": ADMUNet,
        "super_res_second_scheduler": Scheduler,
        "text_encoder": CLIPTextProjected,
        "text_proj": TextProjection,
        "tokenizer": Tokenizer,
    }
    optional = tuple(name for pair in TOGETHER for name in pair)
    walks = {
        "prior": ("prior", 25),
        "decoder": ("decoder", 25),
        "upsampler": ("super_res_first", 7),
        "second upsampler": ("super_res_second", 7),
    }

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        for one, other in TOGETHER:
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
        if self.image_encoder:
            self.feature_extractor.fits(self.image_encoder.config)
        for upsampler in (self.super_res_first, self.super_res_last, self.super_res_second):
            u = upsampler and upsampler.config
            errors.expect(
                not u or (u.in_channels, u.out_channels) == (2 * c.in_channels, c.in_channels),
                f"an upsampler has {u and u.in_channels} channels in and {u and u.out_channels}"
                f" out; expected {2 * c.in_channels} and {c.in_channels}.",
            )

    @classmethod
    def _assembled(cls, dtype: torch.dtype) -> dict[str, Any]:
        clip, words, prior, decoder, first = (checkpoints.WEIGHTS / name for name in cls.made_of)
        second = checkpoints.WEIGHTS / "upsampler-256"
        return own_parts(
            *own_clip(clip, words, dtype),
            Prior.from_pretrained(prior, dtype=dtype),
            ADMUNet.from_pretrained(decoder, dtype=dtype),
            TextProjection.from_pretrained(decoder, "text_proj", dtype=dtype),
            ADMUNet.from_pretrained(first, dtype=dtype),
            ADMUNet.from_pretrained(second, dtype=dtype) if second.is_dir() else None,
        )

    def index(self) -> dict[str, object]:
        return super().index() | {"_class_name": self.opens[0 if self.prior else 1]}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        steps: Sequence[int] | None = None,
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
        latents: Latents = None,
        callback: samplers.Callback = None,
        truncate: bool = False,
    ) -> Tensor:
        """Draw from words.

        Args:
            prompt: One text or several.
            steps: Timesteps of prior, decoder, upsampler and, where the folder has one, second
                upsampler; default: 25, 25, 7 (and 7).
            guidance_scale: Of the decoder, s = 1 + w; at most 1: it is asked once a step.
            prior_guidance_scale: Of the prior.
            candidates: Embeddings that the prior draws for each picture; the one with the greatest
                dot product with the caption's goes on. The paper (section 2.2) draws 2.
            sampler: One of ``samplers`` for all walks; default: the folder's (``ddpm``).
            negative_prompt: What to move away from, instead of the empty text.
            num_images_per_prompt: Pictures of each prompt, next to each other in the result.
            height: Of the largest picture, in pixels; default: what its upsampler was trained at.
            width: Likewise.
            generator: Source of all noise, or a list with one for each picture.
            seed: Instead of a generator.
            latents: The noise that each walk starts from, the prior's (B · candidates, D); None, as
                a whole or for one of them: drawn.
            callback: Called as ``callback(i, t, x, x0_hat)`` in each step of each walk.
            truncate: Cut prompts that are too long, rather than refuse them.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        errors.expect(self.prior is not None, "this folder has no prior: it draws .variations().")
        errors.number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        errors.number("candidates", candidates, low=1, integer=True)
        errors.number("prior_guidance_scale", prior_guidance_scale)
        errors.number("guidance_scale", guidance_scale)
        errors.expect(
            negative_prompt is None or max(guidance_scale, prior_guidance_scale) > 1,
            "negative_prompt does nothing without guidance; choose a scale above 1.",
        )
        names = ("prior", *self._pixels)
        prior, decoder, *upsamplers = self._plan(names, steps, sampler, latents, height, width)
        texts = prompts("prompt", prompt)
        source = generators(generator, seed, len(texts) * num_images_per_prompt)
        words = self.encode_prompts(texts, num_images_per_prompt, truncate)
        against = prompts("negative_prompt", negative_prompt or "", len(texts))
        null = self.encode_prompts(against, num_images_per_prompt, truncate)
        embedding = self.draw_embedding(
            words, null, prior, prior_guidance_scale, candidates, source, callback
        )
        small = self.draw_small(embedding, words, null, decoder, guidance_scale, source, callback)
        return self._enlarge(small, upsamplers, source, callback)


def own_parts(
    clip: CLIP,
    tokenizer: Tokenizer,
    preparation: Preparation,
    prior: Prior,
    decoder: ADMUNet,
    text_proj: TextProjection,
    upsampler: ADMUNet,
    second: ADMUNet | None = None,
) -> dict[str, Any]:
    """The parts of the book's own system, from what its recipes train."""
    words, pictures = halves(clip)
    parts = {
        "decoder": decoder,
        "feature_extractor": preparation,
        "image_encoder": pictures,
        "prior": prior,
        "super_res_first": upsampler,
        "super_res_last": upsampler,  # Karlo has another one for the last step
        "text_encoder": words,
        "text_proj": text_proj,
        "tokenizer": tokenizer,
    }
    schedulers = dict(SCHEDULERS)
    if second is None:
        del schedulers["super_res_second_scheduler"]
    else:
        parts["super_res_second"] = second
    return parts | {k: Scheduler.of(Schedule.cosine(), s) for k, s in schedulers.items()}
