"""Schedules and samplers, step by step, against diffusers' schedulers.

Each network here is a fixed function of (x, t); its raw answer goes to the stock scheduler as it is
and to ours through ``diffusion.to_x0``. Every state on the way is compared, not only the end. The
stock code holds some tables in float32. It is run as it stands, and once more with the same lines
computing in float64 (``wide``): then nothing but the formulas is compared.
"""

import importlib
import inspect
import math
import types
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from companion import diffusion, samplers
from companion.diffusion import TARGETS
from companion.schedule import Schedule

FILES = {
    "DDPM": "ddpm",
    "DDIM": "ddim",
    "DDIMInverse": "ddim_inverse",
    "EulerDiscrete": "euler_discrete",
    "HeunDiscrete": "heun_discrete",
    "DPMSolverMultistep": "dpmsolver_multistep",
    "UnCLIP": "unclip",
}
OURS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "EulerDiscrete",
    "heun": "HeunDiscrete",
    "dpmpp_2m": "DPMSolverMultistep",
}
CONFIGS = {  # what makes our table, and what makes theirs
    "linear": (
        Schedule.linear(),
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ),
    "scaled": (
        Schedule.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (Schedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "short": (
        Schedule.linear(50, beta_end=0.2),
        {
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.2,
            "num_train_timesteps": 50,
        },
    ),
}
SPACINGS = ("leading", "linspace", "trailing")
# diffusers hands tensors to np.array, which NumPy 2 finds old-fashioned
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
tables = pytest.mark.parametrize("table", ["linear", "scaled", "cosine"])
targets = pytest.mark.parametrize("target", TARGETS)


class Wide:
    """A library whose float32 is float64; the rest is the library's own."""

    def __init__(self, library):
        self.library = library
        self.float32 = library.float64

    def __getattr__(self, name):
        return getattr(self.library, name)


@pytest.fixture(scope="session")
def modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            name: importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
            for name, file in FILES.items()
        }
        importlib.import_module("diffusers.utils.logging").set_verbosity_error()
    return found


@pytest.fixture
def build(modules):
    """Make a stock scheduler, its abar table replaced by ours where asked (``exact``)."""

    def build(name, table, exact=True, **config):
        schedule, theirs = CONFIGS[table]
        if name == "UnCLIP":
            theirs = {}
        scheduler = getattr(modules[name], f"{name}Scheduler")(**theirs, **config)
        if exact:
            scheduler.betas = schedule.betas.clone()
            scheduler.alphas = 1 - schedule.betas
            scheduler.alphas_cumprod = schedule.alphas_cumprod.clone()
            if config.get("set_alpha_to_one") is False:
                scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        return scheduler, schedule

    return build


@pytest.fixture
def wide(modules, monkeypatch):
    """The stock schedulers' own lines, computing in float64 throughout."""
    for module in modules.values():
        monkeypatch.setattr(module, "torch", Wide(torch))
        monkeypatch.setattr(module, "np", Wide(np))


# --- the two sides -------------------------------------------------------------------------------

g = torch.Generator().manual_seed(1)
MIX = torch.randn(18, 18, generator=g, dtype=torch.float64) / 18**0.5
NOISE = torch.randn(3, 2, 3, 3, generator=g, dtype=torch.float64)


def network(x, t):
    """(B, 2, 3, 3) from (B, 2, 3, 3): mixes all values, depends on t, is bounded."""
    t = torch.as_tensor(t, dtype=x.dtype).view(-1, 1)
    y = torch.tanh(x.flatten(1) @ MIX.to(x.dtype)) + 0.4 * torch.sin(x.flatten(1) + t / 90)
    return y.view_as(x)


def variance_of(x, t):
    """The second half of a network with learned variance, in [-1, 1]."""
    return torch.sin(2 * network(x, t) + 1)


def theirs(scheduler, answer=network, start=NOISE, learned=False, **options):
    """Walk with a stock scheduler; returns the states asked about, their x0 and the end."""
    x, states, clean, size = start, [], [], []
    times = list(scheduler.timesteps)
    for i, t in enumerate(times):
        asked = scheduler.scale_model_input(x, t)
        output = answer(asked, t)
        if learned:
            output = torch.cat([output, variance_of(asked, t)], 1)
        if type(scheduler).__name__ == "UnCLIPScheduler":
            options["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        result = scheduler.step(output, t, x, **options)
        states.append(asked)
        size.append(x.abs().max().item())
        clean.append(getattr(result, "pred_original_sample", None))
        x = result.prev_sample
    return SimpleNamespace(states=states, clean=clean, end=x, size=size)


def ours(sampler, times, schedule, target, start=NOISE, learned=False, **options):
    """The same walk with one of our samplers."""
    states, clean = [], []

    def denoise(x, t):
        x_0 = diffusion.to_x0(network(x, t), x, t, schedule, target)
        return (x_0, variance_of(x, t)) if learned else x_0

    def keep(i, t, x, x_0):
        states.append(x)
        clean.append(x_0)

    end = sampler(denoise, start, times, schedule, callback=keep, **options)
    return SimpleNamespace(states=states, clean=clean, end=end)


def distance(a, b, rounded=False):
    """The greatest difference on the whole way, as a share of the greatest value there.

    With ``rounded``, where their y is float32, four roundings of the greatest y so far are free: a
    step of y from sigma = 157 to 1 subtracts numbers of size 157, which are known to 1e-5 only.
    """
    assert len(a.states) == len(b.states), (len(a.states), len(b.states))
    worst, free = 0.0, 0.0
    sizes = [0.0, *b.size] if rounded else [0.0] * (len(b.states) + 1)
    for one, two, size in zip([*a.states, a.end], [*b.states, b.end], sizes, strict=True):
        free = max(free, 4 * 2**-23 * size)
        error = (one - two).abs().max().item() - free
        worst = max(worst, error / max(1.0, two.abs().max().item()))
    assert all(x.isfinite().all() for x in a.states)
    return worst


def seeded(seed=4):
    return torch.Generator().manual_seed(seed)


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", CONFIGS)
def test_tables_are_theirs_up_to_their_float32(build, table):
    scheduler, schedule = build("DDPM", table, exact=False)
    # betas: ours rounded to float32 are theirs, at most three units in the last place away
    rounded = schedule.betas.float().view(torch.int32)
    assert (rounded - scheduler.betas.view(torch.int32)).abs().max() <= 3
    if table == "cosine":
        assert torch.equal(schedule.betas.float(), scheduler.betas), "bit for bit"
    # abar: a product of T float32 factors; absolute error under 1e-6
    error = (schedule.alphas_cumprod - scheduler.alphas_cumprod.double()).abs()
    assert error.max() < 1e-6
    assert (error / schedule.alphas_cumprod).max() < (2e-5 if table == "cosine" else 2e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("table", CONFIGS)
def test_tables_are_theirs_in_float64(build, wide, table, zero_snr):
    scheduler, schedule = build("DDPM", table, exact=False, rescale_betas_zero_snr=zero_snr)
    schedule = schedule.rescale_zero_snr() if zero_snr else schedule
    assert scheduler.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.betas, scheduler.betas, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-10, atol=1e-25
    )


def test_from_config_reads_what_they_save(build, tmp_path):
    for i, (name, table, config) in enumerate(
        [
            ("DDPM", "linear", {}),
            ("DDIM", "scaled", {"steps_offset": 1, "set_alpha_to_one": False}),
            ("EulerDiscrete", "cosine", {}),
            ("HeunDiscrete", "short", {}),
            ("DPMSolverMultistep", "scaled", {}),
            ("UnCLIP", "cosine", {}),
        ]
    ):
        scheduler, schedule = build(name, table, exact=False, **config)
        scheduler.save_pretrained(tmp_path / str(i))
        read = Schedule.from_config(tmp_path / str(i))
        assert torch.equal(read.betas, schedule.betas), name
    scheduler, schedule = build("DDIM", "scaled", exact=False, rescale_betas_zero_snr=True)
    scheduler.save_pretrained(tmp_path)
    assert Schedule.from_config(tmp_path).alphas_cumprod[-1] == 0


def test_default_betas_of_each_scheduler_are_theirs():
    from companion.schedule import DEFAULTS

    known = {f"{name}Scheduler": file for name, file in FILES.items()}
    for name, (kind, start, end) in DEFAULTS.items():
        if name in known:
            module = importlib.import_module(f"diffusers.schedulers.scheduling_{known[name]}")
            given = inspect.signature(getattr(module, name).__init__).parameters
            assert given["beta_schedule"].default == kind, name
            if "beta_start" in given:
                assert (given["beta_start"].default, given["beta_end"].default) == (start, end)


@tables
def test_add_noise_and_velocity(build, table):
    scheduler, schedule = build("DDPM", table)
    x0, noise = NOISE, NOISE.flip(0)
    t = torch.tensor([0, 500, 999])
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t), rtol=1e-12, atol=1e-12)
    v = diffusion.target_for(x0, noise, t, schedule, "v_prediction")
    torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, t), rtol=1e-12, atol=1e-12)


def test_min_snr_weights_are_those_of_their_training_scripts(build):
    """train_text_to_image.py: min(SNR, gamma) / SNR, or / (SNR + 1) for v."""
    scheduler, schedule = build("DDPM", "scaled")
    t = torch.arange(1000)
    signal = scheduler.alphas_cumprod[t] ** 0.5  # as in their compute_snr, slow to import
    snr = (signal / (1 - scheduler.alphas_cumprod[t]) ** 0.5) ** 2
    least = torch.stack([snr, 5.0 * torch.ones_like(snr)], 1).min(1)[0]
    for target, weight in {"epsilon": least / snr, "v_prediction": least / (snr + 1)}.items():
        ours = diffusion.min_snr_weight(t, schedule, target, 5.0)
        torch.testing.assert_close(ours, weight.double(), rtol=1e-5, atol=0)


# --- timesteps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("table", ["linear", "short"])
@pytest.mark.parametrize("name", OURS)
def test_timesteps(build, name, table, spacing, offset):
    compared = 0
    for n in (2, 3, 5, 7, 10, 16, 20, 25, 27, 48, 49, 50, 61, 100, 250, 333, 999):
        config = {"timestep_spacing": spacing, "steps_offset": offset}
        scheduler, schedule = build(OURS[name], table, **config)
        if n >= len(schedule):
            continue
        scheduler.set_timesteps(n)
        listed = scheduler.timesteps
        if name == "heun":  # each timestep but the first is listed twice
            assert len(listed) == 2 * len(listed[::2]) - 1
            listed = torch.cat([listed[:1], listed[1::2]])
        if len(listed) != n:
            assert spacing == "trailing" and listed[-1] == -1  # see the next test
            listed = listed[:n]
        if listed[0] >= len(schedule):  # theirs runs off the table; ours says so
            with pytest.raises(ValueError, match="do not fit"):
                samplers.timesteps(name, n, schedule, spacing, offset)
            continue
        t = samplers.timesteps(name, n, schedule, spacing, offset)
        assert t.dtype == (torch.float32 if name in ("euler", "heun") else torch.int64)
        assert torch.equal(t.double(), listed.double()), (n, t, listed)
        compared += 1
    assert compared >= 8


def test_quirk_a_timestep_too_many(build):
    """Trailing with 61 steps lists 62 timesteps in diffusers; the last is -1, read as row 999."""
    scheduler, schedule = build("DDIM", "linear", timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 62 and scheduler.timesteps[-1] == -1
    assert samplers.timesteps("ddim", 61, schedule, "trailing")[-1] == 15
    affected = [n for n in range(1, 1001) if len(np.arange(1000, 0, -1000 / n)) != n]
    assert len(affected) == 62


@pytest.mark.parametrize("n", [2, 5, 20])
@pytest.mark.parametrize("table", ["linear", "scaled", "cosine"])
@pytest.mark.parametrize(
    ("option", "rho"), [("use_karras_sigmas", 7.0), ("use_exponential_sigmas", math.inf)]
)
def test_timesteps_spaced_by_noise(build, wide, option, rho, table, n):
    """The same levels. Their timesteps differ a little: they interpolate log sigma between rows."""
    scheduler, schedule = build("EulerDiscrete", table, **{option: True})
    scheduler.set_timesteps(n)
    t = samplers.edm_timesteps(n, schedule, rho)
    sigma = (-schedule.log_snr(t) / 2).exp()
    torch.testing.assert_close(sigma, scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)
    apart = (t - scheduler.timesteps.double()).abs().max()
    assert apart < (1 if table == "cosine" else 0.1)  # at most between two rows


def test_default_spacing_is_theirs(build):
    for name, stock in OURS.items():
        scheduler, schedule = build(stock, "linear")
        scheduler.set_timesteps(10)
        first = scheduler.timesteps[0].item()
        assert samplers.timesteps(name, 10, schedule)[0].item() == first


def test_karlo_timesteps_are_linspace(build):
    scheduler, schedule = build("UnCLIP", "cosine")
    for n in range(2, 1001):
        scheduler.set_timesteps(n)
        assert torch.equal(samplers.timesteps("ddpm", n, schedule, "linspace"), scheduler.timesteps)


# --- DDPM and UnCLIP -----------------------------------------------------------------------------


def compare_ddpm(
    build,
    table,
    target,
    n,
    spacing="leading",
    clip=None,
    variance="fixed_small",
    offset=0,
    lib=None,
):
    learned = variance == "learned_range"
    scheduler, schedule = build(
        "DDPM",
        table,
        prediction_type=target,
        timestep_spacing=spacing,
        steps_offset=offset,
        variance_type=variance,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    scheduler.set_timesteps(n)
    lib = lib or samplers
    t = lib.timesteps("ddpm", n, schedule, spacing, offset)
    one = ours(
        lib.ddpm,
        t,
        schedule,
        target,
        learned=learned,
        generator=seeded(),
        variance=variance,
        clip=clip,
    )
    return one, theirs(scheduler, learned=learned, generator=seeded())


@pytest.mark.parametrize("n", [2, 5, 27])
@pytest.mark.parametrize("spacing", SPACINGS)
@targets
@tables
def test_ddpm(build, table, target, spacing, n):
    assert distance(*compare_ddpm(build, table, target, n, spacing)) < 1e-9


@targets
def test_ddpm_every_row(build, target):
    assert distance(*compare_ddpm(build, "short", target, 50)) < 1e-9


@pytest.mark.slow  # two thousand evaluations
def test_all_thousand_rows(build):
    assert distance(*compare_ddpm(build, "scaled", "epsilon", 1000, clip=2.0)) < 1e-9
    assert distance(*compare_unclip(build, "epsilon", 1000, "learned_range", 1.0)) < 1e-9


@pytest.mark.parametrize("clip", [1.0, 0.4])
@pytest.mark.parametrize("offset", [0, 1])
@targets
def test_ddpm_clip_and_offset(build, target, clip, offset):
    one, two = compare_ddpm(build, "cosine", target, 10, clip=clip, offset=offset)
    assert distance(one, two) < 1e-9
    for mine, stock in zip(one.clean, two.clean, strict=True):
        assert mine.abs().max() <= clip
        torch.testing.assert_close(mine, stock, rtol=1e-9, atol=1e-9)
    assert one.clean[0].abs().max() == clip, "something was clipped"


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("variance", samplers.VARIANCES)
@targets
def test_ddpm_variances(build, target, variance, spacing):
    assert distance(*compare_ddpm(build, "scaled", target, 12, spacing, 1.0, variance)) < 1e-9


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_quirk_ddpm_noise_on_the_finished_picture(build, variance):
    """Where the last timestep is not 0 (trailing, or an offset), diffusers' last step goes to the
    clean picture and then adds noise all the same. Ours adds none."""
    one, two = compare_ddpm(build, "linear", "sample", 10, "trailing", variance=variance)
    for mine, stock in zip(one.states, two.states, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-9, atol=1e-9)
    added = two.end - one.end
    assert added.abs().max() > 0.01
    if variance == "fixed_large":
        noises = seeded()
        noise = [torch.randn(3, 2, 3, 3, generator=noises, dtype=torch.float64) for _ in range(10)]
        beta = 1 - CONFIGS["linear"][0].alphas_cumprod[99]
        torch.testing.assert_close(added, beta.sqrt() * noise[-1], rtol=1e-7, atol=1e-9)


def test_ddpm_from_zero_snr(build):
    schedule = CONFIGS["scaled"][0].rescale_zero_snr()
    for target in ("sample", "v_prediction"):
        config = {"clip_sample": False, "timestep_spacing": "trailing"}
        scheduler, _ = build("DDPM", "scaled", prediction_type=target, **config)
        scheduler.alphas_cumprod = schedule.alphas_cumprod.clone()
        scheduler.set_timesteps(10)
        t = samplers.timesteps("ddpm", 10, schedule, "trailing")
        one = ours(samplers.ddpm, t, schedule, target, generator=seeded())
        assert distance(one, theirs(scheduler, generator=seeded())) < 1e-9


def compare_unclip(build, target, n, variance, clip, lib=None):
    learned = variance == "learned_range"
    scheduler, schedule = build(
        "UnCLIP",
        "cosine",
        prediction_type=target,
        variance_type=variance,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    scheduler.set_timesteps(n)
    lib = lib or samplers
    t = lib.timesteps("ddpm", n, schedule, "linspace")
    options = {"generator": seeded(), "variance": variance, "clip": clip}
    one = ours(lib.ddpm, t, schedule, target, learned=learned, **options)
    return one, theirs(scheduler, learned=learned, generator=seeded())


@pytest.mark.parametrize("clip", [None, 1.0, 2.5])
@pytest.mark.parametrize("variance", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("n", [2, 7, 25])
@pytest.mark.parametrize("target", ["epsilon", "sample"])
def test_unclip(build, target, n, variance, clip):
    assert distance(*compare_unclip(build, target, n, variance, clip)) < 1e-9


def test_quirk_unclip_needs_two_steps(build):
    scheduler, schedule = build("UnCLIP", "cosine")
    with pytest.raises(ZeroDivisionError):
        scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="would start at t = 0"):
        samplers.timesteps("ddpm", 1, schedule, "linspace")


# --- DDIM ----------------------------------------------------------------------------------------


def compare_ddim(
    build, table, target, n, spacing="leading", eta=0.0, clip=None, rederive=True, to_one=True,
    offset=0, lib=None,
):  # fmt: skip
    scheduler, schedule = build(
        "DDIM",
        table,
        prediction_type=target,
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=to_one,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    scheduler.set_timesteps(n)
    lib = lib or samplers
    t = lib.timesteps("ddim", n, schedule, spacing, offset)
    one = ours(
        lib.ddim,
        t,
        schedule,
        target,
        generator=seeded(),
        eta=eta,
        clip=clip,
        rederive=rederive,
        final_alpha_cumprod=None if to_one else schedule.alphas_cumprod[0].item(),
    )
    two = theirs(scheduler, eta=eta, generator=seeded(), use_clipped_model_output=rederive)
    return one, two


AGREES = [("leading", n) for n in (2, 7, 27)] + [("trailing", 8), ("trailing", 25)]


@pytest.mark.parametrize(("spacing", "n"), AGREES)
@targets
@tables
def test_ddim(build, table, target, spacing, n):
    assert distance(*compare_ddim(build, table, target, n, spacing)) < 1e-9


@pytest.mark.parametrize("spacing", SPACINGS)
@targets
def test_ddim_every_row(build, target, spacing):
    """With as many steps as rows, all three spacings are the same grid, and it is followed."""
    one, two = compare_ddim(build, "short", target, 50, spacing)
    assert len(one.states) == 50 and distance(one, two) < 1e-9


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@targets
def test_ddim_eta_offset_and_end(build, target, eta, to_one, offset):
    options = {"eta": eta, "to_one": to_one, "offset": offset}
    assert distance(*compare_ddim(build, "scaled", target, 12, **options)) < 1e-9


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("rederive", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.4])
@targets
def test_ddim_clip(build, target, clip, rederive, eta):
    one, two = compare_ddim(build, "cosine", target, 10, clip=clip, rederive=rederive, eta=eta)
    assert distance(one, two) < 1e-9
    assert one.clean[0].abs().max() == clip, "something was clipped"
    other, _ = compare_ddim(build, "cosine", target, 10, clip=clip, rederive=not rederive, eta=eta)
    assert distance(other, two) > 1e-3, "the two ways of clipping differ"


@pytest.mark.parametrize(("spacing", "n"), [("linspace", 10), ("trailing", 7), ("trailing", 27)])
def test_quirk_ddim_leaves_its_own_grid(build, spacing, n):
    """diffusers' DDIM steps to t - T // n whatever it lists next. One step of ours to that very
    level is its step exactly; along the listed timesteps the two walks part."""
    one, two = compare_ddim(build, "linear", "epsilon", n, spacing)
    assert distance(one, two) > 1e-3
    schedule = CONFIGS["linear"][0]
    t = samplers.timesteps("ddim", n, schedule, spacing)
    reached = t - 1000 // n
    assert (reached[:-1] != t[1:]).any()
    after = [*two.states[1:], two.end]
    for i in range(n):
        final = schedule.alphas_cumprod[reached[i]].item() if reached[i] >= 0 else None
        step = ours(
            samplers.ddim,
            t[i : i + 1],
            schedule,
            "epsilon",
            two.states[i],
            final_alpha_cumprod=final,
        )
        torch.testing.assert_close(step.end, after[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [7, 20])
@pytest.mark.parametrize("to_one", [True, False])
@tables
def test_ddim_inversion(build, table, to_one, n):
    scheduler, schedule = build("DDIMInverse", table, set_alpha_to_one=to_one, clip_sample=False)
    scheduler.set_timesteps(n)
    if not to_one:
        scheduler.initial_alpha_cumprod = schedule.alphas_cumprod[0]
    two = theirs(scheduler)
    t = samplers.timesteps("ddim", n, schedule)
    assert torch.equal(t.flip(0), scheduler.timesteps)
    final = None if to_one else schedule.alphas_cumprod[0].item()
    one = ours(samplers.ddim_invert, t, schedule, "epsilon", final_alpha_cumprod=final)
    reached = SimpleNamespace(states=[*two.states[1:], two.end], end=two.end)
    assert distance(one, reached) < 1e-9


# --- Euler, Heun, DPM-Solver++ -------------------------------------------------------------------


def compare_ode(
    build, name, table, target, n, spacing, offset=0, clip=None, end="zero", exact=True, lib=None
):
    """Both sides start from the same state; theirs keeps it as y = x / sqrt(abar)."""
    config = {
        "prediction_type": target,
        "timestep_spacing": spacing,
        "steps_offset": offset,
    }
    if name == "heun":
        config |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    else:
        config |= {"final_sigmas_type": end}
    scheduler, schedule = build(OURS[name], table, exact=exact, **config)
    scheduler.set_timesteps(n)
    listed = scheduler.timesteps
    t = torch.cat([listed[:1], listed[1::2]]) if name == "heun" else listed
    scale = 1.0 if name == "dpmpp_2m" else schedule.signal(t[0].item()).item()
    two = theirs(scheduler, start=NOISE / scale)
    if name == "heun":  # asked twice a step; the states that begin one
        two.states, two.clean, two.size = two.states[::2], two.clean[::2], two.size[::2]
    options = {"clip": clip}
    if end == "sigma_min":
        options["final_alpha_cumprod"] = schedule.alphas_cumprod[0].item()
        if name == "euler":
            two.end = two.end * schedule.signal(0).item()  # theirs is still y there
    if name == "dpmpp_2m":
        options["lower_order_final"] = n < 15
    one = ours(getattr(lib or samplers, name), t, schedule, target, **options)
    return one, two


ode = pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
COUNTS = [2, 3, 10, 27]


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
@targets
@tables
@ode
def test_ode_samplers_in_float64(build, wide, name, table, target, spacing, n):
    assert distance(*compare_ode(build, name, table, target, n, spacing)) < 1e-9


def too_steep(name, table, spacing, n):
    """Would the float32 sigmas of the stock Heun scheduler alone show in its first step?

    Heun's second slope is divided by the sigma it arrives at, so a rounding of sigma, about
    1e-7 sigma, reaches y as 1e-7 sigma^2 / sigma_next.
    """
    if name != "heun":
        return False
    schedule = CONFIGS[table][0]
    first, second = schedule.sigmas[samplers.timesteps("heun", n, schedule, spacing).long()[:2]]
    return bool(1e-7 * first**2 / second > 2e-4)


WALKS = [
    (name, table, spacing, n)
    for name in ("euler", "heun", "dpmpp_2m")
    for table in ("linear", "scaled", "cosine")
    for spacing in SPACINGS
    for n in COUNTS
]
STEEP = [walk for walk in WALKS if too_steep(*walk)]


@pytest.mark.parametrize(
    ("name", "table", "spacing", "n"), [walk for walk in WALKS if walk not in STEEP]
)
@targets
def test_ode_samplers_as_they_stand(build, name, table, target, spacing, n):
    """Their sigmas and, in Euler and DPM-Solver++, their states are float32."""
    one, two = compare_ode(build, name, table, target, n, spacing)
    assert distance(one, two, rounded=True) < 1e-5
    if table == "scaled" and n > 2:  # sigma starts at 14.6 only
        assert distance(one, two) < 1e-5


def test_quirk_heun_in_float32_on_steep_tables(build, wide, monkeypatch):
    """From the cosine table's last row (sigma = 20291) the stock Heun scheduler's float32 sigmas
    alone move the finished picture visibly, though its states are float64 here."""
    one, exact = compare_ode(build, "heun", "cosine", "sample", 10, "trailing")
    assert distance(one, exact) < 1e-9
    monkeypatch.undo()
    one, rounded = compare_ode(build, "heun", "cosine", "sample", 10, "trailing")
    lost = (rounded.end - one.end).abs().max().item()
    print(f"moved by {lost:.2g}")
    assert lost > 1e-3
    assert len(STEEP) == 13
    assert all(table == "cosine" or n <= 3 for _, table, _, n in STEEP), STEEP


def test_quirk_euler_loses_digits_where_sigma_is_large(build, wide, monkeypatch):
    """The cosine table ends at sigma = 20291. There y holds the picture plus noise of that size, so
    in float32 the picture is only known to about 0.001. DDIM's x never grows."""
    one, exact = compare_ode(build, "euler", "cosine", "sample", 3, "trailing")
    assert distance(one, exact) < 1e-9
    monkeypatch.undo()
    one, rounded = compare_ode(build, "euler", "cosine", "sample", 3, "trailing")
    lost = (rounded.states[1] - one.states[1]).abs().max().item()
    assert 1e-5 < lost < 1e-2


@pytest.mark.parametrize("table", ["linear", "scaled"])
@ode
def test_ode_samplers_with_nothing_of_ours_inside(build, name, table):
    """The stock scheduler keeps its own float32 table of abar as well."""
    one, two = compare_ode(build, name, table, "v_prediction", 12, "trailing", exact=False)
    assert distance(one, two) < 1e-5


@pytest.mark.parametrize("offset", [0, 1, 3])
@ode
def test_ode_samplers_with_an_offset(build, wide, name, offset):
    one, two = compare_ode(build, name, "scaled", "epsilon", 12, "leading", offset)
    assert distance(one, two) < 1e-9


@pytest.mark.parametrize("n", [1, 2, 14, 15, 40])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_ode_samplers_that_stop_before_the_end(build, wide, name, n):
    """final_sigmas_type="sigma_min"; DPM-Solver++'s last step is first order below 15 steps."""
    one, two = compare_ode(build, name, "linear", "epsilon", n, "trailing", end="sigma_min")
    assert distance(one, two) < 1e-9


@pytest.mark.parametrize("clip", [1.0, 0.4])
@targets
def test_heun_clip(build, wide, target, clip):
    one, two = compare_ode(build, "heun", "cosine", target, 10, "linspace", clip=clip)
    assert distance(one, two) < 1e-9
    assert one.clean[0].abs().max() == clip, "something was clipped"
    for mine, stock in zip(one.clean, two.clean, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-9, atol=1e-9)


def test_heun_counts(build):
    scheduler, schedule = build("HeunDiscrete", "linear")
    for n in (2, 9):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == samplers.evaluations("heun", n) == 2 * n - 1


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_quirk_how_they_scale_the_start(build, wide, name, spacing):
    """diffusers multiplies noise by sigma (linspace, trailing) or sqrt(sigma^2 + 1) (leading). Only
    the second is x_T / sqrt(abar), the state that DDIM starts from; the first is that of x_T times
    sqrt(1 - abar), a little less noise: 0.23 % less for Stable Diffusion's table."""
    scheduler, schedule = build(OURS[name], "scaled", timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    t = scheduler.timesteps[0].item()
    stock = float(scheduler.init_noise_sigma) * schedule.signal(t).item()
    want = 1.0 if spacing == "leading" else schedule.noise(t).item()
    assert stock == pytest.approx(want, rel=1e-9)
    if spacing != "leading":
        assert 0.0020 < 1 - want < 0.0025


def test_quirk_euler_has_timesteps_between_the_rows(build):
    scheduler, schedule = build("EulerDiscrete", "linear")
    scheduler.set_timesteps(10)
    t = samplers.timesteps("euler", 10, schedule)
    assert t[1].item() == 888.0 and samplers.timesteps("euler", 11, schedule)[1] % 1 > 0.09
    dpm = samplers.timesteps("dpmpp_2m", 10, schedule, "leading")
    assert dpm[:2].tolist() == [900, 810]
    assert samplers.timesteps("ddim", 10, schedule, "leading")[:2].tolist() == [900, 800]


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep"])
def test_quirk_zero_snr_is_not_quite_zero(build, name):
    """At zero SNR sigma is infinite; diffusers puts abar = 2^-24 there. Ours refuses instead."""
    scheduler, _ = build(name, "scaled", exact=False, rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 2**-24
    ddim, _ = build("DDIM", "scaled", exact=False, rescale_betas_zero_snr=True)
    assert ddim.alphas_cumprod[-1] == 0


# --- planted faults: the comparisons above must see them -----------------------------------------

SLOPE = "slope = (y - x_0) / _sigma((abar + abar_next) / 2)"
SQUARED = "h = 2 * log(_sigma(abar)) -"
FAULTS = {  # the line, what it becomes, which comparison must see it
    "ddpm: a sign": ("of_x_0 * x_0 + of_x * x", "of_x_0 * x_0 - of_x * x", "ddpm"),
    "ddpm: variance for deviation": ("std = sqrt(beta if", "std = (lambda v: v)(beta if", "ddpm"),
    "ddpm: beta for the posterior's": ("else small)", "else beta)", "ddpm"),
    "ddpm: abar of the wrong end": ("sqrt(abar_next) * beta", "sqrt(abar) * beta", "ddpm"),
    "ddpm: small for large": ('beta if variance == "fixed_large"', "small if variance", "large"),
    "unclip: fraction upside down": ("(fraction + 1) / 2", "(1 - fraction) / 2", "unclip"),
    "unclip: variance for deviation": ("(0.5 * (share", "(1.0 * (share", "unclip"),
    "abar off by one": ("alpha_bar(timesteps)", "alpha_bar((timesteps - 1).clamp(min=0))", "all"),
    "the far end off by a little": ("levels[i + 1]", "levels[i + 1] * 0.999", "all"),
    "a swapped spacing": ('spacing == "linspace"', 'spacing == "trailing"', "trailing"),
    "the offset forgotten": ("+ steps_offset\n", "\n", "offset"),
    "ddim: a sign": ("- sigma**2) * noise", "- sigma**2) * -noise", "ddim"),
    "ddim: sigma for sigma squared": ("- sigma**2)", "- sigma)", "ddim"),
    "ddim: eta squared": ("sigma = eta *", "sigma = eta**2 *", "ddim"),
    "ddim: ends at row 0": ("final = 1.0 if", "final = schedule.alphas_cumprod[0] if", "ddim"),
    "ddim: noise of the answer": ("(x_0 if rederive else answer)", "answer", "rederive"),
    "euler: slope for the far sigma": ("slope = (y - x_0) / _sigma(abar)", SLOPE, "euler"),
    "euler: start not scaled": ("y = x_T / sqrt(abar) if", "y = x_T if", "euler"),
    "heun: first slope alone": ("_sigma(abar_next)) / 2", "_sigma(abar_next)) * 0 + slope", "heun"),
    "heun: seen at the wrong level": ("sqrt(abar_next) * there", "sqrt(abar) * there", "heun"),
    "dpm++: 1 / r for 1 / (2 r)": ("(2 * r)", "r", "dpmpp_2m"),
    "dpm++: r upside down": ("r = h_before / h", "r = h / h_before", "dpmpp_2m"),
    "dpm++: a sign": ("x_0 + (x_0 - before)", "x_0 - (x_0 - before)", "dpmpp_2m"),
    "dpm++: lambda of sigma squared": ("h = log(_sigma(abar)) -", SQUARED, "dpmpp_2m"),
    "clipping forgotten": ("x_0.clamp(-clip, clip)", "x_0", "clip"),
}


def mutant(old, new):
    """Our samplers with one line changed."""
    source = inspect.getsource(samplers)
    assert old in source, f"the line to break is gone: {old}"
    source = source.replace(old, new)
    module = types.ModuleType("broken_samplers")
    exec(compile(source, "broken_samplers", "exec"), module.__dict__)
    return module


def suspects(build, lib):
    """A few comparisons of every kind, each by name."""
    use = {"lib": lib}
    yield "ddpm", lambda: compare_ddpm(build, "scaled", "epsilon", 10, **use)
    yield "ddpm", lambda: compare_ddpm(build, "cosine", "sample", 10, "linspace", **use)
    yield "trailing", lambda: compare_ddpm(build, "linear", "sample", 10, "trailing", **use)
    yield "large", lambda: compare_ddpm(build, "scaled", "sample", 9, variance="fixed_large", **use)
    yield "clip", lambda: compare_ddpm(build, "scaled", "sample", 10, clip=0.4, **use)
    yield "offset", lambda: compare_ddpm(build, "scaled", "sample", 10, offset=1, **use)
    yield "unclip", lambda: compare_unclip(build, "sample", 10, "learned_range", 1.0, **use)
    yield "ddim", lambda: compare_ddim(build, "scaled", "epsilon", 10, eta=0.5, **use)
    yield "ddim", lambda: compare_ddim(build, "linear", "sample", 10, "trailing", 0.5, **use)
    yield "rederive", lambda: compare_ddim(build, "linear", "sample", 10, clip=0.4, **use)
    for name in ("euler", "heun", "dpmpp_2m"):
        for table in ("linear", "scaled"):
            ode = (build, name, table, "sample", 10, "trailing")
            yield name, lambda ode=ode: compare_ode(*ode, **use)


def seen(build, lib, kind):
    """The distance that each comparison of this kind finds; an error counts as found."""
    found = []
    for name, compare in suspects(build, lib):
        if kind in (name, "all"):
            try:
                found.append(distance(*compare()))
            except (ValueError, AssertionError, ZeroDivisionError):
                found.append(float("inf"))
    return found


def test_without_a_fault_nothing_is_seen(build, wide):
    assert max(seen(build, mutant("import torch", "import torch"), "all")) < 1e-9


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(build, wide, fault):
    old, new, kind = FAULTS[fault]
    found = seen(build, mutant(old, new), kind)
    assert found and min(found) > 1e-4, "by every comparison of its kind"
