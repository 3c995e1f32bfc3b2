"""Checks for chapter 14, The real thing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number


@exercise("14.1")
def _block_parameters(answer: object) -> None:
    """block_parameters(c_in, c_out, T): of a residual block, against one that is built."""
    from companion.resnet import ResnetBlock

    block_parameters = a_function(answer)
    for c_in, c_out, T in ((320, 320, 1280), (320, 640, 1280), (96, 32, 128), (64, 64, 512)):
        with torch.device("meta"):
            block = ResnetBlock(c_in, c_out, T)
        wanted = sum(p.numel() for p in block.parameters())
        got = block_parameters(c_in, c_out, T)
        same_number(f"The count for {c_in} → {c_out} channels", got, wanted, 0.5)


@exercise("14.2")
def _fewer(answer: object) -> None:
    """fewer(f, c): numbers in a picture over numbers in its latent, counted on tensors."""
    fewer = a_function(answer)
    for f, c in ((8, 4), (4, 3), (16, 16), (8, 16), (2, 2)):
        picture, latent = torch.empty(3, 32, 48), torch.empty(c, 32 // f, 48 // f)
        wanted = picture.numel() / latent.numel()
        same_number(f"The ratio for f = {f}, c = {c}", fewer(f, c), wanted, 1e-6 * wanted)


@exercise("14.3")
def _scale_factor(answer: object) -> None:
    """scale_factor(latents): what brings them all together to a standard deviation of one."""
    scale_factor = a_function(answer)
    g = torch.Generator().manual_seed(143)
    for size, centre in ((5.49, 0.0), (0.25, 0.3), (2.0, -4.0)):
        spread = torch.tensor([0.5, 1.0, 1.5, 3.0]).view(1, 4, 1, 1)  # channels differ
        latents = centre + size * spread * torch.randn(8, 4, 8, 8, generator=g)
        got = scale_factor(latents)
        if isinstance(got, torch.Tensor) and got.numel() != 1:
            raise NotYet(f"The factor has shape {tuple(got.shape)}; expected one number for all.")
        same_number("The factor", got, 1 / latents.std().item(), 1e-3 / latents.std().item())


@exercise("14.4")
def _culprit(answer: object) -> None:
    """culprit(one, other): the part with an altered weight, not the one that is spelled anew."""
    culprit = a_function(answer)
    with tempfile.TemporaryDirectory() as place:
        for altered in ("unet", "text_encoder", "vae"):
            one, other = (Path(place) / altered / name for name in ("one", "other"))
            _write_pair(one, other, altered)
            got = culprit(one, other)
            if got != altered:
                said = f"{got!r:.40}" if isinstance(got, str) else type(got).__name__
                raise NotYet(f"Your answer is {said}, where the {altered}'s weight was altered.")


def _write_pair(one: Path, other: Path, altered: str) -> None:
    """Two small folders: a weight altered, and the autoencoder's attention in 2022's spelling."""
    from companion import checkpoints
    from companion.autoencoder import Autoencoder, AutoencoderConfig
    from companion.clip import CLIPText, CLIPTextConfig
    from companion.unet import UNet, UNetConfig

    g = torch.Generator().manual_seed(144)
    text = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    small = UNetConfig(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
    )
    parts = {
        "text_encoder": CLIPText.fresh(text, g),
        "unet": UNet.fresh(small, g),
        "vae": Autoencoder.fresh(AutoencoderConfig(block_out_channels=(32,)), g),
    }
    for name, part in parts.items():
        part.save_pretrained(one / name)
    with torch.no_grad():
        list(parts[altered].parameters())[-1].view(-1)[0] += 0.01
    for name, part in parts.items():
        part.save_pretrained(other / name)
    path = other / "vae" / Autoencoder.filename
    then = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = parts["vae"].state_dict()
    for now, old in then.items():
        tensors = {name.replace(f".{now}.", f".{old}."): x for name, x in tensors.items()}
    checkpoints.write_tensors(path, tensors)
