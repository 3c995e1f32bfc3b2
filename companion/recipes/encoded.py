"""What the recipes of DALL·E 2 train on: pictures and captions as a frozen CLIP reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import checkpoints, data
from companion.clip import CLIP, CLIPText, with_words
from companion.preparation import Preparation
from companion.recipes.clip import spoken
from companion.storybook import Scene, render, sample
from companion.tokenizer import Tokenizer
from companion.train import generator, pick
from companion.unclip import Words

SIZE, SMALL = 64, 16  # pixels that CLIP sees, and that the decoder draws
SCENES = 40_000
MOST = 8.0  # weight of the noisiest steps, where that of the clearest is 1 (``noise_weight``)
READERS = ("taught on", "CLIP's own")  # two text towers; the first is the systems'
GROUP = 64  # pictures that are drawn and read at once
MEASURED = 4096  # pictures from which means, spreads and axes are taken


class FrozenCLIP:
    """A trained CLIP with its tokenizer, which nothing here changes.

    Args:
        clip: Both towers.
        tokenizer: The text tower's.
        preparation: How pictures are prepared for the other one.
    """

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, preparation: Preparation) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer, self.preparation = tokenizer, preparation

    @classmethod
    def open(cls, folder: Path | None = None, words: Path | None = None) -> Self:
        """A folder that the recipe ``clip`` wrote; by default the shipped one.

        Args:
            folder: The folder.
            words: Another text tower's, as the recipe ``text-encoder`` writes it.
        """
        where = checkpoints.WEIGHTS / "clip" if folder is None else folder
        clip = CLIP.from_pretrained(where)
        if words is not None:
            clip = with_words(clip, CLIPText.from_pretrained(words))
        return cls(clip, Tokenizer.from_pretrained(where), Preparation.from_pretrained(where))

    @property
    def width(self) -> int:
        """D, the width of the common space and of the text's states."""
        return self.clip.config.projection_dim

    @torch.no_grad()
    def see(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, H) in [0, 1] to places (B, D), projected, not normalised."""
        size = self.clip.config.vision_config.image_size
        parts = pictures.split(GROUP)
        return torch.cat([self.clip.encode_image(self.preparation(x, size)) for x in parts])

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Words:
        """Captions to embeddings (B, D), states (B, N, D) and masks (B, N); long ones are cut."""
        tokens = self.tokenizer(texts, truncate=True)
        towers = [self.clip.text_model(ids) for ids in tokens.ids.split(GROUP)]
        pooled = torch.cat([x.pooled for x in towers])
        states = torch.cat([x.states for x in towers])
        return Words(self.clip.text_projection(pooled), states, tokens.mask)


def reader() -> FrozenCLIP:
    """The shipped CLIP with the text tower that was taught on (``text_encoder``).

    Both systems that read through CLIP read with it: DALL·E 2 and Stable Diffusion.
    """
    return FrozenCLIP.open(words=checkpoints.WEIGHTS / "text-encoder")


@dataclass(frozen=True)
class Group:
    """Some pictures: what can be said of them, where CLIP puts them, and how they look small."""

    about: list[Scene] | list[str]
    embedding: Tensor  # (G, D)
    small: Tensor  # (G, 3, 16, 16) uint8


class Numbered:
    """Pictures by number, in groups that are drawn once, and what can be said of them.

    Without a folder: Storybook scenes, none with a held-out combination; what their captions say
    and leave out is drawn anew each time. With one: its pictures and their captions, of which every
    tenth is kept for the score.

    Args:
        folder: The reader's ``imagefolder``.
        scenes: How many Storybook scenes there are.
    """

    purpose: str  # names the stream of scenes: another one is another set of pictures
    made: Callable[[list[Scene] | list[str], Tensor], Any]  # what is kept of a group of pictures

    def __init__(self, folder: Path | None = None, scenes: int = SCENES) -> None:
        self.rows = None if folder is None else data.ImageFolder(folder, SIZE)
        n = scenes if self.rows is None else len(self.rows)
        apart = self.rows is not None and n >= 20
        self.used = [i for i in range(n) if not (apart and i % 10 == 9)]
        self.kept = [i for i in range(n) if apart and i % 10 == 9]
        self._groups: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.used)

    def group(self, number: int) -> Any:
        """Pictures to train on, from ``number * 64`` on, with their ``about``. Which they are
        decides the result to the last bit, so that a resumed run sees the same ones."""
        if number not in self._groups:
            places = self.used[number * GROUP : (number + 1) * GROUP]
            if self.rows is None:
                about = sample(len(places), generator(0, self.purpose, number))
                pictures = render(about, SIZE)
            else:
                about, pictures = self._read(places)
            self._groups[number] = self.made(about, pictures)
        return self._groups[number]

    def places(self, indices: Tensor) -> list[int]:
        """Numbers of the pictures of samples: first all in their order, then shuffled."""
        n = len(self)
        later = pick(indices, n).tolist()
        return [i if i < n else later[k] for k, i in enumerate(indices.tolist())]

    def take(self, places: Sequence[int]) -> list[tuple[Any, int]]:
        """For each number its group, and where in the group it stands."""
        return [(self.group(i // GROUP), i % GROUP) for i in places]

    def captions(
        self, found: Sequence[tuple[Any, int]], generator: torch.Generator, dropped: float
    ) -> list[str]:
        """A caption of each, of which the share ``dropped`` is replaced by the empty one."""
        texts = [self.say(group.about[k], generator) for group, k in found]
        kept = (torch.rand(len(texts), generator=generator) >= dropped).tolist()
        return [text if k else "" for text, k in zip(texts, kept, strict=True)]

    @staticmethod
    def say(about: Scene | str, generator: torch.Generator) -> str:
        """A caption: as CLIP was taught, half of them complete; or the reader's own."""
        return about if isinstance(about, str) else spoken(about, generator)[1]

    def apart(self, n: int) -> tuple[Tensor, list[str]]:
        """At most ``n`` of a folder's pictures that are not trained on, and their captions."""
        about, pictures = self._read((self.kept or self.used)[:n])
        return pictures, about

    def _read(self, places: list[int]) -> tuple[list[str], Tensor]:
        rows = [self.rows[i] for i in places]
        return [row["text"] for row in rows], torch.stack([row["picture"] for row in rows])


class Encoded(Numbered):
    """Pictures by number, each drawn and read by the frozen CLIP once, when first asked for."""

    purpose = "scenes of DALL-E 2"

    def __init__(self, folder: Path | None = None, scenes: int = SCENES) -> None:
        super().__init__(folder, scenes)
        self.clip = reader()

    def made(self, about: list[Scene] | list[str], pictures: Tensor) -> Group:
        """Where CLIP puts the pictures, and how they look small."""
        return Group(about, self.clip.see(pictures), to_bytes(pictures))

    def batch(
        self, indices: Tensor, generator: torch.Generator, dropped: float
    ) -> dict[str, Tensor]:
        """What CLIP makes of pictures and of their captions.

        Args:
            indices: Numbers of the samples, (B,): first all pictures in their order, then shuffled.
            generator: Source of chance.
            dropped: Share of the captions that are replaced by the empty one.

        Returns:
            ``embedding`` (B, D) of the picture; ``small`` (B, 3, 16, 16) in [-1, 1]; ``text``
            (B, D), ``states`` (B, N, D) and ``mask`` (B, N) of the caption.
        """
        found = self.take(self.places(indices))
        words = self.clip.read(self.captions(found, generator, dropped))
        return {
            "embedding": torch.stack([group.embedding[k] for group, k in found]),
            "small": from_bytes(torch.stack([group.small[k] for group, k in found])),
            "text": words.embedding,
            "states": words.states,
            "mask": words.mask,
        }

    def measured(self) -> tuple[Tensor, Tensor]:
        """Places of the first 4096 pictures and of a caption of each, (n, D) twice."""
        g = torch.Generator().manual_seed(0)
        groups = [self.group(k) for k in range(-(-min(MEASURED, len(self)) // GROUP))]
        texts = [self.say(one, g) for group in groups for one in group.about]
        return torch.cat([group.embedding for group in groups]), self.clip.read(texts).embedding


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures of 64 pixels in [0, 1] to small ones of 16, rounded to 256 levels, uint8."""
    return (255 * F.avg_pool2d(pictures, SIZE // SMALL)).round().to(torch.uint8)


def from_bytes(small: Tensor) -> Tensor:
    """Back, to [-1, 1]."""
    return data.to_signed(small.float() / 255)


def shrunk(pictures: Tensor) -> Tensor:
    """Pictures of 64 pixels as a perfect decoder would draw them: (B, 3, 16, 16) in [0, 1]."""
    return (from_bytes(to_bytes(pictures)) + 1) / 2


def again(scene: Scene, generator: torch.Generator) -> Scene:
    """Another scene of which the same can be said: everything else is drawn anew."""
    u = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    spots = {"left": 0.25, "middle": 0.5, "right": 0.75}
    if len(scene.things) == 2:
        spots = {"left": 0.26, "right": 0.74}
    low = 0.44 if len(scene.things) == 1 else 0.40
    things = tuple(
        replace(
            thing,
            x=round(spots[thing.position] + 0.08 * (u[1 + 2 * i] - 0.5), 4),
            size=round(low + 0.08 * u[2 + 2 * i], 4),
        )
        for i, thing in enumerate(scene.things)
    )
    return replace(scene, things=things, seed=int(u[0] * 2**31))
