"""The contest of chapter 1: fair, repeatable, and scored by yardsticks that see each failure."""

import pytest
import torch

from companion import contest, data, measure


def test_the_split_holds_every_fifth_digit_out():
    trained_on, held_out = contest.digits_split()
    assert len(trained_on) == 1438 and len(held_out) == 359
    both = torch.empty(1797, 1, 8, 8)
    both[4::5] = held_out
    both[[i for i in range(1797) if i % 5 != 4]] = trained_on
    assert torch.equal(data.to_unit(both), data.digits()[0])


@pytest.mark.parametrize("name", list(contest.STEPS))
def test_a_contender_depends_on_its_seed_alone(name):
    before, drawn, seen = torch.random.get_rng_state(), [], []
    for seed in (0, 0, 1):
        made = contest.contender(name, seed, 3 / contest.STEPS[name], lambda k, *_: seen.append(k))
        with torch.no_grad():
            drawn.append(made.draw(4, torch.Generator().manual_seed(7)))
    assert made.steps == 3 and seen == [0, 1, 2] * 3 and made.seconds > 0
    assert drawn[0].shape == (4, 1, 8, 8) and drawn[0].abs().max() <= 1
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), before)
    still = contest.SETTINGS[name] | {"learning_rate": 0.0}  # leaves the first weights as they are
    first = [contest.contender(name, seed, 1e-3, settings=still).network for seed in (0, 1)]
    pairs = zip(*(network.parameters() for network in first), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_scores_tell_the_failures_apart():
    trained_on, held_out = contest.digits_split()
    labels = data.digits()[1][torch.arange(1797) % 5 != 4]
    g = torch.Generator().manual_seed(0)
    fresh = contest.digit_scores(trained_on[torch.randperm(1438, generator=g)])
    sevens = trained_on[labels == 7]
    sevens = contest.digit_scores(sevens[torch.randint(len(sevens), (359,), generator=g)])
    blurred = torch.nn.functional.avg_pool2d(trained_on, 3, 1, 1, count_include_pad=False)
    blurred = contest.digit_scores(blurred[torch.randperm(1438, generator=g)])
    itself = contest.digit_scores(held_out)
    assert itself["frechet"] == pytest.approx(0, abs=1e-6)
    assert itself["precision"] == itself["recall"] == itself["edges"] == 1
    assert sevens["recall"] < 0.25 < 0.8 < sevens["precision"]
    assert sevens["digits"] < 1.5 and sevens["rarest"] == 0
    assert blurred["edges"] < 0.6 and blurred["nearest"] > 1
    assert fresh["digits"] > 9.5 and fresh["nearest"] == 0 and abs(fresh["edges"] - 1) < 0.05
    assert fresh["frechet"] < 50 < min(sevens["frechet"], blurred["frechet"])


def test_edges_and_nearest_by_hand():
    x = torch.tensor([[0.0, 1.0], [3.0, 3.0]]).view(1, 1, 2, 2)
    assert contest.edges(x) == ((1 + 0) / 2 + (9 + 4) / 2) / 2
    known = torch.stack([x[0] + 1, x[0] - 3])
    assert contest.nearest(x, known) == pytest.approx(2.0)


def test_too_few_digits_are_refused():
    with pytest.raises(ValueError, match="there are 10 digits; expected 359"):
        contest.digit_scores(torch.zeros(10, 1, 8, 8))


def test_before_diffusion_was_a_fair_contest():
    rows = measure.load("before-diffusion")["rows"]
    three = [rows[name] for name in contest.STEPS]
    sizes = [row["parameters"] for row in three]
    seconds = [row["training seconds"]["value"] for row in three]
    assert max(sizes) / min(sizes) < 1.02
    assert max(seconds) / min(seconds) < 1.15
    assert [row["steps"] for row in three] == list(contest.STEPS.values())
    for name, row in zip(contest.STEPS, three, strict=True):
        network = contest.contender(name, 0, effort=1e-3).network
        assert sum(p.numel() for p in network.parameters()) == row["parameters"]


def test_each_had_as_many_trials_and_the_best_was_kept():
    trials = measure.load("before-diffusion-trials")["rows"]["trials"]
    assert set(contest.TRIALS) == set(contest.STEPS)
    for name, settings in contest.SETTINGS.items():
        mine = [trial for trial in trials if trial["name"] == name]
        assert [trial["settings"] for trial in mine] == contest.TRIALS[name]
        assert len(mine) == 4
        assert min(mine, key=lambda trial: trial["frechet"])["settings"] == settings
    assert measure.load("before-diffusion")["settings"] == contest.SETTINGS
