"""Chapter 6, guided by a prompt."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor


@exercise("6.1")
def _steered(answer: object) -> None:
    """steered(network, x, t, label, null, w): guided noise by one call, in the paper's w."""
    steered = a_function(answer)
    g = torch.Generator().manual_seed(61)
    weights = torch.randn(12, 3, 4, generator=g, dtype=torch.float64)
    asked: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if not len(x) == len(t) == len(label):
            raise NotYet(
                f"The network was given {len(x)} pictures, {len(t)} steps and {len(label)} labels."
            )
        asked.append(len(x))
        return torch.sin(x * weights[label]) + t[:, None, None] / 1000

    for n, w in ((1, 0.5), (3, 2.0), (5, 6.5), (3, 0.0)):
        x = torch.randn(n, 3, 4, generator=g, dtype=torch.float64)
        t = torch.randint(1000, (n,), generator=g)
        label = torch.randint(10, (n,), generator=g)
        null = torch.full_like(label, 10)
        asked.clear()
        got = steered(network, x.clone(), t.clone(), label.clone(), null, w)
        calls = list(asked)
        wanted = torch.stack([
            (1 + w) * network(x[[i]], t[[i]], label[[i]])[0]
            - w * network(x[[i]], t[[i]], null[[i]])[0]
            for i in range(n)
        ])  # fmt: skip
        same_tensor(f"The noise for {n} pictures at w = {w}", got, wanted, 1e-6)
        if len(calls) != 1:
            raise NotYet(f"The numbers are right, in {len(calls)} calls of the network, not one.")


@exercise("6.2")
def _forgetful(answer: object) -> None:
    """forgetful(labels, share, generator): labels, some replaced by 10."""
    forgetful = a_function(answer)
    labels = torch.arange(10).repeat(400)
    for share in (0.1, 0.5, 0.0, 1.0):
        before = labels.clone()
        got = forgetful(before, share, torch.Generator().manual_seed(62))
        if not torch.equal(before, labels):
            raise NotYet("Your function changes the labels it was given; return new ones.")
        if not isinstance(got, torch.Tensor) or got.shape != labels.shape:
            shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
            raise NotYet(f"The result is {shape}; expected as many labels, {tuple(labels.shape)}.")
        if got.is_floating_point():
            raise NotYet("The labels have become fractions; a network wants whole numbers.")
        if not bool(((got == labels) | (got == 10)).all()):
            raise NotYet("Some labels are neither what they were nor 10.")
        lost = (got == 10).double().mean().item()
        if abs(lost - share) > 4 * math.sqrt(share * (1 - share) / len(labels)) + 1e-9:
            raise NotYet(f"With share {share}, {lost:.3f} of the labels are gone.")
        by_label = torch.stack([(got[labels == k] == 10).double().mean() for k in range(10)])
        if 0 < share < 1 and by_label.std() > 0.1:
            raise NotYet("Some labels are forgotten much more often than others.")
        if 0 < share < 1:
            other = forgetful(labels.clone(), share, torch.Generator().manual_seed(63))
            if torch.equal(other, got):
                raise NotYet("Another seed forgets the same ones: draw from the generator.")


@exercise("6.3")
def _pushed(answer: object) -> None:
    """pushed(x0, log_prob, x, t, abar, s): the clean picture, shifted by a classifier."""
    pushed = a_function(answer)
    g = torch.Generator().manual_seed(63)
    for abar, s in ((0.9, 1.0), (0.5, 3.0), (0.04, 1.0)):
        x0, x, centre = torch.randn(3, 4, 2, 5, generator=g, dtype=torch.float64)
        t = torch.full((4,), 500)
        pull = torch.rand(4, 1, 1, generator=g, dtype=torch.float64) + 0.5

        def log_prob(
            y: torch.Tensor, t: torch.Tensor, pull: torch.Tensor = pull, at: torch.Tensor = centre
        ) -> torch.Tensor:
            return -(0.5 * pull * (y - at).square()).flatten(1).sum(1)

        wanted = x0 - s * (1 - abar) / math.sqrt(abar) * pull * (x - centre)
        with torch.no_grad():  # a sampler asks like this
            got = pushed(x0.clone(), log_prob, x.clone(), t, abar, s)
        same_tensor(f"The clean picture at abar = {abar}, s = {s}", got, wanted, 1e-6)
        if got.requires_grad:
            raise NotYet("Right, but the result still carries a gradient: detach it.")


@exercise("6.4")
def _possibilities(answer: object) -> None:
    """possibilities(seen): the exponential of the entropy of what a list of words shows."""
    possibilities = a_function(answer)
    cases = (
        (["noon"] * 7, 1.0),
        (["noon", "dusk", "night", "rain"], 4.0),
        (["noon", "dusk"] * 9, 2.0),
        (["noon"] * 3 + ["dusk"], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        (["rain", "noon", "rain", "dusk"], 2 ** 1.5),
    )  # fmt: skip
    for seen, wanted in cases:
        short = f"{len(seen)} skies, {len(set(seen))} of them different,"
        same_number(f"The number of possibilities in {short}", possibilities(list(seen)), wanted)
