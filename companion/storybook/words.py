"""English for scenes, both ways: :func:`caption` writes it, :func:`parse` reads it back.

The phrases below are the whole language. ``caption`` picks among them; ``parse`` looks for them in
any text, longest first, and ignores every other word. So a person may write freely, and whatever a
caption says is read back exactly.
"""

from __future__ import annotations

import re

import torch

from .scene import COLOURS, Facts, Scene, ThingFacts

SKY_PHRASES = {
    "noon": ("at noon", "on a sunny day", "under a bright blue sky"),
    "dusk": ("at dusk", "at sunset", "under an evening sky"),
    "night": ("at night", "under the moon and stars", "on a starry night"),
    "rain": ("in the rain", "on a rainy day", "under grey clouds"),
    "aurora": ("under the northern lights", "below the aurora", "under a green aurora"),
}
PLACE_PHRASES = {
    "meadow": ("in a meadow", "on a green meadow", "among the meadow flowers"),
    "sea": ("by the sea", "on the beach", "at the seaside"),
    "desert": ("in the desert", "among the dunes", "on the desert sand"),
    "snow": ("in the snow", "on snowy hills", "in a snowy land"),
    "woods": ("in the woods", "in the forest", "among the pines"),
    "mountains": ("in the mountains", "below the mountains", "at the foot of the mountains"),
}
PLACE_NOUNS = {  # for sentences whose subject is the place
    "meadow": ("a meadow", "a green meadow"),
    "sea": ("the sea", "a beach"),
    "desert": ("the desert", "sand dunes"),
    "snow": ("snowy hills", "a snowy land"),
    "woods": ("the woods", "a forest"),
    "mountains": ("the mountains", "mountains"),
}
KIND_NOUNS = {
    "house": ("house", "cottage"),
    "tree": ("tree",),
    "boat": ("boat", "sailing boat"),
    "mushroom": ("mushroom", "toadstool"),
    "balloon": ("balloon", "hot-air balloon"),
    "flower": ("flower", "blossom"),
    "tent": ("tent",),
    "cat": ("cat", "kitten"),
    "car": ("car",),
}
POSITION_PHRASES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}

# Words that parse understands beyond those that caption writes.
_SKY_WORDS = {
    "noon": ("noon", "midday", "sunny", "sunshine", "blue sky", "daytime"),
    "dusk": ("dusk", "sunset", "evening", "twilight", "setting sun"),
    "night": ("night", "moon", "moonlight", "starry", "midnight"),
    "rain": ("rain", "rainy", "raining", "grey clouds", "gray clouds", "grey sky", "rainy night"),
    "aurora": ("northern lights", "aurora", "aurora borealis"),
}
_PLACE_WORDS = {
    "meadow": ("meadow", "meadows", "meadow flowers", "grassland"),
    "sea": ("sea", "seaside", "beach", "shore", "ocean"),
    "desert": ("desert", "dune", "dunes", "sand dunes"),
    "snow": ("snow", "snowy"),
    "woods": ("woods", "wood", "forest", "pines", "among the trees"),
    "mountains": ("mountains", "mountain"),
}
_STREAM_WORDS = ("stream", "brook", "creek")
_MIDDLE_WORDS = ("in the middle", "in the centre", "in the center")


def _pick(options, generator: torch.Generator | None):
    """One of several wordings; the first where there is no generator."""
    if generator is None:
        return options[0]
    return options[int(torch.randint(len(options), (), generator=generator))]


def _noun(thing: ThingFacts, generator: torch.Generator | None) -> str:
    words = [_pick(KIND_NOUNS[thing.kind], generator)]
    if thing.colour is not None:
        words.insert(0, thing.colour)
    if _pick((False, False, False, True), generator):
        words.insert(0, "little")
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _things(things: tuple[ThingFacts, ...], generator: torch.Generator | None) -> str:
    if len(things) == 1:
        noun = _noun(things[0], generator)
        where = things[0].position
        return noun if where is None else f"{noun} {POSITION_PHRASES[where]}"
    if None in (things[0].position, things[1].position):
        first, second = _pick((things, things[::-1]), generator)
        joint = _pick(("and", "and", "beside", "next to"), generator)
        return f"{_noun(first, generator)} {joint} {_noun(second, generator)}"
    left, right = sorted(things, key=lambda t: t.position)  # "left" < "right"
    a, b = _noun(left, generator), _noun(right, generator)
    forms = (
        f"{a} to the left of {b}",
        f"{b} to the right of {a}",
        f"{a} left of {b}",
        f"{b} right of {a}",
        f"{a} on the left and {b} on the right",
    )
    return _pick(forms, generator)


def write(facts: Facts, generator: torch.Generator | None = None) -> str:
    """Say exactly these facts in English; "" for none. Without a generator: the plainest words."""
    place = facts.place
    sky = _pick(SKY_PHRASES[facts.sky], generator) if facts.sky else ""
    where = _pick(PLACE_PHRASES[place], generator) if place else ""
    if not facts.things:
        if facts.stream:
            if place:
                noun = _pick(PLACE_NOUNS[place], generator)
                verb = _pick(("flowing through", "winding through", "running through"), generator)
                return f"a stream {verb} {noun} {sky}".strip()
            return f"a stream {sky}".strip()
        subject = _pick(PLACE_NOUNS[place], generator) if place else ""
        return f"{subject} {sky}".strip()
    body = _things(facts.things, generator)
    if facts.stream:
        near = _pick(("by a stream", "with a stream", "beside a brook"), generator)
        where = f"{near} {where}".strip()
    order = _pick(((body, where, sky), (body, sky, where), (sky, body, where)), generator)
    text = " ".join(part for part in order if part)
    if order[0] is sky and sky:
        text = text.replace(sky, f"{sky},", 1)
    return (
        _pick(("", "", "", "a picture of ", "a drawing of "), generator) + text
        if (order[0] is body)
        else text
    )


def caption(
    scene: Scene, completeness: float = 1.0, generator: torch.Generator | None = None
) -> str:
    """Describe a scene.

    Args:
        scene: what to describe.
        completeness: the chance, from 0 to 1, with which each fact is said. At 1 everything is
            said; below, captions leave things out, as captions on the web do. At least one fact is
            always said.
        generator: picks the wording and what is left out. Without one the plainest wording is used;
            completeness must then be 1.
    """
    if generator is None and completeness != 1.0:
        raise ValueError(
            f"a caption with completeness {completeness!r} leaves things out by chance: "
            "give a generator"
        )
    facts = scene.facts()
    if completeness != 1.0:
        facts = facts.thinned(completeness, generator)
    return write(facts, generator)


# ---------------------------------------------------------------- reading


def _patterns() -> list[tuple[re.Pattern, str, str]]:
    """(pattern, what, value), longest phrase first, each a whole word or phrase."""
    found: list[tuple[str, str, str]] = []
    for what, tables in (
        ("sky", (SKY_PHRASES, _SKY_WORDS)),
        ("place", (PLACE_PHRASES, PLACE_NOUNS, _PLACE_WORDS)),
    ):
        for table in tables:
            found += [
                (phrase, what, value) for value, options in table.items() for phrase in options
            ]
    for kind, nouns in KIND_NOUNS.items():
        found += [(form, "kind", kind) for noun in nouns for form in (noun, noun + "s")]
    found += [
        ("hot air balloon", "kind", "balloon"),
        ("sailboat", "kind", "boat"),
        ("blossoms", "kind", "flower"),
    ]
    found += [(colour, "colour", colour) for colour in COLOURS]
    found += [(word, "stream", "yes") for word in _STREAM_WORDS]
    found += [(phrase, "at", where) for where, phrase in POSITION_PHRASES.items()]
    found += [(phrase, "at", "middle") for phrase in _MIDDLE_WORDS]
    for side in ("left", "right"):
        found += [(f"to the {side} of", "relation", side), (f"{side} of", "relation", side)]
        found += [(f"to the {side}", "at", side)]
    unique = {phrase: (what, value) for phrase, what, value in reversed(found)}
    longest_first = sorted(unique.items(), key=lambda item: -len(item[0]))
    return [(re.compile(rf"\b{re.escape(p)}\b"), what, value) for p, (what, value) in longest_first]


_PATTERNS = _patterns()


def parse(text: str) -> Facts:
    """Read the facts that a text says; words that Storybook does not know are passed over.

    Where a text contradicts itself (two skies), the first mention counts; of more than two things,
    the first two.
    """
    if not isinstance(text, str):
        raise TypeError(f"parse reads a string, got {type(text).__name__}")
    left = re.sub(r"[^a-z\- ]+", " ", text.lower())
    tokens: list[tuple[int, str, str]] = []
    for pattern, what, value in _PATTERNS:
        for match in pattern.finditer(left):
            tokens.append((match.start(), what, value))
        left = pattern.sub(lambda m: "#" * len(m.group()), left)
    sky = place = colour = relation = None
    stream = False
    things: list[dict] = []
    for _, what, value in sorted(tokens):
        if what == "sky":
            sky = sky or value
        elif what == "place":
            place = place or value
        elif what == "stream":
            stream = True
        elif what == "colour":
            colour = value
        elif what == "kind":
            things.append({"kind": value, "colour": colour, "position": None})
            colour = None
        elif what == "at" and things and things[-1]["position"] is None:
            things[-1]["position"] = value
        elif what == "relation" and len(things) == 1:
            relation = value
    things = things[:2]
    if relation is not None and len(things) == 2:
        things[0]["position"] = relation
        things[1]["position"] = "right" if relation == "left" else "left"
    return Facts(sky, place, stream, tuple(ThingFacts(**t) for t in things))
