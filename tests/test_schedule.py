"""Schedules against closed forms in high precision, simulation, and every kind of bad argument."""

import json
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.checkpoints import CheckpointError
from companion.schedule import DEFAULTS, Schedule, draw

SCHEDULES = {
    "linear": Schedule.linear(),
    "scaled_linear": Schedule.scaled_linear(),
    "cosine": Schedule.cosine(),
    "linear 50": Schedule.linear(50),
    "zero": Schedule.scaled_linear().rescale_zero_snr(),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def g(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the tables ----------------------------------------------------------------------------------


def exact(name, T=1000):
    """abar in 40 digits, from the papers' formulas; nothing shared with the code under test."""
    with mpmath.workdps(40):
        if name == "cosine":
            f = lambda i: (  # noqa: E731 (the paper's letter)
                mpmath.cos(
                    (mpmath.mpf(i) / T + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2
                )
                ** 2
            )
            betas = [min(1 - f(i + 1) / f(i), mpmath.mpf("0.999")) for i in range(T)]
        else:
            lo, hi = ("0.0001", "0.02") if name == "linear" else ("0.00085", "0.012")
            p = 1 if name == "linear" else mpmath.mpf("0.5")
            a, b = mpmath.mpf(lo) ** p, mpmath.mpf(hi) ** p
            betas = [(a + (b - a) * i / (T - 1)) ** (1 / p) for i in range(T)]
        abar, total = [], mpmath.mpf(1)
        for beta in betas:
            total *= 1 - beta
            abar.append(total)
        return [float(b) for b in betas], [float(a) for a in abar]


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("T", [7, 1000])
def test_tables_equal_the_formulas_in_forty_digits(name, T):
    schedule = getattr(Schedule, name)(T)
    betas, abar = exact(name, T)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert len(schedule) == T == len(schedule.betas) == len(schedule.alphas_cumprod)
    betas, abar = (torch.tensor(x, dtype=torch.float64) for x in (betas, abar))
    torch.testing.assert_close(schedule.betas, betas, rtol=1e-11, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, abar, rtol=1e-10, atol=0)


def test_published_ends():
    """Last sqrt(abar) as printed in Lin et al. 2305.08891, Table 1, and DDPM's table at small T."""
    last = lambda schedule: schedule.signal(len(schedule) - 1).item()  # noqa: E731
    assert last(Schedule.linear()) == pytest.approx(0.006353, abs=1e-6)
    assert last(Schedule.cosine()) == pytest.approx(4.928e-5, abs=1e-8)
    assert last(Schedule.scaled_linear()) == pytest.approx(0.068265, abs=1e-6)
    for T, left in [(50, 0.78), (100, 0.60), (200, 0.36)]:  # unscaled betas on a short schedule
        assert last(Schedule.linear(T)) == pytest.approx(left, abs=0.005)


def test_row_0_is_the_first_noising_step():
    schedule = Schedule(torch.tensor([0.1, 0.2, 0.5]))
    torch.testing.assert_close(
        schedule.alphas_cumprod, torch.tensor([0.9, 0.72, 0.36]).double(), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_rescaling_keeps_the_first_row_and_empties_the_last(name):
    before = getattr(Schedule, name)()
    after = before.rescale_zero_snr()
    assert after.alphas_cumprod[-1] == 0 and after.betas[-1] == 1
    assert before.alphas_cumprod[-1] > 0, "the old schedule is untouched"
    torch.testing.assert_close(after.alphas_cumprod[0], before.alphas_cumprod[0])
    # Algorithm 1 is affine in sqrt(abar): equal differences stay in proportion.
    old, new = before.signal(torch.arange(1000)), after.signal(torch.arange(1000))
    ratio = (new[0] - new[1:]) / (old[0] - old[1:])
    torch.testing.assert_close(ratio, ratio[-1].expand(999), rtol=1e-6, atol=0)
    assert after.log_snr(999) == -math.inf and after.snr(999) == 0 and after.noise(999) == 1


# --- what follows from them ----------------------------------------------------------------------


@every
def test_kin_of_abar(schedule):
    t = torch.arange(len(schedule))
    abar = schedule.alphas_cumprod
    torch.testing.assert_close(
        schedule.signal(t) ** 2 + schedule.noise(t) ** 2, torch.ones_like(abar)
    )
    torch.testing.assert_close(schedule.snr(t), schedule.signal(t) ** 2 / schedule.noise(t) ** 2)
    torch.testing.assert_close(schedule.log_snr(t).exp(), schedule.snr(t))
    torch.testing.assert_close(schedule.sigmas, schedule.noise(t) / schedule.signal(t))
    assert (abar.diff() < 0).all(), "each step loses some of the picture"
    assert schedule.signal(0).shape == () and schedule.signal(t[:6].view(2, 3)).shape == (2, 3)


@every
def test_fractional_t_meets_the_rows_and_runs_between_them(schedule):
    rows = torch.arange(len(schedule))
    assert torch.equal(schedule.alpha_bar(rows.float()), schedule.alphas_cumprod)
    assert torch.equal(schedule.alpha_bar(3.0), schedule.alphas_cumprod[3])
    between = torch.arange(len(schedule) - 2) + 0.25
    sigma = schedule.noise(between) / schedule.signal(between)
    straight = 0.75 * schedule.sigmas[:-2] + 0.25 * schedule.sigmas[1:-1]
    torch.testing.assert_close(sigma, straight, rtol=1e-9, atol=0)


@every
def test_t_of_log_snr_undoes_log_snr(schedule):
    finite = len(schedule) - 1 - int(schedule.alphas_cumprod[-1] == 0)
    t = torch.linspace(0, finite, 700, dtype=torch.float64)
    torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=0, atol=1e-6)
    whole = torch.arange(finite + 1)
    torch.testing.assert_close(
        schedule.t_of_log_snr(schedule.log_snr(whole)), whole.double(), rtol=0, atol=1e-6
    )
    assert schedule.t_of_log_snr(schedule.log_snr(5).item()).item() == pytest.approx(5)


def test_t_of_log_snr_ends():
    zero = SCHEDULES["zero"]
    assert zero.t_of_log_snr(-math.inf) == 999
    assert Schedule(torch.tensor([0.5])).t_of_log_snr(0.0) == 0
    for bad in (-20.0, 20.0, math.nan):
        with pytest.raises(ValueError, match=r"this schedule covers -10\.1.* to 9\.2"):
            Schedule.linear().t_of_log_snr(bad)


def test_zero_snr_has_nothing_between_its_last_rows():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        SCHEDULES["zero"].signal(998.5)
    assert SCHEDULES["zero"].signal(998.0) > 0


# --- noising -------------------------------------------------------------------------------------


@every
def test_add_noise_is_eq_4_for_each_picture(schedule):
    x0, noise = torch.rand(3, 2, 4, 5, generator=g()), torch.randn(3, 2, 4, 5, generator=g(1))
    t = torch.tensor([0, len(schedule) // 2, len(schedule) - 1])
    x = schedule.add_noise(x0, noise, t)
    assert x.dtype == torch.float32
    for i in range(3):
        abar = float(torch.prod(1 - schedule.betas[: int(t[i]) + 1]))
        want = math.sqrt(abar) * x0[i] + math.sqrt(1 - abar) * noise[i]
        torch.testing.assert_close(x[i], want)
        torch.testing.assert_close(schedule.add_noise(x0, noise, int(t[i]))[i], want)


def test_one_jump_equals_many_steps_exactly():
    """Many steps leave the signal and the noise variance of the closed form."""
    schedule = Schedule.cosine(40)
    one = torch.ones(1, dtype=torch.float64)
    signal, variance = one.clone(), torch.zeros(1, dtype=torch.float64)
    for t in range(40):
        state = g(5)
        noise = torch.randn(1, generator=g(5), dtype=torch.float64)
        moved = schedule.step(one, t, state)
        beta = schedule.betas[t]
        torch.testing.assert_close(moved, (1 - beta).sqrt() * one + beta.sqrt() * noise)
        signal, variance = signal * (1 - beta).sqrt(), variance * (1 - beta) + beta
        torch.testing.assert_close(signal[0], schedule.signal(t))
        torch.testing.assert_close(variance[0].sqrt(), schedule.noise(t))


def test_one_jump_equals_many_steps_by_simulation():
    schedule = Schedule.linear(30, beta_end=0.3)
    n = 200_000
    x = torch.full((n, 1), 2.0, dtype=torch.float64)
    generator = g(3)
    for t in range(20):
        x = schedule.step(x, t, generator)
    mean, std = schedule.signal(19) * 2, schedule.noise(19)
    assert abs(x.mean() - mean) < 4 * std / math.sqrt(n)
    assert abs(x.std() - std) < 4 * std / math.sqrt(2 * n)
    # and not one step more or less: the neighbours are many standard errors away
    assert abs(schedule.signal(20) * 2 - mean) > 20 * std / math.sqrt(n)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data())
def test_any_table_of_betas(T, data):
    betas = data.draw(st.lists(st.floats(1e-6, 0.9), min_size=T, max_size=T))
    schedule = Schedule(torch.tensor(betas, dtype=torch.float64))
    t = data.draw(st.integers(0, T - 1))
    assert schedule.alphas_cumprod[t].item() == pytest.approx(
        math.prod(1 - b for b in betas[: t + 1]), rel=1e-9
    )
    if schedule.alphas_cumprod[-1] > 1e-12 and T > 1:
        u = data.draw(st.floats(0, T - 1))
        assert schedule.t_of_log_snr(schedule.log_snr(u)).item() == pytest.approx(u, abs=1e-3)


def test_noise_comes_only_from_its_generator():
    x = torch.zeros(4, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    schedule = Schedule.linear()
    first = schedule.step(x, 500, g(7))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(first, schedule.step(x, 500, g(7)))
    assert not torch.equal(first, schedule.step(x, 500, g(8)))
    each = draw(x, [g(0), g(1), g(2), g(3)])
    assert torch.equal(each[2:3], draw(x[2:3], g(2))), "a seed survives a change of batch size"
    with pytest.raises(TypeError, match=r"expected a torch\.Generator"):
        schedule.step(x, 500, None)
    with pytest.raises(ValueError, match="1 generators for 4 pictures"):
        draw(x, [g()])


# --- bad arguments -------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("x0", "noise", "t", "error", "message"),
    [
        (X, X, 1000, ValueError, "t runs from 1000 to 1000; expected values from 0 to 999"),
        (X, X, -1, ValueError, "t runs from -1"),
        (X, X, torch.tensor([0, 1000]), ValueError, "t runs from 0 to 1000"),
        (X, X, torch.tensor([0, 1, 2]), ValueError, "one for each of the 2 pictures"),
        (X, X, torch.tensor([[0], [1]]), ValueError, "t has shape"),
        (X, X, 0.5, TypeError, "expected whole timesteps"),
        (X, X, torch.tensor([0.1, 0.2]), TypeError, "not fractions of T"),
        (X, X, True, TypeError, "t is True"),
        (X, X, torch.tensor([True, False]), TypeError, "bool"),
        (X, X, "3", TypeError, "t is '3'"),
        (X.long(), X, 3, TypeError, "x0 has dtype"),
        (X, X.double(), 3, TypeError, "noise has dtype"),
        (X, X[:1], 3, ValueError, "noise has shape"),
        (X / 0, X, 3, ValueError, "NaN or infinite"),
        (X, X * math.inf, 3, ValueError, "noise has 96 of 96 values"),
        (None, X, 3, TypeError, "x0 is NoneType"),
    ],
)
def test_add_noise_refuses(x0, noise, t, error, message):
    with pytest.raises(error, match=message):
        Schedule.linear().add_noise(x0, noise, t)


@pytest.mark.parametrize("t", [math.nan, math.inf, -0.1, 999.5, torch.tensor([0.0, math.nan])])
def test_alpha_bar_refuses(t):
    with pytest.raises(ValueError, match="^t "):
        Schedule.linear().alpha_bar(t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.linear(0), "T is 0"),
        (lambda: Schedule.cosine(-3), "T is -3"),
        (lambda: Schedule.linear(10, beta_start=0.0), "beta_start is 0.0"),
        (lambda: Schedule.scaled_linear(10, beta_end=1.0), "beta_end is 1.0"),
        (lambda: Schedule.cosine(10, s=-1.0), "s is -1.0"),
        (lambda: Schedule(torch.tensor([0.1, 1.0, 0.1])), "strictly between 0 and 1"),
        (lambda: Schedule(torch.tensor([0.1, math.nan])), "NaN"),
        (lambda: Schedule(torch.tensor([0.1, 1.5])), "strictly between"),
        (lambda: Schedule(torch.zeros(2, 2)), "betas has shape"),
        (lambda: Schedule(torch.zeros(0)), "betas has shape"),
    ],
)
def test_constructors_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="T is 10.0"):
        Schedule.linear(10.0)


# --- configuration files -------------------------------------------------------------------------


def folder(tmp_path, text, sub=""):
    path = tmp_path / sub / "scheduler_config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return tmp_path


STABLE = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
}


def test_from_config(tmp_path):
    same = lambda a, b: torch.equal(a.betas, b.betas)  # noqa: E731
    read = lambda **keys: Schedule.from_config(folder(tmp_path, keys))  # noqa: E731
    assert same(read(**STABLE), Schedule.scaled_linear())
    assert same(Schedule.from_config(tmp_path / "scheduler_config.json"), Schedule.scaled_linear())
    assert same(
        read(**STABLE, rescale_betas_zero_snr=True), Schedule.scaled_linear().rescale_zero_snr()
    )
    assert same(read(), Schedule.linear())
    assert same(
        read(num_train_timesteps=12, beta_schedule="squaredcos_cap_v2"), Schedule.cosine(12)
    )
    assert (
        same(read(trained_betas=[0.1, 0.2]), Schedule(torch.tensor([0.1, 0.2]).double())) is False
    )
    assert read(trained_betas=[0.1, 0.2]).betas.tolist() == [0.1, 0.2]
    assert same(read(_class_name="UnCLIPScheduler", num_train_timesteps=1000), Schedule.cosine())
    heun = Schedule.linear(beta_start=0.00085, beta_end=0.012)
    assert same(read(_class_name="HeunDiscreteScheduler"), heun), "its own defaults"


def test_from_config_finds_the_scheduler_of_a_pipeline(tmp_path):
    Schedule.from_config(folder(tmp_path, STABLE, sub="scheduler"))
    Schedule.from_config(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"beta_schedule": None}, "beta_schedule is None"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"num_train_timesteps": 0}, "T is 0"),
        ({"num_train_timesteps": "many"}, "T is 'many'"),
        ({"beta_start": 2}, "beta_start is 2"),
        ({"beta_start": None}, "beta_start is None"),
        ({"trained_betas": [0.1, 7]}, "betas run from 0.1 to 7"),
        ({"trained_betas": "x"}, "scheduler_config.json: "),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes'"),
        ([], "holds a list"),
        ("{", "not readable JSON"),
    ],
)
def test_from_config_refuses_by_name(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        Schedule.from_config(folder(tmp_path, config))


def test_from_config_without_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"No scheduler_config\.json in"):
        Schedule.from_config(tmp_path)


def test_defaults_name_only_schedulers():
    assert all(name.endswith("Scheduler") for name in DEFAULTS)


def test_repr_is_one_line():
    assert repr(Schedule.linear()) == (
        "Schedule(T=1000, betas 0.0001 ... 0.02, last abar 4.036e-05)"
    )
