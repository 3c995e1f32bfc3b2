"""A folder of weights with a tiny CLIP that knows nothing, for recipes that build on one."""

import shutil
from pathlib import Path

import torch

from companion import checkpoints
from companion.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from companion.preparation import Preparation
from companion.recipes.clip import spoken
from companion.storybook import sample
from companion.tokenizer import Tokenizer

WIDTH, CONTEXT = 32, 40


def write(weights: Path) -> Path:
    """``weights/clip`` as the recipe would write it, and whatever else is shipped beside it."""
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
    for shipped in checkpoints.WEIGHTS.iterdir():
        if shipped.is_dir() and shipped.name != "clip":
            shutil.copytree(shipped, weights / shipped.name)
    return weights
