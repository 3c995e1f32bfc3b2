"""Chapter 1, before diffusion."""

import torch

from companion import predecessors
from companion.exercises.checking import NotYet, a_function, exercise, same_number, same_tensor
from companion.scores import precision_recall


@exercise("1.1")
def _price(answer: object) -> None:
    """price(mean, spread): the price (1.2) of each cloud from the bell curve."""
    price = a_function(answer)
    g = torch.Generator().manual_seed(11)
    mean, spread = torch.randn(5, 3, generator=g), 0.1 + 2 * torch.rand(5, 3, generator=g)
    same_tensor("The price", price(mean, spread), predecessors.kl(mean, 2 * spread.log()))
    free = price(torch.zeros(1, 4), torch.ones(1, 4))
    same_tensor("The price of the bell curve itself", free, torch.zeros(1))


@exercise("1.2")
def _through_chance(answer: object) -> None:
    """draw(mean, log_variance, noise): a point of the cloud, with slopes for both."""
    draw = a_function(answer)
    g = torch.Generator().manual_seed(12)
    mean, log_variance, noise = torch.randn(3, 4, 2, generator=g)
    spread = (0.5 * log_variance).exp()
    same_tensor("The point", draw(mean, log_variance, noise), mean + spread * noise)
    inputs = [mean.requires_grad_(), log_variance.requires_grad_()]
    slopes = torch.autograd.grad(draw(*inputs, noise).sum(), inputs, allow_unused=True)
    for name, slope, wanted in zip(
        ("mean", "log variance"), slopes, (torch.ones(4, 2), 0.5 * spread * noise), strict=True
    ):
        if slope is None:
            raise NotYet(f"No slope reaches the {name}: is it cut off somewhere?")
        same_tensor(f"The slope of the {name}", slope, wanted)


@exercise("1.3")
def _expert(answer: object) -> None:
    """expert(p, q, share): the best D when a ``share`` of what is shown is real."""
    expert = a_function(answer)
    p, q = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])
    for share in (0.5, 0.8, 0.1):
        wanted = share * p / (share * p + (1 - share) * q)
        same_tensor(f"The answer when {share:.0%} are real", expert(p, q, share), wanted)


@exercise("1.4")
def _recall(answer: object) -> None:
    """recall(real, fake, k): share of the real points within reach of the fake ones."""
    recall = a_function(answer)
    g = torch.Generator().manual_seed(14)
    for width, k in ((0.6, 3), (0.6, 1), (1.5, 3)):
        real, fake = torch.randn(60, 4, generator=g), width * torch.randn(50, 4, generator=g)
        wanted = precision_recall(real, fake, k)[1]
        same_number(f"The recall with k = {k}", recall(real, fake, k), wanted, 1e-4)
