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
def _undo(answer: object) -> None:
    """undo(x_t, noise, t, schedule): the closed form (2.3) solved for x0, one t a picture."""
    undo = a_function(answer)
    g = torch.Generator().manual_seed(21)
    x0, noise = torch.rand(2, 4, 3, 8, 8, generator=g) * 2 - 1
    for schedule in (Schedule.linear(), Schedule.scaled_linear()):
        t = torch.tensor([0, 10, 400, 700])
        x_t = schedule.add_noise(x0, noise, t)
        same_tensor("x_0", undo(x_t, noise, t, schedule), x0, 1e-3)


@exercise("2.2")
def _even(answer: object) -> None:
    """even_step(schedule, v): the first t at which noise outweighs a picture of variance v."""
    even_step = a_function(answer)
    for schedule in (Schedule.linear(), Schedule.cosine(), Schedule.scaled_linear(500)):
        for v in (1.0, 0.11, 0.45):
            abar = schedule.alphas_cumprod
            wanted = int((v * abar < 1 - abar).nonzero()[0])
            got = even_step(schedule, v)
            same_number(f"The step for {len(schedule)} steps and v = {v}", got, wanted, 0.5)


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


# ---------------------------------------------------------------- chapter 3: learning to walk back


@exercise("3.1")
def _step_back(answer: object) -> None:
    """step_back(x0, x_t, t, schedule) -> mean and variance of q(x_{t-1} | x_t, x_0)."""
    step_back = a_function(answer)
    g = torch.Generator().manual_seed(31)
    x0, x_t = torch.randn(2, 3, 1, 8, 8, generator=g, dtype=torch.float64)
    for schedule in (Schedule.linear(), Schedule.cosine()):
        for t in (1, 20, 999):
            got = step_back(x0, x_t, t, schedule)
            if not isinstance(got, tuple) or len(got) != 2:
                raise NotYet("Return two things: the mean and the variance.")
            # certainties add: another way to the same numbers than the one in the book
            now, before, beta = (
                schedule.alphas_cumprod[t].item(),
                schedule.alphas_cumprod[t - 1].item(),
                schedule.betas[t].item(),
            )
            sure = (1 - beta) / beta, 1 / (1 - before)
            mean = (sure[0] * x_t / (1 - beta) ** 0.5 + sure[1] * before**0.5 * x0) / sum(sure)
            same_tensor(f"The mean at t = {t}", got[0], mean, 1e-6)
            same_number(f"The variance at t = {t}", got[1], 1 / sum(sure), 1e-6 * (1 - now))


@exercise("3.2")
def _noise_of(answer: object) -> None:
    """noise_of(v, x_t, abar): the noise that a velocity stands for."""
    noise_of = a_function(answer)
    g = torch.Generator().manual_seed(32)
    x0, noise = torch.randn(2, 3, 1, 8, 8, generator=g, dtype=torch.float64)
    for abar in (0.9, 0.5, 0.1):
        signal, spread = abar**0.5, (1 - abar) ** 0.5
        v, x_t = signal * noise - spread * x0, signal * x0 + spread * noise
        same_tensor(f"The noise at abar = {abar}", noise_of(v, x_t, abar), noise, 1e-6)


@exercise("3.3")
def _loss_simple(answer: object) -> None:
    """loss_simple(net, x0, noise, t, schedule): DDPM eq. 14 as one mean."""
    loss_simple = a_function(answer)
    g = torch.Generator().manual_seed(33)
    x0, noise = torch.randn(2, 4, 1, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 200, 600, 999])
    for schedule in (Schedule.linear(), Schedule.cosine()):
        asked: list[tuple[torch.Tensor, torch.Tensor]] = []

        def net(x: torch.Tensor, t: torch.Tensor, asked: list = asked) -> torch.Tensor:
            asked.append((x, t))
            return 0.3 * x + t.double().view(-1, 1, 1, 1) / 1000

        got = loss_simple(net, x0, noise, t, schedule)
        if not asked:
            raise NotYet("The network was never asked.")
        shown = schedule.add_noise(x0, noise, t)
        same_tensor("What the network is shown", asked[0][0], shown, 1e-6)
        wanted = (net(*asked[0]) - noise).square().mean().item()
        same_number("The loss", got, wanted, 1e-6)


@exercise("3.4")
def _half_life(answer: object) -> None:
    """half_life(decay): steps until half of a moving average's memory is replaced."""
    half_life = a_function(answer)
    for decay in (0.5, 0.99, 0.9999):
        wanted = math.log(2) / -math.log(decay)
        same_number(f"The half-life of {decay}", half_life(decay), wanted, 0.001 * wanted)
