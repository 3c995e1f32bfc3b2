"""For chapter 1: these join tests/test_contest.py when its results are stored."""

from companion import contest, measure


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
