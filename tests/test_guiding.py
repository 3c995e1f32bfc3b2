"""Guidance of both kinds against exact answers, and the marks against cases counted by hand."""

import math
from functools import partialmethod

import pytest
import torch

from companion import samplers
from companion.diffusion import GaussianMixture
from companion.guidance import classifier_guided, gradient
from companion.guiding import (
    REQUESTS,
    Guided,
    Requests,
    askable,
    blocked,
    compare,
    examined,
    fitting,
    guidance_bill,
    mean,
    openness,
    small,
    verdicts,
)
from companion.prompts import Prompt, prompts, shares_right
from companion.recipes.decoder import Decoder
from companion.recipes.noised import NoisedClassifier, NoisedClassifierConfig
from companion.schedule import Schedule
from companion.storybook import Facts, Scene, Thing, ThingFacts, is_held_out, parse

SCHEDULE = Schedule.cosine()


def cloud(*means, weights=None):
    n = len(means)
    weights = [1 / n] * n if weights is None else weights
    return GaussianMixture(
        torch.tensor(means, dtype=torch.float64),
        torch.linspace(0.3, 0.5, n, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
    )


BOTH = cloud([-1.0, 0.4], [1.0, 0.2], weights=[0.7, 0.3])
ONE = GaussianMixture(BOTH.means[1:], BOTH.stds[1:], torch.ones(1, dtype=torch.float64))


def belief(x, t):
    """log p(second cloud | x at t), by Bayes' rule on the densities."""
    return math.log(0.3) + ONE.log_prob(x, t, SCHEDULE) - BOTH.log_prob(x, t, SCHEDULE)


X = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([3, 100, 300, 500, 700, 900, 990])


def denoise(x, t):
    return BOTH.denoise(x, t, SCHEDULE)


def test_a_perfect_classifier_turns_the_crowd_into_the_one():
    """With scale 1, and both exact, the guided denoiser is that of the wanted cloud alone."""
    guided = classifier_guided(denoise, belief, 1.0, SCHEDULE)
    wanted = ONE.denoise(X, T, SCHEDULE)
    assert not torch.allclose(denoise(X, T), wanted, atol=0.1)
    assert torch.allclose(guided(X, T), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("s", [0.0, 0.5, 3.0])
def test_both_kinds_of_guidance_are_one_where_everything_is_exact(s):
    """s on the untold by a classifier is s = 1 + w on the told without one."""
    told, untold = ONE.denoise(X, T, SCHEDULE), denoise(X, T)
    guided = classifier_guided(denoise, belief, s, SCHEDULE)(X, T)
    assert torch.allclose(guided, untold + s * (told - untold), rtol=0, atol=1e-7)


def test_a_fraction_passes_through():
    guided = classifier_guided(lambda x, t: (denoise(x, t), x * 2), belief, 1.0, SCHEDULE)
    x0, fraction = guided(X, T)
    assert torch.equal(fraction, X * 2)
    assert torch.allclose(x0, ONE.denoise(X, T, SCHEDULE), rtol=0, atol=1e-8)


def test_sampling_with_a_perfect_classifier_gives_the_one_cloud():
    start = torch.randn(500, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ts = samplers.timesteps("ddim", 100, SCHEDULE, "trailing")
    with torch.no_grad():  # as a sampler asks: the gradient has to be switched on within
        end = samplers.ddim(classifier_guided(denoise, belief, 1.0, SCHEDULE), start, ts, SCHEDULE)
    assert torch.allclose(end.mean(0), ONE.means[0], atol=0.08)
    assert torch.allclose(end.std(0), ONE.stds.expand(2), atol=0.06)


def test_the_gradient_is_the_finite_difference():
    push, step = gradient(belief, X, T), 1e-5
    for k in range(2):
        nudge = torch.zeros_like(X)
        nudge[:, k] = step
        slope = (belief(X + nudge, T) - belief(X - nudge, T)) / (2 * step)
        assert torch.allclose(push[:, k], slope, rtol=1e-5, atol=1e-6)
    assert not push.requires_grad


# --- requests and marks ---------------------------------------------------------------------------


def test_requests_say_two_things_that_were_not_held_out():
    assert len(set(REQUESTS)) == len(REQUESTS)
    for text in REQUESTS:
        assert len(askable(parse(text))) == 2 and not is_held_out(parse(text)), text


def test_what_a_classifier_can_be_asked():
    facts = Facts("dusk", None, things=(ThingFacts("boat", "red"),))
    assert askable(facts) == {"sky": "dusk", "kind": "boat"}
    assert askable(Facts(stream=True)) == {}


def test_fitting_scenes_fit_and_differ_in_the_rest():
    facts = parse("a cat in the snow")
    scenes = fitting(facts, 30, seed=1)
    assert len(scenes) == 30 and all(facts.holds_for(s.facts()) for s in scenes)
    assert len({s.sky for s in scenes}) > 2
    assert fitting(facts, 30, seed=1) == scenes != fitting(facts, 30, seed=2)
    assert small(scenes[:2]).shape == (2, 3, 16, 16)


def test_the_jackknife_of_a_mean_is_the_interval_of_the_block_means():
    """For a mean, leaving blocks out gives Student's interval of the blocks' means."""
    g = torch.Generator().manual_seed(4)
    values, blocks = torch.randn(60, generator=g, dtype=torch.float64), torch.arange(60) % 6
    got = blocked(lambda kept: values[kept].mean().item(), blocks)
    by_block = mean([values[blocks == k].mean().item() for k in range(6)])
    assert got == pytest.approx(by_block, abs=1e-12)
    assert got["low"] < got["value"] < got["high"]


def test_share_right_by_hand():
    things = Thing("house", "yellow", 0.26, 0.4), Thing("car", "green", 0.74, 0.4)
    text = "at night, a yellow house left of a green car in the snow"
    prompt = Prompt(text, Scene("night", "snow", things=things))
    seen = prompt.scene.facts()
    assert shares_right([prompt], [seen])[0] == 1.0
    assert shares_right([prompt], [None])[0] == 0.0
    # sky, place, and two times kind, colour, position: eight facts; one of them is wrong now
    other = Facts("noon", seen.place, seen.stream, seen.things)
    assert shares_right([prompt], [other])[0] == pytest.approx(7 / 8)
    alone = Prompt("a red boat", Scene("noon", "sea", things=(Thing("boat", "red", 0.5, 0.45),)))
    blue = Facts("noon", "sea", False, (ThingFacts("boat", "blue", "middle"),))
    assert shares_right([alone], [blue])[0] == pytest.approx(1 / 2)


def test_openness_by_hand():
    def boat(colour, place):
        return Facts("night", place, things=(ThingFacts("boat", colour, "left"),))

    read = [
        boat("red", "sea"),
        boat("red", "snow"),
        boat("blue", "sea"),
        boat("blue", "snow"),
        None,
    ]
    assert openness(read, parse("a boat at night")) == pytest.approx({"place": 2, "colour": 2})
    cat = Facts("night", "sea", things=(ThingFacts("cat", "pink", "left"), *read[0].things))
    found = openness([cat] * 3, parse("a boat at night"))  # the cat's colour is nobody's business
    assert found == pytest.approx({"place": 1, "colour": 1})
    found = openness([cat] * 3, parse("the sea at night"))
    assert found == pytest.approx({"kind": 2, "colour": 2})
    assert openness([None], parse("a boat at night")) == {"place": 1.0, "colour": 1.0}


@pytest.fixture(scope="module")
def asked():
    return Requests(("a boat at night", "a cat in the snow"), copies=12, reference=40)


def test_true_pictures_are_faithful_varied_and_near(asked):
    seen = asked.look(asked.true())
    assert sum(seen["right"]) >= 23  # of 24; the judge reads 16 pixels
    assert all(0.75 < share < 1.25 for share in seen["open"])
    same = asked.true()[:1].expand(12, -1, -1, -1)  # one boat at night, twelve times
    cat = asked.true()[12:13].expand(12, -1, -1, -1)
    dull = asked.look(torch.cat([same, cat]))
    assert dull["open"] == [0.0, 0.0] and sum(dull["right"]) >= 23
    near, far = (asked.distance(x["features"]) for x in (seen, dull))
    assert near["high"] < far["value"]
    gap = asked.farther(dull["features"], seen["features"])
    assert gap["value"] == pytest.approx(far["value"] - near["value"], abs=1e-9)


def test_the_sentences_follow_the_table(asked):
    """Three sets: true ones, the same single pictures over and over, and those of the other row."""
    true = asked.true()
    dull = torch.cat([true[:1].expand(12, -1, -1, -1), true[12:13].expand(12, -1, -1, -1)])
    wrong = true.roll(12, 0)
    wrong[0] = wrong[1]  # as a set they would be as near as the true ones
    seen = {"0": asked.look(wrong), "1": asked.look(true), "9": asked.look(dull)}
    table = compare(asked, seen, "1")
    rows = table["rows"]
    assert table["nearest"] == "1"
    assert rows["0"]["less faithful"]["value"] > 0.8 and set(rows["0"]["right"]) <= {"0", "1"}
    assert rows["9"]["farther"]["low"] > 0 and rows["1"]["farther"]["value"] == 0
    assert rows["9"]["variety lost"]["value"] > 0.7 and rows["1"]["variety lost"]["value"] == 0
    said = " ".join(verdicts(table))
    assert "the smallest scale that cannot be told from it is 1." in said
    assert "lowest at 1" in said and "than at 1 from 9 on" in said


def test_the_exam_of_true_pictures(asked):
    listed = [p for p in prompts() if not p.held_out][:18]
    pictures = small([p.scene for p in listed])
    found = examined(asked.judge, listed, pictures, pictures)
    assert found["facts"]["value"] > 0.97 and found["frechet"]["value"] < 1e-6
    assert found["everything said"]["value"] <= found["facts"]["value"]


# --- the decoder, with weights that mean nothing --------------------------------------------------


@pytest.fixture(scope="module")
def drawer():
    from companion.recipes.decoder import build
    from companion.recipes.encoded import Encoded, FrozenCLIP

    encoded = Encoded.__new__(Encoded)
    encoded.clip = FrozenCLIP.open()
    model, g = build(encoded), torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=g)
    return Guided(model, encoded.clip)


TEXTS, SEEDS = ["a boat at night", "a red house", "a stream in the woods"], [4, 5, 6]


def test_what_is_drawn_depends_on_scale_words_and_seed_only(drawer):
    assert isinstance(drawer.model, Decoder)
    one = drawer.draw(TEXTS, SEEDS, 3.0, steps=4)
    assert one.shape == (3, 3, 16, 16) and 0 <= one.min() and one.max() <= 1
    again = drawer.draw(TEXTS[1:], SEEDS[1:], 3.0, steps=4)
    assert torch.allclose(again, one[1:], atol=1e-4)
    for other in (
        drawer.draw(TEXTS[::-1], SEEDS, 3.0, steps=4)[:1],
        drawer.draw(TEXTS[:1], [9], 3.0, steps=4),
        drawer.draw(TEXTS[:1], SEEDS[:1], 1.0, steps=4),
        drawer.draw(TEXTS[:1], SEEDS[:1], 3.0, steps=4, null=["a house"]),
    ):
        assert not torch.allclose(other, one[:1], atol=1e-3)
    untold = drawer.draw(TEXTS, SEEDS, 0.0, steps=4)
    assert torch.equal(untold, drawer.draw(TEXTS[::-1], SEEDS, 0.0, steps=4))
    with pytest.raises(ValueError, match="expected 0, or a number of at least 1"):
        drawer.draw(TEXTS, SEEDS, 0.5)


def test_a_classifier_steers_and_scale_0_does_not(drawer):
    torch.manual_seed(0)
    classifier = NoisedClassifier(NoisedClassifierConfig(width=8)).eval()
    said = {"sky": "dusk", "kind": "boat"}
    left = drawer.steer(classifier, said, SEEDS, 0.0, steps=4)
    assert torch.allclose(left, drawer.draw(TEXTS, SEEDS, 0.0, steps=4), atol=1e-5)
    pushed = drawer.steer(classifier, said, SEEDS, 5.0, steps=4)
    assert not torch.allclose(left, pushed, atol=1e-2)


@pytest.mark.slow
def test_the_measurement_has_all_that_the_chapter_shows(drawer, monkeypatch):
    from companion import guiding

    torch.manual_seed(0)
    classifier = NoisedClassifier(NoisedClassifierConfig(width=8)).eval()
    monkeypatch.setattr(guiding, "Guided", lambda: drawer)
    monkeypatch.setattr(Guided, "walk", partialmethod(Guided.walk, steps=2))
    monkeypatch.setattr(NoisedClassifier, "from_pretrained", lambda: classifier)
    found = guidance_bill((0.0, 1.0, 3.0), (2.0,), copies=9, exam=12, ways=6, texts=REQUESTS[:2])
    assert list(found["words"]["rows"]) == ["0", "1", "3"]
    assert list(found["classifier"]["rows"]) == ["0", "2"]
    assert len(found["words"]["rows"]["3"]["right"]) == 9 * 2
    assert set(found["exam"]) == {"true", "0", "1", "3"}
    assert set(found["ways"]) == {"both", "a vector", "a row of tokens"}
    assert len(verdicts(found["words"])) == len(verdicts(found["classifier"])) == 3
