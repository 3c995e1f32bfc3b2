"""Results that take too long for a notebook: ``python -m companion measure NAME``.

A measurement is a function that returns plain numbers, marked with ``@measurement``, here or in a
room that ``ROOMS`` names. What it says is written to ``book/results/NAME.json`` beside the command,
the seeds, the machine and the hashes of the shipped weights that it used. A notebook loads it with
:func:`load`, which refuses results whose weights are not the shipped ones any more, and runs a part
of it again.
"""

import math
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion import __version__, checkpoints, data, diffusion, errors, samplers
from companion.adm import ADMUNet
from companion.recipes import DigitClassifier
from companion.schedule import Schedule
from companion.scores import frechet
from companion.train import hardware

ROOMS = (  # the other modules that hold measurements
    "asking", "beside", "changing", "contest", "decoding", "doubles", "examination", "factors",
    "guiding", "looking", "mapping", "matching", "reading", "repainting", "repeating",
)  # fmt: skip
SEEDS = (0, 1, 2)  # of what is measured three times
RESULTS = Path(__file__).resolve().parents[1] / "book" / "results"
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "noise-to-pictures" / "results"


@dataclass(frozen=True)
class Measurement:
    """One entry: what it measures, on which shipped weights, and how long it takes on one core."""

    run: Callable[[], dict[str, Any]]
    about: str
    minutes: float
    needs: tuple[str, ...]


MEASUREMENTS: dict[str, Measurement] = {}


def measurement(name: str, about: str, minutes: float, needs: tuple[str, ...] = ()) -> Callable:
    """Register a function that returns what goes into the file under ``name``."""

    def register(run: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        MEASUREMENTS[name] = Measurement(run, about, minutes, needs)
        return run

    return register


def measurements() -> dict[str, Measurement]:
    """All of them, by name; importing a room registers what it holds."""
    for room in ROOMS:
        import_module(f"companion.{room}")
    return MEASUREMENTS


def measure(name: str, out: str | Path | None = None) -> Path:
    """Run a measurement on one thread and write what it found.

    Args:
        name: One of ``measurements()``.
        out: File to write; default ``book/results/NAME.json``.

    Returns:
        The file.
    """
    errors.one_of("the measurement", name, measurements())
    entry, path = MEASUREMENTS[name], Path(out) if out else RESULTS / f"{name}.json"
    hashes = _hashes(entry.needs)  # missing weights show now
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist; the results go to {path}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        found = entry.run()
        head = {
            "name": name,
            "about": entry.about,
            "command": f"python -m companion measure {name}",
            "weights": hashes,
            "hardware": hardware(torch.device("cpu")),
            "torch": torch.__version__.split("+")[0],
            "companion": __version__,
            "minutes": round((time.process_time() - started) / 60, 2),
        }
    finally:
        torch.set_num_threads(threads)
    checkpoints.write_json(path, head | found)
    return path


def load(name: str, path: str | Path | None = None) -> dict[str, Any]:
    """Read stored results, refusing those of other weights than the shipped ones.

    Raises:
        FileNotFoundError: Nothing was measured yet.
        ValueError: The weights have changed since; says how to measure again.
    """
    errors.one_of("the measurement", name, measurements())
    if path is None:  # the checkout's, or on Colab and the like what was installed with the library
        path = (RESULTS if RESULTS.is_dir() else INSTALLED) / f"{name}.json"
    path = Path(path)
    again = f"python -m companion measure {name}"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. It comes with the book's repository; to make it: {again}"
        )
    found = checkpoints.read_json(path)
    for weights, shipped in _hashes(MEASUREMENTS[name].needs).items():
        measured = found.get("weights", {}).get(weights)
        errors.expect(
            measured == shipped,
            f"{path} was measured with other weights of {weights!r} ({str(measured)[:12]} …) than"
            f" the shipped ones ({shipped[:12]} …). Measure again: {again}",
        )
    return found


def _hashes(names: Sequence[str]) -> dict[str, str]:
    folders = {name: checkpoints.find_weights(checkpoints.WEIGHTS / name) for name in names}
    return {name: checkpoints.sha256(path) for name, path in folders.items()}


def over_seeds(
    values: Sequence[float], low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    """Mean of independent runs with its 95 % interval (Student's t), cut at ``low`` and ``high``.

    Three runs are few: the interval is 2.5 standard deviations wide on either side.
    """
    from scipy.stats import t

    x = torch.tensor(values, dtype=torch.float64)
    errors.expect(len(x) > 1, f"there are {len(x)} runs; an interval needs two at least.")
    half = t.ppf(0.975, len(x) - 1) * x.std().item() / len(x) ** 0.5
    ends = [x.mean().item() - half, x.mean().item() + half]
    ends[0] = ends[0] if low is None else max(low, ends[0])
    ends[1] = ends[1] if high is None else min(high, ends[1])
    return {"value": x.mean().item(), "low": ends[0], "high": ends[1], "runs": x.tolist()}


def mean(values: Tensor | Sequence[float]) -> dict[str, float]:
    """A mean over prompts or pictures with its 95 % interval by Student's t."""
    found = over_seeds(values.tolist() if isinstance(values, Tensor) else values)
    return {key: found[key] for key in ("value", "low", "high")}


# --- fewer-steps: what a call of the network buys ------------------------------------------------

CALLS = (3, 5, 9, 19, 39)  # odd, so that Heun, with 2 n - 1 calls for n steps, can spend them all
CALLERS = ("ddpm", "ddim", "heun", "dpmpp_2m")
SPACED = (5, 9)  # calls with which spacings are compared
RHOS = {"even in λ": math.inf, "EDM": 7.0}  # spacings by noise: samplers.edm_timesteps


def digits_denoiser() -> Callable[[Tensor, Tensor], Tensor]:
    """The shipped digits network as a denoiser: (x, t) -> x0_hat, cut to [-1, 1]."""
    unet, schedule = ADMUNet.from_pretrained(checkpoints.WEIGHTS / "digits"), Schedule.linear()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return diffusion.to_x0(unet(x, t), x, t, schedule, "epsilon").clamp(-1, 1)

    return denoise


@measurement(
    "fewer-steps",
    "Fréchet distance of drawn digits from those trained on, against calls of the network and by"
    " spacing: three seeds, with 95 % intervals of the mean by Student's t",
    minutes=12,
    needs=("digit-classifier", "digits"),
)
def fewer_steps(
    seeds: Sequence[int] = SEEDS, n: int = 1000, calls: Sequence[int] = CALLS
) -> dict[str, Any]:
    """Chapter 4's comparison. For each seed all samplers start from the same noise."""
    from companion.contest import digits_split

    schedule, denoise = Schedule.linear(), digits_denoiser()
    reader, known = DigitClassifier.from_pretrained(), digits_split()[0]
    with torch.no_grad():
        real = reader.features(data.to_unit(known))
    found: dict[str, dict[str, list[float]]] = {}

    @torch.no_grad()
    def note(row: str, column: object, drawn: Tensor) -> None:
        distance = frechet(real, reader.features(data.to_unit(drawn)))
        found.setdefault(row, {}).setdefault(str(column), []).append(distance)

    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        x_T = torch.randn(n, *known.shape[1:], generator=g)
        note("real", n, known[torch.randperm(len(known), generator=g)[:n]])
        for name in CALLERS:
            for spent in calls:
                steps = (spent + 1) // 2 if name == "heun" else spent
                ts = samplers.timesteps(name, steps, schedule, "trailing")
                draw = samplers.SAMPLERS[name]
                note(name, spent, draw(denoise, x_T, ts, schedule, generator=g))
        for name in ("ddim", "dpmpp_2m"):
            draw = samplers.SAMPLERS[name]
            for steps in SPACED:
                for spacing in (*samplers.SPACINGS, *RHOS):
                    if spacing in RHOS:
                        ts = samplers.edm_timesteps(steps, schedule, RHOS[spacing])
                    else:
                        ts = samplers.timesteps(name, steps, schedule, spacing)
                    note(f"{name}, {steps} calls", spacing, draw(denoise, x_T, ts, schedule))
    rows = {
        row: {column: over_seeds(runs, low=0) for column, runs in columns.items()}
        for row, columns in found.items()
    }
    return {"seeds": list(seeds), "pictures": n, "calls": list(calls), "rows": rows}
