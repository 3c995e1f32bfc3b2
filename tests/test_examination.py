"""The examination: true pictures get full marks, wrong ones what they deserve."""

import pytest
import torch

from companion import examination
from companion.prompts import prompts
from companion.storybook import Facts, render
from companion.storybook.scene import ThingFacts


@pytest.fixture(scope="module")
def asked():
    return [p for p in prompts() if len(p.facts.things) == 1 and not p.held_out][:24]


def true(asked, generator):
    return render([p.scene for p in asked], 64)


def test_the_truth_gets_full_marks_and_the_wrong_pictures_do_not(asked):
    ways = {"right": true, "wrong": lambda a, g: true(a, g).roll(1, 0)}
    found = examination.examine(ways, asked)
    for name in ("true pictures", "right"):
        assert found[name]["marks"]["one thing"]["value"] == 1
        assert found[name]["judges agree on facts"]["value"] > 0.99
        assert found[name]["Fréchet distance"] == pytest.approx(0, abs=1e-3)
        assert abs(found[name]["wholly right, second judge less first"]) <= 1 / 24
    assert found["wrong"]["marks"]["one thing"]["value"] < 0.3
    # the same pictures in another order: as a set they are as near as the truth itself
    assert found["wrong"]["Fréchet distance"] == pytest.approx(0, abs=1e-3)


def test_noise_is_no_scene(asked):
    noise = {"noise": lambda a, g: torch.rand(len(a), 3, 64, 64, generator=g)}
    found = examination.examine(noise, asked)["noise"]
    assert found["marks"]["no scene"]["value"] == 1 and found["marks"]["one thing"]["value"] == 0
    assert found["Fréchet distance"] > 10


def test_ways_are_asked_part_by_part_from_one_seed(asked):
    seen = []

    def draw(part, generator):
        seen.append(len(part))
        return torch.rand(len(part), 1, generator=generator)

    many = asked * 5
    a, b = (examination.in_parts(draw, many) for _ in range(2))
    assert torch.equal(a, b) and len(a) == 120 and seen == [50, 50, 20] * 2


def test_agreement_counts_facts():
    a = Facts("noon", "sea", False, (ThingFacts("house", "red", "left"),))
    b = Facts("noon", "sea", False, (ThingFacts("house", "blue", "left"),))
    assert examination.agreement([a], [a]) == [True] * 7
    assert examination.agreement([a], [b]).count(False) == 1
    assert examination.agreement([a, None], [None, None]) == [False, True]


def test_variety_is_counted_where_prompts_leave_things_open(monkeypatch):
    loose = examination.loose(prompts(), 3)
    assert len(loose) == 3 and all(None in (p.facts.sky, p.facts.place) for p in loose)
    monkeypatch.setattr(examination, "EACH", 12)
    one = examination.varied(lambda a, g: true(a[:1], g).expand(len(a), -1, -1, -1), loose)
    assert one and all(x["possibilities"] == pytest.approx(1) for x in one.values())
