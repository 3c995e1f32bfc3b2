"""Samplers against exact solutions: where they end, how fast they get there, what they promise."""

import inspect
import math

import numpy as np
import pytest
import torch

from companion import diffusion, samplers
from companion.diffusion import GaussianMixture
from companion.samplers import SAMPLERS, ddim, ddim_invert, ddpm, euler, timesteps
from companion.schedule import Schedule

LINEAR, COSINE, LATENT = Schedule.linear(), Schedule.cosine(), Schedule.scaled_linear()
ZERO = Schedule.scaled_linear().rescale_zero_snr()
ODE = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}  # order of convergence
CLOUDS = GaussianMixture(
    torch.tensor([[-1.0], [0.3], [0.9]], dtype=torch.float64),
    torch.tensor([0.25, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([0.4, 0.25, 0.35], dtype=torch.float64),
)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=g(seed), dtype=dtype)


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def exact(schedule):
    return lambda x, t: CLOUDS.denoise(x, t, schedule)


def wavy(x, t):
    """A denoiser that is nobody's ideal, to compare samplers with each other."""
    return torch.tanh(x.flip(1) + torch.sin(t / 80).view(-1, 1)) + 0.1 * x.cos()


def run(name, denoise, x, t, schedule, **options):
    random = {"generator": g(5)} if name == "ddpm" else {}
    return SAMPLERS[name](denoise, x, t, schedule, **random, **options)


# --- convergence ---------------------------------------------------------------------------------


def errors_of(name, schedule, counts, t_start, t_end):
    """Greatest distance from the exact end point, for even steps in the logarithm of the SNR."""
    starts = torch.linspace(-2.2, 2.2, 41, dtype=torch.float64)[:, None]
    want = CLOUDS.flow(starts, t_start, t_end, schedule)
    ends = schedule.log_snr(torch.tensor([t_start, t_end], dtype=torch.float64)).tolist()
    found = []
    for n in counts:
        grid = schedule.t_of_log_snr(torch.linspace(*ends, n + 1, dtype=torch.float64))
        final = schedule.alpha_bar(grid[-1]).item()
        x = SAMPLERS[name](exact(schedule), starts, grid[:-1], schedule, final_alpha_cumprod=final)
        found.append((x - want).abs().max().item())
    return np.array(found)


@pytest.mark.parametrize("schedule", [LINEAR, LATENT], ids=["linear", "scaled_linear"])
@pytest.mark.parametrize("name", ODE)
def test_order_of_convergence(name, schedule, record_property):
    counts = np.array([32, 64, 128, 256])
    found = errors_of(name, schedule, counts, 950.0, 20.0)
    order = -np.polyfit(np.log(counts), np.log(found), 1)[0]
    print(f"{name}: errors {found}, order {order:.2f}")
    record_property("order", order)
    assert abs(order - ODE[name]) < 0.2, (order, found)
    assert found[-1] < (2e-2 if ODE[name] == 1 else 2e-3)


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_ode_sampler_ends_in_the_exact_place(name, spacing):
    """All the way to the clean picture, on the grids that readers use."""
    found = []
    for n in (25, 100, 499):
        t = timesteps(name, n, LINEAR, spacing)
        start = rand(30, 1)
        want = CLOUDS.flow(start, t[0].item(), None, LINEAR)
        found.append((run(name, exact(LINEAR), start, t, LINEAR) - want).abs().max().item())
    assert found[0] > found[1] > found[2] and found[2] < 0.012, found


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        pytest.param("ddpm", {"variance": "fixed_small"}, 1000, marks=pytest.mark.slow),
        pytest.param("ddpm", {"variance": "fixed_large"}, 1000, marks=pytest.mark.slow),
        ("ddpm", {"variance": "fixed_small"}, 250),
        pytest.param("ddim", {"eta": 1.0}, 1000, marks=pytest.mark.slow),
        ("ddim", {"eta": 0.5}, 250),
        ("ddim", {}, 250),
        ("euler", {}, 250),
        ("heun", {}, 100),
        ("dpmpp_2m", {}, 100),
    ],
)
def test_samples_have_the_right_distribution(name, options, steps):
    n = 4000
    t = timesteps(name, steps, LINEAR, "trailing")
    random = {"generator": g(1)} if name == "ddpm" or options.get("eta") else {}
    x = SAMPLERS[name](exact(LINEAR), rand(n, 1), t, LINEAR, **random, **options)
    places = x.sort(0).values
    steps_up = (torch.arange(n) + 0.5) / n
    gap = (CLOUDS.cdf(places, None, LINEAR) - steps_up).abs().max().item()
    assert gap < 1.95 / math.sqrt(n), gap  # Kolmogorov-Smirnov, one in a thousand


# --- how they are related ------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [None, 0.6])
def test_euler_is_ddim(spacing, clip):
    t = timesteps("euler", 23, LATENT, spacing)
    x = rand(3, 4)
    close(euler(wavy, x, t, LATENT, clip=clip), ddim(wavy, x, t, LATENT, clip=clip))


@pytest.mark.parametrize("final", [None, 0.97])
@pytest.mark.parametrize("clip", [None, 0.6])
def test_ddim_with_eta_1_is_ddpm(clip, final):
    t = timesteps("ddim", 23, COSINE, "trailing")[:-3]
    x, options = rand(3, 4), {"clip": clip, "final_alpha_cumprod": final}
    one = ddim(wavy, x, t, COSINE, eta=1.0, generator=g(3), **options)
    two = ddpm(wavy, x, t, COSINE, generator=g(3), **options)
    close(one, two)
    assert not torch.equal(one, ddim(wavy, x, t, COSINE, eta=0.5, generator=g(3), **options))


def test_variances_of_ddpm():
    """One step with the denoiser's mean taken off leaves noise of the promised size."""
    t, last, n = torch.tensor([500, 300]), 300, 100_000
    abar, after = LINEAR.alpha_bar(t).tolist()
    beta = 1 - abar / after
    want = {
        "fixed_small": (1 - after) / (1 - abar) * beta,
        "fixed_large": beta,
        "learned_range": math.exp(
            0.75 * math.log(beta) + 0.25 * math.log((1 - after) / (1 - abar) * beta)
        ),
    }
    want["fixed_small_log"] = want["fixed_small"]
    zero = torch.zeros(n, 1, dtype=torch.float64)
    answer = lambda x, t: (zero, zero + 0.5)  # noqa: E731
    for variance in samplers.VARIANCES:
        seen = {}
        options = {"generator": g(2), "variance": variance}
        keep = lambda i, t, x, x0, seen=seen: seen.update({t: x})  # noqa: E731
        ddpm(answer, zero, t, LINEAR, callback=keep, **options)
        assert seen[last].var().item() == pytest.approx(want[variance], rel=0.02), variance
        assert abs(seen[last].mean()) < 0.01


def test_a_certain_world_is_reached_in_any_number_of_steps():
    known = rand(2, 3, 4)
    for name in SAMPLERS:
        for n in (1, 2, 7):
            t = timesteps(name, n, LINEAR, "trailing")
            close(run(name, lambda x, t: known, rand(2, 3, 4, seed=1), t, LINEAR), known)


def test_ddim_is_exact_for_one_gaussian_in_the_limit_and_known_in_between():
    """For N(0, s^2) the ideal denoiser is linear and each DDIM step a known factor."""
    s, t = 0.5, torch.tensor([900, 500, 100])
    abar = [*LINEAR.alpha_bar(t).tolist(), 1.0]
    x, factor = rand(4, 1), 1.0
    for now, after in zip(abar, abar[1:], strict=False):
        gain = math.sqrt(now) * s**2 / (now * s**2 + 1 - now)  # E[x_0 | x] / x
        left = (1 - math.sqrt(now) * gain) / math.sqrt(1 - now)  # noise / x
        factor *= math.sqrt(after) * gain + math.sqrt(1 - after) * left

    def ideal(x, t):
        a = LINEAR.alpha_bar(t)
        return x * (a.sqrt() * s**2 / (a * s**2 + 1 - a)).view(-1, 1)

    close(ddim(ideal, x, t, LINEAR), factor * x)


def test_dpmpp_second_order_step_written_out():
    """Algorithm 2 of the paper in its own letters, three steps, against the code."""
    t = torch.tensor([900, 700, 450])
    end = LINEAR.alphas_cumprod[200].item()
    abar = torch.tensor([*LINEAR.alpha_bar(t).tolist(), end], dtype=torch.float64)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    lam = (alpha / sigma).log()
    x = rand(3, 4)
    states, answers = [x], []
    for i in range(3):
        answers.append(wavy(states[-1], t[i].expand(3)))
        h = lam[i + 1] - lam[i]
        D = answers[-1]
        if i:
            r = (lam[i] - lam[i - 1]) / h
            D = (1 + 1 / (2 * r)) * answers[-1] - 1 / (2 * r) * answers[-2]
        states.append(sigma[i + 1] / sigma[i] * states[-1] - alpha[i + 1] * torch.expm1(-h) * D)
    close(samplers.dpmpp_2m(wavy, x, t, LINEAR, final_alpha_cumprod=end), states[-1])
    low = samplers.dpmpp_2m(wavy, x, t, LINEAR, final_alpha_cumprod=end, lower_order_final=True)
    close(low, ddim(wavy, states[-2], t[2:], LINEAR, final_alpha_cumprod=end))


# --- inversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [None, LINEAR.alphas_cumprod[0].item()])
def test_inversion_comes_back(final):
    t = timesteps("ddim", 40, LINEAR)
    x_T, options = rand(30, 1), {"final_alpha_cumprod": final}
    x_0 = ddim(exact(LINEAR), x_T, t, LINEAR, **options)
    noise, again = [], []
    for n in (1, 4, 60):
        back = ddim_invert(exact(LINEAR), x_0, t, LINEAR, iterations=n, **options)
        noise.append((back - x_T).abs().max().item())
        again.append((ddim(exact(LINEAR), back, t, LINEAR, **options) - x_0).abs().max().item())
    assert noise[0] > 2 * noise[1] and noise[2] < 1e-6, noise
    assert again[0] > 2 * again[1] and again[2] < 1e-6, again


def test_inversion_finds_the_noise_behind_samples():
    """The exact flow says which noise belongs to a point; the error falls with the steps."""
    x_0 = torch.linspace(-1.3, 1.2, 30, dtype=torch.float64)[:, None]
    found = []
    for n in (50, 100, 200, 400):
        t = timesteps("ddim", n, LINEAR, "trailing")
        x_T = ddim_invert(exact(LINEAR), x_0, t, LINEAR)
        want = torch.special.ndtri(CLOUDS.cdf(x_0, None, LINEAR))[:, None]
        found.append((x_T - want).abs().max().item())
    assert found[0] > found[1] > found[2] > found[3] and found[3] < 0.1, found


# --- what they promise ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step(name):
    asked, seen = [], []

    def denoise(x, t):
        asked.append((x, t))
        return wavy(x, t)

    t = timesteps(name, 6, LINEAR, "trailing")
    x_T = rand(3, 4)
    end = run(name, denoise, x_T, t, LINEAR, callback=lambda *a: seen.append(a) or "ignored")
    assert len(asked) == samplers.evaluations(name, 6)
    assert [s[0] for s in seen] == list(range(6)) and [s[1] for s in seen] == t.tolist()
    close(seen[0][2], x_T)
    first = asked[::2] if name == "heun" else asked
    for (x, when), (_, at, state, x0) in zip(first, seen, strict=True):
        assert when.shape == (3,) and when.dtype == t.dtype and (when == at).all()
        close(x, state)
        close(wavy(x, when), x0)
    close(run(name, wavy, x_T, t, LINEAR), end)  # and it changes nothing


@pytest.mark.parametrize("name", SAMPLERS)
def test_types_and_inputs_are_kept(name):
    x = rand(3, 4, dtype=torch.float32)
    before = x.clone()
    out = run(name, wavy, x, timesteps(name, 6, LINEAR), LINEAR)
    assert out.dtype == torch.float32 and out.shape == x.shape
    assert torch.equal(x, before), "x_T is not written to"
    double = run(name, wavy, x.double(), timesteps(name, 6, LINEAR), LINEAR)
    if name != "ddpm":  # float32 noise is another draw than float64 noise
        close(out.double(), double, rtol=1e-3, atol=1e-4)
    listed = run(name, wavy, x, timesteps(name, 6, LINEAR).tolist(), LINEAR)
    close(listed, out, rtol=1e-4, atol=1e-5)


def test_doors_have_the_promised_signature():
    for name, sampler in SAMPLERS.items():
        given = inspect.signature(sampler).parameters
        assert list(given)[:4] == ["denoise", "x_T", "timesteps", "schedule"], name
        for keyword in ("generator", "callback", "clip", "final_alpha_cumprod"):
            assert given[keyword].kind == inspect.Parameter.KEYWORD_ONLY
            assert given[keyword].default is None


def test_randomness_is_an_argument():
    t = timesteps("ddpm", 5, LINEAR)
    x = rand(3, 4)
    state = torch.get_rng_state()
    one = ddpm(wavy, x, t, LINEAR, generator=g(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, ddpm(wavy, x, t, LINEAR, generator=g(1)))
    assert not torch.equal(one, ddpm(wavy, x, t, LINEAR, generator=g(2)))
    each = ddpm(wavy, x, t, LINEAR, generator=[g(1), g(2), g(3)])
    alone = ddpm(wavy, x[1:2], t, LINEAR, generator=[g(2)])
    close(each[1:2], alone)
    for call in (lambda: ddpm(wavy, x, t, LINEAR), lambda: ddim(wavy, x, t, LINEAR, eta=0.1)):
        with pytest.raises(TypeError, match="generator is missing"):
            call()


def test_zero_snr_starts_from_nothing():
    t = timesteps("ddim", 10, ZERO, "trailing")
    assert t[0] == 999 and ZERO.alphas_cumprod[999] == 0
    for name in ("ddim", "ddpm"):
        assert run(name, wavy, rand(3, 4), t, ZERO).isfinite().all()
    for name in ("euler", "heun", "dpmpp_2m"):
        with pytest.raises(ValueError, match="zero terminal SNR.*Use ddim or ddpm"):
            run(name, wavy, rand(3, 4), t, ZERO)


def test_gradients_are_off_unless_the_denoiser_turns_them_on():
    seen = []

    def denoise(x, t):
        seen.append(torch.is_grad_enabled())
        with torch.enable_grad():  # as classifier guidance does
            y = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(y.square().sum(), y)
        return slope / 2

    run("ddim", denoise, rand(2, 3).requires_grad_(), timesteps("ddim", 3, LINEAR), LINEAR)
    assert seen == [False] * 3


# --- bad arguments -------------------------------------------------------------------------------

X = torch.zeros(2, 3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_T": X.long()}, TypeError, "the start has dtype"),
        ({"x_T": X / 0}, ValueError, "the start has 6 of 6 values that are NaN"),
        ({"x_T": None}, TypeError, "the start is NoneType"),
        ({"timesteps": [1, 5]}, ValueError, r"timesteps are \[1, 5\]; expected a descending list"),
        ({"timesteps": [5, 5, 1]}, ValueError, "without repetitions"),
        (
            {"timesteps": [1000, 5]},
            ValueError,
            "t runs from 5 to 1000; expected values from 0 to 999",
        ),
        ({"timesteps": [5, -1]}, ValueError, "t runs from -1"),
        ({"timesteps": []}, ValueError, "timesteps has shape"),
        ({"timesteps": [[3, 1]]}, ValueError, "timesteps has shape"),
        ({"timesteps": [math.nan]}, ValueError, "NaN"),
        ({"final_alpha_cumprod": 0.2}, ValueError, "final_alpha_cumprod is 0.2; expected a level"),
        ({"final_alpha_cumprod": 1.2}, ValueError, "final_alpha_cumprod is 1.2"),
        ({"clip": -1.0}, ValueError, "clip is -1"),
        ({"clip": "yes"}, TypeError, "clip is 'yes'"),
    ],
)
def test_bad_arguments_are_named_before_any_work(name, changes, error, message):
    asked = []
    arguments = {"x_T": X, "timesteps": [900, 50], "schedule": LINEAR, **changes}
    with pytest.raises(error, match=message):
        SAMPLERS[name](lambda x, t: asked.append(x), **arguments, generator=g())
    assert not asked


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, t: x[:, :1], r"clean picture of shape \(2, 1\) for x of shape \(2, 3\)"),
        (lambda x, t: None, "clean picture of shape NoneType"),
        (lambda x, t: (x, x[:1]), "variance fraction of shape"),
    ],
)
def test_a_wrong_denoiser_is_named(name, answer, message):
    with pytest.raises(ValueError, match=message):
        run(name, answer, X, [900, 50], LINEAR)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="variance is 'fixed_medium'; expected one of"):
        ddpm(wavy, X, [5], LINEAR, generator=g(), variance="fixed_medium")
    with pytest.raises(ValueError, match="needs a denoiser that returns"):
        ddpm(lambda x, t: x, X, [50, 5], LINEAR, generator=g(), variance="learned_range")
    with pytest.raises(ValueError, match="eta is 1.5"):
        ddim(wavy, X, [5], LINEAR, eta=1.5)
    with pytest.raises(ValueError, match="iterations is 0"):
        ddim_invert(wavy, X, [5], LINEAR, iterations=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("dpm", 10, LINEAR), ValueError, "name is 'dpm'; expected one of 'ddpm'"),
        (("ddim", 0, LINEAR), ValueError, "steps is 0"),
        (
            ("ddim", 1001, LINEAR),
            ValueError,
            "steps is 1001; expected a whole number from 1 to 1000",
        ),
        (("ddim", 2.0, LINEAR), TypeError, "steps is 2.0"),
        (("ddim", 10, LINEAR, "karras"), ValueError, "spacing is 'karras'"),
        (("ddim", 10, LINEAR, "leading", -1), ValueError, "steps_offset is -1"),
        (("ddim", 1000, LINEAR, "leading", 1), ValueError, "do not fit into 1000 timesteps"),
        (("dpmpp_2m", 1000, LINEAR), ValueError, "do not fit into 1000 timesteps for dpmpp_2m"),
        (("ddim", 1, LINEAR), ValueError, "would start at t = 0"),
        (("euler", 1, LINEAR), ValueError, "would start at t = 0"),
        (("ddim", 1, LINEAR, "leading", 1), ValueError, "would start at t = 1"),
    ],
)
def test_timesteps_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        timesteps(*arguments)


@pytest.mark.parametrize("rho", [1.0, 7.0, math.inf])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, LATENT], ids=["linear", "cosine", "latent"])
def test_timesteps_spaced_by_noise(schedule, rho):
    """Even in sigma ** (1 / rho), from end to end; in the limit even in log sigma."""
    t = samplers.edm_timesteps(12, schedule, rho)
    assert t.shape == (12,) and (t.diff() < 0).all()
    assert t[0] == len(schedule) - 1 and t[-1] == 0
    sigma = (-schedule.log_snr(t) / 2).exp()
    gaps = (sigma.log() if rho == math.inf else sigma ** (1 / rho)).diff()
    close(gaps, gaps.mean().expand(11), rtol=1e-6)
    near = samplers.edm_timesteps(12, schedule, 1e5)
    close(near, samplers.edm_timesteps(12, schedule, math.inf), rtol=1e-3, atol=0.05)


def test_timesteps_spaced_by_noise_refuse():
    with pytest.raises(ValueError, match="rho is 0.5; expected a number of at least 1"):
        samplers.edm_timesteps(5, LINEAR, 0.5)
    with pytest.raises(ValueError, match="its sigma is infinite"):
        samplers.edm_timesteps(5, ZERO)
    with pytest.raises(ValueError, match="steps is 1"):
        samplers.edm_timesteps(1, LINEAR)


def test_to_x0_makes_a_denoiser():
    """The three targets lead to the same picture when they stand for the same answer."""
    ends = []
    for target in diffusion.TARGETS:
        network = lambda x, t, s=target: diffusion.from_x0(wavy(x, t), x, t, LINEAR, s)  # noqa: E731
        denoise = lambda x, t, n=network, s=target: diffusion.to_x0(  # noqa: E731
            n(x, t), x, t, LINEAR, s
        )
        ends.append(run("heun", denoise, rand(3, 4), timesteps("heun", 9, LINEAR), LINEAR))
    close(ends[0], ends[1], rtol=1e-8)
    close(ends[0], ends[2], rtol=1e-8)
