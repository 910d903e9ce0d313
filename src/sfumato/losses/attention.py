"""Two penalties on attention maps: how spread a row is, and how much of it falls on hidden tokens.

    entropy of row i = -Σ_j A_ij log A_ij   (over log N, where it is normalised)       mass of row i = Σ_{j hidden} A_ij

Means over the rows that count and over all heads. Zero entries, as a masked softmax leaves them, add 0 and have finite gradients.

>>> import torch
>>> from sfumato.losses import attention_entropy, attention_mass
>>> uniform = torch.full((1, 1, 4, 4), 0.25)
>>> attention_entropy(uniform, normalize=True), attention_mass(uniform, torch.tensor([[True, False, False, False]]))
(tensor(1.), tensor(0.2500))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.errors import BadSetting


def attention_entropy(
    weights: Tensor, dim: int = -1, *, rows: Tensor | None = None, normalize: bool = False, reduction: str = "mean"
) -> Tensor:
    """The mean entropy of attention rows, in nats.

    Args:
        weights: `[B, heads, N, M]`, not negative, sum 1 along `dim`.
        dim: along which a row runs.
        rows: `[B, N]` bool, True = counted; None: all.
        normalize: divide by log M, so that a uniform row has 1.
        reduction: "mean" over everything, or "none": `[B]`.

    Returns:
        A scalar or `[B]`; 0 where no row is counted.

    Raises:
        BadSetting: another reduction.
    """
    entropy = -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(dim)
    if normalize:
        entropy = entropy / math.log(max(2, weights.shape[dim]))
    return _over_rows(entropy, rows, reduction)


def attention_mass(weights: Tensor, hidden: Tensor, *, rows: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """The share of attention that hidden tokens get.

    Args:
        weights: `[B, heads, N, M]`, rows sum to 1.
        hidden: `[B, M]` bool, True = hidden.
        rows: `[B, N]` bool, True = counted; None: all.
        reduction: "mean" over everything, or "none": `[B]`.

    Returns:
        A scalar or `[B]`, from 0 to 1; 0 where no row is counted.

    Raises:
        BadSetting: another reduction.
    """
    mass = torch.where(hidden[:, None, None], weights, 0.0).sum(-1)
    return _over_rows(mass, rows, reduction)


def _over_rows(values: Tensor, rows: Tensor | None, reduction: str) -> Tensor:
    """The mean of `[B, heads, N]` over heads and counted rows: of each sample, or over all rows of all samples."""
    if reduction not in ("mean", "none"):
        raise BadSetting(f"reduction={reduction!r}: mean or none")
    dims = (1, 2) if reduction == "none" else (0, 1, 2)
    if rows is None:
        return values.mean(dims)
    counted = rows[:, None].expand_as(values)
    return torch.where(counted, values, 0.0).sum(dims) / counted.sum(dims).clamp_min(1)
