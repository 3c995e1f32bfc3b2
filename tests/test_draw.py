"""``draw`` and ``check`` on the command line, with tiny systems of our own random weights."""

import json
import shutil

import pytest
import tiny
import torch
from PIL import Image
from test_cli import refused

from companion import __main__ as cli
from companion import checkpoints, examination, scheduler
from companion.dalle2 import DALLE2
from companion.stable_diffusion import StableDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.stable_diffusion().save_pretrained(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """DALL·E 2 with both upsamplers."""
    return tiny.dalle2().save_pretrained(tmp_path_factory.mktemp("dalle2"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_draw_writes_the_picture_of_its_seed(folder, capsys, tmp_path):
    words = ["draw", "a red house", "--model", str(folder), "--steps", "3", "--device", "cpu"]
    assert cli.main([*words, "--seed", "7", "--guidance", "2", "--negative", "sea"]) == 0
    said = capsys.readouterr()
    assert said.out == "picture.png: 'a red house', seed 7\n"
    assert "latents: 100%" in said.err and "3/3" in said.err, "the bar"
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


def test_dalle2_draws_in_four_walks(large, capsys, tmp_path):
    words = ["draw", "a red house", "--model", str(large), "--steps", "2,3,2,4", "--device", "cpu"]
    assert cli.main([*words, "--seed", "7", "--guidance", "2"]) == 0
    said = capsys.readouterr()
    assert said.out == "picture.png: 'a red house', seed 7\n" and "11/11" in said.err
    drawn = DALLE2.from_pretrained(large)(
        "a red house", steps=(2, 3, 2, 4), guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(7)],
    )  # fmt: skip
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (32, 32)
        stored = torch.tensor(list(image.tobytes())).view(32, 32, 3)
    assert torch.equal(stored, (drawn[0] * 255).round().long().permute(1, 2, 0))
    said = refused(capsys, *words[:4], "--steps", "2,2,2")
    assert "takes 4, for prior, decoder, upsampler, second upsampler" in said


def test_the_books_own_go_by_their_names(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    words = ["draw", "house", "--device", "cpu", "--seed", "1", "--model"]
    for name in ("stable-diffusion", "dalle2"):
        assert "is not shipped with this companion" in refused(capsys, *words, name)
    tiny.storybook(tmp_path / "weights")
    assert "takes 4, for prior" in refused(capsys, *words, "dalle2", "--steps", "2")
    assert cli.main([*words, "dalle2", "--steps", "2,2,2,2"]) == 0
    assert "second upsampler: 100%" in capsys.readouterr().err, "the bar tells which stage runs"
    assert (tmp_path / "picture.png").is_file()


def test_the_books_own_are_asked_as_in_their_examination(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    tiny.storybook(tmp_path / "weights")
    words = ["draw", "house", "--device", "cpu", "--seed", "1", "--model", "dalle2", "--quiet"]
    drawn = {}
    for scale in ((), ("--guidance", "3"), ("--guidance", "8")):
        assert cli.main([*words, "--steps", "2,2,2,2", *scale]) == 0
        drawn[scale] = (tmp_path / "picture.png").read_bytes()
    usual, three, eight = drawn.values()
    assert usual == three != eight and examination.DALLE2_GUIDANCE == 3


def test_a_folder_that_asks_for_pndm_says_what_draws(folder, tmp_path, caplog, capsys):
    scheduler._say_no_pndm.cache_clear()
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "scheduler" / "scheduler_config.json"
    stored = json.loads(path.read_text()) | {"_class_name": "PNDMScheduler"}
    path.write_text(json.dumps(stored))
    words = ["draw", "house", "--model", "x", "--quiet", "--device", "cpu", "--steps", "2"]
    assert cli.main([*words, "--sampler", "euler"]) == 0 and not caplog.records
    assert cli.main(words) == 0 and "DDIM draws instead" in caplog.text
    assert caplog.records[0].levelname == "WARNING", "which logging sends to stderr"
    scheduler._say_no_pndm.cache_clear()


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
    shutil.copytree(folder, tmp_path / "x")
    config = tmp_path / "x" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 12}))
    weights = tmp_path / "x" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cli.main(["check", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().out
    assert "misshapen" in said and "truncated" in said and "2 findings" in said


def test_check_sees_parts_that_do_not_fit(folder, capsys, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    assert cli.main(["check", str(tmp_path / "x")]) == 1
    assert "the tokenizer makes 77 tokens" in capsys.readouterr().out


def test_check_knows_every_part_of_dalle2(large, capsys, tmp_path):
    assert cli.main(["check", str(large)]) == 0
    assert capsys.readouterr().out == f"{large}: all is well\n"
    shutil.copytree(large, tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "super_res_second_scheduler")
    weights = tmp_path / "x" / "image_encoder" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert cli.main(["check", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().out
    assert "There is no folder" in said and "altered" in said and "2 findings" in said
