"""What readers of chapter 1 plausibly write: (exercise, what is wrong with it, code)."""

WRONG = [
    (
        "1.1",
        "the log variance's formula given a spread",
        "def price(mean, spread):\n    return 0.5 * (mean**2 + spread.exp() - 1 - spread).sum(1)",
    ),
    (
        "1.1",
        "the logarithm of the spread, not of its square",
        "def price(mean, spread):\n"
        "    return 0.5 * (mean**2 + spread**2 - 1 - spread.log()).sum(1)",
    ),
    (
        "1.1",
        "one number for all pictures",
        "def price(mean, spread):\n"
        "    return 0.5 * (mean**2 + spread**2 - 1 - (spread**2).log()).sum()",
    ),
    (
        "1.1",
        "a mean over the latents",
        "def price(mean, spread):\n"
        "    return 0.5 * (mean**2 + spread**2 - 1 - (spread**2).log()).mean(1)",
    ),
    (
        "1.2",
        "the variance for the spread",
        "def draw(mean, log_variance, noise):\n    return mean + log_variance.exp() * noise",
    ),
    (
        "1.2",
        "the log variance for the spread",
        "def draw(mean, log_variance, noise):\n    return mean + log_variance * noise",
    ),
    (
        "1.2",
        "cut off from the spread",
        "def draw(mean, log_variance, noise):\n"
        "    return mean + (log_variance.detach() / 2).exp() * noise",
    ),
    (
        "1.2",
        "no chance at all",
        "def draw(mean, log_variance, noise):\n    return mean",
    ),
    ("1.3", "always as many real as forged", "def expert(p, q, share):\n    return p / (p + q)"),
    (
        "1.3",
        "the share of the forged",
        "def expert(p, q, share):\n    return (1 - share) * p / ((1 - share) * p + share * q)",
    ),
    ("1.3", "not divided by all", "def expert(p, q, share):\n    return share * p"),
    (
        "1.4",
        "precision",
        "def recall(real, fake, k):\n"
        "    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values\n"
        "    return (torch.cdist(fake, real) <= radius).any(1).float().mean()",
    ),
    (
        "1.4",
        "each point its own first neighbour",
        "def recall(real, fake, k):\n"
        "    radius = torch.cdist(fake, fake).kthvalue(k, dim=1).values\n"
        "    return (torch.cdist(real, fake) <= radius).any(1).float().mean()",
    ),
    (
        "1.4",
        "pairs instead of points",
        "def recall(real, fake, k):\n"
        "    radius = torch.cdist(fake, fake).kthvalue(k + 1, dim=1).values\n"
        "    return (torch.cdist(real, fake) <= radius).float().mean()",
    ),
]
