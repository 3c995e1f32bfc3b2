"""What came before diffusion: a variational autoencoder and a generative adversarial network.

Both are put together from the same two halves, in opposite order. :class:`Grow` makes a picture out
of a few numbers, :class:`Shrink` makes a few numbers out of a picture. A VAE shrinks and then
grows; a GAN grows and then shrinks. Pictures are the digits, (B, 1, 8, 8) in [-1, 1].

Sources: Kingma and Welling 2013 (arXiv 1312.6114); Goodfellow et al. 2014 (1406.2661). Letters: B
pictures, L latent numbers a picture, W channels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import errors

SIDE = 8  # pixels; both halves know two halvings, 8 -> 4 -> 2


class Grow(nn.Module):
    """A few numbers to a picture: (B, L) -> (B, 1, 8, 8) in (-1, 1)."""

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(latent, width * 2 * 2)
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width // 2, 3, padding=1)
        self.norm3, self.conv3 = nn.GroupNorm(8, width // 2), nn.Conv2d(width // 2, 1, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.linear(z).view(-1, self.width, 2, 2)
        h = self.conv1(F.interpolate(F.silu(self.norm1(h)), scale_factor=2))  # (B, W, 4, 4)
        h = self.conv2(F.interpolate(F.silu(self.norm2(h)), scale_factor=2))  # (B, W/2, 8, 8)
        return torch.tanh(self.conv3(F.silu(self.norm3(h))))


class Shrink(nn.Module):
    """A picture to a few numbers: (B, 1, 8, 8) -> (B, out)."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)  # to 4 x 4
        self.conv3 = nn.Conv2d(width, width, 3, stride=2, padding=1)  # to 2 x 2
        self.linear = nn.Linear(width * 2 * 2, out)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.leaky_relu(conv(x), 0.2)
        return self.linear(x.flatten(1))


@dataclass(frozen=True)
class PredecessorConfig:
    """Numbers that a picture is made from, and channels; the width is a multiple of 16."""

    latent: int = 8
    width: int = 64

    def __post_init__(self) -> None:
        errors.number("latent", self.latent, low=1, integer=True)
        errors.number("width", self.width, low=16, integer=True)
        errors.expect(
            self.width % 16 == 0, f"width is {self.width}; expected a multiple of 16 (group norms)."
        )


# --- the variational autoencoder -----------------------------------------------------------------


class VAE(nn.Module):
    """Shrink a picture to a small cloud of latents, grow a picture from any point of the cloud.

    The encoder q(z | x) answers with a mean and a log variance for each latent number; the decoder
    p(x | z) with a picture, around which true pixels lie within ``exp(log_sigma)``, one learned
    number for all pixels.
    """

    Config = PredecessorConfig

    def __init__(self, config: PredecessorConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Shrink(2 * config.latent, config.width)
        self.decoder = Grow(config.latent, config.width)
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x): (B, 1, 8, 8) -> two times (B, L)."""
        _pictures("x", x)
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """The middle of p(x | z): (B, L) -> (B, 1, 8, 8) in (-1, 1)."""
        errors.tensor("z", z, f"B {self.config.latent}", "float")
        return self.decoder(z)

    def bound(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The two costs whose sum bounds -log p(x) from above, in nats: 1312.6114, eq. 3.

        Args:
            x: (B, 1, 8, 8) in [-1, 1].
            noise: (B, L) from the bell curve: which point of each cloud is tried.

        Returns:
            Reconstruction -log p(x | z), (B,), and distance of the cloud from the prior, (B,).
        """
        mean, log_variance = self.encode(x)
        picture = self.decode(reparameterise(mean, log_variance, noise))
        return gaussian_cost(x, picture, self.log_sigma), kl(mean, log_variance)


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q | N(0, 1)) of independent Gaussians, (B, L) -> (B,), nats: 1312.6114, appendix B."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def reparameterise(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A draw from the cloud that gradients pass through: 1312.6114, section 2.4. All (B, L)."""
    return mean + (0.5 * log_variance).exp() * noise


def gaussian_cost(x: Tensor, picture: Tensor, log_sigma: Tensor) -> Tensor:
    """-log of the density of ``x`` around ``picture`` with standard deviation exp(log_sigma).

    A squared error, in units of the spread, plus what the spread itself costs. (B, ...) -> (B,).
    """
    squares = (x - picture).square() * (-2 * log_sigma).exp()
    return (0.5 * (squares + math.log(2 * math.pi)) + log_sigma).flatten(1).sum(1)


def train_vae(
    vae: VAE,
    pictures: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
) -> Iterator[tuple[float, float]]:
    """Train, giving back the two costs after each step; nothing happens until you ask for them.

    Args:
        vae: Changed in place.
        pictures: (N, 1, 8, 8) in [-1, 1].
        steps: Optimiser steps; Adam's learning rate falls to 0 along a straight line.
        generator: Source of the batches and the noise.
        batch_size: Pictures a step, drawn with replacement.
        learning_rate: Of the first step.
    """
    _pictures("pictures", pictures)
    optimiser = torch.optim.Adam(vae.parameters(), learning_rate)
    for step in range(steps):
        _fall(optimiser, learning_rate, step / steps)
        x = _batch(pictures, batch_size, generator)
        noise = torch.randn(batch_size, vae.config.latent, generator=generator).to(x)
        reconstruction, distance = (cost.mean() for cost in vae.bound(x, noise))
        optimiser.zero_grad()
        (reconstruction + distance).backward()
        optimiser.step()
        yield reconstruction.item(), distance.item()


# --- the generative adversarial network ----------------------------------------------------------


class GAN(nn.Module):
    """A generator that grows pictures from noise, and a discriminator that tells them from real."""

    Config = PredecessorConfig

    def __init__(self, config: PredecessorConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = Grow(config.latent, config.width)
        self.discriminator = Shrink(1, config.width)

    def draw(self, z: Tensor) -> Tensor:
        """Noise to pictures: (B, L) -> (B, 1, 8, 8) in (-1, 1)."""
        errors.tensor("z", z, f"B {self.config.latent}", "float")
        return self.generator(z)

    def judge(self, x: Tensor) -> Tensor:
        """Logit of "this is real", (B, 1, 8, 8) -> (B,): D(x) is its sigmoid."""
        _pictures("x", x)
        return self.discriminator(x)[:, 0]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(real) - log(1 - D(fake)), means over logits (B,): minus the value of 1406.2661, eq. 1.

    log 4 where the two cannot be told apart and D says one half of everything.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, saturating: bool = False) -> Tensor:
    """What the generator lowers: -log D(fake), from the logits (B,): 1406.2661, end of section 3.

    Args:
        fake: The discriminator's logits for generated pictures.
        saturating: Lower log(1 - D(fake)) instead, the game as first written (eq. 1). It has no
            slope where the discriminator is sure, which is where training begins.
    """
    return -F.softplus(fake).mean() if saturating else F.softplus(-fake).mean()


def train_gan(
    gan: GAN,
    pictures: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    batch_size: int = 64,
    learning_rate: float = 5e-4,
    saturating: bool = False,
) -> Iterator[tuple[float, float]]:
    """Train both in turn, one step each; gives back their losses. Arguments as ``train_vae``."""
    _pictures("pictures", pictures)
    both = [
        torch.optim.Adam(net.parameters(), learning_rate, betas=(0.5, 0.9))
        for net in (gan.generator, gan.discriminator)
    ]
    for step in range(steps):
        for optimiser in both:
            _fall(optimiser, learning_rate, step / steps)
        x = _batch(pictures, batch_size, generator)
        noise = torch.randn(batch_size, gan.config.latent, generator=generator).to(x)
        fake = gan.draw(noise)
        caught = discriminator_loss(gan.judge(x), gan.judge(fake.detach()))
        both[1].zero_grad()
        caught.backward()
        both[1].step()
        passed = generator_loss(gan.judge(fake), saturating)
        both[0].zero_grad()
        passed.backward()  # also leaves gradients in the discriminator, cleared before its turn
        both[0].step()
        yield caught.item(), passed.item()


# --- the game with exact answers -----------------------------------------------------------------


def best_discriminator(p: Tensor, q: Tensor) -> Tensor:
    """The best D against fakes of law q: p / (p + q), one half where neither occurs.

    1406.2661, proposition 1. ``p`` and ``q``: (N,) probabilities of N things, real and fake.
    """
    _laws(p, q)
    return torch.where(p + q > 0, p / (p + q), 0.5)


def game_value(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """E_p[log D] + E_q[log(1 - D)] for any answers ``d`` (N,) in [0, 1]: 1406.2661, eq. 1."""
    _laws(p, q)
    return torch.xlogy(p, d).sum() + torch.xlogy(q, 1 - d).sum()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """How different two laws are, in nats: 0 for equal ones, log 2 where nothing is shared."""
    _laws(p, q)
    m = (p + q) / 2
    parts = [torch.where(x > 0, x * (x / m).log(), 0.0).sum() for x in (p, q)]
    return (parts[0] + parts[1]) / 2


# --- shared --------------------------------------------------------------------------------------


def _pictures(name: str, x: Tensor) -> None:
    errors.tensor(name, x, f"B 1 {SIDE} {SIDE}", "float", finite=False)


def _laws(p: Tensor, q: Tensor) -> None:
    for name, x in (("p", p), ("q", q)):
        errors.tensor(name, x, str(len(p)) if p.ndim else "N", "float", low=0)
        errors.expect(abs(x.sum().item() - 1) < 1e-5, f"{name} sums to {x.sum():g}; expected 1.")


def _batch(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return pictures[torch.randint(len(pictures), (size,), generator=generator)]


def _fall(optimiser: torch.optim.Optimizer, learning_rate: float, done: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate * (1 - done)
