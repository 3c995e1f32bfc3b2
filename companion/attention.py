"""Attention: each place asks (query), all places answer (key, value), the best answers are mixed.

    attention(q, k, v) = softmax(q kᵀ / √d) v           Vaswani et al. 2017, equation 1

Letters: B pictures, N queries, M keys, C channels, h heads of d channels each (C = h·d).

Every attention module here forgets where it looked, because remembering costs memory. To see it,
set ``module.keep = True`` and read ``module.map``, (B, h, N, M); ``watch`` does so for many.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 2**14  # N * M up to which multiplying out trains faster on a CPU than torch's one kernel


class MultiHead(nn.Module):
    """What all attention shares: splitting into heads, and the memory of where they looked."""

    keep = False
    map: Tensor | None = None

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """q (B, N, C), k and v (B, M, C) -> (B, N, C); ``bias`` is added to the scores."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        trains = q.requires_grad and q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= SMALL
        looks = _map(q, k, bias, causal) if self.keep or trains else None  # (B, h, N, M)
        if self.keep:
            self.map = looks.detach()
        if trains:
            h = looks @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        return h.transpose(1, 2).flatten(2)  # (B, h, N, d) -> (B, N, C)


def _map(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1)


@contextmanager
def watch(model: nn.Module, ending: str = "") -> Iterator[dict[str, MultiHead]]:
    """Keep attention maps within the block, of the modules whose name ends so; yields them by name.

    ::

        with watch(unet, "attn2") as looks:
            unet(x, t, context)
        looks["mid_block.attentions.0.transformer_blocks.0.attn2"].map  # (B, h, H*W, words)
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiHead) and name.endswith(ending)
    }
    if not found:
        raise ValueError(f"no attention module of {type(model).__name__} ends in {ending!r}.")
    for module in found.values():
        module.keep = True
    try:
        yield found
    finally:
        for module in found.values():
            module.keep = False


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (1 = look, 0 = ignore) as what is added to scores, in any shape.

    Trap: published models were trained with -10000, not -infinity. With it, a row whose keys are
    all masked looks evenly everywhere instead of being NaN.
    """
    return (1 - mask.to(dtype)) * -10000.0


class Attention(MultiHead):
    """Queries from one sequence, keys and values from another (or from itself).

    Trap: query, key and value have no bias in Stable Diffusion's U-Net, and have one in the prior.
    """

    def __init__(
        self, width: int, heads: int, context_width: int | None = None, bias: bool = False
    ) -> None:
        super().__init__(heads)
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x (B, N, C), context (B, M, K), bias (B, 1, N or 1, M) -> (B, N, C)."""
        context = x if context is None else context
        h = self.attend(self.to_q(x), self.to_k(context), self.to_v(context), bias)
        return self.to_out[0](h)


class PictureAttention(MultiHead):
    """Every place of a picture looks at every other, and at extra tokens where there are some.

    The block of DDPM, ADM and the autoencoder. GLIDE and DALL·E 2 added the extra tokens: their
    keys and values stand *before* the picture's own (``add_k_proj``, ``add_v_proj``).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(heads)
        self.group_norm = nn.GroupNorm(groups, width, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        if context_width is not None:
            self.add_k_proj = nn.Linear(context_width, width)
            self.add_v_proj = nn.Linear(context_width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W), context (B, M, K), bias (B, 1, 1, M) on the context -> (B, C, H, W)."""
        h = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, H*W, C), in memory too
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        if context is not None:
            k = torch.cat([self.add_k_proj(context), k], dim=1)  # (B, M + H*W, C)
            v = torch.cat([self.add_v_proj(context), v], dim=1)
        if bias is not None:
            bias = F.pad(bias, (0, h.shape[1]))  # the picture's own places are never masked
        h = self.to_out[0](self.attend(q, k, v, bias))
        return x + h.transpose(1, 2).reshape(x.shape)


class FeedForward(nn.Module):
    """Each token by itself through a layer four times as wide, (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        # Slot 1 of the published files is a dropout: nothing in it to store, nothing to do.
        self.net = nn.ModuleList([_Widen(width, gated), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class _Widen(nn.Module):
    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.proj = nn.Linear(width, 8 * width if gated else 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(self.proj(x))
        x, gate = self.proj(x).chunk(2, dim=-1)  # trap: the second half is the gate
        return x * F.gelu(gate)  # GEGLU, Shazeer 2020


class TransformerBlock(nn.Module):
    """Look at yourself, look at the words, think: (B, N, C) -> (B, N, C).

    Stable Diffusion has all three, with a gated feed-forward and no biases in its attention. The
    prior has no words to look at (``context_width=None``), so its file has no ``norm2``; its
    feed-forward is a plain GELU and its attention has biases.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        bias: bool = False,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, bias=bias)
        if context_width is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = Attention(width, heads, context_width, bias)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, gated)

    def forward(
        self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """``bias`` goes to the attention among the tokens themselves."""
        x = x + self.attn1(self.norm1(x), bias=bias)
        if context is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))
