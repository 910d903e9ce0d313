"""What noise does to the eigenvalues of a matrix with a few large ones, in closed form.

    H + E, entries of E of variance v/P:      λ → λ + v/λ                 beyond |λ| = √v,  else the edge ±2√v
    sample covariance, bulk σ², spike σ² + ℓ:  → (σ² + ℓ)(1 + qσ²/ℓ)      beyond ℓ = σ²√q,  else the edge σ²(1 + √q)²

for P × P matrices, P large, and q = P / samples. Noise pushes outliers outwards; those below the threshold drown in the bulk.

Sources: Baik, Ben Arous, Péché 2005; Benaych-Georges, Nadakuditi 2011; as a model of batch Hessians: Granziol, Zohren, Roberts,
"Learning Rates as a Function of Batch Size", JMLR 23(173), 2022.

>>> import torch
>>> from sfumato.probes import spiked_wigner, spiked_wishart
>>> spiked_wigner(torch.tensor([20.0, 8.0, -20.0]), 100.0)  # √v = 10
tensor([ 25.,  20., -25.])
>>> spiked_wishart(torch.tensor([20.0, 0.1]), 0.25, 4.0)
tensor([21.2625,  2.2500])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadSetting


class SpectralLaw(NamedTuple):
    """Eigenvalues above 0 and their shares `[..., Q]`, and the share of 0 `[...]`."""

    nodes: Tensor
    weights: Tensor
    at_zero: Tensor


def marchenko_pastur(samples_per_dim: Tensor | float, *, nodes: int = 2000) -> SpectralLaw:
    """The limit of the spectrum of XᵀX, X `[P, N]` with entries of variance 1/N, as nodes to sum over.

    λ = 1 + α + 2√α cos θ at midpoints in θ, where the density times dλ/dθ is smooth and periodic: sums over smooth functions of λ
    converge fast.

    Args:
        samples_per_dim: α = P/N, positive, any shape.
        nodes: Q, how many.

    Returns:
        Nodes and weights `[..., Q]`, and the share of eigenvalues that are 0; float64 unless `samples_per_dim` is a tensor.

    Raises:
        BadSetting: a value that is not positive.

    Reference: Marčenko, Pastur 1967.
    """
    alpha = torch.as_tensor(samples_per_dim) if isinstance(samples_per_dim, Tensor) else torch.tensor(samples_per_dim).double()
    if not (alpha > 0).all():
        raise BadSetting(f"samples_per_dim={float(alpha.min()):g} must be positive")
    theta = (torch.arange(nodes, dtype=alpha.dtype, device=alpha.device) + 0.5) * (torch.pi / nodes)
    half = 2 * alpha.sqrt()[..., None]
    found = 1 + alpha[..., None] + half * theta.cos()
    return SpectralLaw(found, (half * theta.sin()).square() / (2 * nodes * found), (1 - alpha).clamp(min=0))


def spiked_wigner(lam: Tensor, v: float | Tensor) -> Tensor:
    """Where the outliers of a symmetric matrix go when symmetric noise is added to it.

    Args:
        lam: outliers λ of the matrix without noise, any shape and sign; all others are near 0.
        v: variance of the noise along a direction, E‖Ez‖² for unit z: P times the variance of an entry; at least 0.

    Returns:
        Like `lam`: λ + v/λ, or ±2√v with the sign of λ (+ at 0) where |λ| is at most √v.

    Raises:
        BadSetting: `v` below 0.
    """
    v = _at_least_zero(v, lam, "v")
    edge = torch.where(lam < 0, -2.0, 2.0) * v.sqrt()
    return torch.where(lam.square() > v, lam + v / _nonzero(lam), edge)


def spike_overlap(lam: Tensor, v: float | Tensor) -> Tensor:
    """Squared cosine between an outlier's direction with and without noise: 1 − v/λ², or 0 below the threshold |λ| = √v.

    Args:
        lam: outliers λ, any shape and sign.
        v: as of `spiked_wigner`.

    Returns:
        Like `lam`, 0 to 1.

    Raises:
        BadSetting: `v` below 0.
    """
    v = _at_least_zero(v, lam, "v")
    return torch.where(lam.square() > v, 1 - v / _nonzero(lam).square(), 0.0)


def spiked_wishart(spike: Tensor, sigma2: float | Tensor, dims_per_sample: float | Tensor) -> Tensor:
    """Where the outliers of a covariance matrix stand in the covariance of a sample.

    Args:
        spike: ℓ, how far an outlier of the true covariance is above σ², any shape, at least 0.
        sigma2: σ², all other eigenvalues of the true covariance, at least 0.
        dims_per_sample: q, dimensions over samples, at least 0.

    Returns:
        Like `spike`: (σ² + ℓ)(1 + qσ²/ℓ), or the edge σ²(1 + √q)² where ℓ is at most σ²√q.

    Raises:
        BadSetting: a value below 0.
    """
    sigma2 = _at_least_zero(sigma2, spike, "sigma2")
    q = _at_least_zero(dims_per_sample, spike, "dims_per_sample")
    outside = (sigma2 + spike) * (1 + q * sigma2 / _nonzero(spike))
    return torch.where(spike > sigma2 * q.sqrt(), outside, sigma2 * (1 + q.sqrt()).square())


def _at_least_zero(value: float | Tensor, like: Tensor, name: str) -> Tensor:
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if (value < 0).any():
        raise BadSetting(f"{name}={float(value.min()):g} must be at least 0")
    return value


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value == 0, 1.0, value)
