"""The book's own Imagen, trained: stock's classes open its networks and answer alike (float64)."""

import pytest
import torch

from companion.imagen import Imagen
from companion.judge import Judge
from companion.storybook import parse
from reference.oracle import TOLERANCE, distance
from reference.systems import quiet

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # stock warns of much
PROMPTS = ["a red house on the left by the sea at dusk", "a stream flowing through the woods"]


@pytest.fixture(scope="module")
def ours():
    return Imagen.from_pretrained("storybook", dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    return ours.save_pretrained(tmp_path_factory.mktemp("storybook"))


@torch.no_grad()
def test_stock_answers_as_each_network_does(ours, folder):
    with quiet():
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        base, upsampler = (
            UNet2DConditionModel.from_pretrained(folder, subfolder=name).double()
            for name in ("unet", "super_res")
        )
        reader = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").double()
        pieces = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    said = pieces(PROMPTS, padding="max_length", max_length=40, return_tensors="pt")
    told = ours.read(PROMPTS)
    states = reader(said.input_ids).last_hidden_state
    assert distance(told.states, states) < TOLERANCE
    assert torch.equal(told.mask, said.attention_mask.bool())

    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 64, 64, generator=g, dtype=torch.float64)
    t, level, mask = torch.tensor([700, 200]), torch.tensor([0, 300]), said.attention_mask
    small, how = x[:, :3, :16, :16], {"encoder_attention_mask": mask}
    theirs = base(small, t, states, class_labels=told.pooled, **how).sample
    assert distance(ours.unet(small, t, *told), theirs) < TOLERANCE
    theirs = upsampler(x, t, states, class_labels=level, **how).sample
    assert distance(ours.super_res(x, t, told.states, level, told.mask), theirs) < TOLERANCE


def test_it_draws_what_it_is_told(ours):
    drawn = ours(PROMPTS, num_images_per_prompt=3, seed=1).float()
    read = Judge.from_pretrained().read(drawn)
    said = [parse(text) for text in PROMPTS for _ in range(3)]
    right = [f is not None and s.holds_for(f) for f, s in zip(read, said, strict=True)]
    assert sum(right) >= 5
