"""What readers of chapter 7 plausibly write: (exercise, what is wrong with it, code)."""

_LOSS = (
    "def prior_loss(f, x0, noise, abar):\n"
    "    abar = abar[:, None]\n"
    "    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise\n"
    "    return (f(x_t) - x0).square().mean()"
)
_KEEP = (
    "def keep(drawn, text):\n"
    "    fit = (drawn * text[:, None]).sum(-1)\n"
    "    return drawn[torch.arange(len(drawn)), fit.argmax(1)]"
)
_SPELL = (
    "def spell(places, mean, axes, low, high, buckets):\n"
    "    share = ((places - mean) @ axes.T - low) / (high - low)\n"
    "    return (share * buckets).floor().clamp(0, buckets - 1).long()"
)
_IDEAL = (
    "def ideal(x_t, abar, known):\n"
    "    far = (x_t[:, None] - abar ** 0.5 * known).square().sum(-1)\n"
    "    return (-far / (2 * (1 - abar))).softmax(1) @ known"
)

WRONG = [
    ("7.1", "the noise is predicted", _LOSS.replace("- x0).square", "- noise).square")),
    ("7.1", "the roots are forgotten", _LOSS.replace(".sqrt()", "")),
    ("7.1", "it is compared with what it saw", _LOSS.replace("- x0).square", "- x_t).square")),
    ("7.1", "a sum over dimensions", _LOSS.replace(".mean()", ".sum(1).mean()")),
    ("7.1", "no square", _LOSS.replace(".square()", ".abs()")),
    ("7.2", "the worst is kept", _KEEP.replace("argmax", "argmin")),
    (
        "7.2",
        "cosine in place of the dot product",
        _KEEP.replace(".sum(-1)", ".sum(-1) / drawn.norm(dim=-1)"),
    ),
    (
        "7.2",
        "the nearest is kept",
        _KEEP.replace("(drawn * text[:, None]).sum(-1)", "-(drawn - text[:, None]).norm(dim=-1)"),
    ),  # fmt: skip
    ("7.2", "the mean of all", "def keep(drawn, text):\n    return drawn.mean(1)"),
    ("7.2", "the longest", _KEEP.replace("(drawn * text[:, None]).sum(-1)", "drawn.norm(dim=-1)")),
    ("7.3", "rounded up and down", _SPELL.replace(".floor()", ".round()")),
    ("7.3", "the mean stays in", _SPELL.replace("(places - mean)", "places")),
    ("7.3", "what lies outside stays outside", _SPELL.replace(".clamp(0, buckets - 1)", "")),
    ("7.3", "one bucket too few", _SPELL.replace("share * buckets", "share * (buckets - 1)")),
    ("7.3", "fractions", _SPELL.replace(".long()", "")),
    ("7.3", "the range is forgotten", _SPELL.replace(" - low) / (high - low)", ")")),
    (
        "7.4",
        "the nearest alone",
        _IDEAL.replace("(-far / (2 * (1 - abar))).softmax(1) @ known", "known[far.argmin(1)]"),
    ),  # fmt: skip
    (
        "7.4",
        "the plain mean",
        _IDEAL.replace(
            "(-far / (2 * (1 - abar))).softmax(1) @ known", "known.mean(0).expand_as(x_t)"
        ),
    ),  # fmt: skip
    ("7.4", "the places are not shrunk", _IDEAL.replace("abar ** 0.5 * known", "known")),
    ("7.4", "no root", _IDEAL.replace("abar ** 0.5", "abar")),
    ("7.4", "distance in place of its square", _IDEAL.replace(".sum(-1)", ".sum(-1).sqrt()")),
    ("7.4", "half the variance", _IDEAL.replace("2 * (1 - abar)", "1 - abar")),
    ("7.4", "the wrong sign", _IDEAL.replace("(-far", "(far")),
]
