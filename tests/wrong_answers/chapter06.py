"""What readers of chapter 6 plausibly write: (exercise, what is wrong with it, code)."""

_STEERED = (
    "def steered(network, x, t, label, null, w):\n"
    "    both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([label, null]))\n"
    "    told, untold = both.chunk(2)\n"
    "    return (1 + w) * told - w * untold"
)
_FORGETFUL = (
    "def forgetful(labels, share, generator):\n"
    "    gone = torch.rand(len(labels), generator=generator) < share\n"
    "    return torch.where(gone, 10, labels)"
)
_PUSHED = (
    "def pushed(x0, log_prob, x, t, abar, s):\n"
    "    with torch.enable_grad():\n"
    "        x = x.detach().requires_grad_()\n"
    "        push = torch.autograd.grad(log_prob(x, t).sum(), x)[0]\n"
    "    return x0 + s * (1 - abar) / abar**0.5 * push"
)
_POSSIBILITIES = (
    "def possibilities(seen):\n"
    "    shares = [seen.count(word) / len(seen) for word in set(seen)]\n"
    "    return math.exp(-sum(p * math.log(p) for p in shares))"
)

WRONG = [
    (
        "6.1",
        "programs' scale, not the paper's w",
        _STEERED.replace("(1 + w)", "w").replace("- w *", "+ (1 - w) *"),
    ),
    ("6.1", "the two answers exchanged", _STEERED.replace("told, untold", "untold, told")),
    ("6.1", "the null is added", _STEERED.replace("- w * untold", "+ w * untold")),
    ("6.1", "both are told", _STEERED.replace("[label, null]", "[label, label]")),
    (
        "6.1",
        "two calls",
        "def steered(network, x, t, label, null, w):\n"
        "    return (1 + w) * network(x, t, label) - w * network(x, t, null)",
    ),
    ("6.1", "w forgotten", _STEERED.replace("(1 + w) * told - w * untold", "told")),
    ("6.2", "the kept share", _FORGETFUL.replace("< share", ">= share")),
    ("6.2", "all or none", _FORGETFUL.replace("len(labels), generator", "1, generator")),
    ("6.2", "zero is a digit", _FORGETFUL.replace("gone, 10", "gone, 0")),
    (
        "6.2",
        "in place",
        "def forgetful(labels, share, generator):\n"
        "    labels[torch.rand(len(labels), generator=generator) < share] = 10\n"
        "    return labels",
    ),
    (
        "6.2",
        "the first ones",
        "def forgetful(labels, share, generator):\n"
        "    new = labels.clone()\n"
        "    new[: round(share * len(labels))] = 10\n"
        "    return new",
    ),
    ("6.2", "bell for a lot", _FORGETFUL.replace("torch.rand(", "torch.randn(")),
    ("6.3", "away from it", _PUSHED.replace("x0 + s", "x0 - s")),
    ("6.3", "the noise's factor", _PUSHED.replace("(1 - abar) / abar**0.5", "(1 - abar) ** 0.5")),
    ("6.3", "no scale", _PUSHED.replace("+ s * (1", "+ (1")),
    ("6.3", "no root", _PUSHED.replace("abar**0.5", "abar")),
    ("6.3", "no gradient under a sampler", _PUSHED.replace("enable_grad", "no_grad")),
    ("6.3", "a mean over the batch", _PUSHED.replace(".sum(), x", ".mean(), x")),
    ("6.4", "entropy itself", _POSSIBILITIES.replace("math.exp(-sum", "(-sum")),
    ("6.4", "counts how many differ", "def possibilities(seen):\n    return len(set(seen))"),
    ("6.4", "bits to the power of e", _POSSIBILITIES.replace("math.log(p)", "math.log2(p)")),
    ("6.4", "the sign", _POSSIBILITIES.replace("exp(-sum", "exp(sum")),
]
