"""Guidance: lean on the difference that the words make.

A network that was trained with some captions left out knows two things: what a noisy picture is
likely to be, and what it is likely to be *given these words*. Classifier-free guidance (Ho and
Salimans 2022, arXiv 2207.12598) takes the step from the first answer to the second, and goes on::

    guided = null + s * (given - null),    s = 1 + w                    eq. 6, with their weight w

s = 1 is the plain answer given the words, s = 0 ignores them, s > 1 overstates them. The papers'
formula is about the noise; the same mixture of clean pictures says the same, since one is a
straight-line function of the other at fixed x and t.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from companion import errors
from companion.samplers import Denoiser
from companion.schedule import Schedule, spread

Conditioned = Callable[..., Tensor | tuple[Tensor, Tensor]]


def classifier_free(
    denoise: Conditioned,
    given: tuple[Tensor, ...],
    null: tuple[Tensor, ...],
    scale: float,
) -> Denoiser:
    """A denoiser that follows its condition ``scale`` times as far.

    Both questions are asked in one evaluation, of twice the batch: null first, then given.

    Args:
        denoise: ``denoise(x, t, *condition)`` -> the clean picture, (B, ...), or (clean picture,
            variance fraction).
        given: The condition's tensors, (B, ...) each.
        null: The same where nothing was said; or a negative prompt, to be moved away from.
        scale: s = 1 + w. With s at most 1 there is nothing to overstate: only ``given`` is asked
            about, once, as the stock pipelines do (an s below 1 therefore means 1).

    Returns:
        ``guided(x, t)``, for ``samplers``. A variance is that of the answer given the condition.
    """
    errors.number("scale", scale)
    if scale <= 1:
        return lambda x, t: denoise(x, t, *given)
    shapes = [tuple(c.shape) for c in given], [tuple(c.shape) for c in null]
    errors.expect(
        shapes[0] == shapes[1],
        f"the condition has shapes {shapes[0]}, the null condition {shapes[1]}; expected the same.",
    )
    both = [torch.cat(pair) for pair in zip(null, given, strict=True)]

    def guided(x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        answer = denoise(torch.cat([x, x]), torch.cat([t, t]), *both)
        x0, fraction = answer if isinstance(answer, tuple) else (answer, None)
        without, with_it = x0.chunk(2)
        x0 = without + scale * (with_it - without)
        # Trap: the variance is not guided (Karlo); it is the one given the condition.
        return x0 if fraction is None else (x0, fraction.chunk(2)[1])

    return guided


def classifier_guided(
    denoise: Denoiser,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    schedule: Schedule,
) -> Denoiser:
    """A denoiser pushed towards what a classifier finds likelier (ADM, 2105.05233, algorithm 2).

    ADM takes ``scale * sqrt(1 - abar) * gradient`` from the noise. In clean pictures that is a
    shift by ``scale * (1 - abar) / sqrt(abar) * gradient``; with scale 1 and exact answers, Bayes'
    rule to the letter.

    Args:
        denoise: ``denoise(x, t)`` -> the clean picture, (B, ...), or (clean picture, fraction).
        log_prob: ``log_prob(x, t)`` -> log p(what is wanted | x at t), (B,).
        scale: 1 is Bayes' rule, 0 leaves ``denoise`` as it is.
        schedule: The noise schedule of both.
    """
    errors.number("scale", scale)

    def guided(x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        answer = denoise(x, t)
        x0, fraction = answer if isinstance(answer, tuple) else (answer, None)
        abar = schedule.alpha_bar(t)
        shift = spread((1 - abar) / abar.sqrt(), x) * gradient(log_prob, x, t)
        x0 = x0 + scale * shift
        return x0 if fraction is None else (x0, fraction)

    return guided


def gradient(log_prob: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """How each value of each picture would have to change: d log_prob / dx, like x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_prob(x, t).sum(), x)[0]


def thresholded(denoise: Denoiser, percentile: float | None = 0.995) -> Denoiser:
    """A denoiser whose answers stay where pictures are, from -1 to 1.

    Strong guidance drives answers out of that range, and from there the next step starts. *Static*
    thresholding cuts off what lies outside; pictures become saturated patches. *Dynamic*
    thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3) takes s, the percentile of a
    picture's absolute values, and where s is above 1 clips to [-s, s] and divides by s.

    Args:
        denoise: ``denoise(x, t)`` -> clean pictures (B, C, H, W), or (clean pictures, fraction).
        percentile: From 0 to 1, of each picture by itself; None: static.

    Returns:
        ``bounded(x, t)``, for ``samplers``.
    """
    if percentile is not None:
        errors.number("percentile", percentile, low=0, high=1)

    def bounded(x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        answer = denoise(x, t)
        x0, *fraction = answer if isinstance(answer, tuple) else (answer,)
        if percentile is None:
            x0 = x0.clamp(-1, 1)
        else:
            s = x0.flatten(1).abs().quantile(percentile, dim=1).clamp(min=1)
            s = s.view(-1, *[1] * (x0.ndim - 1))
            x0 = x0.clamp(-s, s) / s
        return (x0, *fraction) if fraction else x0

    return bounded
