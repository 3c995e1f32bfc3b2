"""Muon against singular values, and AdamW against torch's."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from companion.checkpoints import load_state
from companion.muon import Muon, orthogonal
from companion.recipes import RECIPES
from companion.recipes import autoencoder as recipe
from companion.train import _optimiser, train


@pytest.mark.parametrize("shape", [(16, 16), (16, 144), (96, 30)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_all_directions_get_about_the_same_length(shape, scale):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = torch.logspace(0, -2, len(s), dtype=torch.float64)  # from 1 to 0.01
    y = orthogonal(scale * (u * s) @ vt)
    inside = u.T @ y @ vt.T  # diagonal: the directions are kept
    assert 0.6 < inside.diagonal().min() and inside.diagonal().max() < 1.3
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-6
    assert y.shape == shape


def steps(optimiser, model, n=6):
    g = torch.Generator().manual_seed(1)
    for _ in range(n):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimiser.step()
    return [p.detach().clone() for p in model.parameters()]


def test_what_is_small_or_no_matrix_is_adamws():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(15, 40), nn.GroupNorm(2, 40), nn.Conv2d(4, 8, 3))

    a, b = model(), model()
    ours = Muon(a.parameters(), lr=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    theirs = torch.optim.AdamW(b.parameters(), lr=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    for x, y in zip(steps(ours, a), steps(theirs, b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_a_matrix_moves_as_with_torchs_muon(shape):
    a, b = nn.Linear(*shape, bias=False), nn.Linear(*shape, bias=False)
    b.load_state_dict(a.state_dict())
    ours = Muon(a.parameters(), lr=0.01, weight_decay=0.1, dtype=torch.bfloat16)
    theirs = torch.optim.Muon(
        b.parameters(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    start = a.weight.detach().clone()
    (x,), (y,) = steps(ours, a, 3), steps(theirs, b, 3)
    moved = (y - start).norm()
    assert (x - y).norm() < 0.03 * moved  # theirs counts in bfloat16 in another order
    assert moved == pytest.approx(0.01 * 0.2 * 3 * y.numel() ** 0.5, rel=0.6)


def test_a_kernel_is_a_matrix_of_its_outputs():
    conv, flat = nn.Conv2d(8, 20, 3, bias=False), nn.Linear(72, 20, bias=False)
    flat.weight.data.copy_(conv.weight.detach().flatten(1))
    conv.to(memory_format=torch.channels_last)
    steps(Muon(conv.parameters(), lr=0.1), conv, 1)
    g = torch.Generator().manual_seed(1)
    flat.weight.grad = torch.randn(20, 8, 3, 3, generator=g).flatten(1)
    Muon(flat.parameters(), lr=0.1).step()
    torch.testing.assert_close(conv.weight.flatten(1), flat.weight)


def test_a_weight_without_a_gradient_stays():
    layer = nn.Linear(20, 20)
    before = layer.weight.detach().clone()
    layer.bias.grad = torch.ones(20)
    Muon(layer.parameters(), lr=0.1, weight_decay=0.5).step()
    assert torch.equal(layer.weight, before)


def test_the_recipe_that_asks_for_it_gets_it():
    model = nn.Linear(20, 20)
    made = _optimiser(RECIPES["autoencoder"], model, "bf16")
    assert isinstance(made, Muon) and made.dtype == torch.bfloat16
    assert made.param_groups[0]["lr"] == RECIPES["autoencoder"].learning_rate
    assert isinstance(_optimiser(RECIPES["judge"], model), torch.optim.AdamW)


def test_a_resumed_run_goes_on_with_its_momentum(tmp_path):
    small = replace(
        RECIPES["autoencoder"],
        data=lambda folder: recipe.Pictures(n=8),
        model=lambda pictures: recipe.build(recipe.config((16, 16))),
        batch=partial(recipe.batch, latent=(4, 32, 32)),
        decay="constant",
        **dict(batch_size=2, finish=None, score=None, sample=None, needs=()),
    )
    go = partial(train, small, quiet=True, device="cpu", precision="bf16")
    go(tmp_path / "a", steps=2)
    go(tmp_path / "a", steps=4, resume=True)
    go(tmp_path / "b", steps=4)
    a, b = (load_state(tmp_path / name / "state.safetensors") for name in "ab")
    assert a.keys() == b.keys() and any("momentum" in name for name in a)
    assert all(torch.equal(x, b[name]) for name, x in a.items())
    other = replace(small, optimiser="adamw")
    with pytest.raises(ValueError, match="optimiser"):
        train(other, tmp_path / "b", steps=4, resume=True, quiet=True, precision="bf16")
