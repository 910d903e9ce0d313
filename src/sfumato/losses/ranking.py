"""Learn an order instead of values: the larger target of every pair should get the larger prediction.

    L = mean over pairs with t_i > t_j of  log(1 + exp(s_j - s_i))

Only differences of predictions and the order of targets count: any increasing map of the targets gives the same loss. Constant
predictions cost log 2.

Sources: Burges et al. 2005, "Learning to rank using gradient descent" (RankNet); as the relative loss: Wang et al. 2023, "Hard
Patches Mining for Masked Image Modeling", CVPR.

>>> import torch
>>> from sfumato.losses import pairwise_ranking
>>> pairwise_ranking(torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]]))
tensor(0.6931)
>>> pairwise_ranking(torch.tensor([[0.0, 200.0, 400.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
tensor(0.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfumato.errors import BadData, BadSetting

WHOLE = 1024
"""Longest rows whose pairs are held at once; longer ones are taken in blocks of about as many pairs."""


def pairwise_ranking(pred: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Logistic loss over all pairs of a row whose targets differ.

    Memory is quadratic in N up to 1024 entries a row and linear beyond it, where blocks are computed again going backward.

    Args:
        pred: `[B, N]`, scores.
        target: `[B, N]`; only its order within a row counts, and it gets no gradient. Equal targets make no pair.
        reduction: "mean" over all pairs of the batch, or "none".

    Returns:
        A scalar; with "none" `[B]`, the mean over each row's pairs. Without any pair 0, with a gradient of 0. At least float32.

    Raises:
        BadSetting: another reduction.
        BadData: shapes that differ.

    Reference:
        Wang et al. 2023; their sum over ordered pairs counts each pair twice, and so does its divisor.
    """
    if reduction not in ("mean", "none"):
        raise BadSetting(f"reduction {reduction!r} is not known: mean or none")
    if pred.shape != target.shape or pred.ndim != 2:
        raise BadData(f"predictions {tuple(pred.shape)} and targets {tuple(target.shape)} must both be [B, N]")
    target = target.detach()
    pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
    length = pred.shape[1]
    if length <= WHOLE:
        loss, pairs = _pairs(pred, target, 0, length)
    else:
        rows = max(1, WHOLE**2 // length)
        blocks = [
            checkpoint(_pairs, pred, target, start, start + rows, use_reentrant=False, preserve_rng_state=False)
            for start in range(0, length, rows)
        ]
        loss, pairs = (torch.stack(parts).sum(0) for parts in zip(*blocks, strict=True))
    if reduction == "mean":
        loss, pairs = loss.sum(), pairs.sum()
    return loss / pairs.clamp(min=1)


def _pairs(pred: Tensor, target: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Each row's loss and number of pairs, `[B]`, over the pairs whose larger target stands from `start` to `end`."""
    larger = target[:, start:end, None] > target[:, None]
    cost = F.softplus(pred[:, None] - pred[:, start:end, None])
    return torch.where(larger, cost, 0.0).sum((1, 2)), larger.sum((1, 2)).to(pred.dtype)
