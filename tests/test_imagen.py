"""Imagen as a whole: what it takes, refuses and does (its numbers: reference/test_imagen.py)."""

import pytest
import tiny
import torch

import companion
from companion import checkpoints
from companion.checkpoints import CheckpointError
from companion.imagen import Imagen

FEW = {"steps": (3, 3), "seed": 1}


@pytest.fixture(scope="module")
def pipe():
    return tiny.imagen()


def test_it_draws_in_two_walks(pipe):
    seen = []
    texts = ["a red house", "the sea"]
    drawn = pipe(texts, callback=lambda i, t, x, x0: seen.append(x.shape), **FEW)
    assert drawn.shape == (2, 3, 16, 16) and drawn.min() >= 0 and drawn.max() <= 1
    assert seen == [(2, 3, 8, 8)] * 3 + [(2, 3, 16, 16)] * 3
    assert torch.equal(drawn, pipe(texts, **FEW))
    large = pipe("a red house", height=32, width=16, **FEW)
    assert large.shape == (1, 3, 32, 16)


def test_each_setting_changes_the_picture(pipe):
    usual = pipe("a red house", **FEW)
    for option in (
        {"guidance_scale": 1.0},
        {"super_res_guidance_scale": 8.0},
        {"thresholding": "static"},
        {"percentile": 0.5},
        {"augmentation": 100},
        {"negative_prompt": "the sea"},
        {"sampler": "ddim"},
    ):
        assert not torch.equal(usual, pipe("a red house", **FEW, **option)), option
    latents = (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16))
    same = [
        pipe("a red house", sampler="ddim", latents=latents, seed=k, steps=(3, 3), augmentation=0)
        for k in (1, 2)
    ]
    assert torch.equal(*same), "with the noise given and DDIM nothing is left to chance"


def test_pictures_of_one_prompt_have_generators_of_their_own(pipe):
    g = [torch.Generator().manual_seed(k) for k in (3, 4)]
    two = pipe("a red house", num_images_per_prompt=2, generator=g, steps=(3, 3))
    one = pipe("a red house", generator=torch.Generator().manual_seed(4), steps=(3, 3))
    torch.testing.assert_close(two[1:], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"steps": (3,)}, "expected 2 values, for base, upsampler"),
        ({"thresholding": "none"}, "'dynamic'"),
        ({"percentile": 1.5}, "percentile is 1.5"),
        ({"augmentation": 1000}, "augmentation is 1000"),
        ({"height": 18}, "height is 18; expected a multiple of 4"),
        ({"latents": (None,)}, "expected 2 values"),
        ({"negative_prompt": "x", "guidance_scale": 1, "super_res_guidance_scale": 1}, "nothing"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(pipe, how, why, monkeypatch):
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=why):
        pipe("a red house", **{"steps": (3, 3)} | how)


def test_parts_must_fit(pipe):
    parts = {name: getattr(pipe, name) for name in pipe.parts}
    with pytest.raises(ValueError, match="super_res has 3 channels in"):
        Imagen(**parts | {"super_res": pipe.unet})
    with pytest.raises(ValueError, match="unet looks at states|unet has"):
        Imagen(**parts | {"unet": pipe.super_res})


def test_a_saved_folder_draws_the_same_and_the_books_own_is_put_together(
    pipe, tmp_path, monkeypatch
):
    pipe.save_pretrained(tmp_path / "whole")
    assert Imagen.check(tmp_path / "whole") == []
    usual = pipe("a red house", **FEW)
    assert torch.equal(
        usual, companion.Imagen.from_pretrained(tmp_path / "whole")("a red house", **FEW)
    )
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match="Imagen is not shipped"):
        Imagen.from_pretrained("storybook")
    for name, part in (
        ("language-model", "text_encoder"), ("imagen", "unet"), ("imagen-upsampler", "super_res"),
    ):  # fmt: skip
        getattr(pipe, part).save_pretrained(tmp_path / name)
    pipe.tokenizer.save_pretrained(tmp_path / "language-model")
    assert torch.equal(usual, Imagen.from_pretrained("storybook")("a red house", **FEW))
