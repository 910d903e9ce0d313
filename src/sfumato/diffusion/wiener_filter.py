"""The best linear denoiser: it knows mean and covariance of its pictures, shrinks in their principal components, and no more.

    D(y, σ) = x̄ + Σ_k λ_k / (λ_k + σ²) <y - x̄, e_k> e_k,      cov x = Σ_k λ_k e_k e_kᵀ

One basis for all pictures: what a network gains over it, it owes to a basis, or a rule, of each picture's own. A network that
stays below it has not been trained enough.

Source: Wiener, "Extrapolation, Interpolation, and Smoothing of Stationary Time Series", 1949; as the fixed basis beside adaptive
ones: Kadkhodaie, Guth, Simoncelli, Mallat, ICLR 2024.

>>> import torch
>>> from sfumato.diffusion import wiener_filter
>>> x = torch.randn(5000, 1, 2, 2, generator=torch.Generator().manual_seed(0))  # white, of deviation 1
>>> wiener_filter(x)(torch.ones(1, 1, 2, 2), 1.0).mean().round(decimals=1)
tensor(0.5000)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.errors import BadData


def wiener_filter(train: Tensor) -> Callable[[Tensor, float | Tensor], Tensor]:
    """The denoiser of a Gaussian with the mean and covariance of a set.

    Args:
        train: `[N, ...]` of n numbers each, N at least 2; costs a singular value decomposition of `[N, n]`.

    Returns:
        `D(y, sigma)`: y `[B, ...]`, noise of deviation sigma > 0 (a scalar or `[B]`); gives the clean pictures, `[B, ...]`.

    Raises:
        BadData: fewer than two pictures.
    """
    if len(train) < 2:
        raise BadData(f"{len(train)} pictures have no covariance: give two at least")
    rows = train.flatten(1)
    mean = rows.mean(0)
    _, scale, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    power = scale.square() / (len(rows) - 1)

    def denoise(y: Tensor, sigma: float | Tensor) -> Tensor:
        variance = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).square().reshape(-1, 1)
        e, kept = axes.to(y), power.to(y)
        coefficients = (y.flatten(1) - mean.to(y)) @ e.T * (kept / (kept + variance))
        return (mean.to(y) + coefficients @ e).view_as(y)

    return denoise
