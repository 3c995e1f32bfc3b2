"""Chapter 13, Stable Diffusion whole."""

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_tensor


def _some(*shape: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@exercise("13.1")
def _visited(answer: object) -> None:
    """visited(timesteps, strength): the steps that are left when a picture is started from."""
    visited = a_function(answer)
    for n, strength, left in ((50, 0.8, 40), (25, 0.3, 7), (10, 1.0, 10), (30, 0.05, 1)):
        timesteps = torch.arange(n).flip(0) * (1000 // n) + 1
        got = visited(timesteps.clone(), strength)
        if isinstance(got, torch.Tensor) and len(got) != left:
            raise NotYet(f"Of {n} steps at strength {strength}, {len(got)} are left, not {left}.")
        same_tensor(
            f"Of {n} steps at strength {strength}, what is left", got, timesteps[n - left :]
        )


@exercise("13.2")
def _blend(answer: object) -> None:
    """blend(x, z, noise, mask, abar): what the U-Net sees when a part is repainted."""
    blend = a_function(answer)
    for f, side in ((8, 8), (4, 3)):
        x, z, noise = _some(3, 2, 4, side, side, seed=132)
        g = torch.Generator().manual_seed(133)
        small = (torch.rand(2, 1, side, side, generator=g) > 0.5).double()
        mask = small.repeat_interleave(f, 2).repeat_interleave(f, 3)
        for abar in (0.9, 0.2):
            wanted = torch.empty_like(x)
            for b in range(2):
                for i in range(side):
                    for j in range(side):
                        kept = abar**0.5 * z[b, :, i, j] + (1 - abar) ** 0.5 * noise[b, :, i, j]
                        wanted[b, :, i, j] = x[b, :, i, j] if small[b, 0, i, j] else kept
            got = blend(x.clone(), z.clone(), noise.clone(), mask.clone(), abar)
            same_tensor(f"The blend at abar {abar}, f = {f},", got, wanted, 1e-7)


@exercise("13.3")
def _to_zero(answer: object) -> None:
    """to_zero(abar): the schedule shifted and stretched so that its end is noise alone."""
    to_zero = a_function(answer)
    for T, low, high in ((1000, 0.00085, 0.012), (20, 0.01, 0.2)):
        betas = torch.linspace(low**0.5, high**0.5, T, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)
        roots = [a**0.5 for a in abar.tolist()]
        first, last = roots[0], roots[-1]
        line = [first * (r - last) / (first - last) for r in roots]
        wanted = torch.tensor(line, dtype=torch.float64) ** 2
        same_tensor(f"The schedule of {T} steps", to_zero(abar.clone()), wanted, 1e-9)


@exercise("13.4")
def _calmed(answer: object) -> None:
    """calmed(guided, given, phi): guidance that spreads no further than the plain answer."""
    calmed = a_function(answer)
    for b, c in ((1, 4), (3, 2)):
        given = _some(b, c, 4, 4, seed=134)
        scales = torch.linspace(2, 5, b, dtype=torch.float64).view(b, 1, 1, 1)
        guided = scales * given + 0.3
        for phi in (0.0, 0.7, 1.0):
            rows = []
            for plain, strong in zip(given, guided, strict=True):
                ratio = (plain.flatten().std() / strong.flatten().std()).item()
                rows.append(phi * ratio * strong + (1 - phi) * strong)
            got = calmed(guided.clone(), given.clone(), phi)
            same_tensor(f"The answer at phi = {phi:g}", got, torch.stack(rows), 1e-7)
