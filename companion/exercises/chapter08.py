"""Chapter 8, the decoder."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_tensor


@exercise("8.1")
def _extra_tokens(answer: object) -> None:
    """extra_tokens(place, W, b): one projection, cut into four tokens as Karlo cuts it."""
    extra_tokens = a_function(answer)
    g = torch.Generator().manual_seed(81)
    for batch, d, k in ((1, 5, 3), (3, 6, 7)):
        place = torch.randn(batch, d, generator=g, dtype=torch.float64)
        W = torch.randn(4 * k, d, generator=g, dtype=torch.float64)
        b = torch.randn(4 * k, generator=g, dtype=torch.float64)
        wanted = torch.empty(batch, 4, k, dtype=torch.float64)
        for i in range(batch):
            for j in range(4 * k):
                wanted[i, j % 4, j // 4] = sum(W[j, c] * place[i, c] for c in range(d)) + b[j]
        got = extra_tokens(place.clone(), W.clone(), b.clone())
        same_tensor(f"The tokens of {batch} places", got, wanted, 1e-6)


@exercise("8.2")
def _leave_out(answer: object) -> None:
    """leave_out(place, caption, nowhere, empty, u): each is dropped by a chance of its own."""
    leave_out = a_function(answer)
    g = torch.Generator().manual_seed(82)
    place, caption = torch.randn(2, 64, 6, generator=g, dtype=torch.float64)
    nowhere, empty = torch.randn(2, 6, generator=g, dtype=torch.float64)
    u = torch.rand(64, 2, generator=g, dtype=torch.float64)
    u[:4] = torch.tensor([[0.05, 0.9], [0.9, 0.45], [0.05, 0.45], [0.15, 0.55]])
    got = leave_out(place.clone(), caption.clone(), nowhere.clone(), empty.clone(), u.clone())
    if not isinstance(got, tuple) or len(got) != 2:
        raise NotYet("Return two things: the places and the captions.")
    pairs = (
        ("places", got[0], place, nowhere, 0, 0.1),
        ("captions", got[1], caption, empty, 1, 0.5),
    )
    for what, x, given, nothing, column, chance in pairs:
        rows = [nothing if u[i, column] < chance else given[i] for i in range(64)]
        same_tensor(f"The {what}", x, torch.stack(rows), 1e-9)


@exercise("8.3")
def _spread(answer: object) -> None:
    """spread(fraction, beta, beta_tilde): the standard deviation of a step."""
    spread = a_function(answer)
    g = torch.Generator().manual_seed(83)
    fraction = 2 * torch.rand(3, 4, generator=g, dtype=torch.float64) - 1
    fraction[0, :3] = torch.tensor([-1.0, 0.0, 1.0])
    for beta, small in ((0.02, 0.004), (0.3, 0.25)):
        rows = []
        for v in fraction.flatten().tolist():
            share = (v + 1) / 2
            rows.append(math.sqrt(beta**share * small ** (1 - share)))
        wanted = torch.tensor(rows, dtype=torch.float64).view(3, 4)
        got = spread(fraction.clone(), beta, small)
        same_tensor(f"The spread between {small} and {beta}", got, wanted, 1e-7)


@exercise("8.4")
def _guided(answer: object) -> None:
    """guided(without, with_it, scale): six channels each, of which three are guided."""
    guided = a_function(answer)
    g = torch.Generator().manual_seed(84)
    without, with_it = torch.randn(2, 2, 6, 4, 4, generator=g, dtype=torch.float64)
    for scale in (1.0, 3.0):
        wanted = with_it.clone()
        for c in range(3):
            wanted[:, c] = (1 - scale) * without[:, c] + scale * with_it[:, c]
        got = guided(without.clone(), with_it.clone(), scale)
        same_tensor(f"The answer at scale {scale:g}", got, wanted, 1e-7)
