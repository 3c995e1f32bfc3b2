"""Stable Diffusion's reader: what is locked, and the two losses that its states answer to."""

import pytest
import torch
from torch.nn import functional as F

from companion.clip import CLIPText, with_words
from companion.recipes import RECIPES, language
from companion.recipes import text_encoder as recipe
from companion.recipes.clip import Pairs, holds
from companion.recipes.encoded import FrozenCLIP
from companion.recipes.stable_diffusion import reader
from companion.recipes.text_encoder import Locked
from companion.storybook import is_held_out, parse
from companion.train import draw, generator

MAIN = RECIPES["text-encoder"]


@pytest.fixture(scope="module", autouse=True)
def weights(tiny_weights):
    """A tiny CLIP in place of the shipped one."""
    return tiny_weights


@pytest.fixture(scope="module")
def pairs() -> Locked:
    return Locked()


@pytest.fixture(scope="module")
def batch(pairs) -> dict[str, torch.Tensor]:
    return draw(MAIN, pairs, 0)


def test_it_starts_as_the_text_tower_of_the_shipped_clip(pairs, batch):
    model = MAIN.model(pairs)
    with torch.no_grad():
        own, clips = model.reader(batch["ids"]), pairs.clip.clip.text_model(batch["ids"])
    assert torch.equal(own.states, clips.states)
    assert torch.equal(own.pooled, clips.pooled)


def test_a_batch_has_pictures_where_clip_puts_them_and_captions_whole_and_damaged(pairs, batch):
    short = batch["mask"].sum(1) < pairs.tokenizer.context  # the tiny tokenizer cuts long ones
    texts = [pairs.tokenizer.decode(row.tolist()) for row in batch["ids"][short]]
    assert len(texts) > 30 and not any(is_held_out(parse(text)) for text in texts)
    again = pairs.tokenizer(texts)
    assert torch.equal(again.ids, batch["ids"][short])
    assert torch.equal(again.mask, batch["mask"][short])
    assert (batch["seen_mask"].sum(1) <= batch["mask"].sum(1)).all()
    assert batch["seen_mask"].sum() < 0.95 * batch["mask"].sum()
    assert batch["embedding"].shape == (64, pairs.clip.width)
    g = generator(MAIN.seed, "batch", 0)  # the same pictures, drawn again
    plain = Pairs(None, pairs.tokenizer).batch(torch.arange(MAIN.chunk), g)
    with torch.no_grad():
        seen = pairs.clip.clip.encode_image(plain["pixels"])
    assert torch.allclose(batch["embedding"][: MAIN.chunk], seen, atol=1e-6)


def test_the_loss_is_clips_and_the_writers(pairs, batch):
    torch.manual_seed(3)
    model = MAIN.model(pairs).double()
    # no longer CLIP's own tower
    torch.nn.init.normal_(model.reader.text_model.final_layer_norm.weight, std=0.5)
    clip = pairs.clip.clip
    b = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    clip.double()
    try:
        value, notes = MAIN.loss(model, b, pairs)
        with torch.no_grad():
            words = F.normalize(clip.text_projection(model.reader(b["ids"]).pooled), dim=-1)
            cosines = F.normalize(b["embedding"], dim=-1) @ words.T
            logits, true = clip.logit_scale.exp() * cosines, holds(b["said"], b["shown"])
            nats = 0.0
            for i in range(len(logits)):
                for row, others in ((logits[i], true[i]), (logits[:, i], true[:, i])):
                    wrong = ~others
                    wrong[i] = True
                    nats += (row[wrong].logsumexp(0) - row[i]).item() / (2 * len(logits))
            written, _ = language.loss(model, b, pairs)
    finally:
        clip.float()
    assert value.item() == pytest.approx(nats + written.item(), abs=1e-6)
    assert 0 <= notes["right"] <= 1 and 0 <= notes["written"] <= 1


def test_all_of_clip_is_locked_but_the_text_tower(pairs, batch):
    before = {k: x.clone() for k, x in pairs.clip.clip.state_dict().items()}
    model = MAIN.model(pairs)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss, _ = MAIN.loss(model, batch, pairs)
    loss.backward()
    optimiser.step()
    assert all(torch.equal(x, before[k]) for k, x in pairs.clip.clip.state_dict().items())
    moved = model.reader.text_model.state_dict()
    assert not any(torch.equal(x, before[f"text_model.{k}"]) for k, x in moved.items())


def test_a_clip_with_other_words_differs_in_nothing_else(pairs, batch):
    clip = pairs.clip.clip
    other = with_words(
        clip, CLIPText.fresh(clip.config.text_config, torch.Generator().manual_seed(8))
    )
    with torch.no_grad():
        assert not torch.allclose(other.encode_text(batch["ids"]), clip.encode_text(batch["ids"]))
    assert other.vision_model is clip.vision_model
    assert other.text_projection is clip.text_projection
    assert clip.text_model is not other.text_model


def test_stable_diffusion_reads_with_it_and_dalle2_does_not(weights):
    own, clips = reader(), FrozenCLIP.open()
    shipped = CLIPText.from_pretrained(weights / "text-encoder")
    ids = own.tokenizer(["a red house"]).ids
    with torch.no_grad():
        assert torch.equal(own.read(["a red house"]).states, shipped(ids).states)
        assert not torch.allclose(
            own.read(["a red house"]).states, clips.read(["a red house"]).states
        )


def test_the_score_is_clips_own_and_what_is_written_back(pairs, monkeypatch):
    asked = {}

    def exam(clip, tokenizer):
        asked["tower"] = clip.text_model
        return {"zero-shot sky": 1.0}

    monkeypatch.setattr(recipe, "exam", exam)

    def written_back(model, tokenizer, texts, which=""):
        assert len(texts) == 1000
        assert any(is_held_out(parse(text)) for text in texts) == ("held-out" in which)
        return {f"captions written back whole{which}": {"value": 0.5}}

    monkeypatch.setattr(recipe, "written_back", written_back)
    model = MAIN.model(pairs)
    found = MAIN.score(model, pairs)
    assert asked["tower"] is model.reader.text_model
    assert found.pop("zero-shot sky") == 1.0
    assert {name: x["value"] for name, x in found.items()} == {
        "captions written back whole": 0.5,
        "captions written back whole, held-out combinations": 0.5,
    }
