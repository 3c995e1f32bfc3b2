"""One tiny model a family, chosen so that every trap shows: stored, and moved by every fault.

A case names our class, its configuration, its inputs, and how to run ours and the stock one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from companion.adm import CROSS, PLAIN, SELF, ADMConfig, ADMUNet
from companion.autoencoder import Autoencoder, AutoencoderConfig
from companion.clip import (
    CLIPText,
    CLIPTextConfig,
    CLIPTextProjected,
    CLIPVisionConfig,
    CLIPVisionProjected,
)
from companion.prior import Prior, PriorConfig, TextProjection, TextProjectionConfig
from companion.unet import UNet, UNetConfig
from reference.oracle import noise

T = torch.tensor([1, 999, 370])


@dataclass
class Case:
    config: dict
    ours: Callable  # config -> module
    theirs: Callable  # stock, config -> module
    inputs: dict[str, torch.Tensor]
    run_ours: Callable  # module, inputs -> tuple of tensors
    run_theirs: Callable


TEXT = {
    "vocab_size": 26, "hidden_size": 12, "intermediate_size": 20, "projection_dim": 6,
    "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 8,
    "hidden_act": "quick_gelu", "bos_token_id": 22, "eos_token_id": 23, "pad_token_id": 0,
}  # fmt: skip
# Two texts that end early. Padded with 0, as Karlo pads; a word stands behind the end of one, and a
# number above the end token's before it, so that pooling anywhere else shows.
IDS = torch.tensor([[22, 5, 25, 23, 0, 7, 0, 0], [22, 4, 4, 11, 3, 23, 0, 0]])


def _text(x, projected):
    return (x.states, x.embedding if projected else x.pooled)


CASES = {
    "clip_text": Case(
        TEXT,
        lambda c: CLIPText(CLIPTextConfig(**c)),
        lambda s, c: torch.nn.ModuleDict({"text_model": s.CLIPTextModel(s.CLIPTextConfig(**c))}),
        {"ids": IDS},
        lambda m, ids: _text(m(ids), False),
        lambda m, ids: m["text_model"](ids, return_dict=False)[:2],
    ),
    # "2" in a configuration of 2022 means "the highest number".
    "clip_text_projected": Case(
        TEXT | {"eos_token_id": 2, "hidden_act": "gelu"},
        lambda c: CLIPTextProjected(CLIPTextConfig(**c)),
        lambda s, c: s.CLIPTextModelWithProjection(s.CLIPTextConfig(**c)),
        {"ids": IDS},
        lambda m, ids: _text(m(ids), True),
        lambda m, ids: m(ids, return_dict=False)[1::-1],
    ),
    "clip_vision": Case(
        {
            "image_size": 12, "patch_size": 4, "hidden_size": 12, "intermediate_size": 20,
            "projection_dim": 6, "num_hidden_layers": 2, "num_attention_heads": 3,
        },
        lambda c: CLIPVisionProjected(CLIPVisionConfig(**c)),
        lambda s, c: s.CLIPVisionModelWithProjection(s.CLIPVisionConfig(**c)),
        {"pixels": noise(1, 2, 3, 12, 12)},
        lambda m, pixels: _text(m(pixels), True),
        lambda m, pixels: m(pixels, return_dict=False)[1::-1],
    ),
    "unet": Case(
        {
            "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 12),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1, "cross_attention_dim": 6, "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
        lambda c: UNet(UNetConfig(**c)),
        lambda s, c: s.UNet2DConditionModel(**c),
        {"x": noise(1, 3, 4, 7, 6), "context": noise(2, 3, 5, 6)},
        lambda m, x, context: (m(x, T, context),),
        lambda m, x, context: m(x, T, context, return_dict=False),
    ),
    "decoder": Case(
        {
            "in_channels": 3, "out_channels": 6, "block_out_channels": (8, 12),
            "down_block_types": (PLAIN[0], CROSS[0]), "up_block_types": (CROSS[1], PLAIN[1]),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "layers_per_block": 1,
            "attention_head_dim": (2, 4), "cross_attention_dim": 6,
            "resnet_time_scale_shift": "scale_shift", "class_embed_type": "identity",
            "norm_num_groups": 4, "norm_eps": 1e-4,
        },
        lambda c: ADMUNet(ADMConfig(**c)),
        lambda s, c: s.UNet2DConditionModel(**c),
        {
            "x": noise(1, 3, 3, 8, 6), "context": noise(2, 3, 5, 6),
            "embedding": noise(3, 3, 32), "mask": torch.arange(5) < torch.tensor([[5], [1], [3]]),
        },
        lambda m, x, context, embedding, mask: (m(x, T, context, embedding, mask),),
        lambda m, x, context, embedding, mask: m(
            x, T, context, class_labels=embedding, attention_mask=mask, return_dict=False
        ),
    ),
    "upsampler": Case(
        {
            "in_channels": 6, "out_channels": 3, "block_out_channels": (8, 8),
            "down_block_types": (PLAIN[0], PLAIN[0]), "up_block_types": (PLAIN[1], PLAIN[1]),
            "layers_per_block": 1, "add_attention": False, "norm_num_groups": 4,
        },
        lambda c: ADMUNet(ADMConfig(**c)),
        lambda s, c: s.UNet2DModel(**c),
        {"x": noise(1, 3, 6, 8, 6)},
        lambda m, x: (m(x, T),),
        lambda m, x: m(x, T, return_dict=False),
    ),
    "pixels": Case(
        {
            "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8),
            "down_block_types": (PLAIN[0], SELF[0]), "up_block_types": (SELF[1], PLAIN[1]),
            "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 4,
            "downsample_type": "resnet", "upsample_type": "resnet", "num_class_embeds": 10,
        },
        lambda c: ADMUNet(ADMConfig(**c)),
        lambda s, c: s.UNet2DModel(**c),
        {"x": noise(1, 3, 1, 8, 8), "labels": torch.tensor([9, 0, 4])},
        lambda m, x, labels: (m(x, T, embedding=labels),),
        lambda m, x, labels: m(x, T, class_labels=labels, return_dict=False),
    ),
    "autoencoder": Case(
        {
            "block_out_channels": (8, 12), "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1,
            "latent_channels": 4, "norm_num_groups": 4,
        },
        lambda c: Autoencoder(AutoencoderConfig(**c)),
        lambda s, c: s.AutoencoderKL(**c),
        {"x": noise(1, 2, 3, 9, 8), "z": noise(2, 2, 4, 4, 5)},
        lambda m, x, z: (m.encode(x).mean, m.encode(x).std, m.decode(z)),
        lambda m, x, z: (
            m.encode(x).latent_dist.mean, m.encode(x).latent_dist.std, m.decode(z).sample,
        ),
    ),
    "prior": Case(
        {
            "num_attention_heads": 3, "attention_head_dim": 4, "num_layers": 2,
            "embedding_dim": 6, "num_embeddings": 5,
        },
        lambda c: Prior(PriorConfig(**c)),
        lambda s, c: s.PriorTransformer(**c),
        {
            "x": noise(1, 3, 6), "words": noise(2, 3, 6), "states": noise(3, 3, 5, 6),
            "mask": torch.arange(5) < torch.tensor([[5], [2], [3]]),
        },
        lambda m, x, words, states, mask: (m(x, T, words, states, mask), m.restore(x)),
        lambda m, x, words, states, mask: (
            m(x, T, words, states, mask, return_dict=False)[0], m.post_process_latents(x),
        ),
    ),
    "text_proj": Case(
        {
            "time_embed_dim": 8, "cross_attention_dim": 6, "clip_embeddings_dim": 5,
            "clip_extra_context_tokens": 4,
        },
        lambda c: TextProjection(TextProjectionConfig(**c)),
        lambda s, c: s.UnCLIPTextProjModel(**c),
        {"picture": noise(1, 2, 5), "words": noise(2, 4, 5), "states": noise(3, 4, 7, 5)},
        lambda m, picture, words, states: m(
            torch.cat([m.no_image(2), picture]), words, states
        ),
        lambda m, picture, words, states: m(
            image_embeddings=picture, prompt_embeds=words, text_encoder_hidden_states=states,
            do_classifier_free_guidance=True,
        ),
    ),
}  # fmt: skip
