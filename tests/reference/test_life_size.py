"""The published models at their own size: counted always, run when asked.

Counting happens on the meta device and costs nothing. The two passes in float32 need about 10 GB
and a few minutes, so they run only with COMPANION_LIFE_SIZE=1.
"""

import importlib
import json
import os

import pytest
import torch

from companion.checkpoints import read_config
from reference.published import COUNTS, SD_TEXT, SD_UNET

life_size = pytest.mark.skipif(
    os.environ.get("COMPANION_LIFE_SIZE") != "1", reason="10 GB; set COMPANION_LIFE_SIZE=1"
)


def build(where: str, config: dict, tmp_path) -> torch.nn.Module:
    module, _, name = where.partition(".")
    cls = getattr(importlib.import_module(f"companion.{module}"), name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return cls(read_config(tmp_path, cls.Config, cls.notes, cls.switches))


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_published_models(name, tmp_path):
    where, config, wanted = COUNTS[name]
    with torch.device("meta"):
        model = build(where, config, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == wanted
    assert not list(model.buffers())  # nothing else to store, nothing to compute when loading


def fill(model: torch.nn.Module) -> None:
    """Random weights of a sensible size, the same for the same names, made one at a time."""
    g = torch.Generator().manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=g) * (
            0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
        )
        p.data.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))


def share(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Let the stock model use our weights: the same memory under the same names."""
    mine = dict(ours.named_parameters())
    yours = dict(theirs.named_parameters())
    assert mine.keys() == yours.keys()
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)


@life_size
@pytest.mark.long
@torch.no_grad()
def test_stable_diffusions_unet_at_life_size(stock, tmp_path):
    with torch.device("meta"):
        ours = build("unet.UNet", SD_UNET, tmp_path)
        theirs = stock.UNet2DConditionModel.from_config(SD_UNET)
    fill(ours.to_empty(device="cpu"))
    share(ours.eval(), theirs.eval())
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 64, 64, generator=g), torch.randn(2, 77, 768, generator=g)
    t = torch.tensor([981, 21])
    a, b = ours(x, t, context), theirs(x, t, context).sample
    assert b.std() > 1e-3
    print("greatest difference", (a - b).abs().max().item(), "of", b.abs().max().item())
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@life_size
@pytest.mark.long
@torch.no_grad()
def test_clips_text_encoder_at_life_size(stock, tmp_path):
    with torch.device("meta"):
        ours = build("clip.CLIPText", SD_TEXT, tmp_path)
    theirs = stock.CLIPTextModel(stock.CLIPTextConfig(**SD_TEXT))
    fill(ours.to_empty(device="cpu"))
    share(ours.eval(), torch.nn.ModuleDict({"text_model": theirs.eval()}))
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 49406, (3, 77), generator=g)
    ids[:, 0] = 49406
    for row, end in enumerate((76, 5, 30)):
        ids[row, end:] = 49407
    a, b = ours(ids), theirs(ids)
    for ours_part, their_part in ((a.states, b.last_hidden_state), (a.pooled, b.pooler_output)):
        difference = (ours_part - their_part).abs().max()
        print("greatest difference", difference.item(), "of", their_part.abs().max().item())
        assert difference < 1e-5 * their_part.abs().max()
