"""Two small networks for handwritten digits of 8 x 8 pixels: one reads them, one draws them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import checkpoints, data, diffusion, samplers
from companion.adm import ADMConfig, ADMUNet
from companion.schedule import Schedule
from companion.scores import frechet, interval
from companion.train import Recipe, pick

# --- digit-classifier: reads 8 x 8 pictures; chapter 1 measures distances in its features ---------


@dataclass(frozen=True)
class DigitClassifierConfig:
    """Widths of the two convolutions and of the features, and the number of classes."""

    width: int = 32
    features: int = 64
    classes: int = 10


class DigitClassifier(nn.Module):
    """A small convolutional network: (B, 1, 8, 8) in [0, 1] to one logit a class."""

    Config = DigitClassifierConfig

    def __init__(self, config: DigitClassifierConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        self.conv1 = nn.Conv2d(1, w, 3, padding=1)
        self.conv2 = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.hidden = nn.Linear(2 * w * 4 * 4, config.features)
        self.out = nn.Linear(config.features, config.classes)

    @classmethod
    def from_pretrained(cls, folder: str | Path = "digit-classifier") -> "DigitClassifier":
        """Open a folder that the recipe wrote; by default the one that is shipped."""
        shipped = checkpoints.WEIGHTS / folder
        where = shipped if shipped.is_dir() else checkpoints.find_folder(folder)
        model = cls(checkpoints.read_config(where, DigitClassifierConfig))
        return checkpoints.load_into(model, where).eval()

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees: (B, 1, 8, 8) to (B, features)."""
        h = F.silu(self.conv1(2 * x - 1))  # (B, w, 8, 8)
        h = F.silu(self.conv2(h))  # (B, 2w, 4, 4)
        return F.silu(self.hidden(h.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


@dataclass(frozen=True)
class Labelled:
    """Small grey pictures (N, 1, 8, 8) with a class each; every fifth is kept for the score."""

    pictures: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path | None) -> "Labelled":
        """scikit-learn's digits, or a folder whose column ``label``, or else text, is the class."""
        if folder is None:
            return cls(*data.digits(), tuple("0123456789"))
        rows = data.ImageFolder(folder, 8)
        names = [str(row.get("label", row["text"])) for row in rows.rows]
        classes = tuple(sorted(set(names)))
        pictures = [rows[i]["picture"].mean(0, keepdim=True) for i in range(len(rows))]
        labels = torch.tensor([classes.index(name) for name in names])
        return cls(torch.stack(pictures), labels, classes)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, kept: bool) -> tuple[Tensor, Tensor]:
        """Pictures and labels to train on, or those kept for the score."""
        mine = (torch.arange(len(self)) % 5 == 4) == kept
        return self.pictures[mine], self.labels[mine]


def _digit_batch(
    indices: Tensor, generator: torch.Generator, digits: Labelled
) -> dict[str, Tensor]:
    pictures, labels = digits.part(kept=False)
    chosen = pick(indices, len(labels))
    x = F.pad(pictures[chosen], (1, 1, 1, 1))  # (B, 1, 10, 10)
    shift = torch.randint(3, (len(x), 2), generator=generator)
    x = torch.stack(
        [p[:, i : i + 8, j : j + 8] for p, (i, j) in zip(x, shift.tolist(), strict=True)]
    )
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return {"pictures": x.clamp(0, 1), "labels": labels[chosen]}


def _digit_loss(
    model: nn.Module, batch: dict[str, Tensor], digits: Labelled
) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch["pictures"])
    right = (logits.argmax(1) == batch["labels"]).float().mean()
    return F.cross_entropy(logits, batch["labels"]), {"accuracy": right}


def _digit_score(model: nn.Module, digits: Labelled) -> dict[str, object]:
    pictures, labels = digits.part(kept=True)
    right = int((model(pictures).argmax(1) == labels).sum())
    return {"accuracy on digits never trained on": interval(right, len(labels))}


# --- digits: draws 8 x 8 digits; chapter 3 trains it live, chapter 4 asks it in fewer steps -------

DIGITS = ADMConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),  # at 8 x 8 and at 4 x 4, where one attention stands in the middle
    down_block_types=("ResnetDownsampleBlock2D",) * 2,
    up_block_types=("ResnetUpsampleBlock2D",) * 2,
    layers_per_block=1,
    attention_head_dim=32,
    norm_num_groups=8,
    sample_size=8,
)


def _digits_batch(
    indices: Tensor, generator: torch.Generator, digits: Labelled
) -> dict[str, Tensor]:
    pictures, _ = digits.part(kept=False)
    x0 = data.to_signed(pictures[pick(indices, len(pictures))])
    t = torch.randint(1000, (len(x0),), generator=generator)
    return {"x0": x0, "noise": torch.randn(x0.shape, generator=generator), "t": t}


def _digits_loss(
    model: nn.Module, batch: dict[str, Tensor], digits: object
) -> tuple[Tensor, dict[str, Tensor]]:
    x_t = Schedule.linear().add_noise(batch["x0"], batch["noise"], batch["t"])
    return diffusion.simple_loss(model(x_t, batch["t"]), batch["noise"]), {}


def draw_digits(model: nn.Module, n: int, steps: int, seed: int = 0) -> Tensor:
    """Digits (n, 1, 8, 8) in [0, 1] from a network that predicts noise: DDIM, trailing steps."""
    schedule = Schedule.linear()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return diffusion.to_x0(model(x, t), x, t, schedule, "epsilon")

    x_T = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    x_T = x_T.to(next(model.parameters()).device)
    t = samplers.timesteps("ddim", steps, schedule, "trailing")
    return data.to_unit(samplers.ddim(denoise, x_T, t, schedule, clip=1.0))


def _digits_score(model: nn.Module, digits: Labelled) -> dict[str, object]:
    reader, drawn = DigitClassifier.from_pretrained(), draw_digits(model, 1000, 50).cpu()
    seen, kept = (digits.part(kept)[0] for kept in (False, True))
    real, fake, fresh = (reader.features(x).detach() for x in (seen, drawn, kept))
    return {
        "Fréchet distance of 1000 drawn digits from those trained on": frechet(real, fake),
        f"the same of {len(kept)} real digits never trained on": frechet(real, fresh),
    }


RECIPES = (
    Recipe(
        name="digit-classifier",
        about="Reads handwritten digits of 8 x 8 pixels. Chapter 1 compares generated digits with"
        " real ones in its features.",
        data=Labelled.open,
        model=lambda digits: DigitClassifier(DigitClassifierConfig(classes=len(digits.classes))),
        batch=_digit_batch,
        loss=_digit_loss,
        score=_digit_score,
        steps=1000,
        batch_size=64,
        learning_rate=2e-3,
        minutes=0.2,
        warmup=50,
        decay="cosine",
        weight_decay=0.01,
        ema=0.99,
        chunk=32,
        data_about="scikit-learn's handwritten digits (UCI ML repository, CC BY 4.0), four of five",
    ),
    Recipe(
        name="digits",
        about="Draws handwritten digits of 8 x 8 pixels: a U-Net that predicts the noise, trained"
        " by L_simple on DDPM's linear schedule. Chapter 3 trains it live, for a quarter as long.",
        data=Labelled.open,
        model=lambda digits: ADMUNet(DIGITS),
        batch=_digits_batch,
        loss=_digits_loss,
        sample=lambda model: draw_digits(model, 64, 20),
        score=_digits_score,
        steps=3000,
        batch_size=64,
        learning_rate=2e-3,
        minutes=4,
        warmup=50,
        decay="linear",
        ema=0.995,
        chunk=64,
        needs=("digit-classifier",),
        dtype="float16",
        data_about="scikit-learn's handwritten digits (UCI ML repository, CC BY 4.0), four of five",
    ),
)
