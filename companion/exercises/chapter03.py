"""Chapter 3, learning to walk back."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor
from companion.schedule import Schedule


@exercise("3.1")
def _step_back(answer: object) -> None:
    """step_back(x0, x_t, t, schedule) -> mean and variance of q(x_{t-1} | x_t, x_0)."""
    step_back = a_function(answer)
    g = torch.Generator().manual_seed(31)
    x0, x_t = torch.randn(2, 3, 1, 8, 8, generator=g, dtype=torch.float64)
    for schedule in (Schedule.linear(), Schedule.cosine()):
        for t in (1, 20, 999):
            got = step_back(x0, x_t, t, schedule)
            if not isinstance(got, tuple) or len(got) != 2:
                raise NotYet("Return two things: the mean and the variance.")
            # certainties add: another way to the same numbers than the one in the book
            now, before, beta = (
                schedule.alphas_cumprod[t].item(),
                schedule.alphas_cumprod[t - 1].item(),
                schedule.betas[t].item(),
            )
            sure = (1 - beta) / beta, 1 / (1 - before)
            mean = (sure[0] * x_t / (1 - beta) ** 0.5 + sure[1] * before**0.5 * x0) / sum(sure)
            same_tensor(f"The mean at t = {t}", got[0], mean, 1e-6)
            same_number(f"The variance at t = {t}", got[1], 1 / sum(sure), 1e-6 * (1 - now))


@exercise("3.2")
def _noise_of(answer: object) -> None:
    """noise_of(v, x_t, abar): the noise that a velocity stands for."""
    noise_of = a_function(answer)
    g = torch.Generator().manual_seed(32)
    x0, noise = torch.randn(2, 3, 1, 8, 8, generator=g, dtype=torch.float64)
    for abar in (0.9, 0.5, 0.1):
        signal, spread = abar**0.5, (1 - abar) ** 0.5
        v, x_t = signal * noise - spread * x0, signal * x0 + spread * noise
        same_tensor(f"The noise at abar = {abar}", noise_of(v, x_t, abar), noise, 1e-6)


@exercise("3.3")
def _loss_simple(answer: object) -> None:
    """loss_simple(net, x0, noise, t, schedule): DDPM eq. 14 as one mean."""
    loss_simple = a_function(answer)
    g = torch.Generator().manual_seed(33)
    x0, noise = torch.randn(2, 4, 1, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 200, 600, 999])
    for schedule in (Schedule.linear(), Schedule.cosine()):
        asked: list[tuple[torch.Tensor, torch.Tensor]] = []

        def net(x: torch.Tensor, t: torch.Tensor, asked: list = asked) -> torch.Tensor:
            asked.append((x, t))
            return 0.3 * x + t.double().view(-1, 1, 1, 1) / 1000

        got = loss_simple(net, x0, noise, t, schedule)
        if not asked:
            raise NotYet("The network was never asked.")
        shown = schedule.add_noise(x0, noise, t)
        same_tensor("What the network is shown", asked[0][0], shown, 1e-6)
        wanted = (net(*asked[0]) - noise).square().mean().item()
        same_number("The loss", got, wanted, 1e-6)


@exercise("3.4")
def _half_life(answer: object) -> None:
    """half_life(decay): steps until half of a moving average's memory is replaced."""
    half_life = a_function(answer)
    for decay in (0.5, 0.99, 0.9999):
        wanted = math.log(2) / -math.log(decay)
        same_number(f"The half-life of {decay}", half_life(decay), wanted, 0.001 * wanted)
