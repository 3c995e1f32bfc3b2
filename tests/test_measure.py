"""Stored results: whole, of the shipped weights, and made by the code that says so."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from companion import __main__ as cli
from companion import checkpoints, data, measure, samplers
from companion.contest import digits_split
from companion.recipes import DigitClassifier
from companion.schedule import Schedule
from companion.scores import frechet

MEASUREMENTS = measure.measurements()

RESULTS = sorted((Path(__file__).parents[1] / "book" / "results").glob("*.json"))
RESULTS = [path for path in RESULTS if path.stem != "bench"]  # `make bench` writes that one


# --- the files that are shipped -------------------------------------------------------------------


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_shipped_results_are_of_the_shipped_weights(path):
    entry, found = MEASUREMENTS[path.stem], measure.load(path.stem)
    assert found["command"] == f"python -m companion measure {path.stem}"
    assert set(found["weights"]) == set(entry.needs)
    for name, hashed in found["weights"].items():  # the card, which `check` compares with the file
        assert checkpoints.read_card(checkpoints.WEIGHTS / name)["sha256"] == hashed
    assert all(found[key] for key in ("about", "hardware", "torch", "minutes", "seeds"))


def test_every_stored_result_has_its_measurement():
    """The reverse comes with the chapter: results are stored when a page shows them."""
    assert {path.stem for path in RESULTS} <= set(MEASUREMENTS)


def _leaves(value):
    if isinstance(value, dict) and "runs" in value:
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_shipped_intervals_are_those_of_their_runs(path):
    found = json.loads(path.read_text("utf-8"))
    leaves = list(_leaves(found))
    by_seed = "rows" in found  # elsewhere intervals are over requests, or over some of the seeds
    assert bool(leaves) == (len(found["seeds"]) > 1) or not by_seed
    for leaf in leaves:
        runs = torch.tensor(leaf["runs"], dtype=torch.float64)
        assert len(runs) == len(found["seeds"]) or not by_seed
        assert math.isclose(leaf["value"], runs.mean().item(), rel_tol=1e-9, abs_tol=1e-12)
        assert leaf["low"] <= leaf["value"] <= leaf["high"]
        if len(set(leaf["runs"])) > 1:
            error = stats.sem(leaf["runs"])
            low, high = stats.t.interval(0.95, len(runs) - 1, leaf["value"], error)
            assert leaf["low"] == pytest.approx(low) or leaf["low"] > low  # cut at an end
            assert leaf["high"] == pytest.approx(high) or leaf["high"] < high


@pytest.mark.slow  # some seconds of drawing
def test_fewer_steps_are_what_its_code_measures():
    """Its rows and columns come from the code that the file names, and one number is had again."""
    rows = measure.load("fewer-steps")["rows"]
    small = measure.fewer_steps(seeds=(0, 1), n=8, calls=measure.CALLS[:2])["rows"]
    assert list(small) == list(rows)
    for row, columns in small.items():
        if row == "real":
            assert set(columns) == {"8"} and set(rows[row]) == {"1000"}
        elif row in measure.CALLERS:
            assert list(rows[row]) == [str(n) for n in measure.CALLS]
        else:
            assert list(columns) == list(rows[row])
        assert all(len(cell["runs"]) == 2 for cell in columns.values())
    x_T = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plan = Schedule.linear()
    ts = samplers.timesteps("ddim", 3, plan, "trailing")
    drawn = data.to_unit(samplers.ddim(measure.digits_denoiser(), x_T, ts, plan))
    reader = DigitClassifier.from_pretrained()
    with torch.no_grad():
        features = [reader.features(x) for x in (data.to_unit(digits_split()[0]), drawn)]
    assert frechet(*features) == pytest.approx(rows["ddim"]["3"]["runs"][0], rel=1e-3)


# --- writing and reading --------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A measurement that takes no time, on one shipped network."""
    threads = []

    def run():
        threads.append(torch.get_num_threads())
        return {"seeds": [0, 1], "rows": {"a": {"score": measure.over_seeds([1.0, 2.0])}}}

    entry = measure.Measurement(run, "a small one", 0.1, ("digit-classifier",))
    monkeypatch.setitem(MEASUREMENTS, "small", entry)
    return threads


def test_what_is_measured_is_written_with_its_circumstances(small, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        path = measure.measure("small", tmp_path / "small.json")
        assert small == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    found = measure.load("small", path)
    weights = checkpoints.WEIGHTS / "digit-classifier" / "model.safetensors"
    assert found["weights"] == {"digit-classifier": checkpoints.sha256(weights)}
    assert found["command"] == "python -m companion measure small"
    assert found["torch"] == torch.__version__.split("+")[0] and found["hardware"]
    assert found["rows"]["a"]["score"]["value"] == 1.5


@pytest.mark.parametrize("tampered", ["0" * 64, None])
def test_results_of_other_weights_are_refused(small, tmp_path, tampered):
    path = measure.measure("small", tmp_path / "small.json")
    found = json.loads(path.read_text("utf-8"))
    found["weights"]["digit-classifier"] = tampered
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match="other weights of 'digit-classifier'.*Measure again: py"):
        measure.load("small", path)


def test_results_are_refused_when_the_shipped_weights_change(small, tmp_path, monkeypatch):
    path = measure.measure("small", tmp_path / "small.json")
    folder = tmp_path / "weights" / "digit-classifier"
    folder.mkdir(parents=True)
    shipped = checkpoints.WEIGHTS / "digit-classifier" / "model.safetensors"
    changed = bytearray(shipped.read_bytes())
    changed[-1] ^= 1
    (folder / "model.safetensors").write_bytes(changed)
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(ValueError, match="other weights of 'digit-classifier'"):
        measure.load("small", path)


def test_what_is_not_there_is_said_in_one_sentence(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m companion measure small"):
        measure.load("small", tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="expected one of"):
        measure.load("large")
    with pytest.raises(FileNotFoundError, match="the results go to"):
        measure.measure("small", tmp_path / "nowhere" / "small.json")
    assert small == []  # refused before any work


def test_the_command_line_measures(small, tmp_path, capsys):
    assert cli.main(["measure", "--list"]) == 0
    assert "a small one" in capsys.readouterr().out
    assert cli.main(["measure", "small", "--out", str(tmp_path / "x.json")]) == 0
    assert "Written: " in capsys.readouterr().out and (tmp_path / "x.json").is_file()
    assert cli.main(["measure", "smal"]) == 2
    assert "Did you mean 'small'?" in capsys.readouterr().err
    assert cli.main(["measure"]) == 2


def test_intervals_over_seeds_are_students():
    got = measure.over_seeds([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1.0, 2.0, 4.0]))
    assert (got["low"], got["high"]) == pytest.approx((low, high))
    assert got["value"] == pytest.approx(7 / 3) and got["runs"] == [1.0, 2.0, 4.0]
    cut = measure.over_seeds([0.9, 1.0], 0, 1)
    assert cut["high"] == 1 and cut["low"] < 0.9
    with pytest.raises(ValueError, match="1 runs"):
        measure.over_seeds([1.0])
