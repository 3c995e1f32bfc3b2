"""Muon: a step of equal size in every direction of a matrix.

AdamW scales each weight by itself. Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/) looks at a whole matrix, or at a kernel as one: of the
gradient's momentum ``U S V^T`` it takes ``U V^T``, so that rare directions are learned as fast as
common ones. The autoencoder needs a third of the pictures that it needs with AdamW.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

SMALLEST = 16  # matrices with fewer rows or columns have too few directions: AdamW
RMS = 0.2  # of an update, before the learning rate: about AdamW's (Liu et al. 2025, section 2.2)


@torch.no_grad()
def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Near ``U V^T`` of ``x = U S V^T``, (rows, columns): all singular values from 0.6 to 1.3.

    By steps of a fifth-degree polynomial that pushes every number in (0, 1] to about one; its
    coefficients are Jordan's. Tiny singular values, below about a thousandth, stay behind.
    """
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon for matrices and kernels of at least 16 x 16, AdamW for all else.

    One learning rate serves both, since both move a weight by about as much.

    Args:
        parameters: As for any optimiser; groups may have their own ``weight_decay``.
        lr: Learning rate.
        betas: AdamW's.
        momentum: Muon's, after Nesterov.
        weight_decay: Share of each weight that is taken away, times the learning rate.
        dtype: In which matrices are multiplied.
    """

    def __init__(
        self,
        parameters: Iterable,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        known = {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, known)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                by_matrix = p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= SMALLEST
                update = self._muon(p, group) if by_matrix else self._adam(p, group)
                p.add_(update, alpha=-group["lr"])

    def _muon(self, p: Tensor, group: dict) -> Tensor:
        state, beta = self.state[p], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        mean = state["momentum"].mul_(beta).add_(p.grad)
        ahead = p.grad.add(mean, alpha=beta).flatten(1)  # (rows, columns)
        # U V^T has rows and columns of length one: its mean square is 1 / the longer side.
        size = RMS * max(ahead.shape) ** 0.5
        return size * orthogonal(ahead.to(self.dtype)).to(p.dtype).view_as(p)

    def _adam(self, p: Tensor, group: dict) -> Tensor:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        k = state["step"].item()
        mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
        square = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
        return mean / (1 - beta1**k) / ((square / (1 - beta2**k)).sqrt() + 1e-8)
