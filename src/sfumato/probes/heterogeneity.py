"""How unlike the visible tokens the mask tokens are: the entropy of what they resemble.

    P_ij = softmax over visible j of (cos(z_i, z_j) / τ),     H = mean over hidden i of -Σ_j P_ij log P_ij / log(#visible)

H near 1: a mask token resembles no visible token more than another; low: it has become the likeness of a few. A reconstruction:
"Emerging Property of Masked Token for Effective Pre-training" (ECCV 2024, arXiv 2404.08330) measures the heterogeneity of mask
and visible tokens by an entropy; the formula is ours.

>>> import torch
>>> from sfumato.probes import token_heterogeneity
>>> z, hidden = torch.eye(4)[None], torch.tensor([[True, False, False, False]])
>>> token_heterogeneity(z, hidden)  # at right angles to all visible tokens
tensor([1.])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_heterogeneity(z: Tensor, mask: Tensor, *, tau: float = 0.1) -> Tensor:
    """The normalised entropy of what hidden tokens resemble, mean over them.

    Args:
        z: `[B, N, D]`, tokens of one layer; their lengths do not matter.
        mask: `[B, N]` bool, True = hidden.
        tau: temperature of the cosines, above 0.

    Returns:
        `[B]`, from 0 to 1; 1 where nothing is hidden, or fewer than two tokens are visible.
    """
    unit = F.normalize(z, dim=-1)
    cosines = (unit @ unit.mT) / tau
    logits = cosines.masked_fill(mask[:, None], -torch.inf)
    visible = (~mask).sum(-1)
    logits = torch.where((visible > 0)[:, None, None], logits, cosines)  # all hidden: any finite row, its result is not used
    p = logits.softmax(-1)
    entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)
    hidden = mask.sum(-1)
    mean = torch.where(mask, entropy, 0.0).sum(-1) / hidden.clamp_min(1)
    told = (hidden > 0) & (visible > 1)
    return torch.where(told, mean / visible.clamp_min(2).to(z.dtype).log(), 1.0)
