"""CLIP and its parts equal transformers' CLIP, numbers and gradients."""

import random

import pytest
import torch

from companion.clip import (
    CLIP,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPTextProjected,
    CLIPVisionConfig,
    CLIPVisionProjected,
    contrastive_loss,
)
from reference.oracle import agree, noise, pair


def draw_text(seed: int) -> dict:
    r = random.Random(seed)
    heads = r.choice([1, 2, 4])
    return {
        "vocab_size": 40,
        "hidden_size": heads * r.choice([3, 4, 6]),
        "intermediate_size": r.choice([7, 20]),
        "projection_dim": r.choice([5, 9]),
        "num_hidden_layers": r.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "max_position_embeddings": r.choice([8, 13]),
        "hidden_act": "gelu" if seed % 3 == 2 else "quick_gelu",
        "layer_norm_eps": r.choice([1e-5, 1e-3]),
        "bos_token_id": 38,
        "eos_token_id": 2 if seed % 2 else 39,
        "pad_token_id": 39,
    }


def draw_vision(seed: int) -> dict:
    r = random.Random(1000 + seed)
    heads = r.choice([1, 2, 4])
    patch = r.choice([2, 4])
    return {
        "image_size": patch * r.choice([2, 3]),
        "patch_size": patch,
        "hidden_size": heads * r.choice([3, 4, 6]),
        "intermediate_size": r.choice([7, 20]),
        "projection_dim": r.choice([5, 9]),
        "num_hidden_layers": r.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "hidden_act": "gelu" if seed % 3 == 1 else "quick_gelu",
        "layer_norm_eps": r.choice([1e-5, 1e-3]),
    }


def texts(seed: int, config: dict, end: int = 39) -> torch.Tensor:
    """Three texts of different lengths, padded with the end token; one is empty."""
    g = torch.Generator().manual_seed(seed)
    n = config["max_position_embeddings"] - seed % 2  # shorter than the context, now and then
    ids = torch.randint(3, 38, (3, n), generator=g)
    ids[:, 0] = 38
    for row, length in enumerate((n - 1, 1, n // 2)):
        ids[row, length:] = end
    return ids


@pytest.mark.parametrize("seed", range(6))
def test_text_equal_to_stock(stock, seed):
    config = draw_text(seed)
    for projected in (False, True):
        ours = (CLIPTextProjected if projected else CLIPText)(CLIPTextConfig(**config))
        name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        theirs = getattr(stock, name)(stock.CLIPTextConfig(**config))
        if not projected:  # transformers 5 has dropped a level that every published file has
            theirs = torch.nn.ModuleDict({"text_model": theirs})
        ours, theirs = pair(ours, theirs, seed)
        ids = texts(seed, config)

        def run_ours(ours=ours, projected=projected, ids=ids):
            x = ours(ids)
            return (x.embedding, x.states) if projected else (x.pooled, x.states)

        def run_theirs(theirs=theirs, projected=projected, ids=ids):
            x = theirs(ids) if projected else theirs["text_model"](ids)
            return (x.text_embeds if projected else x.pooler_output), x.last_hidden_state

        agree(ours, theirs, run_ours, run_theirs, {})


@pytest.mark.parametrize("seed", range(6))
def test_vision_equal_to_stock(stock, seed):
    config = draw_vision(seed)
    ours, theirs = pair(
        CLIPVisionProjected(CLIPVisionConfig(**config)),
        stock.CLIPVisionModelWithProjection(stock.CLIPVisionConfig(**config)),
        seed,
    )

    def run_theirs(pixels):
        x = theirs(pixels)
        return x.image_embeds, x.last_hidden_state

    def run_ours(pixels):
        x = ours(pixels)
        return x.embedding, x.states

    size = config["image_size"]
    agree(ours, theirs, run_ours, run_theirs, {"pixels": noise(seed, 2, 3, size, size)})


@pytest.mark.parametrize("seed", range(4))
def test_whole_clip_equal_to_stock(stock, seed):
    text, vision, common = draw_text(seed), draw_vision(seed), 6
    text["projection_dim"] = vision["projection_dim"] = common
    ours = CLIP(CLIPConfig(CLIPTextConfig(**text), CLIPVisionConfig(**vision), common))
    theirs = stock.CLIPModel(
        stock.CLIPConfig(text_config=text, vision_config=vision, projection_dim=common)
    )
    ours, theirs = pair(ours, theirs, seed)
    ids = texts(seed, text)

    def run_ours(pixels):
        logits = ours(ids, pixels)
        return (
            logits,
            ours.encode_text(ids),
            ours.encode_image(pixels),
            contrastive_loss(logits)[None].expand(2) * torch.tensor([1.0, 2.0]),
        )

    def run_theirs(pixels):
        x = theirs(ids, pixels, return_loss=True)
        words = theirs.get_text_features(ids).pooler_output
        pictures = theirs.get_image_features(pixels).pooler_output
        return (
            x.logits_per_image,
            words,
            pictures,
            x.loss[None].expand(2) * torch.tensor([1.0, 2.0]),
        )

    size = vision["image_size"]
    agree(ours, theirs, run_ours, run_theirs, {"pixels": noise(seed, 3, 3, size, size)})


def test_a_text_without_end_is_refused():
    """Stock pools such a text at its first token, silently."""
    config = draw_text(0)
    model = CLIPText(CLIPTextConfig(**config))
    ids = texts(0, config)
    with pytest.raises(ValueError, match="no end token 39"):
        model(torch.where(ids == 39, 5, ids))
