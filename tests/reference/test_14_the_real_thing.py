"""Chapter 14's cells that run only when asked, asked here: on folders of the published layout.

The weights are random and the widths small; keys, names and files are those of 2022. The cells'
own code runs, with the folder put where a reader would put it.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from companion import DALLE2, StableDiffusion
from reference import published
from reference.oracle import distance
from reference.systems import (
    SD,
    SD_INDEX,
    SD_SCHEDULER,
    karlo,
    pipelines,
    stable_diffusion,
    text_config,
    tokenizer,
    write_karlo,
    write_published,
)

CHAPTER = Path(__file__).parents[2] / "book" / "14-the-real-thing.ipynb"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the stock pipelines warn of much
]
NAMES = {"FOLDER": "CompVis/stable-diffusion-v1-4", "KARLO": "kakaobrain/karlo-v1-alpha"}
ASKED = ("yours-draw", "yours-compare", "yours-karlo")


@pytest.fixture(scope="module")
def cells():
    """The code of the chapter, by the names of its cells."""
    notebook = json.loads(CHAPTER.read_text(encoding="utf-8"))
    return {c["id"]: "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"}


@pytest.fixture
def reader(cells):
    """What the chapter has defined when a reader comes to these cells, and what they show."""
    names = {"shown": []}
    names["display"] = names["shown"].append
    for needed in ("imports", "quiet", "stock", "compare"):
        exec(cells[needed], names)
    return names


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, words = tmp_path_factory.mktemp("published"), tokenizer()
    pipelines()
    configs = SD | {"text_encoder": text_config(published.SD_TEXT, words, 24)}
    parts = stable_diffusion()
    sd = write_published(root / "sd", SD_INDEX, configs, parts, {"scheduler": SD_SCHEDULER}, words)
    # The two parts that a published folder has and this book does not open.
    for name in ("safety_checker", "feature_extractor"):
        (sd / name).mkdir()
        (sd / name / "config.json").write_text("{}")
    return {"FOLDER": sd, "KARLO": write_karlo(root / "karlo", karlo(), images=False)}


def asked(code: str, folders: dict[str, Path]) -> str:
    """A cell as a reader would run it, with their folder in it."""
    for name, folder in folders.items():
        code = re.sub(rf"(?m)^{name} = None.*$", f"{name} = {str(folder)!r}", code)
    return code


def test_nothing_happens_unasked(cells, reader, capsys, monkeypatch):
    def no(*_args, **_options):
        raise AssertionError("a folder was opened")

    monkeypatch.setattr(StableDiffusion, "from_pretrained", no)
    monkeypatch.setattr(DALLE2, "from_pretrained", no)
    for name in ASKED:
        exec(cells[name], reader)
        assert "is None" in capsys.readouterr().out
    assert not reader["shown"]
    for name, hub in NAMES.items():  # the cell says what it would take
        assert any(re.search(rf'(?m)^{name} = None  # or "{hub}"', cells[c]) for c in ASKED)


def test_a_reader_draws_with_their_own_folder(cells, reader, folders):
    exec(asked(cells["yours-draw"], folders), reader)
    assert len(reader["shown"]) == 1
    assert reader["picture"].shape == (1, 3, 32, 32)
    again = StableDiffusion.from_pretrained(folders["FOLDER"])
    prompt = re.search(r'pipe\("(.*?)"', cells["yours-draw"])[1]
    assert torch.equal(reader["picture"], again(prompt, steps=20, seed=14))


def test_a_reader_compares_with_diffusers(cells, reader, folders, capsys):
    reader["FOLDER"] = folders["FOLDER"]
    exec(cells["yours-compare"], reader)
    said = float(re.search(r"difference of any pixel: (\S+)", capsys.readouterr().out)[1])
    assert len(reader["shown"]) == 1 and 0 < said < 1e-4
    a, b = reader["draw_both"](folders["FOLDER"])  # the same function in float64
    assert distance(a, b) < 1e-9


def test_the_comparison_notices_a_folder_that_was_altered(reader, folders, tmp_path):
    """Stock draws from one folder and ours from another, which differs in one weight."""
    a, _ = reader["draw_both"](folders["FOLDER"])
    path = folders["FOLDER"] / "unet" / "diffusion_pytorch_model.safetensors"
    kept = path.read_bytes()
    tensors = load_file(path)
    tensors["conv_in.weight"][0, 0, 0, 0] += 1e-3
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        _, b = reader["draw_both"](folders["FOLDER"])
    finally:
        path.write_bytes(kept)
    assert distance(a, b) > 1e-6


def test_a_reader_draws_with_karlo(cells, reader, folders):
    exec(asked(cells["yours-karlo"], folders), reader)
    assert len(reader["shown"]) == 1
    assert reader["picture"].shape == (1, 3, 32, 32)
    assert torch.isfinite(reader["picture"]).all() and reader["picture"].std() > 0.01


def test_the_life_size_configurations_are_the_published_ones(cells):
    """The chapter writes them out; published.py has the files' own spelling."""
    names = {}
    for needed in ("imports", "sd-configs", "karlo-configs", "sd-count", "karlo-count"):
        exec(cells[needed], names)
    files = {
        "unet": published.SD_UNET,
        "text_encoder": published.SD_TEXT,
        "vae": published.SD_AUTOENCODER,
        "prior": published.KARLO_PRIOR,
        "decoder": published.KARLO_DECODER,
        "super_res_first": published.KARLO_UPSAMPLER,
        "super_res_last": published.KARLO_UPSAMPLER,
        "text_proj": published.KARLO_TEXT_PROJ,
    }
    models = names["large"] | names["life"]  # Stable Diffusion's text encoder of the two
    assert set(models) == set(files)
    for part, file in files.items():
        ours = models[part].config_json()
        for key, value in file.items():
            if key in ours and not key.startswith("_") and key != "architectures":
                mine = list(ours[key]) if isinstance(ours[key], tuple) else ours[key]
                assert mine == value, (part, key)
