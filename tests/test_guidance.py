"""Classifier-free guidance: the formula, how often is asked, and a case with an exact answer."""

import pytest
import torch

from companion import samplers
from companion.diffusion import GaussianMixture, from_x0, to_x0
from companion.guidance import classifier_free
from companion.schedule import Schedule

X = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
T = torch.tensor([10, 500, 900])
GIVEN = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)


def answer(x, t, c, asked=None):
    if asked is not None:
        asked.append(len(x))
    return torch.sin(x * c) + t[:, None] / 1000


@pytest.mark.parametrize("w", [0.5, 2.0, 6.5])
def test_the_papers_formula(w):
    """(1 + w) given - w null (2207.12598, eq. 6), each pair of answers at its own x, t and c."""
    asked = []
    guided = classifier_free(lambda *a: answer(*a, asked), (GIVEN,), (-GIVEN,), 1 + w)
    wanted = (1 + w) * answer(X, T, GIVEN) - w * answer(X, T, -GIVEN)
    assert torch.allclose(guided(X, T), wanted, rtol=0, atol=1e-12)
    assert asked == [6], "one evaluation of twice the batch"


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0, -2.0, 1])
def test_at_most_one_asks_once_and_only_with_the_condition(scale):
    asked = []
    guided = classifier_free(lambda *a: answer(*a, asked), (GIVEN,), (), scale)
    assert torch.equal(guided(X, T), answer(X, T, GIVEN))
    assert asked == [3]


def test_a_variance_is_the_one_given_the_condition():
    guided = classifier_free(lambda x, t, c: (x * c, c * 10), (GIVEN,), (-GIVEN,), 3.0)
    x0, fraction = guided(X, T)
    assert torch.equal(fraction, GIVEN * 10)
    assert torch.allclose(x0, 5 * X * GIVEN)


def test_guiding_clean_pictures_or_noise_is_the_same():
    schedule = Schedule.linear()
    guided = classifier_free(answer, (GIVEN,), (-GIVEN,), 4.0)(X, T)
    noises = [from_x0(answer(X, T, c), X, T, schedule, "epsilon") for c in (-GIVEN, GIVEN)]
    mixed = noises[0] + 4.0 * (noises[1] - noises[0])
    assert torch.allclose(to_x0(mixed, X, T, schedule, "epsilon"), guided, rtol=0, atol=1e-9)


def test_conditions_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="expected the same"):
        classifier_free(answer, (GIVEN,), (GIVEN[:2],), 2.0)
    with pytest.raises(ValueError, match="scale is nan"):
        classifier_free(answer, (GIVEN,), (GIVEN,), float("nan"))


def test_guidance_moves_a_gaussian_away_from_the_crowd():
    """One cloud of two, with exact denoisers: s = 3 lands farther out than the cloud itself."""
    schedule = Schedule.linear()
    both = GaussianMixture(
        torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
        torch.full((2,), 0.3, dtype=torch.float64),
        torch.full((2,), 0.5, dtype=torch.float64),
    )
    right = GaussianMixture(both.means[1:], both.stds[1:], torch.ones(1, dtype=torch.float64))

    def denoise(x, t, chosen):
        every, one = (m.denoise(x, t, schedule) for m in (both, right))
        return torch.where(chosen > 0, one, every)

    start = torch.randn(400, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    yes, no = torch.ones_like(start), torch.zeros_like(start)
    steps = samplers.timesteps("ddim", 50, schedule)
    means = [
        samplers.ddim(classifier_free(denoise, (yes,), (no,), s), start, steps, schedule).mean()
        for s in (1.0, 3.0)
    ]
    assert means[0] == pytest.approx(1.0, abs=0.05)
    assert means[1] > means[0] + 0.05
