"""What the systems share: a published folder opened part by part, and its scheduler read.

A system's folder has one subfolder a part and ``model_index.json``, which names the stock class of
each. Nothing in it is ignored: a part that is unknown here is refused by name, and one that is
knowingly left out (a safety checker) is said to be.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from companion import errors, samplers
from companion.checkpoints import CheckpointError, read_config, read_json, write_json
from companion.pretrained import Pretrained, locate
from companion.schedule import Schedule, draw
from companion.tokenizer import Tokenizer

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

    @property
    def sampler(self) -> str:
        """The sampler that the folder asks for."""
        return SAMPLER_OF[self.published]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file as it was read (but no infinity, which is not JSON)."""
        plain = {k: v for k, v in self.stored.items() if v != -math.inf}
        write_json(Path(folder) / "scheduler_config.json", plain)

    def timesteps(self, sampler: str, steps: int, steps_offset: int | None = None) -> Tensor:
        """The descending timesteps, spaced as the folder says or else as the sampler does."""
        spacing = self.config.timestep_spacing
        offset = self.config.steps_offset if steps_offset is None else steps_offset
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
    ) -> Tensor:
        """Sample with the settings that the folder has for this sampler."""
        c, options = self.config, {}
        if clip and c.clip_sample:
            options["clip"] = c.clip_sample_range
        if sampler == "ddpm":
            options["variance"] = c.variance_type or "fixed_small"
        if sampler == "ddim":
            options["rederive"] = False
            ends_at_one = c.set_alpha_to_one
            if ends_at_one is None:
                ends_at_one = self.published != "PNDMScheduler"
            if not ends_at_one:
                options["final_alpha_cumprod"] = self.schedule.alphas_cumprod[0].item()
        return samplers.SAMPLERS[sampler](
            denoise, x, timesteps, self.schedule, generator=generator, callback=callback, **options
        )


class System:
    """Text in, pictures out; a folder of parts. Attributes are named as the subfolders are."""

    opens: ClassVar[tuple[str, ...]]  # the pipelines whose folders this class opens, first saved
    parts: ClassVar[dict[str, type]]  # subfolder -> the class that opens it
    optional: ClassVar[tuple[str, ...]] = ()  # parts that not every pipeline has
    skipped: ClassVar[dict[str, str]] = {}  # parts that are left out, and what to say of it

    def __init__(self, **parts: Any) -> None:
        for name in self.parts:
            errors.expect(
                parts.get(name) is not None or name in self.optional,
                f"{type(self).__name__} needs {name}.",
            )
            setattr(self, name, parts.pop(name, None))
        errors.expect(not parts, f"{type(self).__name__} has no part {', '.join(parts)}.")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> Self:
        """Open a published folder.

        Args:
            folder: A folder with ``model_index.json``, or a hub id (``pretrained.locate``).
            dtype: Type of the parameters.
            revision: Commit, tag or branch on the hub.

        Raises:
            CheckpointError: A part is missing, truncated, altered, or not implemented here.
        """
        root = locate(folder, revision=revision)
        found = cls._index(root)
        for name, why in cls.skipped.items():
            if name in found and why:
                log.warning("%s: %s", root / name, why)
        return cls(**{name: _open(cls.parts[name], root, name, dtype) for name in cls.parts
                      if name in found})  # fmt: skip

    @classmethod
    def _index(cls, root: Path) -> set[str]:
        """The parts that ``model_index.json`` lists; an error where it is not this system's."""
        path = root / "model_index.json"
        index = read_json(path)
        kind = index.get("_class_name")
        if kind not in cls.opens:
            raise CheckpointError(
                f"{path}: _class_name is {kind!r}; {cls.__name__} opens {' and '.join(cls.opens)}."
            )
        listed = {k: v for k, v in index.items() if isinstance(v, list)}
        found = {k for k, v in listed.items() if v[1:] and v[1] is not None}
        for name in sorted(found):
            if name not in cls.parts and name not in cls.skipped:
                raise CheckpointError(
                    f"{path}: {cls.__name__} has no part {name!r} ({listed[name][1]}), so it cannot"
                    " promise the same pictures."
                )
        lacking = [n for n in cls.parts if n not in found and n not in cls.optional]
        if lacking:
            raise CheckpointError(f"{path} lists no {', '.join(lacking)}; {cls.__name__} needs it.")
        return found

    @classmethod
    def check(cls, folder: str | Path) -> list[str]:
        """What is wrong with a folder: every part is opened, one at a time. Empty: all is well."""
        try:
            root = locate(folder)
            found = cls._index(root)
        except CheckpointError as error:
            return [str(error)]
        findings, opened = [], {}
        for name in (n for n in cls.parts if n in found):
            try:
                part = _open(cls.parts[name], root, name, torch.float32)
            except CheckpointError as error:
                findings.append(str(error))
                continue
            if isinstance(part, Pretrained):  # its shapes are enough from here on
                findings += [
                    f"{root / name}: tensor {n!r} is NaN or infinite"
                    for n, p in part.named_parameters()
                    if not bool(torch.isfinite(p).all())
                ]
                part = part.to("meta")
            opened[name] = part
        if not findings:
            try:
                cls(**opened)  # do the parts fit together?
            except ValueError as error:
                findings.append(f"{root}: {error}")
        return findings

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write a folder that ``from_pretrained`` and the stock pipeline open.

        Args:
            folder: Where; made if need be.
            dtype: Storage type of the weights, such as ``torch.float16``; default: as they are.
        """
        folder = Path(folder)
        present = {n: p for n in self.parts if (p := getattr(self, n)) is not None}
        for name, part in present.items():
            options = {"dtype": dtype} if isinstance(part, Pretrained) else {}
            part.save_pretrained(folder / name, **options)
        write_json(folder / "model_index.json", self.index())
        return folder

    def index(self) -> dict[str, object]:
        """What goes into ``model_index.json``."""
        listed = {}
        for name in sorted(self.parts):
            part = getattr(self, name)
            if part is not None:
                listed[name] = [*_home(part)]
        return {"_class_name": self.opens[0], "_diffusers_version": "0.10.0", **listed}

    def to(self, device: str | torch.device) -> Self:
        """Move all networks; noise is still drawn on the CPU, so a seed stays the same picture."""
        for part in self._networks():
            part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self._networks()[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the samplers compute in: float32, or float64 when the networks do."""
        own = next(self._networks()[0].parameters()).dtype
        return torch.promote_types(own, torch.float32)

    def _networks(self) -> list[Pretrained]:
        return [p for n in self.parts if isinstance(p := getattr(self, n), Pretrained)]

    def noise(
        self, shape: tuple[int, ...], generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """``latents``, checked, or fresh noise drawn where the generator lives (the CPU)."""
        if latents is None:
            latents = draw(torch.empty(shape, dtype=self.dtype), generator)
        sizes = " ".join(map(str, shape))
        errors.tensor("latents", latents, sizes, "float")
        return latents.to(self.device, self.dtype)


def _open(kind: type, root: Path, name: str, dtype: torch.dtype) -> Any:
    options = {"dtype": dtype} if issubclass(kind, Pretrained) else {}
    return kind.from_pretrained(root, name, **options)


def _home(part: Any) -> Iterator[str]:
    """Where stock finds a part's class: library and name, as published folders spell them."""
    published = "CLIPTokenizer" if isinstance(part, Tokenizer) else part.published
    library = "transformers" if published.startswith("CLIP") else "diffusers"
    # Trap: the one class that stock keeps beside a pipeline rather than among its models.
    yield "unclip" if published.startswith("UnCLIPText") else library
    yield published


def prompts(name: str, prompt: str | list[str], count: int | None = None) -> list[str]:
    """One text or several as a list; one text stands for all ``count``."""
    if isinstance(prompt, str):
        return [prompt] * (count or 1)
    if not isinstance(prompt, list | tuple) or not all(isinstance(p, str) for p in prompt):
        raise TypeError(f"{name} is {type(prompt).__name__}; expected a str or a list of str.")
    errors.expect(len(prompt) > 0, f"{name} is an empty list; expected at least one text.")
    errors.expect(
        count is None or len(prompt) == count,
        f"{name} has {len(prompt)} texts; expected one, or one for each of {count} prompts.",
    )
    return list(prompt)


def generators(generator: Generators | None, seed: int | None, count: int) -> Generators:
    """The source of all noise: a generator, one for each picture, a seed, or fresh entropy."""
    errors.expect(
        generator is None or seed is None,
        "generator and seed are both given; expected one of them: a seed makes a new generator.",
    )
    if isinstance(generator, list | tuple):
        errors.expect(
            len(generator) == count,
            f"{len(generator)} generators for {count} pictures; expected one for each.",
        )
        return list(generator)
    if generator is not None:
        return generator
    fresh = torch.Generator()
    if seed is None:
        fresh.seed()
        return fresh
    errors.number("seed", seed, low=0, high=2**63 - 1, integer=True)
    return fresh.manual_seed(seed)
