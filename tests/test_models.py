"""What holds for the generators whatever the weights: shapes, fresh starts, wrong inputs."""

import pytest
import torch

from companion.adm import CROSS, PLAIN, SELF, ADMConfig, ADMUNet
from companion.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from companion.embeddings import timestep_embedding
from companion.prior import Prior, PriorConfig, TextProjection, TextProjectionConfig
from companion.resnet import Downsample, ResnetBlock, UpStage
from companion.unet import UNet, UNetConfig

UNET = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=6,
    attention_head_dim=2,
    norm_num_groups=4,
)
ADM = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
PIXELS = ADMConfig(
    down_block_types=(PLAIN[0], PLAIN[0]),
    up_block_types=(PLAIN[1], PLAIN[1]),
    num_class_embeds=10,
    **ADM,
)
DECODER = ADMConfig(
    down_block_types=(PLAIN[0], CROSS[0]),
    up_block_types=(CROSS[1], PLAIN[1]),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    cross_attention_dim=6,
    class_embed_type="identity",
    **ADM,
)
VAE = AutoencoderConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
)


def test_timestep_embedding_by_hand():
    x = timestep_embedding(torch.tensor([0.0, 2.5]), 4, torch.zeros(2, 1, dtype=torch.float64))
    assert x.dtype == torch.float64
    torch.testing.assert_close(x[0], torch.tensor([1.0, 1.0, 0.0, 0.0]).double())
    wanted = torch.tensor([2.5, 0.025])
    torch.testing.assert_close(x[1], torch.cat([wanted.cos(), wanted.sin()]).double())
    one, many = timestep_embedding(3, 8, x), timestep_embedding(torch.tensor([3, 3]), 8, x)
    assert torch.equal(one, many)
    with pytest.raises(ValueError, match="one number or"):
        timestep_embedding(torch.tensor([1, 2, 3]), 4, torch.zeros(2))


@pytest.mark.parametrize("config", [UNET, PIXELS, DECODER])
def test_a_fresh_generator_says_nothing(generator, config):
    """The last layer starts at zero, and every branch but the first: training adds what helps."""
    if config is UNET:
        model = UNet.fresh(config, generator)
        out = model(torch.randn(2, 4, 7, 5, generator=generator), 3, torch.zeros(2, 5, 6))
        assert out.shape == (2, 4, 7, 5)
    else:
        model = ADMUNet.fresh(config, generator)
        context = torch.zeros(2, 5, 6) if config.looks_at_text else None
        vector = torch.zeros(2, 32) if config.looks_at_text else torch.tensor([1, 9])
        out = model(torch.randn(2, 3, 8, 4, generator=generator), 3, context, vector)
        assert out.shape == (2, 3, 8, 4)
    assert (out == 0).all()


def test_a_fresh_residual_block_is_the_identity(generator):
    block = ResnetBlock(8, 8, 16, groups=4)
    x = torch.randn(2, 8, 4, 4, generator=generator)
    assert torch.equal(block(x, torch.randn(2, 16, generator=generator)), x)


def test_sizes_round_as_published():
    x = torch.zeros(1, 4, 7, 8)
    assert Downsample(4)(x).shape[2:] == (4, 4)  # U-Net: up
    assert Downsample(4, all_round=False)(x).shape[2:] == (3, 4)  # autoencoder: down


def test_the_way_up_takes_skips_from_the_end():
    class Mark(torch.nn.Module):
        def forward(self, h, temb):
            return h.sum(1, keepdim=True)

    seen = [torch.full((1, 1, 2, 2), float(i)) for i in (1, 10, 100)]
    stage = UpStage([Mark(), Mark()], [], None)
    out = stage(torch.zeros(1, 1, 2, 2), seen)
    assert out.flatten()[0] == 110 and len(seen) == 1


def test_added_tokens_change_the_picture_and_their_mask_works(generator):
    model = ADMUNet.fresh(DECODER, generator)
    for p in model.parameters():  # wake up what starts at zero
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    x, vector = (
        torch.randn(2, 3, 8, 4, generator=generator),
        torch.randn(2, 32, generator=generator),
    )
    context = torch.randn(2, 5, 6, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 2)
    a = model(x, 3, context, vector, mask)
    torch.testing.assert_close(a, model(x, 3, context[:, :2], vector))
    assert (a - model(x, 3, context, vector)).abs().max() > 1e-4


def test_posterior_closed_forms(generator):
    p = Posterior(torch.full((1, 2, 3, 3), 1.0), torch.zeros(1, 2, 3, 3))
    assert p.kl().item() == pytest.approx(9.0)  # 18 values, mean 1, std 1: half each
    p = Posterior(
        torch.zeros(1, 1, 200, 200), torch.full((1, 1, 200, 200), 2 * torch.tensor(3.0).log())
    )
    assert p.std.mean().item() == pytest.approx(3.0)
    assert p.sample(generator).std().item() == pytest.approx(3.0, rel=0.02)


def test_autoencoder_shapes(generator):
    model = Autoencoder.fresh(VAE, generator)
    assert model.factor == 2
    p = model.encode(torch.zeros(2, 3, 8, 6))
    assert p.mean.shape == p.std.shape == (2, 4, 4, 3)
    assert model.decode(p.mean).shape == model(torch.zeros(2, 3, 8, 6)).shape == (2, 3, 8, 6)


def test_prior_is_causal_only_with_a_mask(generator):
    """With a mask, the answer sees all that is not padding, and only that."""
    model = Prior.fresh(PriorConfig(2, 4, 2, 5, 6), generator)
    args = [torch.randn(s, generator=generator) for s in ((2, 5), (2, 5), (2, 6, 5))]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    a = model(args[0], 3, args[1], args[2], mask)
    args[2][:, 3:] += 1
    assert torch.equal(a, model(args[0], 3, args[1], args[2], mask))
    args[2][:, :3] += 1
    assert (a - model(args[0], 3, args[1], args[2], mask)).abs().max() > 1e-6
    assert (a - model(args[0], 3, args[1], args[2])).abs().max() > 1e-6


def test_projection_shapes(generator):
    model = TextProjection.fresh(TextProjectionConfig(16, 6, 4, 5), generator)
    context, added = model(model.no_image(2), torch.zeros(2, 5), torch.zeros(2, 7, 5))
    assert context.shape == (2, 11, 6) and added.shape == (2, 16)


def test_wrong_inputs_are_named():
    x = torch.zeros(2, 4, 8, 8)
    unet = UNet(UNET)
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\)"):
        unet(torch.zeros(2, 3, 8, 8), 1, torch.zeros(2, 5, 6))
    with pytest.raises(ValueError, match=r"expected \(2, tokens, 6\)"):
        unet(x, 1, torch.zeros(1, 5, 6))
    pixels, decoder = ADMUNet(PIXELS), ADMUNet(DECODER)
    with pytest.raises(ValueError, match="expected none"):
        pixels(torch.zeros(2, 3, 8, 8), 1, torch.zeros(2, 5, 6), torch.zeros(2).long())
    with pytest.raises(ValueError, match="embedding is missing"):
        pixels(torch.zeros(2, 3, 8, 8), 1)
    with pytest.raises(ValueError, match="context has shape None"):
        decoder(torch.zeros(2, 3, 8, 8), 1, None, torch.zeros(2, 32))
    with pytest.raises(ValueError, match="multiples of 2"):
        pixels(torch.zeros(2, 3, 9, 8), 1, embedding=torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"text_states have shape"):
        x = torch.zeros(1, 5)
        Prior(PriorConfig(1, 4, 1, 5, 6))(x, 1, x, torch.zeros(1, 7, 5))
    vae = Autoencoder(VAE)
    with pytest.raises(ValueError, match="expected"):
        vae.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="expected"):
        vae.decode(torch.zeros(1, 3, 4, 4))


def test_configs_that_make_no_sense():
    plain = {"down_block_types": (PLAIN[0],) * 2, "up_block_types": (PLAIN[1],) * 2, **ADM}
    for change, match in (
        ({"cross_attention_dim": 3}, "cross_attention_dim is 3"),
        ({"down_block_types": (SELF[0],) * 2}, "only 'resnet'"),
        ({"down_block_types": (CROSS[0],) * 2}, "block types"),
        ({"down_block_types": (PLAIN[0],)}, "expected 2"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim"),
        ({"attention_head_dim": (4, 4, 4)}, "attention_head_dim"),
    ):
        with pytest.raises(ValueError, match=match):
            ADMConfig(**plain | change)
    # stock would round the heads down and fit no weights; on the way up it counts from the top
    attends = {"down_block_types": (PLAIN[0], SELF[0]), "up_block_types": (SELF[1], PLAIN[1])}
    attends |= {"block_out_channels": (8, 12), "downsample_type": "resnet"}
    attends |= {"upsample_type": "resnet"}
    ADMConfig(**plain | attends | {"attention_head_dim": (6, 4)})
    for head in (8, (5, 4), (4, 5)):
        with pytest.raises(ValueError, match="12 channels that attend"):
            ADMConfig(**plain | attends | {"attention_head_dim": head})
