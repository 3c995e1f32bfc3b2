"""Speeds: the table, and the arithmetic of comparing: never how fast anything is here and now."""

import math
import time

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from companion import bench

# --- the table -----------------------------------------------------------------------------------


def test_a_registered_benchmark_gets_its_row(monkeypatch, capsys):
    monkeypatch.setattr(bench, "BENCHMARKS", {})
    bench.benchmark("a thing", "things", "≥ 2")(lambda: [3.0, 1.0, 2.5])
    (name,) = bench.BENCHMARKS
    assert bench.main([name]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["a", "thing", "2.5", "1", "…", "3", "things", "≥", "2"]


def test_an_unknown_name_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "import_time" in capsys.readouterr().err


def test_what_the_system_does_not_tell_is_no_number(monkeypatch, capsys):
    monkeypatch.setattr(bench, "BENCHMARKS", {})
    bench.benchmark("memory", "MB")(lambda: [])
    assert bench.main([]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].split()
        == "memory this system does not tell".split()
    )


@pytest.mark.parametrize("name", ["dalle2", "stable_diffusion"])
def test_pictures_are_drawn_whole_and_measured_by_the_clock(name, monkeypatch):
    """Each call of the system is one picture from words, guided as it is in its exam."""
    import companion

    asked = []

    class System:
        def __call__(self, prompt, **settings):
            asked.append((prompt, settings["guidance_scale"]))
            time.sleep(0.02)
            return torch.ones(3_000_000)

    kind = {"dalle2": "DALLE2", "stable_diffusion": "StableDiffusion"}[name]
    monkeypatch.setattr(getattr(companion, kind), "from_pretrained", lambda folder: System())
    bench.pictures.cache_clear()
    seconds = bench.BENCHMARKS[f"{name}_picture"].measure()
    megabytes = bench.BENCHMARKS[f"{name}_memory"].measure()
    bench.pictures.cache_clear()
    assert len(seconds) == 6 and min(seconds) >= 0.02
    assert megabytes == [] or max(megabytes) > 8  # 12 MB, where the system counts them
    assert set(asked) == {("a red house by the sea at dusk", {"dalle2": 3.0}.get(name, 4.0))}


# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 7, 9, 15, 30, 101])
def test_the_interval_is_scipys(n):
    """SciPy's quantile test gives the same interval by another way."""
    values = np.random.default_rng(n).lognormal(size=n)
    found = bench.spread(values.tolist())
    interval = stats.quantile_test(values, q=1.0, p=0.5).confidence_interval(0.95)
    assert (found.low, found.high) == (interval.low, interval.high)
    assert found.median == np.median(values)
    assert 0.95 <= found.confidence < 1


def test_six_and_thirty_values_by_hand():
    six = bench.spread([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert (six.median, six.low, six.high) == (3.5, 1.0, 6.0)
    assert six.confidence == 1 - 2 / 64  # wrong only if all six fell on one side of the median
    thirty = bench.spread([float(i) for i in range(1, 31)])
    assert (thirty.low, thirty.high) == (10.0, 21.0)  # the table of any book on the sign test


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """A thousand sets of very skewed noise around a known median."""
    draws = np.random.default_rng(1).lognormal(mean=math.log(1.2), sigma=0.5, size=(1000, 30))
    inside = [low <= 1.2 <= high for _, low, high, _ in (bench.spread(row) for row in draws)]
    confidence = bench.spread(draws[0]).confidence
    allowed = stats.binom.interval(0.9999, 1000, confidence)
    assert allowed[0] <= sum(inside) <= allowed[1]


def test_too_few_values_give_no_interval():
    with pytest.raises(ValueError, match="5 measurements; an interval needs at least 6"):
        bench.spread([1.0] * 5)


# --- taking turns --------------------------------------------------------------------------------


class Work:
    """A job that counts its calls on a clock of its own, which only work moves."""

    now = 0.0

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def __call__(self) -> None:
        self.log.append(self.name)
        Work.now += self.seconds


@pytest.fixture
def own_clock(monkeypatch):
    """Time that passes only by work, three times as fast on the wall as on the processor."""
    monkeypatch.setattr(Work, "now", 0.0)
    monkeypatch.setattr(time, "process_time", lambda: Work.now)
    monkeypatch.setattr(time, "perf_counter", lambda: 3 * Work.now)


def test_turns_alternate_and_the_time_is_that_of_one_call(own_clock):
    log: list[str] = []
    a, b = Work("a", 0.125, log), Work("b", 0.25, log)
    first, second = bench.in_turn([a, b], rounds=3, at_least=0.25)
    assert [x.cpu for x in first] == [0.125] * 3 and [x.wall for x in first] == [0.375] * 3
    assert [x.cpu for x in second] == [0.25] * 3
    turns = "".join(log)
    assert turns.endswith("aab" + "baa" + "aab")  # a needs two calls to fill a turn
    assert turns.startswith("aabaab")  # once uncounted, and the quick one once to see how long


def test_work_done_twice_is_half_as_fast():
    """The real clock: a function that does a known job twice has about half the speed."""
    x = torch.randn(256, 256)

    def once() -> None:
        for _ in range(5):
            x @ x

    def twice() -> None:
        once()
        once()

    ours, theirs = bench.in_turn([twice, once], rounds=15, at_least=0.01)
    ratio = bench.spread([b.cpu / a.cpu for a, b in zip(ours, theirs, strict=True)])
    assert 0.4 < ratio.median < 0.6
    assert ratio.high < 0.8, "a planted slowdown shows"


# --- arithmetic and memory -----------------------------------------------------------------------


def test_flops_of_each_kind_in_closed_form():
    x = torch.randn(2, 6, 10, 8)
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    tokens = torch.randn(2, 5, 12)
    conv, linear = nn.Conv2d(6, 9, 3, padding=1, stride=2), nn.Linear(12, 20)
    with torch.no_grad():
        assert bench.flops(lambda: conv(x)) == 2 * (2 * 9 * 5 * 4) * (6 * 9)
        assert bench.flops(lambda: linear(tokens)) == 2 * (2 * 5) * 12 * 20
        attention = 2 * 3 * 2 * (5 * 7 * 4 + 5 * 7 * 4)
        assert bench.flops(lambda: F.scaled_dot_product_attention(q, k, k)) == attention
        mask = torch.zeros(5, 7)
        assert bench.flops(lambda: F.scaled_dot_product_attention(q, k, k, mask)) == attention
        assert bench.flops(lambda: F.silu(x) + x) == 0
        multiply, work = bench.product(64)
        assert bench.flops(multiply) == work == 2 * 64**3


def test_the_stable_diffusion_unet_has_the_known_amount_of_arithmetic():
    """Counted by hand, layer by layer, from the widths alone (no weights are made)."""
    from companion.unet import UNet, UNetConfig

    config = UNetConfig(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12,
        attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet, n, words = UNet(config), 64, 5

    def conv(c_in: int, c_out: int, places: int, k: int = 3) -> int:
        return 2 * c_in * c_out * k * k * places

    def block(c_in: int, c_out: int, places: int) -> int:
        shortcut = conv(c_in, c_out, places, 1) if c_in != c_out else 0
        time = 2 * 32 * c_out
        return conv(c_in, c_out, places) + conv(c_out, c_out, places) + shortcut + time

    def look(c: int, places: int) -> int:
        to_itself = 4 * 2 * c * c * places + 2 * 2 * places * places * c
        to_words = 2 * 2 * c * c * places + 2 * 2 * 12 * c * words + 2 * 2 * places * words * c
        think = 2 * c * 8 * c * places + 2 * 4 * c * c * places
        return 2 * conv(c, c, places, 1) + to_itself + to_words + think

    small = n // 4
    wanted = 2 * 8 * 32 + 2 * 32 * 32 + conv(4, 8, n) + conv(8, 4, n)  # time, in and out
    wanted += block(8, 8, n) + look(8, n) + conv(8, 8, small)  # down
    wanted += block(8, 16, small)
    wanted += 2 * block(16, 16, small) + look(16, small)  # the middle
    wanted += block(16 + 16, 16, small) + block(16 + 8, 16, small) + conv(16, 16, n)  # up
    wanted += block(16 + 8, 8, n) + block(8 + 8, 8, n) + 2 * look(8, n)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, words, 12)
    with torch.no_grad():
        assert bench.flops(lambda: unet(x, 3, context)) == wanted


def test_memory_is_what_a_call_holds_at_once():
    mega = 2**20

    def at_once() -> None:
        a, b = (torch.ones(8 * mega) for _ in range(2))  # 32 MB each
        a += b

    def one_after_the_other() -> None:
        for _ in range(2):
            torch.ones(8 * mega).sum()

    held = [turns[0].memory for turns in bench.in_turn([at_once, one_after_the_other], rounds=1)]
    if None in held:
        pytest.skip("this system does not tell how much memory a process holds")
    assert 60 * mega < held[0] < 75 * mega
    assert 30 * mega < held[1] < 45 * mega
