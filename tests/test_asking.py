"""Maps against a softmax by hand, masks against a bias of minus infinity, places against truth."""

import json
import math

import pytest
import tiny
import torch
from scipy import stats

from companion import asking
from companion.asking import (
    DROPPED,
    GROUPS,
    SPANS,
    TELLINGS,
    Looks,
    apart,
    asked_for,
    covered,
    draw,
    dropped,
    exchanged,
    grouped,
    on_the_patch,
    on_the_thing,
    overlay,
    questions,
    recording,
    row_of,
    rows_of,
    share_inside,
    shows,
    spans,
    states_of,
    tell,
    third,
    train_both,
    train_side_by_side,
    without,
)
from companion.measure import measurements
from companion.prompts import prompts
from companion.recipes import stable_diffusion as recipe
from companion.recipes.encoded import FrozenCLIP
from companion.storybook import Facts, Scene, Thing, ThingFacts, is_held_out, parse
from companion.tokenizer import Tokenizer

TEXTS = ["a red house", "by the sea"]


@pytest.fixture(scope="module")
def small():
    return tiny.stable_diffusion(seeing=True)


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.open()


@pytest.fixture(scope="module")
def latents():
    return recipe.Latents(scenes=64)


@pytest.fixture(scope="module")
def pipe(latents):
    """The shipped CLIP and autoencoder, and a U-Net of the right shape that knows nothing."""
    unet = asking.small_unet(latents)
    return recipe.assemble(latents.clip, latents.vae, tiny.lively(unet).requires_grad_(False))


# --- maps -----------------------------------------------------------------------------------------


def test_a_map_is_the_softmax_of_queries_and_keys(small, generator):
    x, context = torch.randn(2, 4, 4, 4, generator=generator), states_of(small, TEXTS)
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, given, out, name=name: seen.update({name: given}))
        for name, module in small.unet.named_modules()
        if name.endswith("attn2")
    ]
    with recording(small.unet, 2) as looks, torch.no_grad():
        small.unet(x, torch.tensor([7, 7]), context)
    for hook in hooks:
        hook.remove()
    assert list(looks.maps) == list(seen) and looks.t == [7.0]
    for name, (queries, keys) in seen.items():
        layer = small.unet.get_submodule(name)
        q, k = queries @ layer.to_q.weight.T, keys @ layer.to_k.weight.T
        d = q.shape[-1] // layer.heads
        found = looks.maps[name][0]
        side = round(q.shape[1] ** 0.5)
        for b in range(2):
            for head in range(layer.heads):
                part = slice(head * d, (head + 1) * d)
                scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(d)
                wanted = (scores.exp() / scores.exp().sum(1, keepdim=True)).view(side, side, -1)
                assert torch.allclose(found[b, head], wanted, atol=1e-6)


def test_of_a_guided_walk_the_told_half_is_kept(small):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    with recording(small.unet, 2) as guided:
        small(TEXTS, steps=3, guidance_scale=4.0, latents=latents)
    with recording(small.unet, 2) as plain:
        small(TEXTS, steps=3, guidance_scale=1.0, latents=latents)
    assert len(guided.t) == 3 and guided.t == plain.t == sorted(guided.t, reverse=True)
    for name, maps in guided.maps.items():  # the first calls saw the same noise and the same words
        assert torch.allclose(maps[0], plain.maps[name][0], atol=1e-6)
        assert not torch.allclose(maps[2], plain.maps[name][2], atol=1e-6)


def test_recording_ends_and_can_tell_words_from_a_picture(small, generator):
    picture = torch.rand(1, 3, 8, 8, generator=generator)
    with recording(small.unet, 1, rows=5) as looks:  # 1 + 4 patches; the empty text has 12 rows
        small(image_prompt=picture, steps=2, guidance_scale=4.0, seed=0)
    assert len(looks.t) == 2 and looks.mean().shape == (2, 1, 5, 4, 4)
    small(TEXTS[:1], steps=2, seed=0)
    assert len(looks.t) == 2
    assert not any(m.keep for m in small.unet.modules() if hasattr(m, "keep"))


def test_the_mean_takes_all_layers_and_lays_coarse_ones_over_fine():
    g = torch.Generator().manual_seed(1)
    fine, coarse = (
        torch.rand(2, 1, 3, 4, 4, 5, generator=g),
        torch.rand(2, 1, 3, 2, 2, 5, generator=g),
    )
    looks = Looks([1.0, 0.0], {"a": list(fine), "b": list(coarse)})
    assert looks.sizes() == {"a": (4, 4), "b": (2, 2)}
    found = looks.mean()
    assert found.shape == (2, 1, 5, 4, 4)
    for y, x, m in ((0, 0, 0), (3, 1, 4), (2, 2, 1)):
        wanted = (fine[1, 0, :, y, x, m].mean() + coarse[1, 0, :, y // 2, x // 2, m].mean()) / 2
        assert torch.isclose(found[1, 0, m, y, x], wanted)
    assert torch.equal(looks.mean(2), looks.of("b"))
    with pytest.raises(ValueError, match="no layer has 8 places"):
        looks.mean(8)


# --- words and rows -------------------------------------------------------------------------------


def test_every_row_belongs_to_one_word(clip):
    for text in ("a red house by the sea", "ein Häuschen am Meer", "", "a house 🏠"):
        found = rows_of(clip.tokenizer, text)
        assert sum((rows for _, rows in found), []) == list(range(clip.tokenizer.context))
        assert [found[0][0], found[-2][0], found[-1][0]] == ["start", "end", "padding"]
        ids, mask = clip.tokenizer(text)
        assert (
            found[-2][1] == [int(mask.sum()) - 1]
            and ids[0, found[-2][1][0]] == clip.tokenizer.end_id
        )
        assert len(found) - 3 == len(clip.tokenizer._words(text))
    named = dict(rows_of(clip.tokenizer, "a photograph of snow"))
    assert named["snow"] == [max(named["of"]) + 1] and len(named["photograph"]) > 1
    assert row_of(clip.tokenizer, "a red house", "red") == 2
    with pytest.raises(ValueError, match="not once"):
        row_of(clip.tokenizer, "a house by a tree", "a")


def test_questions_can_be_asked_of_this_network(clip):
    asked = questions(60)
    assert asked == questions(60) and len({q.text() for q in asked}) > 50
    for q in asked:
        assert not is_held_out(q.scene) and len(q.scene.things) == 1 and not q.scene.stream
        said = parse(q.text())
        assert said.holds_for(q.scene.facts()) and said.things[0].position is None
        for what in ("colour", "kind"):
            other = parse(q.other(what))
            assert not is_held_out(other)
            assert getattr(other.things[0], what) == getattr(q, what) != getattr(q.thing, what)
            a, b = (clip.tokenizer(text).ids[0] for text in (q.text(), q.other(what)))
            row = row_of(clip.tokenizer, q.text(), getattr(q.thing, what))
            assert (a != b).nonzero().tolist() == [[row]]  # one word differs, at one place


def test_what_stands_before_a_word_knows_nothing_of_it(clip):
    """CLIP looks back only: so ``spans`` names all rows that can know the word, and no other."""
    for q in questions(5):
        for what in ("colour", "kind"):
            states = clip.read([q.text(), q.other(what)]).states
            differs = (states[0] - states[1]).abs().amax(-1) > 1e-4
            knows = spans(clip.tokenizer, q.text(), getattr(q.thing, what))
            assert tuple(knows) == SPANS
            assert differs.nonzero().flatten().tolist() == knows["all of these"]
            assert sum((knows[name] for name in SPANS[:-1]), []) == knows["all of these"]


def test_groups_and_what_is_dropped(clip):
    for q in questions(5):
        groups = grouped(clip.tokenizer, q)
        assert set(groups) == set(GROUPS)
        assert sorted(sum(groups.values(), [])) == list(range(clip.tokenizer.context))
        gone = dropped(groups)
        assert tuple(gone) == DROPPED and gone["nothing"] == []
        kept = set(range(clip.tokenizer.context)) - set(gone["everything but the end"])
        assert kept == set(groups["end"])
        words = clip.tokenizer(q.text()).mask[0].nonzero().flatten().tolist()[1:-1]
        assert sorted(gone["all words"]) == words


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rows_of_a_text_draw_what_the_text_draws(small, scale):
    sources = [torch.Generator().manual_seed(s) for s in (3, 9)]
    wanted = small(TEXTS, steps=4, guidance_scale=scale, generator=sources, sampler="ddim")
    found = draw(small, states_of(small, TEXTS), [3, 9], steps=4, scale=scale)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_rows_have_no_order_and_each_picture_its_own_number(small):
    states = states_of(small, TEXTS)
    turned = states[:, torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    plain = draw(small, states, [3, 9], steps=3)
    assert torch.allclose(draw(small, turned, [3, 9], steps=3), plain, atol=1e-5)
    short = without(states[0], [2, 5])
    mixed = draw(small, [short, states[1], states[0]], [3, 9, 3], steps=3)
    assert torch.allclose(mixed[1], plain[1], atol=1e-5)
    assert torch.allclose(mixed[2], plain[0], atol=1e-5)
    assert torch.allclose(mixed[:1], draw(small, [short], [3], steps=3), atol=1e-5)
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)


def test_a_row_left_out_is_a_row_masked_with_minus_infinity(small, generator):
    x, context = torch.randn(1, 4, 4, 4, generator=generator), states_of(small, TEXTS[:1])
    bias = torch.zeros(1, 1, 1, 12)
    bias[..., [2, 5]] = -math.inf
    hooks = [
        module.register_forward_pre_hook(lambda m, given: (*given, bias))
        for name, module in small.unet.named_modules()
        if name.endswith("attn2")
    ]
    with torch.no_grad():
        masked = small.unet(x, 5.0, context)
        for hook in hooks:
            hook.remove()
        left_out = small.unet(x, 5.0, without(context[0], [2, 5])[None])
        assert torch.allclose(masked, left_out, atol=1e-6)
        assert not torch.allclose(masked, small.unet(x, 5.0, context), atol=1e-4)


def test_rows_exchanged():
    one, other = torch.zeros(5, 2), torch.ones(5, 2)
    mixed = exchanged(one, other, [1, 4])
    assert mixed[:, 0].tolist() == [0, 1, 0, 0, 1] and one.sum() == 0
    with pytest.raises(ValueError, match="no row"):
        without(one, range(5))
    with pytest.raises(ValueError, match="5 contexts and 1 seeds"):
        draw(None, one, [0])


# --- places ---------------------------------------------------------------------------------------


def test_a_thing_covers_where_it_stands():
    for x in (0.25, 0.5, 0.75):
        scene = Scene("noon", "meadow", things=(Thing("tent", "red", x=x),), seed=4)
        mask = covered([scene], size=64)[0]
        columns = mask.sum(0) / mask.sum()
        middle = (columns * (torch.arange(64) + 0.5) / 64).sum()
        assert abs(middle - x) < 0.02
        assert 0.05 < mask.mean() < 0.35 and set(mask.unique().tolist()) == {0.0, 1.0}
        small = covered([scene])[0]
        assert small.shape == (8, 8) and torch.isclose(small.mean(), mask.mean())
    two = Scene("noon", "sea", things=(Thing("cat", "red", x=0.26), Thing("car", "blue", x=0.74)))
    left, right_ = covered([two])[0], covered([two], thing=1)[0]
    assert left[:, 4:].sum() < 0.05 * left.sum() and right_[:, :4].sum() < 0.05 * right_.sum()
    with pytest.raises(ValueError, match="stream"):
        covered([Scene("noon", "woods", stream=True, things=(Thing("cat", "red"),))])


def test_thirds_are_those_of_the_world():
    for width in (4, 8, 64):
        parts = [third(where, width) for where in ("left", "middle", "right")]
        assert torch.allclose(sum(parts), torch.ones(width))
        flat = torch.ones(2, width, width)
        shares = [share_inside(flat, part)[0].item() for part in parts]
        assert shares == pytest.approx([0.38, 0.24, 0.38], abs=1e-5)
    for x in [0.16 + 0.68 * k / 28 for k in range(29)]:
        position = Thing("cat", "red", x=x).position
        assert third(position, 1000)[int(1000 * x)] > 0.5


def test_flat_attention_lies_on_things_by_their_area(pipe):
    """With equal keys all weights are equal: then each map is flat, and its share is the area."""
    with recording(pipe.unet, 1) as looks:
        pipe.unet(torch.zeros(1, 4, 8, 8), 5.0, torch.zeros(1, 40, 128))
    assert torch.allclose(looks.mean(), torch.tensor(1 / 40), atol=1e-6)
    scenes = [q.scene for q in questions(3)]
    truth = covered(scenes)
    assert torch.allclose(share_inside(torch.ones(3, 8, 8), truth), truth.mean((1, 2)))
    planted = truth.clone()  # all of it on the thing: where wholly covered, the share is 1
    whole = (truth == 1).float()
    assert share_inside(whole, truth).tolist() == pytest.approx([1.0] * 3)
    assert (share_inside(planted, truth) > truth.mean((1, 2))).all()


def test_where_words_of_true_pictures_lie(pipe):
    found = on_the_thing(pipe, questions(6), times=(300, 700))
    assert set(found["by noise"]["kind"]) == {"300", "700"}
    assert set(found["by size"]["kind"]) == {"4", "8"}
    values = [cell["value"] for word in found["by noise"].values() for cell in word.values()]
    assert all(0.3 < value < 3 for value in values)  # a network that knows nothing: about 1
    shown = on_the_patch(pipe, [q.scene for q in questions(3)], times=(500,))
    assert shown["chance"] == 1 / 65
    parts = [shown[name]["value"] for name in ("same", "next to it", "whole picture")]
    assert all(value > 0 for value in parts) and sum(parts) < 1


def test_an_overlay_is_dark_where_a_map_is_low():
    picture = torch.ones(1, 3, 8, 8)
    maps = torch.tensor([[[0.0, 2.0], [1.0, 2.0]]])
    shown = overlay(picture, maps, dark=0.1)
    assert shown[0, 0, 0, 0] == pytest.approx(0.1) and shown[0, 0, 7, 7] == 1
    assert torch.isfinite(overlay(picture, torch.ones(1, 2, 2))).all()


def test_what_a_picture_shows():
    seen = Facts("noon", "sea", things=(ThingFacts("cat", "red"), ThingFacts("car", "blue")))
    assert shows(seen, "kind", "car", "cat") and not shows(seen, "kind", "boat", "cat")
    assert shows(seen, "colour", "red", "cat") and not shows(seen, "colour", "blue", "cat")
    assert not shows(None, "kind", "car", "car")


# --- the measurements, a little of each -----------------------------------------------------------


@pytest.mark.slow
def test_attention_words_measures_what_it_says(pipe):
    found = asking.attention_words(n=4, steps=2, pipe=pipe)
    json.dumps(found)
    attention = found["attention"]
    assert sum(cell["value"] for cell in attention["in all"].values()) == pytest.approx(1, abs=1e-5)
    assert sum(cell["value"] for cell in attention["rows"].values()) == pytest.approx(40)
    assert all(
        sum(row.values()) == pytest.approx(1, abs=1e-5) for row in attention["by layer"].values()
    )
    assert len(attention["by layer"]) == 7 and len(attention["by step"]["end"]) == 2
    assert set(found["exchanged"]) == {"colour", "kind"}
    assert all(tuple(row) == SPANS for row in found["exchanged"].values())
    assert tuple(found["left out"]) == DROPPED
    assert all(row["everything said"]["n"] == 4 for row in found["left out"].values())
    assert set(measurements()) >= {"attention-words", "sequence-or-pooled"}


def test_exchanging_everything_is_asking_for_the_other_thing(pipe):
    q = questions(1)[0]
    for what in ("colour", "kind"):
        one, other = states_of(pipe, [q.text(), q.other(what)])
        rows = spans(pipe.tokenizer, q.text(), getattr(q.thing, what))["all of these"]
        assert torch.allclose(exchanged(one, other, rows), other, atol=1e-5)


def test_the_end_is_what_clip_pools(clip):
    texts = ["a red house by the sea at dusk", "a boat", ""]
    words = clip.read(texts)
    one = tell(words, TELLINGS[1])
    assert one.shape == (3, 1, 128)
    assert torch.allclose(
        one[:, 0] @ clip.clip.text_projection.weight.T, words.embedding, atol=1e-5
    )
    assert tell(words, TELLINGS[0]) is words.states
    with pytest.raises(ValueError, match="expected one of"):
        tell(words, "shouting")


@pytest.mark.slow
def test_both_networks_begin_alike_and_see_the_same(latents):
    a, b = (asking.small_unet(latents).state_dict() for _ in TELLINGS)
    assert all(torch.equal(a[name], b[name]) for name in a)
    models, losses = train_both(latents, steps=8, stop=2)
    first = [values[0] for values in losses.values()]
    assert first[0] == first[1] == pytest.approx(1, abs=0.1)  # the last layer is zero: noise of 1
    again = train_both(latents, steps=8, stop=1)[1]
    assert [values[0] for values in again.values()] == first
    one, other = (m.state_dict() for m in models.values())
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_questions_of_the_comparison():
    for things in (1, 2):
        asked = asked_for(things)
        assert len(asked) == asking.EACH and set(asked) <= set(prompts())
        assert all(len(p.facts.things) == things and not p.held_out for p in asked)


@pytest.mark.slow
def test_sequence_or_pooled_measures_what_it_says():
    found = asking.sequence_or_pooled(steps=2, each=3, scenes=64, draw_steps=2)
    json.dumps(found)
    assert set(found["things"]) == {"1", "2"}
    for row in found["things"].values():
        assert set(TELLINGS) < set(row) and row["prompts"] == 3
    assert len(found["readings"]) == 6 and found["pictures"] == 128


@pytest.mark.slow
def test_readers_are_exchanged_and_nothing_else(monkeypatch):
    seen, most, loss = [], [], recipe.loss
    monkeypatch.setattr(
        asking, "train_side_by_side", lambda *a: (seen.append(a), train_side_by_side(*a))[1]
    )
    monkeypatch.setattr(recipe, "loss", lambda *a: (most.append(a[3]), loss(*a))[1])
    found = asking.readers_exchanged(steps=2, each=3, scenes=64, draw_steps=2)
    json.dumps(found)
    assert set(found["things"]) == {"1", "2"} and set(asking.READERS) < set(found["things"]["1"])
    assert most == [recipe.MOST] * 4, "two steps of two networks, by the recipe's own loss"
    _, tellings, *_ = seen[0]
    taught, own = (tellings[name](["a red house"]) for name in asking.READERS)
    assert torch.equal(own, FrozenCLIP.open().read(["a red house"]).states)
    assert torch.equal(taught, recipe.reader().read(["a red house"]).states)
    assert not torch.allclose(own, taught, atol=1e-2)


def test_a_difference_of_means_of_different_things():
    a, b = [0.1, 0.5, 0.4, 0.9], [0.2, 0.1, 0.3]
    found = apart(a, b)
    va, vb = torch.tensor(a).double().var().item() / 4, torch.tensor(b).double().var().item() / 3
    freedom = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(va + vb)
    assert found["value"] == pytest.approx(0.475 - 0.2)
    assert found["high"] - found["value"] == pytest.approx(half, rel=1e-5)


def test_a_text_that_does_not_fit_is_refused():
    tokenizer = Tokenizer.train(["a red house by the sea"], size=530, context=6)
    with pytest.raises(ValueError, match="more than fit"):
        rows_of(tokenizer, "a red house by the sea")
