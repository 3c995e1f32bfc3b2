"""The recipes' own parts: what a step of training compares, and what the results draw and read."""

import pytest
import torch

from companion import checkpoints, data
from companion.adm import ADMUNet
from companion.recipes import RECIPES, DigitClassifier, Labelled, draw_digits
from companion.schedule import Schedule
from companion.train import draw

DIGITS = RECIPES["digits"]


class Oracle(torch.nn.Module):
    """Knows the batch, checks what it is shown, and answers with the noise plus ``off``."""

    def __init__(self, batch, off):
        super().__init__()
        self.batch, self.off = batch, off

    def forward(self, x, t):
        abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
        abar = abar.view(-1, 1, 1, 1)
        wanted = abar.sqrt() * self.batch["x0"] + (1 - abar).sqrt() * self.batch["noise"]
        torch.testing.assert_close(x.double(), wanted, rtol=1e-5, atol=1e-6)
        return self.batch["noise"] + self.off


def test_a_step_of_the_digits_is_ddpms():
    batch = draw(DIGITS, Labelled.open(None), 0)
    x0, noise, t = batch["x0"], batch["noise"], batch["t"]
    assert x0.shape == noise.shape == (64, 1, 8, 8) and x0.min() == -1 and x0.max() == 1
    assert t.min() >= 0 and t.max() <= 999 and len(set(t.tolist())) > 50
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    for off in (0.0, 0.5):
        loss, _ = DIGITS.loss(Oracle(batch, off), batch, None)
        assert loss.item() == pytest.approx(off**2, abs=1e-6)


def test_digits_are_trained_on_their_part_only():
    pictures, _ = data.digits()
    kept = {p.numpy().tobytes() for p in pictures[4::5]}
    for step in range(30):
        batch = draw(DIGITS, Labelled.open(None), step)
        seen = {data.to_unit(p).numpy().tobytes() for p in batch["x0"]}
        assert not seen & kept


def test_the_shipped_digits_can_be_read():
    unet = ADMUNet.from_pretrained(checkpoints.WEIGHTS / "digits").requires_grad_(False)
    drawn = draw_digits(unet, 200, 10)
    assert drawn.shape == (200, 1, 8, 8) and drawn.min() >= 0 and drawn.max() <= 1
    with torch.no_grad():
        read = DigitClassifier.from_pretrained()(drawn).softmax(1)
    assert read.max(1).values.mean() > 0.8, "the reader is not sure"
    assert len(read.argmax(1).unique()) == 10
    known = data.digits()[0].flatten(1)
    assert (torch.cdist(drawn.flatten(1), known).min(1).values > 0.1).all(), "copies"


def test_the_reader_knows_digits_that_it_never_saw():
    pictures, labels = Labelled.open(None).part(kept=True)
    with torch.no_grad():
        right = DigitClassifier.from_pretrained()(pictures).argmax(1) == labels
    assert right.double().mean() > 0.95


def test_drawing_is_ddim_from_the_seeded_noise():
    """A network that answers with x_t / noise level says x0 = 0: everything ends in mid-grey."""

    class Nothing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            level = Schedule.linear().noise(t).float().view(-1, 1, 1, 1)
            return x / level + self.p

    drawn = draw_digits(Nothing().requires_grad_(False), 3, 5)
    torch.testing.assert_close(drawn, torch.full((3, 1, 8, 8), 0.5), rtol=0, atol=1e-5)
