"""CLIP's text tower, taught on until its states keep the whole caption: who reads for both systems.

CLIP's loss asks a caption for one vector, and only for what tells its picture from the others of a
batch. Its states, which the U-Nets look at, need not keep more: in the shipped CLIP, "left"
and "right" are nearly the same. So the text tower goes on learning, from two losses at once. The
contrastive one stays, with everything else of CLIP locked: the picture tower (Zhai et al. 2022,
locked-image tuning), both projections and the temperature. Beside it a writer must write the whole
caption from the states of a damaged one, as Imagen's language model is taught (``language``).
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from companion.clip import CLIPText, contrastive_loss, with_words
from companion.recipes import language
from companion.recipes.clip import Pairs, also_true, exam, shortened
from companion.recipes.encoded import FrozenCLIP
from companion.recipes.language import Rewriter, damaged, written_back


class Locked(Pairs):
    """Pictures with captions, as CLIP was trained on, and the CLIP that stays as it is."""

    def __init__(self, folder: Path | None = None) -> None:
        self.clip = FrozenCLIP.open()
        super().__init__(folder, self.clip.tokenizer)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures where CLIP puts them, captions whole and damaged."""
        found = super().batch(indices, generator)
        with torch.no_grad():
            seen = self.clip.clip.encode_image(found.pop("pixels"))
        ends = (found["ids"] == self.tokenizer.end_id).int().argmax(1)
        mask = (torch.arange(found["ids"].shape[1]) <= ends[:, None]).to(torch.int64)
        less, left = damaged(found["ids"], mask, self.tokenizer.pad_id, generator)
        return found | {"embedding": seen, "mask": mask, "seen": less, "seen_mask": left}


def build(pairs: Locked) -> Rewriter:
    """The shipped text tower, and a fresh writer."""
    words = CLIPText(pairs.clip.clip.config.text_config)
    words.text_model.load_state_dict(pairs.clip.clip.text_model.state_dict())
    return Rewriter(words)


def loss(
    model: Rewriter, batch: dict[str, Tensor], pairs: Locked
) -> tuple[Tensor, dict[str, Tensor]]:
    """The contrastive loss of whole captions and the writer's, from damaged ones: their sum."""
    clip = pairs.clip.clip
    pooled = model.reader(shortened(batch["ids"], pairs.tokenizer.end_id)).pooled
    projection, sharpness = (
        x.to(pooled.device) for x in (clip.text_projection.weight, clip.logit_scale)
    )
    words = F.normalize(pooled @ projection.T, dim=-1)
    logits = sharpness.exp() * F.normalize(batch["embedding"], dim=-1) @ words.T
    compared = contrastive_loss(logits.float(), also_true(batch))
    rewritten, notes = language.loss(model, batch, pairs)
    right = (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()
    return compared + rewritten, {"right": right, "written": notes["right"]}


@torch.no_grad()
def score(model: Rewriter, pairs: Locked) -> dict[str, object]:
    """CLIP's own exam with this text tower, and how many captions are written back whole."""
    if pairs.rows is not None:
        texts = [pairs.rows[i]["text"] for i in (pairs.kept or pairs.used)[:1000]]
        return written_back(model, pairs.tokenizer, list(dict.fromkeys(texts)))
    found = exam(with_words(pairs.clip.clip, model.reader), pairs.tokenizer)
    for held_out, which in ((False, ""), (True, ", held-out combinations")):
        texts = language.fresh(1000, held_out=held_out)
        found |= written_back(model, pairs.tokenizer, texts, which)
    return found


RECIPES = (
    language.usual(
        "text-encoder",
        "The reader of DALL·E 2 and Stable Diffusion: the text tower of the shipped CLIP, trained"
        " on with a writer beside the contrastive loss, so that its states keep the whole caption."
        " The rest of CLIP is locked. It never read of the held-out combinations.",
        data=Locked,
        model=build,
        batch=lambda indices, generator, pairs: pairs.batch(indices, generator),
        loss=loss,
        score=score,
        beside=lambda folder, pairs: pairs.tokenizer.save_pretrained(folder),
        needs=("clip",),
        steps=600,
        batch_size=64,
        minutes=14,
        warmup=100,
        ema=0.998,
        data_about="Storybook scenes, each a new one with a new caption",
    ),
)
