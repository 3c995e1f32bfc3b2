"""Diffusion without a network: targets, losses, posteriors, and cases whose answer is exact.

Letters as in ``schedule``: ``x0`` clean, ``x_t`` noisy, ``t`` one timestep or (B,); row 0 is the
first noising step. Three networks are one: noise (``"epsilon"``), clean picture (``"sample"``) and
velocity (``"v_prediction"``) are linear in each other once x_t is known, so everything here goes
through x0. The names are diffusers' ``prediction_type``.

Sources: DDPM (arXiv 2006.11239); Improved DDPM (2102.09672); progressive distillation (2202.00512),
which has v and the weights SNR and SNR + 1; min-SNR (2303.09556).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.special import log_ndtr, ndtr

from companion import errors
from companion.schedule import Schedule, draw, spread

TARGETS = ("epsilon", "sample", "v_prediction")
Time = int | float | torch.Tensor


# --- three names for one thing -------------------------------------------------------------------


def target_for(
    x0: torch.Tensor, noise: torch.Tensor, t: Time, schedule: Schedule, target: str
) -> torch.Tensor:
    """What a network with this target should answer to ``schedule.add_noise(x0, noise, t)``.

    Args:
        x0: (B, ...) clean pictures.
        noise: (B, ...) the noise that was mixed in.
        t: Timestep(s): one for all or (B,).
        schedule: The noise schedule.
        target: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.

    Returns:
        (B, ...): the noise, x0, or v = sqrt(abar) noise - sqrt(1 - abar) x0 (2202.00512, sec. 4).
    """
    errors.one_of("target", target, TARGETS)
    _same("noise", noise, "x0", x0)
    if target == "epsilon":
        return noise
    if target == "sample":
        return x0
    return spread(schedule.signal(t), x0) * noise - spread(schedule.noise(t), x0) * x0


def to_x0(
    output: torch.Tensor, x_t: torch.Tensor, t: Time, schedule: Schedule, target: str
) -> torch.Tensor:
    """The clean picture that a network's answer stands for.

    Args:
        output: (B, ...) the answer, in terms of ``target``.
        x_t: (B, ...) the noisy pictures it was asked about.
        t: Timestep(s), whole or fractional: one for all or (B,).
        schedule: The noise schedule.
        target: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
    """
    errors.one_of("target", target, TARGETS)
    _same("output", output, "x_t", x_t)
    if target == "sample":
        return output
    signal, noise = schedule.signal(t), schedule.noise(t)
    if target == "v_prediction":
        return spread(signal, x_t) * x_t - spread(noise, x_t) * output  # 2202.00512, appendix D
    errors.expect(
        bool((signal > 0).all()),
        "At zero signal the noise says nothing about the picture, so target 'epsilon' cannot be"
        " used at the last row of a zero-SNR schedule; train with 'v_prediction' or 'sample'.",
    )
    return (x_t - spread(noise, x_t) * output) / spread(signal, x_t)  # DDPM eq. 15


def from_x0(
    x0: torch.Tensor, x_t: torch.Tensor, t: Time, schedule: Schedule, target: str
) -> torch.Tensor:
    """The answer, in terms of ``target``, that stands for the picture ``x0``; undoes ``to_x0``."""
    errors.one_of("target", target, TARGETS)
    _same("x0", x0, "x_t", x_t)
    if target == "sample":
        return x0
    signal, noise = spread(schedule.signal(t), x_t), spread(schedule.noise(t), x_t)
    epsilon = (x_t - signal * x0) / noise  # eq. 4 solved for the noise
    return epsilon if target == "epsilon" else signal * epsilon - noise * x0


def convert(
    output: torch.Tensor, x_t: torch.Tensor, t: Time, schedule: Schedule, source: str, target: str
) -> torch.Tensor:
    """Translate an answer from one target to another."""
    return from_x0(to_x0(output, x_t, t, schedule, source), x_t, t, schedule, target)


def score(x0: torch.Tensor, x_t: torch.Tensor, t: Time, schedule: Schedule) -> torch.Tensor:
    """Gradient of log p(x_t) if E[x_0 | x_t] is ``x0`` (Tweedie): -epsilon / sqrt(1 - abar)."""
    return -from_x0(x0, x_t, t, schedule, "epsilon") / spread(schedule.noise(t), x_t)


# --- losses --------------------------------------------------------------------------------------


def x0_weight(t: Time, schedule: Schedule, target: str) -> torch.Tensor:
    """What the plain squared error of a target weighs, counted in squared errors of x0.

    ``|noise error|^2 = SNR |x0 error|^2`` and ``|v error|^2 = (SNR + 1) |x0 error|^2``: the targets
    differ by nothing else (2202.00512, section 4).

    Returns:
        float64, the shape of ``t``: SNR, 1 or SNR + 1.
    """
    errors.one_of("target", target, TARGETS)
    snr = schedule.snr(t)
    return {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[target]


def min_snr_weight(t: Time, schedule: Schedule, target: str, gamma: float = 5.0) -> torch.Tensor:
    """Factor for a target's squared error after which x0 errors weigh min(SNR, gamma).

    That is min(1, gamma / SNR) for the noise, min(SNR, gamma) for x0, min(SNR, gamma) / (SNR + 1)
    for v: min-SNR (2303.09556, section 3.4), as in diffusers' training scripts.

    Returns:
        float64, the shape of ``t``.
    """
    errors.number("gamma", gamma)
    errors.expect(gamma > 0, f"gamma is {gamma}; expected a number above 0.")
    if target == "epsilon":  # written so that it holds at SNR = 0
        return (gamma / schedule.snr(t)).clamp(max=1)
    return schedule.snr(t).clamp(max=gamma) / x0_weight(t, schedule, target)


def noise_weight(t: Time, schedule: Schedule, most: float) -> torch.Tensor:
    """Factor for the noise's squared error, by which the noisiest steps count more.

    What stands where is settled while x_t is nearly all noise, and there the plain squared error of
    the noise hardly counts a wrong guess of the picture. With this factor it counts as the
    velocity's would, (SNR + 1) / SNR = 1 / abar times as much (2202.00512, section 4), but at most
    ``most`` times; with 1 it is the plain error.

    Returns:
        float64, the shape of ``t``, in [1, most].
    """
    errors.number("most", most)
    errors.expect(most >= 1, f"most is {most}; expected a number of at least 1.")
    return (x0_weight(t, schedule, "v_prediction") / schedule.snr(t)).clamp(max=most)


def simple_loss(
    output: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """L_simple, DDPM eq. 14: mean squared error, each picture's times ``weight`` (B,) if given."""
    _same("output", output, "wanted", wanted)
    error = (output - wanted).square().flatten(1).mean(1)  # (B,)
    return (error if weight is None else spread(weight, error) * error).mean()


def posterior(
    x0: torch.Tensor, x_t: torch.Tensor, t: int | torch.Tensor, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7.

    Before row 0 comes the clean picture, so at t = 0 the mean is x0 and the variance 0.

    Returns:
        Mean (B, ...) and variance (), or (B, 1, ...) where ``t`` is (B,).
    """
    _same("x0", x0, "x_t", x_t)
    abar, before, beta = _levels(t, schedule)
    of_x0 = before.sqrt() * beta / (1 - abar)
    of_x_t = (1 - beta).sqrt() * (1 - before) / (1 - abar)
    variance = (1 - before) / (1 - abar) * beta
    return spread(of_x0, x_t) * x0 + spread(of_x_t, x_t) * x_t, spread(variance, x_t)


def log_variance(fraction: torch.Tensor, t: int | torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Learned variance: log-interpolation between the two fixed ones, Improved DDPM eq. 15.

    Args:
        fraction: (B, ...) in [-1, 1], the network's second half: -1 is the posterior's variance
            (the smallest sensible), 1 is beta (the largest).
        t: Whole timestep(s). At t = 0, where the posterior's is 0, that of t = 1 stands in.
        schedule: The noise schedule.
    """
    abar, before, beta = _levels(t, schedule)
    first = _levels(torch.clamp(schedule.whole(t), min=min(1, len(schedule) - 1)), schedule)
    small = ((1 - first[1]) / (1 - first[0]) * first[2]).clamp(min=1e-20)
    share = (fraction + 1) / 2
    least, most = spread(small.log(), fraction), spread(beta.log(), fraction)
    return share * most + (1 - share) * least


def vlb_term(
    x0: torch.Tensor,
    x_t: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    x0_hat: torch.Tensor,
    fraction: torch.Tensor | None = None,
    levels: int = 256,
) -> torch.Tensor:
    """One term of the variational bound, in bits per dimension: DDPM eq. 5.

    For t > 0 this is L_{t-1}, the divergence from the true posterior of the one the model gives;
    at t = 0 it is the cost of writing down x0, one of ``levels`` values from -1 to 1 (eq. 13).

    Args:
        x0: (B, ...) clean pictures in [-1, 1].
        x_t: (B, ...) their noisy versions.
        t: Whole timestep(s): one for all or (B,).
        schedule: The noise schedule.
        x0_hat: (B, ...) the model's clean pictures.
        fraction: (B, ...) the model's variance as for ``log_variance``; None: the posterior's.
        levels: Grey levels in the data (256 for 8 bits, 17 for the digits).

    Returns:
        (B,)
    """
    errors.number("levels", levels, low=2, integer=True)
    _same("x0_hat", x0_hat, "x0", x0)
    t = schedule.whole(t)
    mean, variance = posterior(x0, x_t, t, schedule)
    mean_hat, _ = posterior(x0_hat, x_t, t, schedule)
    smallest = -torch.ones_like(x0) if fraction is None else fraction
    log_var = log_variance(smallest, t, schedule)
    spent = variance + (mean - mean_hat) ** 2
    divergence = 0.5 * (log_var - variance.log() - 1 + spent / log_var.exp())
    written = -_log_bin(x0, mean_hat, (0.5 * log_var).exp(), levels)
    first = spread((t == 0).to(x0.dtype), x0) > 0
    return torch.where(first, written, divergence).flatten(1).mean(1) / math.log(2)


def prior_term(x0: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """L_T in bits per dimension: what the last noisy picture still tells. (B,), no parameters."""
    errors.tensor("x0", x0, dtype="float")
    abar = schedule.alphas_cumprod[-1].item()
    # KL of N(sqrt(abar) x0, 1 - abar) from N(0, 1); log1p, since abar may be tiny
    nats = 0.5 * (abar * x0**2 - abar - math.log1p(-abar))
    return nats.flatten(1).mean(1) / math.log(2)


def hybrid_loss(
    output: torch.Tensor,
    fraction: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    target: str = "epsilon",
    weight: float = 0.001,
    levels: int = 256,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_hybrid = L_simple + 0.001 L_vlb, Improved DDPM eq. 16.

    The bound trains the variance only: the mean enters it with its gradient stopped. One random t
    stands for all of them, so its term counts T times.

    Args:
        output: (B, ...) the network's first half, in terms of ``target``.
        fraction: (B, ...) its second half, in [-1, 1] where it is sensible.
        x0: (B, ...) clean pictures in [-1, 1].
        noise: (B, ...) the noise mixed in.
        t: Whole timestep(s): one for all or (B,).
        schedule: The noise schedule.
        target: What ``output`` means.
        weight: The factor 0.001.
        levels: As for ``vlb_term``.
        counts: (B,) what each picture's share of L_simple is multiplied by.
    """
    x_t = schedule.add_noise(x0, noise, t)
    simple = simple_loss(output, target_for(x0, noise, t, schedule, target), counts)
    x0_hat = to_x0(output, x_t, t, schedule, target).detach()
    bound = len(schedule) * vlb_term(x0, x_t, t, schedule, x0_hat, fraction, levels).mean()
    return simple + weight * bound


@torch.no_grad()
def variational_bound(
    denoise: Callable,
    x0: torch.Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    levels: int = 256,
) -> torch.Tensor:
    """All terms of the bound on -log p(x0), in bits per dimension; evaluates the network T times.

    Args:
        denoise: ``denoise(x, t) -> x0_hat`` or ``-> (x0_hat, fraction)``, as for ``samplers.ddpm``.
        x0: (B, ...) pictures in [-1, 1].
        schedule: The noise schedule.
        generator: Source of the noise, fresh for each t.
        levels: As for ``vlb_term``.

    Returns:
        (B, T + 1): the terms of rows 0 ... T - 1, then L_T. Sum over the second axis for the bound.
    """
    terms = []
    for t in range(len(schedule)):
        x_t = schedule.add_noise(x0, draw(x0, generator), t)
        answer = denoise(x_t, torch.full((len(x0),), t, device=x0.device))
        x0_hat, fraction = answer if isinstance(answer, tuple) else (answer, None)
        terms.append(vlb_term(x0, x_t, t, schedule, x0_hat, fraction, levels))
    return torch.stack([*terms, prior_term(x0, schedule)], dim=1)


def _levels(
    t: int | torch.Tensor, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """abar at t, abar one step before (1 before row 0), and beta."""
    t = schedule.whole(t)
    before = torch.where(t > 0, schedule.alphas_cumprod[(t - 1).clamp(min=0)], 1.0)
    return schedule.alphas_cumprod[t], before, schedule.betas[t]


def _log_bin(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, levels: int) -> torch.Tensor:
    """log of the Gaussian's mass in the bin around ``x``; the outer bins reach to infinity."""
    half = 1 / (levels - 1)
    low, high = (x - half - mean) / std, (x + half - mean) / std
    flip = low + high > 0  # work in the left tail, where small numbers keep their digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top, bottom = x > 1 - half, x < -1 + half
    low = torch.where(bottom & ~flip | top & flip, -math.inf, low)
    high = torch.where(top & ~flip | bottom & flip, math.inf, high)
    above = log_ndtr(high)
    gap = (log_ndtr(low) - above).clamp(max=-1e-7)
    return above + torch.log(-torch.expm1(gap))


# --- cases whose answer is exact -----------------------------------------------------------------


def ideal_denoiser(
    x_t: torch.Tensor,
    t: Time,
    pictures: torch.Tensor,
    schedule: Schedule,
    *,
    prior: torch.Tensor | None = None,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The best possible denoiser when the world is a known list of pictures: E[x_0 | x_t].

    Each picture is weighted by how probable it is that x_t came from it::

        weight_i ~ prior_i exp(-|x_t - sqrt(abar) picture_i|^2 / (2 (1 - abar)))

    Computed in float64 on the CPU, in logarithms.

    Args:
        x_t: (B, ...) noisy pictures.
        t: Timestep(s): one for all or (B,).
        pictures: (N, ...) the known pictures, in [-1, 1] like all that is noised.
        schedule: The noise schedule.
        prior: (N,) how frequent each picture is; None: equally.
        return_weights: Also return the weights (B, N), float64, each row summing to 1.

    Returns:
        (B, ...) of the type and device of ``x_t``, and the weights if asked for.
    """
    errors.tensor("x_t", x_t, dtype="float")
    errors.tensor("pictures", pictures, dtype="float")
    errors.expect(
        x_t.shape[1:] == pictures.shape[1:] and x_t.ndim > 1 and len(pictures) > 0,
        f"pictures have shape {tuple(pictures.shape)} and x_t {tuple(x_t.shape)}; expected the same"
        " size after the first axis, and at least one picture.",
    )
    known = pictures.detach().flatten(1).cpu().double()  # (N, D)
    x = x_t.detach().flatten(1).cpu().double()  # (B, D)
    signal, noise = spread(schedule.signal(t), x), spread(schedule.noise(t), x)
    # the square written out; |x_t|^2 is the same for all pictures and drops out of the softmax
    evidence = signal * (x @ known.T) - 0.5 * signal**2 * known.square().sum(1)  # (B, N)
    logits = evidence / noise**2
    if prior is not None:
        errors.tensor("prior", prior, str(len(known)), low=0)
        logits = logits + prior.cpu().double().log()
    weights = torch.softmax(logits, dim=1)
    mean = (weights @ known).view_as(x_t).to(x_t.dtype).to(x_t.device)
    return (mean, weights) if return_weights else mean


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A world of round Gaussian clouds, in which every question about noising has an exact answer.

    Args:
        means: (K, D) float64 centres.
        stds: (K,) float64 widths, each at least 0 (0: a point).
        weights: (K,) float64 shares that sum to 1.

    Below, ``t=None`` means the clean world (abar = 1).
    """

    means: torch.Tensor
    stds: torch.Tensor
    weights: torch.Tensor

    def __post_init__(self) -> None:
        errors.tensor("means", self.means, "K D", torch.float64)
        k = str(len(self.means))
        errors.tensor("stds", self.stds, k, torch.float64, low=0)
        errors.tensor("weights", self.weights, k, torch.float64, low=0)
        total = self.weights.sum().item()
        errors.expect(abs(total - 1) < 1e-9, f"weights sum to {total}; expected 1.")

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """(n, D) clean points."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.stds[which, None] * noise

    def log_prob(self, x: torch.Tensor, t: Time | None, schedule: Schedule) -> torch.Tensor:
        """log density of noisy points x (B, D) at t: (B,). Each cloud stays a Gaussian."""
        return self._parts(x, t, schedule)[0].logsumexp(1)

    def denoise(self, x: torch.Tensor, t: Time, schedule: Schedule) -> torch.Tensor:
        """E[x_0 | x_t = x], the ideal denoiser, (B, D).

        Within a cloud it is linear regression; between clouds, a weighted mean.
        """
        errors.tensor("x", x, f"B {self.means.shape[1]}", "float")
        joint, signal, variance = self._parts(x.double(), t, schedule)
        pull = signal * self.stds**2 / variance  # (B, K)
        offset = x[:, None] - signal[:, :, None] * self.means  # (B, K, D)
        within = self.means + pull[:, :, None] * offset
        return (torch.softmax(joint, 1)[:, :, None] * within).sum(1).to(x.dtype)

    def cdf(self, x: torch.Tensor, t: Time | None, schedule: Schedule) -> torch.Tensor:
        """Share of noisy points left of x (B, 1), one dimension only: (B,)."""
        errors.tensor("x", x, "B 1", torch.float64)
        _, signal, variance = self._parts(x, t, schedule)
        return (self.weights * ndtr((x - signal * self.means[:, 0]) / variance.sqrt())).sum(1)

    def flow(
        self, x: torch.Tensor, t: Time, t_end: Time | None, schedule: Schedule
    ) -> torch.Tensor:
        """Where the probability-flow ODE takes x (B, 1) from ``t`` to ``t_end``, in one dimension.

        Paths on a line cannot cross, so each keeps the same share of points to its left; the end is
        the place with that share, found by bisection to about 1e-14.
        """
        share = self.cdf(x, t, schedule)
        reach = self.means.abs().max() + 40 * (1 + self.stds.max())
        low, high = torch.full_like(x, -reach), torch.full_like(x, reach)
        for _ in range(100):
            middle = (low + high) / 2
            left = (self.cdf(middle, t_end, schedule) < share)[:, None]
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return (low + high) / 2

    def _parts(
        self, x: torch.Tensor, t: Time | None, schedule: Schedule
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log(weight * density) of each cloud (B, K), the signal (B or 1, 1), variances (., K)."""
        errors.expect(
            t is not None or bool((self.stds > 0).all()),
            "A cloud of width 0 has no density in the clean world (t=None); give it a small width.",
        )
        abar = torch.ones((), dtype=torch.float64) if t is None else schedule.alpha_bar(t)
        abar = abar.reshape(-1, 1)
        variance = abar * self.stds**2 + (1 - abar)
        distance = (x[:, None] - abar.sqrt()[:, :, None] * self.means).square().sum(2)
        log_density = -0.5 * (distance / variance + x.shape[1] * (2 * math.pi * variance).log())
        return self.weights.log() + log_density, abar.sqrt(), variance


def _same(name: str, x: torch.Tensor, other: str, like: torch.Tensor) -> None:
    """Shape and type must agree; values are not looked at, this runs in inner loops."""
    errors.tensor(other, like, dtype="float", finite=False)
    errors.tensor(name, x, dtype=like.dtype, finite=False)
    errors.expect(
        x.shape == like.shape,
        f"{name} has shape {tuple(x.shape)}; expected that of {other}, {tuple(like.shape)}.",
    )
