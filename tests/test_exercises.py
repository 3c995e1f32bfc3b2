"""Every check passes the solution printed in its notebook and rejects plausible wrong answers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from wrong_answers import WRONG

from companion import exercises
from companion.exercises import verdict

BOOK = Path(__file__).parents[1] / "book"


def solutions() -> dict[str, str]:
    """Exercise number to the code of its printed solution, from all notebooks."""
    found = {}
    for path in sorted(BOOK.glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        for part in re.split(r"^### Exercise ", text, flags=re.MULTILINE)[1:]:
            number = re.match(r"[\d.]+\d", part)[0]
            solution = part.split("<details>", 1)[1].split("</details>", 1)[0]
            found[number] = re.search(r"```python\n(.*?)```", solution, re.DOTALL)[1]
    return found


SOLUTIONS = solutions()


def answer(name: str, code: str) -> object:
    """Run the code of an answer; what it defines under the name that its notebook checks."""
    names = {"torch": torch, "math": math}
    before = set(names)
    exec(code, names)
    mine = [k for k in names if k not in before and k != "__builtins__"]
    return names[mine[-1]]


def test_every_exercise_has_a_check_and_every_check_an_exercise():
    assert set(SOLUTIONS) == set(exercises.CHECKS)


@pytest.mark.parametrize("name", sorted(SOLUTIONS))
def test_the_printed_solution_is_right(name):
    assert verdict(name, answer(name, SOLUTIONS[name])) == "right."


@pytest.mark.parametrize(("name", "what", "code"), WRONG, ids=[f"{n}: {w}" for n, w, _ in WRONG])
def test_a_wrong_answer_is_told_so(name, what, code):
    told = verdict(name, answer(name, code))
    assert told.startswith("not yet. ") and len(told) < 250


def test_every_check_has_met_two_wrong_answers():
    for name in exercises.CHECKS:
        assert sum(n == name for n, _, _ in WRONG) >= 2, name


def test_any_answer_gets_a_sentence():
    for name in exercises.CHECKS:
        for nonsense in (None, ..., 3, "jump", torch.zeros(2), lambda *a: 1 / 0, lambda *a: "x"):
            assert verdict(name, nonsense).startswith("not yet. ")
    with pytest.raises(ValueError, match=r"'9\.9'; expected one of"):
        exercises.check("9.9", None)
