"""Chapter 7, the prior."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor


@exercise("7.1")
def _prior_loss(answer: object) -> None:
    """prior_loss(f, x0, noise, abar): the squared error of the clean, rescaled place."""
    prior_loss = a_function(answer)
    g = torch.Generator().manual_seed(71)
    for b, d in ((1, 3), (5, 8)):
        x0, noise = torch.randn(2, b, d, generator=g, dtype=torch.float64)
        abar = torch.rand(b, generator=g, dtype=torch.float64)

        def f(x: torch.Tensor) -> torch.Tensor:
            return 0.3 * x - 1

        total = 0.0
        for i in range(b):
            for j in range(d):
                share = abar[i].item()
                noisy = math.sqrt(share) * x0[i, j].item() + math.sqrt(1 - share) * noise[i, j]
                total += (0.3 * noisy - 1 - x0[i, j]).item() ** 2
        got = prior_loss(f, x0.clone(), noise.clone(), abar.clone())
        same_number(f"The loss of {b} places in {d} dimensions", got, total / (b * d), 1e-6)


@exercise("7.2")
def _keep(answer: object) -> None:
    """keep(drawn, text): of several candidates, the one with the largest dot product."""
    keep = a_function(answer)
    g = torch.Generator().manual_seed(72)
    for n in (1, 2, 5):
        # of very different lengths, so that the angle alone decides otherwise
        drawn = torch.randn(6, n, 4, generator=g, dtype=torch.float64)
        drawn = drawn * (0.2 + 5 * torch.rand(6, n, 1, generator=g, dtype=torch.float64))
        text = torch.randn(6, 4, generator=g, dtype=torch.float64)
        best = []
        for many, said in zip(drawn, text, strict=True):
            fits = [sum(float(a * b) for a, b in zip(one, said, strict=True)) for one in many]
            best.append(many[max(range(n), key=fits.__getitem__)])
        got = keep(drawn.clone(), text.clone())
        same_tensor(f"What is kept of {n} candidates each", got, torch.stack(best), 1e-9)


@exercise("7.3")
def _spell(answer: object) -> None:
    """spell(places, mean, axes, low, high, buckets): a place as whole numbers."""
    spell = a_function(answer)
    g = torch.Generator().manual_seed(73)
    mean = torch.randn(5, generator=g, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0][:3]
    low, high = torch.tensor([[-1.0, -2.0, -0.5], [1.5, 2.0, 0.75]], dtype=torch.float64)
    places = mean + 1.2 * torch.randn(40, 5, generator=g, dtype=torch.float64)
    for buckets in (4, 64):
        rows = []
        for place in places:
            row = []
            for k in range(3):
                along = sum(float((place[j] - mean[j]) * axes[k, j]) for j in range(5))
                edges = [low[k] + (high[k] - low[k]) * m / buckets for m in range(1, buckets)]
                row.append(sum(along >= float(edge) for edge in edges))
            rows.append(row)
        wanted = torch.tensor(rows)
        got = spell(places.clone(), mean.clone(), axes.clone(), low.clone(), high.clone(), buckets)
        same_tensor(f"The spelling in {buckets} buckets", got, wanted, 0.0)
        if got.dtype.is_floating_point:
            raise NotYet("The numbers are right, but they are fractions: use .long().")


@exercise("7.4")
def _ideal(answer: object) -> None:
    """ideal(x_t, abar, known): what the best possible prior answers if these places fit."""
    ideal = a_function(answer)
    g = torch.Generator().manual_seed(74)
    known = torch.randn(7, 4, generator=g, dtype=torch.float64)
    x_t = torch.randn(5, 4, generator=g, dtype=torch.float64)
    for abar in (0.05, 0.5, 0.9):
        rows = []
        for x in x_t:
            bells = []
            for place in known:
                far = sum((float(a) - math.sqrt(abar) * float(b)) ** 2
                          for a, b in zip(x, place, strict=True))  # fmt: skip
                bells.append(math.exp(-far / (2 * (1 - abar))))
            share = [bell / sum(bells) for bell in bells]
            rows.append(sum(p * place for p, place in zip(share, known, strict=True)))
        got = ideal(x_t.clone(), abar, known.clone())
        same_tensor(f"The answer where {abar:.0%} of the variance is signal", got,
                    torch.stack(rows), 1e-6)  # fmt: skip
