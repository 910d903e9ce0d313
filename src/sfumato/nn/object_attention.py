"""Attention between the objects of a frame, for all frames of a batch at once.

    x' = LN(x + MHA(x)),   out = LN(x + FFN(x')):  the second sum adds x, not x'

Source: Panariello et al. 2024, "Monocular Per-Object Distance Estimation with Masked Object Modeling", arXiv 2401.03191.

>>> import torch
>>> from sfumato.nn import ObjectSetAttention
>>> ObjectSetAttention(16)(torch.rand(3, 16), torch.tensor([0, 0, 1])).shape  # two objects in the first frame, one in the second
torch.Size([3, 16])
"""

from __future__ import annotations

from torch import Tensor, nn


class ObjectSetAttention(nn.Module):
    """The objects of a frame look at each other, under a mask that keeps frames apart: nothing is padded.

    Args:
        dim: width.
        heads: attention heads.
    """

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, frame: Tensor) -> Tensor:
        """`[N, dim]` and the number of each object's frame `[N]`, to `[N, dim]`."""
        if not len(x):
            return x
        apart = frame[:, None] != frame[None]
        attended, _ = self.attention(x[None], x[None], x[None], attn_mask=apart, need_weights=False)
        out: Tensor = self.norm2(x + self.feed(self.norm(x + attended[0])))
        return out
