"""The published implementations, and how closely ours must follow them.

Nothing here imports diffusers or transformers at the top: they cost ten seconds, so ``stock`` does
it once, quietly, and only when a test asks.
"""

import functools
import importlib
import os
import warnings
from types import SimpleNamespace

import torch
from torch import nn

TOLERANCE = 1e-9  # of the greatest value; float64 rounding is about 1e-15 a step


STOCK = {
    "diffusers.models.autoencoders.autoencoder_kl": ["AutoencoderKL"],
    "diffusers.models.transformers.prior_transformer": ["PriorTransformer"],
    "diffusers.models.unets.unet_2d": ["UNet2DModel"],
    "diffusers.models.unets.unet_2d_condition": ["UNet2DConditionModel"],
    "diffusers.pipelines.deprecated.unclip.text_proj": ["UnCLIPTextProjModel"],
    "transformers": [
        "CLIPConfig",
        "CLIPModel",
        "CLIPTextConfig",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "CLIPTokenizer",
        "CLIPVisionConfig",
        "CLIPVisionModelWithProjection",
    ],
}


@functools.cache
def stock() -> SimpleNamespace:
    """The stock classes, imported from their submodules with the libraries' own warnings hushed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = SimpleNamespace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, names in STOCK.items():
            loaded = importlib.import_module(module)
            for name in names:
                setattr(found, name, getattr(loaded, name))
        for library in ("diffusers", "transformers"):
            logging = importlib.import_module(f"{library}.utils.logging")
            logging.set_verbosity_error()
            logging.disable_progress_bar()
    return found


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew, in float64: those that start at zero or one would hide faults."""
    g = torch.Generator().manual_seed(seed)
    model.double().eval()
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
        if name.endswith("logit_scale"):
            p.data = 1.5 + 0.1 * noise
        elif p.ndim < 2 or "embedding" in name.rsplit(".", 1)[-1]:
            p.data = 0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            p.data = noise / p[0].numel() ** 0.5
    return model


def pair(ours: nn.Module, theirs: nn.Module, seed: int) -> tuple[nn.Module, nn.Module]:
    """Two models with the same random parameters under the same names, none left over."""
    randomise(theirs, seed)
    ours.double().eval().load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The greatest difference of any element, as a share of the greatest value (at least 1)."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert ours.dtype == theirs.dtype == torch.float64
    scale = max(1.0, theirs.abs().max().item())
    assert 1e-3 < theirs.std().item() < 1e6, "an output that says nothing proves nothing"
    return (ours - theirs).abs().max().item() / scale


def agree(ours, theirs, run_ours, run_theirs, inputs: dict[str, torch.Tensor]) -> None:
    """Outputs agree element by element, and so do the gradients of every parameter and input.

    ``run_*`` take the inputs by name and give a tuple of tensors.
    """
    grads = []
    results = []
    for model, run in ((ours, run_ours), (theirs, run_theirs)):
        leaves = {
            k: v.clone().requires_grad_(True) if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        model.zero_grad()
        out = run(**leaves)
        g = torch.Generator().manual_seed(7)
        # A random direction: with a plain sum, errors of opposite sign would cancel.
        loss = sum((y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum() for y in out)
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters()}
        found |= {f"input {k}": v.grad for k, v in leaves.items() if torch.is_tensor(v)}
        grads.append({n: x for n, x in found.items() if x is not None})
        results.append(out)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert distance(a.detach(), b.detach()) < TOLERANCE, f"output {i}"
    assert grads[0].keys() == grads[1].keys()
    # A gradient of zero would agree with anything. (A key's bias never has one: softmax ignores it.
    # Nor have queries and keys where a picture has shrunk to one place.)
    silent = [n for n, x in grads[1].items() if x.abs().max() < 1e-12]
    assert all("to_k" in n or "to_q" in n or "k_proj.bias" in n for n in silent), silent
    for name in grads[0]:
        a, b = grads[0][name], grads[1][name]
        scale = max(1.0, b.abs().max().item())
        assert (a - b).abs().max().item() / scale < TOLERANCE, f"gradient of {name}"


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
