"""The table of promises: numbers come from cards and results as they are, and a miss is a miss."""

import json

import pytest

from companion import __main__ as cli
from companion import bars, checkpoints, measure
from companion.bars import Bar, Line


def bar(least=0.9, **options):
    return Bar("what", 5, lambda: 0.0, least, **options)


@pytest.mark.parametrize(
    ("found", "low", "passed"),
    [
        ({"value": 0.91, "low": 0.89, "high": 0.93, "n": 100}, False, True),
        ({"value": 0.91, "low": 0.89, "high": 0.93, "n": 100}, True, False),
        ({"value": 0.95, "low": 0.9, "high": 0.99, "n": 100}, True, True),
        ({"value": 0.89}, False, False),
    ],
)
def test_a_bar_counts_what_it_says_it_counts(found, low, passed):
    line = Line(bar(low=low), found)
    assert line.passed is passed
    assert str(line).startswith("pass " if passed else "MISSED ")
    assert "promised 90.0 %" in str(line)


def test_what_was_not_promised_or_not_found_neither_passes_nor_misses():
    assert Line(bar(None), {"value": 0.2}).passed is None
    assert Line(bar(), None, "why not").passed is None and "why not" in str(
        Line(bar(), None, "why not")
    )
    assert "12.3 dB" in str(Line(bar(10, unit=" dB"), {"value": 12.34}))


def test_numbers_are_those_of_card_and_results(monkeypatch, tmp_path):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "card.json").write_text(
        json.dumps({"score": {"a": 0.5, "b": {"value": 1, "low": 0.8}}})
    )
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    monkeypatch.setattr(measure, "load", lambda name: {"rows": {name: {"value": 0.25}}})
    wanted = [
        Bar("half", 1, bars.card("thing", "a"), 0.4),
        Bar("low", 1, bars.card("thing", "b"), 0.9, low=True),
        Bar("stored", 1, bars.result("x", "rows", "x"), 0.2),
        Bar("no such entry", 1, bars.card("thing", "c")),
        Bar("no such card", 1, bars.card("nothing", "c")),
    ]
    lines = bars.lines(wanted)
    assert [line.found and line.found["value"] for line in lines] == [0.5, 1, 0.25, None, None]
    assert [line.passed for line in lines] == [True, False, True, None, None]
    assert "no entry 'c'" in lines[3].why and "card.json" in lines[4].why


def test_every_bar_finds_its_number_in_what_is_shipped():
    """A misspelt entry would be a bar that nobody is held to."""
    assert [str(line) for line in bars.lines() if line.found is None] == []


def test_the_command_prints_every_bar_and_says_what_is_missing(capsys, monkeypatch):
    line = Line(bar(), {"value": 0.95})
    monkeypatch.setattr(bars, "lines", lambda: [line, Line(bar(), {"value": 0.1})])
    assert cli.main(["scores"]) == 0
    said = capsys.readouterr().out
    assert said.count("what") == 2 and "1 passed, 1 missed" in said
    monkeypatch.setattr(bars, "lines", lambda: [line, Line(bar(), None, "not yet")])
    assert cli.main(["scores"]) == 1 and "1 not measured" in capsys.readouterr().out
