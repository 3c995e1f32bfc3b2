"""Equality with stored answers: needs no diffusers, no transformers, and outlives both."""

from pathlib import Path

import pytest
import torch

from reference.cases import CASES
from reference.make_fixtures import FIXTURES, answer, load, ours
from reference.oracle import TOLERANCE, distance, randomise


@pytest.mark.parametrize("name", CASES)
def test_ours_gives_the_stored_answers(name):
    model, parts = ours(name)
    case = CASES[name]
    assert all(torch.equal(v, case.inputs[k]) for k, v in parts["input"].items())
    found = answer(model, case.run_ours, case)
    wanted = {f"output.{k}": v for k, v in parts["output"].items()}
    wanted |= {f"gradient.{k}": v for k, v in parts.get("gradient", {}).items()}
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert distance(found[key], wanted[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", CASES)
def test_stock_still_gives_the_stored_answers(stock, name):
    """If this fails and the test above does not, the stock library has changed its mind."""
    case = CASES[name]
    _, parts = load(name)
    theirs = randomise(case.theirs(stock, case.config), 0)
    theirs.load_state_dict(parts["parameter"], strict=True)
    for i, y in enumerate(case.run_theirs(theirs, **case.inputs)):
        assert distance(y.detach(), parts["output"][str(i)]) < TOLERANCE


def test_fixtures_are_small():
    files = list(Path(FIXTURES).iterdir())
    assert {f.stem for f in files} == set(CASES)
    assert sum(f.stat().st_size for f in files) < 1_000_000
