"""Words to numbers: CLIP's byte-level byte-pair encoding (Sennrich et al. 2016).

A text is lowered and cut into words; a word is its UTF-8 bytes, the last one marked ``</w>``; the
pairs listed in ``merges.txt`` are joined, in that order, until none is left. As all 256 bytes are
in the vocabulary, plain and marked, any text can be written.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, tensor

from companion.checkpoints import CheckpointError, read_json, write_json, write_text
from companion.pretrained import locate

START, END, MARK = "<|startoftext|>", "<|endoftext|>", "</w>"
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokens(NamedTuple):
    """A batch of texts as numbers."""

    ids: Tensor  # (B, N) long: start, the text, end, padding
    mask: Tensor  # (B, N) bool: True up to the end token


class Tokenizer:
    """CLIP's tokenizer, opened from a folder or trained on captions.

    Args:
        vocabulary: Each piece and its number.
        merges: Pairs of pieces to join, first ones first.
        context: N, the length that every text is padded to.
        pad: The piece to pad with. Trap: Stable Diffusion pads with the end token, Karlo with
            ``"!"`` (number 0); Stable Diffusion's U-Net looks at the padding.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, str]],
        context: int = 77,
        pad: str = END,
    ) -> None:
        for piece in (START, END, pad):
            if piece not in vocabulary:
                raise ValueError(f"the vocabulary has no {piece!r}.")
        self.vocabulary, self.merges = dict(vocabulary), [tuple(m) for m in merges]
        self.context, self.pad = context, pad
        self.start_id, self.end_id, self.pad_id = (vocabulary[p] for p in (START, END, pad))
        # Trap: an unknown piece is the end token, which would end the prompt right there.
        self._bpe = tokenizers.Tokenizer(
            models.BPE(self.vocabulary, self.merges, end_of_word_suffix=MARK, unk_token=END)
        )
        clean = [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
        self._bpe.normalizer = normalizers.Sequence(clean)
        cut = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
        self._bpe.decoder = decoders.ByteLevel()
        # Trap: the padding is a special piece too, so Karlo reads a "!" in a prompt as padding.
        self._bpe.add_special_tokens([START, END, pad])

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self.vocabulary)

    def __call__(self, texts: str | Iterable[str], truncate: bool = False) -> Tokens:
        """Texts to numbers, all of the same length.

        Args:
            texts: One text or several.
            truncate: Cut texts that are too long, rather than refuse them.

        Raises:
            ValueError: A text has more pieces than fit; the message says where it would be cut.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows, room = [], self.context - 2  # without start and end
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"a text is {type(text).__name__}; expected str.")
            ids = self._bpe.encode(text, add_special_tokens=False).ids
            if len(ids) > room and not truncate:
                raise ValueError(
                    f"a text has {len(ids)} pieces, {room} fit; this part is too much:"
                    f" {self.decode(ids[room:])!r}. Shorten it, or pass truncate=True."
                )
            rows.append([self.start_id, *ids[:room], self.end_id])
        padded = [row + [self.pad_id] * (self.context - len(row)) for row in rows]
        mask = [[i < len(row) for i in range(self.context)] for row in rows]
        n = (len(rows), self.context)
        return Tokens(tensor(padded).long().reshape(n), tensor(mask).bool().reshape(n))

    def pieces(self, text: str) -> list[str]:
        """The pieces a text is cut into, as the vocabulary spells them."""
        return self._bpe.encode(text, add_special_tokens=False).tokens

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Numbers back to text, without start, end and what stands behind the end."""
        kept: list[int] = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i == self.end_id:
                break
            if i != self.start_id:
                kept.append(int(i))
        return self._bpe.decode(kept).replace(MARK, " ").strip()

    # --- folders -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, subfolder: str | None = None, *, revision: str | None = None
    ) -> "Tokenizer":
        """Open ``vocab.json`` and ``merges.txt`` (published), or ``tokenizer.json`` (today's).

        Raises:
            CheckpointError: A file is missing or is no CLIP tokenizer.
        """
        path = locate(folder, subfolder, revision=revision)
        config = read_json(path / "tokenizer_config.json")
        kind = str(config.get("tokenizer_class", "CLIPTokenizer"))
        if kind.removesuffix("Fast") != "CLIPTokenizer":
            raise CheckpointError(f"{path} holds a {kind}; expected a CLIPTokenizer.")
        if (path / "vocab.json").is_file():
            vocabulary = read_json(path / "vocab.json")
            if not (path / "merges.txt").is_file():
                raise CheckpointError(f"{path} has vocab.json and no merges.txt. Fetch it again.")
            lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
        elif (path / "tokenizer.json").is_file():
            model = read_json(path / "tokenizer.json").get("model", {})
            if model.get("type") != "BPE" or model.get("end_of_word_suffix") != MARK:
                raise CheckpointError(f"{path / 'tokenizer.json'} is no CLIP tokenizer.")
            vocabulary = model["vocab"]
            merges = [m.split() if isinstance(m, str) else m for m in model["merges"]]
        else:
            raise CheckpointError(f"{path} has neither vocab.json nor tokenizer.json.")
        pad = config.get("pad_token")
        if pad is None and (path / "special_tokens_map.json").is_file():
            pad = read_json(path / "special_tokens_map.json").get("pad_token")
        pad = pad or END
        pad = pad["content"] if isinstance(pad, dict) else pad
        made = {START, END, pad, *("".join(m) for m in merges)}
        orphans = [p for p in vocabulary if len(p.removesuffix(MARK)) > 1 and p not in made]
        if orphans:  # every piece but the bytes is made of two others
            raise CheckpointError(
                f"{path}: no merge makes {orphans[0]!r} (and {len(orphans) - 1} more of the"
                " vocabulary): the merges are truncated or another tokenizer's. Fetch them again."
            )
        try:
            return cls(vocabulary, merges, int(config.get("model_max_length", 77)), pad)
        except Exception as error:  # tokenizers knows no narrower class
            raise CheckpointError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a folder that stock's ``CLIPTokenizer`` opens, in both spellings."""
        folder = Path(folder)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad}
        write_json(folder / "vocab.json", self.vocabulary)
        lines = ["#version: 0.2", *(" ".join(m) for m in self.merges)]
        write_text(folder / "merges.txt", "\n".join(lines) + "\n")
        write_json(folder / "special_tokens_map.json", special)
        config = {"model_max_length": self.context, "tokenizer_class": "CLIPTokenizer", **special}
        write_json(folder / "tokenizer_config.json", {"add_prefix_space": False, **config})
        return folder

    # --- training ------------------------------------------------------------------------------

    @classmethod
    def train(
        cls, texts: Iterable[str], size: int, context: int = 77, pad: str = END
    ) -> "Tokenizer":
        """Learn merges from captions: join the commonest pair, again and again.

        Args:
            texts: Captions.
            size: Pieces in the vocabulary at most: 512 for the bytes, 2 for start and end, merges.
            context: As above.
            pad: As above.
        """
        alphabet = [_BYTES[b] for b in sorted(_BYTES, key=lambda b: (_BYTES[b] != chr(b), b))]
        if size < 2 * len(alphabet) + 2:
            raise ValueError(f"size is {size}; all bytes alone need {2 * len(alphabet) + 2}.")
        pieces = alphabet + [c + MARK for c in alphabet]
        empty = cls({p: i for i, p in enumerate([*pieces, START, END])}, [], context, END)
        words = Counter(word for text in texts for word in empty._words(text))
        cut = {word: [*word[:-1], word[-1] + MARK] for word in words}
        merges: list[tuple[str, str]] = []
        while len(pieces) + 2 < size:
            pairs: Counter[tuple[str, str]] = Counter()
            for word, count in words.items():
                for pair in zip(cut[word], cut[word][1:], strict=False):
                    pairs[pair] += count
            if not pairs:
                break  # every word is one piece already
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties: first in the alphabet
            merges.append(best)
            if "".join(best) not in pieces:
                pieces.append("".join(best))
            cut = {word: _join(parts, best) for word, parts in cut.items()}
        # Trap: the end token has the highest number, and is not 2, so that both ways of stock to
        # find it (``eos_token_id``, or the highest number in a row) find the same place.
        return cls({p: i for i, p in enumerate([*pieces, START, END])}, merges, context, pad)

    def _words(self, text: str) -> list[str]:
        """The words of a text, each byte written as one visible character."""
        text = self._bpe.normalizer.normalize_str(text)
        return [word for word, _ in self._bpe.pre_tokenizer.pre_tokenize_str(text)]


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    i = 0
    while i < len(parts):
        both = tuple(parts[i : i + 2]) == pair
        joined.append("".join(pair) if both else parts[i])
        i += 2 if both else 1
    return joined


def _visible_bytes() -> dict[int, str]:
    """GPT-2's spelling of bytes: itself where it can be seen, else a letter from 256 on."""
    seen = [b for b in range(256) if chr(b).isprintable() and chr(b) != " " and b != 0xAD]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}


_BYTES = _visible_bytes()
