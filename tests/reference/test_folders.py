"""Folders go both ways: stock opens what we write, we open what stock writes, old spellings too."""

import inspect
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from companion.adm import ADMUNet
from companion.autoencoder import Autoencoder
from companion.checkpoints import CheckpointError
from companion.clip import CLIPConfig, CLIPText
from companion.pretrained import OTHER_SPELLINGS, UNET_NOTES, UNET_SWITCHES
from companion.prior import Prior, TextProjection
from companion.unet import UNet
from reference.cases import CASES
from reference.make_fixtures import ours as stored
from reference.oracle import TOLERANCE, distance, randomise


def same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert distance(x.detach(), y.detach()) < TOLERANCE


def stock_class(stock, model):
    return getattr(stock, model.published)


def opened(cls, folder):
    """A stock model from a folder, and proof that it found every weight and no other."""
    kind = "dtype" if "CLIP" in cls.__name__ and "UnCLIP" not in cls.__name__ else "torch_dtype"
    model, info = cls.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **{kind: torch.float64}
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model.double().eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_stock_opens_what_we_save(stock, tmp_path, name):
    case = CASES[name]
    model, parts = stored(name)
    model.save_pretrained(tmp_path)
    theirs = opened(stock_class(stock, model), tmp_path)
    if name == "clip_text":
        theirs = {"text_model": theirs}
    answers = [parts["output"][str(i)] for i in range(len(parts["output"]))]
    same(case.run_theirs(theirs, **case.inputs), answers)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_we_open_what_stock_saves(stock, tmp_path, name):
    case = CASES[name]
    theirs = randomise(case.theirs(stock, case.config), 31)
    (theirs["text_model"] if name == "clip_text" else theirs).save_pretrained(tmp_path)
    cls = type(case.ours(case.config))
    ours = cls.from_pretrained(tmp_path, dtype=torch.float64)
    same(case.run_ours(ours, **case.inputs), case.run_theirs(theirs, **case.inputs))
    assert not ours.training


@pytest.mark.parametrize("name", CASES)
def test_we_open_what_we_save(tmp_path, name):
    model, parts = stored(name)
    (tmp_path / "inside").mkdir()
    model.save_pretrained(tmp_path / "inside")
    again = type(model).from_pretrained(tmp_path, "inside", dtype=torch.float64)
    assert again.config == model.config
    same(
        CASES[name].run_ours(again, **CASES[name].inputs),
        CASES[name].run_ours(model, **CASES[name].inputs),
    )


def test_text_encoders_are_saved_in_the_published_spelling(tmp_path):
    """Today's transformers drops the prefix that Stable Diffusion's folders carry; we keep it."""
    model, _ = stored("clip_text")
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


OLD = {  # what each row of the table turns back into: (case, today's name, the old one)
    "prefix": ("clip_text", r"text_model\.(.*)", r"\1"),
    "query": ("autoencoder", r"(.*attentions\.0)\.to_q\.(.*)", r"\1.query.\2"),
    "key": ("autoencoder", r"(.*attentions\.0)\.to_k\.(.*)", r"\1.key.\2"),
    "value": ("pixels", r"(.*attentions\.0)\.to_v\.(.*)", r"\1.value.\2"),
    "proj_attn": ("pixels", r"(.*attentions\.0)\.to_out\.0\.(.*)", r"\1.proj_attn.\2"),
}


@pytest.mark.parametrize("row", OLD)
def test_old_spellings_load(tmp_path, row):
    name, today, old = OLD[row]
    model, parts = stored(name)
    model.save_pretrained(tmp_path)
    path = tmp_path / model.filename
    tensors = load_file(path)
    renamed = {re.sub(f"^{today}$", old, k): v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    path.unlink()
    save_file(renamed, path, metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    case = CASES[name]
    same(case.run_ours(again, **case.inputs), case.run_ours(model, **case.inputs))


def test_position_ids_are_dropped(tmp_path):
    model, _ = stored("clip_text")
    model.save_pretrained(tmp_path)
    path = tmp_path / model.filename
    tensors = load_file(path)
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(8)[None]}, path)
    CLIPText.from_pretrained(tmp_path)


def test_every_row_of_the_table_is_tested():
    assert len(OTHER_SPELLINGS) == len(OLD) + 1


def test_stock_opens_the_old_autoencoder_spelling_too(stock, tmp_path):
    """So the table says about the old names what the stock library says."""
    case = CASES["autoencoder"]
    model, parts = stored("autoencoder")
    model.save_pretrained(tmp_path)
    path = tmp_path / model.filename
    tensors = load_file(path)
    for row, (_, today, old) in OLD.items():
        if row != "prefix":
            tensors = {re.sub(f"^{today}$", old, k): v for k, v in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    theirs = stock.AutoencoderKL.from_pretrained(
        tmp_path, torch_dtype=torch.float64, low_cpu_mem_usage=False
    )
    ours = Autoencoder.from_pretrained(tmp_path, dtype=torch.float64)
    same(case.run_ours(ours, **case.inputs), case.run_theirs(theirs, **case.inputs))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (UNet, "UNet2DConditionModel"),
        (ADMUNet, "UNet2DConditionModel"),
        (ADMUNet, "UNet2DModel"),
        (Autoencoder, "AutoencoderKL"),
        (Prior, "PriorTransformer"),
        (TextProjection, "UnCLIPTextProjModel"),
    ],
)
def test_every_stock_setting_is_a_field_a_switch_or_a_note(stock, ours, theirs):
    """No setting of stock is unknown here, and leaving one out means what it means there."""
    init = getattr(stock, theirs).__init__
    fields = inspect.signature(ours.Config).parameters
    for name, p in inspect.signature(getattr(init, "__wrapped__", init)).parameters.items():
        if name == "self":
            continue
        assert name in fields or name in ours.switches or name in ours.notes, name
        if name in fields:  # where ADMUNet stands for two classes, their defaults may differ
            assert ours is ADMUNet or fields[name].default == p.default, name
        elif name in ours.switches and p.default is not p.empty:
            assert p.default in ours.switches[name], name
    assert not set(UNET_SWITCHES) & set(UNET_NOTES)


def wrong(tmp_path, name: str, **change) -> type:
    model, _ = stored(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    return type(model)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unet", {"use_linear_projection": True}),
        ("unet", {"act_fn": "mish"}),
        ("unet", {"freq_shift": 1}),
        ("unet", {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]}),
        ("unet", {"attention_head_dim": [2, 2, 2]}),
        ("unet", {"some_new_setting": 3}),
        ("decoder", {"cross_attention_norm": "group_norm"}),
        ("decoder", {"resnet_time_scale_shift": "spatial"}),
        ("decoder", {"mid_block_type": "UNetMidBlock2D"}),
        ("decoder", {"addition_embed_type": "text"}),
        ("decoder", {"class_embed_type": "simple_projection"}),
        ("pixels", {"downsample_type": "conv"}),
        ("pixels", {"resnet_time_scale_shift": "scale_shift"}),
        ("autoencoder", {"shift_factor": 0.1}),
        ("autoencoder", {"use_quant_conv": False}),
        ("prior", {"added_emb_type": None}),
        ("prior", {"norm_in_type": "layer"}),
        ("clip_text", {"hidden_act": "gelu_new"}),
        ("clip_text", {"attention_dropout": 0.1}),
        ("text_proj", {"another": 1}),
    ],
)
def test_settings_that_are_not_built_are_refused_by_name(tmp_path, name, change):
    cls = wrong(tmp_path, name, **change)
    key = next(iter(change))
    word = {"down_block_types": "block types", "mid_block_type": "mid_block_type"}.get(key, key)
    with pytest.raises(CheckpointError, match=word):
        cls.from_pretrained(tmp_path)


def test_two_accounts_of_one_clip_must_agree():
    with pytest.raises(ValueError, match="text_config_dict says hidden_size"):
        CLIPConfig(text_config_dict={"hidden_size": 3})


def test_broken_folders_are_refused(tmp_path):
    model, _ = stored("prior")
    for what in ("missing config", "missing weights", "truncated", "pickle"):
        folder = tmp_path / what
        model.save_pretrained(folder)
        weights = folder / model.filename
        if what == "missing config":
            (folder / "config.json").unlink()
        elif what == "truncated":
            weights.write_bytes(weights.read_bytes()[:-9])
        else:
            weights.unlink()
        if what == "pickle":
            (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
        match = {"truncated": "truncated", "pickle": "pickle"}.get(what, "no (file|weights)")
        with pytest.raises(CheckpointError, match=match):
            Prior.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no folder"):
        Prior.from_pretrained(tmp_path / "elsewhere")
