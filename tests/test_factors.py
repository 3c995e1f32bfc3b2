"""Chapter 11's comparison of autoencoders: its parts by hand, and the whole at tiny effort."""

import math
import time

import pytest
import torch
from torch import nn

from companion import data, factors
from companion.attention import PictureAttention
from companion.autoencoder import Posterior
from companion.factors import CodebookAutoencoder, Plan
from companion.recipes import autoencoder as recipe
from companion.storybook import Scene, render


@pytest.fixture(scope="module")
def pictures() -> recipe.Pictures:
    drawn = recipe.Pictures(n=32)
    drawn[torch.arange(32)]
    return drawn


def small(codes: int = 8) -> CodebookAutoencoder:
    torch.manual_seed(0)
    return CodebookAutoencoder(recipe.config((4, 4, 8)), codes)


@pytest.mark.parametrize("plan", factors.PLANS, ids=lambda plan: plan.name)
def test_each_plan_has_the_latent_that_it_says(plan):
    before = torch.random.get_rng_state()
    model = factors.fresh(plan).requires_grad_(False)
    assert torch.equal(torch.random.get_rng_state(), before)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    said = model.encode(x)
    assert said.mean.shape == (2, *plan.latent) and model.factor == plan.factor
    assert model(x).shape == x.shape
    again = factors.fresh(plan).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())


def test_factors_that_do_not_fit_are_refused():
    for factor in (1, 3, 32):
        with pytest.raises(ValueError, match=f"factor is {factor}; expected 2, 4, 8 or 16"):
            factors.fresh(Plan(factor, 4))


def test_the_code_taken_is_the_nearest():
    model = small(50)
    z = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    numbers = model.nearest(z)
    for b, i, j in ((0, 0, 0), (1, 4, 2), (2, 3, 5)):
        apart = [(z[b, :, i, j] - code).norm().item() for code in model.codes]
        assert numbers[b, i, j] == apart.index(min(apart))
        assert torch.equal(model.look_up(numbers)[b, :, i, j], model.codes[numbers[b, i, j]])
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z, said = model.before(x), model.encode(x)
    assert torch.equal(said.mean, model.look_up(model.nearest(z)))
    assert said.std.max() < 1e-6 and not torch.equal(said.mean, z)


def test_codes_begin_where_the_encoder_puts_pictures():
    model = small(64)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    model.start_from(x, torch.Generator().manual_seed(4))
    z = model.before(x).permute(0, 2, 3, 1).reshape(-1, 4).detach()
    assert torch.cdist(model.codes.detach(), z).min(1).values.max() < 0.5 * z.std()
    assert len(model.codes.unique(dim=0)) == 64, "two codes fell together"


def test_the_codebooks_loss_by_hand():
    """Straight through: to the encoder, the decoder's gradient is that of the code."""
    model = small().double()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)).double() * 2 - 1
    got, parts = factors.codebook_loss(model, {"pictures": x})
    got.backward()
    z = model.before(x).detach().requires_grad_()
    code = model.look_up(model.nearest(z)).detach().requires_grad_()
    apart, _ = recipe.distance(model.decode(code), x)
    pull = (code.detach() - z.detach()).square().mean().item()
    assert got.item() == pytest.approx(apart.item() + 1.25 * pull, rel=1e-5)
    assert parts["codes"].item() == pytest.approx(pull, rel=1e-5)
    (through,) = torch.autograd.grad(apart, code)
    wanted = through + 0.25 * 2 * (z - code).detach() / z.numel()
    model.zero_grad(set_to_none=False)
    codes_before = model.codes.detach().clone()
    model.before(x).backward(wanted)
    by_hand = [p.grad.clone() for p in model.encoder.parameters()]
    model.zero_grad(set_to_none=False)
    factors.codebook_loss(model, {"pictures": x})[0].backward()
    for one, other in zip(by_hand, model.encoder.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-9, atol=1e-12)
    numbers = model.nearest(model.before(x).detach())
    for k in range(8):  # a code moves towards the mean of what chose it, and nothing else
        mine = (z.permute(0, 2, 3, 1)[numbers == k] - codes_before[k]).detach()
        torch.testing.assert_close(
            model.codes.grad[k], -2 * mine.sum(0) / z.numel(), rtol=1e-9, atol=1e-12
        )


def test_multiply_adds_of_known_layers():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 2)

        def forward(self, x):
            return self.linear(self.conv(x))

    x = torch.zeros(1, 3, 4, 7)
    assert factors.multiply_adds(Layers(), x) == 3 * 5 * 9 * 4 * 7 + 5 * 4 * 7 * 2
    assert factors.multiply_adds(Layers(), x.repeat(3, 1, 1, 1)) == 3 * (3780 + 280)
    # Attention: four projections of each place, then every place with every place, twice.
    look = PictureAttention(16, heads=1, groups=4, eps=1e-6)
    x = torch.zeros(1, 16, 6, 6)
    assert factors.multiply_adds(look, x) == 4 * 36 * 16 * 16 + 2 * 36 * 36 * 16


@pytest.mark.parametrize("plan", [Plan(16, 1), Plan(8, 2, 16)], ids=lambda plan: plan.name)
def test_training_stops_when_its_seconds_are_spent_and_looks_on_the_way(plan, pictures):
    look = pictures.fresh(2)[0]
    started = time.process_time()
    model, curve = factors.trained(plan, pictures, look, 1.2, looks=2)
    assert time.process_time() - started > 1.2
    assert all(point["seconds"] >= due for point, due in zip(curve, (0.6, 1.2), strict=True))
    assert 0 < curve[0]["pictures"] <= curve[1]["pictures"] and curve[1]["pictures"] % 16 == 0
    again = recipe.psnr(recipe.round_trip(model, look), look).mean().item()
    assert curve[-1]["psnr"] == pytest.approx(again)
    start = factors.fresh(plan).state_dict()
    assert any(not torch.equal(x, start[name]) for name, x in model.state_dict().items())


def test_training_makes_it_better(pictures):
    look = pictures[torch.arange(8)]
    untrained = recipe.psnr(recipe.round_trip(factors.fresh(Plan(16, 16)), look), look).mean()
    _, curve = factors.trained(Plan(16, 16), pictures, look, 6.0, looks=1)
    assert curve[0]["psnr"] > untrained + 2


def test_the_cloud_of_a_known_encoder():
    """A picture's first four pixel blocks as latents, with a noise and a decoder that are known."""

    class Known:
        def encode(self, x):
            mean = torch.stack([(c + 1) * x[:, 0, ::8, ::8] for c in range(4)], 1)  # (B, 4, 8, 8)
            return Posterior(mean, torch.full_like(mean, 2 * math.log(0.5)))

        def decode(self, z):
            return z[:, :1].repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)

    g = torch.Generator().manual_seed(8)
    blocks = torch.rand(60, 1, 8, 8, generator=g).repeat_interleave(8, 2).repeat_interleave(8, 3)
    x = 0.3 + 0.4 * blocks.expand(-1, 3, -1, -1)
    found = factors.cloud(Known(), x, off=0.05)
    std = 2 * 0.4 / math.sqrt(12)  # of a uniform number, in [-1, 1]
    assert found["std"] == pytest.approx([std * (c + 1) for c in range(4)], rel=0.03)
    assert found["noise"] == pytest.approx([0.5] * 4)
    square = torch.tensor([(std * (c + 1)) ** 2 for c in range(4)]).mean().item()  # means are 0
    nats = 0.5 * (square + 0.25 - 1 - math.log(0.25))
    assert found["nats"] == pytest.approx(nats, rel=0.05)
    assert found["psnr"]["value"] == pytest.approx(120)  # there and back without a loss
    error = 0.05 * math.sqrt(square) / 2  # in [0, 1]
    assert found["psnr off"]["value"] == pytest.approx(-20 * math.log10(error), abs=0.2)


def test_bells_have_the_moments_of_what_they_are_fitted_to():
    g = torch.Generator().manual_seed(9)
    mixing = torch.randn(16, 16, generator=g)
    z = (3 + torch.randn(4000, 16, generator=g) @ mixing).view(-1, 4, 2, 2)
    z[:, 2] *= 5
    plain, apart, whole = factors.bells(z, 20_000, torch.Generator().manual_seed(10)).values()
    assert plain.shape == apart.shape == whole.shape == (20_000, 4, 2, 2)
    assert abs(plain.mean()) < 0.01 and plain.std().item() == pytest.approx(1, rel=0.01)
    for c in range(4):  # a channel's own middle and width, and nothing shared between its numbers
        assert apart[:, c].mean().item() == pytest.approx(z[:, c].mean().item(), abs=0.3)
        assert apart[:, c].std().item() == pytest.approx(z[:, c].std().item(), rel=0.02)
    a, b = torch.corrcoef(apart.flatten(1).T), torch.corrcoef(whole.flatten(1).T)
    assert (a - torch.eye(16)).abs().max() < 0.04
    torch.testing.assert_close(b, torch.corrcoef(z.flatten(1).T), rtol=0, atol=0.04)
    torch.testing.assert_close(whole.mean(0), z.mean(0), rtol=0, atol=0.6)
    torch.testing.assert_close(whole.std(0), z.std(0), rtol=0.03, atol=0)


def test_squared_error_is_ten_times_the_mean_square_and_nothing_else():
    g = torch.Generator().manual_seed(11)
    x, y = torch.rand(2, 2, 3, 8, 8, generator=g)
    value, parts = factors.squared(y, x)
    assert value.item() == pytest.approx(10 * ((y - x) ** 2).mean().item())
    assert set(parts) == set(recipe.distance(y, x)[1])


def test_what_an_autoencoder_that_loses_only_specks_loses():
    """It returns scenes without their specks, and off by 0.01 in one pixel elsewhere."""
    scenes = [Scene("night", "sea", seed=k) for k in range(3)] + [Scene("noon", "desert")]
    bare = data.to_signed(render(scenes, 64, specks=False))
    off = (render(scenes, 64) - render(scenes, 64, specks=False)).abs().amax(1)
    assert (off[:, 63, 0] == 0).all()

    def loses(x):
        y = bare[: len(x)].clone()
        y[:, :, 63, 0] += 0.02  # of a range of two
        return y

    found = factors.by_specks(loses, scenes)
    rest = 10 * math.log10(64 * 64 / 0.01**2)
    assert found["psnr without specks"]["value"] == pytest.approx(rest, abs=0.05)
    assert found["pixels of specks"] == pytest.approx((off > 0.02).float().mean().item())
    squares = (render(scenes, 64) - render(scenes, 64, specks=False)).square().mean(1)
    inside = squares[off > 0.02].sum().item()
    whole = squares.sum().item() + 4 * 0.01**2
    assert found["error in specks"] == pytest.approx(inside / whole, rel=1e-3)
    assert found["psnr"]["value"] < rest - 30


def test_teaching_on_leaves_the_original_and_ends_at_rest(pictures):
    torch.manual_seed(0)
    model = recipe.build(recipe.config((8, 8, 16, 16)))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    look = pictures.fresh(4)[0]
    taught, curve = factors.taught_on(model, pictures, look, 40, factors.squared, looks=4)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [point["pictures"] for point in curve] == [0, 160, 320, 480, 640]
    first = recipe.psnr(recipe.round_trip(model, look), look).mean().item()
    last = recipe.psnr(recipe.round_trip(taught, look), look).mean().item()
    assert curve[0]["psnr"] == pytest.approx(first) and curve[-1]["psnr"] == pytest.approx(last)
    assert last > first + 1


@pytest.mark.slow
def test_teaching_on_at_tiny_effort():
    found = factors.autoencoder_longer(steps=6, n=20, scenes=32)
    assert list(found["rows"]) == ["as shipped", *factors.LOSSES]
    for name in factors.LOSSES:
        assert len(found["curves"][name]) == 7 and found["rows"][name]["psnr"]["n"] == 20
        assert found["rows"][name]["facts"]["value"] > 0.9
    shipped = found["rows"]["as shipped"]
    assert shipped["psnr without specks"]["value"] > shipped["psnr"]["value"]


@pytest.mark.slow
def test_weights_of_kl_at_tiny_effort():
    found = factors.kl_weights((0.0, 100.0), seconds=0.3, n=20, scenes=32)
    assert [row["kl_weight"] for row in found["rows"]] == [0.0, 100.0]
    for row in found["rows"]:
        assert list(row["scenes"]) == list(factors.BELLS)
        assert all(cell["n"] == 20 for cell in row["scenes"].values())
        assert row["psnr"]["n"] == 20 and row["spread"] > 0 and row["pictures"] % 16 == 0
    assert found["ceiling"]["facts"]["value"] > 0.98


@pytest.mark.slow
def test_the_whole_comparison_at_tiny_effort():
    plans = (Plan(2, 1), Plan(8, 4, 16))
    found = factors.autoencoders(plans, prices=(0.0, 1.0), seconds=0.2, n=20, scenes=16)
    assert [row["kl_weight"] for row in found["prices"]] == [0.0, 1.0]
    assert [row["numbers"] for row in found["rows"]] == [32 * 32, 8 * 8 * 4]
    assert [row["name"] for row in found["rows"]] == ["f = 2, c = 1, KL", "f = 8, c = 4, VQ 16"]
    assert 1 <= found["rows"][1]["codes used"] <= 16 and "codes used" not in found["rows"][0]
    assert found["ceiling"]["facts"]["value"] > 0.98
    for row in found["rows"]:
        assert row["psnr"]["n"] == 20 and len(row["curve"]) == 6
        assert row["multiply_adds"] > 1e6
