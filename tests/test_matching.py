"""Chapter 5's small experiments: repeatable, and they change what they say they change."""

import math

import pytest
import torch
from torch.nn import functional as F

from companion import matching
from companion.clip import CLIP
from companion.matching import Pool, gap, look, tiny, train_tiny
from companion.recipes.clip import Pairs
from companion.storybook import Facts, is_held_out, parse


@pytest.fixture(scope="module")
def tokenizer():
    return Pairs().tokenizer


@pytest.fixture(scope="module")
def pool():
    return Pool.draw(80, seed=3)


def test_a_batch_knows_what_is_true(pool, tokenizer, generator):
    assert not any(is_held_out(scene) for scene in pool.scenes)
    pixels, ids, true = pool.batch(20, tokenizer, generator)
    assert pixels.shape == (20, 3, 16, 16) and ids.shape[0] == 20 and ids.shape[1] <= 40
    assert ((ids == tokenizer.end_id).sum(1) >= 1).all()
    said = [parse(tokenizer.decode(row)) for row in ids]
    where = {x.numpy().tobytes(): s for x, s in zip(pool.pixels, pool.scenes, strict=True)}
    seen: list[Facts] = [where[x.numpy().tobytes()].facts() for x in pixels]
    assert true.tolist() == [[text.holds_for(facts) for text in said] for facts in seen]


def test_gap_by_hand():
    words = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pictures = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    assert torch.equal(gap(words, pictures), torch.tensor([-1.0, -1.0]))
    assert gap(words, words.flip(0)).norm() == 0


def test_training_depends_on_its_seed_alone(pool, tokenizer):
    before, losses = torch.random.get_rng_state(), {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        steps: list[float] = []
        train_tiny(pool, tokenizer, seed, steps=3, watch=lambda k, loss, to=steps: to.append(loss))
        losses[name] = steps
    assert losses["a"] == losses["b"] != losses["c"] and len(losses["a"]) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_chosen_is_what_changes(pool, tokenizer):
    first = CLIP.fresh(tiny(tokenizer), torch.Generator().manual_seed(0))
    fixed = train_tiny(pool, tokenizer, 0, temperature=0.1, steps=3)
    assert fixed.logit_scale.exp().item() == pytest.approx(10, rel=1e-5)
    assert not torch.equal(fixed.text_projection.weight, first.text_projection.weight)
    learned = train_tiny(pool, tokenizer, 0, steps=3)
    assert learned.logit_scale.item() != first.logit_scale.item()
    wrong = train_tiny(pool, tokenizer, 0, steps=3, leave_out=False)
    assert not torch.equal(wrong.text_projection.weight, learned.text_projection.weight)


def test_a_look_at_a_stranger_and_at_a_perfect_pair(tokenizer):
    found = look(CLIP.fresh(tiny(tokenizer), torch.Generator().manual_seed(0)), tokenizer)
    assert found["retrieval"] < 0.05 and abs(found["loss"] - math.log(100)) < 1
    assert found["temperature"] == pytest.approx(0.07, rel=1e-3)

    class Twins(torch.nn.Module):
        """Both towers give picture i and text i the same direction, apart by a constant."""

        logit_scale = torch.tensor(math.log(50.0))

        def __init__(self):
            super().__init__()
            g = torch.Generator().manual_seed(1)
            self.x = F.normalize(torch.randn(500, 30, generator=g, dtype=torch.float64), dim=1)

        def encode_text(self, ids):
            return 3 * torch.cat([self.x, torch.full((500, 1), 0.5)], dim=1)

        def encode_image(self, pixels):
            return 7 * torch.cat([self.x, torch.full((500, 1), -0.5)], dim=1)

    found = look(Twins(), tokenizer)
    assert found["retrieval"] == 1 and found["loss"] < 0.1
    assert found["gap"] == pytest.approx(1 / 1.25**0.5, rel=0.01)
    assert found["cosine of a pair"] == pytest.approx(0.75 / 1.25)
    assert found["cosine of strangers"] == pytest.approx(-0.25 / 1.25, abs=0.01)


@pytest.mark.slow
def test_the_sweep_has_a_row_for_each_choice():
    found = matching.clip_temperature(seeds=(0, 1), temperatures=(0.1,), steps=2, scenes=80)
    assert set(found["rows"]) == {"untrained", "learned", "true ones counted wrong", "0.1"}
    for columns in found["rows"].values():
        assert all(len(column["runs"]) == 2 for column in columns.values())
    assert found["rows"]["0.1"]["temperature"]["value"] == pytest.approx(0.1, rel=1e-4)
