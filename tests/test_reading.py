"""Chapter 10's measurements: distances by hand, thresholds by NumPy, walks against the system's."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from companion import measure, reading
from companion.asking import questions
from companion.checkpoints import WEIGHTS
from companion.data import to_signed
from companion.prompts import is_held_out
from companion.reading import (
    WAYS,
    believed,
    by_row,
    caption_of,
    colourfulness,
    distance,
    draw_small,
    enlarged,
    kept,
    means,
    moved,
    one_thing,
    reach,
    readable,
    replaced,
    saturated,
    sided,
    sides_right,
    where_it_stands,
)
from companion.scores import interval
from companion.storybook import SKIES, Facts, ThingFacts, parse, sample
from companion.tokenizer import Tokenizer

TEXTS = ["a red house", "the sea", "a house"]
NAMES = ("thresholding", "noise-augmentation", "sides")


@pytest.fixture(scope="module")
def pipe():
    return tiny.imagen()


# --- states ---------------------------------------------------------------------------------------


def test_one_word_is_exchanged_where_it_stands_once():
    said = ["red house", "red red", "a reddish red house", "blue"]
    assert replaced(said, "red", "green") == (
        ["red house", "a reddish red house"], ["green house", "a reddish green house"],
    )  # fmt: skip


def test_words_of_the_pairs_are_single_pieces():
    tokenizer = Tokenizer.from_pretrained(WEIGHTS / "language-model")
    for word in {word for pair in reading.PAIRS for word in pair}:
        assert len(tokenizer.pieces(word)) == 1, word


def test_distance_is_a_share_of_the_mean_length():
    a, b = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert distance(a, b).tolist() == pytest.approx([5 / 3.5, 0.0])


def test_rows_before_the_word_stay_and_its_own_moves(pipe):
    before, after = replaced(["a red house", "the red house"], "red", "sea")
    rows = [by_row(pipe, *pair) for pair in zip(before, after, strict=True)]
    found = moved(pipe, before, after)
    for i, (row, text) in enumerate(zip(rows, before, strict=True)):
        ids = [pipe.tokenizer([t]).ids[0] for t in (text, after[i])]
        own = [k for k in range(len(ids[0])) if ids[0][k] != ids[1][k]][0]
        assert (row[:own] == 0).all() and (row[own:] > 0).all()
        assert found["own row"][i] == pytest.approx(row[own].item(), rel=1e-4)
        assert found["end"][i] == pytest.approx(row[-1].item(), rel=1e-4)
    with pytest.raises(ValueError, match="not equally many pieces"):
        by_row(pipe, "a red house", "the sea")


def test_means_leave_padding_out(pipe, monkeypatch):
    monkeypatch.setattr(reading, "PART", 2)
    wanted = []
    for text in TEXTS:  # the encoder looks back only, so without padding the states are the same
        tokens = pipe.tokenizer([text])
        with torch.no_grad():
            states = pipe.text_encoder(tokens.ids[:, : int(tokens.mask.sum())]).states
        wanted.append(states[0].mean(0))
    torch.testing.assert_close(means(pipe, TEXTS), torch.stack(wanted))
    one, other = means(pipe, ["a red house"]), means(pipe, ["a sea house"])
    found = moved(pipe, ["a red house"], ["a sea house"])["mean"]
    torch.testing.assert_close(found, distance(one, other))


class OnlySkies:
    """A reader whose states know the sky and whether padding stands behind, and nothing else."""

    def read(self, texts):
        skies = torch.tensor([SKIES.index(parse(text).sky) for text in texts])
        states = torch.eye(len(SKIES))[skies][:, None].repeat(1, 3, 1)
        states[:, 2] = 9.0  # padding
        return SimpleNamespace(states=states, mask=torch.tensor([[1, 1, 0]] * len(texts)))


def test_lines_read_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(6)
    known, fresh = sample(150, g, things=(1,)), sample(60, g, things=(1,))
    found = readable(OnlySkies(), known, fresh)
    assert found["sky"] == interval(60, 60)
    assert found["kind"]["value"] < 0.4 and found["colour"]["value"] < 0.4


# --- thresholds -----------------------------------------------------------------------------------


def test_the_ways_are_what_they_say():
    g = torch.Generator().manual_seed(2)
    answer = torch.randn(3, 3, 4, 4, generator=g) * torch.tensor([0.1, 1.0, 9.0]).view(3, 1, 1, 1)
    x, t = torch.zeros(3, 3, 4, 4), torch.zeros(3)
    got = {way: kept(lambda x, t: answer, way)(x, t).numpy() for way in WAYS}
    values = answer.numpy()
    assert np.array_equal(got["none"], values)
    assert np.array_equal(got["static"], np.clip(values, -1, 1))
    for way, share in (("dynamic, 99.5 %", 99.5), ("dynamic, 95 %", 95)):
        for x0, mine in zip(values, got[way], strict=True):
            p = max(1.0, np.percentile(np.abs(x0), share))
            np.testing.assert_allclose(mine, np.clip(x0, -p, p) / p, rtol=1e-5)
    with pytest.raises(ValueError, match="'always'"):
        kept(lambda x, t: x, "always")


@pytest.mark.parametrize(("way", "says"), [
    ("static", {"thresholding": "static"}), ("dynamic, 95 %", {"percentile": 0.95}),
    ("dynamic, 99.5 %", {"percentile": 0.995}),
])  # fmt: skip
def test_the_base_alone_walks_as_in_the_system(pipe, way, says):
    seen = []
    pipe(TEXTS, steps=(25, 2), seed=5, guidance_scale=4.0, **says,
         callback=lambda i, t, x, x0: seen.append(x0))  # fmt: skip
    answers: list[torch.Tensor] = []
    got = draw_small(pipe, TEXTS, 4.0, way, seed=5, answers=answers)
    torch.testing.assert_close(to_signed(got), seen[24].clamp(-1, 1))
    assert len(answers) == 25
    for raw, used in zip(answers, seen, strict=False):  # the answers are kept as they came
        torch.testing.assert_close(kept(lambda x, t, raw=raw: raw, way)(raw, None), used)


def test_nothing_done_is_cut_off_at_the_end_only(pipe):
    answers: list[torch.Tensor] = []
    got = draw_small(pipe, TEXTS, 4.0, "none", answers=answers)
    assert answers[0].abs().max() > 1
    torch.testing.assert_close(to_signed(got), answers[-1].clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_reach_saturation_and_colour_by_hand():
    x = torch.zeros(2, 3, 1, 2)
    x[0, :, 0, 0] = torch.tensor([1.0, 0.5, 0.25])  # one colourful pixel, one black
    x[1] = 0.995
    assert saturated(x).tolist() == pytest.approx([4 / 6, 1.0])
    assert colourfulness(x).tolist() == pytest.approx([0.375, 0.0])
    answers = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    for got, one in zip(reach(answers, 0.9), answers, strict=True):
        wanted = np.mean([np.percentile(np.abs(p.numpy()), 90) for p in one])
        assert got.item() == pytest.approx(wanted, rel=1e-5)


# --- the upsampler --------------------------------------------------------------------------------


def test_captions_say_everything_and_change_one_word():
    for q in questions(6, seed=10):
        own = parse(caption_of(q))
        assert own == q.scene.facts() and not is_held_out(own)
        for what in ("colour", "kind"):
            other = parse(caption_of(q, **{what: getattr(q, what)}))
            assert getattr(other.things[0], what) == getattr(q, what)
            assert (other.sky, other.place) == (own.sky, own.place)


def test_parts_words_and_noise_of_enlargements(pipe, monkeypatch):
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(reading, "PART", 2)
    got = enlarged(pipe, x, TEXTS, 100)
    assert got.shape == (3, 3, 64, 64) and got.min() >= 0 and got.max() <= 1
    torch.testing.assert_close(got[2:], enlarged(pipe, x[2:], TEXTS[2:], 100), rtol=0, atol=1e-5)
    for changed in (enlarged(pipe, x, TEXTS[::-1], 100), enlarged(pipe, x, TEXTS, 0)):
        assert not torch.equal(changed[0], got[0])


def thing(kind: str, colour: str, position: str | None = None) -> Facts:
    return Facts("noon", "sea", things=(ThingFacts(kind, colour, position),))


def test_whom_it_believed():
    asked = questions(3, seed=10)
    kinds = [q.thing.kind for q in asked]
    read = [thing(kinds[0], asked[0].thing.colour), thing(kinds[1], asked[1].colour), None]
    found = believed(asked, read, "colour")
    assert found["the picture's"] == found["the caption's"] == interval(1, 3)
    read = [thing(q.kind, "red") for q in asked]
    assert believed(asked, read, "kind")["the caption's"]["value"] == 1


def test_sides_are_counted():
    two = Facts("noon", "sea", things=(ThingFacts("cat", "red"), ThingFacts("car", "blue")))
    read = [thing("cat", "red", "left"), thing("cat", "red", "right"), two, None]
    spots = where_it_stands(read)
    assert [spots[s]["value"] for s in ("left", "middle", "right", "none")] == [0.25, 0, 0.25, 0.5]
    table = {"left": spots, "middle": spots, "right": where_it_stands(read[1:3])}
    assert sides_right(table) == interval(2, 6)


def test_those_who_are_asked_say_a_side():
    found = sided(5)
    assert all(len(asked) == 5 for asked in found.values())
    for where, asked in found.items():
        assert all(f" {where}" in p.text and not p.held_out for p in asked)
    assert all(len(p.facts.things) == 1 for p in one_thing(20))


# --- the tables -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "few"),
    [
        ("thresholding", {"n": 3, "scales": (5.0,)}),
        ("noise-augmentation", {"n": 3, "told": 2, "levels": (100,)}),
        ("sides", {"n": 1}),
    ],
)
def test_tables_are_what_their_code_measures(name, few):
    stored = measure.load(name)
    found = measure.measurements()[name].run(**few)
    assert set(found) <= set(stored) and found["seeds"] == stored["seeds"]
    assert set(found["rows"]) <= set(stored["rows"])
    for row, cells in found["rows"].items():
        assert set(cells) <= set(stored["rows"][row]), row
