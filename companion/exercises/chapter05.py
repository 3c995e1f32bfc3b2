"""Chapter 5, one space for words and pictures."""

import torch
from torch.nn import functional as F

from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor


@exercise("5.1")
def _look_back(answer: object) -> None:
    """look_back(q, k, v): one head of attention in which each token sees what came before."""
    look_back = a_function(answer)
    g = torch.Generator().manual_seed(51)
    for n, d, width in ((1, 4, 3), (5, 4, 3), (7, 16, 16)):
        q, k = torch.randn(2, n, d, generator=g, dtype=torch.float64)
        v = torch.randn(n, width, generator=g, dtype=torch.float64)
        # token by token, from its own list of what it may look at
        rows = []
        for i in range(n):
            scores = [float(q[i] @ k[j]) / d**0.5 for j in range(i + 1)]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            rows.append(sum(w * v[j] for j, w in enumerate(weights)))
        got = look_back(q.clone(), k.clone(), v.clone())
        same_tensor(f"The result for {n} tokens, d = {d},", got, torch.stack(rows), 1e-6)


@exercise("5.2")
def _clip_loss(answer: object) -> None:
    """clip_loss(pictures, words, temperature): both ways, from raw embeddings."""
    clip_loss = a_function(answer)
    g = torch.Generator().manual_seed(52)
    for temperature in (1.0, 0.07):
        pictures, words = 3 * torch.randn(2, 6, 8, generator=g, dtype=torch.float64)
        total = 0.0
        for i in range(6):
            for asks, answers in ((pictures, words), (words, pictures)):
                close = F.cosine_similarity(asks[i][None], answers) / temperature
                total -= (close[i] - close.exp().sum().log()).item()
        got = clip_loss(pictures.clone(), words.clone(), temperature)
        same_number(f"The loss at temperature {temperature}", got, total / 12, 1e-6)


@exercise("5.3")
def _answers(answer: object) -> None:
    """answers(pictures, wordings): zero-shot classes from several wordings of each class."""
    answers = a_function(answer)
    g = torch.Generator().manual_seed(53)
    middle = torch.randn(4, 1, 16, generator=g, dtype=torch.float64)
    wordings = middle + 0.9 * torch.randn(4, 5, 16, generator=g, dtype=torch.float64)
    # long vectors that say little: without normalising, one wording would decide for its class
    wordings[1, 0] *= 40
    wordings[2] *= 0.05
    pictures = middle[:, 0].repeat(50, 1)
    pictures = pictures + 1.3 * torch.randn(pictures.shape, generator=g, dtype=torch.float64)
    best = []
    for picture in pictures:
        fits = []
        for one in wordings:
            mean = sum(w / w.norm() for w in one) / len(one)
            fits.append(float(picture @ mean / mean.norm()))
        best.append(max(range(4), key=fits.__getitem__))
    got = answers(pictures.clone(), wordings.clone())
    if not isinstance(got, torch.Tensor) or got.shape != (200,):
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        raise NotYet(f"The answers are {shape}; expected a tensor of shape (200,), a class each.")
    wrong = int((got != torch.tensor(best)).sum())
    if wrong:
        raise NotYet(f"{wrong} of 200 pictures get another class than they should.")


@exercise("5.4")
def _closer(answer: object) -> None:
    """closer(words, pictures, share): both sets moved towards each other, and back to length 1."""
    closer = a_function(answer)
    g = torch.Generator().manual_seed(54)
    words = F.normalize(torch.randn(9, 5, generator=g, dtype=torch.float64) + 1.0, dim=1)
    pictures = F.normalize(torch.randn(9, 5, generator=g, dtype=torch.float64) - 0.5, dim=1)
    for share in (0.0, 0.5, 1.0):
        got = closer(words.clone(), pictures.clone(), share)
        if not isinstance(got, tuple) or len(got) != 2:
            raise NotYet("Return two things: the words and the pictures.")
        way = [float(pictures[:, j].mean() - words[:, j].mean()) for j in range(5)]
        for what, x, was, sign in zip(
            ("words", "pictures"), got, (words, pictures), (1, -1), strict=True
        ):
            wanted = was + sign * share / 2 * torch.tensor(way, dtype=torch.float64)
            wanted = wanted / wanted.square().sum(1, keepdim=True).sqrt()
            same_tensor(f"The {what} at share {share}", x, wanted, 1e-6)
