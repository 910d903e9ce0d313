"""How the errors of a linear network change under gradient descent when samples and parameters are comparably many.

    E_g(t) = 1 + 1/N Σ_λ [ (SNR + INR) e^{−2λt} + (1 − e^{−λt})² / λ ],      the second term 0 at λ = 0

for labels y = w̄·x + ε, x ~ N(0, I/N), in units of the variance of ε. λ are the N eigenvalues of XᵀX for inputs X `[P, N]`; t is
in units of the time constant of w' = Xᵀ(y − Xw), the gradient of the SUM of squared errors / 2. SNR and INR are the variances of
the teacher's and the first weights. Small λ learn the signal late and amplify the noise most, so it pays to stop early; λ = 0
keeps the first weights for ever. For N, P → ∞ with α = P/N fixed, λ follow the law of Marchenko and Pastur on (√α ± 1)².

Source: Advani, Saxe, Sompolinsky, "High-dimensional dynamics of generalization error in neural networks", Neural Networks 132,
2020, sections 2 and 3.

>>> import torch
>>> from sfumato.probes import final_error, generalization_error
>>> generalization_error([0.0, 1.0, 1e6], snr=4.0, samples_per_dim=0.5).round(decimals=2)  # first it falls, then it rises
tensor([5.0000, 3.7000, 4.0000], dtype=torch.float64)
>>> final_error([0.5, 1.0, 2.0], snr=4.0)  # double descent
tensor([4., inf, 2.], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.probes.random_matrix import SpectralLaw, marchenko_pastur

Numbers = float | Sequence[float] | Tensor

_GRID, _ZOOMS = 64, 5


class FrozenSubspace(NamedTuple):
    """Directions of weight space `[N, dim]` (orthonormal) that no sample has a component in, and their number."""

    dim: int
    basis: Tensor


class FeatureSpectrum(NamedTuple):
    """Of XᵀX for features X `[P, N]`: least eigenvalue that is not 0, largest one, rank, and P / N."""

    smallest: float
    largest: float
    rank: int
    samples_per_dim: float


def generalization_error(
    t: Numbers, *, snr: float, inr: float = 0.0, samples_per_dim: Numbers | None = None, spectrum: Tensor | None = None
) -> Tensor:
    """Mean error on new samples, noise of their labels included, over teachers, first weights and noise.

    Args:
        t: times, at least 0, any shape.
        snr: variance of a weight of the teacher, over that of the noise.
        inr: variance of a first weight, over that of the noise.
        samples_per_dim: α, positive, any shape: the limit of large N and P.
        spectrum: instead, the eigenvalues of XᵀX `[N]`, with its zeros.

    Returns:
        Shape of `samples_per_dim` (or none) and `t`, float64, in units of the variance of the noise; at least 1.

    Raises:
        BadSetting: values out of range, or both or none of `samples_per_dim` and `spectrum`.
    """
    _check(snr, inr)
    modes = _modes(samples_per_dim, spectrum)
    times = _numbers(t, modes.weights)
    error = _error(times.flatten(), modes, snr + inr)
    return error.unflatten(-1, times.shape) if times.dim() else error[..., 0]


def training_error(
    t: Numbers, *, snr: float, samples_per_dim: Numbers, inr: float = 0.0, spectrum: Tensor | None = None
) -> Tensor:
    """Mean error on the training samples; arguments as of `generalization_error`, `samples_per_dim` also with a `spectrum`.

    Returns:
        As `generalization_error`; falls to max(0, 1 − 1/α).
    """
    _check(snr, inr)
    modes = _modes(None if spectrum is not None else samples_per_dim, spectrum)
    alpha = _positive(samples_per_dim, "samples_per_dim", modes.weights)[..., None]
    times = _numbers(t, modes.weights)
    decay = (-2 * modes.nodes[..., None, :] * times.flatten()[:, None]).exp()
    learnt = ((modes.nodes * (snr + inr) + 1) * modes.weights)[..., None, :]
    error = ((decay * learnt).sum(-1) - modes.weights.sum(-1, keepdim=True)) / alpha + 1
    return error.unflatten(-1, times.shape) if times.dim() else error[..., 0]


def final_error(samples_per_dim: Numbers, *, snr: float, inr: float = 0.0) -> Tensor:
    """The limit of `generalization_error` for late times: α / (α − 1), or (1 − α)(SNR + INR) + 1 / (1 − α) below α = 1.

    Args:
        samples_per_dim: α, positive, any shape; infinite error at 1.
        snr, inr: as of `generalization_error`.

    Returns:
        Shape of `samples_per_dim`, float64.
    """
    _check(snr, inr)
    alpha = _positive(samples_per_dim, "samples_per_dim")
    return torch.where(alpha < 1, (1 - alpha) * (snr + inr) + 1 / (1 - alpha), alpha / (alpha - 1))


def mode_optimal_time(eigenvalue: Numbers, *, snr: float, inr: float = 0.0) -> Tensor:
    """When learning is best stopped in a direction of one eigenvalue: ln(1 + λ(SNR + INR)) / λ.

    Args:
        eigenvalue: λ, at least 0, any shape (at 0 the limit, SNR + INR).
        snr, inr: as of `generalization_error`.

    Returns:
        Shape of `eigenvalue`, float64.
    """
    _check(snr, inr)
    lam = _numbers(eigenvalue)
    return torch.where(lam > 0, (lam * (snr + inr)).log1p() / torch.where(lam > 0, lam, 1.0), snr + inr)


def optimal_time(
    *, snr: float, inr: float = 0.0, samples_per_dim: Numbers | None = None, spectrum: Tensor | None = None
) -> Tensor:
    """The one time at which `generalization_error` is least; arguments as there.

    It lies between the best times of the largest and the smallest eigenvalue, and is searched there.

    Returns:
        Shape of `samples_per_dim`, or a scalar; float64, good to a relative 1e-6.
    """
    _check(snr, inr)
    modes = _modes(samples_per_dim, spectrum)
    ends = torch.stack([modes.nodes.amin(-1), modes.nodes.amax(-1)])
    late, early = mode_optimal_time(ends, snr=snr, inr=inr)
    steps = torch.linspace(0, 1, _GRID, dtype=early.dtype, device=early.device)
    for _ in range(_ZOOMS):
        times = early[..., None] * (late / early)[..., None] ** steps
        best = _error(times, modes, snr + inr).argmin(-1, keepdim=True)
        early = times.gather(-1, (best - 1).clamp(min=0))[..., 0]
        late = times.gather(-1, (best + 1).clamp(max=_GRID - 1))[..., 0]
    return times.gather(-1, best)[..., 0]


def ridge_error(
    *, snr: float, strength: float | None = None, samples_per_dim: Numbers | None = None, spectrum: Tensor | None = None
) -> Tensor:
    """Mean error on new samples of ridge regression, ‖y − Xw‖² + γ‖w‖² minimised.

    Args:
        snr: as of `generalization_error`.
        strength: γ, positive; None: the best, 1 / SNR.
        samples_per_dim, spectrum: as of `generalization_error`.

    Returns:
        Shape of `samples_per_dim`, or a scalar; float64, in units of the variance of the noise.
    """
    _check(snr, 0.0)
    gamma = 1 / snr if strength is None else strength
    if not gamma > 0:
        raise BadSetting(f"strength={strength} must be positive")
    modes = _modes(samples_per_dim, spectrum)
    lam = modes.nodes
    return 1 + modes.at_zero * snr + (modes.weights * (gamma**2 * snr + lam) / (lam + gamma).square()).sum(-1)


def exact_gradient_flow(x: Tensor, y: Tensor, first: Tensor, t: Numbers) -> Tensor:
    """Weights of linear regression on the way from `first` to an interpolator: w' = Xᵀ(y − Xw), solved by one SVD.

    Args:
        x: `[P, N]`.
        y: `[P]`.
        first: weights at time 0, `[N]`.
        t: times, at least 0, any shape; infinity is allowed.

    Returns:
        Weights, shape of `t` and N.

    Raises:
        BadData: shapes that do not belong together.
    """
    if x.ndim != 2 or y.shape != x.shape[:1] or first.shape != x.shape[1:]:
        raise BadData(f"x is [P, N], y [P], first [N]; these are {list(x.shape)}, {list(y.shape)} and {list(first.shape)}")
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    seen = s > _tolerance(s, x)
    u, s, vh = u[:, seen], s[seen], vh[seen]
    gone = -torch.expm1(-s.square() * torch.as_tensor(t, dtype=x.dtype, device=x.device)[..., None]) / s
    return first + (gone * ((y - x @ first) @ u)) @ vh


def frozen_subspace(features: Tensor) -> FrozenSubspace:
    """Directions that gradient descent on linear weights never moves in, whatever the labels.

    Args:
        features: `[P, N]`, what the weights read; of any layer.
    """
    tall = len(features) > features.shape[1]
    square = torch.linalg.qr(features, mode="r").R if tall else features  # the same right singular vectors, without a P x P
    _, s, vh = torch.linalg.svd(square, full_matrices=True)
    rank = int((s > _tolerance(s, features)).sum())
    return FrozenSubspace(features.shape[1] - rank, vh[rank:].T)


def feature_spectrum(features: Tensor) -> FeatureSpectrum:
    """The eigenvalues that rule how fast and how well linear weights learn on `features` `[P, N]`.

    Raises:
        BadData: features that are all zero.
    """
    s = torch.linalg.svdvals(features)
    seen = s[s > _tolerance(s, features)].square()
    if not len(seen):
        raise BadData("all features are zero: they have no spectrum")
    p, n = features.shape
    return FeatureSpectrum(float(seen[-1]), float(seen[0]), len(seen), p / n)


def _modes(samples_per_dim: Numbers | None, spectrum: Tensor | None) -> SpectralLaw:
    if (samples_per_dim is None) == (spectrum is None):
        raise BadSetting("give samples_per_dim, for the limit of large networks, or the spectrum of one data set")
    if samples_per_dim is not None:
        return marchenko_pastur(_positive(samples_per_dim, "samples_per_dim"))
    assert spectrum is not None
    lam = spectrum.double()
    if lam.ndim != 1 or not (lam > 0).any():
        raise BadSetting(f"spectrum is [N] with an eigenvalue above 0; this one has shape {list(lam.shape)}")
    lam = lam[lam > lam.amax() * len(lam) * torch.finfo(spectrum.dtype).eps]
    share = len(lam) / len(spectrum)
    return SpectralLaw(lam, torch.full_like(lam, 1 / len(spectrum)), lam.new_tensor(1 - share))


def _error(times: Tensor, modes: SpectralLaw, start: float) -> Tensor:
    """E_g at times `[..., T]` that broadcast against the modes."""
    lam = modes.nodes[..., None, :]
    gone = torch.expm1(-lam * times[..., None])
    terms = start * (gone + 1).square() + gone.square() / lam
    return 1 + modes.at_zero[..., None] * start + (terms * modes.weights[..., None, :]).sum(-1)


def _tolerance(s: Tensor, x: Tensor) -> float:
    return float(s.amax()) * max(x.shape) * torch.finfo(s.dtype).eps if len(s) else 0.0


def _numbers(values: Numbers, like: Tensor | None = None) -> Tensor:
    device = None if like is None else like.device
    return torch.as_tensor(values, dtype=torch.float64, device=device)


def _positive(values: Numbers, name: str, like: Tensor | None = None) -> Tensor:
    found = _numbers(values, like)
    if not (found > 0).all():
        raise BadSetting(f"{name}={float(found.min()):g} must be positive")
    return found


def _check(snr: float, inr: float) -> None:
    if not (snr > 0 and inr >= 0):
        raise BadSetting(f"snr={snr} must be positive and inr={inr} at least 0")
