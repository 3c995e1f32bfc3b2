"""The language model's recipe: what is read, what is damaged, what has to be written."""

import pytest
import torch
from torch.nn import functional as F

from companion.clip import CLIPText
from companion.recipes import RECIPES
from companion.recipes import language as recipe
from companion.recipes.language import Captions, damaged
from companion.storybook import is_held_out, parse
from companion.train import draw

READER = RECIPES["language-model"]


@pytest.fixture(scope="module", autouse=True)
def weights(tiny_weights):
    """A tiny CLIP in place of the shipped one."""
    return tiny_weights


@pytest.fixture
def captions() -> Captions:
    return Captions()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_reader_never_reads_of_what_is_held_out(captions):
    texts = captions.say(torch.arange(200), gen())
    assert not any(is_held_out(parse(text)) for text in texts) and len(set(texts)) > 150
    assert any(is_held_out(parse(text)) for text in captions.apart(40, held_out=True))
    assert not any(is_held_out(parse(text)) for text in captions.apart(40))


def test_damage_takes_pieces_away_and_leaves_their_order(captions):
    texts = captions.say(torch.arange(400), gen())
    tokens = captions.tokenizer(texts, truncate=True)
    pad = captions.tokenizer.pad_id
    seen, left = damaged(tokens.ids, tokens.mask, pad, gen(1))
    kept = pieces = 0
    for ids, mask, short, rest in zip(tokens.ids, tokens.mask, seen, left, strict=True):
        whole, some = ids[mask.bool()].tolist(), short[rest.bool()].tolist()
        assert (some[0], some[-1]) == (whole[0], whole[-1]), "start and end stay"
        n = len(some)
        assert rest.tolist() == [1] * n + [0] * (len(rest) - n), "what is left moves up"
        assert (short[n:] == pad).all()
        following = iter(whole)
        assert all(piece in following for piece in some), "in the order in which they stood"
        kept, pieces = kept + n - 2, pieces + len(whole) - 2
    assert kept / pieces == pytest.approx(0.85, abs=0.02)


def test_the_writer_sees_the_readers_states_and_what_it_has_written(captions):
    torch.manual_seed(0)
    model = READER.model(captions).double().eval()
    b = draw(READER, captions, 0)
    seen, mask, written = b["seen"][:4], b["seen_mask"][:4], b["ids"][:4]
    with torch.no_grad():
        plain = model(seen, mask, written)
        later = written.clone()
        later[:, 5] = 3
        assert torch.allclose(model(seen, mask, later)[:, :5], plain[:, :5])
        assert not torch.allclose(model(seen, mask, later)[:, 5], plain[:, 5])
        behind = seen.masked_fill(mask == 0, 7)  # what stands behind the end is not looked at
        assert torch.allclose(model(behind, mask, written), plain)
        other = seen.clone()
        other[:, 1] = 9
        assert not torch.allclose(model(other, mask, written)[:, 0], plain[:, 0])


def test_the_loss_is_nats_a_piece_of_the_whole_caption(captions):
    torch.manual_seed(0)
    model, b = READER.model(captions).double(), draw(READER, captions, 0)
    value, said = READER.loss(model, b, captions)
    with torch.no_grad():
        logits = model(b["seen"], b["seen_mask"], b["ids"])
        nats, right, count = 0.0, 0, 0
        for row, ids, mask in zip(logits, b["ids"], b["mask"], strict=True):
            for i in range(int(mask.sum()) - 1):
                p = torch.softmax(row[i], 0)
                nats -= p[ids[i + 1]].log().item()
                right += int(p.argmax() == ids[i + 1])
                count += 1
    assert value.item() == pytest.approx(nats / count, abs=1e-6)
    assert said["right"].item() == pytest.approx(right / count, abs=1e-6)


@pytest.mark.slow
def test_a_few_steps_teach_something_and_the_reader_alone_is_kept(captions, tmp_path, monkeypatch):
    """A few steps teach it something; and what is kept is the reader alone."""
    monkeypatch.setattr(recipe, "WIDTH", 32)
    torch.manual_seed(0)
    model = READER.model(captions)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss, _ = READER.loss(model, draw(READER, captions, step), captions)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    model.save_pretrained(tmp_path / "reader")
    again = CLIPText.from_pretrained(tmp_path / "reader")
    ids = captions.tokenizer(["a red house"]).ids
    assert torch.equal(again(ids).states, model.reader(ids).states)


def test_the_score_counts_captions_that_come_back_whole(captions, monkeypatch):
    monkeypatch.setattr(captions, "apart", lambda n, held_out=False: captions_of(n, held_out))

    def captions_of(n, held_out):
        return Captions().say(torch.arange(120), gen(5))

    class Knows(torch.nn.Module):
        """Writes every caption back, but the first of each hundred with its last piece wrong."""

        def forward(self, seen, seen_mask, written):
            following = torch.cat([seen[:, 1:], seen[:, -1:]], 1)[:, : written.shape[1]]
            last = seen_mask[0].sum() - 2
            following[0, last] = 0
            return F.one_hot(following, len(captions.tokenizer)).float()

    found = READER.score(Knows(), captions)
    assert {name: x["value"] for name, x in found.items()} == {
        "captions written back whole": 118 / 120,
        "captions written back whole, held-out combinations": 118 / 120,
    }
