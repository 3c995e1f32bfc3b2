"""What readers of chapter 10 plausibly write: (exercise, what is wrong with it, code)."""

_DELETE = (
    "def delete(ids, gone, pad):\n"
    "    order = gone.int().argsort(dim=1, stable=True)\n"
    "    left = ~gone.gather(1, order)\n"
    "    return ids.gather(1, order).where(left, pad)"
)
_POOLED = (
    "def pooled(states, mask):\n"
    "    weight = mask[..., None].to(states)\n"
    "    return (states * weight).sum(1) / weight.sum(1)"
)
_DYNAMIC = (
    "def dynamic(x0, share):\n"
    "    s = x0.flatten(1).abs().quantile(share, dim=1).clamp(min=1)\n"
    "    s = s.view(-1, 1, 1, 1)\n"
    "    return x0.clamp(-s, s) / s"
)
_UNDER = (
    "def under(x, small, noise, abar):\n"
    "    noised = abar**0.5 * small + (1 - abar) ** 0.5 * noise\n"
    "    large = noised.repeat_interleave(4, 2).repeat_interleave(4, 3)\n"
    "    return torch.cat([x, large], dim=1)"
)

WRONG = [
    (
        "10.1",
        "a hole stays where the piece was",
        "def delete(ids, gone, pad):\n    return ids.masked_fill(gone, pad)",
    ),
    ("10.1", "what is left changes its order", _DELETE.replace("gone.int()", "(gone * 99 - ids)")),
    ("10.1", "the pieces that are gone stand behind", _DELETE.replace(".where(left, pad)", "")),
    ("10.1", "keeps what was to go", _DELETE.replace("= gone.int()", "= (~gone).int()")),
    ("10.2", "padding counts too", "def pooled(states, mask):\n    return states.mean(1)"),
    ("10.2", "a sum", _POOLED.replace(" / weight.sum(1)", "")),
    ("10.2", "divided by all rows", _POOLED.replace("weight.sum(1)", "mask.shape[1]")),
    (
        "10.2",
        "the last word's state",
        "def pooled(states, mask):\n"
        "    return states[torch.arange(len(states)), mask.sum(1) - 1]",
    ),
    ("10.3", "one percentile for all pictures", _DYNAMIC.replace(
        "x0.flatten(1).abs().quantile(share, dim=1)",
        "x0.abs().quantile(share).expand(len(x0))")),
    ("10.3", "pictures within the range grow", _DYNAMIC.replace(".clamp(min=1)", "")),
    ("10.3", "static", "def dynamic(x0, share):\n    return x0.clamp(-1, 1)"),
    ("10.3", "not divided", _DYNAMIC.replace(" / s", "")),
    ("10.3", "of the values, not of their sizes", _DYNAMIC.replace(".abs()", "")),
    ("10.3", "in place", _DYNAMIC.replace("x0.clamp(-s, s) / s", "x0.clamp_(-s, s) / s")),
    ("10.4", "ᾱ in place of its root", _UNDER.replace("abar**0.5 *", "abar *")),
    ("10.4", "noise on top", _UNDER.replace("abar**0.5 * small", "small")),
    ("10.4", "the small picture first", _UNDER.replace("[x, large]", "[large, x]")),
    ("10.4", "tiles, not larger pixels", _UNDER.replace(
        "noised.repeat_interleave(4, 2).repeat_interleave(4, 3)", "noised.repeat(1, 1, 4, 4)")),
    ("10.4", "added, not stacked", _UNDER.replace("torch.cat([x, large], dim=1)", "x + large")),
]  # fmt: skip
