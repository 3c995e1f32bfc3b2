"""What a folder says about noise and steps: ``scheduler_config.json``.

The file of a published folder names a class of the stock library, which there keeps the table of
betas, chooses the timesteps and does the steps. Here these are three things: ``schedule`` has the
table, ``samplers`` the steps, and ``Scheduler`` what the folder chose of both.
"""

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from companion import errors, samplers
from companion.checkpoints import CheckpointError, read_config, read_json, write_json
from companion.pretrained import locate
from companion.schedule import Schedule

log = logging.getLogger("companion")
Generators = torch.Generator | list[torch.Generator]

# Which of our samplers a folder's scheduler is. PNDM, which 2022's folders name, is not among them;
# DDIM goes through the same timesteps to the same end.
SAMPLER_OF = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "PNDMScheduler": "ddim",
    "UnCLIPScheduler": "ddpm",
}
# Settings of those schedulers with the values under which they change nothing here.
SCHEDULER_SWITCHES: dict[str, tuple[object, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "euler_at_final": (False,),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf,),
    "lower_order_final": (True,),  # the last step goes to abar = 1, where it is first order anyway
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
}
# These belong to settings that are off, or (skip_prk_steps) to PNDM alone.
SCHEDULER_NOTES = (
    "dynamic_thresholding_ratio", "flow_shift", "sample_max_value", "skip_prk_steps",
    "time_shift_type",
)  # fmt: skip


@dataclass(frozen=True)
class SchedulerConfig:
    """``scheduler_config.json``; None where a missing key means something else to each sampler."""

    num_train_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "learned_range"] | None
    ) = None


class Scheduler:
    """What a folder says about noise and steps. It walks nothing itself: ``samplers`` does.

    Args:
        schedule: The noise schedule.
        config: The rest of ``scheduler_config.json``.
        stored: The file's own keys and values, kept for saving.
    """

    def __init__(self, schedule: Schedule, config: SchedulerConfig, stored: Mapping) -> None:
        self.schedule, self.config, self.stored = schedule, config, dict(stored)
        self.published = str(stored.get("_class_name"))

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> Self:
        """Open a folder with ``scheduler_config.json``.

        Raises:
            CheckpointError: No file, or a setting or scheduler that is not implemented, by name.
        """
        path = locate(folder, subfolder) / "scheduler_config.json"
        stored = read_json(path)
        kind = stored.get("_class_name")
        if kind not in SAMPLER_OF:
            raise CheckpointError(
                f"{path}: _class_name is {kind!r}; expected one of {', '.join(SAMPLER_OF)}."
            )
        config = read_config(path, SchedulerConfig, SCHEDULER_NOTES, SCHEDULER_SWITCHES)
        return cls(Schedule.from_config(path), config, stored)

    @classmethod
    def of(cls, schedule: Schedule, stored: Mapping[str, object]) -> Self:
        """As if read from a file with these keys, which says of its betas what ``schedule`` is."""
        own = {k: v for k, v in stored.items() if not k.startswith(("_", "beta"))}
        return cls(schedule, SchedulerConfig(**own), stored)

    @property
    def sampler(self) -> str:
        """The sampler that the folder asks for."""
        return SAMPLER_OF[self.published]

    def choose(self, sampler: str | None) -> str:
        """The caller's sampler, checked, or else the folder's."""
        if sampler is None:
            if self.published == "PNDMScheduler":
                _say_no_pndm()
            return self.sampler
        errors.one_of("sampler", sampler, samplers.SAMPLERS)
        return sampler

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file as it was read (but no infinity, which is not JSON)."""
        plain = {k: v for k, v in self.stored.items() if v != -math.inf}
        write_json(Path(folder) / "scheduler_config.json", plain)

    def timesteps(
        self,
        sampler: str,
        steps: int,
        steps_offset: int | None = None,
        spacing: str | None = None,
    ) -> Tensor:
        """The descending timesteps, spaced as asked, or as the folder says, or as the sampler."""
        offset = self.config.steps_offset if steps_offset is None else steps_offset
        if spacing is None:
            spacing = self.config.timestep_spacing
            if self.published == "UnCLIPScheduler":
                spacing = "linspace"
                errors.number("steps", steps, low=2, integer=True)  # stock would divide 1 by zero
        return samplers.timesteps(sampler, steps, self.schedule, spacing, offset)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """DDPM eq. 4 at one timestep, whole or (Euler, Heun) fractional."""
        signal, std = self.schedule.signal(t).item(), self.schedule.noise(t).item()
        return signal * x0 + std * noise

    def start(self, noise: Tensor, sampler: str, timesteps: Tensor) -> Tensor:
        """Where a picture that is nothing but noise starts."""
        if sampler in ("euler", "heun") and self.config.timestep_spacing != "leading":
            # Trap: stock's sigma samplers then start from sigma times noise, without the 1 that
            # the (empty) picture would add: a touch less than variance 1.
            return noise * self.schedule.noise(timesteps[0]).item()
        return noise

    def walk(
        self,
        sampler: str,
        denoise: samplers.Denoiser,
        x: Tensor,
        timesteps: Tensor,
        *,
        generator: Generators,
        callback: samplers.Callback = None,
        clip: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Sample with the settings that the folder has for this sampler; ``eta`` is ``ddim``'s."""
        c, options = self.config, {}
        if clip and c.clip_sample:
            options["clip"] = c.clip_sample_range
        if sampler == "ddpm":
            options["variance"] = c.variance_type or "fixed_small"
        if sampler == "ddim":
            # Stock keeps the noise of the unclipped answer; unCLIP's forebears ADM and GLIDE derive
            # it anew, which strong guidance on pixels needs. (Stock never walks DDIM there.)
            options["rederive"] = self.published == "UnCLIPScheduler"
            options |= {"eta": eta, "final_alpha_cumprod": self._end}
        return samplers.SAMPLERS[sampler](
            denoise, x, timesteps, self.schedule, generator=generator, callback=callback, **options
        )

    def walk_back(
        self,
        denoise: samplers.Denoiser,
        x_0: Tensor,
        timesteps: Tensor,
        *,
        iterations: int = 1,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """The noise from which ``ddim``, unclipped and with ``eta`` 0, draws ``x_0``."""
        return samplers.ddim_invert(
            denoise, x_0, timesteps, self.schedule,
            iterations=iterations, callback=callback, final_alpha_cumprod=self._end,
        )  # fmt: skip

    @property
    def _end(self) -> float | None:
        """The level at which ``ddim`` ends: None is 1, the clean picture."""
        ends_at_one = self.config.set_alpha_to_one
        if ends_at_one is None:
            ends_at_one = self.published != "PNDMScheduler"
        return None if ends_at_one else self.schedule.alphas_cumprod[0].item()


@functools.cache  # once is enough
def _say_no_pndm() -> None:
    log.warning(
        "This folder asks for the sampler PNDM, which is not built here. DDIM draws instead: it"
        " visits the same timesteps, and its pictures are other ones than PNDM's. To choose for"
        " yourself, name one of %s (sampler=, --sampler).",
        ", ".join(samplers.SAMPLERS),
    )
