"""Errors counted where something was hidden.

    loss = Σ_i hidden_i · ℓ_i / Σ_i hidden_i,     ℓ_i = mean over the pixels of patch i of (pred - target)²
    target of a patch: (t - mean) / sqrt(var + 1e-6), var unbiased      (MAE's normalised pixels)

Papers divide in four ways; here `masked_*` is the mean over what is hidden, `weighted_l1` the mean over everything. An empty
set gives 0, with a gradient of 0.

Source: He et al. 2021, section 3 (reconstruction target); Xie et al. 2021, section 3.4.

>>> import torch
>>> from sfumato.losses import masked_mean, masked_patch_mse
>>> masked_mean(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[True, False, True]]))
tensor(2.)
>>> pred, target = torch.zeros(2, 4, 12), torch.rand(2, 4, 12)
>>> round(masked_patch_mse(pred, target, torch.ones(2, 4, dtype=torch.bool)).item(), 3)  # 11/12: normalised, unbiased
0.917
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadSetting


def masked_mean(values: Tensor, hidden: Tensor, *, weight: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Mean over the hidden entries: `Σ hidden · weight · values / max(Σ hidden · weight, eps)`.

    Args:
        values: any shape.
        hidden: bool, broadcastable to `values`; True = counted.
        weight: not negative, broadcastable; None: equal.
        eps: least divisor, so that an empty set gives 0.

    Returns:
        A scalar. Entries that are not hidden have a gradient of exactly 0, even where they are not finite.
    """
    counted = hidden if weight is None else hidden * weight
    counted = counted.to(values.dtype).expand_as(values)
    kept = torch.where(hidden, values, 0.0)
    return (kept if weight is None else kept * counted).sum() / counted.sum().clamp(min=eps)


def normalize_patches(t: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Each patch with mean 0 and unbiased variance 1: `(t - mean) / sqrt(var + eps)`.

    Args:
        t: `[..., d]`, the numbers of a patch last.
        eps: inside the root; a flat patch becomes 0.

    Returns:
        Like `t`.

    Reference:
        He et al. 2021, "normalized pixel values".
    """
    mean, deviation = _statistics(t, eps)
    return (t - mean) / deviation


def denormalize_patches(pred: Tensor, target: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Predictions of normalised patches with their patch's own mean and deviation put back: undoes `normalize_patches`.

    Args:
        pred: `[..., d]`, in units of the normalised patch.
        target: `[..., d]`, the patches themselves.
        eps: inside the root.

    Returns:
        Like `pred`; of `normalize_patches(target)` it is `target`.
    """
    mean, deviation = _statistics(target, eps)
    return pred * deviation + mean


def _statistics(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch, `[..., 1]`."""
    var, mean = torch.var_mean(t, dim=-1, keepdim=True)
    return mean, (var + eps).sqrt()


def masked_patch_mse(pred: Tensor, target: Tensor, hidden: Tensor, *, norm: bool = True, reduction: str = "mean") -> Tensor:
    """MAE's loss: squared error of each patch, averaged over the hidden ones.

    Args:
        pred: `[B, L, d]`.
        target: `[B, L, d]`, pixels of each patch.
        hidden: `[B, L]` bool, True = hidden.
        norm: compare with normalised patches, see `normalize_patches`.
        reduction: "mean" over all hidden patches of the batch, or "none".

    Returns:
        A scalar; with "none" `[B, L]`, 0 at visible patches.

    Raises:
        BadSetting: another reduction.

    Reference:
        He et al. 2021, section 3; official `forward_loss`.
    """
    if reduction not in ("mean", "none"):
        raise BadSetting(f"reduction {reduction!r} is not known: mean or none")
    if norm:
        target = normalize_patches(target)
    error = (pred - target).square().mean(-1)
    return masked_mean(error, hidden) if reduction == "mean" else torch.where(hidden, error, 0.0)


def masked_l1(pred: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over the hidden elements.

    Args:
        pred: any shape, such as `[B, C, H, W]`.
        target: like `pred`.
        hidden: bool, broadcastable to it, such as `[B, 1, H, W]`.

    Returns:
        A scalar; 0 where nothing is hidden.

    Reference:
        Xie et al. 2021, equation 1 (their divisor is larger by 1e-5).
    """
    return masked_mean((pred - target).abs(), hidden)


def weighted_l1(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over ALL elements of `weight · |pred - target|`.

    Args:
        pred: any shape.
        target: like `pred`.
        weight: broadcastable to it; `a * hidden + b * ~hidden` weighs hidden and known elements.

    Returns:
        A scalar.
    """
    return (weight * (pred - target).abs()).mean()
