"""Imagen's language model: a network that only ever reads, trained on captions without a picture.

Saharia et al. 2022 take the encoder of T5 and throw its decoder away (section 2.1). T5 is trained
on damaged text, from which the decoder writes what is missing (Raffel et al. 2020, section 3.1.4).
So it is here: the reader sees a caption with pieces deleted, and a writer that sees nothing but the
reader's states writes the whole caption, as in BART (Lewis et al. 2020, section 2.2). What a state
does not keep, the writer cannot say. Then the writer is thrown away.

A network that predicts the next piece, as most language models do, was tried first. Its last states
know what may come next, and that is the same after "house" as after "tree": they differed by 7 % of
their length, and that was all by which a U-Net could have told the two apart.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import checkpoints, data
from companion.clip import CLIPText, CLIPTextConfig
from companion.recipes.clip import spoken
from companion.recipes.encoded import SIZE
from companion.scores import interval
from companion.storybook import sample
from companion.tokenizer import Tokenizer
from companion.train import Recipe, pick

LAYERS, HEADS, WIDTH = 3, 4, 96
DELETED = 0.15  # share of the pieces (T5, section 3.1.4)
WRITING = 2  # layers of the writer
FRESH = 97  # the seed of captions for the score, which no training draws from


class Captions:
    """Texts alone: what can be said of Storybook scenes, or the captions of a reader's folder.

    The pieces are CLIP's (``companion/weights/clip``), which were learnt from captions alone too.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.tokenizer = Tokenizer.from_pretrained(checkpoints.WEIGHTS / "clip")
        texts = None if folder is None else data.ImageFolder(folder, SIZE).texts
        self.texts = (
            texts
            if texts is None or len(texts) < 20
            else [text for i, text in enumerate(texts) if i % 10 != 9]
        )
        self.kept = [] if texts is None else texts[9::10] or texts

    def __len__(self) -> int:
        return 0 if self.texts is None else len(self.texts)

    def say(self, indices: Tensor, generator: torch.Generator) -> list[str]:
        """A caption for each sample."""
        if self.texts is None:
            return [spoken(scene, generator)[1] for scene in sample(len(indices), generator)]
        return [self.texts[i] for i in pick(indices, len(self.texts)).tolist()]

    def apart(self, n: int, *, held_out: bool = False) -> list[str]:
        """At most ``n`` captions that are not trained on."""
        return fresh(n, held_out=held_out) if self.texts is None else self.kept[:n]


def fresh(n: int, *, held_out: bool = False) -> list[str]:
    """``n`` captions of Storybook scenes, which no training draws."""
    g = torch.Generator().manual_seed(FRESH)
    return [spoken(scene, g)[1] for scene in sample(n, g, held_out=held_out)]


class Rewriter(nn.Module):
    """A reader, and a writer that sees the reader's states and what it has written so far.

    Args:
        reader: Whose states the writer sees.
    """

    def __init__(self, reader: CLIPText) -> None:
        super().__init__()
        self.reader = reader
        width = reader.config.hidden_size
        layer = nn.TransformerDecoderLayer(
            width, HEADS, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.writer = nn.TransformerDecoder(layer, WRITING, nn.LayerNorm(width))

    def forward(self, seen: Tensor, seen_mask: Tensor, written: Tensor) -> Tensor:
        """How likely each piece is to come next.

        The table of embeddings is used three times: to read, to write, and as the directions that
        what is to be written is compared with (Press and Wolf 2017).

        Args:
            seen: The damaged caption, (B, N).
            seen_mask: 1 where it has a piece, (B, N).
            written: The whole caption, (B, M).

        Returns:
            Logits of the piece after each of ``written``, (B, M, pieces).
        """
        embed = self.reader.text_model.embeddings
        table = embed["token_embedding"].weight
        n = written.shape[1]
        later = torch.ones(n, n, dtype=torch.bool, device=written.device).triu(1)
        states = self.writer(
            F.embedding(written, table) + embed["position_embedding"].weight[:n],
            self.reader(seen).states,
            tgt_mask=later,
            memory_key_padding_mask=~seen_mask.bool(),
        )
        return states @ table.T

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        card: Mapping[str, object] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """The reader's folder. Nobody needs the writer any more."""
        return self.reader.save_pretrained(folder, card=card, dtype=dtype)


def build(captions: Captions) -> Rewriter:
    """A fresh reader of the captions' pieces, with its writer."""
    pieces = captions.tokenizer
    config = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=pieces.context,
        bos_token_id=pieces.start_id,
        eos_token_id=pieces.end_id,
        pad_token_id=pieces.pad_id,
    )
    return Rewriter(CLIPText(config))


def damaged(ids: Tensor, mask: Tensor, pad: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Captions without some of their pieces; start and end stay, and what is left moves up.

    Args:
        ids: Token numbers, (B, N).
        mask: 1 up to the end token, (B, N).
        pad: What to put behind the end.
        generator: Source of chance.

    Returns:
        Token numbers (B, N), and which of them are text.
    """
    within = mask.bool()
    inner = within & within.roll(-1, 1)  # neither the end token nor what stands behind it
    inner[:, 0] = False
    inner[:, -1] = False
    gone = inner & (torch.rand(ids.shape, generator=generator) < DELETED)
    keep = within & ~gone
    order = (~keep).int().argsort(dim=1, stable=True)
    left = keep.gather(1, order)
    return ids.gather(1, order).masked_fill(~left, pad), left.to(mask.dtype)


def batch(indices: Tensor, generator: torch.Generator, captions: Captions) -> dict[str, Tensor]:
    """Captions, damaged and whole: token numbers (B, N), and which of them are text."""
    tokens = captions.tokenizer(captions.say(indices, generator), truncate=True)
    seen, left = damaged(tokens.ids, tokens.mask, captions.tokenizer.pad_id, generator)
    return {"ids": tokens.ids, "mask": tokens.mask, "seen": seen, "seen_mask": left}


def loss(
    model: Rewriter, batch: dict[str, Tensor], captions: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the whole caption, in nats a piece."""
    logits = model(batch["seen"], batch["seen_mask"], batch["ids"][:, :-1])
    text = batch["mask"][:, 1:].bool()
    wanted = batch["ids"][:, 1:].masked_fill(~text, -100)
    right = (logits.argmax(-1) == wanted)[text].float().mean()
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten()), {"right": right}


@torch.no_grad()
def score(model: Rewriter, captions: Captions) -> dict[str, object]:
    """Captions apart, undamaged: how many are written back whole, each piece after the true ones.

    Whoever cannot tell "left" from "right" in the states fails here.
    """
    found = written_back(model, captions.tokenizer, captions.apart(1000))
    if captions.texts is None:
        texts = captions.apart(1000, held_out=True)
        found |= written_back(model, captions.tokenizer, texts, ", held-out combinations")
    return found


@torch.no_grad()
def written_back(
    model: Rewriter, tokenizer: Tokenizer, texts: list[str], which: str = ""
) -> dict[str, object]:
    """How many captions are written back whole from the states of the undamaged caption.

    Args:
        model: Reader and writer.
        tokenizer: Theirs.
        texts: The captions.
        which: What the name of the mark says of them.
    """
    tokens, whole = tokenizer(texts, truncate=True), 0
    for ids, mask in zip(tokens.ids.split(100), tokens.mask.split(100), strict=True):
        said = model(ids, mask, ids[:, :-1]).argmax(-1)
        whole += int(((said == ids[:, 1:]) | ~mask[:, 1:].bool()).all(1).sum())
    return {f"captions written back whole{which}": interval(whole, len(texts))}


def usual(name: str, about: str, **numbers: object) -> Recipe:
    """A recipe with what Imagen's networks and ``text-encoder`` are trained with, unless told
    otherwise."""
    shared: Mapping[str, object] = {
        "warmup": 200,
        "decay": "late",
        "optimiser": "muon",
        "betas": (0.9, 0.99),
        "learning_rate": 2e-3,
        "ema": 0.999,
        "chunk": 32,
        "dtype": "float16",
    }
    return Recipe(name=name, about=about, **(shared | numbers))


RECIPES = (
    usual(
        "language-model",
        "Imagen's reader of captions: a causal Transformer whose states have to hold what a"
        " writer needs to write the caption again. It has never seen a picture, and never read of"
        " the held-out combinations.",
        data=Captions,
        model=build,
        batch=batch,
        loss=loss,
        score=score,
        beside=lambda folder, captions: captions.tokenizer.save_pretrained(folder),
        needs=("clip",),
        steps=1500,
        batch_size=64,
        minutes=8,
        ema=0.998,
        data_about="captions of Storybook scenes, each a new one; no pictures",
    ),
)
