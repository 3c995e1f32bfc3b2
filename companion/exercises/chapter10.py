"""Chapter 10, Imagen, the other road."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_tensor


@exercise("10.1")
def _delete(answer: object) -> None:
    """delete(ids, gone, pad): captions without some of their pieces; what is left moves up."""
    delete = a_function(answer)
    g = torch.Generator().manual_seed(101)
    for rows, length in ((2, 5), (3, 8)):
        ids = torch.randint(3, 90, (rows, length), generator=g)
        gone = torch.rand(rows, length, generator=g) < 0.35
        gone[0] = torch.arange(length) % 2 == 0  # the first piece too
        gone[1] = False
        wanted = torch.full_like(ids, 1)
        for i in range(rows):
            left = [ids[i, j].item() for j in range(length) if not gone[i, j]]
            wanted[i, : len(left)] = torch.tensor(left, dtype=ids.dtype)
        got = delete(ids.clone(), gone.clone(), 1)
        same_tensor(f"What is left of {rows} rows of {length} pieces", got, wanted, 0)


@exercise("10.2")
def _pooled(answer: object) -> None:
    """pooled(states, mask): the mean of the states that are words."""
    pooled = a_function(answer)
    g = torch.Generator().manual_seed(102)
    for texts, rows, width in ((2, 4, 3), (3, 9, 5)):
        states = torch.randn(texts, rows, width, generator=g, dtype=torch.float64) + 1
        lengths = [1 + (2 * i + 1) % rows for i in range(texts)]
        mask = torch.arange(rows) < torch.tensor(lengths)[:, None]
        wanted = torch.stack([states[i, :n].mean(0) for i, n in enumerate(lengths)])
        got = pooled(states.clone(), mask.clone())
        same_tensor(f"The mean of texts of {lengths} pieces", got, wanted, 1e-9)


@exercise("10.3")
def _dynamic(answer: object) -> None:
    """dynamic(x0, share): dynamic thresholding of clean pictures (B, C, H, W)."""
    dynamic = a_function(answer)
    g = torch.Generator().manual_seed(103)
    for shape, share in (((3, 3, 4, 4), 0.9), ((2, 1, 5, 3), 0.75)):
        x0 = torch.randn(shape, generator=g, dtype=torch.float64)
        x0[0] *= 0.2  # nothing out of range: nothing to do
        x0[1] *= 3
        wanted = x0.clone()
        for i, x in enumerate(x0):
            values = sorted(abs(v) for v in x.flatten().tolist())
            at = share * (len(values) - 1)
            low, high = values[math.floor(at)], values[math.ceil(at)]
            s = low + (at - math.floor(at)) * (high - low)
            if s > 1:
                wanted[i] = x.clamp(-s, s) / s
            else:
                wanted[i] = x.clamp(-1, 1)
        given = x0.clone()
        got = dynamic(given, share)
        same_tensor(f"The pictures of {len(x0)}, share {share},", got, wanted, 1e-9)
        if not torch.equal(given, x0):
            raise NotYet("The pictures that were given have changed; make new ones.")


@exercise("10.4")
def _under(answer: object) -> None:
    """under(x, small, noise, abar): what the upsampler is shown."""
    under = a_function(answer)
    g = torch.Generator().manual_seed(104)
    for n, side, abar in ((1, 2, 0.9), (2, 3, 0.36)):
        small = torch.randn(n, 3, side, side, generator=g, dtype=torch.float64)
        noise = torch.randn(n, 3, side, side, generator=g, dtype=torch.float64)
        x = torch.randn(n, 3, 4 * side, 4 * side, generator=g, dtype=torch.float64)
        wanted = torch.zeros(n, 6, 4 * side, 4 * side, dtype=torch.float64)
        wanted[:, :3] = x
        for i in range(4 * side):
            for j in range(4 * side):
                pixel, chance = small[:, :, i // 4, j // 4], noise[:, :, i // 4, j // 4]
                wanted[:, 3:, i, j] = math.sqrt(abar) * pixel + math.sqrt(1 - abar) * chance
        got = under(x.clone(), small.clone(), noise.clone(), abar)
        same_tensor(f"What is shown for {side} × {side} pixels, ᾱ = {abar},", got, wanted, 1e-9)
