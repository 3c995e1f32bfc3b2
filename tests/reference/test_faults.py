# ruff: noqa: E501 (one fault a line)
"""Would the equality tests notice? Each known mistake is planted in our source, and must show.

A fault is one edit of one file of ``companion``: the text as it stands, and as someone might have
written it. The edited code runs on the stored parameters (all of them random), and its answers
must differ from the stored ones by a thousand times what equality allows.
"""

import importlib
import inspect
import sys
import types

import pytest
import torch

from reference.cases import CASES
from reference.make_fixtures import ours
from reference.oracle import TOLERANCE, distance

NOTICED = 1e-6
FAULTS = [
    # --- what all U-Nets share -----------------------------------------------------------------
    ("unet", "sines before cosines", "embeddings", "angle.cos(), angle.sin()", "angle.sin(), angle.cos()"),
    ("unet", "frequency shift 1", "embeddings", ".float() / half)", ".float() / (half - 1))"),
    ("unet", "angles in float64", "embeddings", "torch.float32)\n", "torch.float64)\n"),
    ("unet", "no SiLU in the time MLP", "embeddings", "F.silu(self.linear_1(x))", "self.linear_1(x)"),
    ("unet", "no SiLU before the time projection", "resnet", "F.silu(temb)", "temb"),
    ("unet", "time added after the norm", "resnet", "self.norm2(h + told)", "self.norm2(h) + told"),
    ("unet", "eps of ResBlocks 1e-6", "unet", "groups=groups, eps=c.norm_eps", "groups=groups, eps=1e-6"),
    ("unet", "residual scaled by 1/sqrt 2", "resnet", "return h + (x if", "return 0.5**0.5 * h + (x if"),
    ("unet", "bilinear instead of nearest", "resnet", 'x, size=size, mode="nearest"', 'x, size=size, mode="bilinear"'),
    ("unet", "skips first in, first out", "resnet", "seen.pop()", "seen.pop(-2 if len(seen) == 2 else -1)"),
    ("unet", "skip before h", "resnet", "torch.cat([h, seen.pop()], dim=1)", "torch.cat([seen.pop(), h], dim=1)"),
    ("unet", "U-Net pads like the autoencoder", "unet", "lowest else Downsample(out)", "lowest else Downsample(out, False)"),
    ("unet", "eps of spatial transformers 1e-5", "unet", "width, eps=1e-6)", "width, eps=1e-5)"),
    ("unet", "one head too few", "unet", "TransformerBlock(width, heads, c", "TransformerBlock(width, heads - 1, c"),
    ("unet", "heads by width (8 each)", "unet", "TransformerBlock(width, heads, c", "TransformerBlock(width, width // 4, c"),
    ("unet", "no residual around the transformer", "unet", "return x + self.proj_out", "return self.proj_out"),
    ("unet", "eps of the last norm", "unet", "GroupNorm(groups, first, c.norm_eps)", "GroupNorm(groups, first, 1e-6)"),
    ("unet", "gate and value swapped", "attention", "x, gate = self.proj(x)", "gate, x = self.proj(x)"),
    ("unet", "tanh GELU in the gate", "attention", "x * F.gelu(gate)", 'x * F.gelu(gate, approximate="tanh")'),
    ("unet", "scores over d, not sqrt d", "attention", "attn_mask=bias, is", "attn_mask=bias, scale=1 / q.shape[-1], is"),
    ("unet", "heads interleaved", "attention", "unflatten(-1, (self.heads, -1)).transpose(1, 2)", "unflatten(-1, (-1, self.heads)).movedim(-1, 1)"),
    ("unet", "words before itself", "attention", "x = x + self.attn1(self.norm1(x), bias=bias)\n", "x = x + self.attn1(self.norm2(x), bias=bias)\n"),
    ("unet", "bias of to_out dropped", "attention", "return self.to_out[0](h)\n\n\nclass P", "return self.to_out[0](h) - self.to_out[0].bias\n\n\nclass P"),
    # --- Karlo ---------------------------------------------------------------------------------
    ("decoder", "scale and shift swapped", "resnet", "scale, shift = told", "shift, scale = told"),
    ("decoder", "scale without 1 +", "resnet", "(1 + scale) + shift", "scale + shift"),
    ("decoder", "shrinks after the convolution", "resnet", "x, h = (F.avg_pool2d(y, 2) for y in (x, h))\n        h = self.conv1(h)", "x, h = F.avg_pool2d(x, 2), F.avg_pool2d(self.conv1(h), 2)\n        else:\n            h = self.conv1(h)"),
    ("decoder", "picture's keys before the text's", "attention", "[self.add_k_proj(context), k]", "[k, self.add_k_proj(context)]"),
    ("decoder", "mask forgotten", "adm", "bias = None if mask is None else mask_bias", "bias = None if True else mask_bias"),
    ("decoder", "mask upside down", "attention", "(1 - mask.to(dtype))", "mask.to(dtype)"),
    ("decoder", "eps of the attention's norm", "adm", "eps = 1e-5 if c.looks_at_text else c.norm_eps", "eps = c.norm_eps"),
    ("decoder", "head widths reversed going up", "adm", "[look(out, head[i]) for _ in range(depth)] if kind != PLAIN[1]", "[look(out, head[-1 - i]) for _ in range(depth)] if kind != PLAIN[1]"),
    ("decoder", "heads instead of their width", "adm", "width // head, c.cross", "head, c.cross"),
    ("decoder", "embedding not added", "adm", "temb = temb + self.class_embedding(embedding)", "pass"),
    ("decoder", "no residual around attention", "attention", "return x + h.transpose(1, 2)", "return h.transpose(1, 2)"),
    ("upsampler", "middle attends all the same", "adm", "if c.looks_at_text or c.add_attention else", "if True else"),
    ("upsampler", "bilinear in residual blocks", "resnet", 'mode="nearest") for y in (x, h))', 'mode="bilinear") for y in (x, h))'),
    ("pixels", "heads by number, not by width", "adm", "width // head, c.cross", "head, c.cross"),
    ("pixels", "attention without its norm", "attention", "self.group_norm(x).flatten(2)", "x.flatten(2)"),
    ("text_proj", "tokens one after another", "prior", "unflatten(1, (-1, self.config.clip_extra_context_tokens)).transpose(1, 2)", "unflatten(1, (self.config.clip_extra_context_tokens, -1))"),
    ("text_proj", "text not added to the timestep", "prior", "added = added + self.clip", "added = self.clip"),
    ("text_proj", "states not normed", "prior", "self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(text_states))", "self.encoder_hidden_states_proj(text_states)"),
    ("text_proj", "caption before picture tokens", "prior", "torch.cat([tokens, states], dim=1)", "torch.cat([states, tokens], dim=1)"),
    ("prior", "not causal", "prior", ".tril()", ""),
    ("prior", "padding looked at", "prior", "mask_bias(mask, h.dtype)[:, None, None, :] + ", ""),
    ("prior", "answer read at the noisy embedding", "prior", "self.norm_out(h[:, -1])", "self.norm_out(h[:, -2])"),
    ("prior", "QuickGELU", "attention", "return F.gelu(self.proj(x))", "h = self.proj(x)\n            return h * torch.sigmoid(1.702 * h)"),
    ("prior", "no last norm", "prior", "self.norm_out(h[:, -1])", "h[:, -1]"),
    ("prior", "no positions", "prior", "h = h + self.positional_embedding", "h = h + 0"),
    ("prior", "mean and std swapped", "prior", "x * self.clip_std + self.clip_mean", "x * self.clip_mean + self.clip_std"),
    # --- the autoencoder -----------------------------------------------------------------------
    ("autoencoder", "pads all round", "autoencoder", "Downsample(out, all_round=False)", "Downsample(out)"),
    ("autoencoder", "pads left and top", "resnet", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))"),
    ("autoencoder", "eps 1e-5", "autoencoder", "EPS = 1e-6", "EPS = 1e-5"),
    ("autoencoder", "eps 1e-5 in the attention only", "autoencoder", "groups=c.norm_num_groups, eps=EPS)\n    return", "groups=c.norm_num_groups, eps=1e-5)\n    return"),
    ("autoencoder", "quant_conv skipped", "autoencoder", "self.quant_conv(self.encoder(x))", "self.encoder(x)"),
    ("autoencoder", "post_quant_conv skipped", "autoencoder", "self.decoder(self.post_quant_conv(z))", "self.decoder(z)"),
    ("autoencoder", "variance taken for std", "autoencoder", "(0.5 * self.log_variance).exp()", "self.log_variance.exp()"),
    ("autoencoder", "mean and variance swapped", "autoencoder", "mean, log_variance = self", "log_variance, mean = self"),
    ("autoencoder", "bias of q dropped", "attention", "q, k, v = self.to_q(h),", "q, k, v = self.to_q(h) - self.to_q.bias,"),
    # --- CLIP ----------------------------------------------------------------------------------
    ("clip_text", "no causal mask", "clip", "causal=True", "causal=False"),
    ("clip_text", "GELU instead of QuickGELU", "clip", 'act == "quick_gelu"', "False"),
    ("clip_text", "pools at the last place", "clip", "ends.int().argmax(dim=1)", "ends.int().argmax(dim=1) * 0 - 1"),
    ("clip_text", "pools at the highest number", "clip", "self.config.eos_token_id == 2", "True"),
    ("clip_text_projected", "pools at the end token", "clip", "return ids.argmax(dim=1)", "return (ids == 2).int().argmax(dim=1)"),
    ("clip_text_projected", "QuickGELU instead of GELU", "clip", 'act == "quick_gelu"', "True"),
    ("clip_text", "states without the last norm", "clip", "x = self.final_layer_norm(x)\n        return Encoded(x, x[", "y, x = x, self.final_layer_norm(x)\n        return Encoded(y, x["),
    ("clip_text", "one head", "clip", "CLIPAttention(c.hidden_size, c.num_attention_heads)", "CLIPAttention(c.hidden_size, 1)"),
    ("clip_text", "eps of the norms", "clip", "self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)", "self.layer_norm1 = nn.LayerNorm(c.hidden_size, 1e-6)"),
    ("clip_vision", "states normed too", "clip", "return Encoded(x, self.post_layernorm(x[:, 0]))", "x = self.post_layernorm(x)\n        return Encoded(x, x[:, 0])"),
    ("clip_vision", "no first norm", "clip", "self.pre_layrnorm(self.embeddings(pixels))", "self.embeddings(pixels)"),
    ("clip_vision", "patches column by column", "clip", "self.patch_embedding(pixels).flatten", "self.patch_embedding(pixels).mT.flatten"),
    ("clip_vision", "class token last", "clip", "torch.cat([first, x], dim=1)", "torch.cat([x, first], dim=1)"),
    ("clip_vision", "causal picture tower", "clip", "causal=False", "causal=True"),
]  # fmt: skip
# The first moves a float32's rounding only; the second follows values far larger than its eps.
FAINT = {"angles in float64": 1e-8, "eps of the last norm": 1e-7}


def plant(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    """Run an edited copy of ``companion/NAME.py``, and put its functions in place of the real ones."""
    module = importlib.import_module(f"companion.{name}")
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in companion/{name}.py"
    mutant = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), f"<{name} with a fault>", "exec"), mutant.__dict__)
    users = [m for n, m in sys.modules.items() if n.startswith(("companion", "reference"))]
    for key, real in list(vars(module).items()):
        if getattr(real, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(real):
            for attribute, value in list(vars(getattr(mutant, key)).items()):
                if inspect.isfunction(value) and not attribute.startswith("__dataclass"):
                    monkeypatch.setattr(real, attribute, rebound(value, real))
                elif isinstance(value, property):
                    monkeypatch.setattr(real, attribute, value)
        elif inspect.isfunction(real):
            for user in users:
                for alias, held in list(vars(user).items()):
                    if held is real:
                        monkeypatch.setattr(user, alias, getattr(mutant, key))


def rebound(function: types.FunctionType, owner: type) -> types.FunctionType:
    """The same function as a method of ``owner``, so that its ``super()`` works."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = tuple(types.CellType(owner) if n == "__class__" else c for n, c in cells)
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def shift(name: str) -> float:
    """How far our answers are from the stored ones, at most over all elements and outputs."""
    model, parts = ours(name)
    with torch.no_grad():
        found = CASES[name].run_ours(model, **CASES[name].inputs)
    return max(distance(y, parts["output"][str(i)]) for i, y in enumerate(found))


@pytest.mark.parametrize(
    ("family", "what", "file", "old", "new"),
    [pytest.param(*fault, id=f"{fault[0]}: {fault[1]}") for fault in FAULTS],
)
def test_fault_is_noticed(monkeypatch, family, what, file, old, new):
    plant(monkeypatch, file, old, new)
    try:
        moved = shift(family)
    except (RuntimeError, ValueError, AssertionError) as error:
        moved = float("inf")  # it does not even run, or load
        print(error)
    print(f"moved {moved:.1e}")  # shown by -rA
    assert moved > FAINT.get(what, NOTICED)


@pytest.mark.parametrize("name", CASES)
def test_planting_itself_changes_nothing(monkeypatch, name):
    """The same surgery with the text as it stands: so what the faults move, the faults moved."""
    for _, _, file, old, _ in FAULTS:
        plant(monkeypatch, file, old, old)
    assert shift(name) < TOLERANCE
