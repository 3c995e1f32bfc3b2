"""``make real`` on folders of the true layout with random weights, and everything that it refuses.

The hub itself is a stand-in here; tests never reach it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from companion import pretrained
from companion.checkpoints import CheckpointError, sha256
from reference import published, real, systems

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # the stock pipelines warn of much


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    words = systems.tokenizer()
    systems.pipelines()
    sd = tmp_path_factory.mktemp("sd")
    configs = {
        "text_encoder": systems.text_config(published.SD_TEXT, words, 24),
        "unet": systems.SD["unet"],
        "vae": systems.SD["vae"],
    }
    parts = systems.stable_diffusion()
    steps = {"scheduler": systems.SD_SCHEDULER}
    systems.write_published(sd, systems.SD_INDEX, configs, parts, steps, words)
    karlo = systems.write_karlo(tmp_path_factory.mktemp("karlo"), systems.karlo(), images=False)
    return {"stable-diffusion": sd, "karlo": karlo}


@pytest.fixture
def few_words(monkeypatch):
    """Prompts that fit the tiny tokenizer's context."""
    monkeypatch.setattr(real, "PROMPTS", tuple(systems.CAPTIONS[i % 3] for i in range(5)))


def draw(name, folder, out, *more):
    return real.main([name, "--folder", str(folder), "--yes", "--out", str(out), *more])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "size"), [("stable-diffusion", ["3"], 32), ("karlo", ["3", "3", "2"], 32)]
)
def test_five_pictures_by_both(folders, few_words, tmp_path, name, steps, size):
    assert draw(name, folders[name], tmp_path / "real", "--steps", *steps) == 0
    found = json.loads((tmp_path / "real" / f"{name}.json").read_text("utf-8"))
    assert len(found["rows"]) == 5 and found["steps"] == [int(n) for n in steps]
    assert found["greatest_difference"] == max(r["greatest_difference"] for r in found["rows"])
    # In float32, and stock's own tables are float32 too (see real.py); equality is tested in 64.
    # Karlo's networks know nothing here, and rounding pushes single pixels from limit to limit.
    assert min(row["greatest_difference"] for row in found["rows"]) < 5e-4
    assert max(row["mean_difference"] for row in found["rows"]) < 0.03
    assert name == "karlo" or found["greatest_difference"] < 5e-4
    assert found["size"] == [size, size]
    for row in found["rows"]:
        assert row["standard_deviation_of_the_picture"] > 0.1
        with Image.open(tmp_path / "real" / row["picture"]) as picture:
            assert picture.size == (2 * size + 2, size)
    # Equal captions with another seed are other pictures: the seeds are really used.
    first, fourth = (Image.open(tmp_path / "real" / found["rows"][i]["picture"]) for i in (0, 3))
    assert first.tobytes() != fourth.tobytes()
    assert set(found["weights"]) >= {
        f"{part}/{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors"
        for part in real.KNOWN[name].weights
    }
    for file, hashed in found["weights"].items():
        assert sha256(folders[name] / file) == hashed
    assert found["revision"] is None and found["date"].startswith("20")
    assert str(folders[name]) not in json.dumps(found), "no path of this machine is stored"


@pytest.mark.slow
def test_a_fault_of_ours_is_a_difference(folders, few_words, tmp_path, monkeypatch):
    """One weight of our U-Net moved: the stored difference says so."""
    opened = real.our_stable_diffusion

    def wrong(folder, how):
        from companion.unet import UNet

        real_load = UNet.from_pretrained.__func__

        def load(cls, *args, **options):
            unet = real_load(cls, *args, **options)
            unet.conv_out.bias.data += 0.1
            return unet

        with monkeypatch.context() as patch:
            patch.setattr(UNet, "from_pretrained", classmethod(load))
            return opened(folder, how)

    monkeypatch.setitem(real.SIDES, "stable-diffusion", (wrong, real.stock_stable_diffusion))
    folder = folders["stable-diffusion"]
    assert draw("stable-diffusion", folder, tmp_path, "--steps", "2", "--prompts", "1") == 0
    found = json.loads((tmp_path / "stable-diffusion.json").read_text("utf-8"))
    assert found["greatest_difference"] > 0.01


def test_differences_are_measured_element_by_element():
    ours = torch.full((1, 3, 4, 4), 0.5)
    theirs = ours.clone()
    theirs[0, 1, 2, 3] += 0.25
    theirs[0, 2, 0, 0] -= 0.25  # a signed sum would cancel
    found = real.compare(ours, theirs)
    assert found["greatest_difference"] == 0.25
    assert found["mean_difference"] == pytest.approx(0.5 / 48)
    assert found["greatest_levels_of_255"] == 64
    assert found["share_of_values_with_another_level"] == pytest.approx(2 / 48)
    with pytest.raises(ValueError, match="ours is"):
        real.compare(ours, theirs[..., :2])


# --- what is refused, before any long work -------------------------------------------------------


class Hub:
    """A hub that has one repository, or is out of reach."""

    def __init__(self, files=None, licence="some-licence", sha="f" * 40):
        self.files, self.licence, self.sha, self.asked = files, licence, sha, []

    def model_info(self, repo, revision=None, files_metadata=False, timeout=None):
        self.asked.append((repo, revision))
        if self.files is None:
            raise type("ConnectError", (Exception,), {})("Name or service not known")
        siblings = [SimpleNamespace(rfilename=f, size=s) for f, s in self.files.items()]
        card = SimpleNamespace(license=self.licence)
        return SimpleNamespace(siblings=siblings, sha=self.sha, card_data=card)


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    def use(files):
        made = Hub(files)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("downloaded")
        )
        monkeypatch.setattr(real, "run", lambda *a: pytest.fail("drawn"))
        return made

    return use


FILES = {
    "model_index.json": 500,
    "unet/config.json": 700,
    "unet/diffusion_pytorch_model.safetensors": 3_400_000_000,
    "unet/diffusion_pytorch_model.bin": 3_400_000_000,
    "unet/diffusion_pytorch_model.fp16.safetensors": 1_700_000_000,
    "text_encoder/model.safetensors": 500_000_000,
    "vae/diffusion_pytorch_model.safetensors": 300_000_000,
    "safety_checker/model.safetensors": 1_200_000_000,
    "tokenizer/merges.txt": 500_000,
}


def test_an_unreachable_hub_is_refused_in_one_message(hub):
    hub(None)
    with pytest.raises(SystemExit) as refused:
        real.main(["--yes"])
    assert str(refused.value).startswith("error: the Hugging Face hub did not answer for CompVis/")
    assert "Name or service not known" in str(refused.value) and "--folder" in str(refused.value)


def test_offline_it_ends_at_once_without_loading_torch(tmp_path):
    """The command itself, with the hub switched off: no traceback, and nothing heavy imported."""
    code = (
        "import sys\nfrom reference import real\n"
        "try:\n    real.main(['--yes'])\n"
        "finally:\n    print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 1 and done.stdout.strip() == "[]"
    assert done.stderr.startswith("error: the Hugging Face hub did not answer")
    assert "Traceback" not in done.stderr


def test_what_would_be_fetched_is_said_and_asked(hub, monkeypatch, capsys):
    made = hub(FILES)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(SystemExit, match="nothing was downloaded"):
        real.main(["stable-diffusion"])
    told = capsys.readouterr().out
    assert "4.20 GB" in told  # neither pickles, nor half precision, nor the safety checker
    assert "f" * 40 in told and "some-licence" in told and "safety checker is left out" in told
    assert made.asked == [
        ("CompVis/stable-diffusion-v1-4", real.KNOWN["stable-diffusion"].revision)
    ]


def test_without_a_terminal_it_does_not_go_on(hub, monkeypatch):
    hub(FILES)

    def closed(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    with pytest.raises(SystemExit, match="With --yes"):
        real.main(["stable-diffusion"])


def test_the_revision_is_an_option_and_todays_is_named(hub, monkeypatch, capsys):
    made = hub({f"{part}/x_model.safetensors": 1 for part in real.KNOWN["karlo"].weights})
    monkeypatch.setattr("builtins.input", lambda question: "")
    for options, asked in (([], None), (["--revision", "abc"], "abc")):
        with pytest.raises(SystemExit):
            real.main(["karlo", *options])
        assert made.asked[-1] == ("kakaobrain/karlo-v1-alpha", asked)
        assert ("no commit is pinned" in capsys.readouterr().out) == (asked is None)


def test_weights_that_are_pickles_are_refused_before_downloading(hub):
    hub({f.replace("unet/diffusion_pytorch_model.s", "unet/x.s"): n for f, n in FILES.items()})
    with pytest.raises(SystemExit, match="has no safetensors for unet, and pickles"):
        real.main(["stable-diffusion", "--yes"])


def test_folders_that_are_none_are_refused(folders, tmp_path):
    with pytest.raises(SystemExit, match=r"has no model_index\.json"):
        draw("stable-diffusion", tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="has no safetensors for decoder, prior"):
        draw("karlo", folders["stable-diffusion"], tmp_path)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["imagen"], "no system 'imagen'"),
        (["--revision", "abc"], "belong to one system"),
        (["karlo", "--steps", "5"], "takes 3 numbers"),
        (["karlo", "--prompts", "6"], "--prompts is 6"),
    ],
)
def test_options_that_make_no_sense(options, why, capsys):
    with pytest.raises(SystemExit):
        real.main(options)
    assert why in capsys.readouterr().err


def test_the_library_says_the_same_of_any_error_of_the_hubs_client(monkeypatch):
    """Its HTTP client's errors were OSErrors once and are not any more."""
    import huggingface_hub

    class Error(Exception):
        pass

    def fail(*args, **options):
        raise Error("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=fail))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="'owner/name' is no folder here.*Name or service"):
        pretrained._download("owner/name", None, None)
