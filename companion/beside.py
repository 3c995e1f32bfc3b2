"""Chapter 15's measurement: DALL·E 2, Imagen and Stable Diffusion side by side.

What each cost to train, counted; what it costs to draw a picture; and what its pictures are worth
on the same prompts, three times with other noise. Beside that, what a call of a U-Net costs as
pictures grow, on pixels and on latents, for this book's networks and for published ones.
``python -m companion measure side-by-side``

Costs are in multiply-adds of convolutions, matrix products and attention (``bench.flops`` halved).
A training step is three forward passes: backward, each product has two gradients (for its input and
for its weights), and each costs as much as the product. Networks that are frozen go forward only.

Letters: B pictures, S sampling seeds.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from companion import bench, checkpoints, examination
from companion.adm import CROSS, PLAIN, ADMConfig, ADMUNet
from companion.autoencoder import Autoencoder, AutoencoderConfig
from companion.dalle2 import DALLE2
from companion.imagen import Imagen
from companion.judge import Judge
from companion.looking import answer
from companion.measure import SEEDS, measurement, over_seeds
from companion.pipeline import System
from companion.prior import Prior, PriorConfig
from companion.prompts import Prompt, marks, prompts, right
from companion.recipes import RECIPES
from companion.recipes.encoded import SCENES, SIZE, FrozenCLIP, again
from companion.recipes.imagen import Read
from companion.recipes.stable_diffusion import SHOWN
from companion.scores import difference, frechet, interval, mean_interval, precision_recall
from companion.stable_diffusion import StableDiffusion
from companion.storybook import Facts, Scene, render, sample
from companion.train import build, draw, generator
from companion.unet import UNet, UNetConfig

# --- what is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """One of the three systems.

    Attributes:
        kind: The class.
        trained: Recipes of what was trained for it alone.
        shared: Recipes of what others use too.
        opened: Opens the book's own, up to 64 x 64 pixels.
        draws: Its way to pictures, as its examination has it.
    """

    kind: type[System]
    trained: tuple[str, ...]
    shared: tuple[str, ...]
    opened: Callable[[], Any]
    draws: Callable[[Any], examination.Draw]


MADE = {
    "DALL·E 2": Made(
        DALLE2,
        ("prior", "decoder", "upsampler-64"),
        ("clip", "text-encoder"),
        lambda: examination.dalle2(),
        lambda pipe: examination.dalle2_draws(pipe),
    ),
    "Imagen": Made(
        Imagen,
        ("language-model", "imagen", "imagen-upsampler"),
        (),
        lambda: examination.imagen(),
        lambda pipe: examination.imagen_draws(pipe),
    ),
    "Stable Diffusion": Made(
        StableDiffusion,
        ("autoencoder", "stable-diffusion"),
        ("clip", "text-encoder"),
        lambda: examination.stable_diffusion(),
        lambda pipe: examination.stable_diffusion_draws(pipe),
    ),
}
FIRST = "Stable Diffusion"  # that the others' costs are divided by
CLOSE = 1.1  # costs within a tenth of each other count as equal


# --- what training cost ---------------------------------------------------------------------------

# What frozen networks do while another one is trained: which, for which share of the pictures
# seen, or (None) once for each of the pictures there are, since it is kept.
READS: dict[str, tuple[tuple[str, float | None], ...]] = {
    "prior": (("CLIP's text tower", 1.0), ("CLIP's picture tower", None)),
    "decoder": (("CLIP's text tower", 1.0), ("CLIP's picture tower", None)),
    "text-encoder": (("CLIP's picture tower", 1.0),),
    "stable-diffusion": (
        ("CLIP's text tower", 1 - SHOWN),
        ("CLIP's picture tower", SHOWN),
        ("the autoencoder's encoder", None),
    ),
    "imagen": (("the language model", 1.0),),
    "imagen-upsampler": (("the language model", 1.0),),
}


def multiply_adds(run: Callable[[], Any]) -> int:
    """Multiplications, each with its addition, of a call."""
    return bench.flops(run) // 2


@cache
def reading(network: str) -> int:
    """Multiply-adds of a frozen network for one picture or caption."""
    with torch.no_grad():
        if network == "the language model":
            read = Read(scenes=1)
            return multiply_adds(lambda: read.read(["a house"]))
        clip, x = FrozenCLIP.open(), torch.zeros(1, 3, SIZE, SIZE)
        if network == "CLIP's text tower":
            return multiply_adds(lambda: clip.read(["a house"]))
        if network == "CLIP's picture tower":
            return multiply_adds(lambda: clip.see(x))
        vae = Autoencoder.from_pretrained(checkpoints.WEIGHTS / "autoencoder")
        return multiply_adds(lambda: vae.encode(x))


def network(name: str, data: Any) -> nn.Module:
    """What a recipe trains, fresh; the prior as shipped: a fresh one looks at pictures first."""
    if name == "prior":
        return Prior.from_pretrained(checkpoints.WEIGHTS / name)
    return build(RECIPES[name], data)


def versions(name: str, batch: Mapping[str, Tensor]) -> list[tuple[float, dict[str, Tensor]]]:
    """The kinds of batches that a recipe sees, each with its share of them."""
    if name != "stable-diffusion":
        return [(1.0, dict(batch))]
    states, clip = batch["states"], FrozenCLIP.open().clip.config
    rows = {
        1 - SHOWN: clip.text_config.max_position_embeddings,
        SHOWN: 1 + (clip.vision_config.image_size // clip.vision_config.patch_size) ** 2,
    }
    return [
        (share, {**batch, "states": states.new_zeros(len(states), n, states.shape[2])})
        for share, n in rows.items()
    ]


def training(name: str) -> dict[str, Any]:
    """What one recipe's run cost, counted on its own first batch and its card.

    Returns:
        ``forward``: multiply-adds for a picture (or caption), in a step's forward pass; ``trained``
        and ``frozen``: of the whole run, in what it trains and in what it only asks; ``pictures``,
        ``steps``, ``minutes``, ``precision`` as on the card.
    """
    recipe, card = RECIPES[name], checkpoints.read_card(checkpoints.WEIGHTS / name)
    data = recipe.data(None)
    model, batch = network(name, data), draw(recipe, data, 0)
    forward = 0.0
    with torch.no_grad():
        for share, part in versions(name, batch):
            work = multiply_adds(lambda part=part: recipe.loss(model, part, data))
            forward += share * work / recipe.batch_size
    seen = card["pictures"]
    frozen = sum(
        reading(what) * (min(seen, SCENES) if share is None else share * seen)
        for what, share in READS.get(name, ())
    )
    return {
        "forward": forward,
        "trained": 3 * forward * seen,
        "frozen": frozen,
        "parameters": sum(p.numel() for p in model.parameters()),
        **{key: card[key] for key in ("pictures", "steps", "minutes", "precision")},
    }


def apart(costs: Sequence[float]) -> float:
    """The greatest cost over the least: 1 where all are equal."""
    return max(costs) / min(costs)


def budgets(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The systems' costs, from those of their recipes: alone, and with what they share."""
    found: dict[str, Any] = {}
    for name, made in MADE.items():
        alone = sum(rows[r]["trained"] + rows[r]["frozen"] for r in made.trained)
        shared = sum(rows[r]["trained"] + rows[r]["frozen"] for r in made.shared)
        found[name] = {"alone": alone, "with shared parts": alone + shared}
    return {
        "systems": found,
        "greatest over least": {
            way: apart([row[way] for row in found.values()])
            for way in ("alone", "with shared parts")
        },
    }


# --- what a picture costs -------------------------------------------------------------------------

PROMPT = "a red house by the sea at dusk"
ROUNDS = 8
STAGES = {  # the networks of each system that are asked, as attributes; what they are called here
    "text_encoder": "text encoder",
    "prior": "prior",
    "text_proj": "text projection",
    "decoder": "decoder",
    "super_res_first": "upsampler",
    "unet": "U-Net",
    "super_res": "upsampler",
    "vae.decoder": "autoencoder's decoder",
}


def networks(pipe: System) -> dict[str, nn.Module]:
    """The networks that drawing from words asks, by stage."""
    found = {}
    for path, stage in STAGES.items():
        try:
            found[stage] = operator.attrgetter(path)(pipe)
        except AttributeError:  # another system's
            continue
    return found


@contextmanager
def counting(pipe: System) -> Iterator[dict[str, dict[str, Any]]]:
    """How often each network of a system is asked within the block, and with what.

    Yields:
        By stage: ``calls``; ``evaluations``, pictures asked about (guidance asks about two at
        once); ``again``, which asks once more as it was asked first.
    """
    found: dict[str, dict[str, Any]] = {}

    def hook(stage: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            row = found.setdefault(stage, {"calls": 0, "evaluations": 0})
            row.setdefault("again", lambda: module(*args, **kwargs))
            row["calls"] += 1
            row["evaluations"] += len(args[0])

        return note

    hooks = [
        module.register_forward_pre_hook(hook(stage), with_kwargs=True)
        for stage, module in networks(pipe).items()
    ]
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()


@torch.no_grad()
def stages(pipe: System, run: Callable[[], Any]) -> dict[str, Any]:
    """Multiply-adds of a drawing: in all, and stage by stage."""
    for module in networks(pipe).values():
        module.requires_grad_(False)  # torch's counter stumbles over a parameter that is an input
    with counting(pipe) as rows:
        total = multiply_adds(run)
    found = {}
    for stage, row in rows.items():
        work = row["calls"] * multiply_adds(row.pop("again"))
        found[stage] = row | {"multiply_adds": work}
    return {"multiply_adds": total, "stages": found}


def weights(pipe: System) -> int:
    """Numbers in all networks that drawing from words asks."""
    return sum(p.numel() for m in networks(pipe).values() for p in m.parameters())


def drawing(pipes: Mapping[str, System], rounds: int = ROUNDS) -> dict[str, Any]:
    """What one picture costs of each system: operations, processor time, memory on top.

    The systems take turns, so that a slow minute hits all alike; times are given as ratios to
    Stable Diffusion's of the same round, with an interval of the median.
    """

    def once(name: str) -> Callable[[], Tensor]:
        draws = MADE[name].draws(pipes[name])
        return lambda: of_texts(draws, [PROMPT], 0)

    runs = {name: once(name) for name in pipes}
    found = {name: stages(pipes[name], run) for name, run in runs.items()}
    costs = dict(zip(runs, bench.in_turn(list(runs.values()), rounds), strict=True))
    for name, row in found.items():
        ratios = [a.cpu / b.cpu for a, b in zip(costs[name], costs[FIRST], strict=True)]
        memory = [c.memory for c in costs[name] if c.memory is not None]
        row["seconds"] = bench.spread([c.cpu for c in costs[name]])._asdict()
        row["times the first"] = bench.spread(ratios)._asdict()
        row["bytes on top"] = bench.spread(memory)._asdict() if len(memory) > 5 else None
        row["weights"] = weights(pipes[name])
    return found


# --- what the pictures are worth ------------------------------------------------------------------

# Of the thousand prompts, in their order, by number of things and by whether held out: a third.
SHARES = {(0, False): 34, (1, False): 119, (2, False): 119, (1, True): 34, (2, True): 34}
GROUPS = {
    "one thing": (1, False),
    "two things": (2, False),
    "one thing, held out": (1, True),
    "two things, held out": (2, True),
}
PROMPTS = 100  # of these the first so many are asked, which takes minutes; None: all of them
OPEN = ("sky", "place", "kind", "colour", "position")


def group(prompt: Prompt) -> tuple[int, bool]:
    """Number of things, and whether the combination was held out."""
    return len(prompt.facts.things), prompt.held_out


@cache
def asked() -> tuple[Prompt, ...]:
    """The first prompts of each group, 340 in all, in the order of the list."""
    left, found = dict(SHARES), []
    for prompt in prompts():
        if left[group(prompt)]:
            left[group(prompt)] -= 1
            found.append(prompt)
    return tuple(found)


def noise(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """A source for each picture, so that any few of them can be drawn again by themselves."""
    return [generator(seed, "side by side", number) for number in numbers]


@torch.no_grad()
def pictures(draws: examination.Draw, seed: int, numbers: Sequence[int]) -> Tensor:
    """Pictures of the prompts with these numbers, (B, 3, 64, 64) in [0, 1]."""
    numbers, found = list(numbers), []
    for first in range(0, len(numbers), examination.TOGETHER):
        part = numbers[first : first + examination.TOGETHER]
        found.append(draws([asked()[i] for i in part], noise(seed, part)).cpu())
    return torch.cat(found)


def of_texts(draws: examination.Draw, texts: Sequence[str], seed: int) -> Tensor:
    """Pictures of any texts, (B, 3, 64, 64) in [0, 1], each from noise of its own."""
    said = [Prompt(text, Scene()) for text in texts]  # nobody looks at the scene
    return draws(said, noise(seed, range(len(said))))


def anew(some: Sequence[Prompt], sources: Sequence[torch.Generator]) -> Tensor:
    """True pictures of prompts, once more: the same facts, laid out anew. A ceiling."""
    scenes = [again(p.scene, g) for p, g in zip(some, sources, strict=True)]
    return render(scenes, SIZE)


def over(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Shares of the same prompts, run by run, as one.

    Returns:
        Mean with its 95 % interval over sampling seeds (Student's t, cut at 0 and 1: what other
        noise would do to it), ``runs``, and ``prompts``, the 95 % Wilson interval as if each prompt
        had been asked once (what other prompts would do to it: wider than need be, since a mean of
        several pictures strays less than one).
    """
    found = over_seeds([run["value"] for run in runs], 0, 1)
    n = round(sum(run["n"] for run in runs) / len(runs))
    return found | {"prompts": interval(round(found["value"] * n), n)}


def marked(some: Sequence[Prompt], read: Sequence[Sequence[Facts | None]]) -> dict[str, Any]:
    """``prompts.marks`` over seeds. ``swapped``, of which there are few, is pooled over them."""
    runs = [marks(some, one) for one in read]
    found = {name: over([run[name] for run in runs]) for name in runs[0] if name != "swapped"}
    few = [run["swapped"] for run in runs if "swapped" in run]
    if few:
        n = sum(int(x["n"]) for x in few)
        found["swapped"] = interval(sum(round(x["value"] * x["n"]) for x in few), n)
    return found


def unsaid(said: Facts, what: str) -> bool:
    """Whether a prompt leaves this open: of things, where it asks for exactly one."""
    if what in ("sky", "place"):
        return getattr(said, what) is None
    return len(said.things) == 1 and getattr(said.things[0], what) is None


def differ(some: Sequence[Prompt], read: Sequence[Sequence[Facts | None]]) -> dict[str, Any]:
    """How often two pictures of a prompt differ in what it leaves open.

    Unlike an entropy, the share of unequal pairs is as large on average from three pictures as
    from a thousand. Prompts of which fewer than two pictures show such a thing are left out.

    Args:
        some: The prompts.
        read: What the judge reads of S pictures of each, seed by seed.

    Returns:
        For sky, place, kind, colour and position the mean over prompts with its 95 % interval.
    """
    found = {}
    for what in OPEN:
        shares = []
        for i, prompt in enumerate(some):
            if unsaid(prompt.facts, what):
                seen = [answer(one[i], what) for one in read]
                pairs = list(combinations([s for s in seen if s is not None], 2))
                if pairs:
                    shares.append(sum(a != b for a, b in pairs) / len(pairs))
        if len(shares) > 1:
            cell = mean_interval(torch.tensor(shares))
            found[what] = cell | {"low": max(0.0, cell["low"]), "high": min(1.0, cell["high"])}
    return found


def by_lot(n: int = 4000) -> dict[str, float]:
    """The same for scenes of this world that are drawn by lot, as training pictures are."""
    facts = [s.facts() for s in sample(n, torch.Generator().manual_seed(1501))]
    found = {}
    for what in OPEN:
        seen = [value for f in facts if (value := answer(f, what)) is not None]
        shares = [seen.count(value) / len(seen) for value in sorted(set(seen))]
        found[what] = 1 - sum(share**2 for share in shares)
    return found


@torch.no_grad()
def worth(draws: examination.Draw, seeds: Sequence[int], n: int | None = None) -> dict[str, Any]:
    """What the judge finds in pictures of the prompts, drawn once for each seed.

    Returns:
        ``marks`` (``marked``); ``differ``; over seeds the ``Fréchet distance``, ``precision`` and
        ``recall`` of the pictures beside true ones of the same prompts; ``judges agree on facts``;
        and ``right``: for each seed a 1 or a 0 for each prompt, which is wholly right or not.
    """
    some = asked()[:n]
    judge, second = Judge.from_pretrained(), Judge.from_pretrained("judge-second")
    true = judge.features(render([p.scene for p in some], SIZE))
    read, same, sets = [], [], {"Fréchet distance": [], "precision": [], "recall": []}
    for seed in seeds:
        shown = pictures(draws, seed, range(len(some)))
        read.append(judge.read(shown))
        same += examination.agreement(read[-1], second.read(shown))
        features = judge.features(shown)
        sets["Fréchet distance"].append(frechet(true, features))
        for name, value in zip(
            ("precision", "recall"), precision_recall(true, features), strict=True
        ):
            sets[name].append(value)
    return {
        "marks": marked(some, read),
        "differ": differ(some, read),
        **{
            name: over_seeds(values, 0, None if name == "Fréchet distance" else 1)
            for name, values in sets.items()
        },
        "judges agree on facts": interval(sum(same), len(same)),
        "right": ["".join(str(int(x)) for x in right(some, one)) for one in read],
    }


def gains(worths: Mapping[str, Mapping[str, Any]], n: int | None = None) -> dict[str, Any]:
    """For each two systems, how many more prompts the first draws wholly right, group by group.

    Prompt by prompt the mean over seeds of both; the 95 % interval draws prompts anew, each with
    all its pictures (paired bootstrap).
    """
    some = asked()[:n]
    shares = {
        name: [sum(map(int, prompt)) / len(prompt) for prompt in zip(*row["right"], strict=True)]
        for name, row in worths.items()
    }
    found: dict[str, Any] = {}
    for a, b in combinations(worths, 2):
        for name, which in GROUPS.items():
            rows = [i for i, p in enumerate(some) if group(p) == which]
            if rows:
                pair = [shares[a][i] for i in rows], [shares[b][i] for i in rows]
                found.setdefault(f"{a} less {b}", {})[name] = difference(*pair)
    return found


# --- how cost grows with resolution ---------------------------------------------------------------

SMALL_SIDES = (16, 32, 64, 128, 256, 512)  # pixels, of this book's networks
LIFE_SIDES = (64, 128, 256, 512, 1024)
CLOCKED = {"pixels": (16, 32, 64), "latents": (64, 128, 256)}  # short enough for a clock

# Configurations of published files: Stable Diffusion 1.x and Karlo, the open DALL·E 2.
SD_UNET = UNetConfig(cross_attention_dim=768)
SD_AUTOENCODER = AutoencoderConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
KARLO_PRIOR = PriorConfig(32, 64, 20, 768, 77)
KARLO_DECODER = ADMConfig(
    in_channels=3,
    out_channels=6,
    block_out_channels=(320, 640, 960, 1280),
    down_block_types=(PLAIN[0], *[CROSS[0]] * 3),
    up_block_types=(*[CROSS[1]] * 3, PLAIN[1]),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    layers_per_block=3,
    attention_head_dim=64,
    cross_attention_dim=1536,
    resnet_time_scale_shift="scale_shift",
    class_embed_type="identity",
)
KARLO_UPSAMPLER = ADMConfig(
    in_channels=6,
    out_channels=3,
    block_out_channels=(320, 640, 960, 1280),
    down_block_types=(PLAIN[0],) * 4,
    up_block_types=(PLAIN[1],) * 4,
    add_attention=False,
    layers_per_block=3,
)
FACTOR = 8  # of both autoencoders
SHAPES = {  # what the small and the large U-Net look at: rows, width
    "this book": (40, 128),
    "life size": (77, 768),
}


def own_unet() -> UNetConfig:
    """The shipped U-Net's configuration."""
    return UNet.from_pretrained(checkpoints.WEIGHTS / "stable-diffusion").config


def own_autoencoder() -> AutoencoderConfig:
    """The shipped autoencoder's."""
    return Autoencoder.from_pretrained(checkpoints.WEIGHTS / "autoencoder").config


def on_pixels(config: UNetConfig) -> UNetConfig:
    """The same U-Net for pictures: three channels in and out, and nothing else changed."""
    return UNetConfig(**{**vars(config), "in_channels": 3, "out_channels": 3, "sample_size": None})


@torch.no_grad()
def counted(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Multiply-adds of a call on the meta device, where nothing is computed: any size is free.

    Returns:
        ``all`` of them, and of these the ``attention``'s comparing and mixing (products of two
        things that depend on the input, ``bmm``), without the linear layers around it.
    """
    with FlopCounterMode(display=False) as counter:
        model(*(x.to("meta") for x in inputs))
    by_kind = counter.get_flop_counts()["Global"]
    looking = sum(n for kind, n in by_kind.items() if str(kind).endswith("bmm"))
    return {"all": counter.get_total_flops() // 2, "attention": looking // 2}


def meta(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """A network of which only the shapes exist."""
    with torch.device("meta"):
        return kind(config)


def call(config: UNetConfig, side: int, shape: tuple[int, int]) -> dict[str, int]:
    """A call of a U-Net on one picture or latent of so many places a side."""
    x, t = torch.empty(1, config.in_channels, side, side), torch.zeros(1)
    return counted(meta(UNet, config), x, t, torch.empty(1, *shape))


class Unfold(nn.Module):
    """The autoencoder's way back, as a module that can be counted."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.vae = Autoencoder(config)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, 4, h, w) to pictures."""
        return self.vae.decode(z)


def growth(
    unet: UNetConfig, vae: AutoencoderConfig, sides: Sequence[int], shape: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """What a call costs at each side in pixels: the U-Net there, and on latents an eighth as long.

    Returns:
        By side: ``pixels`` and ``latents`` (``counted``), and ``unfold``, once for each picture.
    """
    back = meta(Unfold, vae)
    found = {}
    for side in sides:
        small = side // FACTOR
        row = {"pixels": call(on_pixels(unet), side, shape)}
        if small >= 2 ** (len(unet.block_out_channels) - 1):
            row["latents"] = call(unet, small, shape)
            row["unfold"] = counted(back, torch.empty(1, vae.latent_channels, small, small))
        found[str(side)] = row
    return found


def clocked(unet: UNetConfig, rounds: int = 6) -> dict[str, dict[str, Any]]:
    """Seconds of a call and of a training step of this book's U-Net, and the step's memory.

    On pixels and on latents, one picture at a time, random weights: time does not depend on them.
    """
    g = torch.Generator().manual_seed(15)
    runs, names = [], []
    for where, sides in CLOCKED.items():
        config = on_pixels(unet) if where == "pixels" else unet
        model = UNet.fresh(config, g)
        for side in sides:
            places = side if where == "pixels" else side // FACTOR
            x = torch.randn(1, config.in_channels, places, places, generator=g)
            context = torch.randn(1, *SHAPES["this book"], generator=g)

            def forward(model: UNet = model, x: Tensor = x, y: Tensor = context) -> Tensor:
                with torch.no_grad():
                    return model(x, 500.0, y)

            def step(model: UNet = model, x: Tensor = x, y: Tensor = context) -> None:
                model(x, 500.0, y).square().mean().backward()
                model.zero_grad(set_to_none=True)

            runs += [forward, step]
            names.append((where, side))
    costs = iter(bench.in_turn(runs, rounds))
    found: dict[str, dict[str, Any]] = {}
    for where, side in names:
        calls, steps = next(costs), next(costs)
        memory = [c.memory for c in steps if c.memory is not None]
        found.setdefault(where, {})[str(side)] = {
            "call": bench.spread([c.cpu for c in calls])._asdict(),
            "step": bench.spread([c.cpu for c in steps])._asdict(),
            "bytes of a step": bench.spread(memory)._asdict() if len(memory) > 5 else None,
        }
    return found


def published(steps: int = 50, prior: int = 25, decoder: int = 25, upsampler: int = 7) -> dict:
    """What a picture of the published systems costs, by stage: calls and multiply-adds of each.

    Stable Diffusion 1.x at 512 x 512 pixels, 50 guided steps; Karlo at 256 x 256 with its usual 25,
    25 and 7, prior and decoder guided.
    """
    t, rows = torch.zeros(1), SHAPES["life size"]
    text, states = torch.empty(1, 768), torch.empty(1, 77, 768)
    mask = torch.ones(1, 77, dtype=torch.bool)
    sides = {"U-Net on latents": 64, "the same on pixels": 512}
    calls = {
        "Stable Diffusion 1.x": {
            "U-Net": (2 * steps, call(SD_UNET, sides["U-Net on latents"], rows)),
            "autoencoder's decoder": (
                1,
                counted(meta(Unfold, SD_AUTOENCODER), torch.empty(1, 4, 64, 64)),
            ),
        },
        "Karlo": {
            "prior": (
                2 * prior,
                counted(meta(Prior, KARLO_PRIOR), torch.empty(1, 768), t, text, states, mask),
            ),
            "decoder": (
                2 * decoder,
                counted(
                    meta(ADMUNet, KARLO_DECODER),
                    torch.empty(1, 3, 64, 64), t, torch.empty(1, 81, 1536), torch.empty(1, 1280),
                ),
            ),
            "upsampler": (
                upsampler,
                counted(meta(ADMUNet, KARLO_UPSAMPLER), torch.empty(1, 6, 256, 256), t),
            ),
        },
    }  # fmt: skip
    return {
        name: {stage: {"calls": n, "a call": work["all"]} for stage, (n, work) in rows.items()}
        for name, rows in calls.items()
    }


# --- the measurement ------------------------------------------------------------------------------

WEIGHTS = tuple(dict.fromkeys(w for made in MADE.values() for w in made.kind.made_of))


def all_worth(seeds: Sequence[int], n: int | None = None) -> dict[str, Any]:
    """The three systems and true pictures laid out anew, on the same prompts."""
    return {name: worth(made.draws(made.opened()), seeds, n) for name, made in MADE.items()} | {
        "true pictures": worth(anew, seeds, n)
    }


@measurement(
    "side-by-side",
    "DALL·E 2, Imagen and Stable Diffusion: counted cost of training and of a picture, 100 of the"
    " thousand prompts three times with other noise, read by the judge; cost against resolution",
    minutes=12,
    needs=(*WEIGHTS, "decoder/text_proj", "judge", "judge-second"),
)
def side_by_side(seeds: Sequence[int] = SEEDS, n: int | None = PROMPTS) -> dict[str, Any]:
    """What chapter 15 prints."""
    recipes = [r for made in MADE.values() for r in (*made.shared, *made.trained)]
    rows = {name: training(name) for name in dict.fromkeys(recipes)}
    pipes = {name: made.opened() for name, made in MADE.items()}
    costs = drawing(pipes)
    del pipes
    worths = all_worth(seeds, n)
    systems = {name: worths[name] for name in MADE}
    own = own_unet(), own_autoencoder()
    return {
        "seeds": list(seeds),
        "prompts": len(asked()[:n]),
        "training": rows,
        "budgets": budgets(rows),
        "drawing": costs,
        "worth": worths,
        "gains": gains(systems, n),
        "by lot": by_lot(),
        "growth": {
            "this book": growth(*own, SMALL_SIDES, SHAPES["this book"]),
            "life size": growth(SD_UNET, SD_AUTOENCODER, LIFE_SIDES, SHAPES["life size"]),
        },
        "clocked": clocked(own[0]),
        "published": published(),
    }
