"""Train a recipe, SIGKILL it many times, resume it each time; say on stdout what happened.

A script of its own, because children are forked from a parent that has imported torch and started
no thread: importing anew for each of them would take a minute. Used by test_train.py::

    python kill_training.py OUT KILLS SEED
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import accelerate  # noqa: F401 - children share it
import sklearn.datasets  # noqa: F401 - children share it
import torch
import torch._dynamo  # its optimisers import it
import tqdm  # noqa: F401 - children share it

from companion.recipes import RECIPES
from companion.train import train

RECIPE = replace(RECIPES["digit-classifier"], steps=400, save_every=1, log_every=7)


def _child(out: Path, resume: bool) -> int:
    """The process number of a fork that trains."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(RECIPE, out, resume=resume, quiet=True, device="cpu", threads=1)
            code = 0
        finally:
            os._exit(code)
    return pid


def _ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return status if done else None


def main() -> None:
    out, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    in_writes, before_first_save, steps = 0, 0, []
    for i in range(kills):
        pid = _child(out / "killed", resume=i > 0)
        started = time.monotonic()
        # every third kill waits for a file that is being written, the others for a random moment
        wait = chance.uniform(0.0, 0.4)
        while _ended(pid) is None:
            waited = time.monotonic() - started
            writing = any((out / "killed").glob(".state.safetensors.*.part"))
            if waited > wait and (i % 3 or writing):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.0002)
        else:
            raise SystemExit(f"run {i} ended by itself: nothing was killed")
        in_writes += any((out / "killed").glob(".state.safetensors.*.part"))
        before_first_save += not (out / "killed" / "state.safetensors").exists()
        log = out / "killed" / "log.jsonl"
        steps.append(log.read_text().count("\n") if log.exists() else 0)
    for name in ("killed", "whole"):
        pid = _child(out / name, resume=True)
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit(f"the last run of {name} failed")
    print(
        json.dumps({"in_writes": in_writes, "before_first_save": before_first_save, "lines": steps})
    )


if __name__ == "__main__":
    main()
