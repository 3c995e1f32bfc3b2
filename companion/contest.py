"""Three ways to draw digits, at equal parameters and processor seconds: chapter 1's contest.

A VAE, a GAN (``predecessors``) and a small diffusion model learn the same 1438 digits of 8 x 8
pixels and are compared with the 359 that were held out. ``contender`` trains one of them,
``digit_scores`` looks at what it draws; the table with three seeds is made by
``python -m companion measure before-diffusion``.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from companion import data, diffusion, errors, predecessors, samplers
from companion.adm import ADMConfig, ADMUNet
from companion.measure import SEEDS, measurement, over_seeds
from companion.recipes import DigitClassifier
from companion.schedule import Schedule
from companion.scores import frechet, precision_recall

GROUPS = 4  # as many groups of drawn digits as large as the held-out set, whose scores are averaged
SAMPLING_STEPS = 20
# Steps of batches of 64 that take each the same processor seconds on one thread (the results say
# how many, measured); found by timing sixty steps of each beside the others.
STEPS = {"VAE": 1600, "GAN": 1080, "diffusion": 720}
# The best of TRIALS by Fréchet distance, with a seed that the contest does not use.
SETTINGS: dict[str, dict[str, Any]] = {
    "VAE": {"latent": 6, "learning_rate": 4e-3},
    "GAN": {"latent": 16, "learning_rate": 1e-3},
    "diffusion": {"target": "v_prediction", "learning_rate": 4e-3},
}
TRIALS: dict[str, list[dict[str, Any]]] = {
    "VAE": [
        {"latent": 4, "learning_rate": 2e-3},
        {"latent": 6, "learning_rate": 2e-3},
        {"latent": 8, "learning_rate": 2e-3},
        {"latent": 6, "learning_rate": 4e-3},
    ],
    "GAN": [
        {"latent": 8, "learning_rate": 1e-3},
        {"latent": 16, "learning_rate": 1e-3},
        {"latent": 16, "learning_rate": 5e-4},
        {"latent": 16, "learning_rate": 2e-3},
    ],
    "diffusion": [
        {"target": "v_prediction", "learning_rate": 4e-3},
        {"target": "sample", "learning_rate": 4e-3},
        {"target": "epsilon", "learning_rate": 4e-3},
        {"target": "v_prediction", "learning_rate": 8e-3},
    ],
}
DIGITS_UNET = ADMConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 24),
    down_block_types=("ResnetDownsampleBlock2D",) * 2,
    up_block_types=("ResnetUpsampleBlock2D",) * 2,
    layers_per_block=1,
    add_attention=False,
    norm_num_groups=8,
    sample_size=8,
)
SCORES = ("frechet", "precision", "recall", "digits", "rarest", "edges", "nearest")


@lru_cache(maxsize=1)
def digits_split() -> tuple[Tensor, Tensor]:
    """Digits to train on (1438, 1, 8, 8) and every fifth, held out (359, 1, 8, 8), in [-1, 1]."""
    pictures = data.to_signed(data.digits()[0])
    kept = torch.arange(len(pictures)) % 5 == 4
    return pictures[~kept], pictures[kept]


@dataclass(frozen=True)
class Contender:
    """A trained network that draws: ``draw(n, generator)`` gives (n, 1, 8, 8) in [-1, 1]."""

    draw: Callable[[int, torch.Generator], Tensor]
    network: nn.Module
    parameters: int
    steps: int
    seconds: float


def contender(
    name: str,
    seed: int,
    effort: float = 1.0,
    watch: Callable[[int, nn.Module, Any], object] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Contender:
    """Train one of the three on the digits.

    Args:
        name: ``VAE``, ``GAN`` or ``diffusion``.
        seed: Of the first weights, the batches and the noise.
        effort: Share of the steps, above 0; the learning rate still falls to 0 over them.
        watch: Called as ``watch(step, network, losses)`` after each step, for plots.
        settings: Instead of ``SETTINGS[name]``.

    Returns:
        The trained network and what it took, in processor seconds.
    """
    errors.one_of("name", name, STEPS)
    errors.number("effort", effort, low=1e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the first weights
        network, train, draw = _CONTENDERS[name](**(settings or SETTINGS[name]))
    steps = max(1, round(effort * STEPS[name]))
    generator = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for step, losses in enumerate(train(network, digits_split()[0], steps, generator)):
        if watch:
            watch(step, network, losses)
    seconds = time.process_time() - started
    network.eval().requires_grad_(False)
    parameters = sum(p.numel() for p in network.parameters())
    return Contender(lambda n, g: draw(network, n, g), network, parameters, steps, seconds)


def train_diffusion(
    network: nn.Module,
    pictures: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    target: str = "v_prediction",
    batch_size: int = 64,
    learning_rate: float = 4e-3,
) -> Iterator[float]:
    """Train a network to see through noise, as chapter 3 explains; yields the loss."""
    schedule = Schedule.cosine()
    optimiser = torch.optim.Adam(network.parameters(), learning_rate)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * (1 - step / steps)
        x0 = pictures[torch.randint(len(pictures), (batch_size,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(len(schedule), (batch_size,), generator=generator)
        wanted = diffusion.target_for(x0, noise, t, schedule, target)
        loss = diffusion.simple_loss(network(schedule.add_noise(x0, noise, t), t), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


def draw_diffusion(
    network: nn.Module,
    n: int,
    generator: torch.Generator,
    *,
    target: str = "v_prediction",
    steps: int = SAMPLING_STEPS,
) -> Tensor:
    """Pictures (n, 1, 8, 8) in [-1, 1] from noise, by DDIM."""
    schedule = Schedule.cosine()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return diffusion.to_x0(network(x, t), x, t, schedule, target)

    t = samplers.timesteps("ddim", steps, schedule, "trailing")
    x_T = torch.randn(n, 1, 8, 8, generator=generator)
    return samplers.ddim(denoise, x_T, t, schedule, clip=1.0)


Made = tuple[nn.Module, Callable[..., Iterator], Callable[[Any, int, torch.Generator], Tensor]]


def _vae(latent: int, learning_rate: float) -> Made:
    config = predecessors.PredecessorConfig(latent)

    def draw(vae: predecessors.VAE, n: int, generator: torch.Generator) -> Tensor:
        return vae.decode(torch.randn(n, latent, generator=generator))

    train = partial(predecessors.train_vae, learning_rate=learning_rate)
    return predecessors.VAE(config), train, draw


def _gan(latent: int, learning_rate: float) -> Made:
    config = predecessors.PredecessorConfig(latent)

    def draw(gan: predecessors.GAN, n: int, generator: torch.Generator) -> Tensor:
        return gan.draw(torch.randn(n, latent, generator=generator))

    train = partial(predecessors.train_gan, learning_rate=learning_rate)
    return predecessors.GAN(config), train, draw


def _diffusion(target: str, learning_rate: float) -> Made:
    train = partial(train_diffusion, target=target, learning_rate=learning_rate)
    return ADMUNet(DIGITS_UNET), train, partial(draw_diffusion, target=target)


_CONTENDERS: dict[str, Callable[..., Made]] = {"VAE": _vae, "GAN": _gan, "diffusion": _diffusion}


def edges(x: Tensor) -> float:
    """Mean squared difference of neighbouring pixels, of (B, C, H, W): low where there is blur."""
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    return (across.square().mean() + down.square().mean()).item() / 2


def nearest(x: Tensor, known: Tensor) -> float:
    """Median distance of pictures from the nearest known one: 0 for copies."""
    return torch.cdist(x.flatten(1), known.flatten(1)).min(dim=1).values.median().item()


@torch.no_grad()
def digit_scores(drawn: Tensor) -> dict[str, float]:
    """Compare drawn digits with the held-out ones, in groups of the same size, averaged.

    Args:
        drawn: (N, 1, 8, 8) in [-1, 1], N at least 359; what fills no group is left out.

    Returns:
        ``frechet`` distance and ``precision``, ``recall`` in the features of the shipped digit
        classifier; ``digits``, the number of kinds of digit if all were equally frequent (the
        exponential of the entropy of its readings), and the share of the ``rarest``; ``edges``, 1
        where they are as steep as in the held-out digits; ``nearest``, the median distance to the
        nearest digit trained on.
    """
    trained_on, held_out = digits_split()
    errors.tensor("drawn", drawn, "N 1 8 8", "float", low=-1, high=1)
    errors.expect(
        len(drawn) >= len(held_out), f"there are {len(drawn)} digits; expected {len(held_out)}."
    )
    reader = _reader()
    real, found = reader.features(data.to_unit(held_out)), []
    for group in drawn.split(len(held_out)):
        if len(group) < len(held_out):
            continue
        fake = reader.features(data.to_unit(group))
        found.append([frechet(real, fake), *precision_recall(real, fake)])
    counts = torch.bincount(reader(data.to_unit(drawn)).argmax(1), minlength=10).double()
    shares = counts / counts.sum()
    kinds = torch.special.entr(shares).sum().exp().item()
    others = [kinds, shares.min().item(), edges(drawn) / edges(held_out)]
    means = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return dict(zip(SCORES, [*means, *others, nearest(drawn, trained_on)], strict=True))


@lru_cache(maxsize=1)
def _reader() -> DigitClassifier:
    return DigitClassifier.from_pretrained()


@measurement(
    "before-diffusion",
    "A VAE, a GAN and a diffusion model on 8 x 8 digits, at equal parameters and processor seconds:"
    " three seeds, with 95 % intervals of the mean by Student's t",
    minutes=6,
    needs=("digit-classifier",),
)
def before_diffusion(
    seeds: Sequence[int] = SEEDS, groups: int = GROUPS, effort: float = 1.0
) -> dict[str, Any]:
    """Chapter 1's table. Real digits and copies of those trained on stand beside the three."""
    trained_on, held_out = digits_split()
    n = groups * len(held_out)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        g = torch.Generator().manual_seed(1000 + seed)
        known = trained_on[torch.randperm(len(trained_on), generator=g)]
        copies = trained_on[torch.randint(len(trained_on), (n,), generator=g)]
        found = {"real digits": known[:n], "copies": copies}
        for name in STEPS:
            made = contender(name, seed, effort)
            started = time.process_time()
            with torch.no_grad():
                drawn = made.draw(n, g)
            cost = {
                "parameters": made.parameters,
                "steps": made.steps,
                "training seconds": made.seconds,
                "seconds for 1000 pictures": (time.process_time() - started) / n * 1000,
            }
            rows.setdefault(name, []).append(digit_scores(drawn) | cost)
            if name == "VAE":
                spread = made.network.log_sigma.exp()
                grain = spread * torch.randn(drawn.shape, generator=g)
                found["VAE with its noise"] = (drawn + grain).clamp(-1, 1)
        for name, pictures in found.items():
            rows.setdefault(name, []).append(digit_scores(pictures))
    head = {"seeds": list(seeds), "pictures": n, "held out": len(held_out)}
    return head | {"settings": SETTINGS, "rows": _table(rows)}


def _table(rows: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    ends = {"precision": (0, 1), "recall": (0, 1), "rarest": (0, 0.1), "digits": (1, 10)}
    table: dict[str, dict[str, Any]] = {}
    for name, runs in rows.items():
        table[name] = {}
        for key in runs[0]:
            values = [run[key] for run in runs]
            fixed = key in ("parameters", "steps")
            low, high = ends.get(key, (0, None))
            table[name][key] = values[0] if fixed else over_seeds(values, low, high)
    return table


@measurement(
    "before-diffusion-trials",
    "The settings tried for each of the three before the contest: four each, at half the steps,"
    " with a seed of their own",
    minutes=3,
    needs=("digit-classifier",),
)
def before_diffusion_trials(seed: int = 100, effort: float = 0.5) -> dict[str, Any]:
    """What equal care came to: Fréchet distance, precision and recall of every setting tried."""
    tried = []
    for name, trials in TRIALS.items():
        for settings in trials:
            made = contender(name, seed, effort, settings=settings)
            with torch.no_grad():
                drawn = made.draw(GROUPS * 359, torch.Generator().manual_seed(seed))
            tried.append({"name": name, "settings": settings} | digit_scores(drawn))
    return {"seeds": [seed], "effort": effort, "rows": {"trials": tried}}
