"""What readers of chapter 8 plausibly write: (exercise, what is wrong with it, code)."""

_TOKENS = (
    "def extra_tokens(place, W, b):\n"
    "    out = place @ W.T + b\n"
    "    return out.view(len(place), -1, 4).transpose(1, 2)"
)
_LEAVE = (
    "def leave_out(place, caption, nowhere, empty, u):\n"
    "    place = torch.where(u[:, :1] < 0.1, nowhere, place)\n"
    "    caption = torch.where(u[:, 1:] < 0.5, empty, caption)\n"
    "    return place, caption"
)
_SPREAD = (
    "def spread(fraction, beta, beta_tilde):\n"
    "    share = (fraction + 1) / 2\n"
    "    log = share * math.log(beta) + (1 - share) * math.log(beta_tilde)\n"
    "    return (log / 2).exp()"
)
_GUIDED = (
    "def guided(without, with_it, scale):\n"
    "    noise = without[:, :3] + scale * (with_it[:, :3] - without[:, :3])\n"
    "    return torch.cat([noise, with_it[:, 3:]], dim=1)"
)

WRONG = [
    (
        "8.1",
        "one token after another",
        _TOKENS.replace("view(len(place), -1, 4).transpose(1, 2)", "view(len(place), 4, -1)"),
    ),
    ("8.1", "the bias is forgotten", _TOKENS.replace(" + b", "")),
    ("8.1", "tokens and numbers exchanged", _TOKENS.replace(".transpose(1, 2)", "")),
    ("8.2", "one chance for both", _LEAVE.replace("u[:, 1:]", "u[:, :1]")),
    (
        "8.2",
        "the chances exchanged",
        _LEAVE.replace("0.1", "x").replace("0.5", "0.1").replace("x,", "0.5,"),
    ),
    ("8.2", "zeros instead of what was learned", _LEAVE.replace("nowhere, place)", "0.0, place)")),
    ("8.2", "kept where it should go", _LEAVE.replace("< 0.5", ">= 0.5")),
    (
        "8.3",
        "a straight line between the variances",
        "def spread(fraction, beta, beta_tilde):\n"
        "    share = (fraction + 1) / 2\n"
        "    return (share * beta + (1 - share) * beta_tilde) ** 0.5",
    ),
    ("8.3", "the fraction as if from 0 to 1", _SPREAD.replace("(fraction + 1) / 2", "fraction")),
    ("8.3", "the variance", _SPREAD.replace("log / 2", "log")),
    ("8.3", "the ends exchanged", _SPREAD.replace("(fraction + 1)", "(1 - fraction)")),
    (
        "8.4",
        "the variance is guided too",
        "def guided(without, with_it, scale):\n"
        "    return without + scale * (with_it - without)",
    ),
    ("8.4", "the variance of nothing", _GUIDED.replace("with_it[:, 3:]", "without[:, 3:]")),
    (
        "8.4",
        "the paper's w for s",
        _GUIDED.replace("without[:, :3] + scale", "with_it[:, :3] + scale"),
    ),
    ("8.4", "the variance is left out", _GUIDED.replace("torch.cat([noise, with_it[:, 3:]], dim=1)",
                                                        "noise")),
]  # fmt: skip
