"""Stable Diffusion's autoencoder: pictures to a smaller place and back.

Rombach et al. 2022, section 3.1. A picture (B, 3, H, W) in [-1, 1] becomes a Gaussian over latents
(B, 4, H/8, W/8); diffusion works on latents times ``scaling_factor``, the autoencoder never does.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.attention import PictureAttention
from companion.pretrained import Pretrained
from companion.resnet import Downsample, DownStage, MidStage, ResnetBlock, Upsample, UpStage

EPS = 1e-6  # trap: of every norm in this file; the U-Nets have 1e-5


@dataclass(frozen=True)
class AutoencoderConfig:
    """``vae/config.json``. Defaults are the stock library's."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        n = len(self.block_out_channels)
        for kinds, known in (
            (self.down_block_types, "DownEncoderBlock2D"),
            (self.up_block_types, "UpDecoderBlock2D"),
        ):
            if kinds != (known,) * n:
                raise ValueError(f"block types {list(kinds)}: this model implements {n} × {known}.")


@dataclass(frozen=True)
class Posterior:
    """What the encoder says of a picture: an independent Gaussian for each latent value."""

    mean: Tensor  # (B, latent_channels, H/f, W/f)
    log_variance: Tensor

    @property
    def std(self) -> Tensor:
        return (0.5 * self.log_variance).exp()

    def sample(self, generator: torch.Generator) -> Tensor:
        """A latent drawn from it (noise comes from the CPU: one seed, one latent, any device)."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Distance to the standard normal, one number a picture, (B,), in nats."""
        variance = self.log_variance.exp()
        return 0.5 * (self.mean**2 + variance - 1 - self.log_variance).sum((1, 2, 3))


class Encoder(nn.Module):
    """Picture to the numbers of a Gaussian: (B, 3, H, W) -> (B, 2 * latent, H/f, W/f)."""

    def __init__(self, c: AutoencoderConfig, block: partial[ResnetBlock]) -> None:
        super().__init__()
        widths, last = c.block_out_channels, c.block_out_channels[-1]
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (width, out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            resnets = [block(width if j == 0 else out, out) for j in range(c.layers_per_block)]
            shrink = Downsample(out, all_round=False) if i < len(widths) - 1 else None
            self.down_blocks.append(DownStage(resnets, [], shrink))
        self.mid_block = _middle(last, block, c)
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, last, EPS)
        self.conv_out = nn.Conv2d(last, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down_blocks:
            h, _ = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """Latent to picture: (B, latent, h, w) -> (B, 3, f*h, f*w)."""

    def __init__(self, c: AutoencoderConfig, block: partial[ResnetBlock]) -> None:
        super().__init__()
        widths, last = c.block_out_channels[::-1], c.block_out_channels[0]
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _middle(widths[0], block, c)
        self.up_blocks = nn.ModuleList()
        for i, (width, out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            resnets = [block(width if j == 0 else out, out) for j in range(c.layers_per_block + 1)]
            grow = Upsample(out) if i < len(widths) - 1 else None
            self.up_blocks.append(UpStage(resnets, [], grow))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, last, EPS)
        self.conv_out = nn.Conv2d(last, c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            h = stage(h, [])  # nothing seen on a way down: all must pass through the latent
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _middle(width: int, block: partial[ResnetBlock], c: AutoencoderConfig) -> MidStage:
    # One head as wide as the picture is deep; its query, key and value have biases.
    look = PictureAttention(width, heads=1, groups=c.norm_num_groups, eps=EPS)
    return MidStage([block(width, width), block(width, width)], [look])


class Autoencoder(Pretrained):
    """diffusers' ``AutoencoderKL``."""

    Config, published = AutoencoderConfig, "AutoencoderKL"
    switches = {
        "act_fn": ("silu", "swish"),
        "latents_mean": (None,),
        "latents_std": (None,),
        "mid_block_add_attention": (True,),
        "shift_factor": (None,),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    }
    notes = ("force_upcast",)  # about half precision only

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = c = config
        block = partial(ResnetBlock, groups=c.norm_num_groups, eps=EPS)
        self.encoder = Encoder(c, block)
        self.decoder = Decoder(c, block)
        # Left over from a version with a codebook; linear, and part of every published file.
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    @property
    def factor(self) -> int:
        """f: how much smaller a latent is than its picture, on each side (8 at life size)."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> Posterior:
        """Pictures (B, 3, H, W) in [-1, 1] to latents, *unscaled*; odd sizes are rounded down."""
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (B, {self.config.in_channels}, H, W)."
            )
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 4, h, w), *unscaled*, to pictures (B, 3, f*h, f*w), about in [-1, 1]."""
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; expected (B, {self.config.latent_channels}, h, w)."
            )
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> Tensor:
        """There and back by the mean: (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decode(self.encode(x).mean)
