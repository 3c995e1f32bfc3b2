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

from companion.checkpoints import read_tensors
from companion.recipes import RECIPES
from companion.train import train

RECIPE = replace(RECIPES["digit-classifier"], steps=300, log_every=7)


def _child(out: Path, save_every: int, resume: bool) -> int:
    """The process number of a fork that trains."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            recipe = replace(RECIPE, save_every=save_every)
            train(recipe, out, resume=resume, quiet=True, device="cpu", threads=1)
            code = 0
        finally:
            os._exit(code)
    return pid


def _kill(pid: int, out: Path, saves: int, pause: float, in_write: bool) -> None:
    """SIGKILL a child ``pause`` seconds after its save number ``saves``, or in its next write."""
    state, seen, last = out / "state.safetensors", -1, None
    while seen < saves:
        now = state.stat().st_mtime_ns if state.exists() else 0
        seen, last = seen + (now != last), now
        _still(pid)
    time.sleep(pause)
    while in_write and not any(out.glob(".state.safetensors.*.part")):
        _still(pid)
    _still(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _still(pid: int) -> None:
    time.sleep(0.0002)
    if os.waitpid(pid, os.WNOHANG)[0]:
        raise SystemExit("a run ended by itself: nothing was killed")


def main() -> None:
    out, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    in_writes, steps = 0, []
    for i in range(kills):
        pid = _child(out / "killed", 1, resume=i > 0)
        # counted in saves, so that a slow machine is killed at as many moments as a fast one
        _kill(pid, out / "killed", chance.randrange(12), chance.uniform(0, 0.03), i % 3 == 0)
        in_writes += any((out / "killed").glob(".state.safetensors.*.part"))
        state = out / "killed" / "state.safetensors"
        notes = read_tensors(state)[1] if state.exists() else {"run": "{}"}
        steps.append(json.loads(notes["run"]).get("step", -1))
    for name, save_every in (("killed", 1), ("whole", 1000)):
        pid = _child(out / name, save_every, resume=True)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(f"the last run of {name} failed")
    print(json.dumps({"in_writes": in_writes, "steps": steps}))


if __name__ == "__main__":
    main()
