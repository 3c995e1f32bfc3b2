"""Equality with stored answers: needs no diffusers, no transformers, and outlives both."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from reference.cases import CASES
from reference.make_fixtures import FIXTURES, answer
from reference.oracle import TOLERANCE, distance, randomise


def load(name: str) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, rest = key.partition(".")
            parts.setdefault(kind, {})[rest] = file.get_tensor(key)
        return json.loads(file.metadata()["config"]), parts


def ours(name: str) -> tuple[torch.nn.Module, dict[str, dict[str, torch.Tensor]]]:
    """Our model with the stored parameters, and the stored inputs and answers."""
    case = CASES[name]
    config, parts = load(name)
    assert config == json.loads(json.dumps(case.config)), "make_fixtures.py has to run again"
    model = case.ours(case.config).double()
    model.load_state_dict(parts["parameter"], strict=True)
    return model, parts


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
