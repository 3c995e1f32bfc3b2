"""Autoencoders of other factors and channels, and one with a codebook: chapter 11's comparison.

All are trained by the parts of the shipped autoencoder's recipe, each for equally many processor
seconds on one thread, on pictures that are drawn beforehand. As they train they are scored now and
then, so that they can be compared at equal seconds *and* at equal numbers of pictures; the two
differ a lot. ``python -m companion measure autoencoders`` makes the table; ``kl-weights`` asks what
a heavier KL buys, and draws latents from bells; ``autoencoder-longer`` teaches the shipped one on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import checkpoints, data, errors, judge
from companion.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from companion.measure import measurement
from companion.muon import Muon
from companion.recipes import autoencoder as recipe
from companion.scores import interval, mean_interval
from companion.storybook import Scene, render
from companion.train import PRECISIONS, Average, fast_precision, generator

WIDTHS = (16, 32, 64, 96, 96)  # at 64 x 64, 32 x 32, …: as many as the factor has halvings, and one
CODES = 1024
COMMITMENT = 0.25  # van den Oord et al. 2017 (arXiv 1711.00937), equation 3
SECONDS = 60.0  # of one thread, for each network
PRICES = (0.0, 1e-4, 1e-2, 1.0)  # weights of KL to compare, at f = 8 with 4 channels
KL_WEIGHTS = (1e-4, 1e-2, 0.1, 1.0)  # to draw from, trained twice as long as those
BATCH, LEARNING_RATE, WARMUP, EMA = 16, 3e-3, 50, 0.99

SEEN = 0.02  # of a difference between pixels, from 0 to 1

Loss = Callable[[Autoencoder, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Plan:
    """One network: how much smaller on each side, with how many channels, drawn or from codes."""

    factor: int
    channels: int
    codes: int | None = None

    @property
    def name(self) -> str:
        kind = "KL" if self.codes is None else f"VQ {self.codes}"
        return f"f = {self.factor}, c = {self.channels}, {kind}"

    @property
    def latent(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, recipe.SIZE // self.factor, recipe.SIZE // self.factor


PLANS = (
    Plan(2, 4), Plan(4, 4), Plan(8, 4), Plan(16, 4), Plan(8, 16), Plan(16, 16),
    Plan(8, 4, CODES),
)  # fmt: skip


class CodebookAutoencoder(Autoencoder):
    """Each place of the latent is one of a list of vectors (van den Oord et al. 2017, VQ-VAE).

    Where Stable Diffusion's autoencoder draws a latent near the encoder's mean, this one takes the
    code nearest to it. ``encode`` gives that code as the mean of a Gaussian of no width, so that
    whoever works with one kind of autoencoder can work with the other.
    """

    def __init__(self, config: AutoencoderConfig, codes: int) -> None:
        super().__init__(config)
        errors.number("codes", codes, 1, integer=True)
        self.codes = nn.Parameter(torch.randn(codes, config.latent_channels))

    def before(self, x: Tensor) -> Tensor:
        """What the encoder says, before a code is chosen: (B, 3, H, W) -> (B, c, h, w)."""
        return super().encode(x).mean

    def nearest(self, z: Tensor) -> Tensor:
        """Number of the nearest code at each place: (B, c, h, w) -> (B, h, w), whole numbers."""
        b, c, h, w = z.shape
        places = z.permute(0, 2, 3, 1).reshape(-1, c)  # (B*h*w, c)
        apart = places.square().sum(1, keepdim=True) - 2 * places @ self.codes.T
        return (apart + self.codes.square().sum(1)).argmin(1).view(b, h, w)

    def look_up(self, numbers: Tensor) -> Tensor:
        """Codes by number: (B, h, w) -> (B, c, h, w)."""
        return F.embedding(numbers, self.codes).permute(0, 3, 1, 2)

    def encode(self, x: Tensor) -> Posterior:
        """Pictures (B, 3, H, W) in [-1, 1] to the nearest codes, as certain as can be."""
        z = self.look_up(self.nearest(self.before(x)))
        return Posterior(z, torch.full_like(z, -30.0))

    @torch.no_grad()
    def start_from(self, x: Tensor, generator: torch.Generator) -> None:
        """Lay the codes where the encoder puts these pictures, so that none begins unused."""
        z = self.before(x).permute(0, 2, 3, 1).reshape(-1, self.codes.shape[1])
        chosen = torch.randint(len(z), (len(self.codes),), generator=generator)
        spread = 0.05 * z.std() * torch.randn(self.codes.shape, generator=generator)
        self.codes.copy_(z[chosen] + spread)


def codebook_loss(
    model: CodebookAutoencoder, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recipe's distance, and codes and encoder drawn to each other (VQ-VAE, equation 3).

    Choosing has no gradient; the decoder's goes straight on to the encoder, as if nothing had been
    chosen.
    """
    x = batch["pictures"]
    z = model.before(x)
    code = model.look_up(model.nearest(z.detach()))
    apart, parts = recipe.distance(model.decode(z + (code - z).detach()), x)
    to_codes, to_encoder = F.mse_loss(code, z.detach()), F.mse_loss(z, code.detach())
    parts = {name: value.detach() for name, value in parts.items()}
    return apart + to_codes + COMMITMENT * to_encoder, {**parts, "codes": to_codes.detach()}


def fresh(plan: Plan, seed: int = 0) -> Autoencoder:
    """An untrained network after a plan; the global generator is left as it was."""
    halvings = plan.factor.bit_length() - 1
    errors.expect(
        plan.factor == 2**halvings and 1 <= halvings < len(WIDTHS),
        f"factor is {plan.factor}; expected 2, 4, 8 or 16.",
    )
    config = recipe.config(WIDTHS[: halvings + 1], plan.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, plan.name).initial_seed())
        if plan.codes is None:
            return recipe.build(config)
        made = CodebookAutoencoder(config, plan.codes)
        made.load_state_dict(recipe.build(config).state_dict() | {"codes": made.codes.detach()})
        return made.to(memory_format=torch.channels_last)


def trained(
    plan: Plan,
    pictures: recipe.Pictures,
    look: Tensor,
    seconds: float,
    *,
    looks: int = 6,
    kl_weight: float = recipe.KL_WEIGHT,
    seed: int = 0,
) -> tuple[Autoencoder, list[dict[str, float]]]:
    """Train for so many processor seconds, and look at ``looks`` times how far it has come.

    Args:
        plan: What to train.
        pictures: To train on; drawing them is not counted when they have been drawn before.
        look: Pictures (B, 3, 64, 64) in [0, 1] for the curve; looking is not counted either.
        seconds: Processor seconds of steps.
        looks: Points of the curve, evenly spaced in seconds.
        kl_weight: As in the recipe's loss.
        seed: Of first weights and batches.

    Returns:
        The moving average of the weights, and the curve: seconds, pictures seen, PSNR in dB.
    """
    model, loss = fresh(plan, seed), codebook_loss
    if not isinstance(model, CodebookAutoencoder):
        loss = partial(recipe.loss, kl_weight=kl_weight)  # type: ignore[assignment]
    average = Average(model, EMA)
    curve: list[dict[str, float]] = []
    spent = 0.0
    warm = lambda step: min(1.0, (step + 1) / WARMUP)  # noqa: E731
    for step, took in lessons(model, average, pictures, loss, warm, plan.latent, seed):
        spent += took
        if spent >= seconds * (len(curve) + 1) / looks:
            psnr = recipe.psnr(recipe.round_trip(average.model, look), look).mean().item()
            curve.append({"seconds": spent, "pictures": step * BATCH, "psnr": psnr})
        if len(curve) == looks:
            break
    return average.model, curve


def lessons(
    model: Autoencoder,
    average: Average,
    pictures: recipe.Pictures,
    loss: Loss,
    share: Callable[[int], float],
    latent: tuple[int, int, int],
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Teach ``model`` step by step, without end; ``average`` follows.

    Args:
        model: To be taught.
        average: Its moving average.
        pictures: To train on.
        loss: Of the model and a batch, as the recipe's.
        share: Of the learning rate, at each step from 0 on.
        latent: Its latents' shape.
        seed: Of the batches.

    Yields:
        Steps so far, and the processor seconds that the last one took, without its batch.
    """
    dtype = PRECISIONS[fast_precision()] or torch.float32
    optimiser = Muon(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), dtype=dtype)
    for step in count():
        indices = step * BATCH + torch.arange(BATCH)
        batch = recipe.batch(indices, generator(seed, "factors", step), pictures, latent)
        started = time.process_time()
        if step == 0 and isinstance(model, CodebookAutoencoder):
            model.start_from(batch["pictures"], generator(seed, "codes"))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * share(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            value, _ = loss(model, batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(model, step)
        yield step + 1, time.process_time() - started


@torch.no_grad()
def cloud(model: Autoencoder, x: Tensor, off: float = 0.2) -> dict[str, Any]:
    """What an encoder's Gaussians are like on pictures (B, 3, H, W) in [0, 1].

    Returns:
        PSNR of round trips; of latents that are ``off`` by noise of so many standard deviations of
        the means; KL in nats for a latent value; for each channel the standard deviation of the
        means, and the encoder's own noise.
    """
    said = [model.encode(2 * part - 1) for part in x.split(50)]
    mean, noise = torch.cat([p.mean for p in said]), torch.cat([p.std for p in said])
    g = torch.Generator().manual_seed(0)
    moved = mean + off * mean.std() * torch.randn(mean.shape, generator=g)
    back = [(model.decode(z).clamp(-1, 1) + 1) / 2 for m in (mean, moved) for z in m.split(50)]
    psnr, moved_psnr = recipe.psnr(torch.cat(back), x.repeat(2, 1, 1, 1)).chunk(2)
    return {
        "psnr": mean_interval(psnr),
        "off": off,
        "psnr off": mean_interval(moved_psnr),
        "nats": (torch.cat([p.kl() for p in said]).mean() / mean[0].numel()).item(),
        "std": mean.std((0, 2, 3)).tolist(),
        "noise": noise.square().mean((0, 2, 3)).sqrt().tolist(),
    }


def multiply_adds(model: nn.Module, *inputs: Tensor) -> int:
    """Multiplications (each with its addition) of convolutions, linear layers and attention.

    Counted by a run on ``inputs``, whose numbers do not matter; give a batch of one for one
    picture. The run is on the meta device, where nothing is computed (trap: on a CPU, torch's
    counter does not see attention).
    """
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = deepcopy(model).to("meta"), [x.to("meta") for x in inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def drawn(scenes: int) -> recipe.Pictures:
    """So many pictures to train on, drawn now, so that no network pays for it."""
    pictures = recipe.Pictures(n=scenes)
    for numbers in torch.arange(scenes).split(50):
        pictures[numbers]
    return pictures


@measurement(
    "autoencoders",
    "Small autoencoders of several factors and channels, and one with a codebook: equal processor"
    " seconds each, PSNR and facts read right on fresh scenes with 95 % intervals",
    minutes=10,
    needs=("judge",),
)
def autoencoders(
    plans: Sequence[Plan] = PLANS,
    prices: Sequence[float] = PRICES,
    seconds: float = SECONDS,
    n: int = 500,
    scenes: int = 4000,
) -> dict[str, Any]:
    """Chapter 11's comparison."""
    pictures = drawn(scenes)
    x, truth = pictures.fresh(n)
    rows = []
    for plan in plans:
        model, curve = trained(plan, pictures, x[: min(n, 100)], seconds)
        back = recipe.round_trip(model, x)
        read = recipe.facts_right(back, truth)
        c, h, w = plan.latent
        rows.append(
            {
                "name": plan.name,
                "factor": plan.factor,
                "channels": c,
                "codes": plan.codes,
                "numbers": c * h * w,
                "parameters": sum(p.numel() for p in model.parameters()),
                "multiply_adds": multiply_adds(model, x[:1]),
                "curve": curve,
                "psnr": mean_interval(recipe.psnr(back, x)),
                **read,
            }
        )
        if plan.codes is not None:
            with torch.no_grad():
                used = model.nearest(model.before(2 * x - 1)).unique().numel()
            rows[-1]["codes used"] = used
    ceiling = recipe.facts_right(x, truth)
    paid = []
    for price in prices:
        model, curve = trained(Plan(8, 4), pictures, x[:1], seconds / 2, looks=1, kl_weight=price)
        paid.append({"kl_weight": price, "pictures": curve[-1]["pictures"], **cloud(model, x)})
    return {
        "seeds": [0],
        "seconds": seconds,
        "scenes": scenes,
        "fresh": n,
        "precision": fast_precision(),
        "ceiling": ceiling,
        "rows": rows,
        "prices": paid,
    }


# --- taught on ------------------------------------------------------------------------------------

(SHIPPED,) = recipe.RECIPES  # how the network was trained that is taught on


def squared(y: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of ``recipe.distance``: 10 (y - x)^2, which is all that PSNR asks for."""
    _, parts = recipe.distance(y, x)
    return 10 * parts["mse"], parts


LOSSES = {"its own loss": recipe.distance, "squared error": squared}


def taught_on(
    model: Autoencoder,
    pictures: recipe.Pictures,
    look: Tensor,
    steps: int,
    how_far: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    *,
    looks: int = 6,
    seed: int = 0,
) -> tuple[Autoencoder, list[dict[str, float]]]:
    """Train a trained autoencoder for more steps; in the last third the learning rate falls to 0.

    Args:
        model: Is left as it is; a copy is taught.
        pictures: To train on.
        look: Pictures (B, 3, 64, 64) in [0, 1] for the curve.
        steps: How many more, of 16 pictures.
        how_far: The loss's first part, as ``recipe.distance``.
        looks: Points of the curve, after the first, which is the model as it came.
        seed: Of the batches.

    Returns:
        The moving average of the weights, and the curve: pictures seen since, PSNR in dB.
    """
    loss = partial(recipe.loss, how_far=how_far)
    share = lambda step: min(1.0, (step + 1) / WARMUP, 3 * (1 - step / steps))  # noqa: E731
    taught = deepcopy(model).train().requires_grad_(True).to(memory_format=torch.channels_last)
    average = Average(taught, SHIPPED.ema)
    curve: list[dict[str, float]] = []

    def look_at(step: int) -> None:
        psnr = recipe.psnr(recipe.round_trip(average.model, look), look).mean().item()
        curve.append({"pictures": step * BATCH, "psnr": psnr})

    look_at(0)
    latent = Plan(8, 4).latent
    for step, _ in islice(lessons(taught, average, pictures, loss, share, latent, seed), steps):
        if step >= steps * len(curve) / looks:
            look_at(step)
    return average.model, curve


@torch.no_grad()
def by_specks(model: Autoencoder, scenes: Sequence[Scene]) -> dict[str, Any]:
    """How much of what an autoencoder loses are specks: stars, drops, blossoms, waves, glints.

    Args:
        model: Of 64 x 64 pictures.
        scenes: To be drawn with specks and without.

    Returns:
        PSNR of round trips with an interval, with specks and without; the share of pixels that
        specks change, and the share of the squared error there.
    """
    with_, without = (render(scenes, recipe.SIZE, specks=specks) for specks in (True, False))
    there = (with_ - without).abs().amax(1) > SEEN  # (n, 64, 64)
    back = recipe.round_trip(model, with_)
    error = (back - with_).square().mean(1)
    return {
        "psnr": mean_interval(recipe.psnr(back, with_)),
        "psnr without specks": mean_interval(
            recipe.psnr(recipe.round_trip(model, without), without)
        ),
        "pixels of specks": there.double().mean().item(),
        "error in specks": (error[there].sum() / error.sum()).item(),
    }


@measurement(
    "autoencoder-longer",
    "The shipped autoencoder taught on with as many pictures as it had seen, by its own loss and by"
    " squared error alone: PSNR on fresh scenes, with and without specks, and what the judge reads",
    minutes=50,
    needs=("autoencoder", "judge"),
)
def autoencoder_longer(
    steps: int = SHIPPED.steps, n: int = 500, scenes: int = recipe.SCENES
) -> dict[str, Any]:
    """Whether more of the same training brings the missing decibels."""
    shipped = Autoencoder.from_pretrained(checkpoints.WEIGHTS / "autoencoder")
    pictures = drawn(scenes)
    x, truth = pictures.fresh(n)
    rows = {"as shipped": by_specks(shipped, truth)}
    curves = {}
    for name, how_far in LOSSES.items():
        model, curves[name] = taught_on(shipped, pictures, x[: min(n, 100)], steps, how_far)
        read = recipe.facts_right(recipe.round_trip(model, x), truth)
        rows[name] = {**by_specks(model, truth), **read}
    return {
        "seeds": [0],
        "steps": steps,
        "batch": BATCH,
        "fresh": n,
        "precision": fast_precision(),
        "rows": rows,
        "curves": curves,
    }


# --- drawn from nothing ---------------------------------------------------------------------------

BELLS = ("every number from N(0, 1)", "every channel as wide as it is", "all numbers together")


def bells(z: Tensor, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw latents from three normal distributions, each fitted better than the one before.

    Args:
        z: Unscaled latents of pictures, (B, c, h, w), to fit to; the first bell ignores them.
        n: How many to draw.
        generator: Of the noise, which is the same for all three.

    Returns:
        By name, (n, c, h, w): from N(0, 1); with each channel's mean and standard deviation; with
        the mean of each of the c * h * w numbers, and their covariance (chapter 1's fitted bell).
    """
    noise = torch.randn(n, *z.shape[1:], generator=generator)
    flat = z.flatten(1).double()
    variances, axes = torch.linalg.eigh(torch.cov(flat.T))
    root = axes * variances.clamp(min=0).sqrt()  # root @ root.T is the covariance
    whole = flat.mean(0) + noise.flatten(1).double() @ root.T
    apart = noise * z.std((0, 2, 3), keepdim=True) + z.mean((0, 2, 3), keepdim=True)
    return dict(zip(BELLS, (noise, apart, whole.view_as(noise).float()), strict=True))


@torch.no_grad()
def decoded(model: Autoencoder, z: Tensor, size: int = 50) -> Tensor:
    """Unscaled latents (B, c, h, w) to pictures (B, 3, H, W) in [0, 1], a few at a time."""
    return torch.cat([data.to_unit(model.decode(part)) for part in z.split(size)])


@measurement(
    "kl-weights",
    "The autoencoder of f = 8 with 4 channels at several weights of KL, equal processor seconds:"
    " round trips, the latents' spread, and whether draws from a bell decode to scenes",
    minutes=5,
    needs=("judge",),
)
def kl_weights(
    weights: Sequence[float] = KL_WEIGHTS,
    seconds: float = SECONDS,
    n: int = 200,
    scenes: int = 4000,
) -> dict[str, Any]:
    """What a heavier KL buys, and what it costs. Bells are fitted to draws for 1000 pictures."""
    pictures = drawn(scenes)
    x, truth = pictures.fresh(n)
    reader, rows = judge.Judge.from_pretrained(), []
    for weight in weights:
        model, curve = trained(Plan(8, 4), pictures, x[:1], seconds, looks=1, kl_weight=weight)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            said = [
                model.encode(data.to_signed(pictures[numbers])).sample(g)
                for numbers in torch.arange(min(1000, scenes)).split(50)
            ]
        z, back = torch.cat(said), recipe.round_trip(model, x)
        decodable = {}
        for name, latents in bells(z, n, g).items():
            read = reader.read(decoded(model, latents))
            decodable[name] = interval(sum(facts is not None for facts in read), n)
        rows.append(
            {
                "kl_weight": weight,
                "pictures": curve[-1]["pictures"],
                "psnr": mean_interval(recipe.psnr(back, x)),
                **recipe.facts_right(back, truth),
                "nats": cloud(model, x)["nats"],
                "spread": z.std().item(),
                "scenes": decodable,
            }
        )
    return {
        "seeds": [0],
        "seconds": seconds,
        "fresh": n,
        "precision": fast_precision(),
        "ceiling": recipe.facts_right(x, truth),
        "rows": rows,
    }
