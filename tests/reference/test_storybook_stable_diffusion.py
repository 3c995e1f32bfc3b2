"""The book's own Stable Diffusion, trained: stock's three pipelines open its folder and draw it."""

import pytest
import torch

from companion import checkpoints
from companion.judge import Judge
from companion.repainting import half
from companion.stable_diffusion import StableDiffusion
from companion.storybook import parse, render, sample
from reference.systems import pipelines, quiet

MISSING = [n for n in StableDiffusion.made_of if not (checkpoints.WEIGHTS / n).is_dir()]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # stock warns of much
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not shipped with this companion: {MISSING}"),
]
PROMPT = "a red house by the sea at dusk"
HOW = {"num_inference_steps": 25, "guidance_scale": 4.0, "output_type": "np"}


@pytest.fixture(scope="module")
def ours():
    return StableDiffusion.from_pretrained("storybook", dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    return ours.save_pretrained(tmp_path_factory.mktemp("storybook"))


@pytest.fixture(scope="module")
def picture():
    """Not the prompt's: a scene of its own."""
    return render(sample(1, torch.Generator().manual_seed(4), things=(1,)), 64).double()


def stock(folder, kind: str, table: torch.Tensor):
    """One of stock's pipelines, with our float64 table of noise instead of its own."""
    with quiet():
        cls = getattr(pipelines(), kind)
        pipe = cls.from_pretrained(folder, torch_dtype=torch.float64, local_files_only=True)
    pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod = table, table[0]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(mine: torch.Tensor, out) -> None:
    theirs = torch.from_numpy(out.images).permute(0, 3, 1, 2)
    assert mine.shape == theirs.shape == (1, 3, 64, 64) and theirs.std() > 0.05
    assert (mine - theirs).abs().max() < 1e-6  # stock's picture is float32


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(9)


@pytest.mark.parametrize("negative", [None, "at night"])
def test_stock_draws_the_same_picture_from_words(ours, folder, negative):
    pipe = stock(folder, "StableDiffusionPipeline", ours.scheduler.schedule.alphas_cumprod)
    with quiet():
        out = pipe(PROMPT, generator=gen(), negative_prompt=negative, **HOW)
    mine = ours(PROMPT, steps=25, guidance_scale=4.0, negative_prompt=negative, generator=gen())
    same(mine, out)
    seen, said = Judge.from_pretrained().read(mine.float())[0], parse(PROMPT)
    assert seen is not None and (seen.sky, seen.place) == (said.sky, said.place)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_stock_starts_from_a_picture_alike(ours, folder, picture, strength):
    pipe = stock(folder, "StableDiffusionImg2ImgPipeline", ours.scheduler.schedule.alphas_cumprod)
    how = {"image": picture, "strength": strength}
    with quiet():
        out = pipe(PROMPT, generator=gen(), **how, **HOW)
    same(ours(PROMPT, steps=25, guidance_scale=4.0, generator=gen(), **how), out)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_stock_repaints_alike(ours, folder, picture, strength):
    pipe = stock(folder, "StableDiffusionInpaintPipeline", ours.scheduler.schedule.alphas_cumprod)
    how, mask = {"image": picture, "strength": strength}, half("left").double()
    with quiet():
        out = pipe(PROMPT, generator=gen(), mask_image=mask, height=64, width=64, **how, **HOW)
    mine = ours(PROMPT, steps=25, guidance_scale=4.0, generator=gen(), mask=mask, **how)
    same(mine, out)
    pasted = ours(
        PROMPT, steps=25, guidance_scale=4.0, generator=gen(), mask=mask, paste=True, **how
    )
    kept = (mask < 0.5).expand_as(mine)
    assert torch.equal(pasted[kept], picture[kept]) and torch.equal(pasted[~kept], mine[~kept])


def test_stock_looks_at_a_picture_alike(ours, folder, picture):
    """It has no door for this; the states of a picture go where those of words go."""
    pipe = stock(folder, "StableDiffusionPipeline", ours.scheduler.schedule.alphas_cumprod)
    states = ours.encode_picture_prompts(picture)
    with quiet():
        theirs = pipe.image_encoder.vision_model(ours.feature_extractor(picture, 64))
        theirs = pipe.image_encoder.vision_model.post_layernorm(theirs.last_hidden_state)
        out = pipe(prompt_embeds=states, generator=gen(), **HOW | {"guidance_scale": 1.0})
    torch.testing.assert_close(states, theirs, rtol=0, atol=1e-9)
    same(ours(image_prompt=picture, steps=25, guidance_scale=1.0, generator=gen()), out)
