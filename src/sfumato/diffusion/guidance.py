"""Classifier-free guidance: away from what a network draws of anything, towards what it draws of one thing.

    f_guided(x_t, t) = f(x_t, t, null) + scale (f(x_t, t, cond) - f(x_t, t, null))

scale = 1 is the conditional network, 0 the unconditional one; above 1 samples are more typical and less diverse. The rule is the
same for eps, x_0, v and scores, which are affine in one another. One batch holds both conditions.

Source: Jonathan Ho, Tim Salimans, "Classifier-Free Diffusion Guidance", NeurIPS 2021 workshop (arXiv 2207.12598), equation 6; its
w is scale - 1.

>>> import torch
>>> from sfumato.diffusion import classifier_free_guidance
>>> net = lambda x, t, cond: cond.view(-1, 1) * x  # twice as much of class 2 as of class 1
>>> guided = classifier_free_guidance(net, torch.tensor([2.0]), torch.tensor([1.0]), scale=3.0)
>>> guided(torch.ones(1, 1), torch.tensor([7]))
tensor([[4.]])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def classifier_free_guidance(
    model: Callable[[Tensor, Tensor, Tensor], Any], cond: Tensor, null: Tensor | None, *, scale: float = 1.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """A conditional network as one of pictures and time alone, for any sampler.

    Args:
        model: `model(x_t, t, cond)` with t `[B]`; a network of diffusers will do, its `.sample` is taken.
        cond: what is wanted of each picture of the batch, `[B, ...]`: class numbers, states of a text encoder.
        null: what says nothing, like `cond` or `[1, ...]`; None: nothing does, so `cond` is followed.
        scale: 1: follow `cond`, one network pass; 0: follow `null`, one pass; any other: both, a batch twice as large.

    Returns:
        `f(x_t, t)`, of what `model` predicts.
    """
    if null is None or scale in (0, 1):
        told = cond if null is None or scale else null.expand_as(cond)
        return lambda x, t: _plain(model(x, t, told))
    both = torch.cat([null.expand_as(cond), cond])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        without, with_it = _plain(model(torch.cat([x, x]), torch.cat([t, t]), both)).chunk(2)
        return torch.lerp(without, with_it, scale)

    return guided


def _plain(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.sample


def drop_condition(cond: Tensor, null: Tensor, share: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Conditions of a training batch, some of which are left out: each by chance `share`.

    Args:
        cond: `[B, ...]`.
        null: what says nothing, like `cond` or `[1, ...]`.
        share: of the batch, 0 to 1 (the source: 0.1 to 0.2).
        generator: source of which.

    Returns:
        Like `cond`.
    """
    device = cond.device if generator is None else generator.device
    gone = (torch.rand(len(cond), generator=generator, device=device) < share).to(cond.device)
    return torch.where(gone.view(-1, *[1] * (cond.ndim - 1)), null, cond)
