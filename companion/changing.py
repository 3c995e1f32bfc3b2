"""Chapter 9's measurements: what stays of a picture that is varied, mixed, told to change, reduced.

A picture has two halves, its place in CLIP's space and its own noise (``manipulations``). Here
whole batches of pictures are taken apart, one half is kept or changed, and the judge reads what
came of it, at the 16 x 16 pixels that the decoder draws, so that no upsampler has a part in it.
Each table is made by ``python -m companion measure NAME``, with NAME one of ``variations``,
``interpolations``, ``text-diffs`` and ``principal-components``.

Letters: B pictures, D the width of CLIP's space.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import errors
from companion.dalle2 import DALLE2
from companion.data import to_signed, to_unit
from companion.examination import dalle2
from companion.judge import Judge
from companion.manipulations import slerp
from companion.measure import measurement
from companion.prior_ar import spectrum
from companion.prompts import Prompt
from companion.prompts import marks as marked
from companion.recipes.decoder import legible
from companion.recipes.encoded import SIZE, SMALL, again
from companion.recipes.priors import Probe
from companion.scores import interval, mean_interval, together
from companion.storybook import POSITIONS, Facts, Scene, is_held_out, render, sample, write
from companion.unclip import UnCLIP, Walk

STEPS = 25
SCALE = 3.0  # of the decoder's guidance, where the noise is any; with a picture's own it is 1
NEEDS = ("clip", "text-encoder", "decoder", "decoder/text_proj", "judge")
PART = 50  # pictures at a time

# Of each measurement: how many pictures, and the seed of their scenes, which no training draws.
VARIED, SWEPT, INVERTED, CROSSED, VARIED_SEED = 150, 60, 12, 40, 901
SCALES, ETAS = (1.0, 2.0, 3.0, 5.0), (0.0, 0.25, 0.5, 1.0)
WALKS = (5, 10, 25, 50)
PAIRS, PAIRS_SEED, SHARES = 60, 902, tuple(k / 6 for k in range(7))
TRIES, TUNED, TRIES_SEED, TUNED_SEED = 100, 24, 903, 1903  # for each of the changes
CHANGES = (("sky", "noon", "night"), ("colour", "red", "blue"), ("place", "meadow", "snow"))
THETAS = (0.2, 0.3, 0.35, 0.4, 0.45, 0.5)
KNOWN, KNOWN_SEED, REDUCED, REDUCED_SEED = 2048, 905, 100, 904
COMPONENTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
QUESTIONS = ("sky", "place", "stream", "kind", "colour", "position", "all", "no scene")


# --- the machine, and its two halves --------------------------------------------------------------


def decode(
    pipe: UnCLIP,
    places: Tensor,
    noise: Tensor | None = None,
    *,
    scale: float = 1.0,
    eta: float = 0.0,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """What the decoder draws for places, told no caption.

    Args:
        pipe: The system.
        places: (B, D) in CLIP's space, not normalised.
        noise: (B, 3, h, w) that DDIM starts from, by the timesteps of ``invert``; None: any, walked
            by the folder's own sampler, as variations without ``eta`` are.
        scale: s = 1 + w.
        eta: Share of fresh noise in DDIM's steps.
        steps: Timesteps.
        seed: Of all noise that is drawn.

    Returns:
        (B, 3, h, w) in [0, 1].
    """
    scheduler, own = pipe.decoder_scheduler, noise is not None
    sampler = "ddim" if own else scheduler.choose(None)
    timesteps = scheduler.timesteps(sampler, steps, spacing="leading" if own else None)
    side = pipe.decoder.config.sample_size
    g, drawn = torch.Generator().manual_seed(seed), []
    for i in range(0, len(places), PART):
        part = places[i : i + PART]
        nothing = pipe.encode_prompts([""]).each(len(part))
        walk = Walk(sampler, timesteps, (side, side), noise[i : i + PART] if own else None)
        drawn.append(pipe.draw_small(part, nothing, nothing, walk, scale, g, eta=eta))
    return to_unit(torch.cat(drawn))


def halves(
    pipe: DALLE2, pictures: Tensor, steps: int = STEPS, iterations: int = 2
) -> tuple[Tensor, Tensor]:
    """Places (B, D) and own noise (B, 3, h, w) of pictures (B, 3, H, H) in [0, 1]."""
    parts = [pipe.invert(x, steps=steps, iterations=iterations) for x in pictures.split(PART)]
    places, noise = zip(*parts, strict=True)
    return torch.cat(places), torch.cat(noise)


def known(pipe: UnCLIP, n: int = KNOWN) -> tuple[Tensor, list[Scene]]:
    """Places (n, D) of scenes such as training saw, and the scenes."""
    g = torch.Generator().manual_seed(KNOWN_SEED)
    scenes = sample(n, g)
    parts = [scenes[i : i + PART] for i in range(0, n, PART)]
    return torch.cat([see(pipe, render(part, SIZE)) for part in parts]), scenes


def see(pipe: UnCLIP, pictures: Tensor) -> Tensor:
    """Places (B, D) of pictures (B, 3, H, H) in [0, 1]."""
    return torch.cat([pipe.encode_image(x) for x in pictures.split(PART)])


def small(pictures: Tensor) -> Tensor:
    """True pictures at the decoder's size."""
    return F.avg_pool2d(pictures, SIZE // SMALL)


def apart(a: Tensor, b: Tensor) -> Tensor:
    """How far pictures (B, 3, h, w) lie apart: root of the mean squared difference, (B,)."""
    return (a - b).square().flatten(1).mean(1).sqrt()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in [0, 1], in dB, (B,)."""
    return -20 * apart(a, b).log10()


# --- what can be read -----------------------------------------------------------------------------


def answers(facts: Facts) -> dict[str, object]:
    """Each single answer: sky, place, stream; what stands at each position, and its colour."""
    found: dict[str, object] = {"sky": facts.sky, "place": facts.place, "stream": facts.stream}
    at = {thing.position: thing for thing in facts.things}
    for where in POSITIONS:
        found[f"kind {where}"] = at[where].kind if where in at else "nothing"
        if where in at:
            found[f"colour {where}"] = at[where].colour
    return found


def sides(seen: Facts | None, a: Facts, b: Facts) -> dict[str, float]:
    """Of the answers in which two pictures differ, the shares that a third one has of each.

    A colour is asked for only where both have a thing. A picture that is no scene has neither.
    """
    one, other = answers(a), answers(b)
    differ = [k for k in one if k in other and one[k] != other[k]]
    errors.expect(bool(differ), "the two pictures have the same facts: nothing tells them apart.")
    here = {} if seen is None else answers(seen)
    of_a = sum(here.get(k) == one[k] for k in differ) / len(differ)
    of_b = sum(here.get(k) == other[k] for k in differ) / len(differ)
    return {"of a": of_a, "of b": of_b, "of neither": 1 - of_a - of_b}


def marks(read: Sequence[Facts | None], scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Shares, with intervals, of what scenes show that was read: see ``prompts.marks``.

    Kinds and colours count wherever the thing stands; "position" is for where. "all" counts
    pictures that are read as the scene in everything, "no scene" those that show none.
    """
    asked = [Prompt(write(scene.facts()), scene) for scene in scenes]
    found = {k: v for k, v in marked(asked, read).items() if k in QUESTIONS}
    right = sum(seen == scene.facts() for seen, scene in zip(read, scenes, strict=True))
    return found | {"all": interval(right, len(scenes))}


# --- changing one half ----------------------------------------------------------------------------


def changed(scene: Scene, what: str, before: str, after: str) -> Scene | None:
    """The scene with one fact changed; None where it does not hold, or no training saw the result.

    A colour is one thing's; a scene that has the new one already is no case for it.
    """
    if what == "colour":
        colours = [thing.colour for thing in scene.things]
        if colours.count(before) != 1 or after in colours:
            return None
        things = tuple(
            replace(thing, colour=after) if thing.colour == before else thing
            for thing in scene.things
        )
        scene = replace(scene, things=things)
    elif getattr(scene, what) == before:
        scene = replace(scene, **{what: after})
    else:
        return None
    return None if is_held_out(scene) else scene


def cases(n: int, change: tuple[str, str, str], seed: int) -> list[tuple[Scene, Scene]]:
    """``n`` scenes for which a change makes sense, with what they would be after it."""
    g, found = torch.Generator().manual_seed(seed), []
    while len(found) < n:
        for scene in sample(100, g):
            after = changed(scene, *change)
            if after is not None:
                found.append((scene, after))
    return found[:n]


def turned(pipe: UnCLIP, places: Tensor, said: Iterable[tuple[str, str]], theta: float) -> Tensor:
    """Places (B, D) turned by what two captions of each differ in (section 3.3), theta of the way.

    ``DALLE2.text_diff`` does the same for one picture.
    """
    before, after = zip(*said, strict=True)
    z = [F.normalize(pipe.encode_prompts(list(t)).embedding, dim=1) for t in (before, after)]
    change = F.normalize(z[1] - z[0], dim=1)
    return slerp(places, change * places.norm(dim=1, keepdim=True), theta)


def axes(places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), variances (D,) and principal axes (D, D), a column each, of places (n, D)."""
    variances, columns = spectrum(places)
    return places.mean(0), variances, columns.to(places)


def reduced(places: Tensor, mean: Tensor, columns: Tensor, k: int) -> Tensor:
    """Places (B, D) with their first ``k`` principal components only; the mean for the others."""
    some = columns[:, :k]
    return mean + (places - mean) @ some @ some.T


# --- the measurements -----------------------------------------------------------------------------


@measurement(
    "variations",
    "Of 16 x 16 pictures drawn from a picture's place alone (any noise, by guidance), and from its"
    " own noise (by eta): which facts the judge finds kept, and how far the pictures lie from the"
    " one that came; whose facts show where place and noise are two pictures'; and how well DDIM"
    " finds a picture again, by steps. 95 % intervals over pictures",
    minutes=8,
    needs=NEEDS,
)
def variations(
    n: int = VARIED,
    swept: int = SWEPT,
    inverted: int = INVERTED,
    crossed: int = CROSSED,
    scales: Sequence[float] = SCALES,
    etas: Sequence[float] = ETAS,
    walks: Sequence[int] = WALKS,
) -> dict[str, Any]:
    """Chapter 9's table of variations."""
    pipe, judge = dalle2(), Judge.from_pretrained()
    g = torch.Generator().manual_seed(VARIED_SEED)
    scenes = sample(n, g)
    pictures, others = render(scenes, SIZE), render([again(scene, g) for scene in scenes], SIZE)
    true, places = small(pictures), see(pipe, pictures)

    def row(drawn: Tensor) -> dict[str, Any]:
        found = marks(judge.read(legible(drawn)), scenes[: len(drawn)])
        return found | {"distance": mean_interval(apart(drawn, true[: len(drawn)]))}

    rows = {"the picture": row(true), "another of the same facts": row(small(others))}
    rows["the place, by straight lines"] = marks(Probe(*known(pipe)).read(places), scenes)
    rows["any noise"] = row(decode(pipe, places, scale=SCALE))
    for scale in scales:
        drawn = decode(pipe, places[:swept], scale=scale, seed=1)
        rows[f"any noise, s = {scale:g}"] = row(drawn)
    noise = halves(pipe, pictures[:swept])[1]
    for eta in etas:
        rows[f"eta = {eta:g}"] = row(decode(pipe, places[:swept], noise, eta=eta))
    singles = sample(crossed, g, things=(1,))
    place, own = halves(pipe, render(singles, SIZE))
    read = judge.read(legible(decode(pipe, place, own.roll(1, 0))))  # the noise of another picture
    rows["crossed, of the place"] = marks(read, singles)
    rows["crossed, of the noise"] = marks(read, singles[-1:] + singles[:-1])
    found = {}
    for steps in walks:
        for iterations in (1, 2):
            place, own = halves(pipe, pictures[:inverted], steps, iterations)
            back = decode(pipe, place, own, steps=steps)
            found[f"{steps} steps, {iterations}"] = mean_interval(psnr(back, true[:inverted]))
    return {"seeds": [VARIED_SEED], "scale": SCALE, "rows": rows, "reconstruction": found}


@measurement(
    "interpolations",
    "16 x 16 pictures on the way from one to another, both places turned along the arc, from their"
    " own noise along the arc or the straight line, or from one noise: of the facts in which the"
    " two differ, whose the judge reads, and how often no scene. 95 % intervals over pairs",
    minutes=6,
    needs=NEEDS,
)
def interpolations(n: int = PAIRS, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """Chapter 9's ways from picture to picture."""
    pipe, judge = dalle2(), Judge.from_pretrained()
    g = torch.Generator().manual_seed(PAIRS_SEED)
    pairs = [sample(n, g) for _ in range(2)]
    parts = [halves(pipe, render(scenes, SIZE)) for scenes in pairs]
    (a, x), (b, y) = parts
    common = torch.randn(x.shape, generator=g)
    ways = {"own noise, along the arc": 1.0, "own noise, straight": 1.0, "one noise": SCALE}
    rows: dict[str, Any] = {}
    for way, scale in ways.items():
        columns, whole = [], torch.ones(n, dtype=torch.bool)
        for share in shares:
            noise = common
            if way.endswith("arc"):
                noise = slerp(x.flatten(1), y.flatten(1), share).view_as(x)
            elif way.endswith("straight"):
                noise = torch.lerp(x, y, share)
            drawn = decode(pipe, slerp(a, b, share), noise, scale=scale)
            read = judge.read(legible(drawn))
            each = [
                sides(seen, here.facts(), there.facts())
                for seen, here, there in zip(read, *pairs, strict=True)
            ]
            cell = {k: mean_interval(torch.tensor([pair[k] for pair in each])) for k in each[0]}
            cell["no scene"] = interval(sum(seen is None for seen in read), n)
            whole &= torch.tensor([seen is not None for seen in read])
            columns.append({"share": share, **cell})
        rows[way] = {"ways": columns, "never no scene": interval(int(whole.sum()), n)}
    return {"seeds": [PAIRS_SEED], "scale": SCALE, "rows": rows}


@measurement(
    "text-diffs",
    "16 x 16 pictures told to change one fact by the difference of two captions, from their own"
    " noise, by theta: whether the judge reads the new fact, and every other as it was. Beside it"
    " the place of the true changed picture, with the old noise and with any. 95 % intervals",
    minutes=9,
    needs=NEEDS,
)
def text_diffs(
    n: int = TRIES, tuned: int = TUNED, thetas: Sequence[float] = THETAS
) -> dict[str, Any]:
    """Chapter 9's changes told in words."""
    found = told(dalle2(), Judge.from_pretrained(), n, tuned, thetas)
    return {"seeds": [TRIES_SEED], **found}


def told(
    pipe: DALLE2,
    judge: Judge,
    n: int = TRIES,
    tuned: int = TUNED,
    thetas: Sequence[float] = THETAS,
) -> dict[str, Any]:
    """Verdicts on ``CHANGES`` by how far places turn, and how far to turn: "rows" and "chosen".

    The latter is chosen for each change on ``tuned`` pictures of their own, before the ``n``.
    """
    rows: dict[str, Any] = {}
    chosen: dict[str, float] = {}
    for number, change in enumerate(CHANGES):
        name = f"{change[1]} to {change[2]}"
        first = tries(pipe, judge, cases(tuned, change, TUNED_SEED + number), change, thetas)
        chosen[name] = max(thetas, key=lambda t: first[f"theta = {t:g}"]["both"]["value"])
        pairs = cases(n, change, TRIES_SEED + number)
        rows[name] = tries(pipe, judge, pairs, change, (0.0, *thetas), ceiling=True)
        rows[name]["as chosen"] = rows[name][f"theta = {chosen[name]:g}"]
    rows["all"] = {
        way: {what: together([rows[name][way][what] for name in chosen]) for what in cell}
        for way, cell in rows[name].items()
    }
    return {"chosen": chosen, "rows": rows}


def tries(
    pipe: DALLE2,
    judge: Judge,
    pairs: Sequence[tuple[Scene, Scene]],
    change: tuple[str, str, str],
    thetas: Sequence[float],
    ceiling: bool = False,
) -> dict[str, dict[str, dict[str, float]]]:
    """Verdicts on pictures changed as asked, by how far their places turn; and, as a ceiling, with
    the place of the true changed picture."""
    olds, news = zip(*pairs, strict=True)
    place, noise = halves(pipe, render(olds, SIZE))
    said = [spoken(old, new, change) for old, new in pairs]
    ways = {
        f"theta = {theta:g}": decode(pipe, turned(pipe, place, said, theta), noise)
        for theta in thetas
    }
    if ceiling:
        there = see(pipe, render(news, SIZE))
        ways["its own place, the old noise"] = decode(pipe, there, noise)
        ways["its own place, any noise"] = decode(pipe, there, scale=SCALE)
    return {way: verdicts(judge.read(legible(drawn)), olds, news) for way, drawn in ways.items()}


def spoken(old: Scene, new: Scene, change: tuple[str, str, str]) -> tuple[str, str]:
    """The two captions of a change: everything that can be said, in the plainest words."""
    return write(old.facts()), write(new.facts())


def verdicts(
    read: Sequence[Facts | None], olds: Sequence[Scene], news: Sequence[Scene]
) -> dict[str, dict[str, float]]:
    """Of readings of changed pictures: the new fact is there, all others stayed, and both."""
    there = stayed = both = nothing = 0
    for seen, old, new in zip(read, olds, news, strict=True):
        one, other = answers(old.facts()), answers(new.facts())
        here = {} if seen is None else answers(seen)
        differ = [k for k in other if one.get(k) != other[k]]
        target = all(here.get(k) == other[k] for k in differ)
        rest = seen is not None and {k: v for k, v in here.items() if k not in differ} == {
            k: v for k, v in other.items() if k not in differ
        }
        there, stayed, both = there + target, stayed + rest, both + (target and rest)
        nothing += seen is None
    counts = {"changed": there, "the rest stayed": stayed, "both": both, "no scene": nothing}
    return {name: interval(int(count), len(read)) for name, count in counts.items()}


@measurement(
    "principal-components",
    "16 x 16 pictures decoded from the first k principal components of their places, the noise the"
    " same for all k: which facts the judge reads. 95 % intervals over pictures",
    minutes=6,
    needs=NEEDS,
)
def principal_components(
    n: int = REDUCED, components: Sequence[int] = COMPONENTS
) -> dict[str, Any]:
    """Chapter 9's places with fewer and fewer components."""
    pipe, judge = dalle2(), Judge.from_pretrained()
    g = torch.Generator().manual_seed(REDUCED_SEED)
    scenes = sample(n, g)
    places = see(pipe, render(scenes, SIZE))
    noise = torch.randn(n, 3, SMALL, SMALL, generator=g)
    mean, variances, columns = axes(known(pipe)[0])
    rows = {}
    for k in components:
        drawn = decode(pipe, reduced(places, mean, columns, k), noise, scale=SCALE)
        rows[str(k)] = marks(judge.read(legible(drawn)), scenes)
        rows[str(k)]["variance"] = {"value": (variances[:k].sum() / variances.sum()).item()}
    return {"seeds": [REDUCED_SEED], "scale": SCALE, "rows": rows}


# --- live, in the notebook ------------------------------------------------------------------------


def noisy(pictures: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """Small pictures in [0, 1] with noise on top."""
    g = torch.Generator().manual_seed(seed)
    return (pictures + sigma * torch.randn(pictures.shape, generator=g)).clamp(0, 1)


def enlarge(
    pipe: UnCLIP,
    pictures: Tensor,
    noise: Tensor | None = None,
    *,
    sampler: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Small pictures (B, 3, h, w) in [0, 1], of any size, through the first upsampler.

    Args:
        pipe: The system.
        pictures: What to enlarge.
        noise: (B, 3, 4 h, 4 w) to start from; None: drawn.
        sampler: None: the folder's own.
        seed: Of all noise that is drawn.

    Returns:
        (B, 3, 4 h, 4 w) in [0, 1].
    """
    scheduler, (h, w) = pipe.super_res_scheduler, pictures.shape[2:]
    sampler = scheduler.choose(sampler)
    timesteps = scheduler.timesteps(sampler, pipe.walks["upsampler"][1])
    walk = Walk(sampler, timesteps, (4 * h, 4 * w), noise)
    g = torch.Generator().manual_seed(seed)
    return to_unit(pipe.draw_large(to_signed(pictures), walk, g))


def within(cell: Mapping[str, float], n: int) -> tuple[float, float]:
    """Where the same number from ``n`` fresh cases lies in 997 of 1000 tries, by a stored one."""
    half = 1.5 * (cell["high"] - cell["low"]) / 2 * (1 + cell["n"] / n) ** 0.5
    return cell["value"] - half, cell["value"] + half


def percent(cell: Mapping[str, float]) -> str:
    """A share and its interval, as tables show them; z: no minus before a zero."""
    return f"{cell['value']:z.0%}  ({cell['low']:z.0%} … {cell['high']:z.0%})"
