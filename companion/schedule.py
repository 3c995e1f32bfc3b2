"""How fast a picture turns into static: the noise schedule and all that follows from it.

A schedule is a table of ``T`` small numbers, the betas. Noising step ``t`` keeps a little less of
the picture and mixes in a little noise::

    x_t = sqrt(1 - beta_t) * x_{t-1} + sqrt(beta_t) * noise           DDPM eq. 2 (arXiv 2006.11239)

so that after all steps up to ``t`` one jump does the same::

    x_t = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * noise               DDPM eq. 4

with ``abar_t`` the product of all ``1 - beta`` so far. **Row 0 is the first noising step**: the
table runs from 0 to T - 1 as in diffusers, ``alphas_cumprod[t]`` is abar after t + 1 steps, and the
clean picture, abar = 1, has no row. (The papers count from 1, so their t is ours plus one.)

All numbers are float64 and live on the CPU; a result moves to the picture's type and device last.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from companion import errors
from companion.checkpoints import CheckpointError

# What a scheduler_config.json that leaves keys out means: (beta_schedule, beta_start, beta_end).
_DDPM = ("linear", 0.0001, 0.02)
_SMALL = ("linear", 0.00085, 0.012)
_LATENT = ("scaled_linear", 0.00085, 0.012)
DEFAULTS = {
    "DDIMInverseScheduler": _DDPM,
    "DDIMScheduler": _DDPM,
    "DDPMScheduler": _DDPM,
    "DEISMultistepScheduler": _DDPM,
    "DPMSolverMultistepInverseScheduler": _DDPM,
    "DPMSolverMultistepScheduler": _DDPM,
    "DPMSolverSDEScheduler": _SMALL,
    "DPMSolverSinglestepScheduler": _DDPM,
    "EulerAncestralDiscreteScheduler": _DDPM,
    "EulerDiscreteScheduler": _DDPM,
    "HeunDiscreteScheduler": _SMALL,
    "KDPM2AncestralDiscreteScheduler": _SMALL,
    "KDPM2DiscreteScheduler": _SMALL,
    "LCMScheduler": _LATENT,
    "LMSDiscreteScheduler": _DDPM,
    "PNDMScheduler": _DDPM,
    "UnCLIPScheduler": ("squaredcos_cap_v2", 0.0001, 0.02),
    "UniPCMultistepScheduler": _DDPM,
}


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A variance-preserving noise schedule with ``T`` steps.

    Usually made by one of the constructors below; ``Schedule(betas)`` takes any table.

    Args:
        betas: (T,) numbers in (0, 1); the last one may be 1, which leaves nothing of the picture.

    Attributes:
        betas: (T,) float64, the variance of the noise that each step adds.
        alphas_cumprod: (T,) float64, abar: how much of the picture's variance is left.
    """

    betas: torch.Tensor

    def __post_init__(self) -> None:
        errors.tensor("betas", self.betas, "T", "float")
        betas = self.betas.detach().cpu().double()
        errors.expect(
            bool((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1),
            f"betas run from {betas.min():.4g} to {betas.max():.4g}; expected numbers strictly"
            " between 0 and 1 (only the last may be 1).",
        )
        object.__setattr__(self, "betas", betas)

    # --- the usual tables ------------------------------------------------------------------------

    @classmethod
    def linear(
        cls, T: int = 1000, *, beta_start: float = 0.0001, beta_end: float = 0.02
    ) -> "Schedule":
        """Betas on a straight line, DDPM section 4.

        The ends suit T = 1000 and are not rescaled, as in diffusers: with T = 100 more than half of
        the picture's amplitude (0.60) is left at the end. Train with 1000 steps, sample with fewer.
        """
        _check(T, beta_start, beta_end)
        return cls(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "Schedule":
        """Stable Diffusion's table: the square roots of the betas lie on a straight line.

        Its paper and its code call this "linear".
        """
        _check(T, beta_start, beta_end)
        return cls(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, T: int = 1000, *, s: float = 0.008, max_beta: float = 0.999) -> "Schedule":
        """abar falls like a squared cosine: Improved DDPM eq. 17 (2102.09672), betas capped."""
        errors.number("T", T, low=1, integer=True)
        errors.number("s", s, low=0)
        errors.number("max_beta", max_beta, low=1e-12, high=1)
        f = [math.cos((i / T + s) / (1 + s) * math.pi / 2) ** 2 for i in range(T + 1)]
        betas = [min(1 - after / before, max_beta) for before, after in zip(f, f[1:], strict=False)]
        return cls(torch.tensor(betas, dtype=torch.float64))

    @classmethod
    def from_config(cls, folder: str | Path) -> "Schedule":
        """Read the table that a diffusers ``scheduler_config.json`` describes.

        Args:
            folder: The file, the folder that holds it, or a pipeline's folder (``scheduler/``).

        Raises:
            CheckpointError: No such file, or a value in it that is not implemented here, by name.
        """
        path, config = _read(Path(folder))
        kind = config.get("_class_name", "DDPMScheduler")
        if kind not in DEFAULTS:
            raise CheckpointError(
                f"{path}: _class_name is {kind!r}, which has no table of betas that is known here;"
                f" expected one of {', '.join(sorted(DEFAULTS))}."
            )
        name, beta_start, beta_end = DEFAULTS[kind]
        name = config.get("beta_schedule", name)
        ends = {
            "beta_start": config.get("beta_start", beta_start),
            "beta_end": config.get("beta_end", beta_end),
        }
        T = config.get("num_train_timesteps", 1000)
        try:
            if config.get("trained_betas") is not None:
                schedule = cls(torch.tensor(config["trained_betas"], dtype=torch.float64))
            elif name == "linear":
                schedule = cls.linear(T, **ends)
            elif name == "scaled_linear":
                schedule = cls.scaled_linear(T, **ends)
            elif name == "squaredcos_cap_v2":
                schedule = cls.cosine(T)
            else:
                raise ValueError(
                    f"beta_schedule is {name!r}; expected 'linear', 'scaled_linear' or"
                    " 'squaredcos_cap_v2', or a list in trained_betas."
                )
        except (TypeError, ValueError) as problem:
            raise CheckpointError(f"{path}: {problem}") from problem
        rescale = config.get("rescale_betas_zero_snr", False)
        if not isinstance(rescale, bool):
            raise CheckpointError(
                f"{path}: rescale_betas_zero_snr is {rescale!r}; expected true or false."
            )
        return schedule.rescale_zero_snr() if rescale else schedule

    def rescale_zero_snr(self) -> "Schedule":
        """A new schedule that ends in pure noise: Algorithm 1 of Lin et al. (arXiv 2305.08891).

        sqrt(abar) is shifted so that its last value is 0 and stretched so that its first one stays.
        """
        signal = self.alphas_cumprod.sqrt()
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        abar = signal**2
        return Schedule(1 - torch.cat([abar[:1], abar[1:] / abar[:-1]]))

    # --- what follows from the betas -------------------------------------------------------------

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """(T,) float64: abar_t, the product of 1 - beta over steps 0 ... t."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """(T,) float64: noise per unit of signal, sqrt((1 - abar) / abar); the ODE's clock."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def alpha_bar(self, t: int | float | torch.Tensor) -> torch.Tensor:
        """abar at ``t``, looked up for whole ``t`` and interpolated between rows.

        Between two rows sigma runs on a straight line, as in diffusers' Euler and Heun schedulers.
        These samplers use fractional timesteps; nothing else needs them.

        Args:
            t: A number or a tensor of any shape, from 0 to T - 1, whole or fractional.

        Returns:
            float64 on the CPU, the shape of ``t``.
        """
        t = self._checked(t)
        if not t.is_floating_point():
            return self.alphas_cumprod[t]
        low, high = t.floor().long(), t.ceil().long()
        sigma = self.sigmas[low] * (high - t) + self.sigmas[high] * (t - low)
        errors.expect(
            not bool(((low != high) & sigma.isinf()).any()),
            f"t falls between the last two rows, {len(self) - 2} and {len(self) - 1}, and the last"
            " has no signal at all (zero terminal SNR): nothing can be interpolated there."
            " Use whole timesteps.",
        )
        return torch.where(low == high, self.alphas_cumprod[low], 1 / (1 + sigma**2))

    def signal(self, t: int | float | torch.Tensor) -> torch.Tensor:
        """sqrt(abar): what the picture is multiplied by. Arguments as for ``alpha_bar``."""
        return self.alpha_bar(t).sqrt()

    def noise(self, t: int | float | torch.Tensor) -> torch.Tensor:
        """sqrt(1 - abar): the standard deviation of the noise. Arguments as for ``alpha_bar``."""
        return (1 - self.alpha_bar(t)).sqrt()

    def snr(self, t: int | float | torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio abar / (1 - abar). Arguments as for ``alpha_bar``."""
        abar = self.alpha_bar(t)
        return abar / (1 - abar)

    def log_snr(self, t: int | float | torch.Tensor) -> torch.Tensor:
        """Natural logarithm of the SNR; -inf where nothing is left. Arguments as before."""
        abar = self.alpha_bar(t)
        return abar.log() - (1 - abar).log()

    def t_of_log_snr(self, log_snr: float | torch.Tensor) -> torch.Tensor:
        """The (fractional) timestep at which the log-SNR has a given value; undoes ``log_snr``.

        Args:
            log_snr: A number or a tensor, between ``log_snr(T - 1)`` and ``log_snr(0)``.

        Returns:
            float64, the shape of ``log_snr``.
        """
        wanted = torch.as_tensor(log_snr, dtype=torch.float64).cpu()
        least, most = self.log_snr(len(self) - 1).item(), self.log_snr(0).item()
        slack = 1e-9  # a log-SNR that came from the table may be off by rounding
        errors.expect(
            bool(((wanted >= least - slack) & (wanted <= most + slack)).all()),
            f"log_snr runs from {wanted.min():.4g} to {wanted.max():.4g}; this schedule covers"
            f" {least:.4g} (row {len(self) - 1}) to {most:.4g} (row 0).",
        )
        if len(self) == 1:
            return torch.zeros_like(wanted)
        sigma = torch.exp(-wanted / 2)
        high = torch.searchsorted(self.sigmas, sigma).clamp(1, len(self) - 1)
        low = high - 1
        # In the last interval of a zero-SNR table only the ends exist; the span is infinite.
        part = (sigma - self.sigmas[low]) / (self.sigmas[high] - self.sigmas[low])
        part = torch.where(sigma >= self.sigmas[high], torch.ones_like(part), part)
        return (low + part).clamp(0, len(self) - 1)

    # --- noising ---------------------------------------------------------------------------------

    def add_noise(
        self, x0: torch.Tensor, noise: torch.Tensor, t: int | torch.Tensor
    ) -> torch.Tensor:
        """Jump from the clean picture straight to step ``t``: DDPM eq. 4.

        Args:
            x0: (B, ...) clean pictures, floating point.
            noise: Standard normal, same shape and type as ``x0``.
            t: Whole timestep(s) from 0 to T - 1: one for all, or (B,). For a fractional one write
                ``signal(t) * x0 + noise(t) * noise`` yourself.

        Returns:
            (B, ...) noisy pictures, type and device of ``x0``.
        """
        errors.tensor("x0", x0, dtype="float")
        errors.tensor("noise", noise, dtype=x0.dtype)
        errors.expect(
            noise.shape == x0.shape,
            f"noise has shape {tuple(noise.shape)}; expected that of x0, {tuple(x0.shape)}.",
        )
        t = self.whole(t)
        return spread(self.signal(t), x0) * x0 + spread(self.noise(t), x0) * noise

    def step(
        self, x: torch.Tensor, t: int | torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """One forward step into row ``t``: x sqrt(1 - beta_t) + sqrt(beta_t) noise, DDPM eq. 2.

        Starting from a clean picture, steps t = 0, 1, ..., n leave the same distribution as one
        ``add_noise`` with t = n.

        Args:
            x: (B, ...) pictures after the step before.
            t: Whole timestep(s): one for all, or (B,).
            generator: Source of the noise, drawn on its own device and then moved.
        """
        errors.tensor("x", x, dtype="float")
        beta = self.betas[self.whole(t)]
        return spread((1 - beta).sqrt(), x) * x + spread(beta.sqrt(), x) * draw(x, generator)

    def __len__(self) -> int:
        """The number of steps, T."""
        return len(self.betas)

    def __repr__(self) -> str:
        ends = f"{self.betas[0]:.4g} ... {self.betas[-1]:.4g}"
        return f"Schedule(T={len(self)}, betas {ends}, last abar {self.alphas_cumprod[-1]:.4g})"

    # --- checks ----------------------------------------------------------------------------------

    def _checked(self, t: int | float | torch.Tensor) -> torch.Tensor:
        """``t`` as an int64 or float64 tensor on the CPU, within 0 ... T - 1."""
        if isinstance(t, bool) or not isinstance(t, int | float | torch.Tensor):
            raise TypeError(f"t is {t!r} ({type(t).__name__}); expected a number or a tensor.")
        t = torch.as_tensor(t, dtype=torch.float64) if isinstance(t, float) else torch.as_tensor(t)
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t has dtype {t.dtype}; expected whole or real numbers.")
        errors.tensor("t", t, low=0, high=len(self) - 1)
        return t.cpu().double() if t.is_floating_point() else t.cpu().long()

    def whole(self, t: int | torch.Tensor) -> torch.Tensor:
        """``t`` checked, as an int64 tensor on the CPU; a fractional type is refused."""
        if isinstance(t, float) or (isinstance(t, torch.Tensor) and t.is_floating_point()):
            kind = t.dtype if isinstance(t, torch.Tensor) else "float"
            raise TypeError(
                f"t has type {kind}; expected whole timesteps from 0 to {len(self) - 1}"
                " (an int or an integer tensor), not fractions of T."
            )
        return self._checked(t)


def spread(c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Shape per-picture numbers so that they multiply pictures: () stays, (B,) becomes (B, 1, ...).

    The result has the type and device of ``x``.
    """
    c = c.to(x.dtype).to(x.device)  # the type first: some devices have no float64
    if c.ndim == 0:
        return c
    errors.expect(
        c.shape == x.shape[:1],
        f"t has shape {tuple(c.shape)}; expected a single number or one for each of the"
        f" {len(x) if x.ndim else 0} pictures.",
    )
    return c.view(-1, *[1] * (x.ndim - 1))


def draw(
    x: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Standard normal noise of the shape, type and device of ``x``.

    It is drawn where the generator lives (the CPU, as a rule) and then moved, so that one seed
    means one picture on every device. A list of generators gives each picture its own.
    """
    if isinstance(generator, list | tuple):
        errors.expect(
            len(generator) == len(x),
            f"{len(generator)} generators for {len(x)} pictures; expected one for each.",
        )
        return torch.cat([draw(x[i : i + 1], one) for i, one in enumerate(generator)])
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is {type(generator).__name__}; expected a torch.Generator, for example"
            " torch.Generator().manual_seed(0). The library never draws from the global one."
        )
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device)
    return noise.to(x.device)


def _check(T: int, beta_start: float, beta_end: float) -> None:
    errors.number("T", T, low=1, integer=True)
    for name, value in {"beta_start": beta_start, "beta_end": beta_end}.items():
        errors.number(name, value)
        errors.expect(0 < value < 1, f"{name} is {value!r}; expected a number between 0 and 1.")


def _read(folder: Path) -> tuple[Path, dict]:
    """Find and read a scheduler_config.json."""
    name = "scheduler_config.json"
    tried = [folder, folder / name, folder / "scheduler" / name]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise CheckpointError(
            f"No {name} in {folder}; expected the file, its folder or a pipeline's folder."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise CheckpointError(f"{path} is not readable JSON: {problem}") from problem
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}; expected a JSON object.")
    return path, config
