"""Chapter 13's measurements: Stable Diffusion told by words, by a picture, by a part of one.

All of them ask the shipped system, by its own door, and let the judge read what came of it. What
the thousand prompts say of it stands with the other systems' marks (``examination``). Each table is
made by ``python -m companion measure NAME``, with NAME one of ``latent-steps``, ``image-to-image``,
``inpainting``, ``image-prompt``, ``negative-prompts`` and ``mid-grey``.

Letters: B pictures, N places of a latent, 8 * 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from companion.changing import answers, apart, sides
from companion.examination import (
    SD_GUIDANCE,
    SD_SAMPLER,
    SD_STEPS,
    TOGETHER,
    in_parts,
    stable_diffusion,
    stable_diffusion_draws,
)
from companion.judge import Judge, right_answers
from companion.measure import measurement
from companion.prompts import Prompt, prompts, right, shares_right
from companion.recipes.autoencoder import in_short, means, round_trip
from companion.recipes.encoded import SIZE
from companion.schedule import Schedule
from companion.scheduler import Scheduler
from companion.scores import difference, interval, mean_interval
from companion.stable_diffusion import SCHEDULER, StableDiffusion
from companion.storybook import (
    COLOURS,
    KINDS,
    POSITIONS,
    SKIES,
    Facts,
    Scene,
    Thing,
    ThingFacts,
    is_held_out,
    render,
    sample,
    write,
)

NEEDS = (*StableDiffusion.made_of, "judge")

# Of each measurement: how many pictures, and the seed of their scenes, which no training draws; all
# noise has the seed 0.
STEPPED = 400
WALKS = {"dpmpp_2m": (5, 10, 20), "ddim": (5, 10, 20, 100)}
STRENGTHS, STARTED, STARTED_SEED = (0.2, 0.4, 0.6, 0.8, 1.0), 200, 1301
TASKS, REPAINTED, REPAINTED_SEED = ("add", "replace", "remove"), 200, 1302
SHOWN, SHOWN_SEED, SCALES = 200, 1303, (1.0, 2.0, 4.0, 8.0)
AVOIDED, AVOIDED_SEED = 60, 1304
GREY, GREY_SEED, KNOWN = 200, 1305, 2000
PUSHED, PUSHES = 100, (-8.0, -4.0, 0.0, 4.0, 8.0)
SPACINGS = ("leading", "trailing")


def drawn(pipe: StableDiffusion, texts: Sequence[str], *, seed: int = 0, **given: Any) -> Tensor:
    """Pictures (B, 3, H, W) of texts, fifty at a time; tensors in ``given`` are cut alike.

    Args:
        pipe: The system.
        texts: B prompts; empty ones where ``image_prompt`` is given.
        seed: Of all noise.
        given: What else the system is to know; by default steps, sampler and scale of the
            examination.
    """
    g, found = torch.Generator().manual_seed(seed), []
    how = {"steps": SD_STEPS, "sampler": SD_SAMPLER, "guidance_scale": SD_GUIDANCE} | given
    for i in range(0, len(texts), TOGETHER):
        part = slice(i, i + TOGETHER)
        cut = {k: v[part] if isinstance(v, Tensor) else v for k, v in how.items()}
        said = None if "image_prompt" in how else list(texts[part])
        found.append(pipe(said, generator=g, truncate=True, **cut).cpu())
    return torch.cat(found)


# --- how many steps -------------------------------------------------------------------------------


@measurement(
    "latent-steps",
    "Stable Diffusion's pictures of prompts by sampler and number of steps, all from the same"
    " noise: what the judge reads right, and how far they lie from those of a hundred DDIM steps."
    " 95 % intervals over prompts, paired where two are compared",
    minutes=8,
    needs=NEEDS,
)
def latent_steps(n: int = STEPPED, walks: Mapping[str, Sequence[int]] = WALKS) -> dict[str, Any]:
    """Chapter 13's table of steps. The last walk is the one that all others are compared with."""
    pipe, judge = stable_diffusion(), Judge.from_pretrained()
    asked = [p for p in prompts() if not p.held_out][:n]
    pictures = {
        f"{sampler}, {steps} steps": in_parts(
            stable_diffusion_draws(pipe, sampler=sampler, steps=steps), asked
        )
        for sampler, counts in walks.items()
        for steps in counts
    }
    name, last = list(pictures.items())[-1]
    read = {k: judge.read(x) for k, x in pictures.items()}
    whole, shares = right(asked, read[name]), shares_right(asked, read[name])
    rows = {}
    for k, x in pictures.items():
        mine, parts = right(asked, read[k]), shares_right(asked, read[k])
        rows[k] = {
            "wholly right": interval(sum(mine), n),
            "facts": mean_interval(torch.tensor(parts)),
            "more wholly right": difference(mine, whole),
            "more facts": difference(parts, shares),
            "distance": mean_interval(apart(x, last)),
        }
    return {"seeds": [0], "prompts": n, "compared with": name, "rows": rows}


# --- from a picture -------------------------------------------------------------------------------


@measurement(
    "image-to-image",
    "A picture of one scene, and the full caption of another: by strength, how far what is drawn"
    " lies from the picture, and of the facts in which the two differ, whose the judge reads. 95 %"
    " intervals over pairs",
    minutes=3,
    needs=NEEDS,
)
def image_to_image(n: int = STARTED, strengths: Sequence[float] = STRENGTHS) -> dict[str, Any]:
    """Chapter 13's table of strengths; "steps" compares neighbours, pair by pair."""
    pipe, judge = stable_diffusion(), Judge.from_pretrained()
    pairs = told_otherwise(n, STARTED_SEED)
    given = rendered([a for a, _ in pairs])
    texts = [write(b.facts()) for _, b in pairs]
    shown = {"round trip": round_trip(pipe.vae, given)}
    for strength in strengths:
        shown[f"{strength:g}"] = drawn(pipe, texts, image=given, strength=strength)
    rows, columns = {}, {}
    for name, x in shown.items():
        read = judge.read(x)
        each = [sides(seen, a.facts(), b.facts()) for seen, (a, b) in zip(read, pairs, strict=True)]
        column = {k: [one[k] for one in each] for k in each[0]}
        columns[name] = column | {"distance": apart(x, given).tolist()}
        rows[name] = {k: mean_interval(torch.tensor(v)) for k, v in columns[name].items()}
        rows[name]["no scene"] = interval(sum(seen is None for seen in read), n)
    order = [f"{s:g}" for s in strengths]
    steps = {
        what: [
            difference(*(columns[k][what] for k in (pair if sign < 0 else pair[::-1])))
            for pair in zip(order, order[1:], strict=False)
        ]
        for what, sign in (("distance", 1), ("of b", 1), ("of a", -1))
    }
    return {
        "seeds": [STARTED_SEED],
        "pairs": n,
        "rows": rows,
        "steps": steps,
        "least step": {what: min(s, key=lambda d: d["value"]) for what, s in steps.items()},
    }


def told_otherwise(n: int, seed: int) -> list[tuple[Scene, Scene]]:
    """Pairs of scenes that differ in something."""
    g = torch.Generator().manual_seed(seed)
    found: list[tuple[Scene, Scene]] = []
    while len(found) < n:
        a, b = sample(2, g)
        if any(_differ(a.facts(), b.facts())):
            found.append((a, b))
    return found


def _differ(a: Facts, b: Facts) -> list[bool]:
    one, other = answers(a), answers(b)
    return [one[k] != other[k] for k in one if k in other]


def rendered(scenes: Sequence[Scene]) -> Tensor:
    """Pictures (B, 3, 64, 64) of scenes, fifty at a time."""
    parts = range(0, len(scenes), TOGETHER)
    return torch.cat([render(scenes[i : i + TOGETHER], SIZE) for i in parts])


# --- a part of a picture --------------------------------------------------------------------------


def half(position: str) -> Tensor:
    """A mask (1, 1, 64, 64): the left or the right half, below the uppermost eighth."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    columns = slice(0, SIZE // 2) if position == "left" else slice(SIZE // 2, SIZE)
    mask[:, :, SIZE // 8 :, columns] = 1
    return mask


def jobs(n: int, task: str, seed: int) -> list[tuple[Scene, Scene, str]]:
    """Scenes with one thing at a side, what they are to become, and which half is repainted.

    "add": a second thing in the empty half; "replace": another one in its place, of another kind
    and colour; "remove": nothing. No result is a combination that training never saw, and none has
    a stream.
    """
    g = torch.Generator().manual_seed(seed)
    found: list[tuple[Scene, Scene, str]] = []
    while len(found) < n:
        (scene,) = sample(1, g, things=(1,))
        (thing,) = scene.things
        i, j = (int(torch.randint(len(x), (), generator=g)) for x in (KINDS, COLOURS))
        if scene.stream or thing.kind == KINDS[i] or thing.colour == COLOURS[j]:
            continue  # a stream runs where there is room: it would move
        if 0.25 < thing.x < 0.75:
            continue  # the thing must not reach into the other half
        x = {"left": 0.25, "right": 0.75}
        other = "right" if thing.position == "left" else "left"
        where = other if task == "add" else thing.position
        new = Thing(KINDS[i], COLOURS[j], x[where], 0.44)
        things = {
            "add": (thing, new) if where == "right" else (new, thing),
            "replace": (new,),
            "remove": (),
        }[task]
        after = replace(scene, things=things)
        if not is_held_out(after):
            found.append((scene, after, where))
    return found


def obeyed(seen: Facts | None, before: Scene, after: Scene, where: str) -> tuple[bool, bool]:
    """Whether the repainted half shows what was asked for, and all else is as it was."""
    if seen is None:
        return False, False
    there = {t.position: t for t in seen.things}
    said = {t.position: t for t in after.facts().things}
    # The middle is in both halves, and nobody asks for anything there.
    inside = there.get(where) == said.get(where) and "middle" not in there
    old = before.facts()
    outside = (seen.sky, seen.place, seen.stream) == (old.sky, old.place, old.stream) and all(
        there.get(p) == said.get(p) for p in POSITIONS if p not in (where, "middle")
    )
    return inside, outside


def apart_outside(x: Tensor, y: Tensor, masks: Tensor) -> Tensor:
    """Root of the mean squared difference where nothing is repainted, (B,)."""
    kept = (masks < 0.5).expand_as(x)
    errors = torch.where(kept, (x - y).square(), 0).flatten(1).sum(1)
    return (errors / kept.flatten(1).sum(1)).sqrt()


@measurement(
    "inpainting",
    "Half of a picture repainted, told the caption of what it is to become: a second thing beside"
    " the first, another one in its place, or none. Whether the judge reads that inside, and"
    " everything else outside as it was; and how far the pixels outside moved, pasted or not,"
    " beside the autoencoder's own round trip. 95 % intervals over pictures",
    minutes=4,
    needs=NEEDS,
)
def inpainting(n: int = REPAINTED, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """Chapter 13's table of repainted halves."""
    pipe, judge = stable_diffusion(), Judge.from_pretrained()
    rows: dict[str, Any] = {}
    cells: dict[str, list[tuple[bool, bool]]] = {}
    moved: dict[str, list[Tensor]] = {}
    for number, task in enumerate(tasks):
        todo = jobs(n, task, REPAINTED_SEED + 10 * number)
        befores, afters, _ = zip(*todo, strict=True)
        given, masks = rendered(befores), torch.cat([half(where) for _, _, where in todo])
        texts = [write(scene.facts()) for scene in afters]
        plain = drawn(pipe, texts, image=given, mask=masks, strength=1.0)
        shown = {
            "repainted": plain,
            "repainted, pasted": torch.where(masks > 0, plain, given),
            "the prompt alone": drawn(pipe, texts),
            "true pictures": rendered(afters),
        }
        for way, x in shown.items():
            each = [obeyed(s, *job) for s, job in zip(judge.read(x), todo, strict=True)]
            cells.setdefault(way, []).extend(each)
            rows[f"{task}, {way}"] = verdicts(each)
        back = round_trip(pipe.vae, given)
        for way, x in (shown | {"round trip": back}).items():
            if way not in ("the prompt alone", "true pictures"):
                moved.setdefault(way, []).append(apart_outside(x, given, masks))
        moved.setdefault("repainted, from the round trip", []).append(
            apart_outside(plain, back, masks)
        )
    rows |= {f"all, {way}": verdicts(each) for way, each in cells.items()}
    return {
        "seeds": [REPAINTED_SEED],
        "pictures": n * len(tasks),
        "rows": rows,
        "moved outside": {way: mean_interval(torch.cat(x)) for way, x in moved.items()},
    }


def verdicts(each: Sequence[tuple[bool, bool]]) -> dict[str, dict[str, float]]:
    """Shares of pictures that show inside what was asked for, outside what was there, and both."""
    counts = {"inside": [a for a, _ in each], "outside": [b for _, b in each]}
    counts["both"] = [a and b for a, b in each]
    return {name: interval(sum(x), len(x)) for name, x in counts.items()}


# --- a picture for words --------------------------------------------------------------------------


@measurement(
    "image-prompt",
    "Pictures drawn from what CLIP sees in a picture, through the attention that else looks at"
    " words, by scale; beside them those drawn from its full caption, and the round trip. Which"
    " facts the judge reads. 95 % intervals over pictures",
    minutes=4,
    needs=NEEDS,
)
def image_prompt(n: int = SHOWN, scales: Sequence[float] = SCALES) -> dict[str, Any]:
    """Chapter 13's table of pictures that stand for words."""
    pipe = stable_diffusion()
    scenes = sample(n, torch.Generator().manual_seed(SHOWN_SEED))
    given, judge = rendered(scenes), Judge.from_pretrained()
    shown = {"the picture": given, "round trip": round_trip(pipe.vae, given)}
    for scale in scales:
        how = {"image_prompt": given, "guidance_scale": scale}
        shown[f"the picture for words, s = {scale:g}"] = drawn(pipe, [""] * n, **how)
    shown["its full caption"] = drawn(pipe, [write(s.facts()) for s in scenes])
    rows = {}
    for name, x in shown.items():
        answers = right_answers(judge.read(x), scenes)
        rows[name] = in_short(answers) | {k: interval(*v) for k, v in answers.items()}
        rows[name]["distance"] = mean_interval(apart(x, given))
    return {"seeds": [SHOWN_SEED], "pictures": n, "rows": rows}


# --- moving away from words -----------------------------------------------------------------------


@measurement(
    "negative-prompts",
    "A thing without a word on the sky, drawn with each sky as the negative prompt and with none,"
    " from the same noise: how often the judge reads each sky, and the thing. 95 % intervals",
    minutes=2,
    needs=NEEDS,
)
def negative_prompts(n: int = AVOIDED) -> dict[str, Any]:
    """Chapter 13's table of what comes instead."""
    pipe, judge = stable_diffusion(), Judge.from_pretrained()
    g = torch.Generator().manual_seed(AVOIDED_SEED)
    asked = [Prompt(write(_bare(scene)), scene) for scene in sample(n, g, things=(1,))]
    texts = [p.text for p in asked]
    rows = {}
    for avoided in (None, *SKIES):
        said = None if avoided is None else write(Facts(sky=avoided))
        read = judge.read(drawn(pipe, texts, negative_prompt=said))
        skies = [None if seen is None else seen.sky for seen in read]
        rows[avoided or "none"] = {
            "skies": {sky: interval(skies.count(sky), n) for sky in SKIES},
            "the thing": interval(sum(right(asked, read)), n),
        }
    avoided = sum(round(n * rows[s]["skies"][s]["value"]) for s in SKIES)
    return {
        "seeds": [AVOIDED_SEED],
        "prompts": n,
        "rows": rows,
        "avoided skies": interval(avoided, n * len(SKIES)),
    }


def _bare(scene: Scene) -> Facts:
    """The thing alone: neither sky nor place nor side."""
    (thing,) = scene.things
    return Facts(things=(ThingFacts(thing.kind, thing.colour, None),))


# --- where the noise ends -------------------------------------------------------------------------


class Brightness:
    """How light a latent is as a whole: its mean over all places, along one direction.

    The direction, among the four channels, is the one from the middle of night latents to the
    middle of noon latents.

    Args:
        pipe: The system whose latents these are.
        n: How many true pictures the direction and the spread are taken from.
    """

    def __init__(self, pipe: StableDiffusion, n: int = KNOWN) -> None:
        scenes = sample(n, torch.Generator().manual_seed(GREY_SEED))
        self.scale = pipe.vae.config.scaling_factor
        middle = self.scale * means(pipe.vae, rendered(scenes)).mean((2, 3))  # (n, 4)
        sky = [scene.sky for scene in scenes]
        noon, night = (
            middle[torch.tensor([s == which for s in sky])].mean(0) for which in ("noon", "night")
        )
        self.direction = (noon - night) / (noon - night).norm()  # (4,)
        self.known = middle @ self.direction
        self.night, self.noon = (night @ self.direction).item(), (noon @ self.direction).item()

    def __call__(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) to numbers (B,)."""
        return latents.mean((2, 3)) @ self.direction

    def of(self, pipe: StableDiffusion, pictures: Tensor) -> Tensor:
        """The same of pictures (B, 3, H, W) in [0, 1]."""
        return self(self.scale * means(pipe.vae, pictures))


def spread_left(abar: float, spread: float, places: int) -> float:
    """Which share of the spread in brightness comes back, by an ideal denoiser of Gaussians.

    The mean over ``places`` of a noisy latent has the variance abar * spread^2 + (1 - abar) /
    places; whoever starts from noise alone gives it (1 - abar) / places, and a deterministic walk
    keeps the ratio.

    Args:
        abar: At the first timestep that is visited.
        spread: Standard deviation of mean latents from picture to picture.
        places: N.
    """
    noise = (1 - abar) / places
    return (noise / (abar * spread**2 + noise)) ** 0.5


def spaced(pipe: StableDiffusion, spacing: str) -> StableDiffusion:
    """The same system with other timesteps."""
    said = SCHEDULER | {"timestep_spacing": spacing}
    parts = {name: getattr(pipe, name) for name in pipe.parts}
    return type(pipe)(**parts | {"scheduler": Scheduler.of(Schedule.scaled_linear(), said)})


@measurement(
    "mid-grey",
    "How light latents are as a whole, drawn from noise that hides less than training's did: their"
    " spread when told nothing, beside that of true pictures; the slope against true ones when told"
    " everything; and what a push of the noise's mean does. 95 % intervals",
    minutes=5,
    needs=NEEDS,
)
def mid_grey(
    n: int = GREY,
    pushed: int = PUSHED,
    pushes: Sequence[float] = PUSHES,
    spacings: Sequence[str] = SPACINGS,
    known: int = KNOWN,
) -> dict[str, Any]:
    """Chapter 13's table of brightness; pushes are in units of sqrt(abar) at the last timestep."""
    pipe = stable_diffusion()
    light = Brightness(pipe, known)
    g = torch.Generator().manual_seed(GREY_SEED + 1)
    scenes = sample(n, g)
    texts, true = [write(s.facts()) for s in scenes], light.of(pipe, rendered(scenes))
    spread, places = light.known.std().item(), (SIZE // pipe.vae.factor) ** 2
    rows = {}
    for spacing in spacings:
        other = spaced(pipe, spacing)
        how = {"sampler": "ddim"}
        abar = other.scheduler.schedule.alphas_cumprod[
            other.scheduler.timesteps("ddim", SD_STEPS, steps_offset=1)[0].long()
        ].item()
        untold = light.of(pipe, drawn(other, [""] * n, guidance_scale=1.0, **how))
        rows[spacing] = {
            "sqrt abar at the start": abar**0.5,
            "spread, told nothing": ratio_of_spreads(untold, light.known),
            "spread, an ideal Gaussian's": spread_left(abar, spread, places),
        }
        for scale in (1.0, SD_GUIDANCE):
            told = light.of(pipe, drawn(other, texts, guidance_scale=scale, **how))
            rows[spacing][f"slope, told everything, s = {scale:g}"] = slope(true, told)
    last = Schedule.scaled_linear().alphas_cumprod[-1].sqrt().item()
    other, moved = spaced(pipe, "trailing"), {}
    start = torch.randn(pushed, 4, SIZE // pipe.vae.factor, SIZE // pipe.vae.factor, generator=g)
    for push in pushes:
        x = start + push * last * light.direction.view(1, 4, 1, 1)
        made = drawn(other, [""] * pushed, latents=x, guidance_scale=1.0, sampler="ddim")
        moved[f"{push:g}"] = mean_interval(light.of(pipe, made))
    return {
        "seeds": [GREY_SEED],
        "pictures": n,
        "true": {"spread": spread, "night": light.night, "noon": light.noon,
                 "mean": light.known.mean().item()},
        "sqrt abar": last,
        "rows": rows,
        "pushed": moved,
    }  # fmt: skip


def ratio_of_spreads(a: Tensor, b: Tensor, draws: int = 2000) -> dict[str, float]:
    """Standard deviation of ``a`` over that of ``b``, with a 95 % bootstrap interval."""
    g = torch.Generator().manual_seed(0)

    def again(x: Tensor) -> Tensor:
        return x[torch.randint(len(x), (draws, len(x)), generator=g)].std(1)

    a, b = a.double(), b.double()
    ends = (again(a) / again(b)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"value": (a.std() / b.std()).item(), "low": ends[0].item(), "high": ends[1].item()}


def slope(x: Tensor, y: Tensor, draws: int = 2000) -> dict[str, float]:
    """Slope of the straight line that predicts y from x, with a 95 % bootstrap interval."""
    g = torch.Generator().manual_seed(0)

    def line(x: Tensor, y: Tensor) -> Tensor:
        x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        return (x * y).sum(-1) / x.square().sum(-1)

    x, y = x.double(), y.double()
    rows = torch.randint(len(x), (draws, len(x)), generator=g)
    ends = line(x[rows], y[rows]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"value": line(x, y).item(), "low": ends[0].item(), "high": ends[1].item()}
