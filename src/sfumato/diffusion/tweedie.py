"""What a score says of the clean picture behind a noisy one: its mean, and how uncertain it is.

    E[x_0 | x_t] = (x_t + (1 - abar) s) / sqrt(abar),       s = ∇ log p_t(x_t)
    tr Cov[x_0 | x_t] = (1 - abar) / abar (n + (1 - abar) div s),       x_t in n dimensions

The covariance itself would take n score calls; its trace takes one more than the mean.

Sources: Robbins 1956 and Miyasawa 1961 (the mean); Efron, "Tweedie's Formula and Selection Bias", 2011 (the second order);
Hutchinson 1990 (the trace).

>>> import torch
>>> from sfumato.diffusion import posterior_cov_trace, posterior_mean
>>> x_t, abar = torch.tensor([[1.0, -2.0]]), 0.5
>>> score = lambda x: -x  # of a standard normal, at any noise
>>> posterior_mean(x_t, score(x_t), abar)
tensor([[ 0.7071, -1.4142]])
>>> posterior_cov_trace(x_t, score, abar)  # 2 (1 - abar)
tensor([1.])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadSetting
from sfumato.nn.trace_of_jacobian import divergence


def posterior_mean(x_t: Tensor, score: Tensor, abar: float | Tensor) -> Tensor:
    """The mean of the clean picture given a noisy one; exact where the score is.

    Args:
        x_t: `[B, ...]`.
        score: of the noisy density at `x_t`, like it.
        abar: share of the signal's power in (0, 1], one for all or `[B]`.

    Returns:
        Like `x_t`.

    Raises:
        BadSetting: a share outside (0, 1].
    """
    abar = _share(abar, x_t)
    return (x_t + (1 - abar) * score) / abar.sqrt()


def posterior_cov_trace(
    x_t: Tensor, score_fn: Callable[[Tensor], Tensor], abar: float | Tensor, **divergence_settings: Any
) -> Tensor:
    """The summed variance of the clean picture given a noisy one, by random probes.

    Args:
        x_t: `[B, ...]`.
        score_fn: score of the noisy density, `[B, ...]` to the same shape.
        abar: share of the signal's power in (0, 1], one for all or `[B]`.
        **divergence_settings: of `sfumato.nn.divergence`: probes, method, h, probe, noise, generator.

    Returns:
        `[B]`, in squared units of the clean picture; an estimate, so possibly negative.

    Raises:
        BadSetting: a share outside (0, 1].
    """
    abar = _share(abar, x_t).flatten()
    n = x_t[0].numel()
    return (1 - abar) / abar * (n + (1 - abar) * divergence(score_fn, x_t, **divergence_settings))


def _share(abar: float | Tensor, x: Tensor) -> Tensor:
    """`abar` shaped to multiply `x`."""
    abar = torch.as_tensor(abar, dtype=x.dtype, device=x.device)
    if not ((abar > 0) & (abar <= 1)).all():
        raise BadSetting("abar, the share of the signal's power, must lie in (0, 1]")
    return abar.reshape(-1, *[1] * (x.ndim - 1))
