"""Speeds that the companion promises, measured: ``python -m companion.bench [NAME …]``.

A benchmark is a function that takes nothing and returns its measurements, one number a repetition,
marked with ``@benchmark``. Its table row shows the median, the range from the lowest to the highest
measurement, and what the house aims at. Nothing fails here: a busy machine is slow, and a test that
fails on a busy machine teaches people to ignore tests.

Beside the table are the tools for comparing two implementations fairly: taking turns, ratios with
an interval, memory, and how much arithmetic there is to do. What is compared with diffusers lives
beside the reference tests, in ``tests/reference/bench.py``: this package does not import it.
"""

import argparse
import ctypes
import gc
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Benchmark:
    """One row of the table."""

    measure: Callable[[], list[float]]
    what: str
    unit: str
    aim: str


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(
    what: str, unit: str, aim: str = ""
) -> Callable[[Callable[[], list[float]]], Callable[[], list[float]]]:
    """Register a function under its name: ``what`` is measured, in which ``unit``, at which aim."""

    def register(measure: Callable[[], list[float]]) -> Callable[[], list[float]]:
        BENCHMARKS[measure.__name__] = Benchmark(measure, what, unit, aim)
        return measure

    return register


@benchmark("import companion, after import torch", "s CPU", "< 0.2")
def import_time() -> list[float]:
    """Processor time that the import adds, each time in a fresh Python."""
    code = (
        "import time, torch\n"
        "started = time.process_time()\n"
        "import companion\n"
        "print(time.process_time() - started)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(5)]
    return [float(run.stdout) for run in runs]


if importlib.util.find_spec("companion.storybook") is not None:

    @benchmark("Storybook scenes of 64×64 drawn", "a s CPU", "≥ 300")
    def storybook_scenes() -> list[float]:
        """Batches of 64 random scenes, after one that is not counted."""
        import torch

        from companion import storybook

        generator = torch.Generator().manual_seed(0)
        rates = []
        for _ in range(6):
            scenes = storybook.sample(64, generator)
            started = time.process_time()
            storybook.render(scenes, size=64)
            rates.append(64 / (time.process_time() - started))
        return rates[1:]


# --- comparing two ways to do the same thing -----------------------------------------------------


class Cost(NamedTuple):
    """What one call took."""

    cpu: float  # seconds of all threads' processor time: other programs hardly change it
    wall: float  # seconds on a watch: on a busy machine mostly waiting
    memory: int | None  # the most bytes held beyond those held before; None: nobody tells


def in_turn(
    runs: Sequence[Callable[[], Any]], rounds: int, at_least: float = 0.1
) -> list[list[Cost]]:
    """Measure several functions side by side, so that a slow minute of the machine hits all alike.

    Every function runs once uncounted. In each round every function has one turn; the order is
    reversed from round to round. Memory is the system's own count (resident pages), so it sees all
    allocators; compare it within one process only: another one lays its memory out otherwise,
    which moved a large model's number by half.

    Args:
        runs: Functions without arguments.
        rounds: How many turns each gets.
        at_least: Seconds of processor time that a turn should take: quick functions are called
            several times in a turn.

    Returns:
        For each function the cost of one call, turn by turn.
    """
    calls = []
    for run in runs:
        first = _turn(run, 1).cpu
        if first < at_least:  # the first call of a quick function is not like the others
            first = max(_turn(run, 1).cpu, 1e-6)
        calls.append(math.ceil(at_least / first) if first < at_least else 1)
    gc.collect()
    found: list[list[Cost]] = [[] for _ in runs]
    for number in range(rounds):
        order = range(len(runs))
        for i in order if number % 2 == 0 else reversed(order):
            found[i].append(_turn(runs[i], calls[i]))
    return found


def _turn(run: Callable[[], Any], calls: int) -> Cost:
    before, memory = _forget_peak(), None
    cpu = wall = 0.0
    for number in range(calls):
        cpu, wall = cpu - time.process_time(), wall - time.perf_counter()
        run()
        cpu, wall = cpu + time.process_time(), wall + time.perf_counter()
        if number == 0 and before is not None:  # later calls find what the first one left behind
            memory = 1024 * max(0, _kilobytes("VmHWM") - before)
    return Cost(cpu / calls, wall / calls, memory)


def _forget_peak() -> int | None:
    """Kilobytes in use; from now on the system counts a new peak. None where it cannot."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what is free, or it would be reused
    except (OSError, AttributeError):
        pass  # another C library: the number may be too low
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _kilobytes("VmRSS")
    except OSError:
        return None


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Spread(NamedTuple):
    """A median, and the interval in which the median of very many measurements lies."""

    median: float
    low: float
    high: float
    confidence: float  # at least 0.95


def spread(values: Sequence[float]) -> Spread:
    """The median and its interval from order statistics, which assumes no shape of the noise.

    The true median has as many of n values below it as n tosses of a coin have heads. So the k-th
    lowest and the k-th highest value enclose it unless fewer than k tosses are heads, or fewer than
    k are tails; k is the greatest for which that has a probability of at most 5 %.

    Raises:
        ValueError: Fewer than 6 values: even the lowest and the highest would not enclose it in
            95 of 100 cases.
    """
    n = len(values)
    if n < 6:
        raise ValueError(f"{n} measurements; an interval needs at least 6.")
    missed, k = 2 * 0.5**n, 1  # with k = 1: no head, or no tail
    while (more := missed + 2 * math.comb(n, k) * 0.5**n) <= 0.05:
        missed, k = more, k + 1
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[k - 1], ordered[n - k], 1 - missed)


def flops(run: Callable[[], Any]) -> int:
    """Additions and multiplications in the matrix products, convolutions and attention of a call.

    What goes place by place (norms, SiLU, sums) is not counted.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
        (pictures, heads, queries, channels), keys = query, key[2]
        return 2 * pictures * heads * queries * keys * 2 * channels  # q kT, and weights times v

    # Trap: torch's counter does not know the attention that a CPU runs, and counts it as nothing.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        run()
    return counter.get_total_flops()


def product(size: int = 2048) -> tuple[Callable[[], Any], int]:
    """A product of two float32 matrices, and its ``flops``: as fast as arithmetic gets here."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def machine() -> str:
    """The machine and the versions in one line."""
    import torch

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


# --- whole pictures by the book's own systems ----------------------------------------------------

PROMPT = "a red house by the sea at dusk"


@cache
def pictures(name: str) -> list[Cost]:
    """What a picture costs of ``dalle2`` (256 x 256) or ``stable_diffusion`` (64 x 64), six times.

    With each system's own steps and sampler, and the guidance that it is examined with.
    """
    from companion import DALLE2, StableDiffusion, examination

    kind, scale = {
        "dalle2": (DALLE2, examination.DALLE2_GUIDANCE),
        "stable_diffusion": (StableDiffusion, examination.SD_GUIDANCE),
    }[name]
    system = kind.from_pretrained("storybook")
    return in_turn([lambda: system(PROMPT, guidance_scale=scale, seed=0)], rounds=6)[0]


def megabytes(name: str) -> list[float]:
    """The most that a picture held beyond what was held before; empty where nobody tells."""
    return [cost.memory / 1e6 for cost in pictures(name) if cost.memory is not None]


@benchmark("DALL·E 2, a picture of 256×256", "s", "< 20 on two cores")
def dalle2_picture() -> list[float]:
    """By the clock, from words to pixels, through all four stages."""
    return [cost.wall for cost in pictures("dalle2")]


@benchmark("  memory on top of the networks", "MB")
def dalle2_memory() -> list[float]:
    """Beside the time, from the same calls."""
    return megabytes("dalle2")


@benchmark("Stable Diffusion, a picture of 64×64", "s", "< 2 on two cores")
def stable_diffusion_picture() -> list[float]:
    """By the clock, from words to pixels."""
    return [cost.wall for cost in pictures("stable_diffusion")]


@benchmark("  memory on top of the networks", "MB")
def stable_diffusion_memory() -> list[float]:
    """Beside the time, from the same calls."""
    return megabytes("stable_diffusion")


# --- the table -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Measure the named benchmarks, or all, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m companion.bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args(arguments).names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")

    print(machine())
    print(f"{'':<38}{'median':>9}{'lowest … highest':>22}  {'unit':<10}aim")
    for name in names:
        row = BENCHMARKS[name]
        values = row.measure()
        if not values:
            print(f"{row.what:<38}{'this system does not tell':>31}", flush=True)
            continue
        span = f"{min(values):.3g} … {max(values):.3g}"
        print(
            f"{row.what:<38}{statistics.median(values):>9.3g}{span:>22}  {row.unit:<10}{row.aim}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
