"""Chapter 16, look long enough."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number


@exercise("16.1")
def _change_words(answer: object) -> None:
    """change_words(first, then, timesteps, k): a denoiser that is told other words from step k."""
    change_words = a_function(answer)
    timesteps = [900, 650, 400, 150]

    def first(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + t.view(-1, 1)

    def then(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 3 * x - t.view(-1, 1)

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(161))
    for k in (2, 0, 4, 1, 3):
        denoise = change_words(first, then, timesteps, k)
        if not callable(denoise):
            raise NotYet(f"With k = {k} you gave {denoise!r:.40}; expected a function of x and t.")
        for i in (3, 0, 2, 1):  # a denoiser may be asked in any order: it knows where it is by t
            t = torch.full((2,), timesteps[i])
            got = denoise(x.clone(), t)
            wanted = (first if i < k else then)(x, t)
            if not isinstance(got, torch.Tensor) or got.shape != wanted.shape:
                raise NotYet(f"The answer at step {i} is {got!r:.60}; expected a tensor like x.")
            if not torch.allclose(got, wanted):
                words = "first" if i < k else "second"
                raise NotYet(f"Exchanged at step {k}, step {i} should be told the {words} words.")


@exercise("16.2")
def _more_than_chance(answer: object) -> None:
    """more_than_chance(answers): agreement of equal seeds less agreement of unequal seeds."""
    more_than_chance = a_function(answer)
    cases = [
        [["noon", "night", "rain"], ["noon", "night", "dusk"]],
        [["sea", "sea", "sea"], ["sea", "sea", "sea"], ["sea", "sea", "sea"]],
        [["red", "blue"], ["blue", "red"]],
        [["a", "b", "a", "c"], ["a", "b", "c", "c"], ["b", "b", "a", "c"]],
    ]
    for answers in cases:
        prompts, seeds = range(len(answers)), range(len(answers[0]))
        counts = {True: [0, 0], False: [0, 0]}
        for p in prompts:
            for q in prompts:
                for s in seeds:
                    for r in seeds:
                        if p != q:
                            counts[s == r][0] += answers[p][s] == answers[q][r]
                            counts[s == r][1] += 1
        wanted = counts[True][0] / counts[True][1] - counts[False][0] / counts[False][1]
        got = more_than_chance([list(row) for row in answers])
        same_number(f"For {answers!r:.70}, the difference", got, wanted, 1e-9)


@exercise("16.3")
def _apart(answer: object) -> None:
    """apart(a, b): how far two rows of states lie apart, as a share of their mean length."""
    apart = a_function(answer)
    g = torch.Generator().manual_seed(163)
    for rows, width in ((1, 2), (4, 8)):
        a = torch.randn(rows, width, generator=g, dtype=torch.float64)
        b = 2 * torch.randn(rows, width, generator=g, dtype=torch.float64) + 1
        got = apart(a.clone(), b.clone())
        if not isinstance(got, torch.Tensor) or got.shape != (rows,):
            raise NotYet(f"{rows} rows gave {got!r:.60}; expected a tensor of {rows} numbers.")
        for i in range(rows):
            length = [math.sqrt(sum(v.item() ** 2 for v in x[i])) for x in (a, b)]
            gap = math.sqrt(sum((u - v).item() ** 2 for u, v in zip(a[i], b[i], strict=True)))
            same_number(f"The distance of rows {i}", got[i], gap / (sum(length) / 2), 1e-7)


@exercise("16.4")
def _swap_rate(answer: object) -> None:
    """swap_rate(said, shown): of pictures with both things and both colours, those exchanged."""
    swap_rate = a_function(answer)
    house, tree = ("house", "red"), ("tree", "blue")
    turned = [("house", "blue"), ("tree", "red")]
    said = [[house, tree]] * 8
    shown = [
        [house, tree],
        turned,
        turned[::-1],
        [tree, house],
        [("house", "red"), ("tree", "red")],  # one colour is not there: no case
        [house],
        [],
        [("house", "blue"), ("cat", "red")],  # one thing is not there: no case
    ]
    for some in (range(8), (0, 1), (0, 3, 4), (2, 5, 7), (0, 1, 2, 6)):
        counted = [i for i in some if i < 4]
        wanted = sum(i in (1, 2) for i in counted) / len(counted)
        got = swap_rate([list(said[i]) for i in some], [list(shown[i]) for i in some])
        same_number(f"The rate of {len(list(some))} pictures", got, wanted, 1e-9)
