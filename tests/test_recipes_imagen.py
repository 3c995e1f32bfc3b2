"""Imagen's recipes: what a step sees and compares, and the system that they make."""

import pytest
import torch
from torch.nn import functional as F

from companion.imagen import laid_over
from companion.preparation import scaled
from companion.prompts import prompts
from companion.recipes import RECIPES
from companion.recipes import imagen as recipe
from companion.recipes.imagen import Read
from companion.schedule import Schedule
from companion.storybook import is_held_out, render
from companion.train import draw

BASE, UPSAMPLER = RECIPES["imagen"], RECIPES["imagen-upsampler"]


@pytest.fixture(scope="module", autouse=True)
def weights(tiny_weights):
    """A tiny CLIP in place of the shipped one."""
    return tiny_weights


@pytest.fixture(scope="module")
def read() -> Read:
    return Read(scenes=128)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def abar(t):
    """The cosine's, from its formula (Nichol and Dhariwal 2021, eq. 17), betas cut at 0.999."""
    f = (
        torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2)
        ** 2
    )
    return torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)[t].view(-1, 1, 1, 1)


# --- the U-Nets -----------------------------------------------------------------------------------


def test_pictures_and_captions_belong_together_and_some_captions_are_left_out(read):
    nothing = read.read([""])
    left_out = 0
    for k in range(4):
        batch = read.batch(torch.arange(64), gen(k))
        left_out += sum(torch.allclose(x, nothing.pooled[0], atol=1e-5) for x in batch["pooled"])
    assert 8 <= left_out <= 48, "about one in ten of 256"
    group = read.group(0)
    large = render(group.about, 64)
    assert (batch["large"] / 2 + 0.5 - large).abs().max() < 0.003
    assert (batch["small"] / 2 + 0.5 - F.avg_pool2d(large, 4)).abs().max() < 0.003
    assert not any(map(is_held_out, group.about))


def test_what_the_base_is_told_and_compared_with(read):
    batch = draw(BASE, read, 1)

    def model(x, t, states, pooled, mask):
        wanted = abar(t).sqrt() * batch["x0"] + (1 - abar(t)).sqrt() * batch["noise"]
        torch.testing.assert_close(x.double(), wanted, rtol=1e-4, atol=1e-4)
        count = mask.sum(1, keepdim=True)
        torch.testing.assert_close((states * mask[..., None]).sum(1) / count, pooled)
        return batch["noise"] + 0.5

    assert BASE.loss(model, batch, None)[0].item() == pytest.approx(0.25, abs=1e-6)
    assert batch["x0"].shape == (64, 3, 16, 16)


def test_what_the_upsampler_is_told_and_compared_with(read, monkeypatch):
    monkeypatch.setattr(recipe, "MOST", 1)  # so the small picture is as good as clean
    batch = draw(UPSAMPLER, read, 2)
    assert batch["x0"].shape == batch["below"].shape == (32, 3, 32, 32)
    # a large crop made small again lies under the noisy one, where it belongs
    small = F.avg_pool2d(batch["x0"], 4)
    again = F.avg_pool2d(batch["below"], 4)
    assert (small - again).abs().mean() < 0.05
    monkeypatch.undo()
    batch = draw(UPSAMPLER, read, 2)
    assert batch["level"].max() > 300 and batch["level"].max() < 500

    def model(x, t, states, level, mask):
        wanted = abar(t).sqrt() * batch["x0"] + (1 - abar(t)).sqrt() * batch["noise"]
        torch.testing.assert_close(x[:, :3].double(), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(x[:, 3:], batch["below"]) and torch.equal(level, batch["level"])
        velocity = abar(t).sqrt() * batch["noise"] - (1 - abar(t)).sqrt() * batch["x0"]
        return velocity - 0.5

    assert UPSAMPLER.loss(model, batch, None)[0].item() == pytest.approx(0.25, abs=1e-6)


def test_the_networks_make_a_system(read):
    base, upsampler = BASE.model(read), UPSAMPLER.model(read)
    pipe = recipe.assemble(read, base.eval(), upsampler.eval())
    drawn = pipe("a red house", steps=(2, 2), seed=0, truncate=True)
    assert drawn.shape == (1, 3, 64, 64)
    assert 1e6 < sum(p.numel() for p in base.parameters()) < 4e6
    assert sum(p.numel() for p in upsampler.parameters()) < 1.5e6


def test_the_base_alone_draws_what_the_system_draws_first(read):
    torch.manual_seed(3)
    base = BASE.model(read).eval()
    torch.nn.init.normal_(base.conv_out.weight, std=0.05)
    small = recipe.draw_small(base, read, ["a red house by the sea"], gen(4), scale=3.0)
    seen = []
    pipe = recipe.assemble(read, base, UPSAMPLER.model(read).eval())
    pipe(
        "a red house by the sea", steps=(25, 1), guidance_scale=3.0, percentile=0.95,
        generator=gen(4), callback=lambda i, t, x, x0: seen.append(x0),
    )  # fmt: skip
    torch.testing.assert_close(small, (seen[24].clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-5)


def test_enlarging_lays_noise_over_the_small_picture(read):
    small = scaled(render(read.group(0).about[:2], 64), (16, 16)).clamp(0, 1)
    pipe = recipe.assemble(read, BASE.model(read).eval(), UPSAMPLER.model(read).eval())
    noise = torch.randn(2, 3, 16, 16, generator=gen(1))
    clean = laid_over(pipe.super_res_scheduler, 2 * small - 1, noise, 0, (64, 64))
    noisy = laid_over(pipe.super_res_scheduler, 2 * small - 1, noise, 400, (64, 64))
    torch.testing.assert_close(clean, scaled(2 * small - 1, (64, 64)))
    level = Schedule.cosine().alphas_cumprod[400]
    wanted = scaled((level.sqrt() * (2 * small - 1) + (1 - level).sqrt() * noise).float(), (64, 64))
    torch.testing.assert_close(noisy, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_scores_are_marks_and_distances(read, monkeypatch):
    monkeypatch.setattr(recipe, "STEPS", 2)
    asked = [p for p in prompts() if not p.held_out][:30]
    found = recipe.exam(BASE.model(read).eval(), read, asked)
    assert found["kind, true pictures"]["value"] > 0.9 > found["kind"]["value"]
    assert found["Fréchet distance of 30 from the true ones"] > 1
