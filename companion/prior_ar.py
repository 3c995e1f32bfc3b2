"""DALL·E 2's other prior: a picture's place in CLIP's space, spelled out number by number.

Ramesh et al. 2022, section 2.2. The place is turned into a short text: its principal components,
the widest first, each rounded to one of a few buckets. A causal Transformer writes that text one
token after the other, as a language model writes words, after reading the caption.

Letters: B captions, N tokens (77), D the width of CLIP's space, C that of the prior, K components,
M buckets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import errors
from companion.attention import TransformerBlock, mask_bias
from companion.pretrained import Pretrained

Past = list[tuple[Tensor, Tensor]]  # keys and values of each block, (B, n, C)


@dataclass(frozen=True)
class ARPriorConfig:
    """``config.json``: ours, since nobody published a prior of this kind."""

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    embedding_dim: int  # D
    num_embeddings: int  # N
    components: int  # K; the paper: 319 of 1024
    buckets: int = 64  # M; the paper: 1024
    dots: int = 32  # buckets of the dot product of picture and caption

    def __post_init__(self) -> None:
        errors.number("components", self.components, 1, self.embedding_dim, integer=True)
        errors.number("buckets", self.buckets, 2, integer=True)
        errors.number("dots", self.dots, 2, integer=True)
        errors.expect(self.dots % 2 == 0, f"dots is {self.dots}; expected an even number.")


class ARPrior(Pretrained):
    """An autoregressive prior: caption, its embedding, how well both fit, then K tokens.

    What it knows of the space, its axes and their ranges, is measured once (``measure``) and is
    not trained.
    """

    Config, published = ARPriorConfig, "ARPrior"

    def __init__(self, config: ARPriorConfig) -> None:
        super().__init__()
        self.config = c = config
        heads, common = c.num_attention_heads, c.embedding_dim
        width = heads * c.attention_head_dim
        self.encoder_hidden_states_proj = nn.Linear(common, width)
        self.embedding_proj = nn.Linear(common, width)
        self.dot_embedding = nn.Embedding(c.dots + 1, width)  # the last one: nothing was said
        self.code_embedding = nn.Embedding(c.buckets, width)
        length = c.num_embeddings + 1 + c.components  # the last component is never read
        self.positional_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, bias=True, gated=False) for _ in range(c.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.ModuleList([nn.Linear(width, 2 * width), nn.Linear(2 * width, c.buckets)])
        self.bucket_bias = nn.Parameter(torch.zeros(c.components, c.buckets))
        for table in (self.dot_embedding, self.code_embedding):
            nn.init.normal_(table.weight, std=0.02)
        self.register_buffer("mean", torch.zeros(common))
        self.register_buffer("axes", torch.eye(common)[: c.components].clone())  # (K, D)
        self.register_buffer("low", -torch.ones(c.components))
        self.register_buffer("high", torch.ones(c.components))
        self.register_buffer("dot_edges", torch.linspace(-1, 1, c.dots - 1))

    # --- a place as tokens ---------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, embedding: Tensor, text_embedding: Tensor) -> None:
        """Set axes and ranges from pictures (n, D) and their captions (n, D), n at least 2.

        The axes are the pictures' principal components, the one of the greatest variance first; the
        range of each is what was seen and a tenth more on either side; dot products are cut so that
        each bucket holds equally many, as near as n allows.
        """
        c = self.config
        errors.tensor("embedding", embedding, f"n {c.embedding_dim}", "float")
        errors.tensor("text_embedding", text_embedding, f"{len(embedding)} {c.embedding_dim}")
        errors.expect(
            len(embedding) > 1, f"there are {len(embedding)} pictures; expected at least 2."
        )
        _, vectors = spectrum(embedding)
        self.mean.copy_(embedding.double().mean(0))
        self.axes.copy_(vectors[:, : c.components].T)
        y = self._components(embedding)
        least, most = y.min(0).values, y.max(0).values
        margin = ((most - least) / 10).clamp(min=1e-6)
        self.low.copy_(least - margin)
        self.high.copy_(most + margin)
        shares = torch.arange(1, c.dots, dtype=torch.float64) / c.dots
        dots = (embedding.double() * text_embedding.double()).sum(1)
        self.dot_edges.copy_(dots.quantile(shares.to(dots.device)))

    def _components(self, embedding: Tensor) -> Tensor:
        return (embedding - self.mean) @ self.axes.T  # (B, K)

    def quantise(self, embedding: Tensor) -> Tensor:
        """Places (B, D) to tokens (B, K), int64 from 0 to M - 1; what lies outside is moved in."""
        y, m = self._components(embedding), self.config.buckets
        share = (y - self.low) / (self.high - self.low)
        return (share * m).floor().clamp(0, m - 1).long()

    def dequantise(self, codes: Tensor) -> Tensor:
        """Tokens (B, K) to places (B, D): the middle of each bucket along each axis."""
        share = (codes + 0.5) / self.config.buckets
        return (self.low + share * (self.high - self.low)) @ self.axes + self.mean

    def dot(self, embedding: Tensor, text_embedding: Tensor) -> Tensor:
        """The bucket of the dot product of picture and caption, (B, D) twice -> (B,) int64."""
        return torch.bucketize((embedding * text_embedding).sum(1), self.dot_edges)

    # --- the Transformer -----------------------------------------------------------------------

    def forward(
        self,
        text_embedding: Tensor,
        text_states: Tensor,
        mask: Tensor,
        dot: Tensor,
        codes: Tensor,
    ) -> Tensor:
        """What may stand at each place of the text, given all before it.

        Args:
            text_embedding: CLIP's pooled, projected text embedding, (B, D).
            text_states: CLIP's text states, (B, N, D).
            mask: 1 where a caption has a token, 0 where it is padded, (B, N).
            dot: Bucket of the dot product; ``dots`` where nothing is said, (B,).
            codes: The tokens, (B, K); the last one is not looked at.

        Returns:
            Logits (B, K, M).
        """
        prefix = self._prefix(text_embedding, text_states, dot)
        h = torch.cat([prefix, self.code_embedding(codes[:, :-1])], dim=1)  # (B, N + 1 + K, C)
        h, _ = self._run(h, mask, None)
        return self._answer(h[:, self.config.num_embeddings + 1 :], 0)

    @torch.no_grad()
    def draw(
        self,
        given: Sequence[Tensor],
        null: Sequence[Tensor],
        generator: torch.Generator | None = None,
        *,
        scale: float = 1.0,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Draw places for captions: first how well they fit, from the better half, then the tokens.

        Args:
            given: The captions' embeddings (B, D), states (B, N, D) and masks (B, N).
            null: The same of the empty caption, for guidance; only looked at if ``scale`` > 1.
            generator: Source of chance.
            scale: s = 1 + w: log probabilities are moved from those of ``null`` through those of
                ``given``. At most 1: no guidance.
            uniform: The numbers from 0 to 1 that decide, (B, 1 + K), instead of a generator.

        Returns:
            (B, D), on CLIP's own scale.
        """
        errors.number("scale", scale)
        c, guided = self.config, scale > 1
        b, device = len(given[0]), self.mean.device
        if uniform is None:
            uniform = torch.rand(b, 1 + c.components, generator=generator, dtype=torch.float64)
        errors.tensor("uniform", uniform, f"{b} {1 + c.components}", "float", low=0, high=1)
        uniform = uniform.to(device)
        half = c.dots // 2  # equally many in each bucket: the better half of the pairs
        dot = (half + (uniform[:, 0] * half).long()).clamp(max=c.dots - 1)
        words = list(given)
        if guided:
            words = [torch.cat([x, y]) for x, y in zip(given, null, strict=True)]
            dot = torch.cat([dot, torch.full_like(dot, c.dots)])
        h, past, codes = self._prefix(words[0], words[1], dot), None, []
        for k in range(c.components):
            h, past = self._run(h, words[2], past)
            logits = self._answer(h[:, -1:], k)[:, 0].double().log_softmax(-1)  # (B or 2 B, M)
            if guided:
                with_it, without = logits.chunk(2)
                logits = without + scale * (with_it - without)
            below = logits.softmax(-1).cumsum(-1) <= uniform[:, 1 + k, None]
            codes.append(below.sum(-1).clamp(max=c.buckets - 1))
            h = self.code_embedding(codes[-1].repeat(2 if guided else 1))[:, None]
        return self.dequantise(torch.stack(codes, dim=1))

    def _prefix(self, text_embedding: Tensor, text_states: Tensor, dot: Tensor) -> Tensor:
        """What stands before the tokens, (B, N + 2, C)."""
        c = self.config
        if text_states.shape[1:] != (c.num_embeddings, c.embedding_dim):
            raise ValueError(
                f"text_states have shape {tuple(text_states.shape)}; expected"
                f" (B, {c.num_embeddings}, {c.embedding_dim})."
            )
        said = self.encoder_hidden_states_proj(text_states)
        embedding = self.embedding_proj(text_embedding)[:, None]
        return torch.cat([said, embedding, self.dot_embedding(dot)[:, None]], dim=1)

    def _run(self, h: Tensor, mask: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """All blocks, each token looking back only; ``past``: what earlier tokens left to see."""
        done = past[0][0].shape[1] if past else 0
        h = h + self.positional_embedding[:, done : done + h.shape[1]]
        now, all_ = h.shape[1], done + h.shape[1]
        back = torch.ones(now, all_, dtype=h.dtype, device=h.device).tril(done)
        mask = F.pad(mask.to(h.dtype), (0, all_ - mask.shape[1]), value=1.0)
        # (B, 1, now, all): padding and what comes later are out of sight
        bias = mask_bias(mask, h.dtype)[:, None, None] + mask_bias(back, h.dtype)
        seen: Past = []
        for i, block in enumerate(self.transformer_blocks):
            x, look = block.norm1(h), block.attn1
            k, v = look.to_k(x), look.to_v(x)
            if past:
                k, v = torch.cat([past[i][0], k], dim=1), torch.cat([past[i][1], v], dim=1)
            seen.append((k, v))
            h = h + look.to_out[0](look.attend(look.to_q(x), k, v, bias))
            h = h + block.ff(block.norm3(h))
        return h, seen

    def _answer(self, h: Tensor, first: int) -> Tensor:
        """Logits of the components from ``first`` on: (B, n, C) -> (B, n, M)."""
        hidden = F.gelu(self.head[0](self.norm_out(h)))
        return self.head[1](hidden) + self.bucket_bias[first : first + h.shape[1]]


def spectrum(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of places (n, D): variances (D,), the greatest first, and axes (D, D).

    Axes are columns, float64; each has its largest entry positive, so that they come out the same.
    """
    x = embedding.detach().double()
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return values, vectors * signs


def components_for(embedding: Tensor, share: float = 0.99) -> int:
    """How many principal components hold ``share`` of the variance of places (n, D)."""
    errors.number("share", share, 0, 1)
    values, _ = spectrum(embedding)
    kept = values.cumsum(0) / values.sum()
    return int((kept < share - 1e-12).sum()) + 1
