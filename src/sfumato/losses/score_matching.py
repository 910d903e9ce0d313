"""What integration by parts makes computable: errors of a denoiser or a score against truths that are not known.

    sure:         E |x - f(y)|² = E [ |y - f(y)|² + 2 σ² div f(y) - n σ² ],      y = x + σ z, z ~ N(0, I) of n numbers
    nonnegative:  E |x s - x ∇ log p(x)|² / 2 = E [ |x s|² / 2 + div (x² s) ] + constant,      x ~ p on numbers >= 0

Stein's unbiased risk estimate, given here a number of the picture, can be trained on with noisy pictures alone; non-negative
score matching, with data alone.

Sources: Stein, "Estimation of the Mean of a Multivariate Normal Distribution", Annals of Statistics 1981; Hyvärinen, "Some
extensions of score matching", Computational Statistics & Data Analysis 2007; the divergence by random probes: Ramani, Blu, Unser,
"Monte-Carlo SURE", 2008.

>>> import torch
>>> from sfumato.losses import nonnegative_score_matching, sure
>>> y = torch.randn(1000, 3, 4, 4, generator=torch.Generator().manual_seed(0))  # nothing but noise
>>> abs(sure(lambda y: y / 2, y, 1.0).item() - 0.25) < 0.02  # what is left of it: a half, squared
True
>>> x = -torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)).log()  # exponential: its score is -1
>>> min((0.5, 1.0, 2.0), key=lambda rate: nonnegative_score_matching(lambda x: 0 * x - rate, x).item())
1.0
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.losses.comp_sum_family import reduce
from sfumato.nn.trace_of_jacobian import divergence


def sure(
    denoiser: Callable[[Tensor], Tensor],
    y: Tensor,
    sigma: float | Tensor,
    *,
    probes: int = 1,
    method: str = "jvp",
    noise: Tensor | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unbiased estimate of the mean squared error at noisy pictures.

    Args:
        denoiser: f, `[B, ...]` to the same shape; samples must not look at each other.
        y: `[B, ...]`, noisy.
        sigma: standard deviation of the Gaussian noise, a scalar or `[B]`.
        probes, method, noise: of the divergence, see `sfumato.nn.divergence`.
        reduction: "mean" over the batch, or "none": `[B]`.
        generator: source of the probes.

    Returns:
        A scalar or `[B]`, squared units of y; single estimates can be negative.

    Raises:
        BadSetting: an unknown method or reduction.
    """
    variance = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).square()
    residual = (y - denoiser(y)).flatten(1).square().mean(1)
    trace = divergence(denoiser, y, probes=probes, method=method, noise=noise, generator=generator) / y[0].numel()
    return reduce(residual + variance * (2 * trace - 1), reduction)


def nonnegative_score_matching(
    score_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    probes: int = 1,
    method: str = "jvp",
    noise: Tensor | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score matching for numbers that are not negative, without noise and without knowing the density.

        J = sum_i [ (x_i s_i)² / 2 + ∂_i (x_i² s_i) ],    E J = E |x s - x ∇ log p(x)|² / 2 + constant

    The factor x takes the place of a boundary term: the density need not vanish at 0.

    Args:
        score_fn: s, the Stein score of a model, `[B, ...]` to the same shape; samples must not look at each other.
        x: `[B, ...]`, data, at least 0.
        probes, method, noise: of the divergence, see `sfumato.nn.divergence`.
        reduction: "mean" over the batch, or "none": `[B]`.
        generator: source of the probes.

    Returns:
        A scalar or `[B]`; it can be negative, and is smallest at the score of the data.

    Raises:
        BadSetting: an unknown method or reduction.

    Reference: Hyvärinen, "Some extensions of score matching", Computational Statistics & Data Analysis 2007, section 3.
    """
    half = (x * score_fn(x)).square().flatten(1).sum(1) / 2
    trace = divergence(lambda x: x.square() * score_fn(x), x, probes=probes, method=method, noise=noise, generator=generator)
    return reduce(half + trace, reduction)
