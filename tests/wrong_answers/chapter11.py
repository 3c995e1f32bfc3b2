"""What readers of chapter 11 plausibly write: (exercise, what is wrong with it, code)."""

WRONG = [
    (
        "11.1",
        "one number for the batch",
        "def psnr(y, x):\n    return -10 * (y - x).square().mean().log10()",
    ),
    (
        "11.1",
        "twenty, as for amplitudes",
        "def psnr(y, x):\n    return -20 * (y - x).square().mean((1, 2, 3)).log10()",
    ),
    (
        "11.1",
        "the natural logarithm",
        "def psnr(y, x):\n    return -10 * (y - x).square().mean((1, 2, 3)).log()",
    ),
    (
        "11.1",
        "a range of two",
        "def psnr(y, x):\n    return 10 * (4 / (y - x).square().mean((1, 2, 3))).log10()",
    ),
    (
        "11.2",
        "a mean over the values",
        "def nats(mean, log_variance):\n"
        "    v = log_variance.exp()\n"
        "    return 0.5 * (mean**2 + v - 1 - log_variance).mean((1, 2, 3))",
    ),
    (
        "11.2",
        "the spread for the variance",
        "def nats(mean, log_variance):\n"
        "    v = (log_variance / 2).exp()\n"
        "    return 0.5 * (mean**2 + v - 1 - log_variance).sum((1, 2, 3))",
    ),
    (
        "11.2",
        "without the half",
        "def nats(mean, log_variance):\n"
        "    v = log_variance.exp()\n"
        "    return (mean**2 + v - 1 - log_variance).sum((1, 2, 3))",
    ),
    (
        "11.2",
        "the mean left out",
        "def nats(mean, log_variance):\n"
        "    v = log_variance.exp()\n"
        "    return 0.5 * (v - 1 - log_variance).sum((1, 2, 3))",
    ),
    (
        "11.3",
        "price, not half of it",
        "def paid(variances, price):\n"
        "    left = variances.clamp(max=price)\n"
        "    return left.sum(), 0.5 * (variances / left).log().sum()",
    ),
    (
        "11.3",
        "numbers that are not worth it cost less than nothing",
        "def paid(variances, price):\n"
        "    return len(variances) * price / 2, 0.5 * (2 * variances / price).log().sum()",
    ),
    (
        "11.3",
        "bits",
        "def paid(variances, price):\n"
        "    left = variances.clamp(max=price / 2)\n"
        "    return left.sum(), 0.5 * (variances / left).log2().sum()",
    ),
    (
        "11.3",
        "the error only",
        "def paid(variances, price):\n    return variances.clamp(max=price / 2).sum()",
    ),
    (
        "11.4",
        "the latents are free",
        "def calls(pixels, latents, decode):\n    return int(decode // pixels) + 1",
    ),
    (
        "11.4",
        "rounded up where both cost the same",
        "def calls(pixels, latents, decode):\n    return math.ceil(decode / (pixels - latents))",
    ),
    (
        "11.4",
        "not a whole number",
        "def calls(pixels, latents, decode):\n    return decode / (pixels - latents)",
    ),
]
