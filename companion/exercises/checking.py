"""What the checks of all chapters share: how they are registered, run, and compare answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from companion import errors

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
    """ "right", or "not yet" and why."""
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
