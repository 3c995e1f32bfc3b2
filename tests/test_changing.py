"""Chapter 9's measurements: each part held to the system's own methods, or to another library."""

import math

import numpy as np
import pytest
import tiny
import torch
from scipy.spatial import geometric_slerp
from skimage.metrics import peak_signal_noise_ratio
from sklearn.decomposition import PCA

from companion import changing, measure
from companion.adm import ADMUNet
from companion.changing import CHANGES, answers, cases, changed, decode, halves, sides, verdicts
from companion.dalle2 import SCHEDULERS
from companion.recipes import upsamplers
from companion.schedule import Schedule
from companion.scheduler import Scheduler
from companion.scores import interval
from companion.storybook import Facts, Scene, Thing, ThingFacts, is_held_out, parse, sample


def gen(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(monkeypatch):
    """A tiny system whose upsampler hands on what the decoder drew."""
    pipe = tiny.dalle2(second=False)
    monkeypatch.setattr(pipe, "draw_large", lambda x, *_: x)
    return pipe


def images(n: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8, generator=gen(seed))


# --- two halves, in batches ----------------------------------------------------------------------


def test_batches_are_the_systems_variations(pipe, monkeypatch):
    monkeypatch.setattr(changing, "PART", 2)
    x = images(2)
    places = changing.see(pipe, x)
    any_noise = decode(pipe, places, scale=3.0, steps=5, seed=7)
    wanted = pipe.variations(x, guidance_scale=3.0, steps=(5, 2), seed=7)
    torch.testing.assert_close(any_noise, wanted)
    place, noise = halves(pipe, x, steps=5)
    torch.testing.assert_close(place, places)
    for eta in (0.0, 0.5):
        got = decode(pipe, place, noise, eta=eta, steps=5, seed=7)
        torch.testing.assert_close(got, pipe.variations(x, eta=eta, steps=(5, 2), seed=7))
    three = halves(pipe, images(3), steps=5)  # a part of two and one of one
    assert all(len(half) == 3 for half in three)
    alone = halves(pipe, images(3)[2:], steps=5)
    torch.testing.assert_close(three[1][2:], alone[1], rtol=1e-4, atol=1e-4)
    whole = decode(pipe, *three, steps=5)
    torch.testing.assert_close(whole[2:], decode(pipe, *alone, steps=5), rtol=1e-4, atol=1e-4)


def test_places_turn_as_text_diff_turns_them(pipe, monkeypatch):
    seen, small = [], pipe.draw_small
    monkeypatch.setattr(pipe, "draw_small", lambda z, *a, **k: seen.append(z) or small(z, *a, **k))
    said = [("a red house", "the sea"), ("the sea", "a red house")]
    x = images(2)
    got = changing.turned(pipe, changing.see(pipe, x), said, 0.3)
    for row, image, (before, after) in zip(got, x, said, strict=True):
        pipe.text_diff(image[None], before, after, 2, theta=0.3, steps=(4, 2), seed=1)
        torch.testing.assert_close(row, seen[-1][-1])
        z = pipe.encode_image(image[None]).double().numpy()[0]
        t = pipe.encode_prompts([after, before]).embedding.double().numpy()
        t = t / np.linalg.norm(t, axis=1, keepdims=True)
        d = t[0] - t[1]
        units = z / np.linalg.norm(z), d / np.linalg.norm(d)
        turned = np.linalg.norm(z) * geometric_slerp(*units, [0.3])[0]
        torch.testing.assert_close(row.double(), torch.from_numpy(turned), rtol=1e-4, atol=1e-4)


def test_fewer_components_as_another_library_finds_them():
    known = torch.randn(300, 6, generator=gen()) * torch.tensor([1.0, 5, 2, 0.3, 3, 0.1]) + 1
    places = torch.randn(4, 6, generator=gen(5))
    mean, variances, columns = changing.axes(known)
    for k in (1, 3, 6):
        theirs = PCA(k).fit(known.numpy())
        wanted = theirs.inverse_transform(theirs.transform(places.numpy()))
        got = changing.reduced(places, mean, columns, k)
        torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-4, atol=1e-4)
        share = (variances[:k].sum() / variances.sum()).item()
        assert share == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-5)
    assert torch.equal(changing.reduced(places, mean, columns, 0), mean.expand(4, -1))


def test_how_far_pictures_lie_apart():
    a, b = torch.rand(2, 3, 3, 8, 8, generator=gen())
    for x, y, found in zip(a, b, changing.psnr(a, b), strict=True):
        wanted = peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1.0)
        assert found.item() == pytest.approx(wanted, rel=1e-5)
    assert changing.apart(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)).item() == 0.5


def test_the_upsampler_is_asked_as_its_recipe_asks_it(monkeypatch):
    """On a picture that is not square too, and of another size than it was trained at."""
    unet = tiny.lively(ADMUNet(upsamplers.FIRST.config))
    pipe = tiny.dalle2(second=False)
    pipe.super_res_first = pipe.super_res_last = unet
    pipe.super_res_scheduler = Scheduler.of(Schedule.cosine(), SCHEDULERS["super_res_scheduler"])
    monkeypatch.setitem(type(pipe).walks, "upsampler", ("super_res_first", upsamplers.STEPS))
    small = torch.rand(1, 3, 8, 12, generator=gen())
    got = changing.enlarge(pipe, small, seed=4)
    assert got.shape == (1, 3, 32, 48)
    torch.testing.assert_close(got, upsamplers.upsample(unet, small, gen(4)), atol=1e-4, rtol=0)


# --- what can be read ----------------------------------------------------------------------------

HOUSE = Facts("noon", "sea", False, (ThingFacts("house", "red", "left"),))


def test_answers_and_sides_by_hand():
    assert answers(HOUSE) == {
        "sky": "noon", "place": "sea", "stream": False, "kind left": "house",
        "colour left": "red", "kind middle": "nothing", "kind right": "nothing",
    }  # fmt: skip
    other = Facts("night", "sea", False, (ThingFacts("boat", "blue", "right"),))
    # They differ in sky, and in what is on the left and on the right; no place has two colours.
    third = Facts("night", "snow", False, (ThingFacts("house", "blue", "left"),))
    found = sides(third, HOUSE, other)
    assert found == pytest.approx({"of a": 2 / 3, "of b": 1 / 3, "of neither": 0.0})
    assert sides(None, HOUSE, other) == {"of a": 0, "of b": 0, "of neither": 1}
    assert sides(HOUSE, HOUSE, other)["of a"] == sides(other, HOUSE, other)["of b"] == 1
    blue = Facts("noon", "sea", False, (ThingFacts("house", "blue", "left"),))
    assert sides(blue, HOUSE, blue) == {"of a": 0, "of b": 1, "of neither": 0}
    with pytest.raises(ValueError, match="nothing tells them apart"):
        sides(None, HOUSE, HOUSE)


def test_cases_change_one_fact_and_are_known_to_the_training():
    for seed, change in enumerate(CHANGES):
        found = cases(40, change, seed)
        assert len(found) == 40 and found == cases(40, change, seed)
        for old, new in found:
            one, other = answers(old.facts()), answers(new.facts())
            differ = [k for k in one if one[k] != other[k]]
            assert [(one[k], other[k]) for k in differ] == [change[1:]]
            assert not is_held_out(old) and not is_held_out(new)
            before, after = changing.spoken(old, new, change)
            assert (parse(before), parse(after)) == (old.facts(), new.facts())
    tree = Scene(things=(Thing("tree", "red"),))
    assert changed(tree, "colour", "red", "blue") is None, "no training saw a blue tree"
    two = Scene(things=(Thing("car", "red", 0.26), Thing("cat", "blue", 0.74)))
    assert changed(two, "colour", "red", "blue") is None
    assert changed(tree, "sky", "night", "noon") is None


def test_a_change_counts_only_if_nothing_else_changed():
    old = Scene("noon", "meadow", things=(Thing("house", "red", 0.25),))
    new = changed(old, "colour", "red", "blue")
    seen = [
        new.facts(),  # right
        old.facts(),  # nothing happened
        Facts("night", "meadow", False, (ThingFacts("house", "blue", "left"),)),
        Facts("noon", "meadow", False, (ThingFacts("car", "blue", "left"),)),
        Facts("noon", "meadow", False, (ThingFacts("house", "blue", "right"),)),
        None,
    ]
    n = len(seen)
    found = verdicts(seen, [old] * n, [new] * n)
    assert found["changed"] == interval(3, n)
    assert found["the rest stayed"] == interval(2, n)
    assert found["both"] == interval(1, n) and found["no scene"] == interval(1, n)
    more = Facts("noon", "meadow", False, (*new.facts().things, ThingFacts("cat", "red", "right")))
    assert verdicts([more], [old], [new])["both"]["value"] == 0, "a thing too many"
    assert changing.together([interval(1, 4), interval(3, 6)]) == interval(4, 10)


def test_marks_are_shares_with_intervals():
    scenes = sample(6, gen(), things=(1,))
    read = [s.facts() for s in scenes[:4]] + [None, scenes[5].facts()]
    found = changing.marks(read, scenes)
    assert found["all"] == interval(5, 6) and found["no scene"] == interval(1, 6)
    assert found["kind"] == found["position"] == interval(5, 6)
    two = Scene(things=(Thing("car", "red", 0.26), Thing("cat", "blue", 0.74)))
    other = Facts("noon", "meadow", False, (ThingFacts("cat", "blue", "left"),
                                            ThingFacts("car", "red", "right")))  # fmt: skip
    moved = changing.marks([other], [two])
    assert moved["kind"]["value"] == moved["colour"]["value"] == 1
    assert moved["position"]["value"] == moved["all"]["value"] == 0


# --- the tables ----------------------------------------------------------------------------------


@pytest.mark.slow  # each draws a few pictures with the shipped networks
@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("variations", {"n": 3, "swept": 3, "inverted": 2, "crossed": 2, "scales": (2.0,),
                        "etas": (0.0, 1.0), "walks": (5,)}),
        ("interpolations", {"n": 2, "shares": (0.0, 1.0)}),
        ("text-diffs", {"n": 2, "tuned": 2, "thetas": (0.3,)}),
        ("principal-components", {"n": 2, "components": (0, 128)}),
    ],
)  # fmt: skip
def test_tables_are_what_their_code_measures(name, small):
    entry, stored = measure.measurements()[name], measure.load(name)
    found = entry.run(**small)
    assert set(found) <= set(stored) and found["seeds"] == stored["seeds"]
    assert set(found["rows"]) <= set(stored["rows"])
    for row, cells in found["rows"].items():
        assert set(cells) <= set(stored["rows"][row]), row
    if name == "variations":
        # From its own noise and place a picture comes back, and the judge reads what is there.
        assert found["rows"]["eta = 0"]["distance"]["value"] < 0.05
        assert all(found["rows"]["the picture"][k]["value"] == 1 for k in ("sky", "place", "kind"))
        assert math.isclose(found["rows"]["the picture"]["distance"]["value"], 0.0)
    if name == "interpolations":
        first, last = found["rows"]["own noise, along the arc"]["ways"]
        assert first["of a"]["value"] > 0.9 and last["of b"]["value"] > 0.9
    if name == "text-diffs":
        for cells in found["rows"].values():
            assert (
                cells["theta = 0"]["changed"]["value"]
                < cells["theta = 0"]["the rest stayed"]["value"]
            )
    if name == "principal-components":
        assert found["rows"]["128"]["variance"]["value"] == pytest.approx(1)
