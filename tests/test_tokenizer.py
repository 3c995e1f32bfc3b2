"""The tokenizer by itself: any text can be written, nothing is cut or ended in silence."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.checkpoints import CheckpointError
from companion.tokenizer import END, START, Tokenizer

CAPTIONS = ["a red house by the sea", "a red boat by the sea", "the red sea", "a stream"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 545, context=12)


def test_shape_and_mask(tokenizer):
    ids, mask = tokenizer(["a red house", ""])
    assert ids.shape == mask.shape == (2, 12) and ids.dtype == torch.long
    assert mask.sum(1).tolist() == [5, 2]
    assert ids[:, 0].tolist() == [tokenizer.start_id] * 2
    assert ids[0, 4] == ids[1, 1] == tokenizer.end_id
    assert (ids[~mask] == tokenizer.pad_id).all()


def test_no_text_at_all(tokenizer):
    ids, mask = tokenizer([])
    assert ids.shape == mask.shape == (0, 12)


def test_numbers_are_where_stock_looks(tokenizer):
    """The end token has the highest number, is not 2, and "!" is 0, which Karlo pads with."""
    assert tokenizer.end_id == len(tokenizer) - 1 == max(tokenizer.vocabulary.values())
    assert tokenizer.start_id == len(tokenizer) - 2 and tokenizer.end_id != 2
    assert tokenizer.vocabulary["!"] == 0 and tokenizer.vocabulary["!</w>"] == 256
    assert sorted(tokenizer.vocabulary.values()) == list(range(len(tokenizer)))


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=8))
def test_any_text_comes_back(text):
    """Also letters never seen in training: none becomes the end token and ends the prompt."""
    tokenizer = _cached()
    ids = tokenizer(text.replace("<|", "")).ids[0]
    inside = ids[1 : (ids == tokenizer.end_id).int().argmax()]
    assert not {tokenizer.start_id, tokenizer.end_id} & set(inside.tolist())
    wanted = tokenizer._bpe.normalizer.normalize_str(text.replace("<|", ""))
    # Spaces between pieces are not kept: "3 boats" and "3boats" are the same.
    assert "".join(tokenizer.decode(ids).split()) == "".join(wanted.split())


_KEPT: list[Tokenizer] = []


def _cached() -> Tokenizer:
    if not _KEPT:
        _KEPT.append(Tokenizer.train(CAPTIONS, 545, context=77))
    return _KEPT[0]


def test_emoji_and_unseen_letters(tokenizer):
    for text in ("ß", "雪", "🙂", "q"):
        ids = tokenizer(text).ids[0]
        assert tokenizer.decode(ids) == text
        assert ids.tolist().index(tokenizer.end_id) >= 2


def test_merges_are_learned_commonest_first():
    """By hand: "ab" is in 5 words, "bc" in 3, "cab" in 1."""
    tokenizer = Tokenizer.train(["ab ab ab", "cab ab", "bc bc bc"], 516, context=8)
    assert tokenizer.merges == [("a", "b</w>"), ("b", "c</w>")]
    assert tokenizer.pieces("cab bc ba") == ["c", "ab</w>", "bc</w>", "b", "a</w>"]
    assert tokenizer.pieces("AB") == ["ab</w>"]


def test_training_is_repeatable_and_stops_when_there_is_nothing_to_join():
    a, b = (Tokenizer.train(CAPTIONS * n, 700, context=9) for n in (1, 3))
    assert a.vocabulary == b.vocabulary and a.merges == b.merges
    assert len(a) < 700
    words = {w for c in CAPTIONS for w in c.split()}
    assert all(len(a.pieces(w)) == 1 for w in words)


def test_too_long_texts_are_refused_or_cut(tokenizer):
    text = "a red house by the sea " * 3
    with pytest.raises(
        ValueError, match="18 pieces, 10 fit.*'the sea a red house by the sea'.*truncate"
    ):
        tokenizer(text)
    ids, mask = tokenizer(text, truncate=True)
    assert mask.all() and ids[0, -1] == tokenizer.end_id
    assert tokenizer.decode(ids[0]) == "a red house by the sea a red house by"


def test_folder_and_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.vocabulary == tokenizer.vocabulary and again.merges == tokenizer.merges
    assert (again.context, again.pad) == (tokenizer.context, tokenizer.pad)
    assert torch.equal(again("the red sea").ids, tokenizer("the red sea").ids)


def test_broken_folders(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="no merges.txt"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="neither vocab.json nor"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(CheckpointError, match="no CLIP tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "T5"}))
    with pytest.raises(CheckpointError, match="a T5; expected"):
        Tokenizer.from_pretrained(tmp_path)


def test_wrong_arguments(tokenizer):
    with pytest.raises(TypeError, match="a text is int"):
        tokenizer(["a", 3])
    with pytest.raises(ValueError, match="no '.*endoftext"):
        Tokenizer({START: 0}, [])
    with pytest.raises(ValueError, match="514"):
        Tokenizer.train(CAPTIONS, 300)
    assert END in tokenizer.vocabulary
