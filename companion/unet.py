"""Stable Diffusion's U-Net: a noisy latent, a noise level and a text in; the noise out.

Rombach et al. 2022, figure 3. Letters: B latents, C channels, H×W places, N tokens of K channels
each (77 of 768 at life size), T the width of the timestep's vector.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from companion.attention import TransformerBlock
from companion.embeddings import TimestepEmbedding, timestep_embedding
from companion.pretrained import UNET_NOTES, UNET_SWITCHES, Pretrained
from companion.resnet import (
    Downsample,
    DownStage,
    MidStage,
    ResnetBlock,
    Upsample,
    UpStage,
    zeroed,
)


@dataclass(frozen=True)
class UNetConfig:
    """``unet/config.json``. Defaults are the stock library's, not Stable Diffusion's."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4  # 9 for inpainting: latent, mask, masked picture's latent
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    layers_per_block: int = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8  # trap: the *number* of heads, whatever it says
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        down = {"CrossAttnDownBlock2D", "DownBlock2D"}
        up = {"CrossAttnUpBlock2D", "UpBlock2D"}
        for kinds, known in ((self.down_block_types, down), (self.up_block_types, up)):
            if not set(kinds) <= known or len(kinds) != len(self.block_out_channels):
                raise ValueError(
                    f"block types {list(kinds)}: expected {len(self.block_out_channels)}, one for"
                    f" each of block_out_channels, from {sorted(known)}."
                )
        if isinstance(self.attention_head_dim, tuple) and len(self.attention_head_dim) != len(
            self.block_out_channels
        ):
            raise ValueError("attention_head_dim needs one entry for each of block_out_channels.")


class SpatialTransformer(nn.Module):
    """The places of a picture as tokens: they look at each other, then at the text, then back."""

    def __init__(self, width: int, heads: int, context_width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)  # trap: 1e-5 everywhere else in this file
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, context_width)])
        self.proj_out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, H*W, C), in memory too
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class UNet(Pretrained):
    """diffusers' ``UNet2DConditionModel`` as Stable Diffusion 1.x configures it."""

    Config, published = UNetConfig, "UNet2DConditionModel"
    switches, notes = UNET_SWITCHES, UNET_NOTES

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = c.block_out_channels
        first, last = widths[0], widths[-1]
        heads = c.attention_head_dim
        heads = heads if isinstance(heads, tuple) else (heads,) * len(widths)
        groups = c.norm_num_groups
        block = partial(ResnetBlock, time_width=4 * first, groups=groups, eps=c.norm_eps)
        look = partial(SpatialTransformer, context_width=c.cross_attention_dim, groups=groups)

        self.time_embedding = TimestepEmbedding(first, 4 * first)
        self.conv_in = nn.Conv2d(c.in_channels, first, 3, padding=1)

        width, seen = first, [first]  # channels now, and of all that the way up will see again
        self.down_blocks = nn.ModuleList()
        for i, (kind, out) in enumerate(zip(c.down_block_types, widths, strict=True)):
            depth, lowest = c.layers_per_block, i == len(widths) - 1
            resnets = [block(width if j == 0 else out, out) for j in range(depth)]
            cross = kind == "CrossAttnDownBlock2D"
            attentions = [look(out, heads[i]) for _ in range(depth)] if cross else []
            shrink = None if lowest else Downsample(out)
            self.down_blocks.append(DownStage(resnets, attentions, shrink))
            seen += [out] * (depth if lowest else depth + 1)
            width = out

        self.mid_block = MidStage([block(last, last), block(last, last)], [look(last, heads[-1])])

        self.up_blocks = nn.ModuleList()
        for i, (kind, out) in enumerate(zip(c.up_block_types, widths[::-1], strict=True)):
            depth, highest = c.layers_per_block + 1, i == len(widths) - 1  # + 1: also sees a shrink
            resnets = [block((width if j == 0 else out) + seen.pop(), out) for j in range(depth)]
            cross = kind == "CrossAttnUpBlock2D"
            attentions = [look(out, heads[-1 - i]) for _ in range(depth)] if cross else []
            grow = None if highest else Upsample(out)
            self.up_blocks.append(UpStage(resnets, attentions, grow))
            width = out

        self.conv_norm_out = nn.GroupNorm(groups, first, c.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(first, c.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        """What was predicted of the noise (or v, as the weights were trained).

        Args:
            x: Noisy latents, (B, in_channels, H, W), any size from 2^(stages - 1) up.
            t: Timestep, one number or (B,).
            context: Text states, (B, N, K). Stable Diffusion looks at padding too: no mask.

        Returns:
            (B, out_channels, H, W)
        """
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, {c.in_channels}, H, W).")
        if context.ndim != 3 or context.shape[::2] != (len(x), c.cross_attention_dim):
            raise ValueError(
                f"context has shape {tuple(context.shape)}; expected ({len(x)}, tokens,"
                f" {c.cross_attention_dim})."
            )
        temb = self.time_embedding(timestep_embedding(t, c.block_out_channels[0], x))  # (B, T)
        h = self.conv_in(x)
        seen = [h]
        for stage in self.down_blocks:
            h, new = stage(h, temb, context)
            seen += new
        h = self.mid_block(h, temb, context)
        for stage in self.up_blocks:
            h = stage(h, seen, temb, context)
        return self.conv_out(F.silu(self.conv_norm_out(h)))
