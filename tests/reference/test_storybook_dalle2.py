"""The book's own DALL·E 2, trained: stock's unCLIP pipelines open its folder and draw the same."""

import pytest
import torch

from companion.dalle2 import DALLE2
from companion.judge import Judge
from companion.storybook import parse, render, sample
from reference.systems import exact, pipelines, quiet

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # stock's are deprecated
PROMPT = "a red house by the sea at dusk"


@pytest.fixture(scope="module")
def ours():
    return DALLE2.from_pretrained(
        "storybook", dtype=torch.float64, super_res_second=None, super_res_second_scheduler=None
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All of it, the second upsampler too, for which stock has no place."""
    whole = DALLE2.from_pretrained("storybook", dtype=torch.float64)
    return whole.save_pretrained(tmp_path_factory.mktemp("storybook"))


def stock(folder, kind: str):
    with quiet():
        cls = getattr(pipelines(), kind)
        pipe = cls.from_pretrained(folder, torch_dtype=torch.float64, local_files_only=True)
    return exact(pipe)


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def drawn(out) -> torch.Tensor:
    return torch.from_numpy(out.images).permute(0, 3, 1, 2)


def test_stock_draws_the_same_picture_from_words(ours, folder):
    pipe = stock(folder, "UnCLIPPipeline")
    with quiet():
        out = pipe(
            PROMPT, generator=gen(), output_type="np", decoder_guidance_scale=3.0,
            prior_guidance_scale=2.0,
        )  # fmt: skip
    mine = ours(PROMPT, generator=gen(), guidance_scale=3.0, prior_guidance_scale=2.0)
    assert mine.shape == (1, 3, 64, 64)
    assert (mine - drawn(out)).abs().max() < 1e-6  # stock's picture is float32
    seen = Judge.from_pretrained().read(mine.float())[0]
    said = parse(PROMPT)
    assert seen is not None and (seen.sky, seen.place) == (said.sky, said.place)


def test_stock_draws_the_same_variations(ours, folder):
    pipe = stock(folder, "UnCLIPImageVariationPipeline")
    scene = sample(1, gen())
    picture = render(scene, 64).double()
    place = ours.encode_image(picture)
    with quiet():
        out = pipe(
            image_embeddings=place, generator=gen(), output_type="np", decoder_guidance_scale=3.0
        )
        theirs = pipe.image_encoder(ours.feature_extractor(picture, 64)).image_embeds
    mine = ours.variations(picture, generator=gen(), guidance_scale=3.0)
    assert (mine - drawn(out)).abs().max() < 1e-6
    torch.testing.assert_close(place, theirs, rtol=0, atol=1e-9)
    seen = Judge.from_pretrained().read(mine.float())[0]
    assert seen is not None and seen.sky == scene[0].sky
