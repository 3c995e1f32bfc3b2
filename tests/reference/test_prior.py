"""The prior equals diffusers' PriorTransformer, the projection UnCLIPTextProjModel."""

import random

import pytest
import torch

from companion.prior import Prior, PriorConfig, TextProjection, TextProjectionConfig
from reference.oracle import agree, distance, noise, pair


def draw(seed: int) -> dict:
    r = random.Random(seed)
    return {
        "num_attention_heads": r.choice([1, 2, 3]),
        "attention_head_dim": r.choice([4, 6]),
        "num_layers": r.choice([1, 2, 3]),
        "embedding_dim": r.choice([5, 8, 12]),
        "num_embeddings": r.choice([4, 7, 10]),
    }


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_stock(stock, seed):
    config = draw(seed)
    ours, theirs = pair(Prior(PriorConfig(**config)), stock.PriorTransformer(**config), seed)
    d, n = config["embedding_dim"], config["num_embeddings"]
    t = torch.tensor([0, 999, 41])
    # One caption full, one short, and one of nothing at all (stock then looks evenly everywhere).
    mask = torch.arange(n)[None] < torch.tensor([[n], [3], [0]])
    mask = None if seed == 3 else mask
    inputs = {
        "x": noise(seed, 3, d),
        "words": noise(seed + 1, 3, d),
        "states": noise(seed + 2, 3, n, d),
    }
    agree(
        ours,
        theirs,
        lambda x, words, states: (ours(x, t, words, states, mask),),
        lambda x, words, states: (
            theirs(x, t, words, states, attention_mask=mask).predicted_image_embedding,
        ),
        inputs,
    )


def test_scales_as_stock_does(stock):
    config = draw(0)
    ours, theirs = pair(Prior(PriorConfig(**config)), stock.PriorTransformer(**config), 1)
    x = noise(3, 4, config["embedding_dim"])
    assert distance(ours.restore(x), theirs.post_process_latents(x)) < 1e-12
    assert distance(ours.rescale(ours.restore(x)), x) < 1e-9


def test_fresh_prior_does_not_map_everything_to_zero():
    """Stock starts ``clip_std`` at 0; ours at 1, so that an unset one changes nothing."""
    model = Prior(PriorConfig(**draw(0)))
    x = torch.randn(2, draw(0)["embedding_dim"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.restore(x), x)


@pytest.mark.parametrize("seed", range(4))
def test_projection_equal_to_stock(stock, seed):
    r = random.Random(seed)
    config = {
        "clip_extra_context_tokens": r.choice([1, 3, 4]),
        "clip_embeddings_dim": r.choice([6, 8]),
        "time_embed_dim": r.choice([10, 16]),
        "cross_attention_dim": r.choice([5, 12]),
    }
    ours, theirs = pair(
        TextProjection(TextProjectionConfig(**config)), stock.UnCLIPTextProjModel(**config), seed
    )
    d = config["clip_embeddings_dim"]

    def run_ours(picture, words, states):
        # Guidance is the caller's: no picture for the first half of the batch, one for the second.
        both = torch.cat([ours.no_image(len(picture)), picture])
        return ours(both, words, states)

    def run_theirs(picture, words, states):
        return theirs(
            image_embeddings=picture,
            prompt_embeds=words,
            text_encoder_hidden_states=states,
            do_classifier_free_guidance=True,
        )

    inputs = {
        "picture": noise(seed, 2, d),
        "words": noise(seed + 1, 4, d),
        "states": noise(seed + 2, 4, 5, d),
    }
    agree(ours, theirs, run_ours, run_theirs, inputs)
