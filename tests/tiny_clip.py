"""Weights of a tiny CLIP and a tiny language model that know nothing, for what builds on them."""

import shutil
from pathlib import Path

import torch

from companion import checkpoints
from companion.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVisionConfig
from companion.preparation import Preparation
from companion.recipes.clip import spoken
from companion.storybook import sample
from companion.tokenizer import Tokenizer

WIDTH, CONTEXT = 32, 40


def write(weights: Path) -> Path:
    """``clip`` and ``language-model`` as recipes would write them, and whatever else is shipped."""
    g = torch.Generator().manual_seed(0)
    captions = [spoken(scene, g)[1] for scene in sample(300, g)]
    tokenizer = Tokenizer.train(captions, 640, CONTEXT)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )
    vision = CLIPVisionConfig(
        image_size=64,
        patch_size=16,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    folder = weights / "clip"
    CLIP.fresh(CLIPConfig(text, vision, WIDTH), g).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Preparation.usual(64).save_pretrained(folder)
    for name in ("language-model", "text-encoder"):
        CLIPText.fresh(text, g).save_pretrained(weights / name)
        tokenizer.save_pretrained(weights / name)
    for shipped in checkpoints.WEIGHTS.iterdir():
        if shipped.is_dir() and not (weights / shipped.name).exists():
            shutil.copytree(shipped, weights / shipped.name)
    return weights
