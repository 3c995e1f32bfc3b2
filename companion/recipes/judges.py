"""The two judges: they read facts back from pictures, and score every generator."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from companion import data, judge
from companion.storybook import parse, sample
from companion.train import Recipe, pick


@dataclass(frozen=True)
class Captioned:
    """The reader's own pictures (64 x 64), with the Storybook facts that their captions say."""

    rows: data.ImageFolder

    @classmethod
    def open(cls, folder: Path | None) -> "Captioned | None":
        """None for the book's own scenes, which are drawn as training goes."""
        return None if folder is None else cls(data.ImageFolder(folder, 64))

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures, spoiled like the book's own, and what is known about them."""
        rows = [self.rows[i] for i in pick(indices, len(self.rows)).tolist()]
        facts = [parse(row["text"]) for row in rows]
        pictures, is_scene = judge.spoiled(torch.stack([r["picture"] for r in rows]), generator)
        return {"pictures": pictures, **judge.labels(facts), "scene": is_scene}


def _judge_batch(
    indices: Tensor, generator: torch.Generator, folder: Captioned | None
) -> dict[str, Tensor]:
    if folder is not None:
        return folder.batch(indices, generator)
    return judge.training_batch(sample(len(indices), generator, held_out=None), generator)


def _judge_loss(
    model: nn.Module, batch: dict[str, Tensor], folder: object
) -> tuple[Tensor, dict[str, Tensor]]:
    answers = dict(batch)
    return judge.loss(model, answers.pop("pictures"), answers)


def _judge(name: str, about: str, config: judge.JudgeConfig, **numbers: object) -> Recipe:
    return Recipe(
        name=name,
        about=about + " Trained on renders only, on all combinations, the held-out ones included.",
        data=Captioned.open,
        model=lambda folder: judge.Judge(config),
        batch=_judge_batch,
        loss=_judge_loss,
        score=lambda model, folder: judge.exam(model),
        batch_size=128,
        chunk=64,
        warmup=100,
        decay="cosine",
        weight_decay=0.02,
        ema=0.995,
        dtype="float16",
        **numbers,
    )


RECIPES = (
    _judge(
        "judge",
        "Reads sky, place, stream, things, colours and positions from a 64 x 64 picture, or says"
        " that it shows no scene. A convolutional network.",
        judge.JudgeConfig("convolution", width=24, depth=4),
        steps=1500,
        learning_rate=2e-3,
        minutes=15,
    ),
    _judge(
        "judge-second",
        "The second judge, a Transformer over patches: it checks the first.",
        judge.JudgeConfig("attention", width=96, depth=4),
        steps=1500,
        learning_rate=1e-3,
        minutes=15,
    ),
)
