"""Scores against closed forms, scipy, and counting by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from companion import judge, recipes, scores


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, spread, n=400):
    """(n, D) points whose sample mean and sample covariance are exactly these."""
    x = rand(n, len(mean))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    wanted = torch.tensor(spread, dtype=torch.float64)
    return torch.tensor(mean) + x @ torch.linalg.cholesky(wanted).T


def test_frechet_of_gaussians_on_a_line():
    a, b = with_moments([1.0], [[4.0]]), with_moments([4.0], [[0.25]])
    assert math.isclose(scores.frechet(a, b), 3.0**2 + (2.0 - 0.5) ** 2, rel_tol=1e-12)


def test_frechet_where_covariances_commute():
    a = with_moments([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 9.0]))
    b = with_moments([0.5, 1.0, 0.0], np.diag([4.0, 4.0, 0.25]))
    by_hand = 0.25 + 4.0 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert math.isclose(scores.frechet(a, b), by_hand, rel_tol=1e-12)


def test_frechet_where_they_do_not():
    a, b = rand(90, 7, seed=1) @ rand(7, 7, seed=2), rand(60, 7, seed=3) @ rand(7, 7, seed=4) + 1
    S_a, S_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(S_a @ S_b).real  # the form that FID programs use
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(S_a + S_b - 2 * root)
    assert math.isclose(scores.frechet(a, b), wanted, rel_tol=1e-9)
    assert math.isclose(scores.frechet(b, a), wanted, rel_tol=1e-9)


def test_frechet_of_equal_and_of_flat_sets():
    a = rand(50, 5)
    assert scores.frechet(a, a) < 1e-10
    assert math.isclose(scores.frechet(a, a + 2), 5 * 4, rel_tol=1e-9)
    flat = torch.zeros(50, 5, dtype=torch.float64)  # every picture the same: no spread at all
    assert math.isclose(scores.frechet(a, flat), torch.cov(a.T).trace() + a.mean(0).square().sum())
    few = rand(3, 5, seed=5)  # fewer points than dimensions
    assert 0 < scores.frechet(a.float(), few.float()) < 100


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    # k = 1: the balls reach 1, 1, 2 and 4: the real region is [-1, 5] and [3, 11]
    fake = torch.tensor([[-1.0], [-1.5], [11.0], [12.0]])
    # and those of the fake 0.5, 0.5, 1, 1: [-2, -0.5] and [10, 13]
    assert scores.precision_recall(real, fake, k=1) == (0.5, 0.0)
    assert scores.precision_recall(fake, real, k=1) == (0.0, 0.5)
    # k = 2: 3, 2, 3, 6 -> [-3, 13]; and 12.5, 12.5, 12.5, 13.5 -> all
    assert scores.precision_recall(real, fake, k=2) == (1.0, 1.0)


def test_precision_and_recall_of_missing_and_of_wrong_modes():
    two = torch.cat([rand(200, 2), rand(200, 2, seed=1) + 50])
    one = rand(400, 2, seed=2)
    precision, recall = scores.precision_recall(two, one)
    assert precision > 0.9 and 0.4 < recall <= 0.5  # looks right, covers half
    precision, recall = scores.precision_recall(one, two)
    assert precision <= 0.5 and recall > 0.9
    assert scores.precision_recall(two, two) == (1.0, 1.0)


def test_points_that_coincide():
    x = torch.full((10, 4), 0.1)
    assert scores.precision_recall(x, x) == (1.0, 1.0)
    far = (1000 + rand(40, 8)).repeat(5, 1)  # each point five times, far from 0: every radius is 0
    assert scores.precision_recall(far, far.flip(0)) == (1.0, 1.0)
    assert scores.precision_recall(far, far + 1e-6) == (0.0, 0.0)
    assert scores.precision_recall(x, x + 1e-3) == (0.0, 0.0)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (871, 1000)])
def test_interval_solves_wilsons_equation(right, n):
    found = scores.interval(right, n)
    z = 1.959963984540054
    p = right / n
    assert found["value"] == p and found["n"] == n
    for end in (found["low"], found["high"]):  # |p - end| = z sqrt(end (1 - end) / n)
        assert math.isclose((p - end) ** 2, z**2 * end * (1 - end) / n, rel_tol=1e-9, abs_tol=1e-12)
    assert 0 <= found["low"] <= p <= found["high"] <= 1


def test_one_interval_serves_all():
    assert judge.interval is scores.interval and recipes.digits.interval is scores.interval


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.frechet(rand(1, 3), rand(5, 3)), "1 features; expected at least 2"),
        (lambda: scores.frechet(rand(5, 3), rand(5, 2)), "3 and 2 features a picture"),
        (lambda: scores.frechet(rand(5), rand(5, 2)), "expected"),
        (lambda: scores.precision_recall(rand(9, 2), rand(3, 2)), "at least 4"),
        (lambda: scores.precision_recall(rand(9, 2), rand(9, 2), k=0), "k is 0"),
        (lambda: scores.frechet(rand(5, 2) / 0, rand(5, 2)), "first set"),
        (lambda: scores.interval(11, 10), "right is 11"),
        (lambda: scores.interval(0, 0), "n is 0"),
    ],
)
def test_wrong_sets_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
