"""Residual blocks, and the stages that every U-Net and autoencoder here is stacked from.

Letters: B pictures, C channels, H×W places, T the width of the timestep's vector.
"""

from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def zeroed(module: nn.Module) -> nn.Module:
    """Start a layer at zero, so that the branch it ends adds nothing until training finds a use.

    A deep network then begins as the identity (ADM's ``zero_module``). Loading overwrites it.
    """
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResnetBlock(nn.Module):
    """Two convolutions beside a shortcut, told the noise level in between (DDPM, appendix B).

    Args:
        c_in: Channels in.
        c_out: Channels out.
        time_width: T, or ``None`` where there is no timestep (the autoencoder).
        groups: Groups of both norms.
        eps: Trap: 1e-5 in U-Nets, 1e-6 in the autoencoder.
        scale_shift: Let the timestep scale *and* shift the second norm (ADM's "AdaGN", Dhariwal and
            Nichol 2021, equation 3) rather than be added before it (DDPM).
        resample: ``"up"`` or ``"down"`` changes the size by two inside the block (ADM).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        time_width: int | None = None,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        scale_shift: bool = False,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, 2 * c_out if scale_shift else c_out)
            zeroed(self.conv2)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(
        self, x: Tensor, temb: Tensor | None = None, size: torch.Size | None = None
    ) -> Tensor:
        """x (B, C_in, H, W), temb (B, T) -> (B, C_out, H', W'); ``size``: (H', W') going up."""
        h = F.silu(self.norm1(x))
        if self.resample == "up":
            x, h = (F.interpolate(y, size=size, mode="nearest") for y in (x, h))
        elif self.resample == "down":
            x, h = (F.avg_pool2d(y, 2) for y in (x, h))
        h = self.conv1(h)
        if temb is None:
            h = self.norm2(h)
        else:
            told = self.time_emb_proj(F.silu(temb))[:, :, None, None]  # (B, C_out or 2*C_out, 1, 1)
            if self.scale_shift:
                scale, shift = told.chunk(2, dim=1)  # trap: scale comes first
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + told)
        h = self.conv2(F.silu(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Half the size by a convolution with stride 2.

    Trap: the autoencoder pads right and bottom only, and rounds odd sizes down; the U-Net pads all
    round, and rounds them up.
    """

    def __init__(self, width: int, all_round: bool = True) -> None:
        super().__init__()
        self.all_round = all_round
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1 if all_round else 0)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return self.conv(x if self.all_round else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Grow to ``size`` (H', W') by repeating pixels, then smooth them with a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor | None, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks, each followed by attention where there is some; the parts of one resolution.

    Attention modules are called as ``attention(h, context, bias)``.
    """

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)


class DownStage(Stage):
    """One resolution on the way down: gives h, and all that the way up will want to see again."""

    def __init__(
        self, resnets: list[nn.Module], attentions: list[nn.Module], shrink: nn.Module | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([] if shrink is None else [shrink])

    def forward(
        self,
        h: Tensor,
        temb: Tensor | None = None,
        context: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        seen = []
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            h = resnet(h, temb)
            if attention is not None:
                h = attention(h, context, bias)
            seen.append(h)
        for shrink in self.downsamplers:
            h = shrink(h, temb)
            seen.append(h)
        return h, seen


class MidStage(Stage):
    """The lowest resolution: a residual block, then attention and another one."""

    def forward(
        self,
        h: Tensor,
        temb: Tensor | None = None,
        context: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        h = self.resnets[0](h, temb)
        for attention in self.attentions:
            h = attention(h, context, bias)
        return self.resnets[1](h, temb)


class UpStage(Stage):
    """One resolution on the way up: each block also sees what the way down saw here, last first."""

    def __init__(
        self, resnets: list[nn.Module], attentions: list[nn.Module], grow: nn.Module | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([] if grow is None else [grow])

    def forward(
        self,
        h: Tensor,
        seen: list[Tensor],
        temb: Tensor | None = None,
        context: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Takes what it needs off the end of ``seen``, which is empty in an autoencoder."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            if seen:
                h = torch.cat([h, seen.pop()], dim=1)  # (B, C + C_seen, H, W)
            h = resnet(h, temb)
            if attention is not None:
                h = attention(h, context, bias)
        for grow in self.upsamplers:
            # An odd size was rounded on the way down: grow to the size seen there, not to twice.
            size = seen[-1].shape[2:] if seen else torch.Size(2 * n for n in h.shape[2:])
            h = grow(h, temb, size)
        return h
