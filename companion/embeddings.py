"""Timesteps as vectors: a fan of cosines and sines, then a small network."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(t: Tensor | float, width: int, like: Tensor) -> Tensor:
    """Noise levels as points on circles of many speeds (Vaswani et al. 2017, section 3.5; DDPM).

    Args:
        t: One timestep for all, or one for each picture, shape (B,); may be fractional.
        width: Length of the vector; even.
        like: What the timesteps belong to: gives B (its first size), the device and the type.

    Returns:
        (B, width)
    """
    t = torch.as_tensor(t).to(like.device, torch.float32)
    batch = like.shape[0]
    if t.shape not in ((), (1,), (batch,)):
        raise ValueError(f"t has shape {tuple(t.shape)}; expected one number or ({batch},).")
    # Trap: frequencies and angles are float32 even in a float64 model, and the cosines come first
    # (published configs say flip_sin_to_cos: true, freq_shift: 0; the papers have sines first).
    half = width // 2
    speed = torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
    angle = t.expand(batch)[:, None] * speed  # (B, width / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1).to(like.dtype)


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn the fan into what residual blocks add: (B, width) -> (B, out)."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, out or hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
