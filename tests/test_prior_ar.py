"""The autoregressive prior: places as tokens, who sees whom, and what is drawn."""

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from companion.checkpoints import CheckpointError
from companion.prior_ar import ARPrior, ARPriorConfig, components_for, spectrum

N, D, K, M = 7, 12, 5, 16
CONFIG = ARPriorConfig(2, 8, 2, D, N, components=K, buckets=M, dots=6)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(n: int = 600, seed: int = 1) -> Tensor:
    """Places with an axis of its own variance for each direction, turned at random."""
    turn, _ = torch.linalg.qr(torch.randn(D, D, generator=gen(seed), dtype=torch.float64))
    spread = 3.0 * 0.6 ** torch.arange(D, dtype=torch.float64)
    x = torch.randn(n, D, generator=gen(seed + 1), dtype=torch.float64) * spread
    return x @ turn.T + torch.arange(D)


@pytest.fixture
def prior(generator) -> ARPrior:
    """Every parameter random, in float64: those that start at zero would hide faults."""
    model = ARPrior.fresh(CONFIG, generator).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=torch.float64) / p[0].numel() ** 0.5
            )
    x = places()
    model.measure(x, x + torch.randn(x.shape, generator=gen(5), dtype=torch.float64))
    return model.requires_grad_(False)


def words(b: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = gen(seed)
    mask = torch.arange(N) < torch.randint(2, N + 1, (b, 1), generator=g)
    return (
        torch.randn(b, D, generator=g, dtype=torch.float64),
        torch.randn(b, N, D, generator=g, dtype=torch.float64),
        mask,
    )


# --- a place as tokens ---------------------------------------------------------------------------


def test_principal_components_are_numpys():
    x = places()
    values, axes = spectrum(x)
    centred = (x - x.mean(0)).numpy()
    _, s, rows = numpy.linalg.svd(centred, full_matrices=False)
    numpy.testing.assert_allclose(values.numpy(), s**2 / (len(x) - 1), rtol=1e-9)
    assert (values.diff() <= 0).all()
    for k in range(D):
        numpy.testing.assert_allclose(abs(axes[:, k].numpy() @ rows[k]), 1, rtol=1e-9)
        assert axes[axes[:, k].abs().argmax(), k] > 0


def test_how_many_components_hold_a_share_of_the_variance():
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    x = torch.cat([x, -x])  # variances in the ratio 9 : 4 : 1 : 0
    for share, wanted in ((0.5, 1), (9 / 14, 1), (0.65, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)):
        assert components_for(x, share) == wanted, share


def test_there_and_back_costs_half_a_bucket_at_most(prior):
    x = places()
    y = (x - prior.mean) @ prior.axes.T
    back = (prior.dequantise(prior.quantise(x)) - prior.mean) @ prior.axes.T
    half = (prior.high - prior.low) / M / 2
    error = (back - y).abs() / half
    assert (error <= 1 + 1e-9).all() and error.max() > 0.95
    assert (prior.axes @ prior.axes.T - torch.eye(K)).abs().max() < 1e-9


def test_the_tokens_are_the_closed_form():
    model = ARPrior(ARPriorConfig(1, 4, 1, 3, 2, components=3, buckets=4, dots=2))
    x = torch.tensor([[-0.9, -0.1, 0.1], [0.9, -5.0, 5.0], [-1.0, 0.0, 0.5]])
    assert model.quantise(x).tolist() == [[0, 1, 2], [3, 0, 3], [0, 2, 3]]  # axes 1, from -1 to 1
    back = model.dequantise(torch.tensor([[0, 1, 2], [3, 3, 0]]))
    torch.testing.assert_close(back, torch.tensor([[-0.75, -0.25, 0.25], [0.75, 0.75, -0.75]]))
    assert model.dot(torch.tensor([[1.0, 2, 3], [1, 1, 1]]), torch.tensor([[1.0, 0, -1], [1, 1, 1]])
                     ).tolist() == [0, 1]  # fmt: skip


def test_what_was_seen_lies_inside_and_equally_often_in_each_bucket_of_dot_products(prior):
    x = places()
    text = x + torch.randn(x.shape, generator=gen(5), dtype=torch.float64)
    y = (x - prior.mean) @ prior.axes.T
    assert (y > prior.low).all() and (y < prior.high).all()
    spread = y.max(0).values - y.min(0).values
    torch.testing.assert_close(prior.high - prior.low, 1.2 * spread, rtol=1e-6, atol=0)
    assert prior.dot(x, text).bincount(minlength=6).tolist() == [100] * 6
    order = (x * text).sum(1).argsort()
    assert (prior.dot(x, text)[order].diff() >= 0).all()


# --- who sees whom -------------------------------------------------------------------------------


def first_difference(model: ARPrior, changed: int) -> int | None:
    """The first component whose answer moves when token ``changed`` does; None: none moves."""
    said = words(2)
    codes = torch.randint(M, (2, K), generator=gen())
    other = codes.clone()
    other[:, changed] = (other[:, changed] + 1) % M
    dot = torch.tensor([1, 4])
    moved = (model(*said, dot, codes) - model(*said, dot, other)).abs().amax((0, 2)) > 1e-12
    return int(moved.int().argmax()) if moved.any() else None


def test_a_token_is_predicted_from_those_before_it(prior):
    assert [first_difference(prior, k) for k in range(K)] == [1, 2, 3, 4, None]


def test_a_look_ahead_would_be_seen(prior, monkeypatch):
    """The same check on a model whose causal mask is gone."""
    monkeypatch.setattr(Tensor, "tril", lambda self, diagonal=0: self)
    assert [first_difference(prior, k) for k in range(K - 1)] == [0] * (K - 1)


def test_caption_embedding_dot_and_no_padding_are_seen(prior):
    embedding, states, mask = words(1)
    codes, dot = torch.randint(M, (1, K), generator=gen()), torch.tensor([2])
    mask = torch.arange(N)[None] < 4

    def far(*changed: Tensor) -> float:
        return (prior(embedding, states, mask, dot, codes) - prior(*changed)).abs().max().item()

    inside, outside = states.clone(), states.clone()
    inside[:, 3] += 1
    outside[:, 4:] += 1
    assert far(embedding, inside, mask, dot, codes) > 1e-6
    assert far(embedding, outside, mask, dot, codes) == 0
    assert far(embedding + 1, states, mask, dot, codes) > 1e-6
    assert far(embedding, states, mask, dot + 1, codes) > 1e-6


# --- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.0, 3.0])
def test_drawing_follows_the_whole_models_probabilities(prior, scale):
    """Draw step by step with remembered keys; check each token against the model run whole."""
    said, null = words(4), words(4, seed=9)
    uniform = torch.rand(4, 1 + K, generator=gen(), dtype=torch.float64)
    codes = prior.quantise(prior.draw(said, null, scale=scale, uniform=uniform))
    dot = 3 + (uniform[:, 0] * 3).long()
    log_p = prior(*said, dot, codes).log_softmax(-1)
    if scale > 1:
        without = prior(*null, torch.full((4,), 6), codes).log_softmax(-1)
        log_p = without + scale * (log_p - without)
    edges = F.pad(log_p.softmax(-1).cumsum(-1), (1, 0))  # (4, K, M + 1)
    chosen = torch.stack([edges.gather(2, codes[..., None] + i) for i in (0, 1)])[..., 0]
    assert (chosen[0] <= uniform[:, 1:]).all() and (uniform[:, 1:] < chosen[1]).all()
    assert len(codes.unique()) > 5


def test_known_probabilities_are_drawn(prior):
    """A head that knows nothing but a table: shares of an even grid of numbers are that table."""
    table = torch.softmax(torch.randn(K, M, generator=gen(), dtype=torch.float64), -1)
    for p in prior.head[1].parameters():
        p.zero_()
    prior.bucket_bias.copy_(table.log())
    n = 4000
    grid = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].expand(n, 1 + K)
    said = [x[:1].expand(n, *x.shape[1:]) for x in words(1)]
    codes = prior.quantise(prior.draw(said, said, uniform=grid))
    for k in range(K):
        shares = codes[:, k].bincount(minlength=M) / n
        assert (shares - table[k]).abs().max() <= 1 / n + 1e-9


def test_the_dot_product_comes_from_the_top_half(prior, monkeypatch):
    seen = []
    look = prior.dot_embedding.forward
    monkeypatch.setattr(prior.dot_embedding, "forward", lambda i: (seen.append(i), look(i))[1])
    prior.draw(words(900), words(900), gen(), scale=2.0)
    drawn, null = seen[0].chunk(2)
    assert set(drawn.tolist()) == {3, 4, 5} and set(null.tolist()) == {6}
    assert (drawn.bincount()[3:] - 300).abs().max() < 70  # 5 standard deviations


def test_a_seed_decides(prior):
    a, b, c = (prior.draw(words(3), words(3), gen(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (3, D)


# --- folders and errors --------------------------------------------------------------------------


def test_saved_and_opened_it_answers_the_same(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    again = ARPrior.from_pretrained(tmp_path, dtype=torch.float64)
    codes, dot = torch.zeros(2, K, dtype=torch.int64), torch.tensor([0, 6])
    with torch.no_grad():
        assert torch.equal(again(*words(2), dot, codes), prior(*words(2), dot, codes))
    assert torch.equal(again.quantise(places()), prior.quantise(places()))


def test_errors(prior, tmp_path):
    with pytest.raises(ValueError, match="components is 13"):
        ARPriorConfig(2, 8, 2, D, N, components=13)
    with pytest.raises(ValueError, match="even number"):
        ARPriorConfig(2, 8, 2, D, N, components=3, dots=5)
    embedding, states, mask = words(1)
    with pytest.raises(ValueError, match=r"text_states have shape \(1, 6, 12\)"):
        prior.draw((embedding, states[:, 1:], mask), (), gen())
    with pytest.raises(ValueError, match="there are 1 pictures; expected at least 2"):
        prior.measure(places(1), places(1))
    with pytest.raises(ValueError, match="uniform has shape"):
        prior.draw(words(1), words(1), uniform=torch.rand(1, K))
    with pytest.raises(CheckpointError):
        ARPrior.from_pretrained(tmp_path)
