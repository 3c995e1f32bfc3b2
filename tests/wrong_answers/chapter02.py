"""What readers of chapter 2 plausibly write: (exercise, what is wrong with it, code)."""

WRONG = [
    ("2.1", "nothing yet", "def undo(x_t, noise, t, schedule):\n    ..."),
    (
        "2.1",
        "no square roots",
        "def undo(x_t, noise, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)\n"
        "    return (x_t - (1 - abar) * noise) / abar",
    ),
    (
        "2.1",
        "counts from one",
        "def undo(x_t, noise, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[(t - 1).clamp(min=0)].float().view(-1, 1, 1, 1)\n"
        "    return (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()",
    ),
    (
        "2.1",
        "takes out the noise but does not enlarge what is left",
        "def undo(x_t, noise, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)\n"
        "    return x_t - (1 - abar).sqrt() * noise",
    ),
    (
        "2.1",
        "the same step for all",
        "def undo(x_t, noise, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t[0]].float()\n"
        "    return (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()",
    ),
    ("2.2", "the middle", "def even_step(schedule, v):\n    return len(schedule) // 2"),
    (
        "2.2",
        "forgets the picture's variance",
        "def even_step(schedule, v):\n    return int((schedule.alphas_cumprod < 0.5).nonzero()[0])",
    ),
    (
        "2.2",
        "amplitudes instead of variances",
        "def even_step(schedule, v):\n"
        "    signal = schedule.alphas_cumprod.sqrt()\n"
        "    return int((v * signal < (1 - signal**2).sqrt()).nonzero()[0])",
    ),
    (
        "2.3",
        "variance for sigma",
        "def to_exploding(x_t, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t]\n"
        "    return x_t / abar.sqrt(), (1 - abar) / abar",
    ),
    (
        "2.3",
        "the picture still shrunk",
        "def to_exploding(x_t, t, schedule):\n"
        "    abar = schedule.alphas_cumprod[t]\n"
        "    return x_t, ((1 - abar) / abar).sqrt()",
    ),
    (
        "2.3",
        "only the picture",
        "def to_exploding(x_t, t, schedule):\n    return x_t / schedule.alphas_cumprod[t].sqrt()",
    ),
    (
        "2.4",
        "the wrong way",
        "def same_static(t, schedule, ratio):\n"
        "    return schedule.t_of_log_snr(schedule.log_snr(t) + 2 * math.log(ratio))",
    ),
    (
        "2.4",
        "once instead of twice",
        "def same_static(t, schedule, ratio):\n"
        "    return schedule.t_of_log_snr(schedule.log_snr(t) - math.log(ratio))",
    ),
    ("2.4", "the same step", "def same_static(t, schedule, ratio):\n    return t"),
]
