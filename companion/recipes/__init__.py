"""How every network of the book is trained: ``RECIPES`` maps a name to its :class:`~.train.Recipe`.

``python -m companion train NAME`` runs one; with ``--data FOLDER`` it runs on your own pictures.
Each module holds a family of recipes, in a tuple of its own called ``RECIPES``.
"""

from companion.recipes import (
    autoencoder,
    clip,
    decoder,
    digits,
    imagen,
    judges,
    language,
    noised,
    priors,
    stable_diffusion,
    text_encoder,
    upsamplers,
)
from companion.recipes.digits import (
    DIGITS,
    DigitClassifier,
    DigitClassifierConfig,
    Labelled,
    draw_digits,
)
from companion.recipes.judges import Captioned
from companion.train import Recipe

FAMILIES = (
    judges,
    digits,
    autoencoder,
    clip,
    priors,
    decoder,
    upsamplers,
    noised,
    text_encoder,
    stable_diffusion,
    language,
    imagen,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for family in FAMILIES for recipe in family.RECIPES
}
