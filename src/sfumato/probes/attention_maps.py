"""What attention maps tell: how far a head looks, and whether its queries look at different places at all.

    distance of a head = mean over queries i of Σ_j A_ij ‖position_i − position_j‖
    NMI of a head = I(q; k) / √(H(q) H(k)),   p(q, k) = A_qk / n:   0: every query attends alike (collapse), 1: each its own key

Maps come from `sfumato.nn.capture_qkv`, for any timm ViT:

>>> import timm, torch
>>> from sfumato.nn import capture_qkv
>>> from sfumato.probes import attention_distance, attention_nmi
>>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
>>> with torch.no_grad(), capture_qkv(vit, [2]) as seen:
...     _ = vit(torch.rand(2, 3, 64, 64))
>>> maps = seen[2].attention()  # 3 heads, the class token and 4 x 4 patches
>>> attention_distance(maps, grid=4, patch=16).shape, attention_nmi(maps).shape
(torch.Size([2, 3]), torch.Size([2, 3]))

Sources: mean attention distance, Dosovitskiy et al. 2020 (ViT), figure 7; normalised mutual information, Park et al., "What Do
Self-Supervised Vision Transformers Learn?", ICLR 2023, section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.errors import BadData
from sfumato.masks.random_masks import Grid, grid_shape


def attention_distance(a: Tensor, grid: Grid, patch: float) -> Tensor:
    """The mean distance of what a head attends to from where it asks.

    Args:
        a: `[..., n, n]`, rows sum to 1: n patch tokens in raster order. Leading tokens beyond the grid (class, registers) have no
            place: their rows and columns are left out, and what is left of a row is brought to sum 1.
        grid: patch tokens along each side.
        patch: side of a patch, in pixels; the unit of the result.

    Returns:
        `[...]`, such as `[B, heads]`, not negative.

    Raises:
        BadData: fewer tokens than the grid has, or maps that are not square.
    """
    rows, columns = grid_shape(grid)
    n, prefix = rows * columns, a.shape[-1] - rows * columns
    if a.shape[-1] != a.shape[-2] or prefix < 0:
        raise BadData(f"attention of {a.shape[-2]} x {a.shape[-1]} tokens does not fit a grid of {rows} x {columns} patches")
    if prefix:
        a = a[..., prefix:, prefix:]
        a = a / a.sum(-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    row, column = (torch.arange(side, device=a.device, dtype=a.dtype) for side in (rows, columns))
    positions = torch.cartesian_prod(row, column).view(n, 2)
    return (a * torch.cdist(positions, positions)).sum((-2, -1)) * (patch / n)


def attention_nmi(a: Tensor) -> Tensor:
    """Normalised mutual information of query and key, for each head (an average over heads would hide how they differ).

    Args:
        a: `[..., n, m]`, rows sum to 1: n queries, m keys.

    Returns:
        `[...]`, such as `[B, heads]`, from 0 (all queries attend alike) to 1; 0 for a single query or key.
    """
    n = a.shape[-2]
    keys = a.mean(-2)
    conditional = -torch.xlogy(a, a).sum(-1).mean(-1)
    entropy = -torch.xlogy(keys, keys).sum(-1)
    scale = (entropy * math.log(n)).clamp(min=0).sqrt()
    told = (entropy - conditional).clamp(min=0)
    return torch.where(scale > 0, told / scale, 0.0)
