"""Numbers that compare two sets of pictures, and intervals for shares.

All work on features, (N, D): what some network, which no generator has seen, makes of each picture.
Whoever prints one of these prints how many pictures it is from: all of them depend on it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from companion import errors


def interval(right: int, n: int) -> dict[str, float]:
    """A share with its 95 % Wilson score interval (Wilson 1927): {"value", "low", "high", "n"}.

    Args:
        right: How many, from 0 to ``n``.
        n: Out of how many, at least 1.
    """
    from scipy.stats import binomtest

    errors.number("n", n, low=1, integer=True)
    errors.number("right", right, low=0, high=n, integer=True)
    low, high = binomtest(right, n).proportion_ci(0.95, "wilson")
    return {"value": right / n, "low": float(low), "high": float(high), "n": n}


def together(cells: Sequence[dict[str, float]]) -> dict[str, float]:
    """Several shares with intervals as one of all their cases."""
    counts = [round(cell["value"] * cell["n"]) for cell in cells]
    return interval(sum(counts), sum(int(cell["n"]) for cell in cells))


def mean_interval(x: Tensor) -> dict[str, float]:
    """A mean with its 95 % interval (normal): {"value", "low", "high", "n"}, of numbers (N,)."""
    x = x.double()
    half = 1.96 * (x.std(correction=1) / len(x) ** 0.5).item() if len(x) > 1 else 0.0
    mean = x.mean().item()
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(x)}


def difference(a: Sequence[bool], b: Sequence[bool], draws: int = 4000) -> dict[str, float]:
    """Share of ``a`` minus share of ``b`` where row i of both is about the same thing.

    Returns:
        ``value``, and ``low`` and ``high`` of the 95 % interval, for which things are drawn anew
        ``draws`` times, each with both of its answers (paired bootstrap).
    """
    errors.expect(
        len(a) == len(b) > 0, f"there are {len(a)} and {len(b)} answers; expected equal numbers."
    )
    gain = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    g, n = torch.Generator().manual_seed(0), len(gain)
    again = gain[torch.randint(n, (draws, n), generator=g)].mean(1)
    low, high = torch.quantile(again, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": gain.mean().item(), "low": low, "high": high}


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance (squared) between the Gaussians that fit two sets of features.

    ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)``, as in Heusel et al. 2017 (arXiv
    1706.08500), where the features are Inception's and it is called FID. It is 0 for equal sets,
    has no upper end, and is larger for fewer pictures: compare at equal N only.

    Args:
        a: (N, D) features, N at least 2; it takes some more than D to mean much.
        b: (M, D) features of another set.

    Returns:
        The distance, computed in float64.
    """
    a, b = _pair(a, b, least=2)
    S_a, S_b = torch.cov(a.T).view(a.shape[1], -1), torch.cov(b.T).view(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S_a^1/2
    shared = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (apart + S_a.trace() + S_b.trace() - 2 * shared).item())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """How much of the fake looks real, and how much of the real is covered by the fake.

    Kynkäänniemi et al. 2019 (arXiv 1904.06991): a set's region is the union of balls around its
    points, each reaching to the point's k-th nearest neighbour. Precision is the share of fake
    points within the region of the real ones, recall the share of real points within the region of
    the fake ones.

    Args:
        real: (N, D) features of real pictures, N above ``k``.
        fake: (M, D) features of generated ones, M above ``k``; the paper takes equal numbers.
        k: Which neighbour the balls reach to.

    Returns:
        precision, recall: both from 0 to 1.
    """
    errors.number("k", k, low=1, integer=True)
    real, fake = _pair(real, fake, least=k + 1)
    return _within(fake, real, k), _within(real, fake, k)


def _within(points: Tensor, region: Tensor, k: int) -> float:
    """Share of ``points`` inside the union of balls around those of ``region``."""
    # cdist's quick way loses digits where points coincide; these sets are small
    exact = "donot_use_mm_for_euclid_dist"
    own = torch.cdist(region, region, compute_mode=exact)
    radius = own.kthvalue(k + 1, dim=1).values  # + 1: each point is its own nearest neighbour
    inside = torch.cdist(points, region, compute_mode=exact) <= radius
    return inside.any(dim=1).double().mean().item()


def _pair(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both sets checked, in float64 on the CPU."""
    for name, x in (("the first set", a), ("the second set", b)):
        errors.tensor(name, x, "N D", dtype="float")
        errors.expect(
            len(x) >= least, f"{name} has {len(x)} features; expected at least {least} of them."
        )
    errors.expect(
        a.shape[1] == b.shape[1],
        f"the sets have {a.shape[1]} and {b.shape[1]} features a picture; expected equal widths.",
    )
    return a.detach().cpu().double(), b.detach().cpu().double()
