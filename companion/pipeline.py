"""What the systems share: a published folder opened part by part, and its scheduler read.

A system's folder has one subfolder a part and ``model_index.json``, which names the stock class of
each. Nothing in it is ignored: a part that is unknown here is refused by name, and one that is
knowingly left out (a safety checker) is said to be.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from companion import checkpoints, errors
from companion.checkpoints import CheckpointError, read_json, write_json
from companion.clip import CLIP, CLIPText, with_words
from companion.preparation import Preparation
from companion.pretrained import Pretrained, locate
from companion.schedule import draw
from companion.scheduler import Generators
from companion.tokenizer import Tokenizer

log = logging.getLogger("companion")


def own_clip(clip: Path, words: Path, dtype: torch.dtype) -> tuple[CLIP, Tokenizer, Preparation]:
    """What the book's own systems read and see with: CLIP, its text tower taught on (``words``)."""
    return (
        with_words(
            CLIP.from_pretrained(clip, dtype=dtype), CLIPText.from_pretrained(words, dtype=dtype)
        ),
        Tokenizer.from_pretrained(clip),
        Preparation.from_pretrained(clip),
    )


class System:
    """Text in, pictures out; a folder of parts. Attributes are named as the subfolders are."""

    opens: ClassVar[tuple[str, ...]]  # the pipelines whose folders this class opens, first saved
    shipped: ClassVar[str] = ""  # what ``draw --model`` calls the book's own, trained on Storybook
    made_of: ClassVar[tuple[str, ...]] = ()  # the shipped weights that the book's own consists of
    asked_with: ClassVar[dict[str, float]] = {}  # the scales with which the book's own is asked
    _assembled: ClassVar[Callable[[torch.dtype], dict[str, Any]]]  # its parts, opened
    parts: ClassVar[dict[str, type]]  # subfolder -> the class that opens it
    optional: ClassVar[tuple[str, ...]] = ()  # parts that not every pipeline has
    skipped: ClassVar[dict[str, str]] = {}  # parts that are left out, and what to say of it
    walks: ClassVar[dict[str, tuple[str, int]]] = {}  # walk -> the part it asks, its usual steps

    def __init__(self, **parts: Any) -> None:
        for name in self.parts:
            errors.expect(
                parts.get(name) is not None or name in self.optional,
                f"{type(self).__name__} needs {name}.",
            )
            setattr(self, name, parts.pop(name, None))
        errors.expect(not parts, f"{type(self).__name__} has no part {', '.join(parts)}.")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        **parts: Any,
    ) -> Self:
        """Open a published folder.

        Args:
            folder: A folder with ``model_index.json``, a hub id (``pretrained.locate``), or
                ``"storybook"``: the book's own, shipped with the companion.
            dtype: Type of the parameters.
            revision: Commit, tag or branch on the hub.
            parts: Taken instead of the folder's, or beside them, by name.

        Raises:
            CheckpointError: A part is missing, truncated, altered, or not implemented here.
        """
        if folder == "storybook":
            return cls(**cls.storybook(dtype) | parts)
        root = locate(folder, revision=revision)
        listed = cls.listed(root, parts)
        for name, why in cls.skipped.items():
            if name in listed and why:
                log.warning("%s: %s", root / name, why)
        opened = {
            name: _open(kind, root, name, dtype)
            for name, kind in cls.parts.items()
            if name in listed and name not in parts
        }
        return cls(**opened | parts)

    @classmethod
    def storybook(cls, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The parts of the book's own system. Its networks are stored once, one folder a recipe;
        ``save_pretrained`` writes them as the one folder that stock opens.

        Raises:
            CheckpointError: One of them is not shipped with this companion.
        """
        lacking = [name for name in cls.made_of if not (checkpoints.WEIGHTS / name).is_dir()]
        if lacking or not cls.made_of:
            raise CheckpointError(
                f"The book's own {cls.__name__} is not shipped with this companion:"
                f" {', '.join(lacking) or 'all of it'} is missing in {checkpoints.WEIGHTS}. Give"
                " the path of a folder, or a hub id."
            )
        return cls._assembled(dtype)

    @classmethod
    def listed(cls, root: Path, given: Collection[str] = ()) -> set[str]:
        """The parts that ``model_index.json`` lists; an error where it is not this system's."""
        path = root / "model_index.json"
        index = read_json(path)
        kind = index.get("_class_name")
        if kind not in cls.opens:
            raise CheckpointError(
                f"{path}: _class_name is {kind!r}; {cls.__name__} opens {' and '.join(cls.opens)}."
            )
        entries = {k: v for k, v in index.items() if isinstance(v, list)}
        found = {k for k, v in entries.items() if v[1:] and v[1] is not None}
        for name in sorted(found):
            if name not in cls.parts and name not in cls.skipped:
                raise CheckpointError(
                    f"{path}: {cls.__name__} has no part {name!r} ({entries[name][1]}), so it"
                    " cannot promise the same pictures."
                )
        needed = [n for n in cls.parts if n not in cls.optional]
        lacking = [n for n in needed if n not in found and n not in given]
        if lacking:
            raise CheckpointError(f"{path} lists no {', '.join(lacking)}; {cls.__name__} needs it.")
        return found

    @classmethod
    def usual_steps(cls, parts: Collection[str]) -> dict[str, int]:
        """Walks from noise that a system with these parts takes, and the usual steps of each."""
        return {walk: steps for walk, (part, steps) in cls.walks.items() if part in parts}

    @classmethod
    def check(cls, folder: str | Path) -> list[str]:
        """What is wrong with a folder: every part is opened, one at a time. Empty: all is well."""
        try:
            if folder == "storybook":
                cls.from_pretrained(folder)
                return []
            root = locate(folder)
            found = cls.listed(root)
        except ValueError as error:  # a CheckpointError, or parts that do not fit each other
            return [str(error)]
        findings, opened = [], {}
        for name in (n for n in cls.parts if n in found):
            try:
                part = _open(cls.parts[name], root, name, torch.float32)
            except CheckpointError as error:
                findings.append(str(error))
                continue
            if isinstance(part, Pretrained):  # its shapes are enough from here on
                findings += [
                    f"{root / name}: tensor {n!r} is NaN or infinite"
                    for n, p in part.named_parameters()
                    if not bool(torch.isfinite(p).all())
                ]
                part = part.to("meta")
            opened[name] = part
        if not findings:
            try:
                cls(**opened)  # do the parts fit together?
            except ValueError as error:
                findings.append(f"{root}: {error}")
        return findings

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        cards: Mapping[str, Mapping[str, object]] | None = None,
    ) -> Path:
        """Write a folder that ``from_pretrained`` and the stock pipeline open.

        Args:
            folder: Where; made if need be.
            dtype: Storage type of the weights, such as ``torch.float16``; default: as they are.
            cards: What to say of how each network came about (``checkpoints.save``), by part.
        """
        folder = Path(folder)
        cards = dict(cards or {})
        present = {n: p for n in self.parts if (p := getattr(self, n)) is not None}
        networks = {n for n, p in present.items() if isinstance(p, Pretrained)}
        errors.expect(
            set(cards) <= networks,
            f"cards are given for {', '.join(sorted(set(cards) - networks))}, which is no network"
            " of this system.",
        )
        for name, part in present.items():
            options = {"dtype": dtype, "card": cards.get(name)} if name in networks else {}
            part.save_pretrained(folder / name, **options)
        write_json(folder / "model_index.json", self.index())
        return folder

    def index(self) -> dict[str, object]:
        """What goes into ``model_index.json``."""
        listed = {}
        for name in sorted(self.parts):
            part = getattr(self, name)
            if part is not None:
                listed[name] = [*_home(part)]
        return {"_class_name": self.opens[0], "_diffusers_version": "0.10.0", **listed}

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move all networks, change their type, or both.

        Noise is still drawn on the CPU and samplers still walk in float32, so a seed stays nearly
        the same picture.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}; expected a floating-point type.")
        for part in self._networks():
            part.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self._networks()[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the samplers compute in: float32, or float64 when the networks do."""
        own = next(self._networks()[0].parameters()).dtype
        return torch.promote_types(own, torch.float32)

    def _networks(self) -> list[Pretrained]:
        return [p for n in self.parts if isinstance(p := getattr(self, n), Pretrained)]

    def noise(
        self, shape: tuple[int, ...], generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """``latents``, checked, or fresh noise drawn where the generator lives (the CPU)."""
        if latents is None:
            latents = draw(torch.empty(shape, dtype=self.dtype), generator)
        sizes = " ".join(map(str, shape))
        errors.tensor("latents", latents, sizes, "float")
        return latents.to(self.device, self.dtype)


def _open(kind: type, root: Path, name: str, dtype: torch.dtype) -> Any:
    options = {"dtype": dtype} if issubclass(kind, Pretrained) else {}
    return kind.from_pretrained(root, name, **options)


def _home(part: Any) -> Iterator[str]:
    """Where stock finds a part's class: library and name, as published folders spell them."""
    published = "CLIPTokenizer" if isinstance(part, Tokenizer) else part.published
    library = "transformers" if published.startswith("CLIP") else "diffusers"
    # Trap: the one class that stock keeps beside a pipeline rather than among its models.
    yield "unclip" if published.startswith("UnCLIPText") else library
    yield published


def for_each(name: str, values: Sequence[Any] | None, names: Collection[str]) -> list[Any]:
    """One value for each walk; None stands for all of them."""
    if values is None:
        return [None] * len(names)
    if not isinstance(values, list | tuple) or len(values) != len(names):
        raise ValueError(
            f"{name} is {values!r:.60}; expected {len(names)} values, for {', '.join(names)}."
        )
    return list(values)


def prompts(name: str, prompt: str | list[str], count: int | None = None) -> list[str]:
    """One text or several as a list; one text stands for all ``count``."""
    if isinstance(prompt, str):
        return [prompt] * (count or 1)
    if not isinstance(prompt, list | tuple) or not all(isinstance(p, str) for p in prompt):
        raise TypeError(f"{name} is {type(prompt).__name__}; expected a str or a list of str.")
    errors.expect(len(prompt) > 0, f"{name} is an empty list; expected at least one text.")
    errors.expect(
        count is None or len(prompt) == count,
        f"{name} has {len(prompt)} texts; expected one, or one for each of {count} prompts.",
    )
    return list(prompt)


def generators(generator: Generators | None, seed: int | None, count: int) -> Generators:
    """The source of all noise: a generator, one for each picture, a seed, or fresh entropy."""
    errors.expect(
        generator is None or seed is None,
        "generator and seed are both given; expected one of them: a seed makes a new generator.",
    )
    if isinstance(generator, list | tuple):
        errors.expect(
            len(generator) == count,
            f"{len(generator)} generators for {count} pictures; expected one for each.",
        )
        return list(generator)
    if generator is not None:
        return generator
    fresh = torch.Generator()
    if seed is None:
        fresh.seed()
        return fresh
    errors.number("seed", seed, low=0, high=2**63 - 1, integer=True)
    return fresh.manual_seed(seed)
