"""StableMax: a softmax that grows like a power of the logits instead of their exponential, so that rounding does not stop it.

    StableMax(z)_i = s(z_i) / Σ_j s(z_j),   s(z) = 1 + z for z ≥ 0,  1 / (1 − z) below;   equal to softmax(symlog z)

A softmax whose winner leads by 16.6 nats rounds to exactly 1 in float32: that sample's loss is exactly 0 and its label no
longer pulls; only pushes on the other classes, of the size of rounding, are left. StableMax gets there at a lead of 17 million
(2²⁴) in float32, and of 10¹⁶ in float64, its usual type. It is not invariant to a common shift of the logits.

Source: Prieto, Barsbey, Mediano, Birdal, ICLR 2025, "Grokking at the Edge of Numerical Stability".

>>> import torch
>>> from sfumato.losses import cross_entropy_at, stablemax, stablemax_cross_entropy
>>> stablemax(torch.tensor([3.0, 0.0, -1.0]))  # in proportion to 4, 1 and 1/2
tensor([0.7273, 0.1818, 0.0909])
>>> logits, target = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
>>> cross_entropy_at(logits, target, torch.float32).item(), round(stablemax_cross_entropy(logits, target).item(), 4)
(0.0, 0.0465)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadSetting

LARGEST_IN_FLOAT64 = 10_000_000
"""Entries up to which StableMax is computed in float64 when no type is asked for: beyond, it costs a GPU too much."""


def symlog(z: Tensor) -> Tensor:
    """Signed logarithm, sign(z) log(1 + |z|): the logits with which softmax becomes StableMax.

    Args:
        z: any shape, any real numbers.

    Returns:
        Like `z`; slope 1 at 0, and 1 / (1 + |z|) everywhere.
    """
    positive = z.clamp_min(0)  # not through abs or sign, which have no slope at 0
    return positive.log1p() - (positive - z).log1p()


def widened(z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits in the type that StableMax is computed in: `dtype`, or float64 where that is affordable, else at least float32."""
    if dtype is None:
        affordable = z.numel() <= LARGEST_IN_FLOAT64 and z.device.type != "mps"  # which has no float64
        dtype = torch.float64 if affordable else torch.promote_types(z.dtype, torch.float32)
    return z.to(dtype)


def stablemax(z: Tensor, dim: int = -1) -> Tensor:
    """Probabilities in proportion to s(z): 1 + z for positive logits, 1 / (1 − z) for negative ones.

    Args:
        z: logits, any shape.
        dim: the dimension of the classes.

    Returns:
        Like `z`; sums to 1 over `dim`.

    Reference:
        Prieto et al. 2025, definition of StableMax.
    """
    return symlog(z).softmax(dim)


def log_stablemax(z: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Tensor:
    """Logarithm of `stablemax`, without forming it.

    Args:
        z: logits, any shape.
        dim: the dimension of the classes.
        dtype: the type to compute in. None: float64 up to ten million entries (not on mps), else at least float32.

    Returns:
        Like `z`, in that type; the gradient comes back in the type of `z`.
    """
    return symlog(widened(z, dtype)).log_softmax(dim)


def stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of StableMax: −log StableMax(z)_y.

    Its slope is (p_j − [j = y]) / (1 + |z_j|): it fades with the logits, but does not vanish.

    Args:
        logits: z, `[B, K]`.
        target: labels `[B]`, or probabilities `[B, K]`.
        label_smoothing: share of the target spread over all classes, 0 to 1.
        dtype: see `log_stablemax`.
        reduction: "mean" over the batch, or "none".

    Returns:
        A scalar; with "none" `[B]`. In the type it was computed in; the gradient comes back in the type of the logits.

    Raises:
        BadSetting: another reduction.

    Reference:
        Prieto et al. 2025.
    """
    return _cross_entropy(symlog(widened(logits, dtype)), target, label_smoothing, reduction)


def cross_entropy_at(logits: Tensor, target: Tensor, dtype: torch.dtype, *, reduction: str = "mean") -> Tensor:
    """Ordinary cross-entropy, computed in a given floating-point type: where it rounds to 0 is decided by that type alone.

    Args:
        logits: `[B, K]`.
        target: labels `[B]`, or probabilities `[B, K]`.
        dtype: float16, bfloat16, float32 or float64; an autocast region does not change it.
        reduction: "mean" over the batch, or "none".

    Returns:
        A scalar of that type; with "none" `[B]`.

    Raises:
        BadSetting: another reduction.

    Example:
        >>> logits, target = torch.tensor([[9.0, 0.0]]), torch.tensor([0])
        >>> [cross_entropy_at(logits, target, dtype).item() > 0 for dtype in (torch.float16, torch.float32)]
        [False, True]
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _cross_entropy(logits.to(dtype), target, 0.0, reduction)


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise BadSetting(f"reduction {reduction!r} is not known: mean or none")
    target = target.to(logits.dtype) if target.is_floating_point() else target
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction=reduction)
