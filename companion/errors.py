"""Checks at the door: what came, what was expected, how to fix it.

Every check returns quietly or raises one ``TypeError`` (the wrong kind of thing) or ``ValueError``
(the right kind, a wrong value) with one line that a reader can act on. Call them where a user's
value enters, before any long work; inner loops need none (on a GPU, reading a range waits for it).
"""

import math
from collections.abc import Iterable
from difflib import get_close_matches

import torch


def expect(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def one_of(name: str, value: object, options: Iterable[object]) -> None:
    """Check that ``value`` is among ``options``; the error lists them and guesses one."""
    options = list(options)
    if any(value is o or (type(value) is type(o) and value == o) for o in options):
        return
    names = [str(o) for o in options]
    guess = get_close_matches(str(value), names, n=1)
    guess = guess or [n for n in names if str(value) and n.startswith(str(value))]
    hint = f" Did you mean {guess[0]!r}?" if guess else ""
    listed = ", ".join(repr(o) for o in options) or "nothing"
    raise ValueError(f"{name} is {value!r}; expected one of {listed}.{hint}")


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    integer: bool = False,
) -> None:
    """Check that ``value`` is a finite number in [low, high]; with ``integer``, a whole one."""
    kind = "a whole number" if integer else "a number"
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {kind}.")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected {kind}{_between(low, high)}.")


def tensor(
    name: str,
    x: object,
    shape: str | None = None,
    dtype: str | torch.dtype | None = None,
    low: float | None = None,
    high: float | None = None,
    finite: bool = True,
) -> None:
    """Check one tensor argument.

    Args:
        name: What the caller calls it; every message starts with it.
        x: The value.
        shape: Sizes separated by spaces, such as ``"B 3 H W"``: a number must match, a letter
            stands for any size of at least 1 and for the same size wherever it is repeated.
        dtype: A torch dtype, or ``"float"``, ``"int"`` (any integer type) or ``"bool"``.
        low: Least value allowed.
        high: Greatest value allowed.
        finite: Refuse NaN and infinity.

    Raises:
        TypeError: ``x`` is no tensor, or its dtype is wrong.
        ValueError: Its shape, its range or a value that is not finite.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; expected a torch.Tensor.")
    if dtype is not None and not _has_dtype(x, dtype):
        wanted = {"float": "a floating-point type", "int": "an integer type", "bool": "torch.bool"}
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected {wanted.get(dtype, dtype)}."
            f" Convert it first, for example with .{_cast(dtype)}."
        )
    if shape is not None and not _has_shape(x, shape):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected ({shape.replace(' ', ', ')})."
        )
    if x.numel() == 0 or x.dtype == torch.bool:
        return
    if finite and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name} has {bad} of {x.numel()} values that are NaN or infinite.")
    least, most = x.min().item(), x.max().item()
    if (low is not None and not least >= low) or (high is not None and not most <= high):
        within = _between(-math.inf if low is None else low, math.inf if high is None else high)
        raise ValueError(f"{name} runs from {least:.4g} to {most:.4g}; expected values{within}.")


def _between(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return " that are finite"
    if math.isinf(high):
        return f" of at least {low:g}"
    if math.isinf(low):
        return f" of at most {high:g}"
    return f" from {low:g} to {high:g}"


def _has_dtype(x: torch.Tensor, dtype: str | torch.dtype) -> bool:
    if dtype == "float":
        return x.is_floating_point()
    if dtype == "int":
        return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    return x.dtype == (torch.bool if dtype == "bool" else dtype)


def _cast(dtype: str | torch.dtype) -> str:
    named = {"float": "float()", "int": "long()", "bool": "bool()"}
    return named.get(dtype, f"to({dtype})")


def _has_shape(x: torch.Tensor, shape: str) -> bool:
    letters = shape.split()
    if x.ndim != len(letters):
        return False
    sizes: dict[str, int] = {}
    for letter, size in zip(letters, x.shape, strict=True):
        if letter.isdigit():
            if size != int(letter):
                return False
        elif size < 1 or sizes.setdefault(letter, size) != size:
            return False
    return True
