"""What readers of chapter 4 plausibly write: (exercise, what is wrong with it, code)."""


def _ddim(noise: str, variance: str, step: str) -> str:
    return (
        "def ddim_step(x, x0_hat, abar, abar_next, eta, fresh):\n"
        f"    noise = {noise}\n"
        f"    new = {variance}\n"
        f"    return {step}"
    )


NOISE = "(x - abar**0.5 * x0_hat) / (1 - abar) ** 0.5"
FRESH = "eta**2 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)"
STEP = "abar_next**0.5 * x0_hat + (1 - abar_next - new) ** 0.5 * noise + new**0.5 * fresh"


def _heun(end: str) -> str:
    return (
        "def heun_step(denoise, y, sigma, sigma_next):\n"
        "    slope = (y - denoise(y, sigma)) / sigma\n"
        "    there = y + (sigma_next - sigma) * slope\n" + end
    )


WRONG = [
    ("4.1", "nothing yet", "def ddim_step(x, x0_hat, abar, abar_next, eta, fresh):\n    ..."),
    (
        "4.1",
        "the fresh noise comes on top of all the old",
        _ddim(NOISE, FRESH, STEP.replace(" - new) ** 0.5 * n", ") ** 0.5 * n")),
    ),
    (
        "4.1",
        "eta counted on the variance, not on the spread",
        _ddim(NOISE, FRESH.replace("eta**2", "eta"), STEP),
    ),
    (
        "4.1",
        "the variance for the spread",
        _ddim(NOISE, FRESH, STEP.replace("new**0.5", "new")),
    ),
    (
        "4.1",
        "no fresh noise at all",
        _ddim(NOISE, "0", STEP),
    ),
    (
        "4.1",
        "the old level's amount of noise",
        _ddim(NOISE, FRESH, STEP.replace("(1 - abar_next - new)", "(1 - abar - new)")),
    ),
    (
        "4.1",
        "the larger variance, beta",
        _ddim(NOISE, "eta**2 * (1 - abar / abar_next)", STEP),
    ),
    ("4.2", "Euler's step", _heun("    return there")),
    (
        "4.2",
        "goes on from there",
        _heun(
            "    if sigma_next == 0:\n        return there\n"
            "    slope_there = (there - denoise(there, sigma_next)) / sigma_next\n"
            "    return there + (sigma_next - sigma) * (slope + slope_there) / 2"
        ),
    ),
    (
        "4.2",
        "the far slope alone",
        _heun(
            "    if sigma_next == 0:\n        return there\n"
            "    slope_there = (there - denoise(there, sigma_next)) / sigma_next\n"
            "    return y + (sigma_next - sigma) * slope_there"
        ),
    ),
    (
        "4.2",
        "asked there as if nothing had changed",
        _heun(
            "    if sigma_next == 0:\n        return there\n"
            "    slope_there = (there - denoise(there, sigma)) / sigma\n"
            "    return y + (sigma_next - sigma) * (slope + slope_there) / 2"
        ),
    ),
    (
        "4.2",
        "divides by zero at the end",
        _heun(
            "    slope_there = (there - denoise(there, sigma_next)) / sigma_next\n"
            "    return y + (sigma_next - sigma) * (slope + slope_there) / 2"
        ),
    ),
    (
        "4.2",
        "the sum of the slopes",
        _heun(
            "    if sigma_next == 0:\n        return there\n"
            "    slope_there = (there - denoise(there, sigma_next)) / sigma_next\n"
            "    return y + (sigma_next - sigma) * (slope + slope_there)"
        ),
    ),
    ("4.3", "a ratio", "def order(n1, e1, n2, e2):\n    return (e1 / e2) / (n2 / n1)"),
    (
        "4.3",
        "upside down",
        "def order(n1, e1, n2, e2):\n    return math.log(n2 / n1) / math.log(e1 / e2)",
    ),
    (
        "4.3",
        "the slope with its sign",
        "def order(n1, e1, n2, e2):\n    return math.log(e2 / e1) / math.log(n2 / n1)",
    ),
    (
        "4.3",
        "always doubled steps",
        "def order(n1, e1, n2, e2):\n    return math.log2(e1 / e2)",
    ),
    (
        "4.4",
        "leading",
        "def trailing(T, n):\n    return [k * (T // n) for k in range(n)][::-1]",
    ),
    (
        "4.4",
        "one too high: row T does not exist",
        "def trailing(T, n):\n    return [T - k * (T // n) for k in range(n)]",
    ),
    (
        "4.4",
        "linspace",
        "def trailing(T, n):\n    return torch.linspace(T - 1, 0, n).round().long().tolist()",
    ),
    (
        "4.4",
        "ascending",
        "def trailing(T, n):\n    return [T - 1 - k * (T // n) for k in range(n)][::-1]",
    ),
    (
        "4.4",
        "one more than asked for",
        "def trailing(T, n):\n    return list(range(T - 1, -2, -(T // n)))",
    ),
]
