"""The U-Net of "Diffusion models beat GANs" (ADM), as DALL·E 2, Imagen and Karlo build on it.

Dhariwal and Nichol 2021. It draws pixels, not latents, and differs from Stable Diffusion's U-Net
(``unet``) in five ways: residual blocks change the size; the timestep may scale *and* shift; one
attention looks at the picture and at the text at once; a vector may be added to the timestep; and
it may predict the variance of each pixel beside the noise (twice the channels out).

One class serves three jobs, by its configuration:

- Karlo's decoder (diffusers' ``UNet2DConditionModel``): all five;
- Karlo's upsamplers (``UNet2DModel``): no attention, no scale, no variance; the small picture,
  enlarged, is stacked under the noisy one (6 channels in);
- the small pixel U-Nets of this book, with or without labels, embeddings or text.

Letters: B pictures, C channels, N tokens of K channels, T the width of the timestep's vector.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from companion.attention import PictureAttention, mask_bias
from companion.embeddings import TimestepEmbedding, timestep_embedding
from companion.pretrained import UNET_NOTES, UNET_SWITCHES, Pretrained
from companion.resnet import DownStage, MidStage, ResnetBlock, UpStage, zeroed

PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")  # no attention
SELF = ("AttnDownBlock2D", "AttnUpBlock2D")  # the picture looks at itself
CROSS = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")  # and at the text


@dataclass(frozen=True)
class ADMConfig:
    """``decoder/config.json`` or ``super_res_first/config.json`` of a published folder.

    The settings without a default have two in the stock library, one for each of its classes.
    """

    in_channels: int
    out_channels: int  # twice the picture's channels where the variance is learned
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    mid_block_type: Literal["UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"] = "UNetMidBlock2D"
    add_attention: bool = True  # in the middle, when it is an UNetMidBlock2D
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8  # here it really is the channels of one head
    cross_attention_dim: int | None = None
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    class_embed_type: Literal["identity", "projection", "timestep"] | None = None
    projection_class_embeddings_input_dim: int | None = None
    num_class_embeds: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | tuple[int, int] | None = None

    @property
    def looks_at_text(self) -> bool:
        """Whether there is text to look at; this decides which stock class opens the folder."""
        return self.mid_block_type == "UNetMidBlock2DSimpleCrossAttn"

    def __post_init__(self) -> None:
        def refuse(condition: bool, why: str) -> None:
            if condition:
                raise ValueError(why)

        n, kinds = len(self.block_out_channels), (self.down_block_types, self.up_block_types)
        for i, way in enumerate(kinds):
            known = {PLAIN[i], CROSS[i] if self.looks_at_text else SELF[i]}
            refuse(
                not set(way) <= known or len(way) != n,
                f"block types {list(way)}: expected {n}, one for each of block_out_channels, from"
                f" {sorted(known)} (with mid_block_type {self.mid_block_type!r}).",
            )
        refuse(
            not self.looks_at_text
            and (SELF[0] in kinds[0] and self.downsample_type != "resnet"
                 or SELF[1] in kinds[1] and self.upsample_type != "resnet"),
            "downsample_type, upsample_type: with attention this model implements only 'resnet'.",
        )  # fmt: skip
        refuse(
            not self.looks_at_text
            and self.add_attention
            and self.resnet_time_scale_shift == "scale_shift",
            "add_attention with resnet_time_scale_shift 'scale_shift': stock leaves the norm out of"
            " the middle attention then, and this model does not.",
        )
        refuse(
            self.looks_at_text != (self.cross_attention_dim is not None),
            f"cross_attention_dim is {self.cross_attention_dim} with mid_block_type"
            f" {self.mid_block_type!r}; a width goes with UNetMidBlock2DSimpleCrossAttn only.",
        )
        width = self.projection_class_embeddings_input_dim
        refuse(
            (self.class_embed_type == "projection") != (width is not None)
            or width is not None and not self.looks_at_text,
            "class_embed_type 'projection' needs projection_class_embeddings_input_dim, and a model"
            " that looks at text (UNet2DModel has no such setting).",
        )  # fmt: skip
        heads = self.attention_head_dim
        refuse(
            isinstance(heads, tuple) and len(heads) != n,
            f"attention_head_dim has {heads}; expected one number, or {n}.",
        )
        for width, head in self.looks():
            refuse(
                width % head != 0,
                f"attention_head_dim is {heads}, and {width} channels that attend are no whole"
                f" number of heads of {head} (block_out_channels: {self.block_out_channels}).",
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """The channels of one head, level by level."""
        head = self.attention_head_dim
        return head if isinstance(head, tuple) else (head,) * len(self.block_out_channels)

    def looks(self) -> list[tuple[int, int]]:
        """Where there is attention: channels, and those of one head; down, middle, up.

        Trap: on the way up stock counts attention_head_dim from the top again, not reversed.
        """
        widths, heads = self.block_out_channels, self.heads
        down = zip(self.down_block_types, widths, heads, strict=True)
        up = zip(self.up_block_types, widths[::-1], heads, strict=True)
        middle = self.looks_at_text or self.add_attention
        return [
            *[(width, head) for kind, width, head in down if kind != PLAIN[0]],
            *[(widths[-1], heads[-1])] * middle,
            *[(width, head) for kind, width, head in up if kind != PLAIN[1]],
        ]


class ADMUNet(Pretrained):
    """diffusers' ``UNet2DConditionModel`` and ``UNet2DModel`` as Karlo configures them."""

    Config = ADMConfig
    switches, notes = UNET_SWITCHES, UNET_NOTES

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = c.block_out_channels
        first, last = widths[0], widths[-1]
        head = c.heads
        block = partial(
            ResnetBlock,
            time_width=4 * first,
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
        )

        def look(width: int, head: int) -> PictureAttention:
            # Trap: beside text, the norm's eps is 1e-5 whatever norm_eps says.
            eps = 1e-5 if c.looks_at_text else c.norm_eps
            groups = c.norm_num_groups
            return PictureAttention(width, width // head, c.cross_attention_dim, groups, eps)

        self.time_embedding = TimestepEmbedding(first, 4 * first)
        self.class_embedding = self._class_embedding(first, 4 * first)
        self.conv_in = nn.Conv2d(c.in_channels, first, 3, padding=1)

        width, seen = first, [first]  # channels now, and of all that the way up will see again
        self.down_blocks = nn.ModuleList()
        for i, (kind, out) in enumerate(zip(c.down_block_types, widths, strict=True)):
            depth, lowest = c.layers_per_block, i == len(widths) - 1
            resnets = [block(width if j == 0 else out, out) for j in range(depth)]
            attentions = [look(out, head[i]) for _ in range(depth)] if kind != PLAIN[0] else []
            shrink = None if lowest else block(out, out, resample="down")
            self.down_blocks.append(DownStage(resnets, attentions, shrink))
            seen += [out] * (depth if lowest else depth + 1)
            width = out

        middle = [look(last, head[-1])] if c.looks_at_text or c.add_attention else []
        self.mid_block = MidStage([block(last, last), block(last, last)], middle)

        self.up_blocks = nn.ModuleList()
        for i, (kind, out) in enumerate(zip(c.up_block_types, widths[::-1], strict=True)):
            depth, highest = c.layers_per_block + 1, i == len(widths) - 1
            resnets = [block((width if j == 0 else out) + seen.pop(), out) for j in range(depth)]
            attentions = [look(out, head[i]) for _ in range(depth)] if kind != PLAIN[1] else []
            grow = None if highest else block(out, out, resample="up")
            self.up_blocks.append(UpStage(resnets, attentions, grow))
            width = out

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, first, c.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(first, c.out_channels, 3, padding=1))

    def _class_embedding(self, width: int, out: int) -> nn.Module | None:
        kind = self.config.class_embed_type
        if kind == "projection":
            return TimestepEmbedding(self.config.projection_class_embeddings_input_dim, out)
        if kind == "timestep":
            return TimestepEmbedding(width, out)
        if kind is None and self.config.num_class_embeds is not None:
            return nn.Embedding(self.config.num_class_embeds, out)
        return nn.Identity() if kind == "identity" else None

    @property
    def published(self) -> str:  # type: ignore[override]
        return "UNet2DConditionModel" if self.config.looks_at_text else "UNet2DModel"

    def config_json(self) -> dict[str, object]:
        values = super().config_json()
        foreign = ("downsample_type", "upsample_type", "add_attention")  # of the other stock class
        if not self.config.looks_at_text:
            foreign = ("cross_attention_dim", "projection_class_embeddings_input_dim")
        return {k: v for k, v in values.items() if k not in foreign}

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None = None,
        embedding: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What was predicted of the noise, and of its variance where that is learned.

        Args:
            x: Noisy pictures, (B, in_channels, H, W); H and W multiples of 2^(stages - 1).
            t: Timestep, one number or (B,).
            context: Text tokens, (B, N, K).
            embedding: Added to the timestep's vector: as it is, (B, T), for ``"identity"``; through
                a small network, (B, P), for ``"projection"``; a second timestep, (B,), for
                ``"timestep"``; or labels, (B,), with ``num_class_embeds``.
            mask: 1 where ``context`` may be looked at, (B, N).

        Returns:
            (B, out_channels, H, W)
        """
        self._check(x, context, embedding)
        width = self.config.block_out_channels[0]
        temb = self.time_embedding(timestep_embedding(t, width, x))  # (B, T)
        if self.class_embedding is not None:
            if self.config.class_embed_type == "timestep":
                embedding = timestep_embedding(embedding, width, x)
            temb = temb + self.class_embedding(embedding)
        bias = None if mask is None else mask_bias(mask, x.dtype)[:, None, None, :]
        h = self.conv_in(x)
        seen = [h]
        for stage in self.down_blocks:
            h, new = stage(h, temb, context, bias)
            seen += new
        h = self.mid_block(h, temb, context, bias)
        for stage in self.up_blocks:
            h = stage(h, seen, temb, context, bias)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _check(self, x: Tensor, context: Tensor | None, embedding: Tensor | None) -> None:
        c = self.config
        step = 2 ** (len(c.block_out_channels) - 1)
        if x.ndim != 4 or x.shape[1] != c.in_channels or any(n % step for n in x.shape[2:]):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (B, {c.in_channels}, H, W) with H and W"
                f" multiples of {step}."
            )
        wanted = (len(x), c.cross_attention_dim) if c.looks_at_text else None
        if (context.shape[::2] if context is not None and context.ndim == 3 else context) != wanted:
            got = None if context is None else tuple(context.shape)
            raise ValueError(
                f"context has shape {got}; expected"
                f" {f'({len(x)}, tokens, {c.cross_attention_dim})' if wanted else 'none'}."
            )
        if (embedding is None) != (self.class_embedding is None):
            raise ValueError(
                f"embedding is {'missing' if embedding is None else 'given'}, and class_embed_type"
                f" is {c.class_embed_type!r}, num_class_embeds {c.num_class_embeds}."
            )
