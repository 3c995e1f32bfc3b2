"""Chapter 9, the whole machine."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_tensor


def _some(n: int, d: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, d, generator=g, dtype=torch.float64)


def _between(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """One direction of length 1 turned towards another, in the plane of the two."""
    angle = math.acos(max(-1.0, min(1.0, float(a @ b))))
    side = b - (a @ b) * a
    return math.cos(share * angle) * a + math.sin(share * angle) * side / side.norm()


@exercise("9.1")
def _turn(answer: object) -> None:
    """turn(a, b, share): rows of length 1, turned towards others along the arc."""
    turn = a_function(answer)
    for d in (2, 5, 128):
        a, b = (x / x.norm(dim=1, keepdim=True) for x in _some(8, d, 91 + d).split(4))
        for share in (0.0, 0.3, 0.5, 1.0):
            rows = [_between(x, y, share) for x, y in zip(a, b, strict=True)]
            got = turn(a.clone(), b.clone(), share)
            same_tensor(
                f"At share {share} of {d} numbers, the result", got, torch.stack(rows), 1e-6
            )


@exercise("9.2")
def _told(answer: object) -> None:
    """told(place, before, after, theta): a place turned by what two captions differ in."""
    told = a_function(answer)
    for theta in (0.0, 0.25, 0.5):
        place, before, after = _some(3, 16, 92, 3.0).split(1)
        after = 4 * after  # lengths say nothing
        z = [x[0] / x[0].norm() for x in (place, before, after)]
        change = z[2] - z[1]
        wanted = place.norm() * _between(z[0], change / change.norm(), theta)
        got = told(place.clone(), before.clone(), after.clone(), theta)
        same_tensor(f"The place at theta {theta}", got, wanted[None], 1e-6)


@exercise("9.3")
def _first(answer: object) -> None:
    """first(places, known, k): places with k principal components of the known ones."""
    first = a_function(answer)
    known = _some(200, 6, 93) * torch.tensor([5.0, 0.2, 2.0, 1.0, 0.1, 3.0]).double() + 2.0
    places = _some(4, 6, 94, 2.0) + 2.0
    mean = known.mean(0)
    axes = torch.linalg.svd(known - mean).Vh  # rows, the widest first
    for k in (0, 1, 3, 6):
        wanted = mean.repeat(4, 1)
        for axis in axes[:k]:
            wanted = wanted + ((places - mean) @ axis)[:, None] * axis
        got = first(places.clone(), known.clone(), k)
        same_tensor(f"With k = {k} the result", got, wanted, 1e-6)


@exercise("9.4")
def _degrade(answer: object) -> None:
    """degrade(small): blurred by a Gaussian of 0.6 pixels, cut to 3 x 3; edges go on outside."""
    degrade = a_function(answer)
    g = torch.Generator().manual_seed(95)
    flat = torch.full((1, 3, 4, 4), 0.7, dtype=torch.float64)
    got = degrade(flat.clone())
    if isinstance(got, torch.Tensor) and got.shape == flat.shape:
        if (got - flat)[..., 1:-1, 1:-1].abs().max() > 1e-6:
            raise NotYet("An even grey does not stay what it is: do your weights sum to 1?")
        if (got - flat).abs().max() > 1e-6:
            raise NotYet("An even grey gets another shade at the edges: what lies outside of it?")
    picture = torch.rand(2, 3, 5, 7, generator=g, dtype=torch.float64)
    weights = {
        (i, j): math.exp(-(i * i + j * j) / (2 * 0.6**2)) for i in (-1, 0, 1) for j in (-1, 0, 1)
    }
    wanted = torch.zeros_like(picture)
    for y in range(5):
        for x in range(7):
            for (i, j), weight in weights.items():
                row, column = min(max(y + i, 0), 4), min(max(x + j, 0), 6)
                wanted[..., y, x] += weight * picture[..., row, column]
    same_tensor("The picture", degrade(picture.clone()), wanted / sum(weights.values()), 1e-6)
