"""Which tokens say the least: those most like all others.

    redundancy_i = mean over j ≠ i of cos(x_i, x_j);   the largest go first

Source: of the score, ours; redundant tokens are dropped as in "Hybrid Distillation: Connecting Masked Autoencoders with
Contrastive Learners", ICLR 2024, arXiv 2306.15876.

>>> import torch
>>> from sfumato.masks import redundant_tokens, token_redundancy
>>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
>>> token_redundancy(x).argmax().item(), redundant_tokens(x, 1, protect=0).tolist()
(3, [[0, 1, 2]])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def redundant_tokens(x: Tensor, drop: int, *, protect: int = 1) -> Tensor:
    """Which tokens stay when those most like all others go: mean cosine to the others, the largest are dropped.

    Args:
        x: `[B, n, D]`; no gradient is followed.
        drop: how many go, at most n - protect.
        protect: leading tokens (class token) that stay, and do not count as others.

    Returns:
        `[B, n - drop]` positions that stay, ascending.
    """
    redundancy = token_redundancy(x[:, protect:])
    stay = redundancy.topk(redundancy.shape[1] - drop, dim=1, largest=False, sorted=False).indices.sort(1).values + protect
    leading = torch.arange(protect, device=x.device).expand(len(x), -1)
    return torch.cat((leading, stay), 1)


@torch.no_grad()
def token_redundancy(x: Tensor) -> Tensor:
    """Mean cosine of each token to the others of its sample, `[B, n, D]` to `[B, n]`; linear in n."""
    unit = F.normalize(x, dim=-1)
    others = unit.sum(1, keepdim=True) - unit
    return (unit * others).sum(-1) / max(1, x.shape[1] - 1)
