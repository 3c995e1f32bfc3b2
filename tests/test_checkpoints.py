"""Weights come back as they were stored; whatever is wrong with a folder is named."""

import gc
import hashlib
import json
import os
import struct
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from companion import checkpoints
from companion.checkpoints import CheckpointError


@dataclass(frozen=True)
class Inner:
    width: int
    act: Literal["silu", "gelu"] = "silu"


@dataclass(frozen=True)
class Config:
    channels: int
    scale: float = 1.0
    blocks: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    name: str | None = None
    flag: bool = False
    inner: Inner = field(default_factory=lambda: Inner(4))
    note: ClassVar[str] = "no setting"

    def __post_init__(self) -> None:
        if self.channels % 2:
            raise ValueError(f"channels is {self.channels}; expected an even number.")


class Net(nn.Module):
    """Two layers, a persistent buffer, one that is not, an integer, and a tied weight."""

    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 3)
        self.twin = nn.Linear(3, 4)
        self.register_buffer("ids", torch.arange(3) + seed)
        self.register_buffer("mean", torch.randn(3, generator=g))
        self.register_buffer("table", torch.ones(2), persistent=False)
        with torch.no_grad():
            for p in self.parameters():
                if not p.is_meta:
                    p.copy_(torch.randn(p.shape, generator=g))
        if tied:
            self.twin.weight = self.a.weight


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# --- writing -------------------------------------------------------------------------------------


def test_atomic_write_moves_only_what_is_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with checkpoints.atomic_write(path) as part:
        assert part.parent == path.parent and part.name.startswith(".file.txt.")
        part.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        with checkpoints.atomic_write(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_atomic_write_leaves_the_usual_rights(tmp_path):
    (tmp_path / "usual").write_text("")
    checkpoints.write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_atomic_write_flushes_before_it_moves(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("move"), replace(a, b))[1])
    checkpoints.write_text(tmp_path / "x", "text")
    assert calls[:2] == ["fsync", "move"]
    assert calls[2:] == (["fsync"] if os.name == "posix" else [])


def test_a_write_that_fails_keeps_the_file_before_it(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    checkpoints.write_tensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()

    def damaged(tensors, part, metadata):
        save_file({k: v + 1 for k, v in tensors.items()}, part, metadata=metadata)

    monkeypatch.setattr(checkpoints, "save_file", damaged)  # a disk that stores something else
    with pytest.raises(CheckpointError, match="altered"):
        checkpoints.write_tensors(path, {"x": torch.zeros(3)})
    assert path.read_bytes() == before


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        checkpoints.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_sha256_is_the_standard_one(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checkpoints.sha256(path) == wanted == hashlib.sha256(b"abc").hexdigest()


def test_equal_weights_are_equal_files(tmp_path):
    model = Net()
    for name in "abcdefgh":  # the library's own order of notes is random
        checkpoints.save(tmp_path / name, model)
    files = {(tmp_path / name / "model.safetensors").read_bytes() for name in "abcdefgh"}
    assert len(files) == 1


def test_the_file_is_plain_safetensors(tmp_path):
    model = Net()
    checkpoints.save(tmp_path, model)
    stored = load_file(tmp_path / "model.safetensors")
    wanted = model.state_dict()
    assert stored.keys() == wanted.keys() - {"twin.weight"}
    assert all(torch.equal(stored[k], wanted[k]) for k in stored)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + size])["__metadata__"]["format"] == "pt"  # transformers asks


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("meta", [False, True])
def test_round_trip(tmp_path, dtype, meta):
    model = Net(seed=1)
    checkpoints.save(tmp_path, model, dtype=dtype)
    if meta:
        with torch.device("meta"):
            other = Net(seed=2)
        other.table = torch.ones(2)
    else:
        other = Net(seed=2)
        pointer = other.a.weight.data_ptr()
    assert checkpoints.load_into(other, tmp_path) is other
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        wanted = x if dtype is None or not x.is_floating_point() else x.to(dtype).to(x.dtype)
        assert y.dtype == x.dtype and torch.equal(y, wanted), name
    assert other.twin.weight is other.a.weight, "tied weights stay tied"
    assert isinstance(other.a.weight, nn.Parameter) and other.a.weight.requires_grad
    if not meta:
        assert other.a.weight.data_ptr() == pointer, "filled in place"


def test_loading_draws_no_random_numbers(tmp_path):
    checkpoints.save(tmp_path, Net())
    other = Net(1)
    before = torch.get_rng_state()
    checkpoints.load_into(other, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_buffer_that_no_file_holds_needs_a_real_build(tmp_path):
    checkpoints.save(tmp_path, Net())
    with torch.device("meta"):
        other = Net()
    with pytest.raises(CheckpointError, match=r"does not hold 'table'.*build it on the CPU"):
        checkpoints.load_into(other, tmp_path)


def test_weights_are_held_once(tmp_path, monkeypatch):
    """Tensors are read one by one, and none outlives its turn."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    checkpoints.save(tmp_path, model)
    alive, most = weakref.WeakSet(), 0
    real = checkpoints.safe_open

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, key):
            nonlocal most
            x = self.file.get_tensor(key)
            alive.add(x)
            most = max(most, len(alive))
            return x

    monkeypatch.setattr(checkpoints, "safe_open", Watched)
    gc.collect()
    checkpoints.load_into(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), tmp_path)
    assert 1 <= most <= 2


def test_tensors_outlive_their_file(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoints.write_tensors(path, {"x": torch.arange(1000.0)}, {"step": "7"})
    tensors, notes = checkpoints.read_tensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place, as a careless copy would
    assert torch.equal(tensors["x"], torch.arange(1000.0)) and notes == {"step": "7"}


def test_digest_sees_every_part():
    x = torch.arange(6.0)
    base = checkpoints.digest({"a": x, "b": x}, {"n": "1"})
    assert base == checkpoints.digest({"b": x, "a": x}, {"n": "1"}), "order does not matter"
    for other in (
        ({"a": x, "c": x}, {"n": "1"}),
        ({"a": x, "b": x + 1}, {"n": "1"}),
        ({"a": x, "b": x.reshape(2, 3)}, {"n": "1"}),
        ({"a": x, "b": x.view(torch.int32)}, {"n": "1"}),
        ({"a": x, "b": x}, {"n": "2"}),
        ({"a": x}, {"n": "1"}),
    ):
        assert checkpoints.digest(*other) != base
    odd = {"scalar": torch.tensor(3), "none": torch.zeros(0), "half": x.bfloat16(), "b": x > 1}
    assert len(checkpoints.digest({**odd, "t": x.reshape(2, 3).t()})) == 64


# --- what does not fit ---------------------------------------------------------------------------


def test_misfits_are_all_named(tmp_path):
    checkpoints.save(tmp_path, nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))))
    model = nn.ModuleDict({"0": nn.Linear(2, 3), "x": nn.Linear(2, 2)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_into(model, tmp_path)
    said = str(caught.value)
    assert "missing 'x.weight', 'x.bias';" in said
    assert "unexpected '1.bias', '1.weight', '2.bias', '2.weight' … (6 in all);" in said
    assert "'0.weight' (2, 2), the model has (3, 2)" in said
    assert "does not fit ModuleDict" in said and "config.json" in said
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "nothing is half loaded"


def test_a_type_of_another_kind_is_refused(tmp_path):
    model = Net()
    tensors = {k: v for k, v in model.state_dict().items() if k != "twin.weight"}
    checkpoints.write_tensors(tmp_path / "model.safetensors", {**tensors, "ids": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"'ids' is stored as torch.float32.*torch.int64"):
        checkpoints.load_into(model, tmp_path)


def test_rename_maps_and_drops(tmp_path):
    model = nn.Linear(2, 2)
    tensors = {f"old.{k}": v.detach() for k, v in model.state_dict().items()}
    save_file({**tensors, "position_ids": torch.arange(3)}, tmp_path / "model.safetensors")
    other = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="unexpected"):
        checkpoints.load_into(other, tmp_path)
    rename = {"old.weight": "weight", "old.bias": "bias"}.get
    checkpoints.load_into(other, tmp_path, rename=rename)
    assert equal(model, other)
    with pytest.raises(CheckpointError, match="renamed to one name"):
        checkpoints.load_into(other, tmp_path, rename=lambda name: "weight")


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (1e6, "overflows")])
def test_weights_that_cannot_be_stored_are_refused(tmp_path, value, said):
    model = Net()
    model.b.bias.data[1] = value
    with pytest.raises(CheckpointError, match=f"'b.bias' .*{said}"):
        checkpoints.save(tmp_path / "x", model, dtype=torch.float16)
    assert not (tmp_path / "x").exists()


# --- folders -------------------------------------------------------------------------------------


def test_missing_folders_and_files(tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(CheckpointError, match=r"no folder .*Did you mean .*unet"):
        checkpoints.load_state(tmp_path / "unett")
    with pytest.raises(CheckpointError, match="Check the path"):
        checkpoints.load_state(tmp_path / "zzz" / "zzz")
    with pytest.raises(CheckpointError, match="holds no weights: expected model.safetensors"):
        checkpoints.load_state(tmp_path / "unet")
    with pytest.raises(CheckpointError, match="There is no file .*x.safetensors"):
        checkpoints.load_state(tmp_path / "x.safetensors")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        checkpoints.find_folder(tmp_path, "file")
    assert checkpoints.find_folder(tmp_path, "unet") == tmp_path / "unet"


def test_which_file_is_read(tmp_path):
    for i, name in enumerate(("b.safetensors", ".hidden.safetensors")):
        checkpoints.write_tensors(tmp_path / name, {"x": torch.tensor(i)})
    assert checkpoints.find_weights(tmp_path).name == "b.safetensors"
    checkpoints.write_tensors(tmp_path / "a.safetensors", {"x": torch.tensor(2)})
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        checkpoints.find_weights(tmp_path)
    for name in reversed(checkpoints.PREFERRED):
        checkpoints.write_tensors(tmp_path / name, {"x": torch.tensor(3)})
        assert checkpoints.find_weights(tmp_path).name == name
    assert checkpoints.load_state(tmp_path / "a.safetensors")["x"] == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "v1-4.ckpt", "weights.pt", "w.pth"])
def test_a_pickle_is_never_opened(tmp_path, name, monkeypatch):
    def opened(*_args, **_kwargs):
        raise AssertionError("a pickle was opened")

    torch.save({"x": torch.ones(1)}, tmp_path / name)
    monkeypatch.setattr(torch, "load", opened)
    for path in (tmp_path, tmp_path / name):
        for use in (checkpoints.load_state, lambda p: checkpoints.load_into(nn.Linear(1, 1), p)):
            with pytest.raises(CheckpointError) as caught:
                use(path)
            assert name in str(caught.value)
            assert "weights_only=True" in str(caught.value) and "save_file" in str(caught.value)


# --- truncated and altered files -----------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    model, config = Net(3), Config(channels=2)
    checkpoints.save(folder, model, config=config, card={"recipe": "net", "score": {}})
    return folder


def _damaged(stored: Path, into: Path, change, card: bool) -> Path:
    into.mkdir(exist_ok=True)
    raw = bytearray((stored / "model.safetensors").read_bytes())
    (into / "model.safetensors").write_bytes(change(raw))
    (into / "card.json").unlink(missing_ok=True)
    if card:
        (into / "card.json").write_bytes((stored / "card.json").read_bytes())
    return into


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_truncation_is_always_found(stored, tmp_path_factory, data):
    size = (stored / "model.safetensors").stat().st_size
    length = data.draw(st.integers(0, size - 1))
    into = tmp_path_factory.getbasetemp() / "cut"
    for card in (True, False):
        _damaged(stored, into, lambda raw: raw[:length], card)
        for use in (checkpoints.load_state, lambda p: checkpoints.load_into(Net(), p)):
            with pytest.raises(CheckpointError, match="truncated or altered"):
                use(into)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_alteration_is_always_found(stored, tmp_path_factory, data):
    """Any byte changed: with a card it is named; without, the weights are right or it is named."""
    size = (stored / "model.safetensors").stat().st_size
    place, change = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255))

    def alter(raw: bytearray) -> bytearray:
        raw[place] ^= change
        return raw

    into = _damaged(stored, tmp_path_factory.getbasetemp() / "altered", alter, card=True)
    for use in (checkpoints.load_state, lambda p: checkpoints.load_into(Net(), p)):
        with pytest.raises(CheckpointError, match="truncated or altered"):
            use(into)
    _damaged(stored, into, alter, card=False)
    model = Net()
    try:
        checkpoints.load_into(model, into)
    except CheckpointError:
        return
    assert equal(model, Net(3)), "only a note in the header may change unseen, never a weight"


def test_every_byte_of_the_weights_is_covered_without_a_card(stored, tmp_path):
    raw = (stored / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    for place in range(start, len(raw), 3):

        def alter(raw: bytearray, place: int = place) -> bytearray:
            raw[place] ^= 1
            return raw

        into = _damaged(stored, tmp_path / "x", alter, card=False)
        for use in (checkpoints.load_state, lambda p: checkpoints.load_into(Net(), p)):
            with pytest.raises(CheckpointError, match="altered"):
                use(into)


def test_verification_can_be_left_out(stored, tmp_path):
    def alter(raw: bytearray) -> bytearray:
        raw[-1] ^= 1
        return raw

    into = _damaged(stored, tmp_path / "x", alter, card=True)
    assert checkpoints.load_state(into, verify=False)


def test_a_card_speaks_of_its_own_file_only(stored, tmp_path):
    into = _damaged(stored, tmp_path / "x", lambda raw: raw, card=True)
    save_file({"x": torch.ones(1)}, into / "other.safetensors")
    assert checkpoints.load_state(into / "other.safetensors")["x"] == 1
    (into / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="There is no file"):
        checkpoints.load_state(into / "model.safetensors")


# --- configurations ------------------------------------------------------------------------------


def written(folder: Path, **values: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"channels": 2, **values}))
    return folder


def test_config_comes_back(tmp_path):
    config = Config(4, 0.5, (3,), (2, "b"), "x", True, Inner(8, "gelu"))
    checkpoints.save(tmp_path, Net(), config=config)
    assert checkpoints.read_config(tmp_path, Config) == config
    assert checkpoints.read_config(tmp_path / "config.json", Config) == config
    assert checkpoints.read_config(written(tmp_path), Config) == Config(2)


def test_config_skips_who_wrote_it(tmp_path):
    folder = written(tmp_path, _class_name="X", _diffusers_version="0.1", architectures=["X"])
    assert checkpoints.read_config(folder, Config) == Config(2)
    folder = written(tmp_path, sample_size=64)
    assert checkpoints.read_config(folder, Config, ignore=("sample_size",)) == Config(2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"chanels": 3}, r"Config has no setting 'chanels' \(here 3\).*Did you mean 'channels'\?"),
        ({"note": "x"}, "has no setting 'note'"),
        ({"channels": "2"}, 'channels is "2"; expected int'),
        ({"channels": True}, "channels is true; expected int"),
        ({"channels": 2.0}, "channels is 2.0; expected int"),
        ({"channels": None}, "channels is null; expected int"),
        ({"channels": 3}, "channels is 3; expected an even number"),
        ({"scale": "big"}, 'scale is "big"; expected float'),
        ({"scale": False}, "scale is false; expected float"),
        ({"blocks": 3}, r"blocks is 3; expected tuple\[int, ...\]"),
        ({"blocks": [1, "x"]}, 'blocks is "x"; expected int'),
        ({"pair": [1]}, r"pair is \[1\]; expected tuple\[int, str\]"),
        ({"name": 3}, "name is 3; expected str | None"),
        ({"flag": 1}, "flag is 1; expected bool"),
        ({"inner": 3}, "inner is 3; expected Inner"),
        ({"inner": {}}, "Inner needs 'width'"),
        ({"inner": {"width": 1, "act": "relu"}}, 'act is "relu".*implements only "silu" or "gelu"'),
        ({"inner": {"width": 1, "x": 1}}, "Inner has no setting 'x'"),
        ({"act_fn": "relu"}, 'act_fn is "relu"; this model implements only "silu" or "swish"'),
        ({"class_embed_type": 0}, "class_embed_type is 0; this model implements only null"),
        ({"odd": [1, [2, 4]]}, "odd is"),
        ({"two": True}, "two is true"),
    ],
)
def test_config_names_what_it_does_not_know(tmp_path, values, said):
    known = {
        "act_fn": ("silu", "swish"),
        "class_embed_type": (None,),
        "odd": ((1, (2, 3)),),
        "two": (1,),
    }
    right = {"act_fn": "swish", "class_embed_type": None, "odd": [1, [2, 3]], "two": 1}
    assert checkpoints.read_config(written(tmp_path, **right), Config, (), known) == Config(2)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoints.read_config(written(tmp_path, **values), Config, (), known)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_config_needs_what_has_no_default(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Config needs 'channels'"):
        checkpoints.read_config(tmp_path, Config)


@pytest.mark.parametrize(
    ("raw", "said"),
    [(b"{", "cannot be read as JSON"), (b"\xff{}", "cannot be read"), (b"[1]", "holds list")],
)
def test_broken_json(tmp_path, raw, said):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=said):
        checkpoints.read_config(tmp_path, Config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="There is no file"):
        checkpoints.read_config(tmp_path, Config)
    with pytest.raises(TypeError, match="expected a dataclass instance or a mapping"):
        checkpoints.save(tmp_path, Net(), config=Config)


# --- cards ---------------------------------------------------------------------------------------

FULL = {
    "recipe": "net",
    "about": "A net.",
    "seed": 7,
    "steps": 12000,
    "pictures": 24000,
    "minutes": 1.5,
    "hardware": "two cores",
    "torch": "2.13.0",
    "command": "python -m companion train net",
    "data": "a | b",
    "score": {"right": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 1234}, "loss": 0.125},
    "licence": "MIT",
}


@pytest.fixture
def shipped(tmp_path) -> Path:
    return checkpoints.save(
        tmp_path / "net", Net(3), config=Config(2), card=FULL, dtype=torch.float16
    )


def test_card_is_filled_in(shipped):
    card = checkpoints.read_card(shipped)
    weights = shipped / "model.safetensors"
    assert card == {
        **FULL,
        "file": "model.safetensors",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "parameters": 12 + 4 + 12 + 3 + 4,  # the tied weight once
        "dtype": "float16",
    }


def test_page_says_what_the_card_says(shipped):
    page = (shipped / "README.md").read_text()
    assert page.startswith("---\nlicense: mit\nlibrary_name: companion\n")
    assert "\n# net\n\nA net.\n" in page
    assert "| right | 0.5 | 0.25 … 0.75 | 1,234 |" in page and "| loss | 0.125 | | |" in page
    assert "| steps | 12,000 |" in page and r"| data | a \| b |" in page
    assert checkpoints.read_card(shipped)["sha256"] in page


def test_saving_anew_drops_a_card_of_other_weights(shipped):
    checkpoints.save(shipped, Net(4), config=Config(2))
    assert not (shipped / "card.json").exists()
    assert equal(checkpoints.load_into(Net(), shipped), Net(4))


def test_a_kill_between_weights_and_card_leaves_no_wrong_card(shipped, monkeypatch):
    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "card_page", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(shipped, Net(4), config=Config(2), card=FULL)
    assert equal(checkpoints.load_into(Net(), shipped), Net(4))
    assert any("no card.json" in finding for finding in checkpoints.check(shipped))


@pytest.mark.parametrize(
    ("entry", "error"),
    [(float("nan"), ValueError), ({"x": [float("inf")]}, ValueError), (torch.ones(1), TypeError)],
)
def test_a_card_holds_plain_values(tmp_path, entry, error):
    with pytest.raises(error, match="card entry 'score'"):
        checkpoints.save(tmp_path / "x", Net(), card={"score": entry})
    assert not (tmp_path / "x").exists()


def test_check_passes_what_is_whole(shipped):
    assert checkpoints.check(shipped) == []
    assert checkpoints.check(shipped.parent) == []
    checkpoints.write_tensors(shipped.parent / "state.safetensors", {}, {"run": "{}"})
    assert checkpoints.check(shipped.parent) == [], "the state of a run is no model"


def _flip(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 4
    (folder / "model.safetensors").write_bytes(raw)


def _nan(folder: Path) -> None:
    save_file({"w": torch.tensor([0.0, float("nan")])}, folder / "other.safetensors")


def _edit_card(folder: Path, **changes: object) -> None:
    card = {**checkpoints.read_card(folder), **changes}
    card = {k: v for k, v in card.items() if v is not None}
    checkpoints.write_json(folder / "card.json", card)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip, "truncated or altered"),
        (_nan, "'w' is NaN or infinite"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "card.json").unlink(), "no card.json"),
        (lambda f: (f / "README.md").unlink(), "missing, or not what card.json says"),
        (lambda f: _edit_card(f, seed=8), "missing, or not what card.json says"),
        (lambda f: _edit_card(f, seed=None), "says nothing about seed"),
        (lambda f: (f / "old.bin").write_bytes(b""), "a pickle; convert it"),
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors file"),
    ],
)
def test_check_names_what_is_wrong(shipped, damage, said):
    damage(shipped)
    assert any(said in finding for finding in checkpoints.check(shipped)), said


def test_shipped_weights_are_whole():
    if not checkpoints.WEIGHTS.is_dir():
        with pytest.raises(CheckpointError, match="no folder"):
            checkpoints.check()
    else:
        assert checkpoints.check() == []


# --- weights in parts -----------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, monkeypatch) -> Path:
    """A model of 4 x 1.2 kB in files of at most 3 kB, and the same in one file."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(10, 30) for _ in range(4)))
    card = {key: "x" for key in checkpoints.CARD}
    checkpoints.save(tmp_path / "whole", model, card=card, config={})
    monkeypatch.setattr(checkpoints, "LARGEST", 3000)
    checkpoints.save(tmp_path / "parts", model, card=card, config={})
    return tmp_path / "parts"


def test_large_weights_lie_in_parts_and_are_the_same_weights(parts):
    files = sorted(p.name for p in parts.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = checkpoints.find_weights(parts)
    assert index.name == "model.safetensors.index.json"
    ours, whole = checkpoints.load_state(parts), checkpoints.load_state(parts.parent / "whole")
    assert ours.keys() == whole.keys() and all(torch.equal(ours[k], whole[k]) for k in whole)
    card, other = checkpoints.read_card(parts), checkpoints.read_card(parts.parent / "whole")
    assert card["sha256"] == other["sha256"] == checkpoints.sha256(index)
    assert card["file"] == index.name and checkpoints.check(parts) == []
    model = nn.Sequential(*(nn.Linear(10, 30) for _ in range(4)))
    checkpoints.load_into(model, parts)
    assert torch.equal(model[3].weight, whole["3.weight"])


def test_no_part_may_be_missing_altered_or_unlisted(parts):
    first, second = sorted(parts.glob("*.safetensors"))
    raw = second.read_bytes()
    for spoilt in (raw[:-5], raw[:-1] + bytes([raw[-1] ^ 1])):
        second.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="truncated or altered"):
            checkpoints.load_state(parts)
    second.unlink()
    with pytest.raises(CheckpointError, match="There is no file"):
        checkpoints.load_state(parts)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="have no"):
        checkpoints.load_state(parts)
    (parts / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        checkpoints.load_state(parts)


def test_saved_again_nothing_old_stays(parts, monkeypatch):
    small = nn.Linear(2, 2)
    checkpoints.save(parts, small)
    assert [p.name for p in parts.glob("model*")] == ["model.safetensors"]
    monkeypatch.setattr(checkpoints, "LARGEST", 10)
    checkpoints.save(parts, small, card={key: "x" for key in checkpoints.CARD})
    assert not (parts / "model.safetensors").exists()
    assert checkpoints.load_state(parts).keys() == {"weight", "bias"}
