"""Our tokenizer gives the numbers and the masks that transformers' CLIPTokenizer gives."""

import json
import random
import shutil

import pytest
import torch

from companion.tokenizer import END, START, Tokenizer

CAPTIONS = [
    "a red house by the sea at dusk",
    "A stream flowing through the woods.",
    "two blue boats, and the moon's light on a snowy meadow",
    "there's a yellow balloon over the desert; it's noon!",
    "an orange mushroom next to a green tree in the forest at night",
]
HARD = [
    "",
    " ",
    "A  RED\n\thouse",
    "it's 2022, they've 10 boats!!",
    "naïve café — ÉCOLE ﬁnd Ⅳ ²",
    "雪の森を流れる小川",
    "a 🏠 by the 🌊 🙂‍↔️ and e\u0301",
    "ñandú \u0000 \u200b\ufeff tail",
    "unseen qqq zzz @#$%^ \\ / <w> </w> <|x|>",
    f"a {END} b",
    f"{START} a house",
    "a" * 60,
]


@pytest.fixture(scope="module", params=[END, "!"], ids=["pads with the end", "pads with !"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(CAPTIONS, 600, context=40, pad=request.param).save_pretrained(path)
    return path


def texts() -> list[str]:
    r = random.Random(0)
    letters = "abcdehorst   .,'!" + "éßñ雪🙂\u00a0\u0301" + "0123"
    drawn = ["".join(r.choice(letters) for _ in range(r.randrange(25))) for _ in range(300)]
    return CAPTIONS + HARD + drawn


def both(ours: Tokenizer, theirs, text: str) -> None:
    out = theirs(
        text, padding="max_length", max_length=ours.context, truncation=True, return_tensors="pt"
    )
    mine = ours(text, truncate=True)
    assert torch.equal(mine.ids, out.input_ids), (text, mine.ids, out.input_ids)
    assert torch.equal(mine.mask, out.attention_mask.bool()), text


def test_same_numbers_as_stock(stock, folder):
    ours = Tokenizer.from_pretrained(folder)
    theirs = stock.CLIPTokenizer.from_pretrained(folder)
    assert theirs.model_max_length == ours.context and len(theirs) == len(ours)
    for text in texts():
        both(ours, theirs, text)


def test_opens_what_stock_saves(stock, folder, tmp_path):
    """Today's transformers writes tokenizer.json alone."""
    theirs = stock.CLIPTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.pad == Tokenizer.from_pretrained(folder).pad
    for text in texts()[:40]:
        both(ours, theirs, text)


def test_published_spelling_of_special_tokens(stock, folder, tmp_path):
    """Folders of 2022 wrap special tokens in objects, and may name the padding elsewhere."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    pad = config.pop("pad_token")
    for key in ("bos_token", "eos_token", "unk_token"):
        config[key] = {
            "__type": "AddedToken", "content": config[key], "lstrip": False, "normalized": True,
            "rstrip": False, "single_word": False,
        }  # fmt: skip
    config |= {"do_lower_case": True, "errors": "replace", "name_or_path": "somewhere"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(tmp_path).pad == pad


def test_decodes_as_stock_does(stock, folder):
    ours = Tokenizer.from_pretrained(folder)
    theirs = stock.CLIPTokenizer.from_pretrained(folder)
    for text in CAPTIONS + ["naïve café", "雪の森"]:
        ids = ours(text).ids[0]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
