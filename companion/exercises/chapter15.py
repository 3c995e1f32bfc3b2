"""Chapter 15, side by side."""

from itertools import combinations

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number


@exercise("15.1")
def _budget(answer: object) -> None:
    """budget(trained, asked): multiply-adds of a training, from those of forward passes."""
    budget = a_function(answer)
    for trained, asked in (
        ([(100, 10)], []),
        ([(94, 384), (378, 67)], [(31, 384)]),
        ([(17, 96), (103, 384), (97, 48)], [(14, 384), (14, 48)]),
    ):
        wanted = 3 * sum(a * n for a, n in trained) + sum(a * n for a, n in asked)
        what = f"The cost of {len(trained)} trained and {len(asked)} frozen networks"
        same_number(what, budget(list(trained), list(asked)), wanted, 1e-6)


@exercise("15.2")
def _at_side(answer: object) -> None:
    """at_side(layers, attention, side, other): what a call costs at another size."""
    at_side = a_function(answer)
    for layers, attention, side, other in ((5.0, 7.0, 64, 128), (90.0, 3.0, 8, 64), (8, 2, 32, 16)):
        area = (other / side) ** 2
        wanted = layers * area + attention * area * area
        what = f"A call at {other} that at {side} is {layers:g} and {attention:g}"
        same_number(what, at_side(layers, attention, side, other), wanted, 1e-6)


@exercise("15.3")
def _unequal(answer: object) -> None:
    """unequal(seen): how often two different pictures of a prompt differ."""
    unequal = a_function(answer)
    g = torch.Generator().manual_seed(153)
    many = ["ABCD"[int(k)] for k in torch.randint(4, (9,), generator=g)]
    for seen in (["sea", "sea"], ["sea", "snow", "sea"], ["A", "B", "C"], many):
        pairs = list(combinations(seen, 2))
        wanted = sum(a != b for a, b in pairs) / len(pairs)
        same_number(f"The share for {seen!r:.60}", unequal(list(seen)), wanted, 1e-9)


@exercise("15.4")
def _half(answer: object) -> None:
    """half(runs): half the width of a 95 % interval for the mean of three runs."""
    half = a_function(answer)
    for runs in ((0.5, 0.6, 0.7), (0.81, 0.80, 0.85), (0.3, 0.3, 0.3)):
        mean = sum(runs) / 3
        spread = (sum((x - mean) ** 2 for x in runs) / 2) ** 0.5
        got = half(list(runs))
        same_number(f"Half the interval of {runs}", got, 4.302653 * spread / 3**0.5, 1e-4)
        if float(got) < 0:
            raise NotYet("A width is not negative.")
