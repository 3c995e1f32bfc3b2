"""What the recipes of DALL·E 2 train, put together: one folder, which stock's pipelines open."""

import json

import pytest
import tiny_clip
import torch

from companion import checkpoints
from companion.adm import ADMConfig, ADMUNet
from companion.dalle2 import DALLE2
from companion.recipes import decoder as decoders
from companion.recipes import encoded, priors, upsamplers
from companion.recipes.decoder import Decoder, assemble
from companion.recipes.encoded import Encoded
from companion.storybook import render, sample
from reference.oracle import randomise
from reference.systems import exact, pipelines, quiet

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # stock's are deprecated
TEXTS = ["a red house by the sea at dusk", "two cats"]
STEPS = (4, 3, 3)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tiny_clip.write(tmp_path_factory.mktemp("weights"))
        patch.setattr(checkpoints, "WEIGHTS", folder)
        patch.setattr(encoded, "MEASURED", 128)
        yield Encoded(scenes=128)


@pytest.fixture(scope="module")
def trained(pool):
    """The recipes' own networks, every parameter random; the spread of places as measured."""
    prior = priors.diffusion_prior(pool)
    mean, std = prior.clip_mean.double().clone(), prior.clip_std.double().clone()
    decoder = decoders.build(pool)
    upsampler = ADMUNet(upsamplers.FIRST.config)
    for k, model in enumerate((prior, decoder.unet, decoder.text_proj, upsampler)):
        randomise(model, k).requires_grad_(False)
    prior.clip_mean.data, prior.clip_std.data = mean, std
    for part in (pool.clip.clip,):
        part.double()
    yield prior, decoder, upsampler
    pool.clip.clip.float()


@pytest.fixture(scope="module")
def ours(pool, trained):
    system = assemble(pool.clip, *trained)
    for part in (system.text_encoder, system.image_encoder):
        part.double()
    return system


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    return ours.save_pretrained(tmp_path_factory.mktemp("system"))


def stock(folder, kind):
    with quiet():
        cls = getattr(pipelines(), kind)
        pipe = cls.from_pretrained(folder, torch_dtype=torch.float64, local_files_only=True)
    return exact(pipe)


def gen(seed=3):
    return torch.Generator().manual_seed(seed)


def counts(*steps):
    names = ("prior", "decoder", "super_res")[-len(steps) :]
    return {f"{n}_num_inference_steps": k for n, k in zip(names, steps, strict=True)}


def test_stock_draws_the_same_picture_from_words(ours, folder):
    pipe = stock(folder, "UnCLIPPipeline")
    with quiet():
        out = pipe(
            TEXTS, generator=gen(), output_type="np", decoder_guidance_scale=3.0,
            prior_guidance_scale=2.0, **counts(*STEPS),
        )  # fmt: skip
    theirs = torch.from_numpy(out.images).permute(0, 3, 1, 2)
    mine = ours(TEXTS, steps=STEPS, guidance_scale=3.0, prior_guidance_scale=2.0, generator=gen())
    assert mine.shape == (2, 3, 64, 64) and mine.std() > 0.05
    assert (mine - theirs).abs().max() < 1e-6


def test_stock_draws_the_same_variations(ours, folder, tmp_path):
    """The variation pipeline opens the same folder; a picture prepared by us goes into both."""
    pipe = stock(folder, "UnCLIPImageVariationPipeline")
    picture = render(sample(1, gen()), 64).double()
    place = ours.encode_image(picture)
    with quiet():
        out = pipe(
            image_embeddings=place, generator=gen(), output_type="np", decoder_guidance_scale=3.0,
            **counts(3, 3),
        )  # fmt: skip
    theirs = torch.from_numpy(out.images).permute(0, 3, 1, 2)
    mine = ours.variations(picture, steps=(3, 3), guidance_scale=3.0, generator=gen())
    assert (mine - theirs).abs().max() < 1e-6
    with quiet():
        ready = ours.feature_extractor(picture, 64)
        theirs = pipe.image_encoder(ready).image_embeds
    torch.testing.assert_close(place, theirs, rtol=0, atol=1e-9)


def test_ours_opens_its_own_folder(ours, folder):
    again = DALLE2.from_pretrained(folder, dtype=torch.float64)
    options = {"steps": STEPS, "seed": 1}
    assert (again(TEXTS, **options) - ours(TEXTS, **options)).abs().max() < 1e-9
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPPipeline" and "image_encoder" in index


def test_what_the_recipes_draw_is_what_the_system_draws(pool, trained, ours, monkeypatch):
    """Prior, decoder and upsampler, each by its recipe's own function, one after the other."""
    prior, decoder, upsampler = trained
    for module, steps in zip((priors, decoders, upsamplers), STEPS, strict=True):
        monkeypatch.setattr(module, "STEPS", steps)
    seen = {}
    for name in ("draw_embedding", "draw_small", "draw_large"):
        draw = getattr(ours, name)

        def record(*a, draw=draw, name=name, **k):
            seen[name] = draw(*a, **k)
            return seen[name]

        monkeypatch.setattr(ours, name, record)
    ours(TEXTS, steps=STEPS, guidance_scale=3.0, prior_guidance_scale=2.0, generator=gen())

    noise = gen()  # one source through all three walks, float64 as the system draws
    double = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: double(*a, **{"dtype": torch.float64, **k}))
    words, null = pool.clip.read(TEXTS), pool.clip.read(["", ""])
    place = priors.draw_by_diffusion(prior, words, null, noise, 2.0)
    torch.testing.assert_close(place, seen["draw_embedding"], rtol=0, atol=1e-9)
    small = decoders.decode(decoder, place, words, null, noise, 3.0)
    torch.testing.assert_close(2 * small - 1, seen["draw_small"], rtol=0, atol=1e-9)
    large = upsamplers.upsample(upsampler, small, noise)
    wanted = (seen["draw_large"] + 1) / 2
    torch.testing.assert_close(large, wanted.clamp(0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["prior", "prior-ar"])
def test_both_priors_are_of_equal_size(name):
    """On a CLIP as large as the shipped one, whether places fill its 17 components or most."""
    from companion.prior import Prior, PriorConfig
    from companion.prior_ar import ARPrior, ARPriorConfig

    shape = (priors.HEADS, priors.HEAD, priors.LAYERS, 128, 40)

    def trained_numbers(model) -> int:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    one = trained_numbers(Prior(PriorConfig(*shape)))
    for k in (17, 110):
        other = trained_numbers(ARPrior(ARPriorConfig(*shape, components=k)))
        assert abs(other / one - 1) < 0.03, k


def test_a_decoder_is_two_folders_for_stock(pool, trained, tmp_path):
    from reference.oracle import stock as classes

    decoder: Decoder = trained[1]
    decoder.save_pretrained(tmp_path)
    with quiet():
        unet = classes().UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
        told = classes().UnCLIPTextProjModel.from_pretrained(
            tmp_path, subfolder="text_proj", torch_dtype=torch.float64
        )
    assert unet.config.class_embed_type == "identity" and unet.config.sample_size == 16
    assert told.config.clip_extra_context_tokens == 4
    assert isinstance(decoder.unet.config, ADMConfig)
