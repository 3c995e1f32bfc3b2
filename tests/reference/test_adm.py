"""The pixel U-Net equals both of diffusers' classes that it stands for."""

import random

import pytest
import torch

from companion.adm import CROSS, PLAIN, SELF, ADMConfig, ADMUNet
from reference.oracle import agree, distance, noise, pair


def draw_decoder(seed: int) -> tuple[dict, tuple[int, int], int]:
    """Karlo's decoder at random: attention, ways to be told the time, kinds of vector."""
    r = random.Random(seed)
    levels = r.choice([2, 3])
    dims = [r.choice([2, 4]) for _ in range(levels)]
    kind = ["identity", "projection", "timestep", None][seed % 4]
    config = {
        "in_channels": r.choice([3, 6]),
        "out_channels": r.choice([3, 6]),
        "block_out_channels": tuple(8 * r.choice([1, 2, 3]) for _ in range(levels)),
        "down_block_types": tuple(r.choice([PLAIN[0], CROSS[0]]) for _ in range(levels)),
        "up_block_types": tuple(r.choice([PLAIN[1], CROSS[1]]) for _ in range(levels)),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "layers_per_block": r.choice([1, 2, 3]),
        "attention_head_dim": tuple(dims) if seed % 2 else dims[0],
        "cross_attention_dim": r.choice([6, 10]),
        "resnet_time_scale_shift": ["scale_shift", "default"][seed % 3 == 2],
        "class_embed_type": kind,
        "projection_class_embeddings_input_dim": 5 if kind == "projection" else None,
        "num_class_embeds": 7 if kind is None and seed % 8 == 3 else None,
        "norm_num_groups": r.choice([2, 4]),
        "norm_eps": r.choice([1e-5, 1e-3]),
    }
    step = 2 ** (levels - 1)
    return config, (step * r.choice([2, 3]), step * r.choice([2, 5])), r.choice([3, 5, 11])


def vector(config: dict, seed: int) -> torch.Tensor | None:
    width = 4 * config["block_out_channels"][0]
    if config["num_class_embeds"]:
        return torch.tensor([6, 0, 3])
    return {
        "identity": noise(seed, 3, width),
        "projection": noise(seed, 3, 5),
        "timestep": torch.tensor([3.0, 250.0, 999.0], dtype=torch.float64),
        None: None,
    }[config["class_embed_type"]]


@pytest.mark.parametrize("seed", range(8))
def test_decoder_equal_to_stock(stock, seed):
    config, size, tokens = draw_decoder(seed)
    if tokens == size[0] * size[1]:  # stock leaves its mask short there and crashes
        tokens += 1
    ours, theirs = pair(ADMUNet(ADMConfig(**config)), stock.UNet2DConditionModel(**config), seed)
    t = torch.tensor([1, 999, 370])
    mask = torch.arange(tokens)[None] < torch.tensor([[tokens], [1], [tokens - 1]])
    mask = mask if seed % 2 == 0 and not _clash(config, size, tokens) else None
    inputs = {
        "x": noise(seed, 3, config["in_channels"], *size),
        "context": noise(seed + 50, 3, tokens, config["cross_attention_dim"]),
    }
    embedding = vector(config, seed + 90)
    agree(
        ours,
        theirs,
        lambda x, context: (ours(x, t, context, embedding, mask),),
        lambda x, context: (theirs(x, t, context, embedding, attention_mask=mask).sample,),
        inputs,
    )


def _clash(config: dict, size: tuple[int, int], tokens: int) -> bool:
    """Whether the text is as long as some level has places, which stock's mask cannot survive."""
    levels = range(len(config["block_out_channels"]))
    return any((size[0] >> i) * (size[1] >> i) == tokens for i in levels)


def draw_upsampler(seed: int) -> tuple[dict, tuple[int, int]]:
    """Karlo's upsamplers at random; also with self-attention, and with labels."""
    r = random.Random(100 + seed)
    levels = r.choice([2, 3, 4])
    attend = seed % 2 == 1
    config = {
        "in_channels": r.choice([6, 1, 3]),
        "out_channels": r.choice([3, 1]),
        "block_out_channels": tuple(8 * r.choice([1, 2, 3]) for _ in range(levels)),
        "down_block_types": tuple(
            SELF[0] if attend and r.random() < 0.6 else PLAIN[0] for _ in range(levels)
        ),
        "up_block_types": tuple(
            SELF[1] if attend and r.random() < 0.6 else PLAIN[1] for _ in range(levels)
        ),
        "add_attention": attend,
        "layers_per_block": r.choice([1, 2]),
        "attention_head_dim": r.choice([4, 8]),
        "resnet_time_scale_shift": "scale_shift" if seed == 2 else "default",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 10 if seed in (1, 4) else None,
        "norm_num_groups": r.choice([2, 4]),
        "norm_eps": r.choice([1e-5, 1e-3]),
    }
    step = 2 ** (levels - 1)
    return config, (step * r.choice([2, 3]), step * r.choice([2, 3]))


@pytest.mark.parametrize("seed", range(6))
def test_upsampler_equal_to_stock(stock, seed):
    config, size = draw_upsampler(seed)
    ours, theirs = pair(ADMUNet(ADMConfig(**config)), stock.UNet2DModel(**config), seed)
    t = torch.tensor([0.0, 999.0, 12.5])
    labels = torch.tensor([9, 0, 4]) if config["num_class_embeds"] else None
    agree(
        ours,
        theirs,
        lambda x: (ours(x, t, embedding=labels),),
        lambda x: (theirs(x, t, class_labels=labels).sample,),
        {"x": noise(seed, 3, config["in_channels"], *size)},
    )


def test_as_many_tokens_as_places():
    """Where stock crashes (its mask is left short), ours masks as it does for any other length."""
    config, size, _ = draw_decoder(0)
    model = pair(*(ADMUNet(ADMConfig(**config)) for _ in range(2)), seed=5)[0]
    tokens = size[0] * size[1]
    x, context = (
        noise(1, 2, config["in_channels"], *size),
        noise(2, 2, tokens, config["cross_attention_dim"]),
    )
    embedding = noise(3, 2, 4 * config["block_out_channels"][0])
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[:, 5:] = False
    a = model(x, 3, context, embedding, mask)
    assert distance(a, model(x, 3, context[:, :5], embedding)) < 1e-9
    assert distance(a, model(x, 3, context, embedding)) > 1e-6


def test_refuses_other_sizes():
    config, _ = draw_upsampler(0)
    model = ADMUNet(ADMConfig(**config))
    with pytest.raises(ValueError, match="multiples of"):
        model(torch.zeros(1, config["in_channels"], 9, 8), 1)
