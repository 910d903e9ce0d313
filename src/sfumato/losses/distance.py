"""Losses for positive numbers such as distances: relative, with a scale of its own, or balanced between small and large errors.

    Laplace, relative:  |1 - μ / y| e^{-s} + s                              s: log-scale that the network predicts
    balanced L1:        (α / b)(b d + 1) ln(b d / β + 1) - α d   for d < β,   else γ d + γ / b - α β,      b = e^{γ/α} - 1

Gaussian with a log-variance is torch's own: `F.gaussian_nll_loss(mean, y, log_variance.exp())`.

Sources: Kendall and Gal 2017 (a scale predicted beside the value); Pang et al. 2019, "Libra R-CNN" (balanced L1); both as
Panariello et al. 2024, arXiv 2401.03191, use them.

>>> import torch
>>> from sfumato.losses import balanced_l1, laplace_relative_nll
>>> laplace_relative_nll(torch.tensor([9.0]), torch.tensor([10.0]), torch.tensor([0.0]))
tensor(0.1000)
>>> balanced_l1(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), reduction="none")
tensor([0.0000, 2.5786])
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, where

from sfumato.errors import BadSetting
from sfumato.losses.masked import masked_mean


def laplace_relative_nll(mean: Tensor, target: Tensor, log_scale: Tensor, *, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of a Laplace law of the relative error, without its constant.

    Args:
        mean: any shape, the prediction.
        target: like `mean`, not 0.
        log_scale: like `mean`, s; clamp it against overflow, to [-10, 10] say.
        reduction: "mean" or "none".

    Returns:
        A scalar, or like `mean`; smallest over s at e^s = |1 - mean / target|.
    """
    return _reduced((1 - mean / target).abs() * (-log_scale).exp() + log_scale, reduction)


def balanced_l1(
    pred: Tensor, target: Tensor, *, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """An L1 loss in which small errors have a larger share of the gradient; slope and value are continuous at `beta` = 1.

    Args:
        pred: any shape.
        target: like `pred`.
        alpha: slope of small errors, smaller: more for them; above 0.
        gamma: slope of large errors.
        beta: where one becomes the other.
        reduction: "mean" or "none".

    Returns:
        A scalar, or like `pred`.

    Raises:
        BadSetting: alpha or beta not above 0.
    """
    if alpha <= 0 or beta <= 0:
        raise BadSetting(f"alpha={alpha}, beta={beta}: both must be above 0")
    d, b = (pred - target).abs(), math.expm1(gamma / alpha)
    near = alpha / b * (b * d + 1) * (b * d / beta + 1).log() - alpha * d
    return _reduced(where(d < beta, near, gamma * d + gamma / b - alpha * beta), reduction)


def distance_loss(output: Tensor, target: Tensor, *, kind: str = "smooth_l1") -> Tensor:
    """The mean loss of predicted distances, where the true ones are known.

    Args:
        output: `[N, 1]` metres, or `[N, 2]` metres and a log-spread, which is clamped to [-10, 10].
        target: `[N]` metres, NaN: not known.
        kind: "smooth_l1", or with a spread "gaussian" (its log-variance) or "laplace" (see `laplace_relative_nll`).

    Returns:
        A scalar; 0 where nothing is known.

    Raises:
        BadSetting: an unknown kind, or one that asks for a spread that is not there.
    """
    if kind not in ("smooth_l1", "gaussian", "laplace") or (kind != "smooth_l1" and output.shape[1] < 2):
        raise BadSetting(f"kind={kind!r} of {output.shape[1]} outputs: smooth_l1, or with a log-spread gaussian or laplace")
    known, mean = target.isfinite(), output[:, 0]
    y = where(known, target, 1.0)
    if kind == "smooth_l1":
        return masked_mean(F.smooth_l1_loss(mean, y, reduction="none"), known)
    spread = output[:, 1].clamp(-10, 10)
    if kind == "gaussian":
        return masked_mean(F.gaussian_nll_loss(mean, y, spread.exp(), reduction="none"), known)
    return masked_mean(laplace_relative_nll(mean, y, spread, reduction="none"), known)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise BadSetting(f"reduction {reduction!r} is not known: mean or none")
    return values.mean() if reduction == "mean" else values
