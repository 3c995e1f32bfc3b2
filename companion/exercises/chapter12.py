"""Chapter 12, asking with attention."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor


@exercise("12.1")
def _ask(answer: object) -> None:
    """ask(z, y, W_q, W_k, W_v, heads): places ask, words answer, several heads."""
    ask = a_function(answer)
    g = torch.Generator().manual_seed(121)
    for places, words, width, told, heads in ((3, 5, 4, 6, 1), (6, 4, 8, 5, 2), (2, 7, 12, 3, 3)):
        z = torch.randn(places, width, generator=g, dtype=torch.float64)
        y = torch.randn(words, told, generator=g, dtype=torch.float64)
        W_q = torch.randn(width, width, generator=g, dtype=torch.float64)
        W_k, W_v = torch.randn(2, width, told, generator=g, dtype=torch.float64)
        d, wanted = width // heads, torch.zeros(places, width, dtype=torch.float64)
        q, k, v = z @ W_q.T, y @ W_k.T, y @ W_v.T
        for head in range(heads):
            part = range(head * d, (head + 1) * d)
            for i in range(places):
                scores = [sum(q[i, c] * k[j, c] for c in part) / math.sqrt(d) for j in range(words)]
                weights = torch.stack(scores).softmax(0)
                for c in part:
                    wanted[i, c] = sum(weights[j] * v[j, c] for j in range(words))
        got = ask(*(x.clone() for x in (z, y, W_q, W_k, W_v)), heads)
        same_tensor(
            f"What {places} places get from {words} words, {heads} heads,", got, wanted, 1e-6
        )


@exercise("12.2")
def _masked(answer: object) -> None:
    """masked(scores, keep): weights where some words must not be looked at."""
    masked = a_function(answer)
    g = torch.Generator().manual_seed(122)
    for places, words in ((3, 4), (5, 7)):
        scores = torch.randn(2, places, words, generator=g, dtype=torch.float64) - 1
        keep = torch.rand(2, words, generator=g) < 0.6
        keep[:, 1], keep[0, 0], keep[1, 2] = True, False, False
        wanted = torch.zeros_like(scores)
        for b in range(2):
            kept = [j for j in range(words) if keep[b, j]]
            wanted[b][:, kept] = scores[b][:, kept].softmax(1)
        given = scores.clone()
        got = masked(given, keep.clone())
        same_tensor(f"The weights of {places} places on {words} words", got, wanted, 1e-9)
        if not torch.equal(given, scores):
            raise NotYet("The scores that were given have changed; make new ones.")


@exercise("12.3")
def _lies_on(answer: object) -> None:
    """lies_on(maps, word, mask): how many times its area a word's map puts on a thing."""
    lies_on = a_function(answer)
    g = torch.Generator().manual_seed(123)
    for heads, h, w, words in ((1, 2, 3, 4), (4, 8, 8, 6)):
        maps = torch.rand(heads, h, w, words, generator=g, dtype=torch.float64)
        maps = maps / maps.sum(-1, keepdim=True)
        mask = (torch.rand(h, w, generator=g) < 0.4).double()
        mask[0, 0], mask[-1, -1] = 0.5, 0.0  # a place that is half covered
        for word in (1, words - 1):
            inside = everywhere = 0.0
            for y in range(h):
                for x in range(w):
                    looks = sum(maps[k, y, x, word].item() for k in range(heads)) / heads
                    inside += looks * mask[y, x].item()
                    everywhere += looks
            wanted = inside / everywhere / mask.mean().item()
            got = lies_on(maps.clone(), word, mask.clone())
            same_number(f"The ratio for {h} × {w} places, {heads} heads,", got, wanted, 1e-7)


@exercise("12.4")
def _word_rows(answer: object) -> None:
    """word_rows(pieces): which rows of the context belong to which word."""
    word_rows = a_function(answer)
    cases = [
        (["a</w>", "red</w>", "house</w>"], [[1], [2], [3]]),
        (["a</w>", "p", "ho", "t", "o</w>", "of</w>", "snow</w>"], [[1], [2, 3, 4, 5], [6], [7]]),
        (["s", "ea</w>"], [[1, 2]]),
        ([], []),
    ]
    for pieces, wanted in cases:
        got = word_rows(list(pieces))
        try:
            got = [[int(i) for i in rows] for rows in got]
        except TypeError:
            raise NotYet(f"{pieces} gave {got!r:.60}; expected a list of lists of rows.") from None
        if got != wanted:
            raise NotYet(f"The rows of {pieces} are {got!r:.60}, which is not right.")
