"""Imagen's two walks against stock U-Nets and stock's DDPM with dynamic thresholding, float64.

diffusers has no such pipeline; its networks and its scheduler are put together here by hand.
"""

import pytest
import tiny
import torch
from torch.nn import functional as F

from companion import guidance
from companion.imagen import Imagen
from companion.schedule import Schedule
from reference.oracle import TOLERANCE, distance
from reference.systems import exactly, quiet

TEXTS = ["a red house", "the sea"]
STEPS = (5, 4)  # parts of 1000: else stock's step ends elsewhere than its next one begins


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.imagen().save_pretrained(tmp_path_factory.mktemp("imagen"))


@pytest.fixture(scope="module")
def ours(folder):
    return Imagen.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def stock(folder):
    with quiet():
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        found = {
            name: UNet2DConditionModel.from_pretrained(folder, subfolder=name).double()
            for name in ("unet", "super_res")
        }
        found["text_encoder"] = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        found["text_encoder"].double()
        found["tokenizer"] = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return found


def words(stock, texts):
    said = stock["tokenizer"](
        texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        states = stock["text_encoder"](said.input_ids).last_hidden_state
    mask = said.attention_mask
    pooled = torch.stack([x[: int(m.sum())].mean(0) for x, m in zip(states, mask, strict=True)])
    return states, pooled, mask


def walk(unet, folder, x, steps, scale, ratio, generator, ask):
    """Stock's scheduler, from noise to a picture."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(
        folder,
        thresholding=ratio is not None,
        dynamic_thresholding_ratio=ratio or 0.0,
        sample_max_value=1e9,  # its default, 1, would make dynamic thresholding static
        clip_sample=ratio is None,
    )
    exactly(scheduler).set_timesteps(steps)
    for t in scheduler.timesteps:
        null, given = ask(unet, x, t)
        noise = null + scale * (given - null)
        step = scheduler.step(noise, t, x, generator=generator)
        x = step.prev_sample
    return step.pred_original_sample  # the same, less the 1e-10 of noise that stock adds at last


@pytest.mark.parametrize("thresholding", ["dynamic", "static"])
@torch.no_grad()
def test_both_walks_are_stocks(ours, stock, folder, thresholding):
    states, pooled, mask = words(stock, TEXTS)
    nothing = words(stock, [""] * 2)

    def base(unet, x, t):
        return [
            unet(x, t, s, class_labels=p, encoder_attention_mask=m).sample
            for s, p, m in (nothing, (states, pooled, mask))
        ]

    ratio = {"dynamic": 0.9, "static": None}[thresholding]
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64)
    x = walk(stock["unet"], folder / "scheduler", x, STEPS[0], 7.0, ratio, g, base)
    small = x.clamp(-1, 1)
    g = torch.Generator().manual_seed(5)  # less the noise that stock draws in the last step
    for _ in range(STEPS[0]):
        torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64)

    level = torch.full((2,), 150)
    noise = torch.randn(small.shape, generator=g, dtype=torch.float64)
    signal = Schedule.cosine().alphas_cumprod[150]
    below = signal.sqrt() * small + (1 - signal).sqrt() * noise
    below = F.interpolate(below, (16, 16), mode="bicubic", align_corners=False, antialias=True)

    def large(unet, x, t):
        both = torch.cat([x, below], dim=1)
        return [
            unet(both, t, s, class_labels=level, encoder_attention_mask=m).sample
            for s, _, m in (nothing, (states, pooled, mask))
        ]

    x = torch.randn(2, 3, 16, 16, generator=g, dtype=torch.float64)
    folder = folder / "super_res_scheduler"
    theirs = walk(stock["super_res"], folder, x, STEPS[1], 3.0, ratio, g, large)
    mine = ours(
        TEXTS,
        steps=STEPS,
        guidance_scale=7.0,
        super_res_guidance_scale=3.0,
        thresholding=thresholding,
        percentile=0.9,
        augmentation=150,
        generator=torch.Generator().manual_seed(5),
    )
    assert distance(mine, (theirs.clamp(-1, 1) + 1) / 2) < TOLERANCE
    assert mine.std() > 0.05


def test_dynamic_thresholding_is_stocks_and_differs_from_static():
    from diffusers import DDPMScheduler

    x0 = 3 * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    x0[0] /= 100  # already in range: left alone
    scheduler = DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.97, sample_max_value=1e9
    )
    ours = guidance.thresholded(lambda x, t: x, 0.97)(x0, torch.zeros(4))
    assert distance(ours, scheduler._threshold_sample(x0)) < TOLERANCE
    static = guidance.thresholded(lambda x, t: x, None)(x0, torch.zeros(4))
    assert torch.equal(static, x0.clamp(-1, 1)) and torch.equal(ours[0], x0[0])
    assert (ours[1:] - static[1:]).abs().max() > 0.3
