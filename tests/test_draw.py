"""``draw`` and ``check`` on the command line, with tiny systems of our own random weights."""

import json

import pytest
import torch
from PIL import Image
from test_cli import refused

from companion import __main__ as cli
from companion.autoencoder import Autoencoder, AutoencoderConfig
from companion.clip import CLIPText, CLIPTextConfig
from companion.schedule import Schedule
from companion.scheduler import Scheduler, SchedulerConfig
from companion.stable_diffusion import StableDiffusion
from companion.tokenizer import Tokenizer
from companion.unet import UNet, UNetConfig

SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    words = Tokenizer.train(["a red house by the sea"], size=530, context=12)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, eos_token_id=words.end_id,
    )  # fmt: skip
    unet = UNetConfig(
        sample_size=4, block_out_channels=(8, 8), cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderConfig(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    pipe = StableDiffusion(
        scheduler=Scheduler(
            Schedule.scaled_linear(), SchedulerConfig(set_alpha_to_one=False), SCHEDULER
        ),
        text_encoder=CLIPText.fresh(text, g),
        tokenizer=words,
        unet=UNet.fresh(unet, g),
        vae=Autoencoder.fresh(vae, g),
    )
    return pipe.save_pretrained(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_draw_writes_the_picture_of_its_seed(folder, capsys, tmp_path):
    words = ["draw", "a red house", "--model", str(folder), "--steps", "3", "--device", "cpu"]
    assert cli.main([*words, "--seed", "7", "--guidance", "2", "--negative", "sea"]) == 0
    said = capsys.readouterr()
    assert said.out == "picture.png: 'a red house', seed 7\n"
    assert "draw: 100%" in said.err and "3/3" in said.err, "the bar"
    drawn = StableDiffusion.from_pretrained(folder)(
        "a red house", steps=3, guidance_scale=2.0, negative_prompt="sea", seed=7
    )
    with Image.open(tmp_path / "picture.png") as image:
        assert image.mode == "RGB" and image.size == (8, 8)
        stored = torch.tensor(list(image.tobytes())).view(8, 8, 3)
    assert torch.equal(stored, (drawn[0] * 255).round().long().permute(1, 2, 0))


def test_a_grid_has_the_pictures_of_following_seeds(folder, capsys, tmp_path):
    words = ["draw", "house", "--model", str(folder), "--steps", "2", "--device", "cpu", "--quiet"]
    words += ["--sampler", "euler", "--height", "12", "--width", "10"]
    assert cli.main([*words, "--seed", "5", "--count", "3", "--out", "grid.png"]) == 0
    said = capsys.readouterr()
    assert said.out == "grid.png: 'house', seed 5 to 7\n" and said.err == ""
    assert cli.main([*words, "--seed", "7", "--out", "one.png"]) == 0
    with Image.open("grid.png") as grid, Image.open("one.png") as one:
        assert grid.size == (20, 24), "two rows of two"
        third = grid.crop((0, 12, 10, 24))
        assert max(abs(a - b) for a, b in zip(third.tobytes(), one.tobytes(), strict=True)) <= 1
        assert set(grid.crop((10, 12, 20, 24)).tobytes()) == {255}, "the place left over"


def test_without_a_seed_every_picture_is_new_and_can_be_drawn_again(folder, capsys):
    words = ["draw", "house", "--model", str(folder), "--steps", "2", "--quiet", "--device", "cpu"]
    said = []
    for _ in range(2):
        assert cli.main(words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    with open("picture.png", "rb") as file:
        before = file.read()
    assert cli.main([*words, "--seed", said[1].split()[-1]]) == 0
    with open("picture.png", "rb") as file:
        assert file.read() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: --model"),
        (["--model", "nowhere"], "There is no folder nowhere"),
        (["--model", "{}", "--out", "x.gif"], "ends in .png"),
        (["--model", "{}", "--steps", "5,5,5"], "--steps has 3 numbers"),
        (["--model", "{}", "--steps", "few"], "expected whole numbers"),
        (["--model", "{}", "--sampler", "dpm"], "sampler is 'dpm'"),
        (["--model", "{}", "--count", "0"], "--count is 0"),
        (["--model", "{}", "--seed", "-1"], "--seed is -1"),
        (["--model", "{}", "--height", "5"], "multiple of 2"),
        (["--model", "{}/unet"], "There is no file"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, tmp_path, words, said):
    words = [w.format(folder) for w in words]
    assert said in refused(capsys, "draw", "a house", *words, "--quiet")
    assert not list(tmp_path.glob("*.png"))


def test_a_prompt_too_long_is_cut_when_asked(folder, capsys):
    words = ["--model", str(folder), "--steps", "2", "--quiet", "--device", "cpu"]
    assert "truncate" in refused(capsys, "draw", "house " * 20, *words)
    assert cli.main(["draw", "house " * 20, *words, "--truncate"]) == 0


def test_check_opens_a_whole_system(folder, capsys, tmp_path):
    assert cli.main(["check", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: all is well\n"
    import shutil

    shutil.copytree(folder, tmp_path / "x")
    config = tmp_path / "x" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 12}))
    weights = tmp_path / "x" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cli.main(["check", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().out
    assert "misshapen" in said and "truncated" in said and "2 findings" in said


def test_check_sees_parts_that_do_not_fit(folder, capsys, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    assert cli.main(["check", str(tmp_path / "x")]) == 1
    assert "the tokenizer makes 77 tokens" in capsys.readouterr().out
