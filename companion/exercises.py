"""Checks for the book's exercises: try your answer, get one line back.

    >>> check("2.1", jump)          # doctest: +SKIP
    Exercise 2.1: right.

A check never shows the solution. It says "right", or what your answer gave and what was expected.
Each chapter registers its checks below with :func:`exercise`; the tests run the solution that is
printed in the notebook, and several plausible wrong answers, through the same check.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from . import errors
from .schedule import Schedule

CHECKS: dict[str, Callable[[object], None]] = {}


class NotYet(Exception):
    """What is wrong with an answer, in one sentence."""


def exercise(name: str) -> Callable:
    """Register a check. It returns quietly for a right answer and raises ``NotYet`` otherwise."""

    def register(function: Callable[[object], None]) -> Callable[[object], None]:
        CHECKS[name] = function
        return function

    return register


def verdict(name: str, answer: object) -> str:
    """"right", or "not yet" and why."""
    errors.one_of("exercise", name, CHECKS)
    try:
        CHECKS[name](answer)
    except NotYet as why:
        return f"not yet. {why}"
    except Exception as error:  # a reader may raise anything: show it, let the notebook go on
        return f"not yet. Your answer raised {type(error).__name__}: {error}"
    return "right."


def check(name: str, answer: object) -> None:
    """Print one line about an answer: right, or not yet and why."""
    print(f"Exercise {name}: {verdict(name, answer)}")


# ---------------------------------------------------------------- comparing answers


def same_tensor(what: str, got: object, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Raise ``NotYet`` unless ``got`` is a tensor close to ``wanted``, element by element."""
    if got is None:
        raise NotYet(f"{what} is None: does your function return its result?")
    if not isinstance(got, torch.Tensor):
        raise NotYet(f"{what} is {type(got).__name__}; expected a tensor.")
    if got.shape != wanted.shape:
        raise NotYet(f"{what} has shape {tuple(got.shape)}; expected {tuple(wanted.shape)}.")
    worst = (got.double() - wanted.double()).abs().max().item()
    if not worst <= tolerance:
        raise NotYet(f"{what} differs from the right answer by up to {worst:.2g}.")


def same_number(what: str, got: object, wanted: float, tolerance: float = 1e-4) -> None:
    """Raise ``NotYet`` unless ``got`` is a number within ``tolerance`` of ``wanted``."""
    if got is None or got is ...:
        raise NotYet(f"{what} has no value yet.")
    try:
        value = float(got)
    except (TypeError, ValueError):
        raise NotYet(f"{what} is {type(got).__name__}; expected a number.") from None
    if not math.isclose(value, wanted, rel_tol=0.0, abs_tol=tolerance):
        raise NotYet(f"{what} is {value:.4g}, which is too {'low' if value < wanted else 'high'}.")


def a_function(answer: object) -> Callable:
    """Raise ``NotYet`` unless the answer can be called."""
    if not callable(answer):
        raise NotYet(f"Your answer is {type(answer).__name__}; expected a function.")
    return answer


# ---------------------------------------------------------------- chapter 2: pictures into static


@exercise("2.1")
def _jump(answer: object) -> None:
    """jump(x0, noise, t, schedule): the closed form (2.3), for one t a picture."""
    jump = a_function(answer)
    g = torch.Generator().manual_seed(21)
    x0, noise = torch.rand(2, 4, 3, 8, 8, generator=g) * 2 - 1
    for schedule in (Schedule.linear(), Schedule.cosine()):
        t = torch.tensor([0, 10, 400, 999])
        abar = schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        wanted = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        same_tensor("x_t", jump(x0, noise, t, schedule), wanted)


@exercise("2.2")
def _even(answer: object) -> None:
    """even_step(schedule): the first t at which there is more noise than signal."""
    even_step = a_function(answer)
    for schedule in (Schedule.linear(), Schedule.cosine(), Schedule.scaled_linear(500)):
        wanted = int((schedule.alphas_cumprod < 0.5).nonzero()[0])
        got = even_step(schedule)
        same_number(f"The step for a schedule of {len(schedule)} steps", got, wanted, 0.5)


@exercise("2.3")
def _exploding(answer: object) -> None:
    """to_exploding(x_t, t, schedule) -> (y, sigma) with y = x_0 + sigma * noise."""
    convert = a_function(answer)
    g = torch.Generator().manual_seed(23)
    x0, noise = torch.rand(2, 1, 3, 8, 8, generator=g, dtype=torch.float64) * 2 - 1
    schedule = Schedule.cosine()
    for t in (0, 300, 800):
        abar = schedule.alphas_cumprod[t]
        got = convert(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t, schedule)
        if not isinstance(got, tuple) or len(got) != 2:
            raise NotYet("Return two things: y and sigma.")
        sigma = ((1 - abar) / abar).sqrt().item()
        same_number(f"sigma at t = {t}", got[1], sigma, 1e-6 * max(1.0, sigma))
        same_tensor(f"y at t = {t}", got[0], x0 + sigma * noise, 1e-6 * max(1.0, sigma))


@exercise("2.4")
def _resolution(answer: object) -> None:
    """same_static(t, schedule, ratio): the step at ratio times the resolution that looks alike."""
    same_static = a_function(answer)
    for schedule in (Schedule.linear(), Schedule.cosine()):
        for t, ratio in ((300, 2), (300, 4), (600, 4), (500, 1)):
            wanted = schedule.log_snr(t) - 2 * math.log(ratio)
            t_wanted = float(schedule.t_of_log_snr(wanted))
            same_number(
                f"The step for t = {t} at {ratio} times the resolution",
                same_static(t, schedule, ratio),
                t_wanted,
                1.0,
            )
