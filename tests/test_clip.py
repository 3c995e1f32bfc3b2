"""What holds for CLIP whatever the weights: who sees whom, and what is normalised."""

import pytest
import torch
from torch.nn import functional as F

from companion.attention import watch
from companion.clip import (
    CLIP,
    MEAN,
    STD,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    contrastive_loss,
    normalise,
)

TEXT = CLIPTextConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    eos_token_id=29,
)
VISION = CLIPVisionConfig(
    image_size=12,
    patch_size=4,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
)
CONFIG = CLIPConfig(TEXT, VISION, projection_dim=6)


@pytest.fixture
def clip(generator) -> CLIP:
    return CLIP.fresh(CONFIG, generator)


def ids() -> torch.Tensor:
    return torch.tensor([[28, 3, 4, 29, 0, 0], [28, 5, 29, 0, 0, 0]])


def test_a_token_sees_only_what_came_before(clip):
    """Change one token: no state before it moves, every state from it on does."""
    a, b = ids()[:1], ids()[:1].clone()
    b[0, 2] = 7
    moved = (clip.text_model(a).states - clip.text_model(b).states).abs().sum(-1)[0]
    assert (moved[:2] == 0).all() and (moved[2:] > 1e-6).all()


def test_padding_does_not_reach_the_embedding(clip):
    a, b = ids(), torch.where(ids() == 0, 11, ids())
    torch.testing.assert_close(clip.encode_text(a), clip.encode_text(b), rtol=0, atol=0)


def test_logits_are_cosines_over_temperature(clip, generator):
    pixels = torch.randn(3, 3, 12, 12, generator=generator)
    logits = clip(ids(), pixels)
    assert logits.shape == (3, 2)
    pictures, words = clip.encode_image(pixels), clip.encode_text(ids())
    one = F.cosine_similarity(pictures[2], words[1], dim=0) * clip.logit_scale.exp()
    torch.testing.assert_close(logits[2, 1], one)
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-3)


def test_contrastive_loss_closed_forms():
    assert contrastive_loss(torch.zeros(5, 5)).item() == pytest.approx(
        torch.tensor(5.0).log().item()
    )
    assert contrastive_loss(100 * torch.eye(4)).item() < 1e-6
    tilted = torch.tensor([[0.0, 3.0], [0.0, 0.0]])  # not symmetric: both ways count
    by_hand = (
        -torch.log_softmax(tilted, 1).diag().mean() - torch.log_softmax(tilted, 0).diag().mean()
    ) / 2
    torch.testing.assert_close(contrastive_loss(tilted), by_hand)


def test_attention_maps_when_asked(clip, generator):
    pixels = torch.randn(2, 3, 12, 12, generator=generator)
    plain = clip(ids(), pixels)
    with watch(clip, "self_attn") as looks:
        torch.testing.assert_close(clip(ids(), pixels), plain, rtol=0, atol=0)
    assert len(looks) == 4
    words = looks["text_model.encoder.layers.0.self_attn"].map
    assert words.shape == (2, 2, 6, 6)
    torch.testing.assert_close(words.sum(-1), torch.ones(2, 2, 6))
    assert (words.triu(1) == 0).all()
    assert looks["vision_model.encoder.layers.1.self_attn"].map.shape == (2, 2, 10, 10)
    assert not any(module.keep for module in looks.values())


def test_normalise_is_per_channel():
    pictures = torch.tensor(MEAN)[None, :, None, None].expand(2, 3, 4, 4)
    assert normalise(pictures).abs().max() < 1e-7
    torch.testing.assert_close(
        normalise(torch.ones(1, 3, 1, 1)).flatten(), (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    )


def test_wrong_shapes(clip):
    with pytest.raises(ValueError, match=r"\(2, 10\); expected \(B, N\) with N at most 9"):
        clip.encode_text(torch.full((2, 10), 29))
    with pytest.raises(ValueError, match="12, 12"):
        clip.encode_image(torch.zeros(1, 3, 8, 8))


def test_fresh_weights_depend_on_the_generator_alone():
    before = torch.get_rng_state()
    a, b = (CLIP.fresh(CONFIG, torch.Generator().manual_seed(4)) for _ in range(2))
    c = CLIP.fresh(CONFIG, torch.Generator().manual_seed(5))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.text_projection.weight, c.text_projection.weight)
    assert torch.equal(torch.get_rng_state(), before)
