"""Chapter 5's small experiments: tiny CLIPs, and the gap between words and pictures.

A tiny CLIP reads scenes of 16 x 16 pixels and learns enough in about a minute to show what a choice
does. ``python -m companion measure clip-temperature`` trains several, with three seeds each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import errors
from companion.clip import (
    CLIP,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    contrastive_loss,
    normalise,
)
from companion.measure import SEEDS, measurement, over_seeds
from companion.recipes.clip import Pairs, holds, numbers, retrieval, spoken, tellable
from companion.storybook import Scene, caption, render, sample
from companion.tokenizer import Tokenizer

SIZE, POOL, STEPS, BATCH = 16, 3000, 400, 64
TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0)


def tiny(tokenizer: Tokenizer) -> CLIPConfig:
    """Two layers a tower, 64 wide, for pictures of 16 x 16 pixels in patches of 4 x 4."""
    same = {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 64}
    same |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.context,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        **same,
    )
    return CLIPConfig(text, CLIPVisionConfig(image_size=SIZE, patch_size=4, **same), 64)


@dataclass(frozen=True)
class Pool:
    """Scenes with their pictures (N, 3, 16, 16), ready for a picture tower."""

    scenes: list[Scene]
    pixels: Tensor

    @classmethod
    def draw(cls, n: int = POOL, seed: int = 0) -> "Pool":
        """``n`` scenes that training may see; their captions are drawn batch by batch."""
        scenes = sample(n, torch.Generator().manual_seed(seed))
        return cls(scenes, normalise(render(scenes, SIZE)))

    def batch(
        self, n: int, tokenizer: Tokenizer, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (n, 3, 16, 16), captions (n, N), and which caption is true of which picture."""
        chosen = torch.randint(len(self.scenes), (n,), generator=generator).tolist()
        scenes = [self.scenes[i] for i in chosen]
        told = [spoken(scene, generator) for scene in scenes]
        ids, mask = tokenizer([text for _, text in told])
        true = holds(numbers([f for f, _ in told]), numbers([s.facts() for s in scenes]))
        return self.pixels[chosen], ids[:, : int(mask.sum(1).max())], true


def gap(words: Tensor, pictures: Tensor) -> Tensor:
    """From the middle of the words to the middle of the pictures, (D,) (Liang et al. 2022, §2.1).

    Args:
        words: (B, D) embeddings of length 1.
        pictures: The same of pictures. The length of the result is the modality gap.
    """
    return pictures.mean(0) - words.mean(0)


def train_tiny(
    pool: Pool,
    tokenizer: Tokenizer,
    seed: int,
    *,
    temperature: float | None = None,
    leave_out: bool = True,
    steps: int = STEPS,
    watch: Callable[[int, float], None] | None = None,
) -> CLIP:
    """Train a tiny CLIP.

    Args:
        pool: What to train on.
        tokenizer: What cuts the captions.
        seed: Of the weights and the batches.
        temperature: Fixed; None learns it from 0.07 on, as CLIP does.
        leave_out: Whether captions that are true of a picture too are left out of its wrong ones.
        steps: Optimiser steps, with batches of 64.
        watch: Called with the step's number and its loss.
    """
    errors.number("steps", steps, low=1, integer=True)
    g = torch.Generator().manual_seed(seed)
    model = CLIP.fresh(tiny(tokenizer), g)
    if temperature is not None:
        model.logit_scale.requires_grad_(False).fill_(-math.log(temperature))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 30, 1 - step / steps)
        pixels, ids, true = pool.batch(BATCH, tokenizer, g)
        loss = contrastive_loss(model(ids, pixels), true if leave_out else None)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if watch is not None:
            watch(step, loss.item())
    return model.eval()


@lru_cache(maxsize=1)
def fresh_scenes() -> tuple[list[Scene], list[str], Tensor]:
    """Five hundred scenes in fives of a hundred that can be told apart, captions and pictures."""
    g = torch.Generator().manual_seed(505)
    scenes = [scene for _ in range(5) for scene in tellable(100, g)]
    return scenes, [caption(s, generator=g) for s in scenes], normalise(render(scenes, SIZE))


@torch.no_grad()
def look(model: CLIP, tokenizer: Tokenizer) -> dict[str, float]:
    """Loss, retrieval among 100 and modality gap of a tiny CLIP on scenes it never saw."""
    _, texts, pixels = fresh_scenes()
    words = F.normalize(model.encode_text(tokenizer(texts).ids), dim=-1)
    pictures = F.normalize(model.encode_image(pixels), dim=-1)
    scale, hits, losses = model.logit_scale.exp(), 0, []
    for part in range(0, 500, 100):
        w, p = words[part : part + 100], pictures[part : part + 100]
        hits += sum(retrieval(w, p))
        losses.append(contrastive_loss(scale * p @ w.T).item())
    right, other = (words * pictures).sum(1), pictures @ words.T
    return {
        "loss": sum(losses) / len(losses),
        "retrieval": hits / 1000,
        "gap": gap(words, pictures).norm().item(),
        "cosine of a pair": right.mean().item(),
        "cosine of strangers": other[~torch.eye(500, dtype=torch.bool)].mean().item(),
        "temperature": 1 / scale.item(),
    }


@measurement(
    "clip-temperature",
    "Tiny CLIPs on 16 x 16 scenes: modality gap, retrieval among 100 and loss, untrained, for fixed"
    " temperatures, with a learned one, and with true captions counted as wrong: three seeds, with"
    " 95 % intervals of the mean by Student's t",
    minutes=30,
)
def clip_temperature(
    seeds: Sequence[int] = SEEDS,
    temperatures: Sequence[float] = TEMPERATURES,
    steps: int = STEPS,
    scenes: int = POOL,
) -> dict[str, Any]:
    """Chapter 5's sweep. For each seed all begin with the same weights and see the same batches."""
    pool, tokenizer = Pool.draw(scenes), Pairs().tokenizer
    found: dict[str, dict[str, list[float]]] = {}
    kinds: dict[str, dict[str, Any]] = {"learned": {}, "true ones counted wrong": {}}
    kinds["true ones counted wrong"]["leave_out"] = False
    kinds |= {f"{t:g}": {"temperature": t} for t in temperatures}
    for seed in seeds:
        start = CLIP.fresh(tiny(tokenizer), torch.Generator().manual_seed(seed))
        made = {"untrained": start}
        for name, choice in kinds.items():
            made[name] = train_tiny(pool, tokenizer, seed, steps=steps, **choice)
        for name, model in made.items():
            for what, value in look(model, tokenizer).items():
                found.setdefault(name, {}).setdefault(what, []).append(value)
    rows = {
        name: {what: over_seeds(runs) for what, runs in columns.items()}
        for name, columns in found.items()
    }
    return {"seeds": list(seeds), "steps": steps, "batch": BATCH, "rows": rows}
