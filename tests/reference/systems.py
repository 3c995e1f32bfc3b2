"""Tiny folders of whole systems, as stock writes them today and as they were published."""

import contextlib
import functools
import importlib
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from companion.pretrained import Pretrained
from companion.schedule import Schedule
from companion.tokenizer import Tokenizer
from reference import published
from reference.oracle import randomise, stock

CAPTIONS = [
    "a red house by the sea at dusk",
    "a small boat on a stream flowing through the woods",
    "two mushrooms in the snow under a moon",
]
CONTEXT = 18  # 18 + 4 tokens differ from the places of every attention level (a trap of stock)
PIPELINES = {
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": "StableDiffusionPipeline",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img": (
        "StableDiffusionImg2ImgPipeline"
    ),
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint": (
        "StableDiffusionInpaintPipeline"
    ),
    "diffusers.pipelines.deprecated.unclip.pipeline_unclip": "UnCLIPPipeline",
    "diffusers.pipelines.deprecated.unclip.pipeline_unclip_image_variation": (
        "UnCLIPImageVariationPipeline"
    ),
}
SCHEDULERS = {
    "ddpm": "ddpm.DDPMScheduler",
    "ddim": "ddim.DDIMScheduler",
    "euler": "euler_discrete.EulerDiscreteScheduler",
    "dpmpp_2m": "dpmsolver_multistep.DPMSolverMultistepScheduler",
    "pndm": "pndm.PNDMScheduler",
    "unclip": "unclip.UnCLIPScheduler",
}


@functools.cache
def pipelines() -> SimpleNamespace:
    """The stock pipelines and schedulers, and the modules of the latter, imported quietly."""
    found = SimpleNamespace(modules={}, **vars(stock()))
    with quiet():
        for module, name in PIPELINES.items():
            setattr(found, name, getattr(importlib.import_module(module), name))
        for name, where in SCHEDULERS.items():
            module, _, cls = where.partition(".")
            loaded = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
            found.modules[name] = loaded
            setattr(found, cls, getattr(loaded, cls))
        import diffusers.pipelines
        import diffusers.pipelines.deprecated.unclip as unclip
        from transformers import CLIPImageProcessor

        # Trap: without this, stock's own UnCLIPPipeline opens no folder, not even its own.
        diffusers.pipelines.unclip = unclip
        found.CLIPImageProcessor = CLIPImageProcessor
    return found


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tokenizer(pad: str = "<|endoftext|>") -> Tokenizer:
    return Tokenizer.train(CAPTIONS, size=560, context=CONTEXT, pad=pad)


def text_config(base: dict, words: Tokenizer, width: int) -> dict:
    return base | {
        "hidden_size": width, "intermediate_size": 40, "num_attention_heads": 3,
        "num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": CONTEXT,
    }  # fmt: skip


SD = {
    "unet": published.SD_UNET
    | {"block_out_channels": [32, 64, 96, 64], "cross_attention_dim": 24, "sample_size": 4},
    "vae": published.SD_AUTOENCODER | {"block_out_channels": [32, 64, 32, 64], "sample_size": 32},
}
SD_SCHEDULER = {  # CompVis/stable-diffusion-v1-4
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    "clip_sample": False,
}  # fmt: skip
SD_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.2.2",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


def build(cls: type, config: dict, seed: int):
    """A stock model with every parameter randomised, in float64."""
    with quiet():
        plain = {k: v for k, v in config.items() if not k.startswith("_")}
        if cls.__name__.startswith("CLIP"):
            kind = "Vision" if "Vision" in cls.__name__ else "Text"
            model = cls(getattr(stock(), f"CLIP{kind}Config")(**plain))
        else:
            model = cls(**plain)
    return randomise(model, seed)


def stable_diffusion(channels: int = 4) -> dict[str, torch.nn.Module]:
    """Stock's parts of a tiny Stable Diffusion, configured as the published one."""
    s = pipelines()
    parts = {
        "text_encoder": build(s.CLIPTextModel, text_config(published.SD_TEXT, tokenizer(), 24), 1),
        "unet": build(s.UNet2DConditionModel, SD["unet"] | {"in_channels": channels}, 2),
        "vae": build(s.AutoencoderKL, SD["vae"], 3),
    }
    with torch.no_grad():  # pictures that are neither flat nor saturated, latents of about size 1
        parts["vae"].decoder.conv_out.weight *= 0.5
        parts["vae"].decoder.conv_out.bias *= 0.5
        parts["vae"].quant_conv.weight *= 1.5
    return parts


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def old_names(name: str) -> str:
    """Today's attention names of the autoencoder as they were until diffusers 0.17."""
    for now, then in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        name = re.sub(rf"(attentions\.\d+)\.{re.escape(now)}\.", rf"\1.{then}.", name)
    return name


def write_published(
    root: Path, index: dict, configs: dict, parts: dict, schedulers: dict, words: Tokenizer
) -> Path:
    """A folder as it was published: 2022's keys, names and files."""
    write_json(root / "model_index.json", index)
    for name, config in schedulers.items():
        write_json(root / name / "scheduler_config.json", config)
    words.save_pretrained(root / "tokenizer")
    for name, part in parts.items():
        write_json(root / name / "config.json", configs[name])
        clip = name in ("text_encoder", "image_encoder")
        tensors = part.state_dict()
        if configs[name].get("architectures") == ["CLIPTextModel"]:
            tensors = {
                k if k.startswith("text_model.") else f"text_model.{k}": v
                for k, v in tensors.items()
            }
            tensors["text_model.embeddings.position_ids"] = torch.arange(CONTEXT)[None]
        if name == "vae":
            tensors = {old_names(k): v for k, v in tensors.items()}
        file = "model.safetensors" if clip else "diffusion_pytorch_model.safetensors"
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        save_file(tensors, root / name / file, metadata={"format": "pt"})
    return root


def corrupt(folder: Path, to: Path, what: str, part: str) -> Path:
    """A copy of a folder with one part spoilt."""
    shutil.copytree(folder, to)
    weights = next((to / part).glob("*.safetensors"), None)
    config = next((to / part).glob("*config.json"), None)
    if what == "no weights":
        weights.unlink()
    elif what == "no config":
        config.unlink()
    elif what == "no folder":
        shutil.rmtree(to / part)
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif what == "shape":
        tensors = load_file(weights)
        name = next(k for k, v in tensors.items() if v.ndim > 1)
        tensors[name] = tensors[name][1:].contiguous()
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "altered":
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    elif what == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif what == "setting":
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"some_new_setting": 3}))
    return to


def perturb(part: Pretrained | torch.nn.Module) -> None:
    """Move every parameter a little."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in part.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=g, dtype=p.dtype)


# --- Karlo ---------------------------------------------------------------------------------------

COMMON = 24  # width of CLIP's space, of the text states and of the prior's embeddings
KARLO = {
    "prior": published.KARLO_PRIOR
    | {
        "attention_head_dim": 8, "embedding_dim": COMMON, "num_attention_heads": 3,
        "num_embeddings": CONTEXT, "num_layers": 2,
    },
    "decoder": published.KARLO_DECODER
    | {
        "attention_head_dim": 16, "block_out_channels": [32, 64, 96, 64],
        "cross_attention_dim": 40, "layers_per_block": 1, "sample_size": 16,
    },
    "super_res_first": published.KARLO_UPSAMPLER
    | {"block_out_channels": [32, 64, 96, 64], "layers_per_block": 1, "sample_size": 32},
    "text_proj": published.KARLO_TEXT_PROJ
    | {"clip_embeddings_dim": COMMON, "cross_attention_dim": 40, "time_embed_dim": 128},
    "image_encoder": {
        k: v
        for k, v in published.CLIP_L14["vision_config"].items()
        if k not in ("architectures", "torch_dtype")
    }
    | {
        "architectures": ["CLIPVisionModelWithProjection"], "hidden_size": 36,
        "image_size": 28, "intermediate_size": 40, "num_attention_heads": 3,
        "num_hidden_layers": 2, "patch_size": 14, "projection_dim": COMMON,
    },
}  # fmt: skip
KARLO["super_res_last"] = KARLO["super_res_first"]
_UNCLIP = {
    "_class_name": "UnCLIPScheduler", "_diffusers_version": "0.10.0.dev0", "clip_sample": True,
    "clip_sample_range": 1.0, "num_train_timesteps": 1000, "prediction_type": "epsilon",
}  # fmt: skip
KARLO_SCHEDULERS = {
    "prior_scheduler": _UNCLIP
    | {"clip_sample_range": 5.0, "prediction_type": "sample", "variance_type": "fixed_small_log"},
    "decoder_scheduler": _UNCLIP | {"variance_type": "learned_range"},
    "super_res_scheduler": _UNCLIP | {"variance_type": "fixed_small_log"},
}
KARLO_EYE = {
    "crop_size": {"height": 28, "width": 28}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 28},
}  # fmt: skip
KARLO_INDEX = {
    "decoder": ["diffusers", "UNet2DConditionModel"],
    "decoder_scheduler": ["diffusers", "UnCLIPScheduler"],
    "super_res_first": ["diffusers", "UNet2DModel"],
    "super_res_last": ["diffusers", "UNet2DModel"],
    "super_res_scheduler": ["diffusers", "UnCLIPScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_proj": ["unclip", "UnCLIPTextProjModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
KARLO_TEXT_INDEX = KARLO_INDEX | {
    "_class_name": "UnCLIPPipeline", "_diffusers_version": "0.10.0.dev0",
    "prior": ["diffusers", "PriorTransformer"],
    "prior_scheduler": ["diffusers", "UnCLIPScheduler"],
}  # fmt: skip
KARLO_IMAGE_INDEX = KARLO_INDEX | {
    "_class_name": "UnCLIPImageVariationPipeline", "_diffusers_version": "0.10.0.dev0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
}  # fmt: skip


def karlo_configs() -> dict[str, dict]:
    words = text_config(published.SD_TEXT, tokenizer("!"), COMMON)
    words |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": COMMON}
    return KARLO | {"text_encoder": words}


def karlo() -> dict[str, torch.nn.Module]:
    """Stock's parts of a tiny Karlo, for text and for variations."""
    s, configs = pipelines(), karlo_configs()
    classes = {
        "prior": s.PriorTransformer,
        "decoder": s.UNet2DConditionModel,
        "super_res_first": s.UNet2DModel,
        "super_res_last": s.UNet2DModel,
        "text_encoder": s.CLIPTextModelWithProjection,
        "text_proj": s.UnCLIPTextProjModel,
        "image_encoder": s.CLIPVisionModelWithProjection,
    }
    return {n: build(cls, configs[n], 11 + i) for i, (n, cls) in enumerate(classes.items())}


def write_karlo(root: Path, parts: dict, images: bool) -> Path:
    """Karlo's folder for text, or the one for variations, as published."""
    index = KARLO_IMAGE_INDEX if images else KARLO_TEXT_INDEX
    here = {n: p for n, p in parts.items() if n in index}
    steps = {n: c for n, c in KARLO_SCHEDULERS.items() if n in index}
    write_published(root, index, karlo_configs(), here, steps, tokenizer("!"))
    if images:
        write_json(root / "feature_extractor" / "preprocessor_config.json", KARLO_EYE)
    return root


def exactly(scheduler):
    """A stock scheduler with our float64 table of the cosine."""
    table = Schedule.cosine()
    scheduler.betas, scheduler.alphas = table.betas, 1 - table.betas
    scheduler.alphas_cumprod = table.alphas_cumprod
    scheduler.one = torch.ones((), dtype=torch.float64)
    return scheduler


def exact(pipe):
    """Give a stock unCLIP pipeline's schedulers that table, and stop its progress bars."""
    for name in KARLO_SCHEDULERS:
        if scheduler := getattr(pipe, name, None):
            exactly(scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
