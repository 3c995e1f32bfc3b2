"""Pictures on their way into CLIP, and from one size to another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from torch import Tensor
from torch.nn import functional as F

from companion import errors
from companion.checkpoints import CheckpointError, read_json, write_json
from companion.clip import MEAN, STD, normalise
from companion.pretrained import locate


class Preparation:
    """``preprocessor_config.json``: how CLIP's picture encoder wants its pictures.

    Args:
        stored: The file's keys; of these only the colours' mean and spread matter here.
    """

    published = "CLIPImageProcessor"

    def __init__(self, stored: Mapping[str, object]) -> None:
        self.stored = dict(stored)
        self.mean = tuple(stored.get("image_mean", MEAN))
        self.std = tuple(stored.get("image_std", STD))

    @classmethod
    def usual(cls, size: int) -> Self:
        """What CLIP's own pictures went through, ending at ``size`` pixels."""
        steps = ("convert_rgb", "resize", "center_crop", "rescale", "normalize")
        return cls(
            {f"do_{step}": True for step in steps}
            | {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}}
            | {"image_mean": [*MEAN], "image_std": [*STD], "resample": 3, "rescale_factor": 1 / 255}
            | {"image_processor_type": cls.published}
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> Self:
        """Open a folder; only the usual preparation (scale, crop, normalise) is built here."""
        path = locate(folder, subfolder) / "preprocessor_config.json"
        stored = read_json(path)
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if stored.get(key, True) is not True:
                raise CheckpointError(f"{path}: {key} is {stored[key]!r}; only true is built here.")
        return cls(stored)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file as it was read."""
        write_json(Path(folder) / "preprocessor_config.json", self.stored)

    def __call__(self, pictures: Tensor, size: int) -> Tensor:
        """Square pictures (B, 3, H, H) in [0, 1] to what the encoder takes, (B, 3, size, size)."""
        errors.tensor("image", pictures, "B 3 H H", "float", low=0, high=1)
        if pictures.shape[-1] != size:
            pictures = scaled(pictures, (size, size)).clamp(0, 1)
        return normalise(pictures, self.mean, self.std)


def scaled(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Another size, bicubic with antialiasing; on the CPU, so that it is the same everywhere."""
    other = F.interpolate(pictures.cpu(), size, mode="bicubic", align_corners=False, antialias=True)
    return other.to(pictures.device)
