"""Where a folder is looked for, that nothing is fetched unless a hub id says so, and the memory."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch

from companion import checkpoints, pretrained
from companion.checkpoints import CheckpointError
from companion.prior import Prior, PriorConfig

CONFIG = PriorConfig(1, 4, 1, 5, 6)


@pytest.fixture
def no_network(monkeypatch):
    """Note what would be downloaded, and fail it."""
    asked = []

    def download(repo, subfolder, revision):
        asked.append((repo, subfolder, revision))
        raise CheckpointError(f"asked for {repo}")

    monkeypatch.setattr(pretrained, "_download", download)
    return asked


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "a/b/c", "~/b", "", "a\\b", "../a"])
def test_paths_are_never_taken_for_hub_ids(no_network, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert pretrained.locate(name).samefile(tmp_path)
    else:
        with pytest.raises(CheckpointError, match="no folder"):
            pretrained.locate(name)
    assert not no_network


def test_a_misspelt_folder_is_not_fetched(no_network, tmp_path, monkeypatch):
    (tmp_path / "weights" / "prior").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="Did you mean weights/prior"):
        pretrained.locate("weights/piror")
    assert not no_network


def test_a_hub_id_is_asked_for_with_its_revision(no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="asked for kakaobrain/karlo-v1-alpha"):
        Prior.from_pretrained("kakaobrain/karlo-v1-alpha", "prior", revision="abc")
    assert no_network == [("kakaobrain/karlo-v1-alpha", "prior", "abc")]


def test_a_local_folder_wins_over_a_hub_id(no_network, tmp_path, monkeypatch, generator):
    monkeypatch.chdir(tmp_path)
    model = Prior.fresh(CONFIG, generator)
    model.save_pretrained(tmp_path / "owner" / "name" / "prior")
    again = Prior.from_pretrained("owner/name", "prior")
    assert torch.equal(again.proj_in.weight, model.proj_in.weight) and not no_network


def test_download_says_what_and_how_much(monkeypatch, caplog):
    """The hub itself is a stand-in here; tests never reach it."""
    import huggingface_hub

    class File:
        def __init__(self, name, size):
            self.rfilename, self.size = name, size

    class Api:
        def model_info(self, repo, revision, files_metadata):
            names = ["prior/config.json", "prior/diffusion_pytorch_model.safetensors"]
            others = [
                "prior/diffusion_pytorch_model.bin",
                "decoder/config.json",
                "model_index.json",
            ]
            others.append("prior/diffusion_pytorch_model.fp16.safetensors")
            return type("Info", (), {"siblings": [File(n, 1_500_000_000) for n in names + others]})

    wanted = {}

    def snapshot(repo, revision, allow_patterns):
        wanted.update(repo=repo, revision=revision, patterns=allow_patterns)
        return "/there"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert pretrained._download("owner/name", "prior", "abc") == "/there"
    assert "owner/name" in caplog.text and "3 files, 4.50 GB" in caplog.text
    assert wanted["repo"] == "owner/name" and wanted["revision"] == "abc"


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    import huggingface_hub

    class Api:
        def model_info(self, *args, **kwargs):
            raise OSError("no network")

    def snapshot(*args, **kwargs):
        raise OSError("not in the cache either")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match="'owner/name' is no folder here.*no network"):
        pretrained._download("owner/name", None, None)


def test_card_and_half_precision(tmp_path, generator):
    model = Prior.fresh(CONFIG, generator)
    model.save_pretrained(tmp_path, card={"recipe": "prior"}, dtype=torch.float16)
    again = Prior.from_pretrained(tmp_path)
    assert again.proj_in.weight.dtype == torch.float32
    torch.testing.assert_close(again.proj_in.weight, model.proj_in.weight.half().float())
    assert (tmp_path / "README.md").is_file()


STATUS = Path("/proc/self/status")
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if STATUS.exists() else None


def own_memory() -> int:
    """Bytes that this process has written to (what it only maps from files is not among them)."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(TRIM is None, reason="asks Linux and glibc how much memory is used")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_weights_are_never_held_twice(tmp_path, generator, monkeypatch, stored):
    """What is loaded is all that there is; nothing of the file stays beside it."""
    model = Prior.fresh(PriorConfig(8, 64, 2, 64, 16), generator)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size > 25e6, "else the allocator's own comings and goings would count"
    model.save_pretrained(tmp_path, dtype=stored)
    del model
    gc.collect()
    TRIM(0)  # give back what has been freed
    most, real = own_memory(), checkpoints.safe_open
    start = most

    class Watched:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            nonlocal most
            most = max(most, own_memory())
            return getattr(self.file, name)

    monkeypatch.setattr(checkpoints, "safe_open", Watched)
    again = Prior.from_pretrained(tmp_path)
    most = max(most, own_memory()) - start
    assert again.proj_in.weight.dtype == torch.float32
    assert 0.5 * size < most < 1.2 * size, f"{most / size:.2f} times the weights"
