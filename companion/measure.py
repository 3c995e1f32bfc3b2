"""Results that take too long for a notebook: ``python -m companion measure NAME``.

A measurement is a function that returns plain numbers, marked with ``@measurement``. What it says
is written to ``book/results/NAME.json`` beside the command, the seeds, the machine and the hashes
of the shipped weights that it used. A notebook loads it with :func:`load`, which refuses results
whose weights are not the shipped ones any more, and runs a part of it again.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from companion import __version__, checkpoints, data, diffusion, errors, predecessors, samplers
from companion.adm import ADMConfig, ADMUNet
from companion.recipes import DigitClassifier
from companion.schedule import Schedule
from companion.scores import frechet, precision_recall
from companion.train import hardware

RESULTS = Path(__file__).resolve().parents[1] / "book" / "results"


@dataclass(frozen=True)
class Measurement:
    """One entry: what it measures, on which shipped weights, and how long it takes on one core."""

    run: Callable[[], dict[str, Any]]
    about: str
    minutes: float
    needs: tuple[str, ...]


MEASUREMENTS: dict[str, Measurement] = {}


def measurement(name: str, about: str, minutes: float, needs: tuple[str, ...] = ()) -> Callable:
    """Register a function that returns what goes into the file under ``name``."""

    def register(run: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        MEASUREMENTS[name] = Measurement(run, about, minutes, needs)
        return run

    return register


def measure(name: str, out: str | Path | None = None) -> Path:
    """Run a measurement on one thread and write what it found.

    Args:
        name: One of ``MEASUREMENTS``.
        out: File to write; default ``book/results/NAME.json``.

    Returns:
        The file.
    """
    errors.one_of("the measurement", name, MEASUREMENTS)
    entry, path = MEASUREMENTS[name], Path(out) if out else RESULTS / f"{name}.json"
    hashes = _hashes(entry.needs)  # missing weights show now
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist; the results go to {path}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        found = entry.run()
        head = {
            "name": name,
            "about": entry.about,
            "command": f"python -m companion measure {name}",
            "weights": hashes,
            "hardware": hardware(torch.device("cpu")),
            "torch": torch.__version__.split("+")[0],
            "companion": __version__,
            "minutes": round((time.process_time() - started) / 60, 2),
        }
    finally:
        torch.set_num_threads(threads)
    checkpoints.write_json(path, head | found)
    return path


def load(name: str, path: str | Path | None = None) -> dict[str, Any]:
    """Read stored results, refusing those of other weights than the shipped ones.

    Raises:
        FileNotFoundError: Nothing was measured yet.
        ValueError: The weights have changed since; says how to measure again.
    """
    errors.one_of("the measurement", name, MEASUREMENTS)
    path = Path(path) if path else RESULTS / f"{name}.json"
    again = f"python -m companion measure {name}"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. It comes with the book's repository; to make it: {again}"
        )
    found = checkpoints.read_json(path)
    for weights, shipped in _hashes(MEASUREMENTS[name].needs).items():
        measured = found.get("weights", {}).get(weights)
        errors.expect(
            measured == shipped,
            f"{path} was measured with other weights of {weights!r} ({str(measured)[:12]} …) than"
            f" the shipped ones ({shipped[:12]} …). Measure again: {again}",
        )
    return found


def _hashes(names: Sequence[str]) -> dict[str, str]:
    folders = {name: checkpoints.find_weights(checkpoints.WEIGHTS / name) for name in names}
    return {name: checkpoints.sha256(path) for name, path in folders.items()}


def over_seeds(
    values: Sequence[float], low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    """Mean of independent runs with its 95 % interval (Student's t), cut at ``low`` and ``high``.

    Three runs are few: the interval is 2.5 standard deviations wide on either side.
    """
    from scipy.stats import t

    x = torch.tensor(values, dtype=torch.float64)
    errors.expect(len(x) > 1, f"there are {len(x)} runs; an interval needs two at least.")
    half = t.ppf(0.975, len(x) - 1) * x.std().item() / len(x) ** 0.5
    ends = [x.mean().item() - half, x.mean().item() + half]
    ends[0] = ends[0] if low is None else max(low, ends[0])
    ends[1] = ends[1] if high is None else min(high, ends[1])
    return {"value": x.mean().item(), "low": ends[0], "high": ends[1], "runs": x.tolist()}


# --- before-diffusion: three ways to draw digits, at equal parameters and seconds -----------------

SEEDS = (0, 1, 2)
GROUPS = 4  # as many groups of drawn digits as large as the held-out set, whose scores are averaged
SAMPLING_STEPS = 20
# Steps of batches of 64 that take each the same processor seconds on one thread (the results say
# how many, measured); found by timing a hundred steps of each beside the others.
STEPS = {"VAE": 1600, "GAN": 1080, "diffusion": 720}
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
) -> Contender:
    """Train one of the three on the digits.

    Args:
        name: ``VAE``, ``GAN`` or ``diffusion``.
        seed: Of the first weights, the batches and the noise.
        effort: Share of the steps, above 0; the learning rate still falls to 0 over them.
        watch: Called as ``watch(step, network, losses)`` after each step, for plots.

    Returns:
        The trained network and what it took, in processor seconds.
    """
    errors.one_of("name", name, STEPS)
    errors.number("effort", effort, low=1e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the first weights
        network, train, draw = _CONTENDERS[name]()
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
    batch_size: int = 64,
    learning_rate: float = 4e-3,
) -> Iterator[float]:
    """Train a network to tell v of noisy pictures, as chapter 3 explains; yields the loss."""
    schedule = Schedule.cosine()
    optimiser = torch.optim.Adam(network.parameters(), learning_rate)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * (1 - step / steps)
        x0 = pictures[torch.randint(len(pictures), (batch_size,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(len(schedule), (batch_size,), generator=generator)
        wanted = diffusion.target_for(x0, noise, t, schedule, "v_prediction")
        loss = diffusion.simple_loss(network(schedule.add_noise(x0, noise, t), t), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


def draw_diffusion(
    network: nn.Module, n: int, generator: torch.Generator, steps: int = SAMPLING_STEPS
) -> Tensor:
    """Pictures (n, 1, 8, 8) in [-1, 1] from noise, by DDIM."""
    schedule = Schedule.cosine()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return diffusion.to_x0(network(x, t), x, t, schedule, "v_prediction")

    t = samplers.timesteps("ddim", steps, schedule, "trailing")
    x_T = torch.randn(n, 1, 8, 8, generator=generator)
    return samplers.ddim(denoise, x_T, t, schedule, clip=1.0)


def _vae() -> tuple[nn.Module, Callable, Callable]:
    vae = predecessors.VAE(predecessors.PredecessorConfig(latent=8))

    def draw(vae: predecessors.VAE, n: int, generator: torch.Generator) -> Tensor:
        return vae.decode(torch.randn(n, 8, generator=generator))

    return vae, predecessors.train_vae, draw


def _gan() -> tuple[nn.Module, Callable, Callable]:
    gan = predecessors.GAN(predecessors.PredecessorConfig(latent=16))

    def draw(gan: predecessors.GAN, n: int, generator: torch.Generator) -> Tensor:
        return gan.draw(torch.randn(n, 16, generator=generator))

    return gan, predecessors.train_gan, draw


_CONTENDERS = {
    "VAE": _vae,
    "GAN": _gan,
    "diffusion": lambda: (ADMUNet(DIGITS_UNET), train_diffusion, draw_diffusion),
}


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
    return {"seeds": list(seeds), "pictures": n, "held out": len(held_out), "rows": _table(rows)}


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
