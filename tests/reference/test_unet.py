"""Stable Diffusion's U-Net equals diffusers' UNet2DConditionModel, numbers and gradients."""

import dataclasses
import inspect
import random

import pytest
import torch

from companion.unet import UNet, UNetConfig
from reference.oracle import agree, noise, pair, randomise


def draw(seed: int) -> tuple[dict, tuple[int, int], int]:
    """A random small configuration, a size (odd ones too) and a number of tokens."""
    r = random.Random(seed)
    levels = r.choice([2, 3, 4])
    groups = r.choice([2, 4])
    cross = [r.random() < 0.7 for _ in range(levels)]
    heads = [r.choice([1, 2, 4]) for _ in range(levels)]
    config = {
        "in_channels": r.choice([4, 9, 3]),
        "out_channels": r.choice([4, 3]),
        "block_out_channels": tuple(groups * r.choice([2, 4, 6]) * 2 for _ in range(levels)),
        "down_block_types": tuple("CrossAttnDownBlock2D" if x else "DownBlock2D" for x in cross),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if r.random() < 0.7 else "UpBlock2D" for _ in range(levels)
        ),
        "layers_per_block": r.choice([1, 2]),
        "cross_attention_dim": r.choice([6, 10]),
        "attention_head_dim": tuple(heads) if r.random() < 0.5 else heads[0],
        "norm_num_groups": groups,
        "norm_eps": r.choice([1e-5, 1e-3]),
    }
    size = (r.choice([8, 9, 11, 16]), r.choice([8, 13, 16]))
    return config, size, r.choice([2, 5, 9])


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_stock(stock, seed):
    config, size, tokens = draw(seed)
    ours = UNet(UNetConfig(**config))
    ours, theirs = pair(ours, stock.UNet2DConditionModel(**config), seed)
    t = torch.tensor([1.0, 999.0, 37.5]) if seed % 2 else torch.tensor([1, 999, 370])
    inputs = {
        "x": noise(seed, 3, config["in_channels"], *size),
        "context": noise(seed + 50, 3, tokens, config["cross_attention_dim"]),
    }
    agree(
        ours,
        theirs,
        lambda x, context: (ours(x, t, context),),
        lambda x, context: (theirs(x, t, context).sample,),
        inputs,
    )


def test_draws_cover_the_space():
    """The random configurations above really differ in what the equality is claimed over."""
    drawn = [draw(seed) for seed in range(8)]
    assert len({len(c["block_out_channels"]) for c, _, _ in drawn}) == 3
    assert any(n % 2 for _, size, _ in drawn for n in size)
    assert {type(c["attention_head_dim"]) for c, _, _ in drawn} == {int, tuple}
    assert any(len(set(c["block_out_channels"])) > 1 for c, _, _ in drawn)


def test_one_timestep_for_all_pictures():
    config, size, tokens = draw(0)
    model = UNet(UNetConfig(**config))
    randomise(model, 3)
    x = noise(1, 2, config["in_channels"], *size)
    context = noise(2, 2, tokens, config["cross_attention_dim"])
    torch.testing.assert_close(model(x, 7, context), model(x, torch.tensor([7, 7]), context))


def test_defaults_are_stock_defaults(stock):
    """A key that a config.json leaves out means what it means in the stock library."""
    signature = inspect.signature(stock.UNet2DConditionModel.__init__.__wrapped__)
    for f in dataclasses.fields(UNetConfig):
        assert f.default == signature.parameters[f.name].default, f.name
