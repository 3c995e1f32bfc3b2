"""CLIP: a tower for pictures and one for words, ending in one space (Radford et al. 2021).

Letters: B pictures or texts, N tokens (77 at life size), P = (size / patch)² patches, C the width
of a tower, D the width of the common space.

Parts of CLIP serve as text or picture encoder in other systems, under their published names:
``CLIPText`` in Stable Diffusion, ``CLIPTextProjected`` and ``CLIPVisionProjected`` in Karlo.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.attention import MultiHead
from companion.pretrained import TransformersModel

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels that OpenAI trained on
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPTextConfig:
    """``config.json`` of a text tower, or ``text_config`` in that of a whole CLIP."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1


@dataclass(frozen=True)
class CLIPVisionConfig:
    """``config.json`` of a picture tower, or ``vision_config`` in that of a whole CLIP."""

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class CLIPConfig:
    """``config.json`` of a whole CLIP."""

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # log(1 / 0.07)
    text_config_dict: Mapping | None = None  # older files say some things twice
    vision_config_dict: Mapping | None = None

    def __post_init__(self) -> None:
        for name in ("text_config", "vision_config"):
            for key, value in (getattr(self, f"{name}_dict") or {}).items():
                if value != getattr(getattr(self, name), key, value):
                    raise ValueError(f"{name}_dict says {key} = {value!r} and {name} does not.")


class Encoded(NamedTuple):
    """What a tower makes of its input."""

    states: Tensor  # (B, N, C) one vector a token; of the picture tower (B, 1 + P, C), not normed
    pooled: Tensor  # (B, C) the one that stands for all: at the end token, or at the class token
    embedding: Tensor | None = None  # (B, D) pooled, projected into the common space, any length


class CLIPAttention(MultiHead):
    """Attention with the names that CLIP's files use."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(heads)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(self.attend(q, k, v, causal=causal))


class CLIPMLP(nn.Module):
    """Each token by itself through a wider layer."""

    def __init__(self, width: int, hidden: int, act: str) -> None:
        super().__init__()
        self.quick = act == "quick_gelu"
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        # Trap: OpenAI's GELU is an approximation, off by up to 0.02, and the weights rely on it.
        h = h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h)
        return self.fc2(h)


class CLIPLayer(nn.Module):
    """Look around, then think: (B, N, C) -> (B, N, C)."""

    def __init__(self, c: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = CLIPAttention(c.hidden_size, c.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = CLIPMLP(c.hidden_size, c.intermediate_size, c.hidden_act)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


def _encoder(c: CLIPTextConfig | CLIPVisionConfig) -> nn.ModuleDict:
    layers = nn.ModuleList(CLIPLayer(c) for _ in range(c.num_hidden_layers))
    return nn.ModuleDict({"layers": layers})


class TextTower(nn.Module):
    """Words to states: a Transformer in which each token looks back only."""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.config = c
        words = nn.Embedding(c.vocab_size, c.hidden_size)
        places = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        nn.init.normal_(words.weight, std=0.02)  # small, as OpenAI began; torch's own 1 is too much
        nn.init.normal_(places.weight, std=0.01)
        self.embeddings = nn.ModuleDict({"token_embedding": words, "position_embedding": places})
        self.encoder = _encoder(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, ids: Tensor) -> Encoded:
        """ids (B, N) -> states (B, N, C), pooled (B, C)."""
        c = self.config
        if ids.ndim != 2 or ids.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"ids have shape {tuple(ids.shape)}; expected (B, N) with N at most"
                f" {c.max_position_embeddings}. The tokenizer of the same folder makes them."
            )
        # No mask hides the padding: it stands behind the end token, and nothing before looks there.
        x = self.embeddings["token_embedding"](ids)
        x = x + self.embeddings["position_embedding"].weight[: ids.shape[1]]
        for layer in self.encoder["layers"]:
            x = layer(x, causal=True)
        x = self.final_layer_norm(x)
        return Encoded(x, x[torch.arange(len(x), device=x.device), self._end(ids)])

    def _end(self, ids: Tensor) -> Tensor:
        """Where each text ends, (B,): its first end token."""
        if self.config.eos_token_id == 2:  # trap: old files say 2 and mean "the highest id"
            return ids.argmax(dim=1)
        ends = ids == self.config.eos_token_id
        if not bool(ends.any(dim=1).all()):  # trap: stock would quietly pool the first token
            raise ValueError(
                f"a text has no end token {self.config.eos_token_id}; ids and model belong to"
                " different tokenizers, or eos_token_id is missing from config.json."
            )
        return ends.int().argmax(dim=1)


class PatchEmbedding(nn.Module):
    """A picture as a row of tokens: one for itself, then its patches row by row."""

    def __init__(self, c: CLIPVisionConfig) -> None:
        super().__init__()
        self.size, patch = c.image_size, c.patch_size
        self.class_embedding = nn.Parameter(torch.empty(c.hidden_size))
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, patch, patch, bias=False)
        self.position_embedding = nn.Embedding((self.size // patch) ** 2 + 1, c.hidden_size)
        for table in (self.class_embedding, self.position_embedding.weight):
            nn.init.normal_(table, std=c.hidden_size**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[2:] != (self.size, self.size):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}; expected (B, channels, {self.size},"
                f" {self.size}): resize the pictures first."
            )
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, C)
        first = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat([first, x], dim=1) + self.position_embedding.weight  # (B, 1 + P, C)


class VisionTower(nn.Module):
    """Pictures to states: a Vision Transformer (Dosovitskiy et al. 2021) that looks everywhere."""

    def __init__(self, c: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbedding(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)  # misspelt in every file
        self.encoder = _encoder(c)
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Encoded:
        """pixels (B, 3, H, W) -> states (B, 1 + P, C), pooled (B, C)."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder["layers"]:
            x = layer(x, causal=False)
        return Encoded(x, self.post_layernorm(x[:, 0]))  # trap: only the pooled state is normed


class CLIPText(TransformersModel):
    """The text tower alone: Stable Diffusion 1.x looks at its states, all 77 of them."""

    Config, published, model_type = CLIPTextConfig, "CLIPTextModel", "clip_text_model"

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)

    def forward(self, ids: Tensor) -> Encoded:
        """ids (B, N) -> states (B, N, C), pooled (B, C)."""
        return self.text_model(ids)


class CLIPTextProjected(CLIPText):
    """The text tower with its way into the common space: Karlo's text encoder."""

    published = "CLIPTextModelWithProjection"

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> Encoded:
        """ids (B, N) -> states (B, N, C), pooled (B, C), embedding (B, D)."""
        x = self.text_model(ids)
        return x._replace(embedding=self.text_projection(x.pooled))


class CLIPVisionProjected(TransformersModel):
    """The picture tower with its way into the common space: Karlo's image encoder."""

    Config, published = CLIPVisionConfig, "CLIPVisionModelWithProjection"
    model_type = "clip_vision_model"

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Encoded:
        """pixels (B, 3, H, W), normalised -> states, pooled, embedding (B, D)."""
        x = self.vision_model(pixels)
        return x._replace(embedding=self.visual_projection(x.pooled))


class CLIP(TransformersModel):
    """Both towers, and how sharply to compare them."""

    Config, published, model_type = CLIPConfig, "CLIPModel", "clip"

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        text, vision, common = config.text_config, config.vision_config, config.projection_dim
        self.text_model = TextTower(text)
        self.vision_model = VisionTower(vision)
        self.text_projection = nn.Linear(text.hidden_size, common, bias=False)
        self.visual_projection = nn.Linear(vision.hidden_size, common, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, N) -> (B, D), projected, not normalised."""
        return self.text_projection(self.text_model(ids).pooled)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W), normalised (``normalise``) -> (B, D), projected, not normalised."""
        return self.visual_projection(self.vision_model(pixels).pooled)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """How well each picture (row) fits each text (column): cosine / temperature."""
        words = F.normalize(self.encode_text(ids), dim=-1)
        pictures = F.normalize(self.encode_image(pixels), dim=-1)
        return self.logit_scale.exp() * pictures @ words.T  # (B_pictures, B_texts); CLIP, figure 3


def contrastive_loss(logits: Tensor, also_true: Tensor | None = None) -> Tensor:
    """Picture i belongs to text i and to no other of the batch, both ways (CLIP, figure 3).

    Args:
        logits: How well each picture (row) fits each text (column), (B, B).
        also_true: Bool (B, B): pairs that fit although chance did not draw them together, such as
            one caption that came twice. They are no wrong answers, so they are left out of the
            choice. CLIP's authors let them stand.
    """
    here = torch.arange(len(logits), device=logits.device)
    if also_true is not None:
        own = here[:, None] == here
        logits = logits.masked_fill(also_true & ~own, float("-inf"))
    return (F.cross_entropy(logits, here) + F.cross_entropy(logits.T, here)) / 2


def normalise(
    pictures: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Tensor:
    """Pictures in [0, 1], (B, 3, H, W), as the picture tower wants them."""
    shift, scale = (torch.tensor(v, dtype=pictures.dtype)[:, None, None] for v in (mean, std))
    return (pictures - shift.to(pictures.device)) / scale.to(pictures.device)


def halves(clip: CLIP) -> tuple[CLIPTextProjected, CLIPVisionProjected]:
    """Both towers with their ways into the common space, as two modules of CLIP's own weights."""
    with torch.device("meta"):
        words = CLIPTextProjected(clip.config.text_config)
        pictures = CLIPVisionProjected(clip.config.vision_config)
    weights = clip.state_dict()
    for half in (words, pictures):
        own = {name: weights[name] for name in half.state_dict()}
        half.load_state_dict(own, assign=True)
        half.eval().requires_grad_(False)
    return words, pictures


def with_words(clip: CLIP, words: CLIPText) -> CLIP:
    """The same CLIP with another text tower in its place; all else is shared, not copied."""
    other = copy(clip)
    other._modules = {**clip._modules, "text_model": words.text_model}
    return other
