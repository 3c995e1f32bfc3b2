"""What a Storybook picture is made of: scenes, the facts they hold, and scenes drawn by lot.

A :class:`Scene` is data. It fixes a picture completely: the same scene gives the same picture at
every resolution and on every machine. What a caption may mention are its :class:`Facts`; all else
(where the clouds hang, how the stream bends) follows from ``scene.seed`` and is never said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import permutations

import torch

SKIES = ("noon", "dusk", "night", "rain", "aurora")
PLACES = ("meadow", "sea", "desert", "snow", "woods", "mountains")
KINDS = ("house", "tree", "boat", "mushroom", "balloon", "flower", "tent", "cat", "car")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
POSITIONS = ("left", "middle", "right")

STREAM_PLACES = ("meadow", "desert", "snow", "woods", "mountains")  # the sea has water enough
MOST_THINGS = 2

# Held out of all training, to measure composition: each kind lacks one colour, each sky one place.
HELD_OUT_THINGS = frozenset((kind, COLOURS[(3 * i + 1) % 8]) for i, kind in enumerate(KINDS))
HELD_OUT_VIEWS = frozenset((sky, PLACES[(2 * i + 1) % 6]) for i, sky in enumerate(SKIES))


def _known(what: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(options)}")


@dataclass(frozen=True, order=True)
class ThingFacts:
    """What is said of one thing: its kind, and perhaps its colour and its position."""

    kind: str
    colour: str | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        _known("kind of thing", self.kind, KINDS)
        if self.colour is not None:
            _known("colour", self.colour, COLOURS)
        if self.position is not None:
            _known("position", self.position, POSITIONS)

    def holds_for(self, seen: ThingFacts) -> bool:
        """True where everything said here is so in ``seen``."""
        return (
            self.kind == seen.kind
            and self.colour in (None, seen.colour)
            and self.position in (None, seen.position)
        )

    def _key(self) -> tuple[str, str, str]:
        return (self.kind, self.colour or "", self.position or "")


@dataclass(frozen=True)
class Facts:
    """What a text says about a picture, or what a picture shows. ``None`` means: not said.

    Things have no order: they are kept sorted, so that equal facts compare equal. ``stream=False``
    means that no stream was mentioned; no caption says that there is none.
    """

    sky: str | None = None
    place: str | None = None
    stream: bool = False
    things: tuple[ThingFacts, ...] = ()

    def __post_init__(self) -> None:
        if self.sky is not None:
            _known("sky", self.sky, SKIES)
        if self.place is not None:
            _known("place", self.place, PLACES)
        if len(self.things) > MOST_THINGS:
            raise ValueError(f"a scene has at most {MOST_THINGS} things, got {len(self.things)}")
        object.__setattr__(self, "things", tuple(sorted(self.things, key=ThingFacts._key)))

    def __len__(self) -> int:
        """How many single facts are said: sky, place, stream, and kind, colour, position each."""
        said = (self.sky is not None) + (self.place is not None) + self.stream
        return said + sum(
            1 + (t.colour is not None) + (t.position is not None) for t in self.things
        )

    def holds_for(self, seen: Facts) -> bool:
        """True where everything said here is so in ``seen`` (which may hold more)."""
        if self.sky not in (None, seen.sky) or self.place not in (None, seen.place):
            return False
        if self.stream and not seen.stream:
            return False
        return any(
            all(said.holds_for(thing) for said, thing in zip(self.things, order, strict=False))
            for order in permutations(seen.things, len(self.things))
        )

    def thinned(self, completeness: float, generator: torch.Generator) -> Facts:
        """Leave facts out at random: each is kept with probability ``completeness``.

        At least one fact always stays. Of two things, one may stay away whole; positions of a pair
        are kept or dropped together, since a sentence relates the two.
        """
        if not 0.0 <= completeness <= 1.0:
            raise ValueError(f"completeness is a probability from 0 to 1, got {completeness!r}")

        def keep() -> bool:
            return bool(torch.rand((), generator=generator).item() < completeness)

        things = [t for t in self.things if keep()]
        with_position = keep()
        things = [
            replace(
                t,
                colour=t.colour if keep() else None,
                position=t.position if with_position else None,
            )
            for t in things
        ]
        sky, place, stream = keep(), keep(), keep()
        thin = Facts(
            self.sky if sky else None,
            self.place if place else None,
            self.stream and stream,
            tuple(things),
        )
        if len(thin) or not len(self):
            return thin
        # Nothing was left: say the one thing that one would say first.
        if self.things:
            i = int(torch.randint(len(self.things), (), generator=generator))
            return Facts(things=(ThingFacts(self.things[i].kind),))
        return Facts(place=self.place) if self.place is not None else Facts(sky=self.sky)


@dataclass(frozen=True)
class Thing:
    """One thing in a scene: ``x`` is its middle, 0 (left edge) to 1; ``size`` its height."""

    kind: str
    colour: str
    x: float = 0.5
    size: float = 0.46

    def __post_init__(self) -> None:
        _known("kind of thing", self.kind, KINDS)
        _known("colour", self.colour, COLOURS)
        if not 0.15 <= self.x <= 0.85:
            raise ValueError(f"a thing's x lies from 0.15 to 0.85 (picture widths), got {self.x!r}")
        if not 0.25 <= self.size <= 0.6:
            raise ValueError(f"a thing's size lies from 0.25 to 0.6, got {self.size!r}")

    @property
    def position(self) -> str:
        """ "left", "middle" or "right": thirds of the picture, the middle one a little narrower."""
        return POSITIONS[int(self.x > 0.38) + int(self.x >= 0.62)]


@dataclass(frozen=True)
class Scene:
    """A picture as data: a sky, a place, perhaps a stream, up to two things, and a seed.

    Two things stand one on the left and one on the right. ``seed`` decides whatever no caption
    mentions.
    """

    sky: str = "noon"
    place: str = "meadow"
    stream: bool = False
    things: tuple[Thing, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _known("sky", self.sky, SKIES)
        _known("place", self.place, PLACES)
        if self.stream and self.place not in STREAM_PLACES:
            raise ValueError(
                f"no stream runs through a {self.place!r} scene: choose {', '.join(STREAM_PLACES)}"
            )
        if len(self.things) > MOST_THINGS:
            raise ValueError(f"a scene has at most {MOST_THINGS} things, got {len(self.things)}")
        if len(self.things) == 2 and [t.position for t in self.things] != ["left", "right"]:
            where = [t.position for t in self.things]
            raise ValueError(f"two things stand left and right, in this order, got {where}")

    def facts(self) -> Facts:
        """Everything that a caption of this scene could say."""
        things = tuple(ThingFacts(t.kind, t.colour, t.position) for t in self.things)
        return Facts(self.sky, self.place, self.stream, things)


def is_held_out(scene: Scene | Facts) -> bool:
    """True for the combinations that no training ever sees: see ``HELD_OUT_*`` in this module."""
    pairs = {(t.kind, t.colour) for t in scene.things}
    return bool(pairs & HELD_OUT_THINGS) or (scene.sky, scene.place) in HELD_OUT_VIEWS


def sample(
    n: int,
    generator: torch.Generator,
    *,
    held_out: bool | None = False,
    things: Iterable[int] = (0, 1, 2),
) -> list[Scene]:
    """Draw ``n`` scenes by lot.

    Args:
        n: how many.
        generator: source of all chance; the same generator state gives the same scenes.
        held_out: False for the combinations that training may see, True for the others only,
            None for all.
        things: how many things a scene may have; one in ten scenes has none where 0 is allowed,
            else the counts are equally likely.
    """
    counts = tuple(sorted(set(things)))
    if n < 0 or not counts or not set(counts) <= {0, 1, 2}:
        raise ValueError(f"expected n >= 0 and things from (0, 1, 2), got n={n!r}, {things!r}")
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = _draw(generator, counts)
        if held_out is None or is_held_out(scene) == held_out:
            scenes.append(scene)
    return scenes


def _draw(generator: torch.Generator, counts: tuple[int, ...]) -> Scene:
    u = torch.rand(16, generator=generator, dtype=torch.float64).tolist()

    def pick(options: tuple[str, ...], r: float) -> str:
        return options[int(r * len(options))]

    sky, place = pick(SKIES, u[0]), pick(PLACES, u[1])
    stream = place in STREAM_PLACES and u[2] < 0.3
    busy = [c for c in counts if c > 0]
    empty = 0 in counts and (u[3] < 0.1 or not busy)
    number = 0 if empty else busy[int(u[4] * len(busy))]
    spots: tuple[float, ...] = ()
    if number == 1:
        spots = ((0.25, 0.5, 0.75)[int(u[5] * 3)],)
    elif number == 2:
        spots = (0.26, 0.74)
    found = []
    for i, spot in enumerate(spots):
        kind, colour = pick(KINDS, u[6 + 4 * i]), pick(COLOURS, u[7 + 4 * i])
        x = round(spot + 0.08 * (u[8 + 4 * i] - 0.5), 4)
        low = 0.44 if number == 1 else 0.40
        found.append(Thing(kind, colour, x, round(low + 0.08 * u[9 + 4 * i], 4)))
    return Scene(sky, place, stream, tuple(found), seed=int(u[14] * 2**31))
