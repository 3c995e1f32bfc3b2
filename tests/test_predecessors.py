"""The VAE and the GAN against closed forms, quadrature, torch.distributions and scipy."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import distributions as D
from torch import nn

from companion import predecessors as p


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=g(seed), dtype=torch.float64)


def close(a, b, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=rtol, atol=atol)


def cross(latent):
    """Noise (2 L, L) whose first and second moments are those of the bell curve.

    Averages over it are exact expectations of anything quadratic in the noise.
    """
    e = math.sqrt(latent) * torch.eye(latent, dtype=torch.float64)
    return torch.cat([e, -e])


# --- the distance from the prior ------------------------------------------------------------------


def test_kl_is_that_of_torch_distributions():
    mean, log_variance = rand(5, 3), rand(5, 3, seed=1)
    ours = p.kl(mean, log_variance)
    q = D.Normal(mean, log_variance.exp().sqrt())
    close(ours, D.kl_divergence(q, D.Normal(torch.zeros_like(mean), 1.0)).sum(1))
    assert ours.shape == (5,)


def test_kl_is_the_mean_of_the_log_ratio():
    """Monte Carlo of the definition: E_q[log q - log p]."""
    mean, log_variance = torch.tensor([[0.7, -1.2]]).double(), torch.tensor([[-0.5, 0.4]]).double()
    z = p.reparameterise(mean, log_variance, rand(400_000, 2))
    ratio = D.Normal(mean, (log_variance / 2).exp()).log_prob(z) - D.Normal(0.0, 1.0).log_prob(z)
    sums = ratio.sum(1)
    error = sums.std().item() / len(sums) ** 0.5
    assert abs(sums.mean().item() - p.kl(mean, log_variance).item()) < 4 * error < 0.02


@settings(max_examples=50, deadline=None)
@given(st.floats(-4, 4), st.floats(-6, 6))
def test_kl_is_zero_for_the_prior_only(mean, log_variance):
    value = p.kl(torch.tensor([[mean]]).double(), torch.tensor([[log_variance]]).double()).item()
    assert value >= -1e-12
    assert value > 1e-9 or (abs(mean) < 1e-4 and abs(log_variance) < 1e-4)


# --- gradients through chance ---------------------------------------------------------------------


def test_gradients_through_a_draw_are_those_of_finite_differences():
    mean, log_variance, noise = rand(4, 3), rand(4, 3, seed=1), rand(4, 3, seed=2)

    def cost(m, v):
        return torch.sin(2 * p.reparameterise(m, v, noise)).prod(1).sum()

    inputs = [mean.clone().requires_grad_(), log_variance.clone().requires_grad_()]
    slopes = torch.autograd.grad(cost(*inputs), inputs)
    h = 1e-6
    for which, slope in enumerate(slopes):
        for i in range(4):
            for j in range(3):
                step = torch.zeros(4, 3, dtype=torch.float64)
                step[i, j] = h
                there = [x + step * (k == which) for k, x in enumerate((mean, log_variance))]
                back = [x - step * (k == which) for k, x in enumerate((mean, log_variance))]
                close(slope[i, j], (cost(*there) - cost(*back)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_a_draw_has_the_moments_that_were_asked_for():
    """E[z^2] = mean^2 + variance, so its slopes are 2 mean and (by the log variance) variance."""
    mean = torch.tensor([[1.5, -0.3]], dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor([[0.2, -1.0]], dtype=torch.float64, requires_grad=True)
    squares = p.reparameterise(mean, log_variance, cross(2)).square().mean(0)
    close(squares, (mean.square() + log_variance.exp())[0].detach())
    slopes = torch.autograd.grad(squares.sum(), [mean, log_variance])
    close(slopes[0], 2 * mean.detach())
    close(slopes[1], log_variance.exp().detach())


# --- the bound ------------------------------------------------------------------------------------


def test_the_cost_of_a_picture_is_a_gaussians():
    x, picture, log_sigma = rand(3, 1, 8, 8), rand(3, 1, 8, 8, seed=1), torch.tensor(-0.7).double()
    density = D.Normal(picture, log_sigma.exp()).log_prob(x).flatten(1).sum(1)
    close(p.gaussian_cost(x, picture, log_sigma), -density)


class Linear(nn.Module):
    """A decoder whose marginal p(x) is known: x = W z + noise."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight  # (64, L)

    def forward(self, z):
        return (z @ self.weight.T).view(-1, 1, 8, 8)


class Answer(nn.Module):
    """An encoder that gives a fixed affine mean and a fixed log variance."""

    def __init__(self, weight, log_variance):
        super().__init__()
        self.weight, self.log_variance = weight, log_variance

    def forward(self, x):
        mean = x.flatten(1) @ self.weight.T
        return torch.cat([mean, self.log_variance.expand_as(mean)], dim=1)


def linear_world(latent):
    """A linear VAE, its exact -log p(x) and the exact posterior's weight and log variance."""
    vae = p.VAE(p.PredecessorConfig(latent, 16)).double()
    weight = torch.linalg.qr(rand(64, latent, seed=3))[0] * torch.arange(1, latent + 1)
    vae.decoder, sigma2 = Linear(weight), 0.36
    with torch.no_grad():
        vae.log_sigma.fill_(math.log(0.6))
    covariance = weight @ weight.T + sigma2 * torch.eye(64, dtype=torch.float64)
    marginal = D.MultivariateNormal(torch.zeros(64, dtype=torch.float64), covariance)
    precision = torch.eye(latent, dtype=torch.float64) + weight.T @ weight / sigma2
    posterior = torch.linalg.inv(precision)  # diagonal, since the columns are orthogonal
    return vae, marginal, posterior @ weight.T / sigma2, posterior.diagonal().log()


def mean_bound(vae, x):
    """The bound's exact expectation over the noise, (B,)."""
    parts = [vae.bound(x, noise.expand(len(x), -1)) for noise in cross(vae.config.latent)]
    return torch.stack([a + b for a, b in parts]).mean(0).detach()


@pytest.mark.parametrize("latent", [1, 3])
def test_with_the_true_posterior_the_bound_is_the_likelihood(latent):
    vae, marginal, weight, log_variance = linear_world(latent)
    vae.encoder = Answer(weight, log_variance)
    x = rand(6, 1, 8, 8, seed=5) * 0.5
    close(mean_bound(vae, x), -marginal.log_prob(x.flatten(1)))


def test_another_posterior_costs_its_distance_from_the_true_one():
    vae, marginal, weight, log_variance = linear_world(3)
    x = rand(6, 1, 8, 8, seed=5) * 0.5
    other_weight, other = weight + 0.05 * rand(3, 64, seed=6), log_variance + 0.4
    vae.encoder = Answer(other_weight, other)
    q = D.Normal(x.flatten(1) @ other_weight.T, (other / 2).exp())
    true = D.Normal(x.flatten(1) @ weight.T, (log_variance / 2).exp())
    gap = mean_bound(vae, x) + marginal.log_prob(x.flatten(1))
    close(gap, D.kl_divergence(q, true).sum(1))
    assert (gap > 0.05).all()


def test_the_vae_splits_its_encoders_answer_into_mean_and_log_variance():
    vae = p.VAE(p.PredecessorConfig(3, 16))
    x = torch.rand(2, 1, 8, 8, generator=g()) * 2 - 1
    mean, log_variance = vae.encode(x)
    close(torch.cat([mean, log_variance], 1), vae.encoder(x))
    assert vae.decode(mean).shape == x.shape and vae.decode(mean).abs().max() < 1


# --- the game -------------------------------------------------------------------------------------


def laws(seed, n=7):
    return tuple(rand(n, seed=seed + k).softmax(0) for k in (0, 100))


@pytest.mark.parametrize("seed", range(5))
def test_the_best_discriminator_is_found_by_climbing(seed):
    """Climb the value in D's logits, knowing nothing of the formula."""
    real, fake = laws(seed)
    logits = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimiser.zero_grad()
        loss = -p.game_value(real, fake, logits.sigmoid())
        loss.backward()
        return loss

    optimiser.step(closure)
    best = p.best_discriminator(real, fake)
    close(logits.sigmoid().detach(), best, rtol=1e-4, atol=1e-4)
    top = p.game_value(real, fake, best)
    assert top >= p.game_value(real, fake, logits.sigmoid()).item() - 1e-9
    # Goodfellow et al., theorem 1; scipy's distance is the square root
    close(top, 2 * jensenshannon(real, fake) ** 2 - math.log(4))
    close(p.jensen_shannon(real, fake), jensenshannon(real, fake) ** 2)


def test_the_ends_of_the_game():
    real, fake = laws(3)
    half = torch.full((7,), 0.5, dtype=torch.float64)
    close(p.game_value(real, real, p.best_discriminator(real, real)), -math.log(4))
    close(p.game_value(real, fake, half), -math.log(4))
    apart = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0.3, 0.7, 0]]).double()
    close(p.jensen_shannon(*apart), math.log(2))
    close(p.game_value(*apart, p.best_discriminator(*apart)), 0.0)
    close(p.best_discriminator(*apart), [1, 1, 0, 0, 0.5])


def test_the_loss_over_samples_is_minus_the_value():
    """Things drawn as often as their laws say, each with its logit."""
    logits = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    real, fake = torch.tensor([1, 3, 4]), torch.tensor([5, 2, 1])
    loss = p.discriminator_loss(logits.repeat_interleave(real), logits.repeat_interleave(fake))
    close(loss, -p.game_value(real.double() / 8, fake.double() / 8, logits.sigmoid()))
    zeros = torch.zeros(9, dtype=torch.float64)
    close(p.discriminator_loss(zeros, zeros), math.log(4))


@pytest.mark.parametrize("saturating", [False, True])
def test_the_slope_that_the_generator_gets(saturating):
    """-(1 - D) for the loss in use; -D for the game as written, nothing while D is sure."""
    logits = torch.tensor([-9.0, -1.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(p.generator_loss(logits, saturating), logits)
    d = logits.detach().sigmoid()
    close(slope, -(d if saturating else 1 - d) / 4)


# --- training -------------------------------------------------------------------------------------

PICTURES = torch.rand(40, 1, 8, 8, generator=g(9)).round() * 2 - 1
SMALL = p.PredecessorConfig(latent=2, width=16)


def fresh(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(SMALL)


@pytest.mark.parametrize(("kind", "train"), [(p.VAE, p.train_vae), (p.GAN, p.train_gan)])
def test_training_depends_on_its_generator_alone(kind, train):
    before, runs = torch.random.get_rng_state(), []
    for seed in (0, 0, 1):
        model = fresh(kind)
        runs.append(list(train(model, PICTURES, 3, g(seed), batch_size=8)))
    assert runs[0] == runs[1] != runs[2] and len(runs[0]) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_vae_learns():
    """Two kinds of picture, bright left and bright right, told apart by one latent number."""
    left = torch.full((1, 8, 8), -0.8)
    left[:, :, :4] = 0.8
    vae, pictures = fresh(p.VAE), torch.stack([left, left.flip(2)])
    first, *_, last = p.train_vae(vae, pictures, 250, g(), batch_size=16, learning_rate=1e-2)
    assert sum(last) < sum(first) - 60
    drawn = vae.decode(vae.encode(pictures)[0])
    assert (drawn - pictures).abs().mean() < 0.15


def test_the_learning_rate_falls_to_zero():
    vae, places = fresh(p.VAE), []
    for _ in p.train_vae(vae, PICTURES, 50, g(), batch_size=8):
        places.append(nn.utils.parameters_to_vector(vae.parameters()).detach())
    moves = [(b - a).norm().item() for a, b in zip(places, places[1:], strict=False)]
    assert moves[-1] < 0.2 * max(moves[:5])


@pytest.mark.parametrize("saturating", [False, True])
def test_two_rounds_of_the_game_by_hand(saturating):
    """The discriminator first, on fakes that the generator does not feel; then the generator."""
    gan, rate, pictures = fresh(p.GAN).double(), 1e-3, PICTURES.double()
    ours = copy.deepcopy(gan)
    both = {"batch_size": 8, "learning_rate": rate, "saturating": saturating}
    list(p.train_gan(ours, pictures, 2, g(4), **both))

    draws = g(4)
    players = {
        net: torch.optim.Adam(net.parameters(), rate, betas=(0.5, 0.9))
        for net in (gan.discriminator, gan.generator)
    }

    def move(net, loss, rate):
        players[net].param_groups[0]["lr"] = rate
        weights = list(net.parameters())
        for w, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            w.grad = slope
        players[net].step()

    for left in (rate, rate / 2):
        x = pictures[torch.randint(40, (8,), generator=draws)]
        z = torch.randn(8, 2, generator=draws).double()
        real, fake = (gan.discriminator(y).sigmoid() for y in (x, gan.generator(z).detach()))
        move(gan.discriminator, -(real.log().mean() + (1 - fake).log().mean()), left)
        fake = gan.discriminator(gan.generator(z)).sigmoid()
        move(gan.generator, (1 - fake).log().mean() if saturating else -fake.log().mean(), left)
    for got, wanted in zip(ours.parameters(), gan.parameters(), strict=True):
        torch.testing.assert_close(got.detach(), wanted.detach(), rtol=0, atol=1e-9)


def test_what_does_not_fit_is_refused_in_words():
    vae, gan = fresh(p.VAE), fresh(p.GAN)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 8, 8\); expected \(B, 1, 8, 8\)"):
        vae.encode(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"z has shape \(2, 5\); expected \(B, 2\)"):
        gan.draw(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="width is 24; expected a multiple of 16"):
        p.PredecessorConfig(width=24)
    with pytest.raises(ValueError, match="p sums to 2; expected 1"):
        p.best_discriminator(torch.ones(2), torch.ones(2) / 2)
    with pytest.raises(ValueError, match="q runs from"):
        p.game_value(torch.ones(2) / 2, torch.tensor([-0.5, 1.5]), torch.ones(2) / 2)
