"""Chapter 11, a smaller place to work."""

import math

import torch
from torch.distributions import Normal, kl_divergence

from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor


@exercise("11.1")
def _psnr(answer: object) -> None:
    """psnr(y, x): decibels for each picture of a batch in [0, 1]."""
    psnr = a_function(answer)
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(111), dtype=torch.float64)
    wanted = torch.tensor([40.0, 26.0, 13.0], dtype=torch.float64)
    # errors of one size, with signs by lot: their mean square is that size squared
    size = (10 ** (-wanted / 20)).view(3, 1, 1, 1)
    sign = torch.sign(x - 0.5)
    same_tensor("The PSNR of three pictures", psnr(x + size * sign, x), wanted, 1e-4)


@exercise("11.2")
def _nats(answer: object) -> None:
    """nats(mean, log_variance): KL to the standard normal, one number a picture."""
    nats = a_function(answer)
    g = torch.Generator().manual_seed(112)
    mean, log_variance = torch.randn(2, 3, 4, 8, 8, generator=g, dtype=torch.float64)
    cloud = Normal(mean, (log_variance / 2).exp())
    wanted = kl_divergence(cloud, Normal(torch.zeros(()).double(), 1.0)).sum((1, 2, 3))
    same_tensor("The nats of three pictures", nats(mean, log_variance), wanted, 1e-6)


@exercise("11.3")
def _paid(answer: object) -> None:
    """paid(variances, price): error left and nats bought, added up over independent numbers."""
    paid = a_function(answer)
    for variances, price in (([4.0, 1.0, 0.25], 0.1), ([4.0, 1.0, 0.25], 1.0), ([1.0, 2.0], 10.0)):
        got = paid(torch.tensor(variances, dtype=torch.float64), price)
        if not isinstance(got, tuple) or len(got) != 2:
            raise NotYet("Return two things: the error that is left, and the nats.")
        # by search: the encoder's noise, as a share of a number's variance, that costs least
        share = torch.logspace(-6, 0, 60_001, dtype=torch.float64)
        errors = nats = 0.0
        for variance in variances:
            best = (variance * share - price * 0.5 * share.log()).argmin()
            errors += variance * share[best].item()
            nats += -0.5 * math.log(share[best].item())
        same_number(f"The error at price = {price}", got[0], errors, 2e-3)
        same_number(f"The nats at price = {price}", got[1], nats, 2e-3)


@exercise("11.4")
def _calls(answer: object) -> None:
    """calls(pixels, latents, decode): from how many calls on a latent space is cheaper."""
    calls = a_function(answer)
    for pixels, latents, decode in (
        (10.0, 1.0, 30.0),
        (10.0, 1.0, 27.0),
        (5.0, 4.0, 1.5),
        (9, 2, 3),
    ):
        n = 1
        while n * pixels <= n * latents + decode:
            n += 1
        what = f"The number for {pixels:g}, {latents:g} and {decode:g}"
        same_number(what, calls(pixels, latents, decode), n, 1e-9)
