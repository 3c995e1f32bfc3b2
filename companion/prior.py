"""DALL·E 2's prior: from what a caption says to a picture's place in CLIP's space.

Ramesh et al. 2022, section 2.2, as Karlo built it; and the projection that tells Karlo's decoder
about both. Letters: B captions, N tokens (77), D the width of CLIP's space, C that of the prior.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.attention import TransformerBlock, mask_bias
from companion.embeddings import TimestepEmbedding, timestep_embedding
from companion.pretrained import Pretrained


@dataclass(frozen=True)
class PriorConfig:
    """``prior/config.json``; the defaults are the stock library's and Karlo's."""

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 20
    embedding_dim: int = 768
    num_embeddings: int = 77


class Prior(Pretrained):
    """diffusers' ``PriorTransformer``: a causal Transformer that predicts the clean embedding."""

    Config, published = PriorConfig, "PriorTransformer"
    switches = {
        "added_emb_type": ("prd",),
        "additional_embeddings": (4,),
        "clip_embed_dim": (None,),
        "dropout": (0.0,),
        "embedding_proj_dim": (None,),
        "embedding_proj_norm_type": (None,),
        "encoder_hid_proj_type": ("linear",),
        "norm_in_type": (None,),
        "time_embed_act_fn": ("silu",),
        "time_embed_dim": (None,),
    }

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = c = config
        heads, common = c.num_attention_heads, c.embedding_dim
        width = heads * c.attention_head_dim
        self.time_embedding = TimestepEmbedding(width, width)
        self.proj_in = nn.Linear(common, width)
        self.embedding_proj = nn.Linear(common, width)
        self.encoder_hidden_states_proj = nn.Linear(common, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, c.num_embeddings + 4, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, bias=True, gated=False) for _ in range(c.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, common)
        # Trap: stock starts both at zero, and a fresh prior then maps everything to 0.
        self.clip_mean = nn.Parameter(torch.zeros(1, common), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, common), requires_grad=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        text_embedding: Tensor,
        text_states: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the clean, rescaled picture embedding.

        Args:
            x: Noisy picture embeddings, rescaled (``rescale``), (B, D).
            t: Timestep, one number or (B,).
            text_embedding: CLIP's pooled, projected text embedding, (B, D).
            text_states: CLIP's text states, (B, N, D).
            mask: 1 where a caption has a token, 0 where it is padded, (B, N).

        Returns:
            (B, D)
        """
        c = self.config
        if text_states.shape[1:] != (c.num_embeddings, c.embedding_dim):
            raise ValueError(
                f"text_states have shape {tuple(text_states.shape)}; expected"
                f" (B, {c.num_embeddings}, {c.embedding_dim})."
            )
        time = timestep_embedding(t, c.num_attention_heads * c.attention_head_dim, x)
        h = torch.cat(
            [
                self.encoder_hidden_states_proj(text_states),  # N tokens of the caption,
                self.embedding_proj(text_embedding)[:, None],  # its embedding,
                self.time_embedding(time)[:, None],  # how noisy,
                self.proj_in(x)[:, None],  # the noisy embedding,
                self.prd_embedding.expand(len(x), -1, -1),  # and the place of the answer
            ],
            dim=1,
        )  # (B, N + 4, C)
        h = h + self.positional_embedding
        bias = None if mask is None else self._bias(mask, h)
        for block in self.transformer_blocks:
            h = block(h, bias=bias)
        return self.proj_to_clip_embeddings(self.norm_out(h[:, -1]))

    def _bias(self, mask: Tensor, h: Tensor) -> Tensor:
        # Trap: without a mask the prior is not causal either; published ones always get a mask.
        n = h.shape[1]
        mask = nn.functional.pad(mask.to(h.dtype), (0, 4), value=1.0)
        back = torch.ones(n, n, dtype=h.dtype, device=h.device).tril()
        return mask_bias(mask, h.dtype)[:, None, None, :] + mask_bias(back, h.dtype)  # (B, 1, n, n)

    def rescale(self, embedding: Tensor) -> Tensor:
        """CLIP's embedding as the prior diffuses it: about mean 0, std 1 in each direction."""
        return (embedding - self.clip_mean) / self.clip_std

    def restore(self, x: Tensor) -> Tensor:
        """Back to CLIP's own scale (stock's ``post_process_latents``)."""
        return x * self.clip_std + self.clip_mean


@dataclass(frozen=True)
class TextProjectionConfig:
    """``text_proj/config.json``."""

    time_embed_dim: int
    cross_attention_dim: int
    clip_extra_context_tokens: int = 4
    clip_embeddings_dim: int = 768


class TextProjection(Pretrained):
    """diffusers' ``UnCLIPTextProjModel``: what the decoder is told (DALL·E 2, section 2.1)."""

    Config, published = TextProjectionConfig, "UnCLIPTextProjModel"

    def __init__(self, config: TextProjectionConfig) -> None:
        super().__init__()
        self.config = c = config
        common, width, tokens = (
            c.clip_embeddings_dim,
            c.cross_attention_dim,
            c.clip_extra_context_tokens,
        )
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(common))
        self.embedding_proj = nn.Linear(common, c.time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(common, c.time_embed_dim)
        self.clip_extra_context_tokens_proj = nn.Linear(common, tokens * width)
        self.encoder_hidden_states_proj = nn.Linear(common, width)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(width)

    def no_image(self, batch: int) -> Tensor:
        """The learned embedding that stands for "no picture given", (B, D)."""
        return self.learned_classifier_free_guidance_embeddings.expand(batch, -1)

    def forward(
        self, image_embedding: Tensor, text_embedding: Tensor, text_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both embeddings (B, D) and the caption's states (B, N, D), for ``ADMUNet``.

        Returns:
            context (B, 4 + N, K), and what is added to the timestep's vector (B, T).
        """
        # Trap: Karlo adds the text's embedding to the timestep too; the paper names the picture's.
        added = self.embedding_proj(text_embedding)
        added = added + self.clip_image_embeddings_project_to_time_embeddings(image_embedding)
        # Trap: the four tokens are interleaved in the projection's output, not one after another.
        tokens = self.clip_extra_context_tokens_proj(image_embedding)  # (B, K * 4)
        tokens = tokens.unflatten(1, (-1, self.config.clip_extra_context_tokens)).transpose(1, 2)
        states = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(text_states))
        return torch.cat([tokens, states], dim=1), added
