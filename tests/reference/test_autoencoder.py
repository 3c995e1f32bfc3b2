"""The autoencoder equals diffusers' AutoencoderKL, numbers, draws and gradients."""

import random

import pytest
import torch

from companion.autoencoder import Autoencoder, AutoencoderConfig
from reference.oracle import agree, distance, noise, pair


def draw(seed: int) -> tuple[dict, tuple[int, int]]:
    r = random.Random(seed)
    levels = r.choice([1, 2, 3, 4])
    groups = r.choice([2, 4])
    config = {
        "in_channels": r.choice([3, 1]),
        "out_channels": 3,
        "block_out_channels": tuple(groups * r.choice([2, 3, 4]) for _ in range(levels)),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": r.choice([1, 2]),
        "latent_channels": r.choice([4, 3]),
        "norm_num_groups": groups,
    }
    return config, (r.choice([16, 17, 22]), r.choice([16, 19]))


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_stock(stock, seed):
    config, size = draw(seed)
    ours, theirs = pair(
        Autoencoder(AutoencoderConfig(**config)), stock.AutoencoderKL(**config), seed
    )

    def run_ours(x):
        p = ours.encode(x)
        z = p.sample(torch.Generator().manual_seed(3))
        return p.mean, p.std, z, ours.decode(z), p.kl()

    def run_theirs(x):
        p = theirs.encode(x).latent_dist
        z = p.sample(torch.Generator().manual_seed(3))
        return p.mean, p.std, z, theirs.decode(z).sample, p.kl()

    agree(ours, theirs, run_ours, run_theirs, {"x": noise(seed, 2, config["in_channels"], *size)})


def test_there_and_back(stock):
    config, size = draw(1)
    config["in_channels"] = 3
    ours, theirs = pair(Autoencoder(AutoencoderConfig(**config)), stock.AutoencoderKL(**config), 9)
    x = noise(4, 2, 3, *size)
    assert distance(ours(x), theirs(x).sample) < 1e-9


def test_extreme_variances_are_clamped(stock):
    config, size = draw(0)
    ours, theirs = pair(Autoencoder(AutoencoderConfig(**config)), stock.AutoencoderKL(**config), 2)
    for model in (ours, theirs):
        model.quant_conv.bias.data[config["latent_channels"] :] += 50
    x = noise(4, 2, config["in_channels"], *size)
    a, b = ours.encode(x), theirs.encode(x).latent_dist
    assert torch.equal(a.log_variance, b.logvar) and a.log_variance.max() == 20
