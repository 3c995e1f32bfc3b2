"""transformers opens the shipped CLIP, cuts words as we do, and computes the same."""

import pytest
import torch

from companion import checkpoints
from companion.clip import CLIP, normalise
from companion.recipes.clip import spoken
from companion.storybook import render, sample
from companion.tokenizer import Tokenizer

FOLDER = checkpoints.WEIGHTS / "clip"


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, list[str]]:
    g = torch.Generator().manual_seed(12)
    scenes = sample(12, g)
    return render(scenes, 64), [spoken(scene, g)[1] for scene in scenes]


def test_the_shipped_folder_is_stocks_clip(stock, pair):
    pictures, texts = pair
    ours = CLIP.from_pretrained(FOLDER, dtype=torch.float64)
    theirs = stock.CLIPModel.from_pretrained(FOLDER).double().eval()
    ids, mask = Tokenizer.from_pretrained(FOLDER)(texts)
    pixels = normalise(pictures.double())
    with torch.no_grad():
        said = theirs(input_ids=ids, pixel_values=pixels, attention_mask=mask.long())
        states = theirs.text_model(input_ids=ids).last_hidden_state
        ours_states = ours.text_model(ids).states
        logits = ours(ids, pixels)
    torch.testing.assert_close(logits, said.logits_per_image, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours_states, states, rtol=1e-9, atol=1e-9)


def test_stocks_tokenizer_cuts_the_same_pieces(stock, pair):
    ours, theirs = Tokenizer.from_pretrained(FOLDER), stock.CLIPTokenizer.from_pretrained(FOLDER)
    texts = [*pair[1], "A photograph of 12 owls' nests!", "ein Häuschen, 🦊", ""]
    said = theirs(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids, mask = ours(texts)
    assert torch.equal(ids, said["input_ids"])
    assert torch.equal(mask.long(), said["attention_mask"])


def test_stocks_processor_prepares_the_same_pixels(pair):
    from transformers import CLIPImageProcessor

    pictures = (pair[0] * 255).round().byte()
    said = CLIPImageProcessor.from_pretrained(FOLDER)(list(pictures), return_tensors="pt")
    wanted = normalise(pictures.float() / 255)
    torch.testing.assert_close(said["pixel_values"], wanted, rtol=0, atol=1e-5)
