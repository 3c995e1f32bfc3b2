"""How pictures are prepared for CLIP: what a folder may say of it, and what is refused by name."""

import json

import pytest
import tiny
import torch

from companion.checkpoints import CheckpointError
from companion.clip import MEAN, STD
from companion.dalle2 import DALLE2
from companion.preparation import Preparation, scaled
from companion.stable_diffusion import StableDiffusion

OPENAI = {  # openai/clip-vit-large-patch14, as it was published in 2021
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
}  # fmt: skip


def opened(folder, stored: dict) -> Preparation:
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    return Preparation.from_pretrained(folder)


def test_old_and_new_files_say_the_same(tmp_path):
    old, new = opened(tmp_path, OPENAI), opened(tmp_path, Preparation.usual(224).stored)
    assert old.config.pixels == new.config.pixels == 224
    g = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, 3, 224, 224, generator=g)
    assert torch.equal(old(pictures, 224), new(pictures, 224))
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    torch.testing.assert_close(old(pictures, 224), (pictures - mean) / std)
    old.save_pretrained(tmp_path / "again")
    assert Preparation.from_pretrained(tmp_path / "again").stored == OPENAI


def test_colours_are_the_files(tmp_path):
    own = opened(tmp_path, OPENAI | {"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 1.0, 2.0]})
    grey = torch.full((1, 3, 224, 224), 0.5)
    assert own(grey, 224)[0, :, 0, 0].tolist() == [0.0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_center_crop": False}, "do_center_crop is false; this model implements only true"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"resample": 2}, "resample is 2; this model implements only 3"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ({"do_pad": True}, "do_pad is true"),
        ({"crop_size": 200}, "size is 224 and crop_size 200"),
        (
            {"size": {"longest_edge": 224}},
            "size is {'longest_edge': 224}; expected a num",
        ),
        ({"crop_size": {"height": 224, "width": 100}}, "cut off"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"do_flip": True}, "no setting 'do_flip'"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said) as error:
        opened(tmp_path, OPENAI | change)
    assert "preprocessor_config.json" in str(error.value)


@pytest.mark.parametrize("make", [lambda: tiny.stable_diffusion(seeing=True), tiny.dalle2])
def test_it_must_be_the_encoders(make, tmp_path):
    folder = make().save_pretrained(tmp_path)
    kind = DALLE2 if (folder / "prior").is_dir() else StableDiffusion
    path = folder / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps(Preparation.usual(16).stored))
    with pytest.raises(ValueError, match="makes pictures of 16 pixels, image_encoder takes 8"):
        kind.from_pretrained(folder)
    assert len(kind.check(folder)) == 1


def test_scaling_keeps_what_is_smooth():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64).contiguous()
    small = scaled(ramp, (16, 16))
    torch.testing.assert_close(small[0, 0, 0, 2:-2], ramp[0, 0, 0].view(16, 4).mean(1)[2:-2])
    assert scaled(torch.ones(1, 3, 8, 8), (16, 12)).shape == (1, 3, 16, 12)
