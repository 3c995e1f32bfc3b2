"""Chapter 7's room: what each way gives, that the noise is the same for all, paired intervals."""

import math
from dataclasses import replace

import pytest
import tiny_clip
import torch

from companion import checkpoints, mapping, prompts
from companion.judge import Judge
from companion.mapping import Ways, best_of, paired, straight_line
from companion.prompts import right
from companion.recipes import RECIPES, encoded, priors
from companion.recipes import decoder as decoders
from companion.recipes.encoded import Encoded
from companion.storybook import Facts, ThingFacts
from companion.train import build


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A tiny CLIP, and untrained networks on it, in place of what is shipped."""
    folder = tiny_clip.write(tmp_path_factory.mktemp("weights"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "WEIGHTS", folder)
        patch.setattr(encoded, "MEASURED", 128)
        data = Encoded(scenes=128)
        for name in ("prior", "prior-ar", "decoder"):
            torch.manual_seed(1)
            model = build(RECIPES[name], data)
            with torch.no_grad():  # "no picture" starts at 0, which would hide it
                if name == "decoder":
                    model.text_proj.learned_classifier_free_guidance_embeddings.normal_()
            model.save_pretrained(folder / name)
        yield data


@pytest.fixture(scope="module")
def ways(pool):
    return Ways(pool)


def test_each_way_gives_what_its_name_says(ways):
    words = ways.clip.read(["a red house", "at night", "the sea in the rain"])
    true = torch.randn(3, tiny_clip.WIDTH, generator=torch.Generator().manual_seed(2))
    place = {way: ways.places(way, words, 3, true=true) for way in mapping.WAYS}
    z = words.embedding
    assert torch.equal(place[mapping.OWN], z) and torch.equal(place[mapping.TRUE], true)
    step = ways.pictures.mean(0) - ways.captions.mean(0)
    torch.testing.assert_close(place[mapping.MOVED], z + step)
    line = z @ ways.line[:-1] + ways.line[-1]
    torch.testing.assert_close(place[mapping.LINE], line, rtol=1e-3, atol=1e-3)
    nowhere = ways.decoder.text_proj.learned_classifier_free_guidance_embeddings
    assert torch.equal(place[mapping.NOWHERE], nowhere.expand(3, -1)) and nowhere.abs().min() > 0
    null = ways.clip.read(["", "", ""])
    for way, model, draw in (
        (mapping.DIFFUSION, ways.diffusion, priors.draw_by_diffusion),
        (mapping.TOKENS, ways.tokens, priors.draw_by_tokens),
    ):
        g = torch.Generator().manual_seed(3)
        torch.testing.assert_close(place[way], draw(model, words, null, g), rtol=1e-4, atol=1e-4)
        guided = ways.places(way, words, 3, scale=4.0)
        other = ways.places(way, words, 4)
        assert not torch.allclose(guided, place[way]) and not torch.allclose(other, place[way])
    with pytest.raises(ValueError, match="true places are missing"):
        ways.places(mapping.TRUE, words, 0)
    with pytest.raises(ValueError, match="way"):
        ways.places("by magic", words, 0)


def test_all_ways_are_drawn_from_the_same_noise(ways, monkeypatch):
    """Whatever the place and whether the caption is told: the decoder's chance is the same."""
    seen = []

    def decode(model, place, words, null, generator, scale=None):
        seen.append((torch.randn(4, generator=generator), int(words.mask.sum())))
        return torch.zeros(len(place), 3, 16, 16)

    monkeypatch.setattr(mapping, "decode", decode)
    words = ways.clip.read(["a red house by the sea"])
    ways.draw(words.embedding, words, 5)
    ways.draw(words.embedding + 1, words, 5)
    ways.draw(words.embedding, words, 5, alone=True)
    ways.draw(words.embedding, words, 6)
    noise, told = zip(*seen, strict=True)
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[3])
    assert told[0] == told[1] > told[2] == 2


def test_the_straight_line_is_the_one_that_errs_least():
    g = torch.Generator().manual_seed(0)
    texts = torch.randn(60, 5, generator=g, dtype=torch.float64)
    texts[:, 4] = texts[:, 0] - texts[:, 1]  # a direction that says nothing new
    true = torch.randn(6, 7, generator=g, dtype=torch.float64)
    exact = texts @ true[:-1] + true[-1]
    line = straight_line(texts, exact)
    torch.testing.assert_close(texts @ line[:-1] + line[-1], exact)
    pictures = exact + torch.randn(60, 7, generator=g, dtype=torch.float64)
    line = straight_line(texts, pictures)
    left = pictures - (texts @ line[:-1] + line[-1])
    # what is left of a least-squares fit has mean 0 and nothing in common with what was given
    assert left.mean(0).abs().max() < 1e-9 and (texts.T @ left).abs().max() < 1e-9


def test_a_paired_interval():
    """Against the normal one, and against pairs that always agree or always differ."""
    g = torch.Generator().manual_seed(1)
    a = torch.rand(400, generator=g) < 0.6
    b = torch.where(torch.rand(400, generator=g) < 0.8, a, torch.rand(400, generator=g) < 0.3)
    found = paired(a.tolist(), b.tolist())
    d = a.double() - b.double()
    half = 1.96 * d.std().item() / 20
    assert found["value"] == pytest.approx(d.mean().item()) and found["n"] == 400
    assert found["low"] == pytest.approx(d.mean().item() - half, abs=0.006)
    assert found["high"] == pytest.approx(d.mean().item() + half, abs=0.006)
    apart = 1.96 * math.sqrt((a.double().var() + b.double().var()).item() / 400)
    assert found["high"] - found["low"] < 0.9 * 2 * apart, "pairing must make it narrower"
    same = paired([True, False, True], [True, False, True])
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    assert paired([True] * 5, [False] * 5)["low"] == 1
    with pytest.raises(ValueError, match="equal numbers"):
        paired([True], [True, False])


def test_the_best_of_several_has_the_largest_dot_product():
    g = torch.Generator().manual_seed(4)
    drawn, text = torch.randn(9, 4, 6, generator=g), torch.randn(9, 6, generator=g)
    drawn[:, 2] *= 5
    for many, said, kept in zip(drawn, text, best_of(drawn, text), strict=True):
        dots = [float(one @ said) for one in many]
        assert torch.equal(kept, many[dots.index(max(dots))])
    assert torch.equal(best_of(drawn[:, :1], text), drawn[:, 0])


def test_what_is_right_and_what_share_of_the_facts():
    asked = [p for p in prompts.prompts() if not p.held_out and len(p.facts.things) == 1][:3]
    truth = [p.scene.facts() for p in asked]
    assert right(asked, truth) == [True] * 3 and right(asked, [None] * 3) == [False] * 3
    assert mapping.facts_right(asked, truth)["value"] == 1
    assert mapping.facts_right(asked, [None] * 3)["value"] == 0
    said = Facts("night", "sea", False, (ThingFacts("boat", "red", "left"),))
    one = replace(asked[0], text="a red boat on the left by the sea at night")
    assert one.facts == said
    seen = Facts("night", "sea", False, (ThingFacts("boat", "blue", "right"),))
    assert mapping.facts_right([one, one], [seen, seen])["value"] == pytest.approx(3 / 5)
    assert right([one], [seen]) == [False]


def test_units_and_nearness(ways):
    torch.testing.assert_close(
        ways.units(ways.pictures).mean(0), torch.zeros(32), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(ways.units(ways.pictures).std(0), torch.ones(32), atol=1e-4, rtol=0)
    place = ways.pictures[:3]
    torch.testing.assert_close(ways.near(place, place), torch.ones(3))
    mirrored = 2 * ways.mean - place
    torch.testing.assert_close(ways.near(place, mirrored), -torch.ones(3))


@pytest.mark.slow
def test_the_whole_measurement_has_all_its_tables(pool, monkeypatch):
    monkeypatch.setattr(decoders, "STEPS", 2)
    monkeypatch.setattr(priors, "STEPS", 2)
    monkeypatch.setattr(mapping, "OPEN", ("a red house",))
    monkeypatch.setattr(mapping, "PART", 2)
    readings = []
    read = Judge.read
    monkeypatch.setattr(Judge, "read", lambda s, x: (readings.append(len(x)), read(s, x))[1])
    found = mapping.compare(3, 2, 2, 3, pool)
    assert set(found["rows"]) == {*mapping.WAYS, "true pictures", "another picture"}
    for way in mapping.WAYS:
        row = found["rows"][way]
        bits = row["told"]["prompt by prompt"]
        assert len(bits) == 3 and bits.count("1") == row["told"]["everything"]["value"] * 3
        assert ("alone" in row) == (way != mapping.NOWHERE)
    assert found["rows"][mapping.TRUE]["cosine"]["value"] == pytest.approx(1)
    assert found["rows"][mapping.TRUE]["Fréchet distance"] == pytest.approx(0, abs=1e-6)
    others = set(mapping.WAYS) - {mapping.DIFFUSION}
    assert set(found["differences"]["told"]) == others
    assert set(found["differences"]["alone"]) == others - {mapping.NOWHERE}
    size = found["parameters"]
    assert abs(size[mapping.TOKENS] / size[mapping.DIFFUSION] - 1) < 0.1, "equal in size"
    dots = [found["candidates"][str(k)]["dot product"]["value"] for k in mapping.CANDIDATES]
    assert dots == sorted(dots), "more candidates never fit worse by dot product"
    assert set(found["guidance"]) == {"1", "2", "4"}
    assert found["variety"]["draws"] == 3 and readings[0] == 3
