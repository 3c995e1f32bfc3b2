"""One loop for all recipes: closed forms, exact resume, kills, processes, and its errors."""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tiny_clip
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from companion import checkpoints, train
from companion.checkpoints import CheckpointError
from companion.recipes import RECIPES
from companion.train import Recipe, TrainingError

HERE = Path(__file__).parent


class Line(nn.Module):
    """A matrix to learn, a bias, a buffer that counts, and a weight that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 3)
        self.still = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return self.map(x)


def _batch(indices: Tensor, generator: torch.Generator, data: object) -> dict[str, Tensor]:
    x = torch.randn(len(indices), 4, generator=generator)
    return {"x": x, "i": indices}


def _loss(model: nn.Module, batch: dict[str, Tensor], data: object):
    wanted = batch["x"][:, :3].roll(1, 1) + 0.5
    error = F.mse_loss(model(batch["x"]), wanted)
    return error, {"largest": batch["i"].max().float()}


def _sample(model: nn.Module) -> Tensor:
    assert not model.training
    return model.map.weight.detach().sigmoid()[None, None].expand(5, 1, 3, 4)


LINE = Recipe(
    name="line",
    about="A line.",
    data=lambda folder: None,
    model=lambda data: Line(),
    batch=_batch,
    loss=_loss,
    steps=30,
    batch_size=6,
    learning_rate=0.05,
    minutes=0.01,
    warmup=4,
    decay="cosine",
    weight_decay=0.1,
    ema=0.9,
    chunk=4,
    sample=_sample,
    score=lambda model, data: {"norm": model.map.weight.norm().item()},
    log_every=7,
    save_every=6,
    sample_every=10,
)


def run(recipe: Recipe, out: Path, **options: object) -> train.Result:
    return train.train(recipe, out, quiet=True, device="cpu", **options)


def weights(out: Path) -> dict[str, Tensor]:
    return checkpoints.load_state(out / "final")


def state(out: Path) -> dict[str, Tensor]:
    return checkpoints.load_state(out / "state.safetensors")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def log(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("pictures/s") > 0 for line in lines)
    return lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """LINE, trained without interruption."""
    out = tmp_path_factory.mktemp("whole")
    assert run(LINE, out).finished
    return out


# --- closed forms --------------------------------------------------------------------------------


def test_learning_rate_is_the_closed_form():
    recipe = replace(LINE, steps=110, warmup=10, learning_rate=2.0)
    rates = {d: [train.learning_rate(replace(recipe, decay=d), k) for k in range(110)] for d in
             ("constant", "cosine", "linear", "late")}  # fmt: skip
    for decay, rate in rates.items():
        assert rate[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
        assert rate[10] == 2.0, decay
    assert rates["constant"][10:] == [2.0] * 100
    assert rates["late"][10:89] == [2.0] * 79  # the last fifth is 22 steps
    assert rates["late"][88:] == pytest.approx([2.0 * k / 22 for k in range(22, 0, -1)])
    assert rates["linear"][10:] == pytest.approx([2 * (1 - k / 100) for k in range(100)])
    wanted = [2 * math.cos(math.pi * k / 200) ** 2 for k in range(100)]  # half-angle form
    assert rates["cosine"][10:] == pytest.approx(wanted)
    twice = replace(recipe, decay="cosine", restarts=(60,))
    rate = [train.learning_rate(twice, k) for k in range(110)]
    wanted = [2 * math.cos(math.pi * k / 100) ** 2 for k in range(50)]  # falls to 0, and again
    assert rate[:10] == rates["cosine"][:10] and rate[10:] == pytest.approx(2 * wanted)
    short = replace(twice, steps=40)  # it ends before it would begin anew
    assert train.learning_rate(short, 25) == pytest.approx(1.0)
    assert train.learning_rate(replace(recipe, warmup=0), 0) == 2.0
    assert train.learning_rate(replace(recipe, steps=5, warmup=10), 4) == 1.0


def test_the_rate_of_each_step_is_the_one_used():
    """Adam's first step moves every weight by the learning rate (Kingma & Ba, section 2.1)."""
    model = Line()
    before = model.map.weight.detach().clone()
    recipe = replace(LINE, steps=1, warmup=4, weight_decay=0.0, clip=None, ema=None)
    optimiser = train._optimiser(recipe, model)
    for group in optimiser.param_groups:
        group["lr"] = train.learning_rate(recipe, 0)
    _loss(model, _batch(torch.arange(6), torch.Generator().manual_seed(0), None), None)[
        0
    ].backward()
    optimiser.step()
    moved = (model.map.weight - before).abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.05 / 4), rtol=1e-4)


def test_weight_decay_is_for_matrices_only():
    groups = train._optimiser(LINE, Line()).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [
        (0.1, [2]),
        (0.0, [1]),
    ]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=30), st.sampled_from([0.0, 0.5, 0.9, 0.999]))
def test_moving_average_is_the_closed_form(values, decay):
    """The mean is sum_k (1 - d_k) prod_{j>k} d_j x_k + prod_j d_j x_0."""
    model = nn.Linear(1, 1, bias=False).double()
    model.register_buffer("n", torch.zeros(()))
    nn.init.constant_(model.weight, 3.0)
    average = train.Average(model, decay)
    for k, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        model.n.fill_(k)
        average.update(model, k)
    d = [min(decay, (1 + k) / (10 + k)) for k in range(len(values))]
    wanted = 3.0 * math.prod(d)
    for k, value in enumerate(values):
        wanted += (1 - d[k]) * math.prod(d[k + 1 :]) * value
    assert average.model.weight.item() == pytest.approx(wanted, abs=1e-12)
    assert average.model.n == len(values) - 1, "buffers are copied"
    assert not average.model.weight.requires_grad and not average.model.training
    assert train.Average(model, None).model is model


def test_the_loop_is_plain_adamw(whole):
    """The same thirty steps written out: torch's scheduler, plain clipping, a plain average."""
    model = train.build(LINE, None)
    decayed = [
        {"params": [model.map.weight], "weight_decay": 0.1},
        {"params": [model.map.bias], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(decayed, lr=0.05)
    after = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda k: (k + 1) / 4 if k < 4 else 0.5 * (1 + math.cos(math.pi * (k - 4) / 26)),
    )
    mean = {k: v.detach().clone() for k, v in model.named_parameters()}
    losses = []
    for step in range(30):
        chunks = [
            _batch(
                torch.arange(step * 6 + a, step * 6 + b),
                train.generator(0, "batch", 2 * step + n),
                None,
            )
            for n, (a, b) in enumerate([(0, 4), (4, 6)])
        ]
        batch = {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]}
        loss, _ = _loss(model, batch, None)
        optimiser.zero_grad()
        loss.backward()
        norm = sum(p.grad.pow(2).sum() for p in (model.map.weight, model.map.bias)).sqrt()
        for p in (model.map.weight, model.map.bias):
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        optimiser.step()
        after.step()
        keep = min(0.9, (1 + step) / (10 + step))
        for k, p in model.named_parameters():
            mean[k] = keep * mean[k] + (1 - keep) * p.detach()
        losses.append(loss.item())
    final = weights(whole)
    for k in mean:
        assert torch.allclose(final[k], mean[k], atol=1e-6), k
    assert torch.equal(final["still"], model.still)
    assert final["count"] == 30
    lines = log(whole)
    assert [line["step"] for line in lines] == [7, 14, 21, 28, 30]
    starts = [0, 7, 14, 21, 28]
    for start, line in zip(starts, lines, strict=True):
        wanted = sum(losses[start : line["step"]]) / (line["step"] - start)
        assert line["loss"] == pytest.approx(wanted, rel=1e-4)
        assert line["lr"] == pytest.approx(train.learning_rate(LINE, line["step"] - 1))
        assert line["largest"] == pytest.approx(
            sum(6 * k + 5 for k in range(start, line["step"])) / (line["step"] - start)
        )


# --- chance --------------------------------------------------------------------------------------


def test_streams_are_distinct():
    """No two numbers of one purpose share a seed, and purposes and seeds differ."""
    seeds = [train.generator(0, "batch", n).initial_seed() for n in range(200_000)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32
    bits = torch.tensor([[s >> b & 1 for b in range(32)] for s in seeds[:4000]]).float()
    assert (bits.mean(0) - 0.5).abs().max() < 0.05, "every bit is mixed"
    first = {train.generator(s, p).initial_seed() for s in range(50) for p in ("batch", "weights")}
    assert len(first) == 100
    g = train.generator(0, "batch", 5)
    again = train.generator(0, "batch", 5)
    assert torch.equal(torch.randn(9, generator=g), torch.randn(9, generator=again))


def test_neighbouring_streams_are_independent():
    x = torch.stack([torch.randn(64, generator=train.generator(0, "b", n)) for n in range(2000)])
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((x[1:] * x[:-1]).mean()) < 0.02


def test_build_depends_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = train.build(LINE, None).state_dict()
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left as it was"
    torch.manual_seed(2)
    assert_same(a, train.build(LINE, None).state_dict())
    other = train.build(replace(LINE, seed=1), None).state_dict()
    assert not torch.equal(a["map.weight"], other["map.weight"])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 5))
def test_pick_shows_each_picture_once_an_epoch(n, first, seed):
    picks = train.pick(torch.arange(3 * n), n, seed).reshape(3, n)
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in picks)
    some = train.pick(torch.arange(first, first + 7), n, seed)
    everything = train.pick(torch.arange(first + 7), n, seed)
    assert torch.equal(some, everything[first:]), "any slice, in any order"


def test_epochs_are_in_different_orders():
    picks = train.pick(torch.arange(200), 100).reshape(2, 100)
    assert not torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], torch.arange(100))
    with pytest.raises(ValueError, match="size of the data set is 0"):
        train.pick(torch.arange(3), 0)


@pytest.mark.parametrize(("ahead", "workers"), [(0, 1), (1, 1), (2, 1), (3, 4), (50, 2)])
def test_drawing_ahead_changes_nothing(ahead, workers):
    plain = [train.draw(LINE, None, step) for step in range(5, 17)]
    early = list(train.batches(LINE, None, 5, 17, ahead=ahead, workers=workers))
    assert len(early) == 12
    for a, b in zip(plain, early, strict=True):
        assert_same(a, b)
    assert torch.equal(torch.cat([b["i"] for b in early]), torch.arange(30, 102))


def test_drawing_ahead_leaves_no_threads():
    before = threading.active_count()
    source = train.batches(LINE, None, 0, 1000, ahead=5, workers=3)
    next(source)
    assert threading.active_count() > before, "drawn in the background"
    source.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_batch(processes):
    recipe = replace(LINE, batch_size=24, chunk=4)
    for step in (0, 7):
        whole = train.draw(recipe, None, step)
        shares = [train.draw(recipe, None, step, r, processes) for r in range(processes)]
        assert all(len(share["x"]) == 24 // processes for share in shares)
        assert_same(whole, {k: torch.cat([s[k] for s in shares]) for k in whole})
        early = next(train.batches(recipe, None, step, step + 1, rank=0, processes=processes))
        assert_same(shares[0], early)


def test_options_that_change_no_number(whole, tmp_path):
    run(LINE, tmp_path / "a", ahead=0)
    run(LINE, tmp_path / "b", ahead=4, workers=3, save_every=1)
    for name in "ab":
        assert_same(state(whole), state(tmp_path / name))
    seeded = run(LINE, tmp_path / "c", seed=1)
    assert not torch.equal(weights(seeded.out)["map.weight"], weights(whole)["map.weight"])


# --- what a run leaves behind --------------------------------------------------------------------


def test_what_a_run_writes(whole):
    files = sorted(p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file())
    assert files == [
        "final/README.md",
        "final/card.json",
        "final/config.json",
        "final/model.safetensors",
        "log.jsonl",
        "samples/step-000010.png",
        "samples/step-000020.png",
        "samples/step-000030.png",
        "state.safetensors",
    ]
    assert checkpoints.check(whole) == []
    card = checkpoints.read_card(whole / "final")
    expected = {"recipe": "line", "seed": 0, "steps": 30, "pictures": 180, "licence": "MIT"}
    expected |= {"command": "python -m companion train line", "precision": "fp32"}
    expected |= {"torch": torch.__version__.split("+")[0], "parameters": 19, "dtype": "float32"}
    assert card.items() >= expected.items()
    norm = weights(whole)["map.weight"].norm().item()
    assert card["score"]["norm"] == pytest.approx(norm), "the average is scored, as stored"
    assert "cores" in card["hardware"] and str(Path.home()) not in json.dumps(card)


def test_sample_pictures_are_a_grid(whole):
    from PIL import Image

    with Image.open(whole / "samples" / "step-000030.png") as image:
        assert image.size == (3 * 5 - 1, 2 * 4 - 1)  # five pictures of 3 x 4 in three columns
        pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
    wanted = (weights(whole)["map.weight"].sigmoid() * 255).round().int()
    assert torch.equal(pixels[:3, 5:9, 0].int(), wanted)
    assert torch.equal(pixels[4:, :4, 2].int(), wanted)
    assert (pixels[4:, 10:] == 255).all() and (pixels[3] == 255).all()


def test_grid_refuses_what_is_no_picture(tmp_path):
    for bad, said in (
        (torch.zeros(3, 4, 4), "shape"),
        (torch.zeros(1, 2, 4, 4), "2 channels; expected 1 or 3"),
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            train.save_grid(tmp_path / "x.png", bad)
    assert not list(tmp_path.iterdir())


def test_half_precision_storage_is_what_is_scored(tmp_path, whole):
    out = run(replace(LINE, dtype="float16"), tmp_path).out
    stored = weights(out)["map.weight"]
    assert stored.dtype == torch.float16
    assert torch.equal(stored, weights(whole)["map.weight"].half())
    score = checkpoints.read_card(out / "final")["score"]["norm"]
    assert score == stored.float().norm().item()


def test_without_average_the_weights_themselves_are_kept(tmp_path):
    out = run(replace(LINE, ema=None, score=None), tmp_path / "a").out
    assert torch.equal(weights(out)["map.weight"], state(out)["model.map.weight"])
    assert not any(k.startswith("ema.") for k in state(out))
    assert state(out)["model.count"] == 30, "samples are drawn in eval mode, steps in train mode"
    plain = run(replace(LINE, sample=None, steps=1), tmp_path / "b").out
    assert not (plain / "samples").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes(tmp_path, whole, precision):
    run(LINE, tmp_path / "a", precision=precision)
    stop_at(LINE, tmp_path / "b", 11, precision=precision)
    run(LINE, tmp_path / "b", precision=precision, resume=True)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    notes = [checkpoints.read_tensors(tmp_path / n / "state.safetensors")[1]["run"] for n in "ab"]
    scalers = [json.loads(note)["scaler"] for note in notes]
    assert scalers[0] == scalers[1] and bool(scalers[0]) == (precision == "fp16")
    close, exact = weights(tmp_path / "a")["map.weight"], weights(whole)["map.weight"]
    assert torch.allclose(close, exact, atol=0.1) and not torch.equal(close, exact)
    with pytest.raises(ValueError, match="has precision = '.*', now it is 'fp32'"):
        run(LINE, tmp_path / "a", resume=True)


def test_gradients_are_clipped_unscaled(tmp_path, monkeypatch):
    """Adam does not see a gradient's scale, but the largest norm allowed does."""
    norms = []
    clip = nn.utils.clip_grad_norm_

    def watched(parameters, limit):
        norms.append(clip(parameters, limit))
        return norms[-1]

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    for precision in ("fp32", "fp16"):
        run(replace(LINE, clip=None), tmp_path / precision, precision=precision, steps=1)
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=0.02)


def test_data_with_frozen_networks_is_moved(tmp_path):
    moved = []

    class Frozen:
        def to(self, device):
            moved.append(device.type)

    run(replace(LINE, data=lambda folder: Frozen(), steps=1), tmp_path)
    assert moved == ["cpu", "cpu"]  # to the device for the loss, and back for the score


def test_a_model_writes_its_own_folder(tmp_path):
    class Own(Line):
        def save_pretrained(self, folder, *, card, dtype):
            checkpoints.save(folder, self, config={"mine": 1}, card=card, dtype=dtype)

    run(replace(LINE, model=lambda data: Own(), steps=2), tmp_path)
    assert checkpoints.read_json(tmp_path / "final" / "config.json") == {"mine": 1}


# --- stopping and resuming -----------------------------------------------------------------------


def stop_at(recipe: Recipe, out: Path, step: int, number=signal.SIGINT, **options) -> train.Result:
    """Train, with a signal that arrives in the middle of a step."""

    def loss(model, batch, data):
        if batch["i"][0] == step * recipe.batch_size:
            os.kill(os.getpid(), number)
        return recipe.loss(model, batch, data)

    return run(replace(recipe, loss=loss), out, **options)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(whole, tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = stop_at(LINE, tmp_path, 8, number)
    assert not result.finished and result.step == 9
    assert number.name in result.message and "step 9 of 30" in result.message
    assert result.message.endswith("python -m companion train line --resume")
    assert not result.final.exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    again = run(LINE, tmp_path, resume=True)
    assert again.finished and again.resumed_from == 9
    assert_same(state(whole), state(tmp_path))
    assert_same(weights(whole), weights(tmp_path))
    assert log(whole) == log(tmp_path), "the log is that of a whole run"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_signal_does_not_wait(tmp_path):
    def loss(model, batch, data):
        if batch["i"][0] == 8 * 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return LINE.loss(model, batch, data)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(replace(LINE, loss=loss), tmp_path)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert run(LINE, tmp_path, resume=True).resumed_from == 6


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [0, 1, 5, 6, 13, 29])
def test_a_crash_at_any_step_loses_nothing(whole, tmp_path, step):
    def loss(model, batch, data):
        if batch["i"][0] == step * LINE.batch_size:
            raise Killed
        return LINE.loss(model, batch, data)

    with pytest.raises(Killed):
        run(replace(LINE, loss=loss), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # cut off in the middle
    (tmp_path / ".state.safetensors.abc.part").write_bytes(b"half")
    result = run(LINE, tmp_path, resume=True)
    assert result.resumed_from == step // 6 * 6
    assert_same(state(whole), state(tmp_path))
    assert_same(weights(whole), weights(tmp_path))
    assert log(whole) == log(tmp_path)
    assert not list(tmp_path.glob("**/.*.part"))


def test_a_finished_run_is_left_alone(tmp_path):
    run(LINE, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result = run(LINE, tmp_path, resume=True)
    assert result.finished and "already ended (step 30 of 30); nothing to do" in result.message
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "final" / "card.json").unlink()  # killed while it wrote the last folder
    run(LINE, tmp_path, resume=True)
    assert checkpoints.check(tmp_path) == []
    assert (tmp_path / "final" / "model.safetensors").read_bytes() in before.values()


def test_a_constant_rate_may_go_on_for_longer(tmp_path):
    steady = replace(LINE, decay="constant")
    run(steady, tmp_path / "a", steps=12)
    run(steady, tmp_path / "a", steps=30, resume=True)
    run(steady, tmp_path / "b", steps=30)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert checkpoints.read_card(tmp_path / "a" / "final")["steps"] == 30
    with pytest.raises(ValueError, match="has steps = 30, now it is 12"):
        run(steady, tmp_path / "a", steps=12, resume=True)


def test_a_rate_that_falls_late_leaves_the_length_open_until_it_falls(tmp_path):
    late = replace(LINE, decay="late")
    stop_at(replace(late, steps=40), tmp_path / "a", 20)
    with pytest.raises(ValueError, match="has steps = 40, now it is 22"):
        run(late, tmp_path / "a", steps=22, resume=True)  # its rate would have fallen by now
    run(late, tmp_path / "a", steps=30, resume=True)
    run(late, tmp_path / "b", steps=30)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_what_a_recipe_measures_at_the_end_goes_into_the_config_of_what_is_stored(tmp_path):
    def finish(model, data):
        stored = [x.to(torch.float16).float() for x in model.parameters()]
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), stored, strict=True))
        model.config = {"size": model.map.weight.norm().item()}

    recipe = replace(LINE, dtype="float16", finish=finish)
    run(recipe, tmp_path, steps=3)
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    norm = weights(tmp_path)["map.weight"].float().norm().item()
    assert config["size"] == pytest.approx(norm, rel=1e-6)
    assert checkpoints.read_card(tmp_path / "final")["score"]["norm"] == config["size"]


def test_a_resumed_run_has_the_threads_that_it_had(tmp_path):
    """Sums in another order would round otherwise: the number of threads is part of the state."""
    seen = []

    def loss(model, batch, data):
        seen.append(torch.get_num_threads())
        return LINE.loss(model, batch, data)

    before = torch.get_num_threads()
    recipe = replace(LINE, loss=loss)
    stop_at(recipe, tmp_path, 3, threads=before + 1)
    assert set(seen) == {before + 1} and torch.get_num_threads() == before
    run(recipe, tmp_path, resume=True)
    assert len(seen) == 30 and set(seen) == {before + 1} and torch.get_num_threads() == before


def test_resume_with_nothing_there_starts(tmp_path):
    assert run(LINE, tmp_path / "x", resume=True, steps=2).resumed_from == 0


@pytest.mark.slow  # half a minute: twenty kills, and a checkpoint after each of 300 steps
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_twenty_times_is_the_same_bit_for_bit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE / "kill_training.py", tmp_path, "20", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["in_writes"] >= 5, "kills landed while a checkpoint was being written"
    assert len(told["steps"]) == 20 and len(set(told["steps"])) > 10, "at many moments"
    assert told["steps"] == sorted(told["steps"]), "what was saved is never lost"
    assert max(told["steps"]) < 300, "each was killed before its end"
    assert_same(state(tmp_path / "killed"), state(tmp_path / "whole"))
    for name in ("model.safetensors", "config.json"):
        files = [(tmp_path / run / "final" / name).read_bytes() for run in ("killed", "whole")]
        assert files[0] == files[1]
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    assert checkpoints.check(tmp_path) == []
    assert not list(tmp_path.glob("**/.*.part"))


@pytest.mark.slow  # two processes import torch and accelerate
def test_two_processes_are_one(tmp_path):
    arguments = ["companion", "train", "digit-classifier", "--device", "cpu", "--quiet"]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    launch = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0", "-m"]
    for steps in (["--steps", "12"],):
        done = subprocess.run(
            [sys.executable, "-m", *launch, *arguments, *steps, "--out", tmp_path / "two"],
            capture_output=True,
            text=True,
            env=env,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Done.") == 1, "only the main process speaks"
    run(RECIPES["digit-classifier"], tmp_path / "one", steps=12)
    card = checkpoints.read_card(tmp_path / "two" / "final")
    assert card["hardware"].endswith("2 processes")
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-5), key
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


# --- every recipe --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def forty(tmp_path_factory) -> Path:
    """Forty pictures with captions, as a reader would bring them."""
    from PIL import Image

    from companion.storybook import caption, render, sample

    folder = tmp_path_factory.mktemp("forty")
    g = torch.Generator().manual_seed(0)
    scenes = sample(40, g)
    pictures = (render(scenes, 64) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    with (folder / "metadata.jsonl").open("w") as table:
        for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
            Image.fromarray(picture).save(folder / f"{i:02}.png")
            row = {"file_name": f"{i:02}.png", "text": caption(scene, generator=g)}
            table.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def beside_a_tiny_clip(tmp_path_factory) -> Path:
    return tiny_clip.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def a_tiny_clip(name, beside_a_tiny_clip, monkeypatch) -> None:
    """What builds on CLIP builds on a tiny one here: quick, and whether one is shipped or not."""
    if {"clip", "language-model"} & {*RECIPES[name].needs}:
        monkeypatch.setattr(checkpoints, "WEIGHTS", beside_a_tiny_clip)


@pytest.mark.slow  # all recipes, forty steps of each
@pytest.mark.usefixtures("a_tiny_clip")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_and_resumes_on_forty_pictures(name, forty, tmp_path):
    recipe = replace(RECIPES[name], score=None, save_every=10, log_every=5, sample_every=20)
    options = {"data": forty, "steps": 20, "batch_size": 8}
    assert run(recipe, tmp_path / "whole", **options).finished

    class Stop(Exception):
        pass

    steps = iter(range(100))

    def loss(model, batch, data):
        if next(steps) == 13:
            raise Stop
        return recipe.loss(model, batch, data)

    with pytest.raises(Stop):
        run(replace(recipe, loss=loss), tmp_path / "cut", **options)
    result = run(recipe, tmp_path / "cut", **options, resume=True)
    assert result.finished and result.resumed_from == 10
    assert_same(state(tmp_path / "whole"), state(tmp_path / "cut"))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    lines = log(tmp_path / "whole")
    assert lines == log(tmp_path / "cut")
    assert all(math.isfinite(line["loss"]) for line in lines)
    card = checkpoints.read_card(tmp_path / "whole" / "final")
    assert card["data"] == f"the folder {forty.name}"
    assert f"--data {forty.name} --steps 20 --batch-size 8" in card["command"]
    assert checkpoints.check(tmp_path / "whole") == []
    before = dict(train.build(recipe, recipe.data(forty)).named_parameters())
    after = state(tmp_path / "whole")
    learning = {k: x for k, x in before.items() if x.requires_grad}
    still = [k for k, x in learning.items() if torch.equal(x, after[f"model.{k}"])]
    assert not still, "every weight has learnt"


@pytest.mark.usefixtures("a_tiny_clip")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_draws_by_its_generator(name):
    """Two draws of a step are equal, two steps are not, and the global generator is untouched."""
    recipe = replace(RECIPES[name], batch_size=8)
    data = recipe.data(None)
    before = torch.get_rng_state()
    first = train.draw(recipe, data, 3)
    assert_same(first, train.draw(recipe, data, 3))
    assert torch.equal(before, torch.get_rng_state())
    assert any(not torch.equal(x, train.draw(recipe, data, 4)[k]) for k, x in first.items())
    assert recipe.name == name and recipe.about.endswith(".") and recipe.minutes > 0


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"steps": 0}, ValueError, "steps is 0; expected a whole number of at least 1"),
        ({"steps": 1.5}, TypeError, "steps is 1.5"),
        ({"batch_size": -1}, ValueError, "batch_size is -1"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate is nan"),
        ({"decay": "cosin"}, ValueError, "Did you mean 'cosine'"),
        ({"dtype": "float8"}, ValueError, "dtype is 'float8'"),
        ({"ema": 1.5}, ValueError, "ema is 1.5"),
        ({"clip": -1.0}, ValueError, "clip is -1.0"),
    ],
)
def test_recipes_are_checked(change, error, said):
    with pytest.raises(error, match=said):
        replace(LINE, **change)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"precision": "fp8"}, ValueError, "precision is 'fp8'; expected one of 'fp32'"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'; expected one of 'auto'"),
        ({"threads": 0}, ValueError, "threads is 0"),
        ({"ahead": -1}, ValueError, "ahead is -1"),
        ({"workers": 0}, ValueError, "workers is 0"),
        ({"data": "no/such/folder"}, FileNotFoundError, "no/such/folder does not exist"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        train.train(LINE, tmp_path / "x", **{"quiet": True, "device": "cpu", **options})
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path):
    for device in ("cuda",) if torch.backends.mps.is_available() else ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"device is '{device}'.*--device cpu"):
            train.train(LINE, tmp_path, device=device)


def test_a_broken_picture_is_found_before_training(tmp_path, forty):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in forty.iterdir():
        raw = path.read_bytes()
        (folder / path.name).write_bytes(raw[:-200] if path.name == "31.png" else raw)
    with pytest.raises(ValueError, match="31.png"):
        run(LINE, tmp_path / "out", data=folder)
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="'nothing', .*companion train nothing"):
        run(replace(LINE, needs=("nothing",)), tmp_path)


def test_a_run_is_not_overwritten(tmp_path):
    run(LINE, tmp_path / "x", steps=1)
    with pytest.raises(ValueError, match="already holds a run.*--resume.*--out"):
        run(LINE, tmp_path / "x", steps=1)
    (tmp_path / "x" / "state.safetensors").unlink()
    for resume in (True, False):
        with pytest.raises(ValueError, match="no state to continue from"):
            run(LINE, tmp_path / "x", steps=1, resume=resume)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        run(LINE, tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 8}, "batch_size = 6, now it is 8"),
        ({"seed": 3}, "seed = 0, now it is 3"),
        ({"steps": 40}, "steps = 30, now it is 40"),
        ({"learning_rate": 0.1}, "learning_rate = 0.05, now it is 0.1"),
        ({"betas": (0.9, 0.99)}, "betas"),
        ({"ema": None}, "ema = 0.9, now it is None"),
        ({"name": "other"}, "name = 'line'"),
    ],
)
def test_a_run_is_resumed_as_it_was(whole, change, said):
    with pytest.raises(ValueError, match=said):
        run(replace(LINE, **change), whole, resume=True)


def test_resuming_a_changed_model_is_refused(tmp_path):
    stop_at(LINE, tmp_path, 3)
    other = replace(LINE, model=lambda data: nn.ModuleDict({"map": nn.Linear(4, 2)}))
    with pytest.raises(CheckpointError, match="does not fit the model of recipe line"):
        run(other, tmp_path, resume=True)


@pytest.mark.parametrize("place", [5, 100, -1])
def test_an_altered_state_is_named(tmp_path, place):
    stop_at(LINE, tmp_path, 3)
    path = tmp_path / "state.safetensors"
    raw = bytearray(path.read_bytes())
    raw[place] ^= 8
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="state.safetensors.* altered"):
        run(LINE, tmp_path, resume=True)
    checkpoints.write_tensors(path, {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="is no state of a run"):
        run(LINE, tmp_path, resume=True)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(whole, tmp_path, where):
    def loss(model, batch, data):
        value, metrics = LINE.loss(model, batch, data)
        if batch["i"][0] == 9 * 6:
            bad = torch.full((), float("nan"))
            value = value + bad if where == "loss" else value + (model.map.bias * 0).sqrt().sum()
        return value, metrics

    with pytest.raises(TrainingError, match=r"recipe line .* at step 9.*last checkpoint in"):
        run(replace(LINE, loss=loss), tmp_path)
    result = run(LINE, tmp_path, resume=True)  # the recipe mended
    assert result.resumed_from == 6
    assert_same(weights(whole), weights(tmp_path))


def test_hidden_chance_is_refused(tmp_path):
    def careless(indices, generator, data):
        return {"x": torch.randn(len(indices), 4), "i": indices}

    def dropout(model, batch, data):
        value, metrics = LINE.loss(model, batch, data)
        return value + 0 * F.dropout(batch["x"]).sum(), metrics

    with pytest.raises(ValueError, match=r"batch\(\) gave two different batches"):
        run(replace(LINE, batch=careless), tmp_path / "a")
    with pytest.raises(ValueError, match="draws from torch's global generator"):
        run(replace(LINE, loss=dropout), tmp_path / "b")


@pytest.mark.parametrize(
    ("entry", "said"),
    [(torch.zeros(3, 1), r"'x' is \(3, 1\)"), (torch.zeros(()), r"\(\)"), ([1, 2], "list")],
)
def test_batches_of_the_wrong_shape_are_named(tmp_path, entry, said):
    recipe = replace(LINE, batch=lambda indices, generator, data: {"x": entry})
    with pytest.raises(ValueError, match=f"recipe line: batch entry .*{said}.*first dimension"):
        run(recipe, tmp_path)


def test_an_error_in_the_background_comes_through(tmp_path):
    def failing(indices, generator, data):
        if indices[0] >= 60:
            raise ZeroDivisionError("in the background")
        return _batch(indices, generator, data)

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="in the background"):
        run(replace(LINE, batch=failing), tmp_path)
    assert threading.active_count() == before


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="cannot be written to"):
            run(LINE, tmp_path / "x")
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(ValueError, match="cannot be written to .*No space left.*--out"):
        run(LINE, tmp_path / "x")


FAULTS = """
import resource, sys, torch
from companion.train import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def large():
    return torch.ones(10_000_000).add(1).sum()  # 40 MB, twice: glibc keeps up to 32 by itself
for _ in range(3):
    large()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    large()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_is_kept_comes_from_the_system_once():
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)

    assert faults("keep") < 0.1 * faults("leave")
