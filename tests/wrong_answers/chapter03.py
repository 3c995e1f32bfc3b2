"""What readers of chapter 3 plausibly write: (exercise, what is wrong with it, code)."""

WRONG = [
    (
        "3.1",
        "the larger variance",
        "def step_back(x0, x_t, t, schedule):\n"
        "    abar, before, beta = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1],"
        " schedule.betas[t]\n"
        "    mean = before.sqrt() * beta / (1 - abar) * x0"
        " + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x_t\n"
        "    return mean, beta",
    ),
    (
        "3.1",
        "the factors of the two swapped",
        "def step_back(x0, x_t, t, schedule):\n"
        "    abar, before, beta = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1],"
        " schedule.betas[t]\n"
        "    mean = before.sqrt() * beta / (1 - abar) * x_t"
        " + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x0\n"
        "    return mean, (1 - before) / (1 - abar) * beta",
    ),
    (
        "3.1",
        "the spread for the variance",
        "def step_back(x0, x_t, t, schedule):\n"
        "    abar, before, beta = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1],"
        " schedule.betas[t]\n"
        "    mean = before.sqrt() * beta / (1 - abar) * x0"
        " + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x_t\n"
        "    return mean, ((1 - before) / (1 - abar) * beta).sqrt()",
    ),
    (
        "3.1",
        "the mean only",
        "def step_back(x0, x_t, t, schedule):\n    return x0",
    ),
    (
        "3.2",
        "a minus",
        "def noise_of(v, x_t, abar):\n    return (1 - abar) ** 0.5 * x_t - abar**0.5 * v",
    ),
    (
        "3.2",
        "the picture",
        "def noise_of(v, x_t, abar):\n    return abar**0.5 * x_t - (1 - abar) ** 0.5 * v",
    ),
    ("3.2", "no roots", "def noise_of(v, x_t, abar):\n    return (1 - abar) * x_t + abar * v"),
    (
        "3.3",
        "the clean picture is shown",
        "def loss_simple(net, x0, noise, t, schedule):\n"
        "    return (net(x0, t) - noise).square().mean()",
    ),
    (
        "3.3",
        "compared with the picture",
        "def loss_simple(net, x0, noise, t, schedule):\n"
        "    return (net(schedule.add_noise(x0, noise, t), t) - x0).square().mean()",
    ),
    (
        "3.3",
        "a sum",
        "def loss_simple(net, x0, noise, t, schedule):\n"
        "    return (net(schedule.add_noise(x0, noise, t), t) - noise).square().sum()",
    ),
    (
        "3.3",
        "absolute errors",
        "def loss_simple(net, x0, noise, t, schedule):\n"
        "    return (net(schedule.add_noise(x0, noise, t), t) - noise).abs().mean()",
    ),
    ("3.4", "the mean age", "def half_life(decay):\n    return 1 / (1 - decay)"),
    ("3.4", "half of the mean age", "def half_life(decay):\n    return 0.5 / (1 - decay)"),
    ("3.4", "base two by mistake", "def half_life(decay):\n    return -1 / math.log(decay)"),
]
