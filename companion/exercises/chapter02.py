"""Chapter 2, pictures into static."""

import math

import torch

from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor
from companion.schedule import Schedule


@exercise("2.1")
def _undo(answer: object) -> None:
    """undo(x_t, noise, t, schedule): the closed form (2.3) solved for x0, one t a picture."""
    undo = a_function(answer)
    g = torch.Generator().manual_seed(21)
    x0, noise = torch.rand(2, 4, 3, 8, 8, generator=g) * 2 - 1
    for schedule in (Schedule.linear(), Schedule.scaled_linear()):
        t = torch.tensor([0, 10, 400, 700])
        x_t = schedule.add_noise(x0, noise, t)
        same_tensor("x_0", undo(x_t, noise, t, schedule), x0, 1e-3)


@exercise("2.2")
def _even(answer: object) -> None:
    """even_step(schedule, v): the first t at which noise outweighs a picture of variance v."""
    even_step = a_function(answer)
    for schedule in (Schedule.linear(), Schedule.cosine(), Schedule.scaled_linear(500)):
        for v in (1.0, 0.11, 0.45):
            abar = schedule.alphas_cumprod
            wanted = int((v * abar < 1 - abar).nonzero()[0])
            got = even_step(schedule, v)
            same_number(f"The step for {len(schedule)} steps and v = {v}", got, wanted, 0.5)


@exercise("2.3")
def _exploding(answer: object) -> None:
    """to_exploding(x_t, t, schedule) -> (y, sigma) with y = x_0 + sigma * noise."""
    convert = a_function(answer)
    g = torch.Generator().manual_seed(23)
    x0, noise = torch.rand(2, 1, 3, 8, 8, generator=g, dtype=torch.float64) * 2 - 1
    schedule = Schedule.cosine()
    for t in (0, 300, 800):
        abar = schedule.alphas_cumprod[t]
        got = convert(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t, schedule)
        if not isinstance(got, tuple) or len(got) != 2:
            raise NotYet("Return two things: y and sigma.")
        sigma = ((1 - abar) / abar).sqrt().item()
        same_number(f"sigma at t = {t}", got[1], sigma, 1e-6 * max(1.0, sigma))
        same_tensor(f"y at t = {t}", got[0], x0 + sigma * noise, 1e-6 * max(1.0, sigma))


@exercise("2.4")
def _resolution(answer: object) -> None:
    """same_static(t, schedule, ratio): the step at ratio times the resolution that looks alike."""
    same_static = a_function(answer)
    for schedule in (Schedule.linear(), Schedule.cosine()):
        for t, ratio in ((300, 2), (300, 4), (600, 4), (500, 1)):
            wanted = schedule.log_snr(t) - 2 * math.log(ratio)
            t_wanted = float(schedule.t_of_log_snr(wanted))
            same_number(
                f"The step for t = {t} at {ratio} times the resolution",
                same_static(t, schedule, ratio),
                t_wanted,
                1.0,
            )
