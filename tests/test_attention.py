"""Attention against its equation, written out place by place."""

import pytest
import torch
from torch.nn import functional as F

from companion.attention import (
    Attention,
    FeedForward,
    MultiHead,
    PictureAttention,
    TransformerBlock,
    mask_bias,
    watch,
)


def by_hand(q, k, v, heads):
    """softmax(q kT / sqrt d) v, one head and one query at a time."""
    out = torch.zeros_like(q)
    d = q.shape[-1] // heads
    for b in range(len(q)):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(q.shape[1]):
                scores = torch.stack([q[b, i, part] @ key / d**0.5 for key in k[b, :, part]])
                out[b, i, part] = scores.softmax(0) @ v[b, :, part]
    return out


def draw(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_equation(generator, heads):
    q, k, v = draw(generator, 2, 4, 6), draw(generator, 2, 5, 6), draw(generator, 2, 5, 6)
    torch.testing.assert_close(MultiHead(heads).attend(q, k, v), by_hand(q, k, v, heads))


def test_causal_is_a_mask_of_what_is_later(generator):
    q = draw(generator, 2, 4, 6)
    attention = MultiHead(2)
    bias = torch.zeros(4, 4, dtype=torch.float64).masked_fill(
        torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf")
    )
    torch.testing.assert_close(
        attention.attend(q, q, q, causal=True), attention.attend(q, q, q, bias=bias)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_kept_map_is_the_one_that_was_used(generator, causal):
    attention = MultiHead(2)
    attention.keep = True
    q, v = draw(generator, 2, 4, 6), draw(generator, 2, 4, 6)
    bias = None if causal else draw(generator, 2, 1, 1, 4)
    out = attention.attend(q, q, v, bias, causal)
    mixed = attention.map @ v.unflatten(-1, (2, 3)).transpose(1, 2)
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), out)
    assert not attention.map.requires_grad


def test_masked_tokens_are_as_good_as_absent(generator):
    look = PictureAttention(8, 2, context_width=3, groups=2).double()
    x, context = draw(generator, 2, 8, 3, 2), draw(generator, 2, 5, 3)
    mask = torch.tensor([[True, True, False, False, False]] * 2)
    bias = mask_bias(mask, torch.float64)[:, None, None]
    torch.testing.assert_close(look(x, context, bias), look(x, context[:, :2]))


def test_all_masked_looks_evenly_and_is_finite(generator):
    """Not -infinity: that would make NaN of it."""
    q = draw(generator, 1, 3, 4)
    out = MultiHead(1).attend(q, q, q, mask_bias(torch.zeros(1, 1, 1, 3), torch.float64))
    # -10000 swallows some of a float64's digits, but the scores still differ beneath it
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, MultiHead(1).attend(q, q, q), rtol=1e-9, atol=1e-9)


def test_order_of_places_is_carried_through(generator):
    """Attention has no idea of places: shuffle them, and the answers are shuffled the same way."""
    look = PictureAttention(8, 2, groups=2).double()
    x = draw(generator, 1, 8, 1, 6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(look(x)[..., order], look(x[..., order]))


def test_feed_forward_by_hand(generator):
    for gated in (False, True):
        ff = FeedForward(4, gated).double()
        x = draw(generator, 2, 3, 4)
        h = F.linear(x, ff.net[0].proj.weight, ff.net[0].proj.bias)
        h = h[..., :16] * F.gelu(h[..., 16:]) if gated else F.gelu(h)
        torch.testing.assert_close(ff(x), F.linear(h, ff.net[2].weight, ff.net[2].bias))


def test_names_follow_the_published_files():
    def names(block):
        return {n.split(".")[0] for n, _ in block.named_parameters()}

    assert names(TransformerBlock(8, 2, 6)) == {"norm1", "attn1", "norm2", "attn2", "norm3", "ff"}
    assert names(TransformerBlock(8, 2)) == {"norm1", "attn1", "norm3", "ff"}
    assert Attention(8, 2).to_q.bias is None and Attention(8, 2, bias=True).to_q.bias is not None


def test_watch_needs_something_to_watch_and_cleans_up():
    block = TransformerBlock(8, 2, 6)
    with pytest.raises(ValueError, match="ends in 'attn9'"), watch(block, "attn9"):
        pass
    with pytest.raises(RuntimeError), watch(block) as looks:
        raise RuntimeError
    assert len(looks) == 2 and not any(m.keep for m in looks.values())
