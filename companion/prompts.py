"""The fixed examination of every system that draws from words, and how its pictures are marked.

The thousand prompts of ``prompts.json`` were drawn once, before any system was trained, and stay as
they are: one picture a prompt, no second try, read by a judge that is part of no generator. Behind
each prompt stands a scene that it describes, so that the same marks can be given to true pictures
(a ceiling for the judge) and to pictures that went through an autoencoder or an upsampler.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from companion import checkpoints, errors
from companion.scores import interval
from companion.storybook import Facts, Scene, Thing, caption, is_held_out, parse, sample

FILE = Path(__file__).with_name("prompts.json")
SEED = 20_261_124  # of the list; no training and no test draws from it
# How many prompts there are, by number of things and by whether the combination was held out.
SHARES = {(0, False): 100, (1, False): 350, (2, False): 350, (1, True): 100, (2, True): 100}
FACTS = ("sky", "place", "stream", "kind", "colour", "position")  # that a prompt may say
THIN = 0.7  # every other caption says each fact with this chance; the others say all


@dataclass(frozen=True)
class Prompt:
    """A caption, and a scene that it describes."""

    text: str
    scene: Scene

    @cached_property
    def facts(self) -> Facts:
        """What the text says."""
        return parse(self.text)

    @property
    def held_out(self) -> bool:
        """Whether it asks for a combination that no training has seen."""
        return is_held_out(self.facts)


@cache
def prompts() -> tuple[Prompt, ...]:
    """The thousand prompts, in their order."""
    found = []
    for row in checkpoints.read_json(FILE)["prompts"]:
        things = tuple(Thing(**thing) for thing in row["scene"].pop("things"))
        found.append(Prompt(row["text"], Scene(**row["scene"], things=things)))
    return tuple(found)


def draw_up(seed: int = SEED) -> tuple[Prompt, ...]:
    """Draw up the list anew: ``prompts.json`` holds what this gives."""
    g = torch.Generator().manual_seed(seed)
    found: dict[str, Prompt] = {}
    for (things, held_out), share in SHARES.items():
        mine = 0
        while mine < share:
            scene = sample(1, g, held_out=held_out, things=(things,))[0]
            text = caption(scene, 1.0 if mine % 2 else THIN, g)
            said = parse(text)
            fits = len(said.things) == things and is_held_out(said) == held_out
            if fits and text not in found:
                found[text] = Prompt(text, scene)
                mine += 1
    order = torch.randperm(len(found), generator=g).tolist()
    return tuple(list(found.values())[i] for i in order)


def write(path: Path = FILE) -> None:
    """Write ``draw_up()`` to the file; run once."""
    rows = [json.dumps({"text": p.text, "scene": asdict(p.scene)}) for p in draw_up()]
    lines = ",\n".join(rows)  # a prompt a line
    checkpoints.write_text(path, f'{{"seed": {SEED}, "prompts": [\n{lines}\n]}}\n')


# ---------------------------------------------------------------- marks


def swapped(said: Facts, seen: Facts | None) -> bool | None:
    """Whether both things are there with each other's colours.

    None where the question makes no sense: the prompt does not name two kinds and two colours that
    differ, or the picture does not show these two kinds in these two colours at all.
    """
    if len(said.things) != 2 or seen is None or len(seen.things) != 2:
        return None
    wanted = {(t.kind, t.colour) for t in said.things}
    shown = {(t.kind, t.colour) for t in seen.things}
    (a, x), (b, y) = ((t.kind, t.colour) for t in said.things)
    if a == b or x == y or None in (x, y):
        return None
    if shown == wanted:
        return False
    return True if shown == {(a, y), (b, x)} else None


def marks(asked: Sequence[Prompt], read: Sequence[Facts | None]) -> dict[str, dict[str, float]]:
    """Marks for pictures of prompts, as a judge read them: shares with 95 % intervals.

    Args:
        asked: The prompts, in order.
        read: What ``Judge.read`` says of the picture of each; None is never right.

    Returns:
        "sky", "place", "stream": shares of the prompts that say so whose picture shows it.
        "kind", "colour", "position": shares of the things said, matched in the best order.
        "one thing", "two things", "no thing": prompts with everything said right. The same with
        ", held out" for combinations that training never saw, which count nowhere else.
        "swapped": of the pictures with both kinds and both colours, those that exchange them.
        "no scene": pictures that the judge takes for no scene at all.
    """
    errors.expect(
        len(asked) == len(read), f"there are {len(read)} readings of {len(asked)} prompts."
    )
    counts: dict[str, list[int]] = {}

    def count(name: str, holds: bool) -> None:
        entry = counts.setdefault(name, [0, 0])
        entry[0] += int(holds)
        entry[1] += 1

    words = ("no thing", "one thing", "two things")
    for prompt, seen in zip(asked, read, strict=True):
        said, away = prompt.facts, ", held out" if prompt.held_out else ""
        whole = seen is not None and said.holds_for(seen)
        count(words[len(said.things)] + away, whole)
        if away:
            continue
        count("no scene", seen is None)
        if said.sky is not None:
            count("sky", seen is not None and seen.sky == said.sky)
        if said.place is not None:
            count("place", seen is not None and seen.place == said.place)
        if said.stream:
            count("stream", seen is not None and seen.stream)
        for what, holds in _things(said, seen):
            count(what, holds)
        exchanged = swapped(said, seen)
        if exchanged is not None:
            count("swapped", exchanged)
    order = (*FACTS, *words)
    order = (*order, *(f"{w}, held out" for w in words), "swapped", "no scene")
    return {name: interval(*counts[name]) for name in order if name in counts}


def right(asked: Sequence[Prompt], read: Sequence[Facts | None]) -> list[bool]:
    """Whether each picture shows all that its prompt says."""
    return [
        seen is not None and prompt.facts.holds_for(seen)
        for prompt, seen in zip(asked, read, strict=True)
    ]


def shares_right(asked: Sequence[Prompt], read: Sequence[Facts | None]) -> list[float]:
    """Prompt by prompt the share shown of all facts that it says; held-out ones are left out."""
    shares = []
    for prompt, seen in zip(asked, read, strict=True):
        found = marks([prompt], [seen])
        parts = [found[what] for what in FACTS if what in found]
        if parts:
            total = sum(part["n"] for part in parts)
            shares.append(sum(part["value"] * part["n"] for part in parts) / total)
    return shares


def _things(said: Facts, seen: Facts | None) -> list[tuple[str, bool]]:
    """(what, right) of every kind, colour and position said, in the order that serves best."""
    best: list[tuple[str, bool]] = []
    shown = [*(() if seen is None else seen.things), None, None][:2]
    for order in (shown, shown[::-1]):
        found = []
        for thing, other in zip(said.things, order, strict=False):
            for what in ("kind", "colour", "position"):
                wanted = getattr(thing, what)
                if wanted is not None:
                    found.append((what, other is not None and getattr(other, what) == wanted))
        if not best or sum(holds for _, holds in found) > sum(holds for _, holds in best):
            best = found
    return best


# ---------------------------------------------------------------- variety

ASKED_FOR_VARIETY = ("sky", "place", "kind", "colour")


def variety(read: Sequence[Facts | None], said: Facts) -> dict[str, float]:
    """How varied pictures of one prompt are in what it does not say.

    Args:
        read: What the judge says of many pictures of the same prompt; those that are no scene are
            left out.
        said: What the prompt says.

    Returns:
        For each of sky, place, kind and colour that the prompt leaves open: the exponential of the
        entropy of what is seen, which is the number of possibilities if all were equally frequent.
        Kinds and colours are those of a single thing, asked of prompts with one thing or none.
    """
    seen = [facts for facts in read if facts is not None]
    errors.expect(bool(seen), "no picture shows a scene, so there is nothing to compare.")
    open_: dict[str, list[str]] = {}
    thing = said.things[0] if said.things else None
    for facts in seen:
        for what in ("sky", "place"):
            if getattr(said, what) is None:
                open_.setdefault(what, []).append(getattr(facts, what))
        for what in ("kind", "colour"):
            if (thing is None or getattr(thing, what) is None) and len(facts.things) == 1:
                open_.setdefault(what, []).append(getattr(facts.things[0], what))
    return {what: possibilities(values) for what, values in open_.items()}


def possibilities(values: Sequence[str]) -> float:
    """The exponential of the entropy of a list; 1 for an empty one."""
    counts = [count for _, count in sorted(Counter(values).items())]
    shares = torch.tensor(counts, dtype=torch.float64) / max(1, len(values))
    return torch.special.entr(shares).sum().exp().item()
