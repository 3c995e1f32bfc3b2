"""One training loop for every recipe of the book.

A :class:`Recipe` is plain data and a few functions. ``train(recipe)`` runs it on a CPU, a GPU or
several processes (``accelerate launch -m companion train NAME``), writes checkpoints, sample
pictures and a log, and ends with a folder that ``from_pretrained`` opens, its model card included.

**Exact by construction.** Step k draws everything random in ``recipe.batch``, chunk by chunk, each
chunk from its own generator, seeded from the recipe's seed and the chunk's number. So there is no
random state to save, a run killed at any moment resumes as if nothing had happened, and drawing
batches ahead of time, or sharing them out over processes, changes nothing.

What is written under ``runs/NAME``::

    state.safetensors   weights, moving average, optimiser and step: what --resume continues from
    log.jsonl           a line every few steps: step, loss, learning rate, pictures a second
    samples/            what the model draws on the way
    final/              config.json, model.safetensors, card.json, README.md
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from companion import checkpoints, errors
from companion.checkpoints import CheckpointError
from companion.data import ImageFolder
from companion.muon import Muon

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DECAYS = ("constant", "cosine", "linear", "late")
OPTIMISERS = ("adamw", "muon")
DEVICES = ("auto", "cpu", "cuda", "mps")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where the last good state is."""


@dataclass(frozen=True)
class Recipe:
    """All that defines one trained network.

    Attributes:
        name: What ``python -m companion train NAME`` calls it, and the name of its folder.
        about: One or two sentences for the model card.
        data: ``data(folder)`` opens what batches are drawn from: the book's own data for ``None``,
            else the reader's ``imagefolder``. May return ``None``. An object with a ``to(device)``
            method is moved: the place for frozen networks that the loss needs.
        model: ``model(data)`` builds the network; called under a seeded generator.
        batch: ``batch(indices, generator, data)`` gives a dict of CPU tensors, first dimension
            ``len(indices)``, for the samples numbered ``indices`` (int64, counted from the start
            of training). *Everything* random is drawn here, from ``generator``: noise, timesteps,
            dropped captions. It runs in background threads.
        loss: ``loss(model, batch, data)`` gives the mean loss over the batch and a dict of scalars
            to log. It draws nothing.
        steps: Optimiser steps.
        batch_size: Samples a step, over all processes.
        learning_rate: Of the optimiser, after ``warmup`` steps.
        minutes: How long it takes on two CPU cores.
        warmup: Steps over which the learning rate rises from 0, linearly.
        decay: How it falls afterwards, to 0 at the end: "constant" (not at all), "cosine",
            "linear", or "late" (linearly, over the last fifth of all steps only).
        restarts: Steps at which a falling rate, having come to 0, begins anew at the top, and falls
            again until the next or the end (Loshchilov and Hutter 2017, section 3).
        betas: AdamW's.
        optimiser: "adamw", or "muon" (:class:`companion.muon.Muon`), which learns networks of large
            kernels from fewer pictures.
        weight_decay: The optimiser's; for matrices and kernels, not for biases, gains and scales.
        clip: Largest norm of the gradient, or None.
        ema: Decay of the weights' moving average, which is what gets used, or None for none.
        seed: Of everything.
        chunk: Samples that ``batch`` is asked for at a time. A part of the definition: another
            chunk is another random stream.
        sample: ``sample(model)`` gives pictures (B, C, H, W) in [0, 1] to look at on the way.
        finish: ``finish(model, data)`` measures what belongs into the config of the averaged model,
            such as the scale of latents; called before ``score``, with the weights as stored.
        score: ``score(model, data)`` gives what goes on the card: name to number, or to
            ``{"value": …, "low": …, "high": …, "n": …}``.
        beside: ``beside(folder, data)`` writes what belongs next to the weights: a tokenizer.
        needs: Names of shipped weights that it builds on.
        dtype: How the weights are stored in the end, "float32" or "float16"; scored as stored.
        data_about: What it is trained on, for the card.
        licence: Of the weights.
        log_every: Steps between lines of the log.
        save_every: Steps between checkpoints.
        sample_every: Steps between sample pictures.
    """

    name: str
    about: str
    data: Callable[[Path | None], Any]
    model: Callable[[Any], nn.Module]
    batch: Callable[[Tensor, torch.Generator, Any], dict[str, Tensor]]
    loss: Callable[[nn.Module, dict[str, Tensor], Any], tuple[Tensor, dict[str, Tensor]]]
    steps: int
    batch_size: int
    learning_rate: float
    minutes: float
    warmup: int = 0
    decay: str = "constant"
    restarts: tuple[int, ...] = ()
    optimiser: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float | None = None
    seed: int = 0
    chunk: int = 16
    sample: Callable[[nn.Module], Tensor] | None = None
    finish: Callable[[nn.Module, Any], object] | None = None
    score: Callable[[nn.Module, Any], Mapping[str, Any]] | None = None
    beside: Callable[[Path, Any], None] | None = None
    needs: tuple[str, ...] = ()
    dtype: str = "float32"
    data_about: str = "Storybook scenes, drawn as training goes"
    licence: str = "MIT"
    log_every: int = 10
    save_every: int = 250
    sample_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "chunk", "log_every", "save_every", "sample_every"):
            errors.number(name, getattr(self, name), 1, integer=True)
        errors.number("learning_rate", self.learning_rate, 0)
        errors.number("warmup", self.warmup, 0, integer=True)
        errors.number("seed", self.seed, 0, 2**63 - 1, integer=True)
        errors.number("weight_decay", self.weight_decay, 0)
        errors.one_of("decay", self.decay, DECAYS)
        errors.one_of("optimiser", self.optimiser, OPTIMISERS)
        errors.one_of("dtype", self.dtype, ("float32", "float16"))
        if self.clip is not None:
            errors.number("clip", self.clip, 0)
        if self.ema is not None:
            errors.number("ema", self.ema, 0, 1)


@dataclass(frozen=True)
class Result:
    """What a call of :func:`train` came to."""

    out: Path
    step: int
    steps: int
    finished: bool
    resumed_from: int
    message: str
    main: bool = True

    @property
    def final(self) -> Path:
        """The folder with the trained weights."""
        return self.out / "final"


# --- what a step is made of: pure functions of the recipe and the step ---------------------------


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of step 0, 1, … ``recipe.steps`` - 1."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.decay == "constant":
        return recipe.learning_rate
    if recipe.decay == "late":
        left = (recipe.steps - step) / (recipe.steps / 5)
        return recipe.learning_rate * min(1.0, left)
    first, last = recipe.warmup, recipe.steps
    for again in recipe.restarts:
        first, last = (max(first, again), last) if again <= step else (first, min(last, again))
    done = (step - first) / max(1, last - first)
    left = 1 - done if recipe.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return recipe.learning_rate * left


def ema_decay(decay: float, updates: int) -> float:
    """The decay of update number 0, 1, …: short memory at first, so early weights are forgotten."""
    return min(decay, (1 + updates) / (10 + updates))


def generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """A CPU generator for one purpose and number; numbers below 2**32 never share a stream.

    torch's CPU generator uses 32 bits of its seed, so a plain hash would meet itself again after
    some 80,000 draws. Here a hash of (seed, purpose) is an offset, and the sum is scrambled by a
    one-to-one map (the finaliser of MurmurHash3).
    """
    name = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    h = (int.from_bytes(name[:4], "little") + number) % 2**32
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return torch.Generator().manual_seed(h ^ (h >> 16))


def pick(indices: Tensor, n: int, seed: int = 0) -> Tensor:
    """Places in a data set of ``n`` for samples numbered ``indices``: each once an epoch, shuffled.

    Args:
        indices: Sample numbers, int64 (B,).
        n: Size of the data set.
        seed: Of the shuffles.

    Returns:
        Places from 0 to n - 1, int64 (B,).
    """
    errors.number("the size of the data set", n, 1, integer=True)
    places = [_order(n, i // n, seed)[i % n] for i in indices.tolist()]
    return torch.tensor(places, dtype=torch.int64)


@lru_cache(maxsize=4)
def _order(n: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=generator(seed, f"order of {n}", epoch)).tolist()


def build(recipe: Recipe, data: Any) -> nn.Module:
    """The untrained network, the same for the same seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(recipe.seed, "weights").initial_seed())
        return recipe.model(data)


def draw(
    recipe: Recipe, data: Any, step: int, rank: int = 0, processes: int = 1
) -> dict[str, Tensor]:
    """The batch of one step, or one process's share of it: a pure function of its arguments."""
    return _join([_chunk(recipe, data, step, c) for c in _chunks(recipe, rank, processes)])


def _chunks(recipe: Recipe, rank: int, processes: int) -> range:
    each = math.ceil(recipe.batch_size / recipe.chunk) // processes
    return range(rank * each, (rank + 1) * each)


def _chunk(recipe: Recipe, data: Any, step: int, number: int) -> dict[str, Tensor]:
    first = number * recipe.chunk
    size = min(recipe.chunk, recipe.batch_size - first)
    indices = step * recipe.batch_size + first + torch.arange(size)
    per_step = math.ceil(recipe.batch_size / recipe.chunk)
    batch = recipe.batch(indices, generator(recipe.seed, "batch", step * per_step + number), data)
    for key, x in batch.items():
        if not isinstance(x, Tensor) or x.ndim == 0 or len(x) != size:
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"recipe {recipe.name}: batch entry {key!r} is {what}; expected a tensor whose"
                f" first dimension is {size}, the number of samples asked for."
            )
    return batch


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def batches(
    recipe: Recipe,
    data: Any,
    start: int,
    stop: int,
    *,
    ahead: int = 2,
    workers: int = 1,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """The batches of steps ``start`` … ``stop`` - 1, drawn ``ahead`` steps early by threads.

    With ``ahead=0`` they are drawn when asked for. The numbers are the same.
    """
    if ahead == 0:
        for step in range(start, stop):
            yield draw(recipe, data, step, rank, processes)
        return
    mine = _chunks(recipe, rank, processes)
    pool = ThreadPoolExecutor(workers, "batches", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[list[Future]] = deque()
    try:
        for step in range(start, stop + ahead):
            if step < stop:
                waiting.append([pool.submit(_chunk, recipe, data, step, c) for c in mine])
            if step >= start + ahead:
                yield _join([future.result() for future in waiting.popleft()])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Average:
    """A moving average of a model's weights; buffers are copied."""

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.model = model if decay is None else deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in the weights after update number 0, 1, …"""
        if self.decay is None:
            return
        keep = ema_decay(self.decay, updates)
        for mean, new in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(new, 1 - keep)
        for mean, new in zip(self.model.buffers(), model.buffers(), strict=True):
            mean.copy_(new)


# --- the run -------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    resume: bool = False,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    precision: str = "fp32",
    threads: int | None = None,
    device: str = "auto",
    ahead: int = 2,
    workers: int = 1,
    save_every: int | None = None,
    quiet: bool = False,
) -> Result:
    """Train a recipe, from the start or from where it was stopped.

    Args:
        recipe: What to train.
        out: Folder of the run; default ``runs/NAME``.
        data: The reader's own ``imagefolder``; default: the recipe's own data.
        resume: Continue the run in ``out``. One that has ended is left alone.
        steps: Instead of the recipe's.
        batch_size: Instead of the recipe's.
        seed: Instead of the recipe's.
        precision: "fp32", or mixed: "bf16" or "fp16".
        threads: CPU threads for the network; default: torch's, or what a resumed run had.
        device: "auto", "cpu", "cuda" or "mps".
        ahead: Steps for which batches are drawn early; 0 for none. Changes no number.
        workers: Threads that draw them. Changes no number.
        save_every: Steps between checkpoints, instead of the recipe's.
        quiet: No progress bar and no messages.

    Raises:
        ValueError: An argument, the data or what lies in ``out`` does not fit.
        TrainingError: The loss stopped being finite.
    """
    changes = {"steps": steps, "batch_size": batch_size, "seed": seed, "save_every": save_every}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})
    errors.one_of("precision", precision, PRECISIONS)
    errors.number("ahead", ahead, 0, integer=True)
    errors.number("workers", workers, 1, integer=True)
    if threads is not None:
        errors.number("threads", threads, 1, integer=True)
    out = Path("runs") / recipe.name if out is None else Path(out)
    for name in recipe.needs:
        if not (checkpoints.WEIGHTS / name / "config.json").is_file():
            raise CheckpointError(
                f"recipe {recipe.name} builds on the weights of {name!r}, which are not there."
                f" Train them first: python -m companion train {name}"
            )
    saved = _find_state(out, recipe, resume)
    folder = None if data is None else Path(data)
    if folder is not None:
        ImageFolder(folder, 1).check()  # an unreadable picture shows now, not in the night
    source = recipe.data(folder)
    return _Run(recipe, out, folder, source, precision, ahead, workers, quiet).go(
        saved, threads, _accelerator(device)
    )


def _accelerator(device: str) -> Any:
    """Accelerate finds the device and the other processes; precision is ours, to resume exactly."""
    errors.one_of("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and torch finds no GPU here; use --device cpu.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', and torch finds no Apple GPU here; use --device cpu.")
    from accelerate import Accelerator

    # One reader's machine may hold an accelerate configuration: what counts is said here.
    found = Accelerator(cpu=device == "cpu", mixed_precision="no")
    if device not in ("auto", found.device.type):
        raise ValueError(f"device is {device!r}, but Accelerate gives {found.device}.")
    return found


def _find_state(out: Path, recipe: Recipe, resume: bool) -> Path | None:
    """The state to continue from; an error where a run would be overwritten."""
    state = out / "state.safetensors"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder to write the run to.")
    if state.is_file() and not resume:
        raise ValueError(
            f"{out} already holds a run of recipe {recipe.name}. Continue it with --resume, or"
            " choose another folder with --out."
        )
    if (out / "final").exists() and not state.is_file():
        raise ValueError(
            f"{out / 'final'} holds trained weights, but there is no state to continue from."
            " Choose another folder with --out."
        )
    return state if state.is_file() else None


class _Step(nn.Module):
    """The loss as a module's forward, so that processes share gradients whatever the loss calls."""

    def __init__(self, recipe: Recipe, model: nn.Module, data: Any) -> None:
        super().__init__()
        self.model = model
        self.compute = lambda batch: recipe.loss(self.model, batch, data)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch)


class _Run:
    """One call of train: the loop and all it writes."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        folder: Path | None,
        data: Any,
        precision: str,
        ahead: int,
        workers: int,
        quiet: bool,
    ) -> None:
        self.recipe, self.out, self.folder, self.data = recipe, out, folder, data
        self.precision, self.ahead, self.workers, self.quiet = precision, ahead, workers, quiet
        self.step = 0
        self.seconds = 0.0
        self.sums: dict[str, Tensor] = {}
        self.stopped_by: int | None = None

    def go(self, saved: Path | None, threads: int | None, accelerator: Any) -> Result:
        recipe = self.recipe
        self.acc = accelerator
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        chunks, rest = divmod(recipe.batch_size, recipe.chunk)
        if self.processes > 1 and (rest or chunks % self.processes):
            raise ValueError(
                f"the batch of {recipe.batch_size} cannot be shared by {self.processes} processes;"
                f" use a multiple of {recipe.chunk * self.processes}."
            )
        tensors, notes = checkpoints.read_tensors(saved) if saved else ({}, {})
        if saved:
            threads = self._check_plan(saved, notes, threads)
        with ExitStack() as stack:
            stack.enter_context(_threads(threads))
            stack.enter_context(_reproducible(self.device))
            self.first = draw(recipe, self.data, self.step, self.rank, self.processes)
            if hasattr(self.data, "to"):
                self.data.to(self.device)
            self.model = build(recipe, self.data)
            self.average = Average(self.model.to(self.device), recipe.ema)
            self.optimiser = _optimiser(recipe, self.model, self.precision)
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
            self.model.train()
            if saved:
                self._restore(saved, tensors, notes)
            del tensors
            start = self.step
            if self.main:
                self._prepare_out(start)
            if start < recipe.steps:
                stack.enter_context(self._signals())
                self._loop(start)
        if self.step < recipe.steps:
            name = signal.Signals(self.stopped_by).name
            return self._result(
                start,
                f"Stopped by {name} at step {self.step} of {recipe.steps}; saved. Continue with:"
                f" {self.command()} --resume",
            )
        self._finish(self.step - start)
        if saved and start == recipe.steps:
            said = f"This run has already ended (step {start} of {recipe.steps}); nothing to do."
            return self._result(start, f"{said} The weights are in {self.out / 'final'}.")
        return self._result(start, f"Done. The weights are in {self.out / 'final'}.")

    def _result(self, start: int, message: str) -> Result:
        whole = self.step == self.recipe.steps
        return Result(self.out, self.step, self.recipe.steps, whole, start, message, self.main)

    # the loop

    def _loop(self, start: int) -> None:
        from tqdm import tqdm

        recipe, module = (
            self.recipe,
            self.acc.prepare_model(_Step(self.recipe, self.model, self.data)),
        )
        source = batches(
            recipe,
            self.data,
            start,
            recipe.steps,
            ahead=self.ahead,
            workers=self.workers,
            rank=self.rank,
            processes=self.processes,
        )
        bar = tqdm(
            total=recipe.steps,
            initial=start,
            desc=recipe.name,
            unit="step",
            mininterval=0.5,
            disable=self.quiet or not self.main,
        )
        last = since = time.perf_counter()
        timed = 0
        try:
            for batch in source:
                if self.step == start:
                    self._check_pure(batch)
                metrics = self._update(module, batch)
                for key, value in metrics.items():
                    self.sums[key] = self.sums.get(key, 0) + value
                self.step += 1
                timed += 1
                now = time.perf_counter()
                self.seconds += now - last
                last = now
                bar.update()
                if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                    rate = timed * recipe.batch_size / (time.perf_counter() - since)
                    line = self._log(rate)
                    bar.set_postfix_str(
                        f"loss {line['loss']:.4g}, {rate:.0f} pictures/s", refresh=False
                    )
                    since, timed = time.perf_counter(), 0
                stop = self._agree(self.stopped_by is not None)
                if stop or self.step % recipe.save_every == 0 or self.step == recipe.steps:
                    self._save()
                if self.step % recipe.sample_every == 0 or self.step == recipe.steps:
                    self._sample()
                if stop:
                    self.stopped_by = self.stopped_by or signal.SIGTERM
                    break
        finally:
            source.close()
            bar.close()

    def _update(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimiser step; nothing is changed when the loss or the gradient is not finite."""
        recipe, dtype = self.recipe, PRECISIONS[self.precision]
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        batch = {key: x.to(self.device, non_blocking=True) for key, x in batch.items()}
        before = torch.get_rng_state() if self.step == 0 else None
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            loss, metrics = module(batch)
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            raise ValueError(
                f"recipe {recipe.name}: the loss or the model draws from torch's global generator,"
                " so no run could be repeated. Draw in batch() instead."
            )
        self.scaler.scale(loss.float()).backward()
        self.scaler.unscale_(self.optimiser)
        limit = math.inf if recipe.clip is None else recipe.clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        # fp16 may overflow now and then: its scaler skips that step and lowers the scale
        fine = torch.isfinite(loss.detach()) & (torch.isfinite(norm) | (self.precision == "fp16"))
        if self._agree(not bool(fine)):
            raise TrainingError(
                f"The loss of recipe {recipe.name} is {loss.item():.4g} and its gradient's norm is"
                f" {norm.item():.4g} at step {self.step}, so training stopped before it changed the"
                f" weights. The last checkpoint in {self.out} is good. Try a smaller learning rate,"
                " or --precision fp32."
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(self.model, self.step)
        return {
            "loss": loss.detach().float(),
            **{k: v.detach().float() for k, v in metrics.items()},
        }

    def _agree(self, flag: bool) -> bool:
        """True on every process as soon as it is true on one."""
        if self.processes == 1:
            return flag
        return bool(self.acc.reduce(torch.tensor(float(flag), device=self.device), "sum") > 0)

    def _check_pure(self, batch: dict[str, Tensor]) -> None:
        """The first batch has been drawn twice, so a hidden source of chance shows at once."""
        same = batch.keys() == self.first.keys()
        if not (same and all(torch.equal(x, self.first[key]) for key, x in batch.items())):
            raise ValueError(
                f"recipe {self.recipe.name}: batch() gave two different batches for one step, so no"
                " run could be repeated. Draw only from the generator that it is given."
            )

    # what is written

    def _plan(self) -> dict[str, Any]:
        """What must not change between a start and its resumption."""
        fields = (
            "name", "steps", "batch_size", "learning_rate", "warmup", "decay", "betas",
            "weight_decay", "clip", "ema", "seed", "chunk",
        )  # fmt: skip
        plan = {name: getattr(self.recipe, name) for name in fields}
        if self.recipe.restarts:
            plan["restarts"] = self.recipe.restarts
        plan["data"] = None if self.folder is None else self.folder.resolve().name
        plan["samples"] = len(self.data) if hasattr(self.data, "__len__") else None
        plan["precision"] = self.precision
        plan["optimiser"] = self.recipe.optimiser
        return json.loads(json.dumps(plan))

    def _check_plan(self, saved: Path, notes: dict[str, str], threads: int | None) -> int | None:
        if "run" not in notes:
            raise CheckpointError(
                f"{saved} is no state of a run. Choose another folder with --out."
            )
        run = json.loads(notes["run"])
        self.step, self.seconds = run["step"], run["seconds"]
        for key, now in self._plan().items():
            then = run["plan"].get(key, "adamw" if key == "optimiser" else None)  # older runs
            if now != then and not (key == "steps" and self._so_far_the_same(then)):
                raise ValueError(
                    f"the run in {self.out} has {key} = {then!r}, now it is {now!r}: resumed so, it"
                    " would be neither. Give the same settings again, or start anew with --out."
                )
        return run["threads"] if threads is None else threads

    def _so_far_the_same(self, steps: int) -> bool:
        """Whether a run of so many steps had the same learning rates up to where we are."""
        then = dataclasses.replace(self.recipe, steps=steps)
        done = range(self.step)
        same = all(learning_rate(then, k) == learning_rate(self.recipe, k) for k in done)
        return same and self.recipe.steps >= self.step

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{k}": x for k, x in self.model.state_dict().items()}
        state |= {f"log.{k}": x for k, x in self.sums.items()}
        if self.recipe.ema is not None:
            state |= {f"ema.{k}": x for k, x in self.average.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            for key, x in self.optimiser.state.get(p, {}).items():
                state[f"optimiser.{key}.{name}"] = x
        return state

    def _save(self) -> None:
        """Write the state; the old one stays until the new one is whole and has been read back."""
        self._share_sums()
        if not self.main:
            return
        run = {
            "step": self.step,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "scaler": self.scaler.state_dict(),
            "plan": self._plan(),
        }
        notes = {"run": json.dumps(run)}
        checkpoints.write_tensors(self.out / "state.safetensors", self._state(), notes)

    def _restore(self, saved: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimiser": {}, "log": {}}
        for name, x in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = x
        try:
            self.model.load_state_dict(parts["model"])
            if self.recipe.ema is not None:
                self.average.model.load_state_dict(parts["ema"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{saved} does not fit the model of recipe {self.recipe.name}, which has changed"
                f" since: {error} Start anew with --out."
            ) from None
        self.sums = {key: x.to(self.device) for key, x in parts["log"].items()}
        parameters = dict(self.model.named_parameters())
        for name, x in parts["optimiser"].items():
            key, _, rest = name.partition(".")
            # AdamW counts its steps in a CPU tensor, whatever the device
            self.optimiser.state[parameters[rest]][key] = x if key == "step" else x.to(self.device)
        self.scaler.load_state_dict(json.loads(notes["run"])["scaler"])

    def _prepare_out(self, start: int) -> None:
        """Make the folder fit the step we start from; a full disk or a locked folder shows now."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for part in self.out.glob("**/.*.part"):  # left by kills
                part.unlink()
            lines = []
            if start and (self.out / "log.jsonl").is_file():
                for line in (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines():
                    try:
                        kept = json.loads(line)["step"] <= start
                    except (ValueError, KeyError, TypeError):  # cut off by a kill
                        break
                    lines += [line + "\n"] if kept else []
            checkpoints.write_text(self.out / "log.jsonl", "".join(lines))
            if start == 0:
                self._save()
        except OSError as error:
            raise ValueError(f"{self.out} cannot be written to ({error}). Use --out.") from None

    def _share_sums(self) -> None:
        if self.processes > 1:
            self.sums = {k: self.acc.reduce(v, "mean") for k, v in sorted(self.sums.items())}

    def _log(self, rate: float) -> dict[str, float]:
        """Write the means since the last line; a resumed run writes what a whole one would."""
        n = (self.step - 1) % self.recipe.log_every + 1
        self._share_sums()
        means = {
            key: self.sums[key] / n for key in sorted(self.sums, key=lambda k: (k != "loss", k))
        }
        self.sums = {}
        line = {"step": self.step, **{k: v.item() for k, v in means.items()}}
        line |= {"lr": learning_rate(self.recipe, self.step - 1), "pictures/s": round(rate, 1)}
        if self.main:
            with open(self.out / "log.jsonl", "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
        return line

    @torch.no_grad()
    def _sample(self) -> None:
        if not self.main or self.recipe.sample is None:
            return
        model = self.average.model
        model.eval()
        pictures = self.recipe.sample(model)
        self.model.train()
        errors.tensor(f"sample of recipe {self.recipe.name}", pictures, shape="B C H W")
        save_grid(self.out / "samples" / f"step-{self.step:06d}.png", pictures)

    @torch.no_grad()
    def _finish(self, trained: int) -> None:
        """Score the averaged weights as they will be stored, and write them with their card."""
        final = self.out / "final"
        if not self.main:
            return
        if trained == 0 and final.is_dir() and not checkpoints.check(final):
            return
        model, dtype = self.average.model.cpu().eval(), getattr(torch, self.recipe.dtype)
        for x in (*model.parameters(), *model.buffers()):
            if x.is_floating_point():
                x.copy_(x.to(dtype))
        if hasattr(self.data, "to"):
            self.data.to(torch.device("cpu"))
        recipe = self.recipe
        if recipe.finish is not None:
            recipe.finish(model, self.data)
        score = dict(recipe.score(model, self.data)) if recipe.score is not None else {}
        card = {
            "recipe": recipe.name,
            "about": recipe.about,
            "seed": recipe.seed,
            "steps": recipe.steps,
            "pictures": recipe.steps * recipe.batch_size,
            "minutes": round(self.seconds / 60, 2),
            "hardware": hardware(self.device, self.processes),
            "torch": torch.__version__.split("+")[0],
            "precision": self.precision,
            "command": self.command(),
            "data": recipe.data_about if self.folder is None else f"the folder {self.folder.name}",
            "score": score,
            "licence": recipe.licence,
        }
        if recipe.beside is not None:
            recipe.beside(final, self.data)
        if hasattr(model, "save_pretrained"):  # writes its published spelling
            model.save_pretrained(final, card=card, dtype=dtype)
        else:
            config = getattr(model, "config", {})
            checkpoints.save(final, model, config=config, card=card, dtype=dtype)

    def command(self) -> str:
        """The command that repeats this run, without paths of this machine."""
        from companion.recipes import RECIPES

        words = ["python", "-m", "companion", "train", self.recipe.name]
        if self.folder is not None:
            words += ["--data", self.folder.name]
        known = RECIPES.get(self.recipe.name, self.recipe)
        for name in ("steps", "batch_size", "seed"):
            if getattr(self.recipe, name) != getattr(known, name):
                words += [f"--{name.replace('_', '-')}", str(getattr(self.recipe, name))]
        if self.precision != "fp32":
            words += ["--precision", self.precision]
        return " ".join(words)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks the loop to save and stop; a second acts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, _frame: Any) -> None:
            self.stopped_by = number
            for s, handler in old.items():
                signal.signal(s, handler)

        for s in old:
            signal.signal(s, ask)
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


def _optimiser(recipe: Recipe, model: nn.Module, precision: str = "fp32") -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate, betas = recipe.learning_rate, recipe.betas
    if recipe.optimiser == "muon":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return Muon(groups, lr=rate, betas=betas, dtype=dtype)
    return torch.optim.AdamW(groups, lr=rate, betas=betas)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if n is None else n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """On a GPU, choose algorithms that give the same sum twice; a CPU does so anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def fast_precision() -> str:
    """The faster precision on this CPU: "fp32" where bfloat16 would only be imitated, slowly."""
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if native else "fp32"


def keep_memory() -> None:
    """Ask the C library to keep freed memory for the next tensor, where it is glibc.

    Otherwise large tensors come fresh from the system each time, page by page, which costs a step
    on a CPU about a quarter of its time. For a process that does nothing else: it keeps its peak.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another system, or another C library
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def hardware(device: torch.device, processes: int = 1) -> str:
    """The machine in words, for cards: GPU or CPU, cores or threads."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        name = models[0] if models else name
    each = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{name}, {each}" + (f", {processes} processes" if processes > 1 else "")


def save_grid(path: str | Path, pictures: Tensor) -> None:
    """Write pictures (B, C, H, W) in [0, 1], 1 or 3 channels, as one PNG with a thin grid."""
    from PIL import Image

    errors.tensor("pictures", pictures, shape="B C H W", dtype="float")
    errors.expect(
        pictures.shape[1] in (1, 3), f"pictures have {pictures.shape[1]} channels; expected 1 or 3."
    )
    x = pictures.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    b, _, h, w = x.shape
    columns = math.ceil(math.sqrt(b))
    rows = math.ceil(b / columns)
    sheet = torch.ones(3, rows * (h + 1) - 1, columns * (w + 1) - 1)
    for i in range(b):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        sheet[:, top : top + h, left : left + w] = x[i]
    image = Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())
    with checkpoints.atomic_write(path) as part:
        image.save(part, format="PNG")
