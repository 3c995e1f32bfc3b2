"""Every check passes the solution printed in its notebook and rejects plausible wrong answers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

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


# What readers plausibly write instead: (exercise, what is wrong with it, code).
WRONG = [
    ("2.1", "nothing yet", "def undo(x_t, noise, t, schedule):\n    ..."),
    (
        "2.1",
        "no square roots",
        "def undo(x_t, noise, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)\n"
        "    return (x_t - (1 - abar) * noise) / abar",
    ),
    (
        "2.1",
        "counts from one",
        "def undo(x_t, noise, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[(t - 1).clamp(min=0)].float().view(-1, 1, 1, 1)\n"
        "    return (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()",
    ),
    (
        "2.1",
        "takes out the noise but does not enlarge what is left",
        "def undo(x_t, noise, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)\n"
        "    return x_t - (1 - abar).sqrt() * noise",
    ),
    (
        "2.1",
        "the same step for all",
        "def undo(x_t, noise, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t[0]].float()\n"
        "    return (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()",
    ),
    ("2.2", "the middle", "def even_step(schedule, v):\n    return len(schedule) // 2"),
    (
        "2.2",
        "forgets the picture's variance",
        "def even_step(schedule, v):\n"
        "    return int((schedule.alphas_cumprod < 0.5).nonzero()[0])",
    ),
    (
        "2.2",
        "amplitudes instead of variances",
        "def even_step(schedule, v):\n"
        "    signal = schedule.alphas_cumprod.sqrt()\n"
        "    return int((v * signal < (1 - signal**2).sqrt()).nonzero()[0])",
    ),
    (
        "2.3",
        "variance for sigma",
        "def to_exploding(x_t, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t]\n"
        "    return x_t / abar.sqrt(), (1 - abar) / abar",
    ),
    (
        "2.3",
        "the picture still shrunk",
        "def to_exploding(x_t, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t]\n"
        "    return x_t, ((1 - abar) / abar).sqrt()",
    ),
    (
        "2.3",
        "only the picture",
        "def to_exploding(x_t, t, schedule):\n    return x_t / schedule.alphas_cumprod[t].sqrt()",
    ),
    (
        "2.4",
        "the wrong way",
        "def same_static(t, schedule, ratio):\n"
        "    return schedule.t_of_log_snr(schedule.log_snr(t) + 2 * math.log(ratio))",
    ),
    (
        "2.4",
        "once instead of twice",
        "def same_static(t, schedule, ratio):\n"
        "    return schedule.t_of_log_snr(schedule.log_snr(t) - math.log(ratio))",
    ),
    ("2.4", "the same step", "def same_static(t, schedule, ratio):\n    return t"),
    (
        "3.1",
        "the larger variance",
        "def step_back(x0, x_t, t, schedule):\n"
        "    abar, before, beta = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1],"
        " schedule.betas[t]\n"
        "    mean = before.sqrt() * beta / (1 - abar) * x0"
        " + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x_t\n"
        "    return mean, beta",
    ),
    (
        "3.1",
        "the factors of the two swapped",
        "def step_back(x0, x_t, t, schedule):\n"
        "    abar, before, beta = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1],"
        " schedule.betas[t]\n"
        "    mean = before.sqrt() * beta / (1 - abar) * x_t"
        " + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x0\n"
        "    return mean, (1 - before) / (1 - abar) * beta",
    ),
    (
        "3.1",
        "the spread for the variance",
        "def step_back(x0, x_t, t, schedule):\n"
        "    abar, before, beta = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1],"
        " schedule.betas[t]\n"
        "    mean = before.sqrt() * beta / (1 - abar) * x0"
        " + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x_t\n"
        "    return mean, ((1 - before) / (1 - abar) * beta).sqrt()",
    ),
    (
        "3.1",
        "the mean only",
        "def step_back(x0, x_t, t, schedule):\n    return x0",
    ),
    (
        "3.2",
        "a minus",
        "def noise_of(v, x_t, abar):\n    return (1 - abar) ** 0.5 * x_t - abar**0.5 * v",
    ),
    (
        "3.2",
        "the picture",
        "def noise_of(v, x_t, abar):\n    return abar**0.5 * x_t - (1 - abar) ** 0.5 * v",
    ),
    ("3.2", "no roots", "def noise_of(v, x_t, abar):\n    return (1 - abar) * x_t + abar * v"),
    (
        "3.3",
        "the clean picture is shown",
        "def loss_simple(net, x0, noise, t, schedule):\n"
        "    return (net(x0, t) - noise).square().mean()",
    ),
    (
        "3.3",
        "compared with the picture",
        "def loss_simple(net, x0, noise, t, schedule):\n"
        "    return (net(schedule.add_noise(x0, noise, t), t) - x0).square().mean()",
    ),
    (
        "3.3",
        "a sum",
        "def loss_simple(net, x0, noise, t, schedule):\n"
        "    return (net(schedule.add_noise(x0, noise, t), t) - noise).square().sum()",
    ),
    (
        "3.3",
        "absolute errors",
        "def loss_simple(net, x0, noise, t, schedule):\n"
        "    return (net(schedule.add_noise(x0, noise, t), t) - noise).abs().mean()",
    ),
    ("3.4", "the mean age", "def half_life(decay):\n    return 1 / (1 - decay)"),
    ("3.4", "half of the mean age", "def half_life(decay):\n    return 0.5 / (1 - decay)"),
    ("3.4", "base two by mistake", "def half_life(decay):\n    return -1 / math.log(decay)"),
]


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
