"""A classifier of noisy pictures: what guides a diffusion that knows no words (chapter 6).

Dhariwal and Nichol 2021, section 4: the gradient of log p(y | x_t) shifts each step, so the
classifier has to read pictures at every level of noise, and is told which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import checkpoints, data, errors
from companion.embeddings import TimestepEmbedding, timestep_embedding
from companion.resnet import ResnetBlock
from companion.schedule import Schedule
from companion.scores import interval
from companion.storybook import KINDS, PLACES, SKIES, Facts, Scene, parse, render, sample
from companion.train import Recipe, pick

SIZE = 16
QUESTIONS = {"sky": SKIES, "place": PLACES, "kind": KINDS}
LEVELS = (0, 250, 500, 750)  # timesteps that the score looks at
FRESH = 61  # the seed of scenes for the score, which no training draws from


@dataclass(frozen=True)
class NoisedClassifierConfig:
    """Channels at 16 x 16; twice as many at 8 x 8 and at 4 x 4."""

    width: int = 32

    def __post_init__(self) -> None:
        errors.number("width", self.width, low=8, integer=True)
        errors.expect(self.width % 8 == 0, f"width is {self.width}; expected a multiple of 8.")


class NoisedClassifier(nn.Module):
    """Half a U-Net, the way down: noisy pictures (B, 3, 16, 16) to logits.

    Noise is that of ``Schedule.cosine()``. Three questions: which sky and which place (one answer
    each), and which kinds of things there are (yes or no for each kind).
    """

    Config = NoisedClassifierConfig

    def __init__(self, config: NoisedClassifierConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width

        def block(c_in: int, c_out: int, resample: str | None = None) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, 4 * w, groups=8, scale_shift=True, resample=resample)

        self.time_embedding = TimestepEmbedding(w, 4 * w)
        self.conv_in = nn.Conv2d(3, w, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                block(w, w),
                block(w, 2 * w, "down"),  # to 8 x 8
                block(2 * w, 2 * w),
                block(2 * w, 2 * w, "down"),  # to 4 x 4
            ]
        )
        self.norm_out = nn.GroupNorm(8, 2 * w)
        self.head = nn.Linear(2 * w * (SIZE // 4) ** 2, sum(map(len, QUESTIONS.values())))

    @classmethod
    def from_pretrained(cls, folder: str | Path = "noised-classifier") -> "NoisedClassifier":
        """Open a folder that the recipe wrote; by default the shipped one."""
        shipped = checkpoints.WEIGHTS / folder
        where = shipped if shipped.is_dir() else checkpoints.find_folder(folder)
        model = cls(checkpoints.read_config(where, NoisedClassifierConfig))
        return checkpoints.load_into(model, where).eval()

    def forward(self, x: Tensor, t: Tensor | float) -> dict[str, Tensor]:
        """Noisy pictures (B, 3, 16, 16), around [-1, 1] before the noise; t one number or (B,).

        Returns:
            Logits: ``sky`` (B, 5) and ``place`` (B, 6), one answer each; ``kind`` (B, 9), each yes
            or no.
        """
        errors.tensor("x", x, f"B 3 {SIZE} {SIZE}", "float", finite=False)
        temb = self.time_embedding(timestep_embedding(t, self.config.width, x))
        h = self.conv_in(x)
        for block in self.blocks:
            h = block(h, temb)
        logits = self.head(F.silu(self.norm_out(h)).flatten(1))
        return dict(
            zip(QUESTIONS, logits.split([len(q) for q in QUESTIONS.values()], 1), strict=True)
        )

    def log_prob(self, x: Tensor, t: Tensor | float, **said: str) -> Tensor:
        """log p(what is said | x_t), (B,): its gradient in ``x`` guides, ADM eq. 10.

        Args:
            x: Noisy pictures (B, 3, 16, 16).
            t: Timestep(s).
            said: One answer a question, such as ``sky="dusk", kind="boat"``; several are taken as
                independent.
        """
        errors.expect(bool(said), "log_prob was told nothing; expected sky=, place= or kind=.")
        logits, total = self(x, t), torch.zeros(len(x)).to(x)
        for question, answer in said.items():
            errors.one_of("the question", question, QUESTIONS)
            errors.one_of(question, answer, QUESTIONS[question])
            found = logits[question]
            found = F.logsigmoid(found) if question == "kind" else found.log_softmax(-1)
            total = total + found[:, QUESTIONS[question].index(answer)]
        return total


# --- the recipe -----------------------------------------------------------------------------------


def labels(shown: Sequence[Scene | Facts]) -> dict[str, Tensor]:
    """Right answers: sky and place (B,), kind (B, 9) of 0 and 1; -1 where nothing is known."""
    kinds = [{thing.kind for thing in one.things} for one in shown]
    known = [isinstance(one, Scene) or bool(one.things) for one in shown]
    return {
        "sky": torch.tensor([SKIES.index(one.sky) if one.sky else -1 for one in shown]),
        "place": torch.tensor([PLACES.index(one.place) if one.place else -1 for one in shown]),
        "kind": torch.tensor(
            [[int(k in there) if sure else -1 for k in KINDS]
             for there, sure in zip(kinds, known, strict=True)]
        ),
    }  # fmt: skip


def _open(folder: Path | None) -> data.ImageFolder | None:
    return None if folder is None else data.ImageFolder(folder, SIZE)


def batch(
    indices: Tensor, generator: torch.Generator, folder: data.ImageFolder | None
) -> dict[str, Tensor]:
    """Noisy pictures and what they show. The reader's are known by what their captions say."""
    if folder is None:
        shown = sample(len(indices), generator)
        pictures = render(shown, SIZE)
    else:
        rows = [folder[i] for i in pick(indices, len(folder)).tolist()]
        shown = [parse(row["text"]) for row in rows]
        pictures = torch.stack([row["picture"] for row in rows])
    t = torch.randint(1000, (len(pictures),), generator=generator)
    x0 = data.to_signed(pictures)
    noise = torch.randn(x0.shape, generator=generator)
    return {"x": Schedule.cosine().add_noise(x0, noise, t), "t": t, **labels(shown)}


def loss(
    model: nn.Module, batch: dict[str, Tensor], folder: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropies of the three questions, added up; what is not known is not asked."""
    logits = model(batch["x"], batch["t"])
    parts = {}
    for question in ("sky", "place"):
        wanted = batch[question]
        cost = F.cross_entropy(logits[question], wanted, ignore_index=-1, reduction="sum")
        parts[question] = cost / len(wanted)
    wanted = batch["kind"]
    cost = F.binary_cross_entropy_with_logits(
        logits["kind"], wanted.clamp(min=0).float(), (wanted >= 0).float(), reduction="sum"
    )
    parts["kind"] = cost / len(wanted)
    return sum(parts.values()), {k: v.detach() for k, v in parts.items()}


@torch.no_grad()
def score(model: nn.Module, folder: object, n: int = 1000) -> dict[str, object]:
    """Shares of right answers on fresh scenes with one thing, by timestep, and of guessing.

    Of a reader's pictures too little is known: no score.
    """
    if folder is not None:
        return {}
    g = torch.Generator().manual_seed(FRESH)
    scenes = sample(n, g, things=(1,))
    x0, wanted = data.to_signed(render(scenes, SIZE)), labels(scenes)
    found: dict[str, object] = {}
    for t in LEVELS:
        noise = torch.randn(x0.shape, generator=g)
        at = torch.full((n,), t)
        logits = model(Schedule.cosine().add_noise(x0, noise, at), at)
        for question, answers in logits.items():
            right = wanted[question]
            right = right.argmax(1) if question == "kind" else right
            share = int((answers.argmax(1) == right).sum())
            found[f"{question} at t = {t}"] = interval(share, n)
    for question, options in QUESTIONS.items():
        found[f"{question}, guessed"] = 1 / len(options)
    return found


RECIPES = (
    Recipe(
        name="noised-classifier",
        about="Reads sky, place and kinds of things from noisy pictures of 16 x 16 pixels (cosine"
        " schedule, 1000 steps). It never saw the held-out combinations.",
        data=_open,
        model=lambda folder: NoisedClassifier(NoisedClassifierConfig()),
        batch=batch,
        loss=loss,
        score=score,
        steps=2000,
        batch_size=64,
        chunk=64,
        learning_rate=2e-3,
        minutes=15,
        warmup=100,
        decay="cosine",
        weight_decay=0.01,
        ema=0.995,
        dtype="float16",
    ),
)
