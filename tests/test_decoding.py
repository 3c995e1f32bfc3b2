"""Chapter 8's room: what is told goes where it should, and marks are counted as by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from companion import checkpoints, data, decoding, diffusion
from companion.decoding import ENTRIES, WAYS, Examined, swaps, tell, unsaid
from companion.prompts import Prompt, prompts
from companion.recipes.decoder import Decoder, build, decode
from companion.recipes.encoded import Encoded, FrozenCLIP
from companion.schedule import Schedule
from companion.scores import difference
from companion.storybook import Facts, Scene, Thing, ThingFacts
from companion.unclip import Words


@pytest.fixture(scope="module", autouse=True)
def weights(tiny_weights):
    """A tiny CLIP in place of the shipped one."""
    return tiny_weights


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Untrained, with every weight random: zeros would hide what is told."""
    made, g = build(Encoded(scenes=8)), torch.Generator().manual_seed(2)
    for p in made.parameters():
        p.data = 0.08 * torch.randn(p.shape, generator=g)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ready(model) -> Examined:
    return Examined(prompts()[:6], model, FrozenCLIP.open())


@pytest.fixture(scope="module")
def null(ready) -> Words:
    return ready.clip.read([""]).each(6)


# --- what is told ---------------------------------------------------------------------------------


def test_told_everything_is_what_the_decoder_was_trained_on(model, ready):
    x, t = torch.randn(6, 3, 16, 16), torch.tensor([0, 3, 99, 500, 900, 999])
    told = tell(model.text_proj, ready.place, ready.words, ready.clip.read([""]).each(6))
    ours = model.unet(x, t, *told)
    theirs = torch.cat(model(x, t, ready.place, *ready.words), dim=1)
    assert torch.equal(ours, theirs) and theirs.std() > 1e-3


def test_told_nothing_is_the_learned_vector_and_the_empty_sentence(model, ready, null):
    told = tell(model.text_proj, ready.place, ready.words, null, ())
    x, t = torch.randn(6, 3, 16, 16), torch.full((6,), 300)
    nowhere = model.text_proj.no_image(6)
    theirs = torch.cat(model(x, t, nowhere, *null), dim=1)
    assert torch.equal(model.unet(x, t, *told), theirs)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_opens_its_own_way_only(model, ready, null, entry):
    """By hand, from the four layers."""
    p, place, words = model.text_proj, ready.place, ready.words
    told = tell(p, place, words, null, (entry,))
    closed = tell(p, place, words, null, ())
    vector, tokens = told.added - closed.added, told.context - closed.context
    nowhere = p.learned_classifier_free_guidance_embeddings
    if entry == "place to the timestep":
        weight = p.clip_image_embeddings_project_to_time_embeddings.weight
        torch.testing.assert_close(vector, (place - nowhere) @ weight.T, rtol=1e-4, atol=1e-5)
    elif entry == "caption to the timestep":
        moved = (words.embedding - null.embedding) @ p.embedding_proj.weight.T
        torch.testing.assert_close(vector, moved, rtol=1e-4, atol=1e-5)
    else:
        assert (vector == 0).all()
    if entry == "place as tokens":
        layer = p.clip_extra_context_tokens_proj
        cut = (place @ layer.weight.T + layer.bias).view(6, -1, 4).transpose(1, 2)
        torch.testing.assert_close(told.context[:, :4], cut, rtol=1e-4, atol=1e-5)
    assert (tokens[:, :4] != 0).any() == (entry == "place as tokens")
    assert (tokens[:, 4:] != 0).any() == (entry == "caption as tokens")
    said = words.mask if entry == "caption as tokens" else null.mask
    assert torch.equal(told.mask.bool(), F.pad(said.bool(), (4, 0), value=True))


def test_an_unknown_entry_is_named(model, ready, null):
    with pytest.raises(ValueError, match="the entry is 'picture'"):
        tell(model.text_proj, ready.place, ready.words, null, ("picture",))


# --- drawing --------------------------------------------------------------------------------------


def test_a_picture_is_the_recipes_picture_whoever_is_drawn_beside_it(model, ready):
    together = ready.drawn([4, 0, 2], steps=4)
    alone = ready.drawn([2], steps=4)
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-4)
    words = Words(*(part[2:3] for part in ready.words))
    g, empty = torch.Generator().manual_seed(100_002), ready.clip.read([""])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("companion.recipes.decoder.STEPS", 4)
        theirs = decode(model, ready.place[2:3], words, empty, g)
    torch.testing.assert_close(alone, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(together[2], together[0], atol=0.05)


def test_every_choice_reaches_the_picture(ready):
    plain = ready.drawn([1], steps=3)
    for other in (
        {"scale": 1}, {"variance": "fixed_large"}, {"seed": 1}, {"entries": WAYS["place"]},
        {"entries": WAYS["caption"]},
    ):  # fmt: skip
        changed = ready.drawn([1], **({"steps": 3} | other))
        assert (changed - plain).abs().max() > 1e-3, other


def test_more_than_fit_at_once(model, ready, monkeypatch):
    whole = ready.drawn(range(5), steps=2)
    monkeypatch.setattr(decoding, "PARTS", 2)
    torch.testing.assert_close(ready.drawn(range(5), steps=2), whole, rtol=0, atol=1e-4)


# --- marks ----------------------------------------------------------------------------------------


SCENE = Scene("dusk", "sea", things=(Thing("boat", "red", x=0.26), Thing("cat", "blue", x=0.74)))
SHOWN = SCENE.facts()


def test_what_is_unsaid_is_counted_and_what_is_said_is_not():
    asked = [
        Prompt("a red boat by the sea", SCENE),  # the sky is unsaid, wrong in the picture
        Prompt("a boat and a blue cat at dusk", SCENE),  # the ground, right; the boat's colour too
        Prompt("a boat at dusk", SCENE),  # no picture to read
    ]
    read = [replace(SHOWN, sky="noon"), SHOWN, None]
    found = {k: (v["value"] * v["n"], v["n"]) for k, v in unsaid(asked, read).items()}
    assert found == {"sky": (0, 1), "place": (1, 2), "colour": (1, 2)}
    repainted = (ThingFacts("boat", "blue", "left"), ThingFacts("cat", "red", "right"))
    worse = unsaid(asked[1:2], [Facts("dusk", "sea", things=repainted)])
    assert worse["colour"]["value"] == 0 and worse["place"]["value"] == 1


def test_right_is_all_that_is_said():
    asked = [Prompt("a red boat by the sea", SCENE), Prompt("a blue boat", SCENE)]
    assert decoding.right(asked, [SHOWN, SHOWN]) == [True, False]
    assert decoding.right(asked, [None, None]) == [False, False]


def test_swaps_by_hand():
    prompt = Prompt("a red boat to the left of a blue cat", SCENE)
    other = (ThingFacts("boat", "blue", "left"), ThingFacts("cat", "red", "right"))
    exchanged = Facts("dusk", "sea", things=other)
    one = Facts("dusk", "sea", things=(ThingFacts("boat", "red", "left"),))
    found = swaps([prompt] * 5, [SHOWN, exchanged, exchanged, one, None])
    assert found["both things, both colours"]["value"] == pytest.approx(3 / 5)
    assert found["swapped"]["value"] == pytest.approx(2 / 3)
    assert "swapped" not in swaps([prompt], [None])
    assert decoding.exchangeable(prompt)
    assert not decoding.exchangeable(Prompt("a red boat and a cat", SCENE))


def test_held_out_prompts_are_apart():
    assert decoding.share([True, False, True], [True, True, False])["value"] == 0.5


def test_a_paired_difference_against_the_closed_form():
    a = [True] * 60 + [False] * 40
    b = [True] * 40 + [False] * 60  # 20 gained, none lost
    found = difference(a, b)
    spread = math.sqrt((0.2 - 0.2**2) / 100)
    assert found["value"] == pytest.approx(0.2)
    assert found["low"] == pytest.approx(0.2 - 1.96 * spread, abs=0.02)
    assert found["high"] == pytest.approx(0.2 + 1.96 * spread, abs=0.02)
    assert difference(a, a) == {"value": 0, "low": 0, "high": 0}
    # the same shares in other pairs are less sure
    mixed = difference(a, [False] * 30 + [True] * 40 + [False] * 30)
    assert mixed["high"] - mixed["low"] > 1.3 * (found["high"] - found["low"])
    with pytest.raises(ValueError, match="100 and 3 answers"):
        difference(a, [True] * 3)


# --- the variance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 30, 400, 900])
def test_the_wanted_fraction_has_the_least_divergence(t):
    """Tried out: no other fraction costs fewer bits for a guess that is off by 0.1."""
    schedule, g = Schedule.cosine(), torch.Generator().manual_seed(0)
    x0 = 2 * torch.rand(1, 3, 16, 16, generator=g, dtype=torch.float64) - 1
    x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=g, dtype=torch.float64), t)
    best = decoding.wanted_fraction(torch.tensor([0.01]), t, schedule).item()

    def cost(v: float) -> float:
        fraction = torch.full_like(x0, v)
        return diffusion.vlb_term(x0, x_t, t, schedule, x0 + 0.1, fraction).item()

    least = cost(best)
    for step in (0.02, 0.2):
        assert cost(best + step) > least and cost(best - step) > least


def test_no_error_wants_the_posteriors_variance():
    found = decoding.wanted_fraction(torch.zeros(1), 100, Schedule.cosine())
    assert found.item() == pytest.approx(-1, abs=1e-6)


class Knows(nn.Module):
    """Answers with the true noise of known pictures, and a fraction of its own."""

    def __init__(self, x0: torch.Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def forward(self, x_t, t, context, added, mask):
        abar = Schedule.cosine().alphas_cumprod[t].float()[:, None, None, None]
        noise = (x_t - abar.sqrt() * self.x0) / (1 - abar).sqrt()
        return torch.cat([noise, torch.full_like(noise, 0.25)], dim=1)


def test_looking_through_true_pictures(model, ready):
    rows = [0, 3]
    x0 = data.to_signed(ready.true[rows])
    knowing = Decoder(Knows(x0), model.text_proj)
    seen = decoding.look_through(Examined(ready.asked, knowing, ready.clip), rows, (5, 500))
    assert seen.x_t.shape == (2, 2, 3, 16, 16)
    torch.testing.assert_close(seen.x0_hat[0], x0, rtol=0, atol=1e-3)
    torch.testing.assert_close(seen.x0_hat[1], x0, rtol=0, atol=1e-3)
    assert (seen.fraction == 0.25).all()
    assert not torch.equal(seen.x_t[0], seen.x_t[1])


def test_the_bound_of_one_who_knows(model, ready):
    """The posterior's variance costs least to one who guesses right."""
    rows = [0, 3]
    knowing = Decoder(Knows(data.to_signed(ready.true[rows])), model.text_proj)
    paid = decoding.bits(Examined(ready.asked, knowing, ready.clip), rows)
    assert len(paid["learned"]) == 2
    assert max(paid["small"]) < min(paid["learned"]) < min(paid["large"])


@pytest.mark.slow
def test_the_table_has_a_row_for_each_question(ready, monkeypatch):
    monkeypatch.setattr(decoding.Decoder, "from_pretrained", lambda: ready.model)
    monkeypatch.setattr(decoding, "prompts", lambda: prompts()[:12])
    monkeypatch.setattr(decoding, "COUNTS", (2,))
    monkeypatch.setattr(decoding, "STEPS", 2)
    monkeypatch.setattr(decoding, "NOISY", (0, 3, 500))
    drawn = decoding.draw
    monkeypatch.setattr(decoding, "draw", lambda *a, **k: drawn(*a, **({"steps": 2} | k)))
    found = decoding.decoder(n=6, few=3, groups=3, pairs=3, exact=2)
    assert set(found["ways"]) == {"true", *WAYS}
    assert set(found["entries"]) == {*ENTRIES, "place, both entries", "caption, both entries"}
    assert set(found["guidance"]) == {"1", "2", "3", "5"}
    assert set(found["swaps"]) == {"true", "place and caption", "place", "caption"}
    assert set(found["variance"]) == {"learned", "small", "large"} == set(found["bits"])
    assert found["ways"]["true"]["frechet"] == pytest.approx(0, abs=1e-3)
    for row in found["ways"].values():
        assert len(row["right"]) == 6 and set(row["right"]) <= set("01")
        known = [c == "1" for c, p in zip(row["right"], prompts(), strict=False) if not p.held_out]
        assert row["everything said"]["value"] == pytest.approx(sum(known) / len(known))
    assert found["swaps"]["true"]["swapped"]["value"] == 0


def test_the_drawing_says_the_sizes_that_it_is_given():
    names = ("place", "caption", "states", "step", "added", "tokens", "words", "context")
    figure = decoding.diagram({name: (40 + i, 7) for i, name in enumerate(names)})
    said = " ".join(text.get_text() for text in figure.axes[0].texts)
    for i in range(len(names)):
        assert f"{40 + i} × 7" in said


def test_where_it_was_trained(weights, monkeypatch):
    folder = weights / "decoder"
    folder.mkdir(exist_ok=True)
    (folder / "card.json").unlink(missing_ok=True)
    assert "without a card" in checkpoints.trained("decoder")
    card = {"pictures": 6400, "steps": 100, "minutes": 3.2, "hardware": "a laptop"}
    checkpoints.write_json(folder / "card.json", card)
    assert checkpoints.trained("decoder") == "6,400 pictures in 100 steps, 3 minutes on a laptop"
