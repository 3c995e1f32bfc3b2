"""Plausible wrong answers, a module a chapter; ``WRONG`` has them all."""

from . import (
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

WRONG = [
    *chapter01.WRONG,
    *chapter02.WRONG,
    *chapter03.WRONG,
    *chapter04.WRONG,
    *chapter05.WRONG,
    *chapter06.WRONG,
    *chapter07.WRONG,
    *chapter08.WRONG,
    *chapter09.WRONG,
    *chapter10.WRONG,
    *chapter11.WRONG,
    *chapter12.WRONG,
    *chapter13.WRONG,
    *chapter14.WRONG,
    *chapter15.WRONG,
    *chapter16.WRONG,
]
