"""Choices that have a gradient: 0 or 1 going forward, something smooth going back.

    y = σ((l + g) / τ),  g = -log E,  E ~ Exp(1);      m = 1[y > 1/2], with the gradient of y      P(m = 1) = 1 - exp(-eˡ)

One Gumbel number a choice (kind "gumbel"), whatever the temperature τ. With the difference of two, which is logistic (kind
"logistic"), it is the binary concrete distribution: P(m = 1) = σ(l).

Sources: Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013 (straight-through);
Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017; Maddison, Mnih, Teh, "The Concrete
Distribution", ICLR 2017 (logistic); Wang et al., "Not All Parameters Matter", CVPR 2025 (one Gumbel).

>>> import torch
>>> from sfumato.nn import gumbel_sigmoid
>>> logits = torch.tensor([-9.0, 9.0], requires_grad=True)
>>> gate = gumbel_sigmoid(logits, noise=torch.zeros(2))
>>> gate.detach()
tensor([0., 1.])
>>> gate.sum().backward()
>>> bool((logits.grad > 0).all())
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadSetting


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of one tensor with the gradient of another.

    Args:
        hard: any shape; its own gradient is not used.
        soft: like `hard`.

    Returns:
        `hard`, to the last bit where `soft` is finite.
    """
    return hard.detach() + (soft - soft.detach()) if soft.requires_grad else hard.detach()


def gumbel_sigmoid(
    logits: Tensor,
    *,
    tau: float = 1.0,
    hard: bool = True,
    threshold: float = 0.5,
    kind: str = "gumbel",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random gates: 1 = kept.

    Args:
        logits: any shape; the larger, the likelier kept.
        tau: temperature above 0: how sharply the soft gate, and with it the gradient, changes.
        hard: gates of 0 and 1, going back the gradient of the soft one; else the soft gates, between 0 and 1.
        threshold: a soft gate above this is a hard 1.
        kind: "gumbel": P(1) = 1 - exp(-exp(l)); "logistic": P(1) = σ(l) (both at threshold 1/2).
        noise: what is added to the logits, broadcastable to them, instead of drawing it; zeros: no randomness.
        generator: source of the noise, which is drawn on its device, in float32 at least: half precision has no small enough E.

    Returns:
        Like `logits`.

    Raises:
        BadSetting: a temperature that is not above 0, or an unknown kind.
    """
    if tau <= 0:
        raise BadSetting(f"tau={tau} must be above 0")
    if kind not in ("gumbel", "logistic"):
        raise BadSetting(f"there is no kind {kind!r} of gate: use gumbel or logistic")
    if noise is None:
        noise = _gumbel(logits, generator)
        if kind == "logistic":
            noise = noise - _gumbel(logits, generator)
    soft = torch.sigmoid((logits + noise) / tau).to(logits.dtype)
    return straight_through((soft > threshold).to(soft), soft) if hard else soft


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel numbers -log E, of at least single precision."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    device = like.device if generator is None else generator.device
    return torch.empty(like.shape, dtype=dtype, device=device).exponential_(generator=generator).log_().neg_().to(like.device)
