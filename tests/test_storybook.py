"""The picture world: what is said is drawn, what is drawn can be said and read back."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label

from companion import storybook
from companion.storybook import (
    COLOURS,
    KINDS,
    PLACES,
    SKIES,
    Facts,
    Scene,
    Thing,
    ThingFacts,
    caption,
    draw,
    is_held_out,
    parse,
    render,
    sample,
    words,
    write,
)
from companion.storybook import scene as world


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the world


def test_the_world_is_as_large_as_promised():
    assert len(SKIES) >= 4 and len(PLACES) >= 6 and len(KINDS) >= 8 and len(COLOURS) >= 8
    assert set(words.KIND_NOUNS) == set(draw.THING_PAINTERS) == set(KINDS)
    assert set(words.SKY_PHRASES) == set(draw.SKY_PAINTERS) == set(draw.LIGHT) == set(SKIES)
    assert set(words.PLACE_PHRASES) == set(draw.PLACE_PAINTERS) == set(PLACES)
    assert set(draw.PAINT) == set(COLOURS)


def test_the_same_seed_gives_the_same_scenes():
    assert sample(50, seeded(3)) == sample(50, seeded(3))
    assert sample(50, seeded(3)) != sample(50, seeded(4))
    assert sample(20, seeded(3)) == sample(50, seeded(3))[:20]


def test_chance_is_fair():
    scenes = sample(8000, seeded(5), held_out=None)
    things = [t for s in scenes for t in s.things]
    for values, options in (
        ([s.sky for s in scenes], SKIES),
        ([s.place for s in scenes], PLACES),
        ([t.kind for t in things], KINDS),
        ([t.colour for t in things], COLOURS),
    ):
        expected = len(values) / len(options)
        spread = math.sqrt(expected * (1 - 1 / len(options)))
        for option in options:
            assert abs(values.count(option) - expected) < 5 * spread, option
    assert abs(sum(not s.things for s in scenes) / 8000 - 0.1) < 0.02


def test_held_out_combinations_never_come_unless_asked_for():
    assert not any(is_held_out(s) for s in sample(3000, seeded(1)))
    assert all(is_held_out(s) for s in sample(300, seeded(1), held_out=True))
    mixed = sum(is_held_out(s) for s in sample(3000, seeded(1), held_out=None)) / 3000
    assert 0.2 < mixed < 0.45
    # Each kind and each sky still occurs in training, and so does each colour and each place.
    assert {k for k, _ in world.HELD_OUT_THINGS} == set(KINDS)
    assert {c for _, c in world.HELD_OUT_THINGS} == set(COLOURS)
    seen = {(t.kind, t.colour) for s in sample(6000, seeded(2)) for t in s.things}
    assert seen == {(k, c) for k in KINDS for c in COLOURS} - world.HELD_OUT_THINGS
    views = {(s.sky, s.place) for s in sample(3000, seeded(2))}
    assert views == {(s, p) for s in SKIES for p in PLACES} - world.HELD_OUT_VIEWS


def test_the_number_of_things_can_be_chosen():
    for count in (0, 1, 2):
        scenes = sample(40, seeded(7), things=(count,))
        assert {len(s.things) for s in scenes} == {count}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Scene("fog"), "unknown sky 'fog': expected one of noon"),
        (lambda: Scene(place="city"), "unknown place 'city'"),
        (lambda: Thing("dragon", "red"), "unknown kind of thing 'dragon'"),
        (lambda: Thing("house", "mauve"), "unknown colour 'mauve'"),
        (lambda: Thing("house", "red", x=0.0), "from 0.15 to 0.85"),
        (lambda: Thing("house", "red", size=float("nan")), "from 0.25 to 0.6"),
        (lambda: Scene(place="sea", stream=True), "no stream runs through a 'sea'"),
        (lambda: Scene(things=(Thing("cat", "red"),) * 3), "at most 2 things, got 3"),
        (lambda: Scene(things=(Thing("cat", "red"),) * 2), "left and right, in this order"),
        (lambda: sample(-1, seeded()), "n >= 0"),
        (lambda: sample(1, seeded(), things=(3,)), "things from"),
        (lambda: caption(Scene(), 0.5), "give a generator"),
        (lambda: caption(Scene(), 1.5, seeded()), "probability from 0 to 1"),
        (lambda: render(Scene(), 0), "whole number of pixels"),
        (lambda: render(Scene(), 48), "must divide it"),
        (lambda: render(Scene(), 4096), "from 4 to 2048"),
    ],
)
def test_bad_input_gets_one_clear_error(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="draws Scene objects, got str"):
        render(["a red house"])
    with pytest.raises(TypeError, match="reads a string, got int"):
        parse(3)


# ---------------------------------------------------------------- words


def test_ten_thousand_complete_captions_are_read_back_whole():
    g = seeded(11)
    for scene in sample(10_000, g, held_out=None):
        text = caption(scene, 1.0, g)
        assert parse(text) == scene.facts(), text


def test_incomplete_captions_say_exactly_what_they_say():
    g = seeded(12)
    lengths = {}
    for scene in sample(3000, g, held_out=None):
        for completeness in (0.0, 0.3, 0.7):
            said = scene.facts().thinned(completeness, g)
            assert len(said) >= 1 and said.holds_for(scene.facts())
            text = write(said, g)
            assert parse(text) == said, text
            lengths.setdefault(completeness, []).append(len(said) / len(scene.facts()))
    means = [sum(v) / len(v) for v in lengths.values()]
    assert means == sorted(means)


def test_every_single_fact_can_be_said_alone():
    alone = [Facts(sky=s) for s in SKIES] + [Facts(place=p) for p in PLACES] + [Facts(stream=True)]
    alone += [Facts(things=(ThingFacts(k),)) for k in KINDS]
    alone += [Facts(things=(ThingFacts("cat", c),)) for c in COLOURS]
    alone += [Facts(things=(ThingFacts("cat", None, p),)) for p in world.POSITIONS]
    for facts in alone:
        for seed in range(20):
            assert parse(write(facts, seeded(seed))) == facts


def test_the_sentence_that_this_book_starts_from():
    facts = parse("a stream flowing through the woods")
    assert facts == Facts(place="woods", stream=True)
    assert write(facts) == "a stream flowing through the woods"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", Facts()),
        ("colourless green ideas sleep furiously", Facts()),
        ("A RED HOUSE, at sunset!", Facts("dusk", things=(ThingFacts("house", "red"),))),
        (
            "two friends: a blue cat (left of) an orange kitten. It is raining.",
            Facts(
                "rain",
                things=(ThingFacts("cat", "blue", "left"), ThingFacts("cat", "orange", "right")),
            ),
        ),
        (
            "a green tree to the right of a pink tent below a green aurora",
            Facts(
                "aurora",
                things=(ThingFacts("tree", "green", "right"), ThingFacts("tent", "pink", "left")),
            ),
        ),
        ("the forest at midnight", Facts("night", "woods")),
        ("a carpet and a category", Facts()),  # only whole words count
        ("a hot air balloon on the beach", Facts(None, "sea", things=(ThingFacts("balloon"),))),
        ("noon or night", Facts("noon")),
    ],
)
def test_free_text_is_read_as_a_person_would(text, facts):
    assert parse(text) == facts


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_read(text):
    facts = parse(text)
    assert parse(text.upper().lower()).holds_for(facts) or text.upper().lower() != text.lower()


def test_facts_hold_whatever_the_order_of_things():
    red, blue = ThingFacts("house", "red", "left"), ThingFacts("house", "blue", "right")
    seen = Facts("noon", "sea", things=(red, blue))
    assert Facts(things=(blue, red)) == Facts(things=(red, blue))
    assert Facts(things=(ThingFacts("house", "blue"), ThingFacts("house"))).holds_for(seen)
    assert not Facts(things=(ThingFacts("house", "blue", "left"),)).holds_for(seen)  # swapped
    assert not Facts(things=(ThingFacts("house", "blue"), ThingFacts("house", "blue"))).holds_for(
        seen
    )
    assert not Facts(stream=True).holds_for(seen)
    assert not Facts(things=(red, blue)).holds_for(Facts(things=(red,)))
    assert Facts().holds_for(seen)


# ---------------------------------------------------------------- pictures


def test_a_picture_depends_on_its_scene_alone():
    scenes = sample(40, seeded(21), held_out=None)
    together = render(scenes)
    assert together.shape == (40, 3, 64, 64) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1
    for i in (0, 7, 39):
        torch.testing.assert_close(render(scenes[i])[0], together[i], atol=2e-6, rtol=0)
    flipped = render(scenes[::-1]).flip(0)
    torch.testing.assert_close(flipped, together, atol=2e-6, rtol=0)
    assert render([]).shape == (0, 3, 64, 64)


def test_every_size_shows_the_same_scene():
    scenes = sample(12, seeded(22))
    large, middle, small = (render(scenes, size) for size in (256, 64, 16))
    pool = torch.nn.functional.avg_pool2d
    assert torch.equal(small, pool(middle, 4))
    assert (pool(large, 4) - middle).abs().mean() < 0.012
    # Not so for two different scenes.
    assert (pool(large, 4) - middle.roll(1, 0)).abs().mean() > 0.1


def test_the_seed_changes_what_no_caption_says():
    scene = Scene("noon", "meadow", things=(Thing("house", "red"),), seed=1)
    other = replace(scene, seed=2)
    assert scene.facts() == other.facts() and caption(scene) == caption(other)
    assert (render(scene) - render(other)).abs().mean() > 0.01


def test_without_specks_all_else_is_the_same():
    bare = [
        Scene(sky, place, seed=k)
        for k, sky in enumerate(("noon", "dusk"))
        for place in ("desert", "woods", "snow", "mountains")
    ]
    assert torch.equal(render(bare), render(bare, specks=False))
    rich = [
        Scene("night", "desert"), Scene("aurora", "snow"), Scene("rain", "mountains"),
        Scene("noon", "meadow"), Scene("dusk", "sea"), Scene("noon", "woods", stream=True),
    ]  # fmt: skip
    rich = [replace(scene, seed=k) for scene in rich for k in range(5)]
    apart = (render(rich) - render(rich, specks=False)).abs().amax(1)
    for scene, changed in zip(rich, apart > 0.02, strict=True):
        spots, sizes = np.unique(label(changed.numpy(), connectivity=1), return_counts=True)
        assert len(spots) > 5, f"{scene}: hardly anything was left out"
        assert sizes[spots > 0].max() <= 32, f"{scene}: more was left out than specks"
        assert changed.float().mean() < 0.15


def test_each_fact_changes_the_picture():
    base = Scene("noon", "meadow", False, (Thing("house", "red"),), seed=5)
    changes = [replace(base, sky=s) for s in SKIES[1:]] + [
        replace(base, place=p) for p in PLACES[1:]
    ]
    changes += [replace(base, stream=True)]
    changes += [replace(base, things=(Thing(k, "red"),)) for k in KINDS[1:]]
    changes += [replace(base, things=(Thing("house", c),)) for c in COLOURS[1:]]
    changes += [replace(base, things=(Thing("house", "red", x),)) for x in (0.25, 0.75)]
    pictures = render([base, *changes])
    far = (pictures[1:] - pictures[:1]).abs().mean(dim=(1, 2, 3))
    assert far.min() > 0.005


def test_a_stream_flowing_through_the_woods_is_water():
    dry = Scene("noon", "woods", seed=9)
    with_stream, without = render(replace(dry, stream=True), 256)[0], render(dry, 256)[0]
    changed = (with_stream - without).abs().sum(0) > 0.05
    blue = (with_stream[2] > with_stream[0] + 0.15) & (with_stream[2] > with_stream[1])
    assert 0.02 < changed.float().mean() < 0.25
    assert blue[changed].float().mean() > 0.6
    rows = changed.any(1).nonzero().flatten()  # from the edge of the woods to the lower edge
    assert rows.min() / 256 < 0.65 and rows.max() == 255
    assert changed[-1].sum() > 3 * changed[int(0.64 * 256)].sum()  # and it widens


def test_a_painted_disc_covers_its_area():
    for size in (16, 64, 256):
        at = (torch.arange(size) + 0.5) / size
        canvas = draw.Canvas(
            torch.zeros(1, 3, size, size), at.view(1, 1, -1), at.view(1, -1, 1), 1 / size
        )
        canvas.paint(draw.circle(canvas.x - 0.5, canvas.y - 0.47, 0.3), torch.ones(3))
        area = canvas.colours[0, 0].mean().item()
        assert area == pytest.approx(math.pi * 0.3**2, rel=0.01)


def test_shapes_are_distances():
    x = torch.tensor([0.0, 2.0, 0.0, 4.0])
    y = torch.tensor([0.0, 0.0, 3.0, 5.0])
    assert draw.circle(x, y, 1.0).tolist() == [-1, 1, 2, pytest.approx(math.hypot(4, 5) - 1)]
    assert draw.box(x, y, 1.0, 2.0).tolist() == [-1, 1, 1, pytest.approx(math.hypot(3, 3))]
    square = draw.convex(x, y, (-1, -1), (1, -1), (1, 1), (-1, 1))
    assert square[:3].tolist() == [-1, 1, 2]
    assert draw.line(x, y, (0, 0), (2, 0), 0.5).tolist()[:3] == [-0.5, -0.5, 2.5]


def test_chance_in_pictures_is_even():
    chance = draw.Chance(range(400))
    cells = torch.arange(100).view(1, 10, 10).float()
    values = chance.at(cells, 3).flatten().numpy()
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert values.min() >= 0 and values.max() < 1
    assert ((counts - 2000) ** 2 / 2000).sum() < 60  # chi-square, 19 degrees of freedom
    both = np.corrcoef(chance.at(cells, 3).flatten(), chance.at(cells + 1, 3).flatten())[0, 1]
    assert abs(both) < 0.03


def test_colours_stay_apart_for_colour_blind_readers():
    from colorspacious import cspace_convert
    from skimage.color import deltaE_ciede2000, rgb2lab

    paint = np.array([draw.PAINT[c].tolist() for c in COLOURS])
    for sight in (None, "deuteranomaly", "protanomaly"):
        seen = paint
        if sight:
            space = {"name": "sRGB1+CVD", "cvd_type": sight, "severity": 100}
            seen = np.clip(cspace_convert(paint, space, "sRGB1"), 0, 1)
        lab = rgb2lab(seen[None])[0]
        apart = deltaE_ciede2000(lab[:, None], lab[None])
        assert apart[~np.eye(8, dtype=bool)].min() >= 15, sight


def test_names_at_the_door():
    assert storybook.render is render and storybook.parse is parse
