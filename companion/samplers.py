"""From noise to a picture: five samplers, each a function of a denoiser.

``denoise(x, t) -> x0_hat`` is all they ask: given a noisy batch x (B, ...) and its timesteps t
(B,), what is the clean picture behind it, on average? ``diffusion.to_x0`` turns a network's answer
into that; guidance and thresholding wrap the denoiser. All five take the same start, noise x_T of
variance 1, go through the descending list that ``timesteps`` makes, and end at the clean picture
(abar = 1) unless ``final_alpha_cumprod`` says otherwise.

``abar`` is the level at the present timestep, ``abar_next`` the level that the step goes to. Most
work on x itself; ``euler`` and ``heun`` on y = x / sqrt(abar), which is the picture plus noise of
standard deviation sigma = sqrt((1 - abar) / abar), so they scale x_T themselves. The denoiser and
the callback always see x.
"""

from collections.abc import Callable, Iterator, Sequence
from math import exp, inf, log, sqrt

import torch

from companion import errors
from companion.schedule import Schedule, draw

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[int, float, torch.Tensor, torch.Tensor], object] | None
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
SPACINGS = ("leading", "linspace", "trailing")


def timesteps(
    name: str, steps: int, schedule: Schedule, spacing: str | None = None, steps_offset: int = 0
) -> torch.Tensor:
    """Which timesteps a sampler visits, as diffusers' scheduler of that sampler has it.

    ``"linspace"`` goes evenly from the last row to row 0; ``"leading"`` takes every (T // steps)-th
    row from row 0 on and so never starts at the noisiest; ``"trailing"`` counts back from the last
    row (Lin et al. 2305.08891, table 2). Euler's and Heun's linspace is not rounded. DPM-Solver++
    divides leading and linspace by one step more and leaves out the last, row 0. Karlo's UnCLIP
    scheduler is ``ddpm`` with ``"linspace"``.

    Args:
        name: The sampler: ``ddpm``, ``ddim``, ``euler``, ``heun`` or ``dpmpp_2m``.
        steps: How many timesteps.
        schedule: The noise schedule.
        spacing: None: ``"leading"`` for ddpm and ddim, ``"linspace"`` for the others.
        steps_offset: Added to leading timesteps (Stable Diffusion 1: 1).

    Returns:
        (steps,) descending; int64, or float32 for euler and heun.
    """
    import numpy as np

    errors.one_of("name", name, SAMPLERS)
    errors.number("steps", steps, low=1, high=len(schedule), integer=True)
    spacing = spacing or ("leading" if name in ("ddpm", "ddim") else "linspace")
    errors.one_of("spacing", spacing, SPACINGS)
    errors.number("steps_offset", steps_offset, low=0, integer=True)
    T, more = len(schedule), 1 if name == "dpmpp_2m" else 0
    if spacing == "linspace":
        t = np.linspace(0, T - 1, steps + more)[::-1][:steps]
        t = t if name in ("euler", "heun") else t.round()
    elif spacing == "leading":
        t = np.arange(steps + more)[::-1][:steps] * (T // (steps + more)) + steps_offset
    else:  # in diffusers, rounding sometimes appends a timestep of -1; [:steps] leaves it out
        t = np.arange(T, 0, -T / steps).round()[:steps] - 1
    errors.expect(
        T == 1 or t[0] > steps_offset,
        f"{steps} step(s) with {spacing!r} would start at t = {t[0]:g}, where pictures are clean"
        " already. Use spacing='trailing' or more steps.",
    )
    errors.expect(
        bool((np.diff(t) < 0).all()) and t[0] <= T - 1,
        f"{steps} steps with {spacing!r} and steps_offset {steps_offset} do not fit into"
        f" {T} timesteps for {name}. Use fewer steps.",
    )
    kind = np.float32 if name in ("euler", "heun") else np.int64
    return torch.from_numpy(t.astype(kind))


def edm_timesteps(steps: int, schedule: Schedule, rho: float = 7.0) -> torch.Tensor:
    """Timesteps spaced by noise instead of by t: evenly in sigma ** (1 / rho), EDM eq. 5.

    ``rho = inf`` is the limit, evenly in log sigma, so in log-SNR. In diffusers these are
    ``use_karras_sigmas`` (rho = 7) and ``use_exponential_sigmas``.

    Args:
        steps: How many timesteps, at least 2.
        schedule: The noise schedule; its last row must have some signal left.
        rho: At least 1. The larger, the more of the steps are spent at the clean end.

    Returns:
        (steps,) float64, fractional, from the last row down to row 0.
    """
    errors.number("steps", steps, low=2, integer=True)
    errors.expect(rho >= 1, f"rho is {rho!r}; expected a number of at least 1, or math.inf.")
    high, low = schedule.sigmas[-1], schedule.sigmas[0]
    errors.expect(
        bool(high.isfinite()),
        "The last row of this schedule has no signal (zero terminal SNR): its sigma is infinite and"
        " cannot be spaced. Use timesteps(..., spacing='trailing').",
    )
    part = torch.linspace(0, 1, steps, dtype=torch.float64)
    if rho == inf:
        sigma = high ** (1 - part) * low**part
    else:
        root_high, root_low = high ** (1 / rho), low ** (1 / rho)
        sigma = (root_high + part * (root_low - root_high)) ** rho
    t = schedule.t_of_log_snr(-2 * sigma.log())
    t[0], t[-1] = len(schedule) - 1, 0  # rid of rounding
    return t


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    x_T: torch.Tensor,
    timesteps: torch.Tensor | Sequence[float],
    schedule: Schedule,
    *,
    generator: Generators = None,
    callback: Callback = None,
    variance: str = "fixed_small",
    clip: float | None = None,
    final_alpha_cumprod: float | None = None,
) -> torch.Tensor:
    """Ancestral sampling, DDPM Algorithm 2 (arXiv 2006.11239).

    Each step draws from the posterior q(x_{t-1} | x_t, x_0), with the denoiser's answer for x_0.
    The betas are those between the timesteps that are visited (Improved DDPM, section 4).

    Args:
        denoise: ``denoise(x, t) -> x0_hat`` or ``-> (x0_hat, fraction)``, see ``variance``.
        x_T: (B, ...) noise of variance 1.
        timesteps: Descending, within 0 ... T - 1.
        schedule: The noise schedule.
        generator: Source of the noise; a list gives each picture its own.
        callback: Called as ``callback(i, t, x, x0_hat)`` after each answer, with what was asked.
        variance: ``"fixed_small"`` (the posterior's; ``"fixed_small_log"`` is the same number),
            ``"fixed_large"`` (beta), or ``"learned_range"``: interpolated between the two by the
            ``fraction`` in [-1, 1] that the denoiser returns (Improved DDPM eq. 15).
        clip: Limit x0_hat to [-clip, clip].
        final_alpha_cumprod: Where to end; None: 1, the clean picture. The step to 1 adds no noise.

    Returns:
        (B, ...), like x_T.
    """
    errors.one_of("variance", variance, VARIANCES)
    _check(clip, generator, random=True)
    x = x_T
    for i, t, abar, abar_next in _walk(x_T, timesteps, schedule, final_alpha_cumprod):
        x_0, fraction = _ask(denoise, x, t, clip)
        if callback:
            callback(i, t.item(), x, x_0)
        beta = 1 - abar / abar_next  # noise between the two levels
        of_x_0 = sqrt(abar_next) * beta / (1 - abar)  # DDPM eq. 7
        of_x = sqrt(1 - beta) * (1 - abar_next) / (1 - abar)
        x = of_x_0 * x_0 + of_x * x
        if abar_next == 1:
            continue
        small = max((1 - abar_next) / (1 - abar) * beta, 1e-20)  # DDPM eq. 7, kept from log 0
        std = sqrt(beta if variance == "fixed_large" else small)
        if variance == "learned_range":
            errors.expect(
                fraction is not None,
                "variance='learned_range' needs a denoiser that returns (x0_hat, fraction).",
            )
            share = (fraction + 1) / 2
            std = (0.5 * (share * log(max(beta, 1e-20)) + (1 - share) * log(small))).exp()
        x = x + std * draw(x, generator)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    x_T: torch.Tensor,
    timesteps: torch.Tensor | Sequence[float],
    schedule: Schedule,
    *,
    generator: Generators = None,
    callback: Callback = None,
    eta: float = 0.0,
    clip: float | None = None,
    rederive: bool = True,
    final_alpha_cumprod: float | None = None,
) -> torch.Tensor:
    """DDIM, eq. 12 of arXiv 2010.02502: the same training, another way back.

    With eta = 0 nothing is random: x is taken apart into picture and noise and put together again
    at the next level. With eta = 1 it is ``ddpm`` with the posterior's variance.

    Args:
        denoise: ``denoise(x, t) -> x0_hat``.
        x_T: (B, ...) noise of variance 1.
        timesteps: Descending, within 0 ... T - 1. Each step goes to the next one listed (diffusers
            goes to t - T // steps, which is the same for leading timesteps).
        schedule: The noise schedule.
        generator: Needed for eta > 0 only; a list gives each picture its own.
        callback: Called as ``callback(i, t, x, x0_hat)`` after each answer, with what was asked.
        eta: Share of fresh noise, from 0 to 1.
        clip: Limit x0_hat to [-clip, clip].
        rederive: After clipping, compute the noise anew so that it fits x, as GLIDE does; False
            keeps the noise of the unclipped answer, diffusers' ``use_clipped_model_output=False``.
        final_alpha_cumprod: Where to end; None: 1. ``set_alpha_to_one=False`` is
            ``schedule.alphas_cumprod[0]``.

    Returns:
        (B, ...), like x_T.
    """
    errors.number("eta", eta, low=0, high=1)
    _check(clip, generator, random=eta > 0)
    x = x_T
    for i, t, abar, abar_next in _walk(x_T, timesteps, schedule, final_alpha_cumprod):
        answer, _ = _ask(denoise, x, t)
        x_0 = _clip(answer, clip)
        if callback:
            callback(i, t.item(), x, x_0)
        noise = (x - sqrt(abar) * (x_0 if rederive else answer)) / sqrt(1 - abar)
        sigma = eta * sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))  # eq. 16
        x = sqrt(abar_next) * x_0 + sqrt(1 - abar_next - sigma**2) * noise  # eq. 12
        if sigma > 0:
            x = x + sigma * draw(x, generator)
    return x


@torch.no_grad()
def ddim_invert(
    denoise: Denoiser,
    x_0: torch.Tensor,
    timesteps: torch.Tensor | Sequence[float],
    schedule: Schedule,
    *,
    callback: Callback = None,
    iterations: int = 1,
    final_alpha_cumprod: float | None = None,
) -> torch.Tensor:
    """Walk ``ddim`` (eta = 0) backwards: the noise from which it would draw ``x_0``.

    A step back needs the answer at the noisier end, which is not known yet. With one iteration the
    answer for the cleaner x stands in (DDIM section 4.3; the error shrinks with more steps). Each
    further one asks again at the place just found, a fixed-point iteration (AIDI, 2309.04907) that
    settles where steps are small and ``x_0`` is a picture that the denoiser could have drawn.

    Args:
        denoise: ``denoise(x, t) -> x0_hat``.
        x_0: (B, ...) what ``ddim`` would return.
        timesteps: The descending timesteps that ``ddim`` would use.
        schedule: The noise schedule.
        callback: Called as ``callback(i, t, x, x0_hat)`` after each step, i counting from 0 at the
            clean end.
        iterations: How often to ask at each step.
        final_alpha_cumprod: As for ``ddim``.

    Returns:
        (B, ...), like x_0: noise of about variance 1 if the denoiser is good.
    """
    errors.number("iterations", iterations, low=1, integer=True)
    x = x_0
    path = list(_walk(x_0, timesteps, schedule, final_alpha_cumprod))
    for i, (_, t, abar, abar_next) in enumerate(reversed(path)):
        guess = x
        for _ in range(iterations):
            answer, _ = _ask(denoise, guess, t)
            noise = (guess - sqrt(abar) * answer) / sqrt(1 - abar)
            clean = (x - sqrt(1 - abar_next) * noise) / sqrt(abar_next)
            guess = sqrt(abar) * clean + sqrt(1 - abar) * noise
        x = guess
        if callback:
            callback(i, t.item(), x, answer)
    return x


@torch.no_grad()
def euler(
    denoise: Denoiser,
    x_T: torch.Tensor,
    timesteps: torch.Tensor | Sequence[float],
    schedule: Schedule,
    *,
    generator: Generators = None,
    callback: Callback = None,
    clip: float | None = None,
    final_alpha_cumprod: float | None = None,
) -> torch.Tensor:
    """Euler's method on dy / dsigma = (y - x0_hat) / sigma, EDM eq. 1 and 3 (arXiv 2206.00364).

    The same numbers as ``ddim`` with eta = 0: in y and sigma, DDIM's step is a straight line.
    Arguments as for ``ddim``; nothing is random, ``generator`` is not used.
    """
    _check(clip)
    y = None
    for i, t, abar, abar_next in _walk(x_T, timesteps, schedule, final_alpha_cumprod, sigma=True):
        y = x_T / sqrt(abar) if y is None else y
        x_0, _ = _ask(denoise, sqrt(abar) * y, t, clip)
        if callback:
            callback(i, t.item(), sqrt(abar) * y, x_0)
        slope = (y - x_0) / _sigma(abar)
        y = y + (_sigma(abar_next) - _sigma(abar)) * slope
    return sqrt(abar_next) * y


@torch.no_grad()
def heun(
    denoise: Denoiser,
    x_T: torch.Tensor,
    timesteps: torch.Tensor | Sequence[float],
    schedule: Schedule,
    *,
    generator: Generators = None,
    callback: Callback = None,
    clip: float | None = None,
    final_alpha_cumprod: float | None = None,
) -> torch.Tensor:
    """Heun's method, EDM Algorithm 1 without churn: try Euler's step, look, average the two slopes.

    Second order for two evaluations a step. Where no timestep is left to look at, at abar = 1, the
    step stays Euler's: n timesteps cost 2 n - 1 evaluations. Arguments as for ``ddim``; nothing is
    random, ``generator`` is not used.
    """
    _check(clip)
    y = None
    path = list(_walk(x_T, timesteps, schedule, final_alpha_cumprod, sigma=True))
    ahead = [t for _, t, _, _ in path[1:]] + [_timestep_of(path[-1][-1], schedule)]
    for (i, t, abar, abar_next), t_next in zip(path, ahead, strict=True):
        y = x_T / sqrt(abar) if y is None else y
        x_0, _ = _ask(denoise, sqrt(abar) * y, t, clip)
        if callback:
            callback(i, t.item(), sqrt(abar) * y, x_0)
        slope = (y - x_0) / _sigma(abar)
        step = _sigma(abar_next) - _sigma(abar)
        there = y + step * slope
        if t_next is not None:
            x_0, _ = _ask(denoise, sqrt(abar_next) * there, t_next, clip)
            slope = (slope + (there - x_0) / _sigma(abar_next)) / 2
        y = y + step * slope
    return sqrt(abar_next) * y


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoiser,
    x_T: torch.Tensor,
    timesteps: torch.Tensor | Sequence[float],
    schedule: Schedule,
    *,
    generator: Generators = None,
    callback: Callback = None,
    clip: float | None = None,
    final_alpha_cumprod: float | None = None,
    lower_order_final: bool = False,
) -> torch.Tensor:
    """DPM-Solver++ (2M), Algorithm 2 of arXiv 2211.01095: second order for one evaluation a step.

    It solves the noise part exactly in lambda = log(signal / noise) and continues x0_hat along a
    straight line through the last two answers. The first step, and any step to abar = 1 (lambda is
    infinite there), uses one answer only, which makes it DDIM's.

    Arguments as for ``ddim``; nothing is random, ``generator`` is not used. ``lower_order_final``
    makes the last step first order too when it ends before abar = 1, as diffusers does for fewer
    than 15 timesteps.
    """
    _check(clip)
    x, before, h_before = x_T, None, None
    for i, t, abar, abar_next in _walk(x_T, timesteps, schedule, final_alpha_cumprod, sigma=True):
        x_0, _ = _ask(denoise, x, t, clip)
        if callback:
            callback(i, t.item(), x, x_0)
        h = log(_sigma(abar)) - (log(_sigma(abar_next)) if abar_next < 1 else -inf)
        last = i == len(timesteps) - 1
        direct = before is None or not 0 < h < inf or (last and lower_order_final)
        D = x_0
        if not direct:
            r = h_before / h
            D = x_0 + (x_0 - before) / (2 * r)
        x = sqrt((1 - abar_next) / (1 - abar)) * x - sqrt(abar_next) * (exp(-h) - 1) * D
        before, h_before = x_0, h
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def evaluations(name: str, steps: int) -> int:
    """How often a sampler asks the denoiser on its way through ``steps`` timesteps to abar = 1."""
    errors.one_of("name", name, SAMPLERS)
    return 2 * steps - 1 if name == "heun" else steps


# --- what they share -----------------------------------------------------------------------------


def _sigma(abar: float) -> float:
    """Standard deviation of the noise in y = x / sqrt(abar)."""
    return sqrt((1 - abar) / abar)


def _timestep_of(abar: float, schedule: Schedule) -> torch.Tensor | None:
    """The timestep at which a level lies; None if the level is cleaner than row 0."""
    if abar > schedule.alphas_cumprod[0].item():
        return None
    return schedule.t_of_log_snr(log(abar / (1 - abar)))


def _walk(
    x: torch.Tensor,
    timesteps: torch.Tensor | Sequence[float],
    schedule: Schedule,
    final: float | None,
    sigma: bool = False,
) -> Iterator[tuple[int, torch.Tensor, float, float]]:
    """Check a sampler's arguments, then give (i, t, abar, abar_next) for each step."""
    errors.tensor("the start", x, dtype="float")
    if not isinstance(timesteps, torch.Tensor):
        timesteps = torch.tensor(timesteps)
        timesteps = timesteps.double() if timesteps.is_floating_point() else timesteps
    errors.tensor("timesteps", timesteps, "n")
    errors.expect(
        bool((timesteps.diff() < 0).all()),
        f"timesteps are {_few(timesteps)}; expected a descending list without repetitions.",
    )
    final = 1.0 if final is None else float(final)
    levels = [*schedule.alpha_bar(timesteps).tolist(), final]
    errors.expect(
        levels[-2] <= final <= 1,
        f"final_alpha_cumprod is {final:g}; expected a level between that of the last timestep,"
        f" {levels[-2]:g}, and 1.",
    )
    errors.expect(
        not sigma or levels[0] > 0,
        "This sampler divides by the signal, and the schedule has none left at its first timestep"
        f" (zero terminal SNR). Use ddim or ddpm, or start below t = {len(schedule) - 1}.",
    )
    for i, t in enumerate(timesteps):
        yield i, t, levels[i], levels[i + 1]


def _check(clip: float | None, generator: Generators = None, random: bool = False) -> None:
    """The arguments that are only used after the denoiser's first answer."""
    if clip is not None:
        errors.number("clip", clip)
        errors.expect(clip > 0, f"clip is {clip}; expected a number above 0, or None.")
    if random and generator is None:
        raise TypeError(
            "generator is missing and this sampler draws noise at each step; pass"
            " generator=torch.Generator().manual_seed(0)."
        )


def _ask(
    denoise: Denoiser, x: torch.Tensor, t: torch.Tensor, clip: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The denoiser's clean picture, clipped, and its variance fraction if it gives one."""
    if t.is_floating_point() and x.device.type == "mps":
        t = t.float()  # Apple's GPUs have no float64
    answer = denoise(x, t.to(x.device).expand(len(x)))
    x_0, fraction = answer if isinstance(answer, tuple) else (answer, None)
    parts = {"a clean picture": x_0, "a variance fraction": x_0 if fraction is None else fraction}
    for name, part in parts.items():
        if getattr(part, "shape", None) != x.shape:
            got = tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
            raise ValueError(
                f"The denoiser returned {name} of shape {got} for x of shape {tuple(x.shape)};"
                " expected the same. (diffusion.to_x0 turns a network's output into x0.)"
            )
    x_0 = x_0.to(x.dtype)  # a network in half precision; the state keeps its own
    return _clip(x_0, clip), None if fraction is None else fraction.to(x.dtype)


def _clip(x_0: torch.Tensor, clip: float | None) -> torch.Tensor:
    return x_0 if clip is None else x_0.clamp(-clip, clip)


def _few(t: torch.Tensor) -> str:
    """The beginning of a list, for an error message."""
    return f"{t[:6].tolist()}{' ...' if len(t) > 6 else ''}"
