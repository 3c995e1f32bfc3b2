"""Pictures from outside the picture world: digits, photographs, and the reader's own folder.

Every picture is a float32 tensor with three (digits: one) channels and values in [0, 1]; noise and
generators want [-1, 1], and ``to_signed`` and ``to_unit`` go between the two. Nothing here needs a
network: digits and photographs come inside scikit-learn and scikit-image.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from companion import errors

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def to_signed(x: torch.Tensor) -> torch.Tensor:
    """From [0, 1], as drawn, to [-1, 1], as noised. Any shape; other values are refused."""
    errors.tensor("x", x, dtype="float", low=0, high=1)
    return 2 * x - 1


def to_unit(x: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] back to [0, 1]. Any shape; what lies outside is cut off, as a screen would."""
    errors.tensor("x", x, dtype="float")
    return ((x + 1) / 2).clamp(0, 1)


# --- digits and photographs ----------------------------------------------------------------------


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 handwritten digits of scikit-learn (UCI ML repository, CC BY 4.0).

    Returns:
        Pictures (1797, 1, 8, 8) in [0, 1], seventeen grey levels; labels (1797,) int64, 0 ... 9.
    """
    from sklearn.datasets import load_digits

    table = load_digits()
    pictures = torch.from_numpy(table.images).float().div(16)[:, None]
    return pictures, torch.from_numpy(table.target).long()


@dataclass(frozen=True)
class Photograph:
    """A photograph that comes inside a library, with what the library says about its rights."""

    name: str
    about: str
    credit: str
    licence: str
    source: str
    package: str
    file: str


PHOTOGRAPHS = (
    Photograph(
        "astronaut",
        "the astronaut Eileen Collins",
        "NASA",
        "public domain",
        "https://flic.kr/p/r9qvLn",
        "skimage",
        "data/astronaut.png",
    ),
    Photograph(
        "cat",
        "Chelsea the cat",
        "Stefan van der Walt",
        "CC0",
        "scikit-image, data.chelsea",
        "skimage",
        "data/chelsea.png",
    ),
    Photograph(
        "coffee",
        "a cup of coffee, courtesy of Pikolo Espresso Bar",
        "Rachel Michetti",
        "CC0",
        "scikit-image, data.coffee",
        "skimage",
        "data/coffee.png",
    ),
    Photograph(
        "rocket",
        "the launch of DSCOVR on a Falcon 9",
        "SpaceX",
        "public domain",
        "https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/",
        "skimage",
        "data/rocket.jpg",
    ),
    Photograph(
        "china",
        "a temple in China",
        "danielbuechele",
        "CC BY 2.0",
        "https://www.flickr.com/photos/danielbuechele/6061409035/sizes/z/in/photostream/",
        "sklearn",
        "datasets/images/china.jpg",
    ),
    Photograph(
        "flower",
        "a dahlia",
        "vultilion (so its link says; scikit-learn's note repeats danielbuechele)",
        "CC BY 2.0",
        "https://www.flickr.com/photos/vultilion/6056698931/sizes/z/in/photostream/",
        "sklearn",
        "datasets/images/flower.jpg",
    ),
)


def photographs() -> tuple[Photograph, ...]:
    """The photographs that ``photograph`` knows, with credit, licence and source."""
    return PHOTOGRAPHS


def photograph(name: str, size: int = 256) -> torch.Tensor:
    """One bundled photograph, the middle square of it.

    Args:
        name: One of ``astronaut cat coffee rocket china flower``; ``photographs()`` tells more.
        size: Height and width of the result in pixels.

    Returns:
        (3, size, size) in [0, 1].
    """
    errors.one_of("name", name, [p.name for p in PHOTOGRAPHS])
    errors.number("size", size, low=1, integer=True)
    entry = next(p for p in PHOTOGRAPHS if p.name == name)
    package = find_spec(entry.package)  # finds the files without importing the library
    root = Path(package.origin).parent if package and package.origin else None
    if root is None or not (root / entry.file).is_file():
        raise FileNotFoundError(
            f"The photograph {name!r} should come with {entry.package} as {entry.file}, which this"
            " installation does not have. Install scikit-image and scikit-learn from their wheels."
        )
    return read_picture(root / entry.file, size)


# --- one picture file ----------------------------------------------------------------------------


def read_picture(path: str | Path, size: int) -> torch.Tensor:
    """Read a picture of any kind, turned upright, its middle square resized with antialiasing.

    Greyscale becomes three equal channels, transparency is laid on white, 16-bit greyscale keeps
    its depth, an animation gives its first frame. Colour profiles are ignored.

    Returns:
        (3, size, size) float32 in [0, 1].

    Raises:
        ValueError: The file is no picture, is damaged, or has a kind of pixel that is not read.
    """
    from PIL import ImageOps

    with _opened(path) as picture:
        try:
            pixels = _pixels(ImageOps.exif_transpose(picture))  # EXIF: cameras store "turn me"
        except Exception as problem:  # Pillow raises a dozen kinds for a damaged file
            raise ValueError(f"{path} cannot be read: {problem}") from problem
    side = min(pixels.shape[1:])
    top, left = (pixels.shape[1] - side) // 2, (pixels.shape[2] - side) // 2
    square = pixels[:, top : top + side, left : left + side]
    if side != size:
        square = F.interpolate(square[None], (size, size), mode="bicubic", antialias=True)[0]
    return square.clamp(0, 1).contiguous()  # bicubic overshoots at edges


def _opened(path: str | Path) -> "Image.Image":
    """Open a picture, which reads its header only."""
    from PIL import Image

    try:
        return Image.open(path)
    except Exception as problem:
        raise ValueError(
            f"{path} is not a picture that can be read: {problem}. Remove it, or save it again as"
            " PNG or JPEG."
        ) from problem


def _pixels(picture: "Image.Image") -> torch.Tensor:
    """(3, H, W) float32 in [0, 1] from a Pillow image of any mode."""
    import numpy as np

    if picture.mode in SIXTEEN_BITS:  # Pillow's own conversion would cut these at 255
        grey = np.asarray(picture).astype(np.float32) / 65535
        return torch.from_numpy(grey).expand(3, -1, -1)
    if picture.mode in ("I", "F"):
        raise ValueError(
            "it stores 32 bits a pixel, whose range is unknown; save it with 8 or 16 bits"
        )
    if picture.has_transparency_data:
        x = torch.from_numpy(np.array(picture.convert("RGBA"))).permute(2, 0, 1).float() / 255
        return x[:3] * x[3:] + (1 - x[3:])  # over white
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


# --- the reader's own folder ---------------------------------------------------------------------


class ImageFolder(torch.utils.data.Dataset):
    """The reader's own pictures, in the Hugging Face ``imagefolder`` layout.

    ::

        folder/metadata.jsonl          {"file_name": "boat.png", "text": "a red boat at sea"}
        folder/boat.png                one line for each picture; further columns are kept

    ``metadata.csv`` (with a header line) does as well. Each subfolder may have its own, and then
    names are relative to it. A folder without any is read as pictures whose text is ``""``. Two
    lines may name the same picture, which then has two captions. ``folder[i]`` is a dict::

        {"picture": (3, size, size) in [0, 1], "text": str, "file_name": str, ...the other columns}

    Args:
        folder: Where the pictures are; subfolders are searched too.
        size: Height and width that each picture is cropped and resized to.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No pictures, a metadata line that is wrong (with its number), a named picture
            that is missing, a picture that no line names, or a file that does not start like one.
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        errors.number("size", size, low=1, integer=True)
        self.folder, self.size = Path(folder), size
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "does not exist"
            raise FileNotFoundError(f"{folder} {what}; expected a folder of pictures.")
        pictures = sorted(p for p in _walk(self.folder) if p.suffix.lower() in SUFFIXES)
        tables = sorted(p for p in _walk(self.folder) if p.stem == "metadata" and p not in pictures)
        self.rows = [row for table in tables for row in _read_table(table, self.folder)]
        if not tables:
            names = [p.relative_to(self.folder).as_posix() for p in pictures]
            self.rows = [{"file_name": name, "text": ""} for name in names]
        errors.expect(
            bool(self.rows) or not tables,
            f"{tables[0] if tables else ''} names no picture; expected a line for each.",
        )
        errors.expect(
            bool(self.rows),
            f"{folder} has no pictures; expected {', '.join(SUFFIXES)} files in it or below.",
        )
        named = {row["file_name"] for row in self.rows}
        unnamed = [p for p in pictures if p.relative_to(self.folder).as_posix() not in named]
        errors.expect(
            not unnamed,
            f"{len(unnamed)} of {len(pictures)} pictures have no line in the metadata, such as"
            f" {unnamed[0] if unnamed else ''}. Add a line for each or move them away.",
        )
        self.check(decode=False)

    def check(self, decode: bool = True) -> None:
        """Look at every picture before any long work.

        Args:
            decode: Decode each whole, which also finds files that were cut short; otherwise only
                their first bytes are read, as the constructor does.

        Raises:
            ValueError: Names the first bad picture and says how many there are.
        """
        bad = []
        for name in dict.fromkeys(row["file_name"] for row in self.rows):
            try:
                if decode:
                    read_picture(self.folder / name, 1)
                else:
                    _opened(self.folder / name).close()
            except ValueError as problem:
                bad.append(str(problem))
        if bad:
            more = f" ({len(bad)} pictures cannot be read; this is the first.)" if bad[1:] else ""
            raise ValueError(bad[0] + more)

    @property
    def texts(self) -> list[str]:
        """All captions, in order, without opening a picture."""
        return [row["text"] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        return {"picture": read_picture(self.folder / row["file_name"], self.size), **row}


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, without hidden ones (``.cache/``, macOS's ``._boat.png``)."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _read_table(path: Path, folder: Path) -> list[dict[str, Any]]:
    """The checked rows of one metadata file; ``file_name`` becomes relative to ``folder``."""
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path} is not read; expected metadata.jsonl or metadata.csv.")
    if path.suffix == ".csv" and path.with_suffix(".jsonl").is_file():
        raise ValueError(f"{path.parent} has both metadata.jsonl and metadata.csv; keep one.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not UTF-8 text: {problem}. Save it as UTF-8.") from problem
    lines = _jsonl(path, text) if path.suffix == ".jsonl" else _csv(path, text)
    rows = []
    for where, row in lines:
        for column in ("file_name", "text"):
            value = row.get(column)
            if not isinstance(value, str):
                got = f"is {value!r}" if column in row else f"is missing (it has {sorted(row)})"
                raise ValueError(f"{where}: the column {column!r} {got}; expected a string.")
        if "picture" in row:
            raise ValueError(f"{where}: the column 'picture' would hide the picture; rename it.")
        name = os.path.normpath(path.parent.relative_to(folder) / row["file_name"])
        target = folder / name
        if os.path.isabs(name) or Path(name).parts[:1] == ("..",):
            raise ValueError(f"{where} names {row['file_name']!r}, which is outside {folder}.")
        if not target.is_file():
            raise ValueError(
                f"{where} names {row['file_name']!r}, but there is no file {target}. File names are"
                " relative to the metadata file."
            )
        rows.append({**row, "file_name": Path(name).as_posix()})
    return rows


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{where} is not JSON: {problem}.") from problem
        if not isinstance(row, dict):
            raise ValueError(f"{where} holds a {type(row).__name__}; expected a JSON object.")
        yield where, row


def _csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where} does not have the {len(reader.fieldnames or [])} cells of the header;"
                    " put text that contains commas in double quotes."
                )
            yield where, row
    except csv.Error as problem:
        raise ValueError(
            f"{path}, line {reader.reader.line_num} is not CSV: {problem}."
        ) from problem
