"""Chapter 4, fewer steps."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor


@exercise("4.1")
def _ddim_step(answer: object) -> None:
    """ddim_step(x, x0_hat, abar, abar_next, eta, fresh): one step from abar to abar_next."""
    ddim_step = a_function(answer)
    g = torch.Generator().manual_seed(41)
    x0, noise, fresh = torch.randn(3, 4, 1, 8, 8, generator=g, dtype=torch.float64)
    for abar, abar_next in ((0.2, 0.6), (0.5, 0.55), (0.6, 1.0)):
        x = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise
        for eta in (0.0, 0.5, 1.0):
            # the noise that is put in anew has eta^2 times the variance of DDPM's posterior
            beta = 1 - abar / abar_next
            new = eta * (beta * (1 - abar_next) / (1 - abar)) ** 0.5
            old = max(0.0, 1 - abar_next - new**2) ** 0.5
            wanted = abar_next**0.5 * x0 + old * noise + new * fresh
            got = ddim_step(x, x0, abar, abar_next, eta, fresh)
            what = f"The step from {abar} to {abar_next} with eta = {eta}"
            same_tensor(what, got, wanted, 1e-6)


@exercise("4.2")
def _heun_step(answer: object) -> None:
    """heun_step(denoise, y, sigma, sigma_next): try Euler's step, look, average the slopes."""
    heun_step = a_function(answer)
    g = torch.Generator().manual_seed(42)
    y = 3 * torch.randn(4, 1, 8, 8, generator=g, dtype=torch.float64)
    for sigma, sigma_next in ((5.0, 2.0), (1.0, 0.3), (0.3, 0.0)):
        asked: list[tuple[torch.Tensor, float]] = []

        def denoise(y: torch.Tensor, sigma: float, asked: list = asked) -> torch.Tensor:
            asked.append((y, float(sigma)))
            return torch.tanh(y / (1 + sigma))

        got = heun_step(denoise, y, sigma, sigma_next)
        if not asked:
            raise NotYet("The denoiser was never asked.")
        # in another form than the book's: the mean of two Euler steps from here
        first = (sigma_next / sigma) * y + (1 - sigma_next / sigma) * torch.tanh(y / (1 + sigma))
        wanted = first
        if sigma_next > 0:
            slope = (first - torch.tanh(first / (1 + sigma_next))) / sigma_next
            wanted = (first + y + (sigma_next - sigma) * slope) / 2
        same_tensor(f"The step from sigma {sigma} to {sigma_next}", got, wanted, 1e-6)
        calls = 2 if sigma_next > 0 else 1
        if len(asked) > calls:
            raise NotYet(f"The denoiser was asked {len(asked)} times; {calls} would do.")


@exercise("4.3")
def _order(answer: object) -> None:
    """order(n1, e1, n2, e2): which power of the number of steps the error falls with."""
    order = a_function(answer)
    for n1, n2, power in ((8, 16, 1), (10, 30, 2), (20, 50, 3)):
        errors = [7.0 * n**-power for n in (n1, n2)]
        what = f"The order of {errors[0]:.3g}, {errors[1]:.3g} at {n1}, {n2} steps"
        same_number(what, order(n1, errors[0], n2, errors[1]), power, 1e-6)


@exercise("4.4")
def _trailing(answer: object) -> None:
    """trailing(T, n): n timesteps, counted from the noisy end; n divides T."""
    trailing = a_function(answer)
    for T, n in ((1000, 5), (1000, 50), (300, 3), (12, 12), (1000, 1)):
        wanted, t = [], T - 1
        while len(wanted) < n:
            wanted.append(t)
            t -= T // n
        got = trailing(T, n)
        if isinstance(got, torch.Tensor):
            got = got.tolist()
        if not isinstance(got, list | tuple | range):
            raise NotYet(f"The list is {type(got).__name__}; expected {n} numbers.")
        got = list(got)
        if len(got) != n:
            raise NotYet(f"{n} of {T} timesteps are asked for; there are {len(got)}.")
        numbers = all(isinstance(t, int | float) and math.isfinite(t) for t in got)
        if not numbers or any(int(t) != t for t in got):
            raise NotYet(f"{n} of {T} timesteps: not all of them are whole numbers.")
        if got != wanted:
            some = ", ".join(f"{t:g}" for t in got[:3])
            raise NotYet(f"For {n} of {T} timesteps your list begins {some}: not the right one.")
