"""CLIP: pictures and their captions into one space, and a tokenizer that its captions taught."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import data
from companion.clip import (
    CLIP,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    contrastive_loss,
    normalise,
)
from companion.preparation import Preparation
from companion.scores import interval
from companion.storybook import (
    COLOURS,
    KINDS,
    PLACES,
    POSITIONS,
    SKIES,
    Facts,
    Scene,
    ThingFacts,
    caption,
    is_held_out,
    render,
    sample,
    write,
)
from companion.tokenizer import Tokenizer
from companion.train import Recipe, pick

SIZE, WIDTH = 64, 128  # pixels; width of both towers and of the common space
CONTEXT = 40  # pieces: the longest caption that Storybook can write, start and end included
COLOURS_SHARED_FROM = 64_000  # pictures: by then sky, place and colours are known, kinds are not
SHARPEST = 100.0  # 1 / temperature goes no further (CLIP, section 2.5)


class Pairs:
    """Pictures with captions: Storybook's own, drawn as training goes, or those of a folder.

    Of the book's captions half say everything, as those who draw from words will want it, and half
    leave things out, as captions on the web do: each fact stays with a chance that is itself drawn
    from 0.3 to 1. Of a folder every tenth picture is kept for the score.

    Args:
        folder: The reader's ``imagefolder``; None for the book's scenes.
        tokenizer: A trained one; None for a new one, learnt from the captions.
    """

    def __init__(self, folder: Path | None = None, tokenizer: Tokenizer | None = None) -> None:
        self.rows = None if folder is None else data.ImageFolder(folder, SIZE)
        self.tokenizer = tokenizer or self._learnt()
        if self.rows is None:
            return
        names = list(dict.fromkeys(row["file_name"] for row in self.rows.rows))
        number = {name: i for i, name in enumerate(names)}
        self.numbers = [number[row["file_name"]] for row in self.rows.rows]
        few = len(names) < 20
        self.kept = [] if few else [i for i, n in enumerate(self.numbers) if n % 10 == 9]
        self.used = [i for i, n in enumerate(self.numbers) if few or n % 10 != 9]

    def _learnt(self) -> Tokenizer:
        if self.rows is None:
            g = torch.Generator().manual_seed(0)
            return Tokenizer.train([spoken(s, g)[1] for s in sample(20_000, g)], 1000, CONTEXT)
        texts = self.rows.texts
        draft = Tokenizer.train(texts, 2000)
        longest = 2 + max(len(draft.pieces(text)) for text in texts)
        room = min(77, max(CONTEXT, longest))  # longer captions are cut, as CLIP cuts at 77
        # Trap: a tensor file does not say what N is, and N + 4 = 64 could be taken for a picture.
        room += room + 4 in (16, 64, 256)
        return Tokenizer(draft.vocabulary, draft.merges, room)

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures, captions, and what it takes to know which caption is true of which picture."""
        if self.rows is None:
            late = bool(indices[0] >= COLOURS_SHARED_FROM)
            scenes = neighbours(sample(len(indices), generator), share_colours=late)
            told = [spoken(scene, generator) for scene in scenes]
            return {
                "pixels": normalise(render(scenes, SIZE)),
                "ids": self.tokenizer([text for _, text in told], truncate=True).ids,
                "said": numbers([facts for facts, _ in told]),
                "shown": numbers([scene.facts() for scene in scenes]),
            }
        chosen = [self.used[i] for i in pick(indices, len(self.used)).tolist()]
        rows = [self.rows[i] for i in chosen]
        return {
            "pixels": normalise(torch.stack([row["picture"] for row in rows])),
            "ids": self.tokenizer([row["text"] for row in rows], truncate=True).ids,
            "number": torch.tensor([self.numbers[i] for i in chosen]),
        }

    def write_beside(self, folder: Path) -> None:
        """The tokenizer and how to prepare a picture, where stock libraries look for them."""
        self.tokenizer.save_pretrained(folder)
        Preparation.usual(SIZE).save_pretrained(folder)


def neighbours(scenes: Sequence[Scene], share_colours: bool) -> list[Scene]:
    """The first half of the scenes moved to the place of the first one, under its sky.

    Only their things tell them apart then, and with ``share_colours`` only kinds and positions: a
    network that is asked to tell them apart has to look at things. In CLIP's batch of 32,768 every
    picture meets many that are so like it. Of 64 scenes two share its view, and sky and place are
    nearly always enough.

    Args:
        scenes: Drawn by lot.
        share_colours: Whether the first of two things has the same colour in all of them, and the
            second; but none gets a colour that is held out for its kind.
    """
    half, first = len(scenes) // 2, scenes[0]
    moved = [replace(first, things=scene.things, seed=scene.seed) for scene in scenes[:half]]
    palettes = [[thing.colour for thing in s.things] for s in moved if len(s.things) == 2]
    if share_colours and palettes:
        moved = [_painted(scene, palettes[0]) for scene in moved]
    return [*moved, *scenes[half:]]


def _painted(scene: Scene, palette: Sequence[str]) -> Scene:
    things = zip(scene.things, palette, strict=False)
    painted = replace(scene, things=tuple(replace(thing, colour=c) for thing, c in things))
    return scene if is_held_out(painted) else painted


def spoken(scene: Scene, generator: torch.Generator) -> tuple[Facts, str]:
    """A training caption and what it says: everything in one half, thinned in the other."""
    facts = scene.facts()
    complete, completeness = torch.rand(2, generator=generator).tolist()
    if complete >= 0.5:
        facts = facts.thinned(0.3 + 0.7 * completeness, generator)
    return facts, write(facts, generator)


def config(tokenizer: Tokenizer) -> CLIPConfig:
    """The published architecture at a quarter of its width; as many pieces as the tokenizer has."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.context,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return CLIPConfig(text, vision, WIDTH)


# --- which captions are true of which pictures ----------------------------------------------------


def numbers(facts: Sequence[Facts]) -> Tensor:
    """Facts as whole numbers, int64 (B, 9), -1 where nothing is said: what a batch can carry."""

    def number(options: tuple[str, ...], value: str | None) -> int:
        return -1 if value is None else options.index(value)

    rows = []
    for f in facts:
        row = [number(SKIES, f.sky), number(PLACES, f.place), 0 if f.stream else -1]
        for thing in f.things:
            row += [number(KINDS, thing.kind), number(COLOURS, thing.colour)]
            row += [number(POSITIONS, thing.position)]
        rows.append(row + [-1] * (9 - len(row)))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 9)


def holds(said: Tensor, shown: Tensor) -> Tensor:
    """Which captions (columns) are true of which pictures (rows): bool (B_pictures, B_texts).

    The same as ``Facts.holds_for``, for all pairs at once.

    Args:
        said: ``numbers`` of the captions' facts.
        shown: ``numbers`` of everything that the pictures show.
    """
    said, shown = said[None], shown[:, None]

    def fits(a: slice, b: slice) -> Tensor:
        return ((said[..., a] == -1) | (said[..., a] == shown[..., b])).all(-1)

    view, one, other = slice(0, 3), slice(3, 6), slice(6, 9)
    straight = fits(one, one) & fits(other, other)
    crossed = fits(one, other) & fits(other, one)
    return fits(view, view) & (straight | crossed)


def also_true(batch: dict[str, Tensor]) -> Tensor:
    """Which captions (columns) are true of which pictures (rows) of a batch of ``Pairs``: bool.

    Of a reader's pictures we know only which captions, or pictures, are the same.
    """
    if "said" in batch:
        return holds(batch["said"], batch["shown"])
    same = (batch["ids"][:, None] == batch["ids"][None]).all(-1)
    return same | (batch["number"][:, None] == batch["number"][None])


def shortened(ids: Tensor, end_id: int) -> Tensor:
    """Token numbers (B, N) up to the longest text's end: nothing looks at what stands behind."""
    return ids[:, : int((ids == end_id).int().argmax(1).max()) + 1]


def _loss(model: CLIP, batch: dict[str, Tensor], pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
    """A caption that is true of another picture too is no wrong answer there: it is left out."""
    with torch.no_grad():  # after each step, as CLIP's authors did
        model.logit_scale.clamp_(max=math.log(SHARPEST))
    logits = model(shortened(batch["ids"], pairs.tokenizer.end_id), batch["pixels"])
    right = logits.argmax(1) == torch.arange(len(logits), device=logits.device)
    return contrastive_loss(logits, also_true(batch)), {
        "right": right.float().mean(),
        "sharpness": model.logit_scale.exp(),
    }


# --- the score ------------------------------------------------------------------------------------


@torch.no_grad()
def embed_texts(model: CLIP, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Captions to directions in the common space: (B, D), length 1."""
    device = next(model.parameters()).device
    parts = [
        model.encode_text(tokenizer(texts[i : i + 250]).ids.to(device))
        for i in range(0, len(texts), 250)
    ]
    return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def embed_pictures(model: CLIP, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] to directions in the common space: (B, D), length 1."""
    device = next(model.parameters()).device
    parts = [model.encode_image(normalise(x).to(device)) for x in pictures.split(250)]
    return F.normalize(torch.cat(parts), dim=-1)


ZERO_SHOT = {  # the question, the scenes it is asked about, its possible answers, the right one
    "sky": lambda thing: [Facts(sky=sky) for sky in SKIES],
    "place": lambda thing: [Facts(place=place) for place in PLACES],
    "kind": lambda thing: [Facts(things=(ThingFacts(kind),)) for kind in KINDS],
    "colour": lambda thing: [Facts(things=(ThingFacts(thing.kind, c),)) for c in COLOURS],
    "position": lambda thing: [Facts(things=(ThingFacts(thing.kind, None, p),)) for p in POSITIONS],
}


def zero_shot(
    model: CLIP, tokenizer: Tokenizer, scenes: Sequence[Scene], what: str, seen: Tensor
) -> int:
    """How many pictures lie nearest to the right one of the texts that name each class plainly.

    Args:
        model: The towers.
        tokenizer: Theirs.
        scenes: With one thing each.
        what: A key of ``ZERO_SHOT``: the classes.
        seen: ``embed_pictures`` of their pictures.
    """
    words = {kind: ZERO_SHOT[what](ThingFacts(kind)) for kind in KINDS}
    texts = sorted({write(f) for options in words.values() for f in options})
    where = dict(zip(texts, embed_texts(model, tokenizer, texts), strict=True))
    right = 0
    for scene, picture in zip(scenes, seen, strict=True):
        options = words[scene.things[0].kind]
        best = (torch.stack([where[write(f)] for f in options]) @ picture).argmax()
        right += options[int(best)].holds_for(scene.facts())
    return right


def tellable(n: int, generator: torch.Generator, held_out: bool = False) -> list[Scene]:
    """``n`` scenes of which each one's complete caption is true of no other."""
    scenes: list[Scene] = []
    while len(scenes) < n:
        (new,) = sample(1, generator, held_out=held_out)
        facts = new.facts()
        others = [scene.facts() for scene in scenes]
        if not any(facts.holds_for(f) or f.holds_for(facts) for f in others):
            scenes.append(new)
    return scenes


def retrieval(words: Tensor, pictures: Tensor) -> tuple[int, int]:
    """Of pairs in order: how many pictures find their text, how many texts their picture."""
    close, here = pictures @ words.T, torch.arange(len(words), device=words.device)
    return int((close.argmax(1) == here).sum()), int((close.argmax(0) == here).sum())


def exam(model: CLIP, tokenizer: Tokenizer, n: int = 1000, seed: int = 2026) -> dict[str, object]:
    """Zero-shot answers and retrieval on fresh scenes, and on combinations never trained on.

    Args:
        model: The towers.
        tokenizer: Theirs.
        n: Scenes a question; retrieval has n / 100 rounds among 100.
        seed: Of the scenes.
    """
    g, found = torch.Generator().manual_seed(seed), {}
    for held_out in (False, True):
        tail = ", held-out combinations" if held_out else ""
        scenes = sample(n, g, held_out=held_out, things=(1,))
        seen = embed_pictures(model, render(scenes, SIZE))
        for what in ZERO_SHOT:
            right = zero_shot(model, tokenizer, scenes, what, seen)
            found[f"zero-shot {what}{tail}"] = interval(right, n)
        to_text = to_picture = rounds = 0
        for rounds in range(1, max(1, n // 100) + 1):  # noqa: B007 (its last value is used)
            scenes = tellable(100, g, held_out)
            words = embed_texts(model, tokenizer, [caption(s, generator=g) for s in scenes])
            a, b = retrieval(words, embed_pictures(model, render(scenes, SIZE)))
            to_text, to_picture = to_text + a, to_picture + b
        found[f"picture finds its caption among 100{tail}"] = interval(to_text, 100 * rounds)
        found[f"caption finds its picture among 100{tail}"] = interval(to_picture, 100 * rounds)
    return found


def _score(model: CLIP, pairs: Pairs) -> dict[str, object]:
    if pairs.rows is None:
        return exam(model, pairs.tokenizer)
    if not pairs.kept:
        return {}
    rows = {pairs.numbers[i]: pairs.rows[i] for i in pairs.kept[:1000]}
    chosen = {row["text"]: row for row in rows.values()}  # no caption twice
    texts = [row["text"] for row in list(chosen.values())[:100]]
    pictures = torch.stack([chosen[text]["picture"] for text in texts])
    ids = pairs.tokenizer(texts, truncate=True).ids
    words = F.normalize(model.encode_text(ids), dim=-1)
    a, b = retrieval(words, embed_pictures(model, pictures))
    n = len(texts)
    return {
        f"picture finds its caption among {n} never trained on": interval(a, n),
        f"caption finds its picture among {n} never trained on": interval(b, n),
    }


def _model(pairs: Pairs) -> nn.Module:
    return CLIP(config(pairs.tokenizer))


RECIPES = (
    Recipe(
        name="clip",
        about="Reads 64 x 64 pictures and captions into one space of 128 dimensions: transformers'"
        " CLIPModel, small, with a tokenizer of its own. It never saw the held-out combinations.",
        data=Pairs,
        model=_model,
        batch=lambda indices, generator, pairs: pairs.batch(indices, generator),
        loss=_loss,
        score=_score,
        beside=lambda folder, pairs: pairs.write_beside(folder),
        steps=3000,
        batch_size=64,
        learning_rate=1e-3,
        minutes=60,
        warmup=100,
        decay="cosine",
        restarts=(1800,),
        betas=(0.9, 0.98),
        weight_decay=0.1,
        ema=0.995,
        chunk=32,
        dtype="float16",
        save_every=100,
    ),
)
