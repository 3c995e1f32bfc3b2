"""Stable Diffusion's recipe: what a step sees and compares, and the system that it makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from companion import checkpoints, data
from companion.prompts import prompts
from companion.recipes import RECIPES
from companion.recipes import stable_diffusion as recipe
from companion.recipes.stable_diffusion import Latents
from companion.stable_diffusion import StableDiffusion
from companion.storybook import is_held_out, render
from companion.train import draw, train
from companion.unet import UNet

MAIN = RECIPES["stable-diffusion"]


@pytest.fixture(scope="module", autouse=True)
def weights(tiny_weights):
    """A tiny CLIP in place of the shipped one."""
    return tiny_weights


@pytest.fixture(scope="module")
def pool() -> Latents:
    return Latents(scenes=128)


@pytest.fixture(scope="module")
def tiny(pool) -> UNet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "WIDTHS", (16, 16))
        torch.manual_seed(0)
        return recipe.build(pool).eval().requires_grad_(False)


def abar(t: torch.Tensor) -> torch.Tensor:
    """Stable Diffusion's table, written out: the square roots of the betas on a straight line."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[t]


def test_latents_are_scaled_clouds_of_the_pictures(pool):
    folded = pool.group(1)
    assert not any(is_held_out(scene) for scene in folded.about)
    said = pool.vae.encode(data.to_signed(render(folded.about[:4], 64)))
    torch.testing.assert_close(folded.mean[:4], said.mean, rtol=1e-3, atol=1e-3)
    batch = pool.batch(torch.arange(64, 128), torch.Generator().manual_seed(0), 0.1)
    z = batch["x0"] / pool.vae.config.scaling_factor
    off = (z - folded.mean) / (folded.log_variance / 2).exp()
    assert abs(off.mean()) < 0.03 and abs(off.std() - 1) < 0.03  # one draw from each cloud
    assert batch["x0"].std().item() == pytest.approx(1, abs=0.1)


def test_some_captions_are_left_out(pool, monkeypatch):
    nothing = pool.clip.read([""]).states[0]
    for share in (0.0, 0.1, 1.0):
        g = torch.Generator().manual_seed(1)
        monkeypatch.setattr(recipe, "SHOWN", 0.0)
        states = torch.cat([pool.batch(torch.arange(128), g, share)["states"] for _ in range(3)])
        empty = [torch.allclose(s, nothing, atol=1e-5) for s in states]
        assert abs(sum(empty) / len(empty) - share) < 0.06
    assert recipe.NO_CAPTION == 0.1


def test_one_batch_in_five_is_told_by_the_pictures_themselves(pool, tiny, monkeypatch):
    g = torch.Generator().manual_seed(2)
    lengths = [pool.batch(torch.arange(2), g, 0.1)["states"].shape[1] for _ in range(200)]
    patches = 1 + (64 // pool.clip.clip.config.vision_config.patch_size) ** 2
    assert set(lengths) == {pool.clip.tokenizer.context, patches} and recipe.SHOWN == 0.2
    assert 0.12 < lengths.count(patches) / 200 < 0.28
    monkeypatch.setattr(recipe, "SHOWN", 1.0)
    shown = pool.batch(torch.arange(4), g, 0.1)["states"]
    pictures = render(pool.group(0).about[:4], 64)
    pipe = recipe.assemble(pool.clip, pool.vae, tiny)
    torch.testing.assert_close(shown, pipe.encode_picture_prompts(pictures), rtol=1e-4, atol=1e-4)


def test_what_is_trained_on_does_not_depend_on_what_was_asked_before(pool):
    again = Latents(scenes=128)
    a, b = draw(MAIN, again, 3), draw(MAIN, pool, 3)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_step_predicts_the_noise_on_stable_diffusions_schedule(pool):
    batch = draw(MAIN, pool, 0)
    seen = []

    def model(x, t, states):
        level = abar(t).view(-1, 1, 1, 1)
        wanted = level.sqrt() * batch["x0"] + (1 - level).sqrt() * batch["noise"]
        torch.testing.assert_close(x.double(), wanted, rtol=1e-5, atol=1e-5)
        seen.append(states)
        return batch["noise"] + 0.5

    value, _ = MAIN.loss(model, batch, None)
    weights = (1 / abar(batch["t"])).clamp(max=8)  # a velocity that is off by 0.5 / sqrt(abar)
    assert value.item() == pytest.approx(0.25 * weights.mean().item(), rel=1e-5)
    simple, _ = MAIN.loss(model, batch, None, 1.0)
    assert simple.item() == pytest.approx(0.25, abs=1e-6)
    assert torch.equal(seen[0], batch["states"]) and batch["t"].unique().numel() > 40
    assert batch["t"].min() >= 0 and batch["t"].max() <= 999


def test_the_network_that_the_recipe_builds_fits_its_parts(pool):
    unet = MAIN.model(pool)
    assert 1e6 < sum(p.numel() for p in unet.parameters()) < 3e6
    pipe = recipe.assemble(pool.clip, pool.vae, unet)
    drawn = pipe("a red house", steps=2, guidance_scale=2.0, seed=0, truncate=True)
    assert drawn.shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_the_assembled_folder_opens_here_and_in_stock(pool, tiny, tmp_path):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    pipe = recipe.assemble(pool.clip, pool.vae, tiny)
    pipe.save_pretrained(tmp_path)
    ours = StableDiffusion.from_pretrained(tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    asked = {"prompt": "a red house", "guidance_scale": 3.0, "latents": latents}
    mine = ours(**asked, steps=4)
    stock = theirs(**asked, num_inference_steps=4, output_type="pt").images
    torch.testing.assert_close(mine, stock.float(), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_the_exam_marks_drawings_and_the_ceiling(pool, tiny, monkeypatch):
    monkeypatch.setattr(recipe, "STEPS", 2)
    asked = [p for p in prompts() if not p.held_out][:30]
    found = recipe.exam(recipe.assemble(pool.clip, pool.vae, tiny), asked)
    ceiling = found["kind, true pictures, folded"]["value"]
    assert ceiling > 0.9 > found["kind"]["value"]
    distances = [v for k, v in found.items() if k.startswith("Fréchet")]
    assert distances[0] > 5 * distances[1]


@pytest.mark.slow
def test_the_recipe_runs_on_a_readers_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "WIDTHS", (16, 16))
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i in range(22):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f'{{"file_name": "{i}.png", "text": "picture {i}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    small = replace(MAIN, sample=None)
    result = train(
        small, tmp_path / "run", data=folder, steps=2, batch_size=4, quiet=True, device="cpu"
    )
    score = checkpoints.read_card(result.final)["score"]
    assert list(score) == ["squared error of the noise, pictures kept apart"]
    assert UNet.from_pretrained(result.final).config.sample_size == 8
