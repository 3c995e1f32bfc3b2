"""How much of a score is the luck of one run: recipes trained again with other seeds.

A seed decides the weights that training starts from, which pictures and captions come, and when.
``python -m companion measure clip-seeds`` (an hour and a half), ``… prior-seeds`` (half an hour).
The runs lie in ``runs/NAME-SEED``; one that was stopped goes on, and one that is there is taken.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from companion import checkpoints
from companion.measure import SEEDS, measurement, over_seeds
from companion.recipes import RECIPES
from companion.train import Recipe, train


def number(score: object) -> float:
    """A score of a card, with or without its interval."""
    return float(score["value"] if isinstance(score, dict) else score)  # type: ignore[arg-type]


def run(recipe: Recipe, out: Path, steps: int, seed: int, precision: str) -> Path:
    """Train on one core, or go on where a run was stopped: the folder of the final weights."""
    done = train(
        recipe, out, resume=True, steps=steps, seed=seed, precision=precision,
        threads=1, device="cpu", quiet=True,
    )  # fmt: skip
    if not done.finished:
        raise RuntimeError(f"{out} is not finished: {done.message}")
    return done.final


def trained_again(
    recipe: Recipe, seeds: Sequence[int] = SEEDS, runs: Path = Path("runs")
) -> dict[str, Any]:
    """The shipped weights' scores, and those of the same recipe from other seeds.

    Args:
        recipe: Whose weights are shipped.
        seeds: The shipped weights' own seed among them, whose run is not repeated.
        runs: Where the other runs lie, or will.

    Returns:
        By what the card scores: ``value``, the mean over ``seeds``, with ``low`` and ``high``
        (Student's t) and ``runs``, one number a seed.
    """
    card = checkpoints.read_card(checkpoints.WEIGHTS / recipe.name)
    scores = {}
    for seed in seeds:
        if seed == card["seed"]:
            scores[seed] = card["score"]
            continue
        final = run(recipe, runs / f"{recipe.name}-{seed}", card["steps"], seed, card["precision"])
        scores[seed] = checkpoints.read_card(final)["score"]
    rows = {
        what: over_seeds([number(scores[seed][what]) for seed in seeds]) for what in card["score"]
    }
    return {"seeds": list(seeds), "steps": card["steps"], "rows": rows}


@measurement(
    "clip-seeds",
    "CLIP trained from nothing three times, with other weights at the start and other pictures: the"
    " scores of each, their mean, and its 95 % interval by Student's t",
    minutes=90,
    needs=("clip",),
)
def clip_seeds() -> dict[str, Any]:
    """For chapter 5: CLIP's scores from three seeds."""
    return trained_again(RECIPES["clip"])


@measurement(
    "prior-seeds",
    "The diffusion prior trained from nothing three times, with other weights at the start and"
    " other captions: the scores of each, their mean, and its 95 % interval by Student's t",
    minutes=30,
    needs=("clip", "text-encoder", "prior"),
)
def prior_seeds() -> dict[str, Any]:
    """Chapter 7's last table."""
    return trained_again(RECIPES["prior"])
