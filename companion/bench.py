"""Speeds that the companion promises, measured: ``python -m companion.bench [NAME …]``.

A benchmark is a function that takes nothing and returns its measurements, one number a repetition,
marked with ``@benchmark``. Its table row shows the median, the range from the lowest to the highest
measurement, and what the house aims at. Nothing fails here: a busy machine is slow, and a test that
fails on a busy machine teaches people to ignore tests.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


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

    @benchmark("Storybook scenes of 64×64 drawn", "a second", "≥ 300")
    def storybook_scenes() -> list[float]:
        """Batches of 64 random scenes, after one that is not counted."""
        import torch

        from companion import storybook

        generator = torch.Generator().manual_seed(0)
        rates = []
        for _ in range(6):
            scenes = storybook.sample(64, generator)
            started = time.perf_counter()
            storybook.render(scenes, size=64)
            rates.append(64 / (time.perf_counter() - started))
        return rates[1:]


def main(arguments: list[str] | None = None) -> int:
    """Measure the named benchmarks, or all, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m companion.bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args(arguments).names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")

    import torch

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"{'':<38}{'median':>9}{'lowest … highest':>22}  {'unit':<10}aim")
    for name in names:
        row = BENCHMARKS[name]
        values = row.measure()
        span = f"{min(values):.3g} … {max(values):.3g}"
        print(
            f"{row.what:<38}{statistics.median(values):>9.3g}{span:>22}  {row.unit:<10}{row.aim}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
