"""Storybook: a picture world whose truth is known.

Flat picture-book scenes, drawn from data at any size, captioned in English that can be read back.

    >>> scene = Scene("dusk", "woods", stream=True, things=(Thing("house", "red", x=0.25),))
    >>> picture = render(scene, 64)                          # (1, 3, 64, 64), from 0 to 1
    >>> parse("a stream flowing through the woods").place
    'woods'
"""

from .draw import render
from .scene import (
    COLOURS,
    KINDS,
    PLACES,
    POSITIONS,
    SKIES,
    Facts,
    Scene,
    Thing,
    ThingFacts,
    is_held_out,
    sample,
)
from .words import caption, parse, write
