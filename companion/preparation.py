"""Pictures on their way into CLIP, and from one size to another."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor
from torch.nn import functional as F

from companion import errors
from companion.checkpoints import read_config, read_json, write_json
from companion.clip import MEAN, STD, CLIPVisionConfig, normalise
from companion.pretrained import locate

# What the file may say of the way to those sizes and colours; nothing else is built here.
SWITCHES: dict[str, tuple[object, ...]] = {
    "data_format": (None, "channels_first"),
    "default_to_square": (False,),
    "do_center_crop": (True,),
    "do_normalize": (True,),
    "do_pad": (None, False),
    "do_rescale": (True,),
    "do_resize": (True,),
    "input_data_format": (None,),
    "pad_size": (None,),
    "resample": (3,),  # bicubic
    "rescale_factor": (1 / 255,),  # bytes to [0, 1], where pictures are already
    "return_tensors": (None,),
}
NOTES = (
    "device", "disable_grouping", "do_convert_rgb", "feature_extractor_type",
    "image_processor_type", "processor_class",
)  # fmt: skip


@dataclass(frozen=True)
class PreparationConfig:
    """``preprocessor_config.json``; sizes as 2022's files have them, or as today's."""

    size: int | dict[str, int] = 224  # of the shorter side, then the middle is cut out
    crop_size: int | dict[str, int] = 224
    image_mean: tuple[float, float, float] = MEAN
    image_std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        for name, keys in (("size", ["shortest_edge"]), ("crop_size", ["height", "width"])):
            value = getattr(self, name)
            if isinstance(value, dict) and sorted(value) != keys:
                raise ValueError(f"{name} is {value}; expected a number, or {' and '.join(keys)}.")
        sizes = {n for v in (self.size, self.crop_size)
                 for n in (v.values() if isinstance(v, dict) else [v])}  # fmt: skip
        if len(sizes) > 1:
            raise ValueError(
                f"size is {self.size} and crop_size {self.crop_size}; with sizes that differ, some"
                " of each picture would be cut off, which is not built here."
            )

    @property
    def pixels(self) -> int:
        """Height and width of what comes out."""
        return self.size["shortest_edge"] if isinstance(self.size, dict) else self.size


class Preparation:
    """How CLIP's picture encoder wants its pictures.

    Args:
        stored: What is in the file, or goes there.
        config: What it says of sizes and colours; None: found in ``stored``.
    """

    published = "CLIPImageProcessor"

    def __init__(
        self, stored: Mapping[str, object], config: PreparationConfig | None = None
    ) -> None:
        names = PreparationConfig.__dataclass_fields__
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in names}
        self.stored = dict(stored)
        self.config = config or PreparationConfig(**known)

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
        """Open a folder with ``preprocessor_config.json``.

        Raises:
            CheckpointError: No file, or a setting that is not implemented, by name.
        """
        path = locate(folder, subfolder) / "preprocessor_config.json"
        return cls(read_json(path), read_config(path, PreparationConfig, NOTES, SWITCHES))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file as it was read."""
        write_json(Path(folder) / "preprocessor_config.json", self.stored)

    def fits(self, encoder: CLIPVisionConfig) -> None:
        """Raise ``ValueError`` unless this is the preparation that ``encoder`` wants."""
        errors.expect(
            self.config.pixels == encoder.image_size,
            f"feature_extractor makes pictures of {self.config.pixels} pixels, image_encoder takes"
            f" {encoder.image_size}.",
        )

    def __call__(self, pictures: Tensor, size: int) -> Tensor:
        """Square pictures (B, 3, H, H) in [0, 1] to what the encoder takes, (B, 3, size, size)."""
        errors.tensor("image", pictures, "B 3 H H", "float", low=0, high=1)
        if pictures.shape[-1] != size:
            pictures = scaled(pictures, (size, size)).clamp(0, 1)
        return normalise(pictures, self.config.image_mean, self.config.image_std)


def scaled(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Another size, bicubic with antialiasing; on the CPU, so that it is the same everywhere."""
    other = F.interpolate(pictures.cpu(), size, mode="bicubic", align_corners=False, antialias=True)
    return other.to(pictures.device)
