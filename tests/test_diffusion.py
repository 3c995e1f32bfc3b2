"""Targets, losses, posteriors, exact denoisers: against quadrature, simulation, torch's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from torch import distributions as D

from companion import diffusion
from companion.diffusion import TARGETS, GaussianMixture
from companion.schedule import Schedule

LINEAR, COSINE = Schedule.linear(), Schedule.cosine()
SHORT = Schedule.linear(20, beta_start=0.01, beta_end=0.4)
ZERO = Schedule.scaled_linear().rescale_zero_snr()


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=g(seed), dtype=torch.float64)


def close(a, b, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b).to(a.dtype), rtol=rtol, atol=atol)


# --- targets -------------------------------------------------------------------------------------

T = torch.tensor([0, 400, 998])
X0, NOISE = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, ZERO], ids=["linear", "cosine", "zero"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_network_gives_back_the_picture(schedule, target):
    x_t = schedule.add_noise(X0, NOISE, T)
    wanted = diffusion.target_for(X0, NOISE, T, schedule, target)
    close(diffusion.to_x0(wanted, x_t, T, schedule, target), X0, rtol=1e-8, atol=1e-8)
    close(diffusion.from_x0(X0, x_t, T, schedule, target), wanted, rtol=1e-8, atol=1e-8)
    for i in range(3):  # one t for all is the same as (B,)
        one = (wanted[i : i + 1], x_t[i : i + 1], int(T[i]), schedule, target)
        close(diffusion.to_x0(*one), X0[i : i + 1], rtol=1e-8, atol=1e-8)


def test_targets_are_what_they_say():
    assert diffusion.target_for(X0, NOISE, T, LINEAR, "epsilon") is NOISE
    assert diffusion.target_for(X0, NOISE, T, LINEAR, "sample") is X0
    # x_t = cos(p) x0 + sin(p) noise moves on a circle; v is its velocity (2202.00512, appendix D)
    p = torch.atan2(COSINE.noise(T), COSINE.signal(T)).view(3, 1, 1, 1)
    h = 1e-6
    turned = [torch.cos(q) * X0 + torch.sin(q) * NOISE for q in (p + h, p - h)]
    v = diffusion.target_for(X0, NOISE, T, COSINE, "v_prediction")
    close(v, (turned[0] - turned[1]) / (2 * h), rtol=1e-6, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3).flatmap(lambda b: st.tuples(st.just(b), st.integers(1, 5))),
    st.floats(0, 900),
    st.sampled_from(TARGETS),
    st.sampled_from(TARGETS),
    st.integers(0, 2**31),
)
def test_conversions_undo_each_other(shape, t, source, target, seed):
    output, x_t = rand(*shape, seed=seed), rand(*shape, seed=seed + 1)
    there = diffusion.convert(output, x_t, t, LINEAR, source, target)
    back = diffusion.convert(there, x_t, t, LINEAR, target, source)
    close(back, output, rtol=1e-6, atol=1e-6)


def test_zero_snr_needs_a_target_that_carries_the_picture():
    x_t, v = rand(2, 3), rand(2, 3, seed=1)
    close(diffusion.to_x0(v, x_t, 999, ZERO, "v_prediction"), -v)
    with pytest.raises(ValueError, match="train with 'v_prediction'"):
        diffusion.to_x0(v, x_t, torch.tensor([5, 999]), ZERO, "epsilon")


def test_float32_stays_float32():
    x = torch.randn(2, 3, generator=g())
    for target in TARGETS:
        assert diffusion.to_x0(x, x, 500, LINEAR, target).dtype == torch.float32
        assert diffusion.from_x0(x, x, 0.5, LINEAR, target).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: diffusion.to_x0(x, x, 5, LINEAR, "eps"), ValueError, "target is 'eps'"),
        (lambda x: diffusion.to_x0(x, x, 5, LINEAR, "v-prediction"), ValueError, "Did you mean"),
        (lambda x: diffusion.to_x0(x[:1], x, 5, LINEAR, "sample"), ValueError, "output has shape"),
        (
            lambda x: diffusion.to_x0(x.float(), x, 5, LINEAR, "sample"),
            TypeError,
            "output has dtype",
        ),
        (lambda x: diffusion.to_x0(x, x, 1000, LINEAR, "epsilon"), ValueError, "t runs from 1000"),
        (lambda x: diffusion.to_x0(x, x, T, LINEAR, "epsilon"), ValueError, "t has shape"),
        (
            lambda x: diffusion.target_for(x, x[0], 5, LINEAR, "epsilon"),
            ValueError,
            "noise has shape",
        ),
        (lambda x: diffusion.from_x0(x.long(), x, 5, LINEAR, "sample"), TypeError, "x0 has dtype"),
        (lambda x: diffusion.posterior(x, x, 0.5, LINEAR), TypeError, "whole timesteps"),
        (lambda x: diffusion.min_snr_weight(5, LINEAR, "epsilon", 0.0), ValueError, "gamma is 0"),
        (lambda x: diffusion.simple_loss(x, x, torch.ones(3)), ValueError, "has shape"),
        (lambda x: diffusion.vlb_term(x, x, 5, LINEAR, x, levels=1), ValueError, "levels is 1"),
        (lambda x: diffusion.ideal_denoiser(x, 5, x[:, :1], LINEAR), ValueError, "same size after"),
        (lambda x: diffusion.ideal_denoiser(x, 5, x[:0], LINEAR), ValueError, "at least one"),
        (
            lambda x: diffusion.ideal_denoiser(x, 5, x, LINEAR, prior=torch.ones(5)),
            ValueError,
            "prior has shape",
        ),
        (lambda x: diffusion.ideal_denoiser(x / 0, 5, x, LINEAR), ValueError, "NaN or infinite"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(rand(2, 4))


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_ratios_of_squared_errors(target):
    t = torch.arange(0, 1000, 37)
    x0, x_t, guess = rand(len(t), 6), rand(len(t), 6, seed=1), rand(len(t), 6, seed=2)
    error = diffusion.from_x0(x0, x_t, t, LINEAR, target) - diffusion.from_x0(
        guess, x_t, t, LINEAR, target
    )
    ratio = error.square().sum(1) / (x0 - guess).square().sum(1)
    close(diffusion.x0_weight(t, LINEAR, target), ratio, rtol=1e-6)
    # after min-SNR's factor, every target weighs x0 errors by min(SNR, gamma)
    total = diffusion.min_snr_weight(t, LINEAR, target, 5.0) * ratio
    close(total, torch.minimum(LINEAR.snr(t), torch.tensor(5.0)), rtol=1e-6)
    loose = diffusion.min_snr_weight(t, LINEAR, target, 1e9)
    close(loose * ratio, LINEAR.snr(t), rtol=1e-6)


def test_min_snr_at_zero_snr():
    weights = [diffusion.min_snr_weight(999, ZERO, target).item() for target in TARGETS]
    assert weights == [1.0, 0.0, 0.0]


def test_simple_loss():
    a, b = rand(2, 3, 2, 2), rand(2, 3, 2, 2, seed=1)
    close(diffusion.simple_loss(a, b), torch.nn.functional.mse_loss(a, b))
    each = torch.stack([torch.nn.functional.mse_loss(a[i], b[i]) for i in range(2)])
    weight = torch.tensor([2.0, 0.5], dtype=torch.float64)
    close(diffusion.simple_loss(a, b, weight), (weight * each).mean())


@pytest.mark.parametrize("t", [1, 7, 19])
def test_posterior_is_bayes_rule(t):
    """Multiply prior and likelihood on the line and integrate: nothing from eq. 6 and 7 is used."""
    x0, x_t = 0.7, -0.4
    abar = math.prod(1 - b for b in SHORT.betas[:t].tolist())  # after the steps before t
    beta = SHORT.betas[t].item()
    before = D.Normal(math.sqrt(abar) * x0, math.sqrt(1 - abar))

    def density(x):
        likelihood = D.Normal(math.sqrt(1 - beta) * x, math.sqrt(beta))
        return math.exp(before.log_prob(torch.tensor(x)) + likelihood.log_prob(torch.tensor(x_t)))

    torch.set_default_dtype(torch.float64)
    try:
        moment = [quad(lambda x, k=k: x**k * density(x), -8, 8, epsabs=1e-13)[0] for k in range(3)]
    finally:
        torch.set_default_dtype(torch.float32)
    mean, variance = diffusion.posterior(
        torch.tensor([[x0]]).double(), torch.tensor([[x_t]]).double(), t, SHORT
    )
    assert mean.item() == pytest.approx(moment[1] / moment[0], abs=1e-7)
    assert variance.item() == pytest.approx(moment[2] / moment[0] - mean.item() ** 2, abs=1e-7)


def test_posterior_by_simulation():
    """Walk forward many times; among walks that pass x_t, look where they were one step before."""
    n, t, x0 = 400_000, 5, 1.5
    x = torch.full((n, 1), x0, dtype=torch.float64)
    generator = g(2)
    for s in range(t):
        x = SHORT.step(x, s, generator)
    after = SHORT.step(x, t, generator)
    here = (after - 0.9).abs() < 0.01
    mean, variance = diffusion.posterior(
        torch.full((1, 1), x0).double(), torch.full((1, 1), 0.9).double(), t, SHORT
    )
    n = int(here.sum())
    assert n > 1000
    assert abs(x[here].mean() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x[here].var() / variance - 1) < 4 * math.sqrt(2 / n)


def test_posterior_before_the_first_row_is_the_picture():
    mean, variance = diffusion.posterior(
        X0, rand(3, 2, 4, 4, seed=9), torch.tensor([0, 0, 5]), LINEAR
    )
    close(mean[:2], X0[:2])
    assert variance.shape == (3, 1, 1, 1) and variance[0] == 0 and variance[2] > 0


def test_log_variance_runs_between_the_fixed_ones():
    t = torch.tensor([1, 300, 999])
    ones = torch.ones(3, 2, 2, dtype=torch.float64)
    _, small = diffusion.posterior(ones, ones, t, LINEAR)
    close(diffusion.log_variance(-ones, t, LINEAR), small.log().expand(3, 2, 2))
    close(diffusion.log_variance(ones, t, LINEAR)[:, 0, 0], LINEAR.betas[t].log())
    middle = diffusion.log_variance(0 * ones, t, LINEAR)[:, 0, 0]
    close(middle, 0.5 * (small.flatten().log() + LINEAR.betas[t].log()))
    first = diffusion.log_variance(-ones, 0, LINEAR)
    close(first[0, 0, 0], small.flatten()[0].log())


def test_vlb_terms_are_divergences():
    t = torch.tensor([1, 500, 999])
    x0, x_t, guess = (rand(3, 5, seed=s).clamp(-1, 1) for s in range(3))
    fraction = rand(3, 5, seed=4).clamp(-1, 1)
    term = diffusion.vlb_term(x0, x_t, t, LINEAR, guess, fraction)
    mean, variance = diffusion.posterior(x0, x_t, t, LINEAR)
    ours, _ = diffusion.posterior(guess, x_t, t, LINEAR)
    std = (diffusion.log_variance(fraction, t, LINEAR) / 2).exp()
    true = D.Normal(mean, variance.sqrt().expand_as(mean))
    kl = D.kl_divergence(true, D.Normal(ours, std))
    close(term, kl.mean(1) / math.log(2), rtol=1e-8)


def test_vlb_terms_weigh_x0_errors_by_the_loss_of_snr():
    """With the posterior's variance, a term is (SNR before - SNR after) / 2 |x0 - x0_hat|^2."""
    t = torch.arange(1, 1000, 37)
    x0, x_t, guess = (rand(len(t), 4, seed=s) for s in range(3))
    term = diffusion.vlb_term(x0, x_t, t, COSINE, guess)
    lost = 0.5 * (COSINE.snr(t - 1) - COSINE.snr(t))
    close(term, lost * (x0 - guess).square().mean(1) / math.log(2), rtol=1e-5)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_last_term_is_a_probability_over_all_levels(levels):
    grid = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None]
    for guess in (-1.3, -0.2, 0.93):
        x_t = torch.full_like(grid, 0.1)
        guesses = torch.full_like(grid, guess)
        bits = diffusion.vlb_term(grid, x_t, 0, SHORT, guesses, torch.ones_like(grid), levels)
        close((-bits * math.log(2)).exp().sum(), 1.0)
        # and each is the Gaussian's mass in its bin
        std = math.sqrt(SHORT.betas[0])
        normal = D.Normal(torch.tensor(guess).double(), torch.tensor(std).double())
        half = 1 / (levels - 1)
        low, high = normal.cdf(grid - half), normal.cdf(grid + half)
        low[0], high[-1] = 0, 1
        mass = (high - low)[:, 0]
        seen = mass > 1e-9
        close((-bits * math.log(2)).exp()[seen], mass[seen], rtol=1e-5)
        assert bits.isfinite().all()


def test_far_tails_stay_finite():
    x0 = torch.tensor([[-1.0], [1.0], [0.0]])
    guess = -x0 * 50 + 7
    bits = diffusion.vlb_term(x0, x0, 0, LINEAR, guess)
    assert bits.isfinite().all() and bits.min() > 1e4


def test_the_bound_of_a_coin_is_one_bit():
    """The world is -1 or 1 with equal chance: no model codes it in less than one bit, and with the
    ideal denoiser and small steps the bound comes close."""
    coin = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    x0 = coin.repeat(400, 1)
    totals = []
    for steps in (10, 40, 160):
        schedule = Schedule.cosine(steps)
        denoise = lambda x, t, s=schedule: diffusion.ideal_denoiser(x, t, coin, s)  # noqa: E731
        terms = diffusion.variational_bound(denoise, x0, schedule, g(), levels=2)
        assert terms.shape == (800, steps + 1)
        total = terms.sum(1)
        totals.append(total.mean().item())
        assert total.mean() > 1 - 4 * total.std() / math.sqrt(800)
    assert totals[0] > totals[1] > totals[2]
    assert totals[2] == pytest.approx(1, abs=0.05)


def test_the_bound_of_a_certain_world_is_nothing():
    schedule = Schedule.cosine(100)
    x0 = torch.full((50, 3), 0.5, dtype=torch.float64)
    terms = diffusion.variational_bound(lambda x, t: x0, x0, schedule, g(), levels=5)
    assert terms[:, :-1].abs().max() < 1e-9 and 0 < terms[:, -1].max() < 1e-6
    wide = diffusion.variational_bound(
        lambda x, t: (x0, torch.ones_like(x0)), x0, schedule, g(), levels=5
    )
    abar = schedule.alphas_cumprod
    ratio = (1 - abar[:-1]) / (1 - abar[1:])  # of the true variance to beta, from row 1 on
    cost = 0.5 * (ratio - 1 - ratio.log()).sum() / math.log(2)  # a variance that is too wide
    close(wide[:, 1:-1].sum(1), cost.expand(50))


def test_prior_term_is_a_divergence():
    x0 = rand(4, 6)
    last = D.Normal(SHORT.signal(19) * x0, SHORT.noise(19).expand_as(x0))
    kl = D.kl_divergence(last, D.Normal(torch.zeros_like(x0), 1.0)).mean(1) / math.log(2)
    close(diffusion.prior_term(x0, SHORT), kl)
    assert diffusion.prior_term(x0, ZERO).abs().max() == 0


def test_noise_weight_makes_noise_errors_velocity_errors_up_to_a_bound():
    t = torch.arange(1000)
    weight, abar = diffusion.noise_weight(t, COSINE, 8.0), COSINE.alphas_cumprod
    close(weight, (1 / abar).clamp(max=8.0))
    assert weight[0] < 1.001 and weight[-1] == 8.0
    assert (diffusion.noise_weight(t, LINEAR, 1.0) == 1).all()
    assert diffusion.noise_weight(999, ZERO, 8.0) == 8.0
    with pytest.raises(ValueError, match="most is 0.5"):
        diffusion.noise_weight(t, COSINE, 0.5)


def test_hybrid_loss_counts_each_picture_as_often_as_it_is_told():
    t, x0, noise = torch.tensor([0, 1, 500, 999]), rand(4, 5).clamp(-1, 1), rand(4, 5, seed=1)
    output, fraction = rand(4, 5, seed=2), rand(4, 5, seed=3).clamp(-1, 1)
    plain, counts = torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 8.0])
    args = output, fraction, x0, noise, t, COSINE
    close(diffusion.hybrid_loss(*args, counts=plain), diffusion.hybrid_loss(*args))
    more = diffusion.hybrid_loss(*args, counts=counts) - diffusion.hybrid_loss(*args)
    close(more, ((counts - 1) * (output - noise).square().mean(1)).mean(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hybrid_loss_trains_mean_and_variance_apart(dtype):
    t = torch.tensor([0, 1, 500, 999])
    x0 = rand(4, 5).clamp(-1, 1).to(dtype)
    noise = rand(4, 5, seed=1).to(dtype)
    output = rand(4, 5, seed=2).to(dtype).requires_grad_()
    fraction = rand(4, 5, seed=3).clamp(-1, 1).to(dtype).requires_grad_()
    loss = diffusion.hybrid_loss(output, fraction, x0, noise, t, COSINE)
    of_output, of_fraction = torch.autograd.grad(loss, (output, fraction))
    simple = diffusion.simple_loss(output, noise)
    close(of_output, torch.autograd.grad(simple, output)[0])
    assert of_fraction.isfinite().all() and (of_fraction.abs().sum(1) > 0).all()
    x_t = COSINE.add_noise(x0, noise, t)
    x0_hat = diffusion.to_x0(output, x_t, t, COSINE, "epsilon")
    bound = diffusion.vlb_term(x0, x_t, t, COSINE, x0_hat, fraction)
    close(loss, simple + 0.001 * 1000 * bound.mean(), rtol=1e-6)


# --- exact denoisers -----------------------------------------------------------------------------


def test_ideal_denoiser_by_simulation():
    """Noise the pictures many times; average the clean ones behind each place where one lands."""
    pictures = torch.tensor([[-0.8], [0.1], [0.9]], dtype=torch.float64)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    n, t = 600_000, 12
    which = torch.multinomial(prior, n, replacement=True, generator=g())
    x_t = SHORT.add_noise(pictures[which], rand(n, 1, seed=1), t)
    for place in (-1.0, 0.0, 0.7):
        here = (x_t[:, 0] - place).abs() < 0.02
        clean = pictures[which][here]
        mean, weights = diffusion.ideal_denoiser(
            torch.tensor([[place]]).double(), t, pictures, SHORT, prior=prior, return_weights=True
        )
        n_here = int(here.sum())
        assert abs(clean.mean() - mean) < 4 * clean.std() / math.sqrt(n_here)
        share = torch.bincount(which[here], minlength=3) / n_here
        assert (share - weights[0]).abs().max() < 4 * 0.5 / math.sqrt(n_here)


def test_ideal_denoiser_written_out():
    pictures, x_t = rand(5, 2, 3), rand(4, 2, 3, seed=1).float()
    t = torch.tensor([3, 200, 600, 999])
    mean, weights = diffusion.ideal_denoiser(x_t, t, pictures, LINEAR, return_weights=True)
    assert mean.dtype == torch.float32 and weights.dtype == torch.float64
    assert weights.shape == (4, 5)
    close(weights.sum(1), torch.ones(4))
    for b in range(4):
        a, s = LINEAR.signal(t[b]).item(), LINEAR.noise(t[b]).item()
        normal = D.Normal(a * pictures.flatten(1), s)
        density = normal.log_prob(x_t[b].double().flatten()).sum(1)
        want = torch.softmax(density, 0)
        close(weights[b], want, rtol=1e-6, atol=1e-9)
        close(mean[b].double(), (want[:, None, None] * pictures).sum(0), rtol=1e-5, atol=1e-6)


def test_ideal_denoiser_is_stable_and_knows_both_ends():
    pictures = rand(30, 3, 32, 32).clamp(-1, 1)
    noisy = LINEAR.add_noise(pictures[:4], rand(4, 3, 32, 32, seed=1), 0)
    mean, weights = diffusion.ideal_denoiser(noisy, 0, pictures, LINEAR, return_weights=True)
    close(mean, pictures[:4])
    assert weights.argmax(1).tolist() == [0, 1, 2, 3] and weights.isfinite().all()
    nothing = diffusion.ideal_denoiser(noisy, 999, pictures, ZERO)
    close(nothing, pictures.mean(0).expand_as(nothing))
    never = torch.tensor([0.0, 1.0] + [0.0] * 28)
    only = diffusion.ideal_denoiser(noisy, 500, pictures, LINEAR, prior=never)
    close(only, pictures[1].expand_as(only))


def test_no_guess_beats_the_ideal_denoiser():
    pictures = rand(6, 4)
    which = torch.randint(6, (20_000,), generator=g())
    x_t = LINEAR.add_noise(pictures[which], rand(20_000, 4, seed=1), 300)
    best = diffusion.ideal_denoiser(x_t, 300, pictures, LINEAR)
    loss = (best - pictures[which]).square().mean()
    for other in (
        0.98 * best,
        best + 0.02,
        1.02 * best,
        diffusion.ideal_denoiser(x_t, 320, pictures, LINEAR),
    ):
        assert (other - pictures[which]).square().mean() > loss


CLOUDS = GaussianMixture(
    torch.tensor([[-1.0], [0.4], [1.2]], dtype=torch.float64),
    torch.tensor([0.2, 0.05, 0.3], dtype=torch.float64),
    torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
)
PLANE = GaussianMixture(
    torch.tensor([[-1.0, 0.5], [0.4, -0.7]], dtype=torch.float64),
    torch.tensor([0.2, 0.4], dtype=torch.float64),
    torch.tensor([0.3, 0.7], dtype=torch.float64),
)


@pytest.mark.parametrize("t", [3, 250, 700.5])
def test_mixture_denoiser_by_quadrature(t):
    a, s = LINEAR.signal(t).item(), LINEAR.noise(t).item()

    def density(x0, x):
        clouds = sum(
            w * math.exp(-0.5 * ((x0 - m) / d) ** 2) / d
            for m, d, w in zip(CLOUDS.means[:, 0], CLOUDS.stds, CLOUDS.weights, strict=True)
        )
        return clouds * math.exp(-0.5 * ((x - a * x0) / s) ** 2)

    for x in (-1.3, 0.0, 0.8):
        peaks = [-1.0, 0.4, 1.2, min(max(x / a, -3.9), 3.9)]
        moments = [
            quad(
                lambda y, x=x, k=k: y**k * density(y, x),
                -4,
                4,
                points=peaks,
                limit=400,
                epsabs=1e-14,
            )
            for k in range(2)
        ]
        want = moments[1][0] / moments[0][0]
        mean = CLOUDS.denoise(torch.tensor([[x]]).double(), t, LINEAR)
        assert mean.item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("world", [CLOUDS, PLANE], ids=["line", "plane"])
def test_mixture_against_torch(world):
    x = rand(50, world.means.shape[1])
    for t in (None, 10, 400):
        abar = torch.tensor(1.0) if t is None else LINEAR.alpha_bar(t)
        variance = abar * world.stds**2 + 1 - abar
        parts = D.Independent(
            D.Normal(abar.sqrt() * world.means, variance.sqrt()[:, None].expand_as(world.means)), 1
        )
        noisy = D.MixtureSameFamily(D.Categorical(world.weights), parts)
        close(world.log_prob(x, t, LINEAR), noisy.log_prob(x))
        if t is None:
            continue
        y = x.clone().requires_grad_()
        slope = torch.autograd.grad(noisy.log_prob(y).sum(), y)[0]
        tweedie = diffusion.score(world.denoise(x, t, LINEAR), x, t, LINEAR)
        close(tweedie, slope, rtol=1e-7, atol=1e-9)
    each = torch.arange(50) * 19
    together = world.denoise(x, each, LINEAR)
    close(together[7:8], world.denoise(x[7:8], 7 * 19, LINEAR))


def test_mixture_of_points_is_a_list_of_pictures():
    world = GaussianMixture(PLANE.means, torch.zeros(2).double(), PLANE.weights)
    x = rand(20, 2)
    want = diffusion.ideal_denoiser(x, 300, world.means, LINEAR, prior=world.weights)
    close(world.denoise(x, 300, LINEAR), want)
    assert world.denoise(x.float(), 300, LINEAR).dtype == torch.float32


def test_mixture_samples_and_cdf():
    x = CLOUDS.sample(100_000, g())
    for place in (-1.0, 0.0, 0.42, 1.5):
        share = CLOUDS.cdf(torch.tensor([[place]]).double(), None, LINEAR).item()
        assert (x < place).double().mean().item() == pytest.approx(share, abs=0.007)
    noisy = LINEAR.add_noise(x, rand(100_000, 1, seed=4), 250)
    share = CLOUDS.cdf(torch.tensor([[0.3]]).double(), 250, LINEAR).item()
    assert (noisy < 0.3).double().mean().item() == pytest.approx(share, abs=0.007)
    assert PLANE.sample(5, g()).shape == (5, 2)


def test_flow_solves_the_probability_flow_ode():
    """In sigma and y = x / sqrt(abar) the ODE is dy/dsigma = (y - E[x_0]) / sigma (EDM eq. 1)."""
    schedule = Schedule.linear(50, beta_end=0.2)
    x = torch.tensor([[-1.7], [-0.1], [0.02], [1.4]], dtype=torch.float64)
    start, end = 44.0, 3.0
    sigma = lambda t: (schedule.noise(t) / schedule.signal(t)).item()  # noqa: E731

    def slope(s, y):
        t = schedule.t_of_log_snr(-2 * math.log(s))
        signal = schedule.signal(t)
        y = torch.tensor(y)[:, None]
        return ((y - CLOUDS.denoise(y * signal, t, schedule)) / s)[:, 0].numpy()

    y = (x / schedule.signal(start))[:, 0].numpy()
    path = solve_ivp(slope, (sigma(start), sigma(end)), y, rtol=1e-10, atol=1e-12)
    want = torch.from_numpy(path.y[:, -1])[:, None] * schedule.signal(end)
    close(CLOUDS.flow(x, start, end, schedule), want, rtol=1e-7, atol=1e-8)
    there = CLOUDS.flow(x, start, None, schedule)
    close(CLOUDS.cdf(there, None, schedule), CLOUDS.cdf(x, start, schedule), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"means": torch.zeros(3).double()}, ValueError, "means has shape"),
        ({"means": torch.zeros(3, 1)}, TypeError, "means has dtype"),
        ({"stds": torch.ones(2).double()}, ValueError, "stds has shape"),
        ({"stds": -torch.ones(3).double()}, ValueError, "stds runs from -1"),
        ({"weights": torch.ones(3).double()}, ValueError, "weights sum to 3"),
    ],
)
def test_wrong_mixtures_are_named(change, error, message):
    parts = {"means": CLOUDS.means, "stds": CLOUDS.stds, "weights": CLOUDS.weights}
    with pytest.raises(error, match=message):
        GaussianMixture(**{**parts, **change})
    points = GaussianMixture(CLOUDS.means, torch.zeros(3).double(), CLOUDS.weights)
    with pytest.raises(ValueError, match="width 0"):
        points.log_prob(torch.zeros(1, 1).double(), None, LINEAR)
    with pytest.raises(ValueError, match="x has shape"):
        CLOUDS.denoise(torch.zeros(1, 2), 5, LINEAR)
