"""Machines against the systems themselves; agreement, crossings and bindings against counting."""

import math
from functools import partial

import pytest
import tiny
import torch

from companion import examination, looking
from companion.data import to_unit
from companion.looking import (
    FACTS,
    FORMS,
    KINDS,
    NEW,
    PHRASES,
    STEPS,
    WORDS,
    Base,
    Decoding,
    Latents,
    agreements,
    alike,
    alone,
    answer,
    blended,
    bound,
    crossing,
    distance,
    exchanged,
    filled,
    first_named,
    form,
    halfway,
    in_slot,
    last_row,
    misreadings,
    of_two,
    opposites,
    pairs_of_things,
    said,
    same,
    shows,
    single,
    taken_for,
    thrown,
    told_apart,
)
from companion.measure import measurements
from companion.prompts import Prompt
from companion.recipes.decoder import legible
from companion.recipes.encoded import FrozenCLIP
from companion.storybook import Facts, ThingFacts, is_held_out, parse, write
from companion.unclip import Walk

TEXTS = ["a red house", "by the sea"]
HOUSE, TREE = ThingFacts("house", "red", "left"), ThingFacts("tree", "blue", "right")


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.open()


@pytest.fixture(scope="module")
def machines():
    """One of each kind, with random weights; the judge can read what they show."""
    found = {
        "latents": Latents(tiny.stable_diffusion(seeing=True)),
        "decoder": Decoding(tiny.dalle2(second=False)),
        "base": Base(tiny.imagen()),
    }
    found["latents"].show = large(found["latents"].show)
    return found


def large(show):
    return lambda x: torch.nn.functional.interpolate(show(x), (64, 64))


NAMES = ("latents", "decoder", "base")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(looking, "STEPS", 4)


# --- the machines ---------------------------------------------------------------------------------


def test_latents_draw_what_stable_diffusion_draws():
    pipe = tiny.stable_diffusion()
    sources = [torch.Generator().manual_seed(s) for s in (3, 9)]
    scale = examination.SD_GUIDANCE
    wanted = pipe(TEXTS, steps=4, guidance_scale=scale, generator=sources, sampler="ddim")
    assert torch.allclose(Latents(pipe).say(TEXTS, [3, 9]), wanted, atol=1e-5)


def test_the_decoder_is_told_and_draws_what_dalle2_does(monkeypatch):
    pipe, seen = tiny.dalle2(second=False), {}
    machine = Decoding(pipe)
    given = machine.tell(TEXTS, [5, 6])
    small = pipe.draw_small

    def watched(embedding, words, null, walk, scale, *rest):
        seen.update(place=embedding, scale=scale, words=words)
        return small(embedding, words, null, walk, scale, *rest)

    monkeypatch.setattr(pipe, "draw_small", watched)
    examination.dalle2_draws(pipe)(
        [Prompt(text, None) for text in TEXTS], [torch.Generator().manual_seed(s) for s in (5, 6)]
    )
    assert torch.allclose(given[0], seen["place"], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(given[1:], seen["words"], strict=True))
    walk = Walk("ddim", machine.timesteps, (8, 8), machine.noise([3, 9]))
    null = pipe.encode_prompts([""] * 2)
    wanted = small(seen["place"], seen["words"], null, walk, seen["scale"], None)
    drawn = machine.draw(given, [3, 9])
    assert torch.allclose(drawn, legible(to_unit(wanted)), atol=1e-5)


def test_imagens_base_draws_what_imagen_draws_before_it_is_enlarged():
    pipe, seen = tiny.imagen(), []
    machine, small = Base(pipe), []  # whose scales are the system's own
    start = machine.noise([3, 9])
    pipe(
        TEXTS, steps=(4, 2), sampler="ddim", latents=(start, None), seed=0,
        callback=lambda i, t, x, x0: seen.append(x0) if x.shape[-1] == 8 else None,
    )  # fmt: skip
    machine.draw(machine.tell(TEXTS, [0, 0]), [3, 9], callback=lambda i, t, x, x0: small.append(x0))
    assert len(seen) == len(small) == 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, small, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_words_are_exchanged_at_the_step_that_was_named(machines, name):
    machine = machines[name]
    one, other = (machine.tell([text], [0]) for text in TEXTS)
    alone_, later = machine.draw(one, [3]), machine.draw(other, [3])
    assert torch.equal(machine.draw(one, [3], then=other, at=4), alone_)
    assert torch.equal(machine.draw(one, [3], then=other, at=0), later)
    asked = []

    def marked(guided, mark):
        def told(given):
            denoise = guided(given)
            return lambda x, t: (asked.append((mark(given), t[0].item())), denoise(x, t))[1]

        return told

    machine_guided = machine.guided
    try:
        machine.guided = marked(machine_guided, lambda given: torch.equal(given[0], other[0]))
        machine.draw(one, [3], then=other, at=1)
    finally:
        machine.guided = machine_guided
    assert [late for late, _ in asked] == [False, True, True, True]
    assert [t for _, t in asked] == pytest.approx(machine.timesteps.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_is_the_same_noise_whatever_stands_beside_it(machines, name, monkeypatch):
    machine = machines[name]
    assert torch.equal(machine.noise([3, 9])[1], machine.noise([9])[0])
    given = machine.tell(TEXTS * 2, [0, 1, 2, 3])
    whole = machine.draw(given, [3, 9, 3, 5])
    monkeypatch.setattr(looking, "PARTS", 3)
    assert torch.allclose(machine.draw(given, [3, 9, 3, 5]), whole, atol=1e-5)
    assert whole.shape == (4, 3, 64, 64) and 0 <= whole.min() and whole.max() <= 1
    start = machine.noise([3, 9, 3, 5])
    assert torch.allclose(machine.draw(given, [0] * 4, start=start), whole, atol=1e-5)
    with pytest.raises(ValueError, match="there are 3 seeds"):
        machine.draw(given, [1, 2, 3])


def test_one_die_is_thrown_and_the_other_lies_still(machines):
    decoder, told, drawn = machines["decoder"], [], []
    tell, draw = decoder.tell, decoder.draw
    try:
        decoder.tell = lambda texts, seeds: (told.append(list(seeds)), tell(texts, seeds))[1]
        decoder.draw = lambda given, seeds: (drawn.append(list(seeds)), draw(given, seeds))[1]
        for die in (0, 1):
            assert thrown(decoder, die, [4, 7]).shape == (9, 2, 3, 64, 64)
    finally:
        decoder.tell, decoder.draw = tell, draw
    assert told == [[4, 7] * 9, [0] * 9] and drawn == [[0] * 18, [4, 7] * 9]


# --- what can be read -----------------------------------------------------------------------------


def test_answers():
    two = Facts("noon", "sea", things=(HOUSE, TREE))
    assert answer(two, "sky") == "noon" and answer(two, "things") == "2"
    assert answer(two, "colour") is None and answer(two, "colour", "tree") == "blue"
    assert answer(None, "sky") is None and answer(two, "kind", "cat") is None
    asked = Facts(things=(ThingFacts("tree", "red"),))
    assert single(two, asked, "colour") == "blue" and single(two, asked, "sky") == "noon"
    assert single(Facts("noon"), asked, "kind") is None
    assert shows(two, "kind", "tree", "house") and shows(two, "colour", "red", "house")
    assert not shows(two, "colour", "blue", "house") and not shows(None, "sky", "noon", "house")
    assert shows(two, "position", "right", "house"), "a side is a side"
    assert not shows(two, "position", "middle", "house")
    other = Facts("dusk", "sea", things=(HOUSE,))
    assert same([two, None], [other, None], ["sky", "place", "kind"]) == [
        False, True, False, True, True, True,
    ]  # fmt: skip


def test_agreement_is_what_counting_pairs_gives():
    answers = [["a", "b", "a"], ["a", "c", None], ["b", "b", "a"]]
    found = agreements(answers)
    assert found["same seed"] == pytest.approx([1 / 3, 1 / 3, 1])
    # the first seed's a, a, b against the other prompts' answers to the other seeds, None left out
    pairs = ["ac", "ab", "aa", "ab", "aa", "ab", "aa", "bb", "ba", "bc"]
    assert found["other seed"][0] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert found["same prompt"] == pytest.approx([1 / 3, 0, 1 / 3])
    rare = agreements([["a", None, "a"], ["a", None, None]])  # with the middle seed: no pair at all
    assert rare["same seed"] == [1, None, None] and rare["same prompt"] == [1, None]


def test_answers_of_the_seed_alone_and_of_the_prompt_alone():
    seeds = [[f"s{s}" for s in range(4)] for _ in range(3)]
    found = agreements(seeds)
    assert found["same seed"] == [1] * 4 and found["other seed"] == [0] * 4
    prompts = [[f"p{p}"] * 4 for p in range(3)]
    found = agreements(prompts)
    assert found["same prompt"] == [1] * 3 and found["same seed"] == [0] * 4


def test_pictures_that_are_alike(generator):
    own = torch.rand(3, 4, 3, 8, 8, generator=generator)
    common = torch.rand(4, 3, 8, 8, generator=generator)
    found = alike(0.1 * own + common)
    assert min(found["same seed"]) > 0.8 and max(found["other seed"]) < 0
    x = (own - own.mean((0, 1))).flatten(2)
    wanted = torch.nn.functional.cosine_similarity(x[0, 1], x[2, 1], dim=0)
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    every = [torch.nn.functional.cosine_similarity(x[p, 1], x[q, 1], dim=0) for p, q in pairs]
    assert torch.isclose(every[1], wanted)
    assert alike(own)["same seed"][1] == pytest.approx(sum(every).item() / 6, abs=1e-5)

    def mean_of(pairs):
        near = [torch.nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
        return pytest.approx(sum(near) / len(near), abs=1e-5)

    others = [(x[p, 1], x[q, s]) for p, q in pairs for s in (0, 2, 3)]
    assert alike(own)["other seed"][1] == mean_of(others)
    again = [(x[2, s], x[2, r]) for s in range(4) for r in range(4) if r != s]
    assert alike(own)["same prompt"][2] == mean_of(again)


def test_a_blend_has_the_means_of_one_and_the_rest_of_the_other(generator):
    a, b = torch.randn(2, 2, 4, 8, 8, generator=generator)
    mixed = blended(a, b, 2)
    pool = torch.nn.functional.avg_pool2d
    assert torch.allclose(pool(mixed, 2), pool(b, 2), atol=1e-6)
    fine = mixed - pool(mixed, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    wanted = a - pool(a, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(fine, wanted, atol=1e-6)
    many = blended(*torch.randn(2, 200, 4, 8, 8, generator=generator), 4)
    assert many.std().item() == pytest.approx(1, abs=0.01)


def test_whose_answer_it_is():
    noon, dusk, rain = (Facts(sky) for sky in ("noon", "dusk", "rain"))
    found = of_two([noon, dusk, rain, noon], [noon, noon, noon, noon], [dusk, dusk, dusk, noon],
                   "sky")  # fmt: skip
    assert [found[w]["value"] for w in ("of a", "of b", "of neither")] == pytest.approx([1 / 3] * 3)
    assert of_two([noon], [noon], [noon], "sky") == {}


# --- when -----------------------------------------------------------------------------------------


def test_pairs_differ_in_everything_and_stay_in_the_world():
    for a, b in opposites(12):
        for what in FACTS:
            assert said(a, what) != said(b, what) and said(a, what) in WORDS[what]
            turned = exchanged(a, what, said(b, what))
            assert not is_held_out(turned) and parse(write(turned)) == turned
            assert [said(turned, w) == said(a, w) for w in FACTS] == [w != what for w in FACTS]
        assert "middle" in {said(a, "position"), said(b, "position")}


def test_where_a_curve_comes_down_to_half():
    assert crossing([0, 4, 8], [1.0, 1.0, 0.0]) == 6
    assert crossing([0, 4, 8], [0.8, 0.6, 0.2]) == 6
    assert crossing([0, 4, 8], [1.0, 0.9, 0.8]) == 8
    found = halfway([0, 2, 4], [[True] * 5, [True] * 5, [False] * 5])
    assert found == {"value": 3, "low": 3, "high": 3}
    mixed = halfway([0, 2, 4], [[True] * 6, [True, False] * 3, [False] * 6])
    assert mixed["low"] < mixed["value"] == 2 < mixed["high"]


# --- words ----------------------------------------------------------------------------------------


def test_distance_is_a_share_of_the_length():
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    assert distance(a, b).item() == 2 and distance(a, a).item() == 0
    assert distance(a, -a).item() == 2
    assert distance(torch.tensor([1.0, 0]), torch.tensor([0, 1.0])).item() == pytest.approx(
        math.sqrt(2)
    )


def test_the_last_row_of_a_phrase(clip):
    text = "a red house on the left in a meadow under the northern lights"
    pieces = ["<start>", *clip.tokenizer.pieces(text)]
    for phrase, last in (("on the left", "left"), ("under the northern lights", "lights"),
                         ("house", "house")):  # fmt: skip
        assert pieces[last_row(clip, text, phrase)] == f"{last}</w>"
    with pytest.raises(ValueError, match="not stand once"):
        last_row(clip, text, "on the right")
    assert {what: tuple(words) for what, words in PHRASES.items()} == WORDS


def test_what_is_told_apart_is_what_the_tower_says(clip):
    scenes = alone(3)
    found = told_apart(clip, scenes)
    assert {what: len(pairs) for what, pairs in found.items()} == {
        what: len(words) * (len(words) - 1) // 2 for what, words in WORDS.items()
    }
    by_hand = []
    for scene in scenes:
        texts = [write(exchanged(scene.facts(), "colour", c)) for c in ("red", "blue")]
        states = clip.read(texts).states
        rows = [clip.tokenizer.pieces(t).index(f"{c}</w>") + 1 for t, c in
                zip(texts, ("red", "blue"), strict=True)]  # fmt: skip
        a, b = states[0, rows[0]], states[1, rows[1]]
        by_hand.append(((a - b).norm() / (0.5 * (a.norm() + b.norm()))).item())
    assert found["colour"]["red / blue"]["at the word"]["value"] == pytest.approx(
        sum(by_hand) / 3, rel=1e-4
    )


def test_mistakes_between_two_words():
    asked, seen = ["left", "left", "right", "middle"], ["left", "right", "middle", "left"]
    found = taken_for(asked, seen, "left", "right")
    assert (found["value"], found["n"]) == (0.5, 2) and taken_for([], [], "a", "b") == {}


def test_things_in_four_forms():
    for scene in pairs_of_things(6, 1):
        facts = [form(scene, name) for name in FORMS]
        assert [len(f.things) for f in facts] == [1, 2, 2, 2]
        assert [len(f) for f in facts] == [2, 2, 4, 6]
        assert all(parse(write(f)) == f for f in facts)
        for f in facts[1:]:
            nouns = [looking.KIND_NOUNS[t.kind][0] for t in f.things]
            first = looking.KIND_NOUNS[first_named(f)][0]
            words = write(f).split()
            assert words.index(first) == min(words.index(noun) for noun in nouns)


def test_what_was_kept_together():
    plain = Facts(things=tuple(ThingFacts(t.kind, t.colour) for t in (HOUSE, TREE)))
    house, tree = ThingFacts("house", "blue", "right"), ThingFacts("tree", "red", "left")
    seen = [
        Facts("noon", "sea", things=(HOUSE, TREE)),  # right, house first and left
        Facts("noon", "sea", things=(house, tree)),  # swapped, house right
        Facts("noon", "sea", things=(ThingFacts("house", "pink", "left"),)),
        None,
    ]
    found = {k: (v["value"], v["n"]) for k, v in bound([plain] * 4, seen).items()}
    assert found["whole"] == (1 / 4, 4) and found["kinds"] == (2 / 4, 4)
    assert found["more things"] == (0, 4)
    one = Facts(things=(ThingFacts("house", "red"),))
    twice = Facts("noon", "sea", things=(house, HOUSE))  # one of the two is red
    found_one = bound([one], [twice])
    assert found_one["more things"]["value"] == found_one["colours"]["value"] == 1
    assert found["colours"] == (2 / 5, 5) and found["borrowed"] == (pytest.approx(2 / 3), 3)
    assert found["swapped"] == (1 / 2, 2) and found["first on the left"] == (1 / 2, 2)


def test_wrong_captions_are_wrong_in_one_way(generator):
    for scene in pairs_of_things(5, 2):
        found = {way: parse(text) for way, text in misreadings(scene, generator).items()}
        facts = scene.facts()
        assert found.pop("right") == facts
        assert all(not wrong.holds_for(facts) for wrong in found.values())
        words = {way: sorted(write(f).split()) for way, f in found.items()}
        assert words["colours exchanged"] == sorted(write(facts).split())
        assert words["sides exchanged"] == sorted(write(facts).split())


def test_words_in_their_slots(clip):
    captions = {filled(slot, word) for slot, word, _ in NEW}
    assert {"a", "a house by the", "a crimson house"} <= captions
    for slot, word, meant in NEW:
        if meant == word and slot != "kind" and word:
            assert said_of(parse(filled(slot, word)), slot) == word
    seen = Facts("dusk", "sea", things=(HOUSE, TREE))
    assert in_slot(seen, "kind") == ["house", "tree"] and in_slot(seen, "colour") == ["red"]
    assert in_slot(seen, "place") == ["sea"] and in_slot(None, "sky") == []
    known = {word for slot, word, _ in NEW if word and len(clip.tokenizer.pieces(word)) == 1}
    assert known == {"house", "red", "sea", "night"}, "all others are new to the tokenizer"


def said_of(facts, slot):
    if slot in ("sky", "place"):
        return getattr(facts, slot)
    return getattr(facts.things[0], slot)


# --- the measurements, a little of each -----------------------------------------------------------


def test_the_measurements_run(machines, clip, monkeypatch):
    two = {"latents": machines["latents"], "decoder": machines["decoder"]}
    monkeypatch.setattr(looking, "parts_of_noise", partial(looking.parts_of_noise, blocks=(4, 2)))
    found = looking.what_a_seed_fixes(n=2, mixed=2, machines=two)
    assert len(found["rows"]) == 3
    assert [part["numbers"] for part in found["parts"].values()] == [4, 16]
    found = looking.when_decided(n=2, changes=(0, 2, 4), machines=two)
    for row in found["rows"].values():
        assert set(row["new"]) == set(FACTS) and set(row["guess"]["sky"]) == {"0", "2"}
        assert all(len(bits) == 2 for bits in row["pairs"]["kind"].values())
    found = looking.four_forms(n=2, machines=two)
    assert set(found["rows"]["decoder"]) == set(FORMS)
    found = looking.unknown_words(n=2, machines=two)
    assert [row["text"] for row in found["rows"]["latents"]] == [filled(s, w) for s, w, _ in NEW]
    bare = [row for row in found["rows"]["latents"] if not row["word"]]
    assert all(row["read as without the word"]["value"] == 1 for row in bare)
    found = looking.said_and_seen(n=2, frames=2, sides=2, choices=3, machines=two)
    fainter = {f"words, the difference times {x}" for x in (0.5, 0.25, 0.125)}
    assert set(found["side"]) == {"words", "a picture"} | fainter
    assert set(found["between"]) == {"latents less decoder"}
    for tower in ("CLIP's own", "taught on"):
        assert len(found["chosen"][tower]) == 5 and set(found["apart"][tower]) == set(FACTS)


def test_they_are_known_and_say_what_they_need():
    for name in ("what-a-seed-fixes", "when-decided", "said-and-seen", "four-forms",
                 "unknown-words"):  # fmt: skip
        assert set(looking.NEEDS) <= set(measurements()[name].needs)
    assert set(KINDS) == set(WORDS["kind"]) and STEPS == 25
