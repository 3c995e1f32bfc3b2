"""Recipes trained again with other seeds."""

import pytest
from test_train import LINE

from companion import checkpoints, repeating
from companion.measure import measurements
from companion.train import train


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The first run's weights, in place of the shipped ones."""
    run = train(LINE, tmp_path / "first", quiet=True, device="cpu", seed=1)
    (tmp_path / "weights").mkdir()
    run.final.rename(tmp_path / "weights" / "line")
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    return tmp_path


def test_each_seed_is_a_run_of_its_own_and_the_shipped_one_is_not_repeated(shipped):
    found = repeating.trained_again(LINE, (0, 1, 2), shipped / "runs")
    own = checkpoints.read_card(shipped / "weights" / "line")["score"]["norm"]
    row = found["rows"]["norm"]
    assert found["seeds"] == [0, 1, 2] and len(set(row["runs"])) == 3
    assert row["runs"][1] == own
    assert row["value"] == pytest.approx(sum(row["runs"]) / 3)
    assert row["low"] < row["value"] < row["high"]
    assert {path.name for path in (shipped / "runs").iterdir()} == {"line-0", "line-2"}
    alone = train(LINE, shipped / "alone", quiet=True, device="cpu", seed=2)
    assert checkpoints.read_card(alone.final)["score"]["norm"] == row["runs"][2]


def test_a_run_that_is_there_is_taken(shipped):
    first = repeating.trained_again(LINE, (1, 2), shipped / "runs")
    card = shipped / "runs" / "line-2" / "final" / "card.json"
    before = card.stat().st_mtime_ns
    assert repeating.trained_again(LINE, (1, 2), shipped / "runs") == first
    assert card.stat().st_mtime_ns == before


def test_a_number_is_read_with_and_without_its_interval():
    assert repeating.number({"value": 0.5, "low": 0, "high": 1}) == repeating.number(0.5) == 0.5


def test_they_are_known_and_say_what_they_need():
    known = measurements()
    assert known["clip-seeds"].needs == ("clip",)
    assert "prior" in known["prior-seeds"].needs
