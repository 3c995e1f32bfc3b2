"""Stable Diffusion: words to a picture, by way of a smaller place (Rombach et al. 2022, figure 3).

Four parts: a text encoder (CLIP's) turns the prompt into states; a U-Net, asked again and again by
a sampler, turns noise into a latent that fits them; the autoencoder's decoder turns that into
pixels; a tokenizer stands before it all. Given a picture, drawing starts from it
(``image=``, ``strength=``), repaints a part of it (``mask=``), or draws what CLIP sees in it
(``image_prompt=``: the U-Net then looks at a picture's tokens where it else looks at words).

Letters: B pictures (prompts times pictures a prompt), N tokens of K channels, f the autoencoder's
factor (8 at life size), latents (B, 4, H/f, W/f).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import checkpoints, errors, guidance, samplers
from companion.autoencoder import Autoencoder
from companion.clip import CLIP, CLIPText, CLIPVisionProjected, halves
from companion.data import to_signed, to_unit
from companion.diffusion import to_x0
from companion.pipeline import System, generators, own_clip, prompts
from companion.preparation import Preparation
from companion.schedule import Schedule, draw
from companion.scheduler import Generators, Scheduler
from companion.tokenizer import Tokenizer
from companion.unet import UNet

# The book's own, as in the published folder, but for PNDM: DDIM goes through the same timesteps.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class StableDiffusion(System):
    """diffusers' ``StableDiffusionPipeline``, with its image-to-image and inpainting siblings."""

    opens = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    )
    shipped = "stable-diffusion"
    made_of = ("clip", "text-encoder", "autoencoder", "stable-diffusion")
    asked_with = {"guidance_scale": 4.0}
    parts = {
        "feature_extractor": Preparation,
        "image_encoder": CLIPVisionProjected,
        "scheduler": Scheduler,
        "text_encoder": CLIPText,
        "tokenizer": Tokenizer,
        "unet": UNet,
        "vae": Autoencoder,
    }
    optional = ("image_encoder", "feature_extractor")
    skipped = {
        "safety_checker": "not loaded, so nothing here looks at what is drawn. The licence of these"
        " weights still says what they may be used for.",
    }
    walks = {"latents": ("unet", 50)}
    # The parts, as __init__ sets them; None where a folder has no such part.
    feature_extractor: Preparation | None
    image_encoder: CLIPVisionProjected | None
    scheduler: Scheduler
    text_encoder: CLIPText
    tokenizer: Tokenizer
    unet: UNet
    vae: Autoencoder

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        c, latent = self.unet.config, self.vae.config.latent_channels
        text = self.text_encoder.config
        errors.expect(
            c.in_channels in (latent, 2 * latent + 1) and c.out_channels == latent,
            f"the U-Net has {c.in_channels} channels in and {c.out_channels} out; with"
            f" {latent} latent channels expected {latent} in (or {2 * latent + 1} for inpainting)"
            f" and {latent} out.",
        )
        errors.expect(
            c.cross_attention_dim == text.hidden_size,
            f"the U-Net looks at states of width {c.cross_attention_dim}, the text encoder makes"
            f" {text.hidden_size}.",
        )
        errors.expect(
            len(self.tokenizer) <= text.vocab_size
            and self.tokenizer.context <= text.max_position_embeddings,
            f"the tokenizer makes {self.tokenizer.context} tokens of {len(self.tokenizer)} kinds,"
            f" the text encoder takes {text.max_position_embeddings} of {text.vocab_size}.",
        )
        errors.expect(
            (self.image_encoder is None) == (self.feature_extractor is None),
            "image_encoder and feature_extractor go together.",
        )
        if self.image_encoder:
            self.feature_extractor.fits(self.image_encoder.config)

    @classmethod
    def _assembled(cls, dtype: torch.dtype) -> dict[str, Any]:
        clip, words, vae, unet = (checkpoints.WEIGHTS / name for name in cls.made_of)
        return own_parts(
            *own_clip(clip, words, dtype),
            Autoencoder.from_pretrained(vae, dtype=dtype),
            UNet.from_pretrained(unet, dtype=dtype),
        )

    @classmethod
    def listed(cls, root: Path, given: Collection[str] = ()) -> set[str]:
        found = super().listed(root, given)
        # Published folders prepare pictures for the safety checker alone.
        return found if "image_encoder" in {*found, *given} else found - {"feature_extractor"}

    def index(self) -> dict[str, object]:
        kind = self.opens[2 if self._inpaints else 0]
        absent = [n for n in self.optional if getattr(self, n) is None]
        nothing = {n: [None, None] for n in ("safety_checker", *absent)}
        return super().index() | {"_class_name": kind, "requires_safety_checker": False} | nothing

    @property
    def _inpaints(self) -> bool:
        """Whether the U-Net was trained to see a mask and what lies around it (9 channels)."""
        return self.unet.config.in_channels > self.vae.config.latent_channels

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        callback: samplers.Callback = None,
        truncate: bool = False,
        image: Tensor | None = None,
        strength: float = 0.8,
        mask: Tensor | None = None,
        paste: bool = False,
        image_prompt: Tensor | None = None,
    ) -> Tensor:
        """Draw.

        Args:
            prompt: One text or several; none with ``image_prompt``.
            steps: How many timesteps the sampler visits (a share of them, ``strength``, when
                drawing starts from a picture).
            guidance_scale: s = 1 + w; at most 1: the U-Net is asked once a step, not twice.
            sampler: ``ddim``, ``euler``, ``heun``, ``dpmpp_2m`` or ``ddpm``; default: the folder's.
            negative_prompt: What to move away from, instead of the empty text.
            num_images_per_prompt: Pictures of each prompt, next to each other in the result.
            height: In pixels, a multiple of f; default: what the U-Net was trained at.
            width: Likewise.
            generator: Source of all noise, or a list with one for each picture.
            seed: Instead of a generator.
            latents: (B, 4, H/f, W/f) noise to start from, instead of drawn noise.
            callback: Called as ``callback(i, t, x, x0_hat)`` in each step, on latents.
            truncate: Cut prompts that are too long, rather than refuse them.
            image: (1 or B, 3, H, W) in [0, 1], the picture to start from.
            strength: From 0 to 1: how much of the way to noise ``image`` is taken back.
            mask: (1 or B, 1, H, W) in [0, 1]: 1 (from 0.5 on) is repainted, 0 is kept.
            paste: Put the pixels of ``image`` back where ``mask`` is 0. Without it they come
                from the decoder, and are only nearly the same.
            image_prompt: (B, 3, H, H) square pictures in [0, 1], of any size: draw what they show,
                instead of what words say. Guidance moves away from the empty text, or from
                ``negative_prompt``.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        sampler = self.scheduler.choose(sampler)
        errors.number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        errors.expect(not paste or mask is not None, "paste=True puts back what mask= keeps.")
        texts = self._texts(prompt, image_prompt)
        count = len(texts) * num_images_per_prompt
        source = generators(generator, seed, count)
        height, width = self._size(height, width, image, mask, count)
        # Trap: whatever the folder says, stock's pipeline sets the offset to 1 (and clips nothing).
        timesteps = self.scheduler.timesteps(sampler, steps, steps_offset=1)
        if image is not None:
            errors.number("strength", strength, low=0, high=1)
            taken = int(steps * strength)
            errors.expect(taken > 0, f"strength {strength} of {steps} steps leaves no step to do.")
            timesteps = timesteps[steps - taken :]
        given, null = self.encode_prompts(
            texts, negative_prompt, num_images_per_prompt, guidance_scale, truncate
        )
        if image_prompt is not None:
            given = self.encode_picture_prompts(image_prompt, num_images_per_prompt)

        # Noise is drawn in stock's order: for the latent of the picture, to start from, for the
        # latent of the masked picture, and then by the sampler.
        shape = (count, self.vae.config.latent_channels)
        shape = (*shape, height // self.vae.factor, width // self.vae.factor)
        picture = around = None
        if image is not None and not (mask is not None and self._inpaints and strength == 1):
            picture = self.encode(to_signed(image), source, count)
        noise = self.noise(shape, source, latents)
        if picture is None or (mask is not None and strength == 1):
            x = self.scheduler.start(noise, sampler, timesteps)
        else:
            x = self.scheduler.noised(picture, noise, timesteps[0])
        if mask is not None:
            mask = (mask >= 0.5).to(self.device, self.dtype)
            small = F.interpolate(mask, size=shape[2:]).expand(count, -1, -1, -1)
            if self._inpaints:
                kept = self.encode(to_signed(image) * (mask < 0.5).to(image), source, count)
                around = torch.cat([small, kept], dim=1)  # (B, 1 + 4, H/f, W/f)
            else:  # stock encodes the masked picture all the same: nothing of it stays but the draw
                rows = count if isinstance(source, list) else len(image)
                draw(torch.empty(rows, *shape[1:], dtype=self.dtype), source)

        denoise = self.guided(given, null, guidance_scale, around)
        blend = mask is not None and not self._inpaints

        # A U-Net that knows of no mask: what is kept is put into every x it sees, as noisy as x.
        # Samplers go place by place, so this is stock's blending after every step.
        def blended(x: Tensor, t: Tensor) -> Tensor:
            if blend and t[0].item() != timesteps[0].item():  # trap: the first x is not blended
                x = torch.where(small > 0, x, self.scheduler.noised(picture, noise, t[0]))
            return denoise(x, t)

        x = self.scheduler.walk(sampler, blended, x, timesteps, generator=source, callback=callback)
        x = torch.where(small > 0, x, picture) if blend else x
        drawn = to_unit(self.decode(x))
        if not paste:
            return drawn
        return torch.where(mask > 0, drawn, image.to(drawn.device, drawn.dtype))

    def _denoise(
        self, x: Tensor, t: Tensor, context: Tensor, around: Tensor | None = None
    ) -> Tensor:
        """Noisy latents to clean ones, given the text's states (and what lies around a mask)."""
        seen = x if around is None else torch.cat([x, around], dim=1)
        own = self.unet.conv_in.weight.dtype
        output = self.unet(seen.to(own), t, context.to(own)).to(x.dtype)
        return to_x0(output, x, t, self.scheduler.schedule, self.scheduler.config.prediction_type)

    def guided(
        self, given: Tensor, null: Tensor, scale: float, around: Tensor | None = None
    ) -> samplers.Denoiser:
        """The U-Net, told what is given, and led away from the null condition.

        Args:
            given: States to look at, (B, N, K), of texts or of pictures.
            null: Those of nothing said, (B, M, K); M need not be N.
            scale: s = 1 + w.
            around: What a U-Net trained to repaint is shown besides, (B, 1 + 4, H/f, W/f).
        """
        with_it, without = ((c,) if around is None else (c, around) for c in (given, null))
        if scale <= 1 or given.shape == null.shape:
            return guidance.classifier_free(self._denoise, with_it, without, scale)

        # A picture and the empty text have different numbers of tokens: two questions, not one.
        def guided(x: Tensor, t: Tensor) -> Tensor:
            nothing = self._denoise(x, t, *without)
            return nothing + scale * (self._denoise(x, t, *with_it) - nothing)

        return guided

    # --- words and pictures in, pictures out -----------------------------------------------------

    @torch.no_grad()
    def encode_prompts(
        self,
        texts: list[str],
        negative: str | list[str] | None,
        each: int,
        scale: float,
        truncate: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The states of the prompts and of what stands for nothing said, (B, N, K) each."""
        errors.number("guidance_scale", scale)
        errors.expect(
            negative is None or scale > 1,
            f"negative_prompt does nothing at guidance_scale {scale}; choose one above 1.",
        )
        null = prompts("negative_prompt", negative or "", len(texts))
        both = []
        for side in (texts, null):
            ids = self.tokenizer(side, truncate).ids.to(self.device)
            # Trap: all N states, padding included, and no mask: so it was trained.
            both.append(self.text_encoder(ids).states.repeat_interleave(each, dim=0))
        return both[0], both[1]

    @torch.no_grad()
    def encode_picture_prompts(self, pictures: Tensor, each: int = 1) -> Tensor:
        """Square pictures in [0, 1] to the states of CLIP's picture tower, (B, 1 + patches, K)."""
        tower = self.image_encoder.vision_model
        ready = self.feature_extractor(pictures, self.image_encoder.config.image_size)
        own = tower.post_layernorm.weight
        states = tower(ready.to(own.device, own.dtype)).states
        # Trap: CLIP itself norms only the first one, which it compares. Bare, they are of any size.
        return tower.post_layernorm(states).repeat_interleave(each, dim=0)

    @torch.no_grad()
    def encode(self, pictures: Tensor, source: Generators, count: int) -> Tensor:
        """Pictures (1 or B, 3, H, W) in [-1, 1] to scaled latents, a sample each, (B, 4, …)."""
        own = self.vae.quant_conv.weight.dtype
        pictures = pictures.to(self.device, own)
        if isinstance(source, list):  # each picture has its own noise, also for its latent
            rows = pictures.expand(count, -1, -1, -1)
            z = [self.vae.encode(p[None]).sample(g) for p, g in zip(rows, source, strict=True)]
        else:
            z = [self.vae.encode(pictures).sample(source)]
        z = torch.cat(z).to(self.dtype) * self.vae.config.scaling_factor
        return z.expand(count, -1, -1, -1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/f, W/f) to pictures about in [-1, 1], not clamped."""
        own = self.vae.quant_conv.weight.dtype
        z = (latents / self.vae.config.scaling_factor).to(self.device, own)
        return self.vae.decode(z).to(self.dtype)

    def _texts(self, prompt: str | list[str] | None, image_prompt: Tensor | None) -> list[str]:
        """The prompts; empty ones where pictures stand for words."""
        if image_prompt is None:
            return prompts("prompt", prompt)
        errors.expect(
            prompt in (None, ""), "image_prompt stands where the words would; leave prompt out."
        )
        errors.tensor("image_prompt", image_prompt, "B 3 H H", "float", low=0, high=1)
        errors.expect(
            self.image_encoder is not None, "this folder has no image_encoder for image_prompt."
        )
        width, own = self.unet.config.cross_attention_dim, self.image_encoder.config.hidden_size
        errors.expect(
            width == own,
            f"the U-Net looks at states of width {width}, the picture encoder makes {own}: this"
            " U-Net was not trained to look at pictures.",
        )
        return [""] * len(image_prompt)

    def _size(
        self,
        height: int | None,
        width: int | None,
        image: Tensor | None,
        mask: Tensor | None,
        count: int,
    ) -> tuple[int, int]:
        """Height and width in pixels; picture and mask are checked against them."""
        f, own = self.vae.factor, self.unet.config.sample_size or 64
        own = own if isinstance(own, tuple) else (own, own)
        errors.expect(image is not None or mask is None, "mask= needs image=: what to repaint.")
        errors.expect(
            not self._inpaints or mask is not None,
            "this U-Net was trained to repaint: give image= and mask= (all ones: draw it all).",
        )
        if image is not None:
            errors.tensor("image", image, "B 3 H W", "float", low=0, high=1)
            own = tuple(n / f for n in image.shape[2:])
        sizes = []
        for name, asked, usual in (("height", height, own[0]), ("width", width, own[1])):
            asked = int(usual * f) if asked is None else asked
            errors.number(name, asked, low=f, integer=True)
            errors.expect(asked % f == 0, f"{name} is {asked}; expected a multiple of {f}.")
            sizes.append(asked)
        for name, x, channels in (("image", image, 3), ("mask", mask, 1)):
            if x is not None:
                errors.tensor(name, x, f"B {channels} {sizes[0]} {sizes[1]}", low=0, high=1)
                errors.expect(
                    len(x) in (1, count), f"{name} has {len(x)} pictures; expected 1 or {count}."
                )
        return sizes[0], sizes[1]


def own_parts(
    clip: CLIP, tokenizer: Tokenizer, preparation: Preparation, vae: Autoencoder, unet: UNet
) -> dict[str, Any]:
    """The parts of the book's own system, from what its recipes train."""
    words, pictures = halves(clip)
    with torch.device("meta"):
        text = CLIPText(words.config)
    text.text_model = words.text_model
    return {
        "feature_extractor": preparation,
        "image_encoder": pictures,
        "scheduler": Scheduler.of(Schedule.scaled_linear(), SCHEDULER),
        "text_encoder": text.eval(),
        "tokenizer": tokenizer,
        "unet": unet,
        "vae": vae,
    }
