"""What a place says of two things: made readings whose counts are known, and a tiny whole."""

import numpy as np
import pytest
import torch

from companion import doubles
from companion.doubles import COLUMN, SAYINGS
from companion.recipes.decoder import Decoder
from companion.storybook import COLOURS, KINDS, POSITIONS, Facts, Scene, Thing, ThingFacts, sample

TWO = Scene(
    "noon", "meadow", things=(Thing("house", "red", 0.25), Thing("tree", "blue", 0.75))
)  # fmt: skip


def seen(*things: tuple[str, str, str]) -> Facts:
    return Facts("noon", "meadow", things=tuple(ThingFacts(*thing) for thing in things))


AS_IT_WAS = seen(("house", "red", "left"), ("tree", "blue", "right"))
SIDES = seen(("tree", "blue", "left"), ("house", "red", "right"))
OWNERS = seen(("house", "blue", "left"), ("tree", "red", "right"))
TWICE = seen(("house", "red", "left"), ("house", "blue", "right"))
STRANGER = seen(("boat", "red", "left"), ("tree", "red", "right"))
ALONE = seen(("house", "red", "left"))


def test_what_is_true_of_a_scene():
    row = doubles.true_of([TWO])[0]
    true = {saying for saying, value in zip(SAYINGS, row, strict=True) if value}
    assert true == {
        "house", "tree", "red", "blue", ("house", "red"), ("tree", "blue"),
        ("house", "left"), ("tree", "right"),
    }  # fmt: skip
    assert len(SAYINGS) == len(COLUMN) == len(KINDS) * (1 + len(COLOURS) + 3) + len(COLOURS)
    assert doubles.true_of([Scene("noon", "sea")]).sum() == 0


def test_beliefs_are_counted_thing_by_thing_and_scene_by_scene():
    sure = 2.0 * doubles.true_of([TWO, TWO, TWO, TWO]) - 1
    sure[1, COLUMN["boat"]] = 9  # pushes one of the two kinds out
    for saying in (("house", "blue"), ("tree", "red")):
        sure[2, COLUMN[saying]] = 2
    sure[3, COLUMN["tree", "left"]] = 9
    found = doubles.of_two(sure, [TWO] * 4)
    assert [(cell["value"], cell["n"]) for cell in found.values()] == [
        (7 / 8, 8), (1, 8), (3 / 4, 4), (3 / 4, 4)
    ]  # fmt: skip
    assert list(found) == ["kinds", "colours", "whose colour", "which side"]


def test_drawings_are_sorted_by_what_became_of_two_things():
    read = [AS_IT_WAS, SIDES, OWNERS, TWICE, STRANGER, ALONE, None]
    found = doubles.of_drawings(read, [TWO] * len(read))
    value = {name: (round(cell["value"] * cell["n"]), cell["n"]) for name, cell in found.items()}
    assert value == {
        "kinds, both": (3, 7), "kinds, one twice": (1, 7), "kinds, a stranger": (1, 7),
        "colours, both": (4, 7), "colours, one twice": (1, 7), "colours, a stranger": (0, 7),
        "not two things": (2, 7),
        "whose colour": (2, 3),  # of the pictures with both kinds and both colours
        "which side": (2, 3),  # of those with both kinds
    }  # fmt: skip
    assert "whose colour" not in doubles.of_drawings([ALONE], [TWO])


def test_the_nearest_of_several_is_taken():
    g = torch.Generator().manual_seed(0)
    wanted = torch.randn(5, 8, generator=g)
    mean, std = torch.randn(8, generator=g), torch.rand(8, generator=g) + 0.5
    there = torch.randn(3, 5, 8, generator=g)
    for b, k in enumerate((2, 0, 1, 1, 2)):  # the same direction from the mean, another length
        there[k, b] = mean + 0.3 * (wanted[b] - mean)
    drawn = torch.arange(15.0).view(3, 5, 1, 1, 1)
    best = doubles.chosen(drawn, there, wanted, mean, std)
    assert best.flatten().tolist() == [10.0, 1.0, 7.0, 8.0, 14.0]


def test_the_small_network_reads_places_that_say_it():
    """Places in which each saying has an axis, but sides, which no axis tells."""
    scenes = sample(4000, torch.Generator().manual_seed(1))
    true = torch.tensor(doubles.true_of(scenes)[:, : -len(KINDS) * len(POSITIONS)]).float()
    g = torch.Generator().manual_seed(2)
    mixing = torch.randn(true.shape[1], 128, generator=g) / 4
    places = true @ mixing + 0.05 * torch.randn(4000, 128, generator=g)
    reader = doubles.Sayings(places[:3500], scenes[:3500])
    two = [i for i in range(3500, 4000) if len(scenes[i].things) == 2]
    two = [i for i in two if len({t.kind for t in scenes[i].things}) == 2]
    two = [i for i in two if len({t.colour for t in scenes[i].things}) == 2]
    odds = reader.odds(places[two])
    assert np.isfinite(odds).all() and odds.shape == (len(two), len(SAYINGS))
    found = doubles.of_two(odds, [scenes[i] for i in two])
    assert found["kinds"]["value"] > 0.95 and found["colours"]["value"] > 0.95
    assert found["whose colour"]["value"] > 0.85
    assert 0.3 < found["which side"]["value"] < 0.7


@pytest.mark.slow
def test_doubles_at_tiny_effort():
    found = doubles.doubles(n=6, fitted=200, varied=4, tries=2)
    assert list(found["said"]) == ["kinds", "colours", "whose colour", "which side"]
    assert found["said"]["kinds"]["n"] == 12 and found["said"]["whose colour"]["n"] == 6
    for way in ("one", "the nearest"):
        assert found["drawn"][way]["kinds, both"]["n"] == 6
        assert found["kept"][way]["place"]["n"] == 4


@pytest.mark.slow
def test_the_decoder_taught_on_at_tiny_effort(tmp_path):
    found = doubles.decoder_longer(steps=2, n=4, varied=3, tried=2, out=tmp_path / "longer")
    assert found["told"]["as chosen"]["n"] == 3 * 2
    assert found["steps"] == 2 and found["kept"]["place"]["n"] == 3
    assert found["drawn"]["kinds, both"]["n"] == 4
    before, after = (
        Decoder.from_pretrained(),
        Decoder.from_pretrained(tmp_path / "longer" / "final"),
    )
    apart = [
        (a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert 0 < max(apart) < 0.05, "it did not start from the shipped weights"
