"""Checks for the book's exercises: try your answer, get one line back.

    >>> check("2.1", jump)          # doctest: +SKIP
    Exercise 2.1: right.

A check never shows the solution. It says "right", or what your answer gave and what was expected.
Each chapter registers its checks in a module of its own; the tests run the solution that is printed
in the notebook, and several plausible wrong answers, through the same check.
"""

from companion.exercises import (
    chapter01,
    chapter02,
    chapter03,
    chapter04,
    chapter05,
    chapter06,
    chapter07,
    chapter08,
    chapter09,
    chapter10,
    chapter11,
    chapter12,
    chapter13,
    chapter14,
    chapter15,
    chapter16,
)
from companion.exercises.checking import CHECKS, NotYet, check, exercise, verdict
