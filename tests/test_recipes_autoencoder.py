"""The autoencoder's recipe, and the weights that it made."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

from companion import checkpoints, data
from companion.autoencoder import Autoencoder, Posterior
from companion.recipes import RECIPES
from companion.recipes import autoencoder as recipe
from companion.storybook import is_held_out, render, sample
from companion.train import draw, train

SHIPPED = checkpoints.WEIGHTS / "autoencoder"
MAIN = RECIPES["autoencoder"]


def tiny(seed: int = 0, channels: int = 4) -> Autoencoder:
    torch.manual_seed(seed)
    return recipe.build(recipe.config((4, 4, 8, 8), channels)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shipped() -> Autoencoder:
    return Autoencoder.from_pretrained(SHIPPED).requires_grad_(False)


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, list]:
    """Sixty scenes from a seed that neither training nor the card's score has."""
    chosen = sample(60, torch.Generator().manual_seed(77))
    return render(chosen), chosen


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, 0.01, -0.02])
@pytest.mark.parametrize("offset", [0.0, 0.3, -0.1])
def test_distance_of_ramps_is_known(slope, offset):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ramp = offset + slope * torch.arange(7, dtype=torch.float64).expand(2, 3, 5, 7)
    ramp = ramp + 3 * slope * torch.arange(5, dtype=torch.float64)[:, None]
    got, parts = recipe.distance(x + ramp, x)
    errors = [offset + slope * (i + 3 * j) for i in range(7) for j in range(5)]
    l1, mse = np.abs(errors).mean(), np.square(errors).mean()
    assert parts["edges"].item() == pytest.approx(4 * abs(slope), abs=1e-12)  # 1 across, 3 down
    assert parts["l1"].item() == pytest.approx(l1) and parts["mse"].item() == pytest.approx(mse)
    assert got.item() == pytest.approx(l1 + 2 * mse + 2 * abs(slope))


@pytest.mark.parametrize("kl_weight", [0.0, 1e-4, 0.5])
def test_the_loss_decodes_a_drawn_latent_and_weighs_kl_for_each_value(kl_weight):
    g = torch.Generator().manual_seed(1)
    mean, log_variance, noise = torch.randn(3, 2, 4, 8, 8, generator=g).unbind()
    mean, log_variance, noise = (x[None].repeat(2, 1, 1, 1) for x in (mean[0], log_variance[0],
                                                                     noise[0]))  # fmt: skip
    x = torch.rand(2, 3, 64, 64, generator=g) * 2 - 1
    seen = []

    def decode(z):
        seen.append(z)
        return x + 0.25

    model = SimpleNamespace(encode=lambda x: Posterior(mean, log_variance), decode=decode)
    got, said = recipe.loss(model, {"pictures": x, "noise": noise}, kl_weight)
    torch.testing.assert_close(seen[0], mean + (log_variance / 2).exp() * noise)
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean().item()
    assert said["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert got.item() == pytest.approx(0.25 + 2 * 0.25**2 + kl_weight * kl, rel=1e-4)


def test_the_gradient_reaches_encoder_and_decoder():
    model = recipe.build(recipe.config((4, 4, 8, 8)))
    batch = draw(replace(MAIN, batch_size=2), recipe.Pictures(n=4), 0)
    recipe.loss(model, batch)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # A key's bias adds the same to every score of a query, so softmax does not see it.
    still = [n for n, p in model.named_parameters() if not p.grad.any() and "to_k.bias" not in n]
    assert not still


def test_a_fresh_network_is_sure_of_its_latents():
    model = recipe.build(MAIN.model(None).config).requires_grad_(False)
    said = model.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert said.mean.shape == (2, 4, 8, 8) and model.factor == 8
    assert 0.02 < said.std.min() and said.std.max() < 0.15  # 0.05, as the bias says, and a little


def test_psnr_and_the_interval_of_a_mean_are_the_closed_forms():
    x = torch.full((3, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    assert recipe.psnr(y, x).tolist() == pytest.approx([20.0, 40.0, 120.0], abs=1e-3)
    found = recipe.mean_interval(torch.arange(101.0))
    assert found["value"] == 50 and found["n"] == 101
    half = 1.96 * math.sqrt(101 * 102 / 12) / math.sqrt(101)
    assert found["high"] - 50 == pytest.approx(half) == 50 - found["low"]


# --- the pictures ---------------------------------------------------------------------------------


def test_nothing_held_out_is_trained_on():
    pictures = recipe.Pictures(n=2000)
    chosen = [pictures.scene(i) for i in range(2000)]
    assert not any(is_held_out(scene) for scene in chosen)
    assert any(is_held_out(scene) for scene in sample(2000, torch.Generator(), held_out=None))
    assert len(set(chosen)) == 2000, "scenes are repeated"
    assert not set(chosen) & set(sample(1000, torch.Generator().manual_seed(recipe.FRESH)))


def test_pictures_are_the_scenes_of_their_numbers_whatever_was_asked_before():
    a, b = recipe.Pictures(n=40), recipe.Pictures(n=40)
    numbers = torch.tensor([7, 3, 7, 39])
    a[torch.arange(10)]
    assert torch.equal(a[numbers], b[numbers])
    drawn = render([a.scene(i) for i in numbers.tolist()])
    torch.testing.assert_close(a[numbers], drawn, rtol=0, atol=0.5 / 255 + 1e-6)
    assert len(a) == 40


def test_a_batch_mirrors_about_half_and_repeats_itself():
    pictures = recipe.Pictures(n=64)
    indices = torch.arange(64)
    batch = recipe.batch(indices, torch.Generator().manual_seed(3), pictures)
    again = recipe.batch(indices, torch.Generator().manual_seed(3), pictures)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    plain = 2 * pictures[recipe.pick(indices, 64)] - 1
    same = [torch.equal(x, y) for x, y in zip(batch["pictures"], plain, strict=True)]
    other = [torch.equal(x, y.flip(2)) for x, y in zip(batch["pictures"], plain, strict=True)]
    assert all(s or o for s, o in zip(same, other, strict=True)) and 18 < sum(other) < 46
    assert batch["noise"].shape == (64, 4, 8, 8) and abs(batch["noise"].std() - 1) < 0.02


@pytest.fixture
def folder(tmp_path):
    for i in range(23):
        pixels = np.random.default_rng(i).integers(0, 256, (1, 1, 3), dtype=np.uint8)
        Image.fromarray(pixels.repeat(90, 0).repeat(70, 1)).save(tmp_path / f"{i:02}.png")
    return tmp_path


def test_of_a_readers_folder_every_tenth_picture_is_kept_for_the_score(folder):
    pictures = recipe.Pictures(folder)
    kept, scenes = pictures.fresh(100)
    assert len(kept) == 2 and len(pictures) == 21 and scenes == []
    seen = pictures[torch.arange(21)].flatten(1)
    assert seen.shape == (21, 3 * 64 * 64)
    assert torch.cdist(kept.flatten(1), seen).min() > 1
    (folder / "only").mkdir()
    (folder / "00.png").rename(folder / "only" / "00.png")
    one = recipe.Pictures(folder / "only")
    assert len(one) == 1 and len(one.fresh(5)[0]) == 1


@pytest.mark.slow
def test_the_recipe_runs_on_a_readers_folder(folder, tmp_path):
    small = replace(MAIN, model=lambda pictures: recipe.build(recipe.config((4, 4, 8, 8))))
    out = tmp_path / "run"
    result = train(small, out, data=folder, steps=2, batch_size=4, quiet=True, device="cpu")
    model = Autoencoder.from_pretrained(result.final)
    score = checkpoints.read_card(result.final)["score"]
    assert score["PSNR in dB, fresh pictures"]["n"] == 2
    assert not any("judge" in name for name in score)
    assert model.config.scaling_factor == score["scaling factor"] != 1.0


# --- the scale ------------------------------------------------------------------------------------


def test_the_scale_makes_latents_of_unit_variance():
    model, pictures = tiny(), recipe.Pictures(n=30)
    scale = recipe.set_scale(model, pictures)
    assert scale == model.config.scaling_factor
    z = model.encode(2 * pictures[torch.arange(30)] - 1).sample(torch.Generator().manual_seed(5))
    assert (scale * z).std().item() == pytest.approx(1, abs=0.02)


def test_the_shipped_scale_makes_fresh_latents_of_unit_variance(shipped, scenes):
    z = shipped.encode(data.to_signed(scenes[0])).sample(torch.Generator().manual_seed(6))
    scaled = shipped.config.scaling_factor * z
    assert scaled.std().item() == pytest.approx(1, abs=0.03)
    # One number for all channels leaves each near one, as diffusion wants them.
    assert all(0.5 < channel.std() < 1.6 for channel in scaled.unbind(1))


# --- the shipped weights --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_weights_are_stocks_too(shipped, scenes):
    from reference.oracle import stock

    theirs = stock().AutoencoderKL.from_pretrained(SHIPPED).double().eval().requires_grad_(False)
    ours = Autoencoder.from_pretrained(SHIPPED, dtype=torch.float64).requires_grad_(False)
    x = data.to_signed(scenes[0][:4]).double()
    said, theirs_said = ours.encode(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(said.mean, theirs_said.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(said.std, theirs_said.std, rtol=0, atol=1e-9)
    z = said.mean + 0.1
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=0, atol=1e-9)
    assert theirs.config.scaling_factor == ours.config.scaling_factor


def test_round_trips_keep_what_matters(shipped, scenes):
    x, chosen = scenes
    back = recipe.round_trip(shipped, x)
    card = checkpoints.read_card(SHIPPED)["score"]
    aim = card["PSNR in dB, fresh pictures"]
    found = recipe.mean_interval(recipe.psnr(back, x))
    assert found["low"] < aim["high"] and found["high"] > aim["low"]
    assert found["value"] > PSNR
    assert recipe.facts_right(x, chosen)["facts"]["value"] > 0.995, "the judge itself"
    assert recipe.facts_right(back, chosen)["facts"]["value"] > 0.97


PSNR = 28  # dB: the least that is shipped


def test_latents_are_smooth_enough_to_be_noised_a_little(shipped, scenes):
    """A diffusion model's latents are never exact: small errors must cost little."""
    x = scenes[0][:20]
    z = recipe.means(shipped, x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))
    off = z + 0.05 / shipped.config.scaling_factor * noise
    assert recipe.psnr(data.to_unit(shipped.decode(off)), x).mean() > PSNR - 3


def test_the_card_says_what_was_seen(shipped):
    card = checkpoints.read_card(SHIPPED)
    assert card["recipe"] == "autoencoder" and card["pictures"] == card["steps"] * 16
    assert str(recipe.SCENES) in card["data"] and card["precision"] in ("fp32", "bf16")
    assert card["parameters"] < 2.5e6 and card["dtype"] == "float16"
    score = card["score"]
    assert score["scaling factor"] == shipped.config.scaling_factor
    spread = score["standard deviation of latents, unscaled"]
    noise = score["of which the encoder's own noise"]
    assert math.hypot(spread, noise) * shipped.config.scaling_factor == pytest.approx(1, abs=0.02)
