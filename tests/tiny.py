"""Whole systems of our own, as small as they can be, with random weights."""

from pathlib import Path

import torch

from companion.adm import CROSS, PLAIN, ADMConfig, ADMUNet
from companion.autoencoder import Autoencoder, AutoencoderConfig
from companion.clip import (
    CLIP,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPTextProjected,
    CLIPVisionConfig,
    CLIPVisionProjected,
    halves,
    with_words,
)
from companion.dalle2 import DALLE2
from companion.imagen import SCHEDULER, SUPER_RES_SCHEDULER, Imagen
from companion.preparation import Preparation
from companion.prior import Prior, PriorConfig, TextProjection, TextProjectionConfig
from companion.schedule import Schedule
from companion.scheduler import Scheduler
from companion.stable_diffusion import StableDiffusion
from companion.tokenizer import Tokenizer
from companion.unet import UNet, UNetConfig

DDIM = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
UNCLIP = {"_class_name": "UnCLIPScheduler", "variance_type": "fixed_small_log"}
D = 8  # width of CLIP's space and of all text


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """The last layers of a fresh U-Net are zero: give them something to say."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if not p.any():
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    return model.eval()


def words() -> Tokenizer:
    return Tokenizer.train(["a red house by the sea"], size=530, context=12)


def text(tokenizer: Tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=D, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, eos_token_id=tokenizer.end_id,
        projection_dim=D,
    )  # fmt: skip


def eye(g: torch.Generator) -> dict:
    config = CLIPVisionConfig(
        image_size=8, patch_size=4, hidden_size=D, intermediate_size=8, projection_dim=D,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    encoder = CLIPVisionProjected.fresh(config, g).eval()
    return {"image_encoder": encoder, "feature_extractor": Preparation.usual(8)}


def stable_diffusion(seeing: bool = False) -> StableDiffusion:
    """8x8 pixels by way of 4x4 latents."""
    g = torch.Generator().manual_seed(0)
    tokenizer = words()
    unet = UNetConfig(
        sample_size=4, block_out_channels=(8, 8), cross_attention_dim=D, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderConfig(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    return StableDiffusion(
        scheduler=Scheduler.of(Schedule.scaled_linear(), DDIM),
        text_encoder=CLIPText.fresh(text(tokenizer), g).eval(),
        tokenizer=tokenizer,
        unet=lively(UNet.fresh(unet, g)),
        vae=lively(Autoencoder.fresh(vae, g)),
        **(eye(g) if seeing else {}),
    )


def upsampler(g: torch.Generator, size: int) -> ADMUNet:
    config = ADMConfig(
        in_channels=6, out_channels=3, block_out_channels=(8, 8), down_block_types=(PLAIN[0],) * 2,
        up_block_types=(PLAIN[1],) * 2, add_attention=False, layers_per_block=1,
        norm_num_groups=4, sample_size=size,
    )  # fmt: skip
    return lively(ADMUNet.fresh(config, g))


def imagen() -> Imagen:
    """8x8 pixels, then 16x16, told by states of words."""
    g = torch.Generator().manual_seed(0)
    tokenizer = words()

    def unet(channels: int, size: int, **told) -> ADMUNet:
        config = ADMConfig(
            in_channels=channels, out_channels=3, block_out_channels=(8, 8),
            down_block_types=(PLAIN[0], CROSS[0]), up_block_types=(CROSS[1], PLAIN[1]),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=D,
            resnet_time_scale_shift="scale_shift", layers_per_block=1, attention_head_dim=4,
            norm_num_groups=4, sample_size=size, **told,
        )  # fmt: skip
        return lively(ADMUNet.fresh(config, g))

    projected = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": D}
    return Imagen(
        scheduler=Scheduler.of(Schedule.cosine(), SCHEDULER),
        super_res=unet(6, 16, class_embed_type="timestep"),
        super_res_scheduler=Scheduler.of(Schedule.cosine(), SUPER_RES_SCHEDULER),
        text_encoder=CLIPText.fresh(text(tokenizer), g).eval(),
        tokenizer=tokenizer,
        unet=unet(3, 8, **projected),
    )


OWN = {
    "prior": "prior",
    "decoder": "decoder",
    "text_proj": "decoder/text_proj",
    "super_res_first": "upsampler-64",
    "super_res_second": "upsampler-256",
}


def dalle2(second: bool = True) -> DALLE2:
    """8x8 pixels, then 16x16, then 32x32; from words and from pictures."""
    g = torch.Generator().manual_seed(0)
    tokenizer = words()
    decoder = ADMConfig(
        in_channels=3, out_channels=6, block_out_channels=(8, 8),
        down_block_types=(PLAIN[0], "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", PLAIN[1]),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=12,
        class_embed_type="identity", resnet_time_scale_shift="scale_shift", layers_per_block=1,
        attention_head_dim=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    once = Scheduler.of(Schedule.cosine(), UNCLIP)
    more = {"super_res_second": upsampler(g, 32), "super_res_second_scheduler": once}
    return DALLE2(
        decoder=lively(ADMUNet.fresh(decoder, g)),
        decoder_scheduler=Scheduler.of(
            Schedule.cosine(), UNCLIP | {"variance_type": "learned_range"}
        ),
        prior=lively(Prior.fresh(PriorConfig(2, 4, 1, D, 12), g)),
        prior_scheduler=Scheduler.of(
            Schedule.cosine(), UNCLIP | {"prediction_type": "sample", "clip_sample_range": 5.0}
        ),
        super_res_first=upsampler(g, 16),
        super_res_last=upsampler(g, 16),
        super_res_scheduler=once,
        text_encoder=CLIPTextProjected.fresh(text(tokenizer), g).eval(),
        text_proj=lively(TextProjection.fresh(TextProjectionConfig(32, 12, 4, D), g)),
        tokenizer=tokenizer,
        **eye(g),
        **(more if second else {}),
    )  # fmt: skip


def storybook(root: Path) -> DALLE2:
    """The book's own DALL·E 2 as the recipes leave it: one folder each, and a whole CLIP."""
    made = dalle2()
    c = made.text_encoder.config
    whole = CLIP(CLIPConfig(c, made.image_encoder.config, c.projection_dim))
    made.text_encoder, made.image_encoder = halves(whole)
    made.super_res_last = made.super_res_first
    for name, part in OWN.items():
        getattr(made, name).save_pretrained(root / part)
    words = CLIPText(c)
    words.text_model.load_state_dict(whole.text_model.state_dict())
    words.save_pretrained(root / "text-encoder")
    own = with_words(whole, CLIPText(c))  # whose text tower was taught on since, and nothing else
    for part in (own, made.tokenizer, made.feature_extractor):
        part.save_pretrained(root / "clip")
    return made
