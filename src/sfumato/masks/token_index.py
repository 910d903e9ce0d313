"""From a mask to positions and back: which tokens to keep, where they return to, which pixels they cover.

    order = visible positions, then hidden ones, each in raster order;   order[ids_restore] = 0 ... L-1

A decoder appends mask tokens to the visible ones and takes the rows `ids_restore`: every token is back in its place.

Source: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", section 3 (simple implementation).

>>> import torch
>>> from sfumato.masks import take_tokens, to_ids, upsample_mask
>>> hidden = torch.tensor([[True, False, True, False]])
>>> ids_keep, ids_restore = to_ids(hidden)
>>> ids_keep.tolist(), ids_restore.tolist()
([[1, 3]], [[2, 0, 3, 1]])
>>> tokens = torch.tensor([[[10.0], [11.0], [12.0], [13.0]]])
>>> take_tokens(tokens, ids_keep).flatten().tolist()
[11.0, 13.0]
>>> upsample_mask(hidden, (2, 2), 8).shape
torch.Size([1, 1, 16, 16])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData
from sfumato.masks.random_masks import Grid, grid_shape


def to_ids(mask: Tensor, *, n_keep: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions of the visible tokens, and of every token among (visible, then hidden).

    Linear in the number of tokens: ranks are counted, nothing is sorted.

    Args:
        mask: `[B, L]` bool, True = hidden; every row hides equally many.
        n_keep: number of visible tokens where it is known: nothing is checked, and an accelerator is not waited for.

    Returns:
        `ids_keep` `[B, n]` in raster order, and `ids_restore` `[B, L]`: `cat(visible, hidden)` taken at it is in raster order.

    Raises:
        BadData: rows hide unlike numbers of tokens.
    """
    rank = (~mask).cumsum(1)
    if n_keep is None:
        fewest, n_keep = torch.stack(rank[:, -1].aminmax()).tolist()
        if fewest != n_keep:
            raise BadData(f"rows of the mask hide unlike numbers of tokens: {fewest} to {n_keep} of {mask.shape[1]} are visible")
    restore = torch.where(mask, n_keep + mask.cumsum(1), rank) - 1
    raster = torch.arange(mask.shape[1], device=mask.device).expand_as(restore)
    return torch.empty_like(restore).scatter_(1, restore, raster)[:, :n_keep], restore


def take_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows of each sample's tokens: `out[b, k] = tokens[b, ids[b, k]]`.

    One lookup of whole rows: on a CPU up to twice as fast, forward and backward, as `torch.gather` with an expanded index.

    Args:
        tokens: `[B, L, D]`.
        ids: `[B, n]` long, 0 to L - 1.

    Returns:
        `[B, n, D]`.
    """
    batch, length, dim = tokens.shape
    first = torch.arange(0, batch * length, length, device=ids.device)[:, None]
    return F.embedding(ids + first, tokens.reshape(batch * length, dim))


def as_views(x: Tensor, mask: Tensor) -> Tensor:
    """What is known of B images, repeated for each view of them.

    Args:
        x: `[B, ...]`, such as images or targets; with V B rows it is given back.
        mask: `[V B, ...]`, all first views first.

    Returns:
        `[V B, ...]`.
    """
    views = len(mask) // len(x)
    return x if views == 1 else torch.cat([x] * views)  # keeps the memory format, unlike repeat


def upsample_mask(mask: Tensor, grid: Grid, patch: int) -> Tensor:
    """The pixels that hidden tokens cover.

    Args:
        mask: `[B, L]`, any type.
        grid: tokens along each side.
        patch: side of a token in pixels.

    Returns:
        `[B, 1, H, W]` of the same type, H = rows x patch.
    """
    rows, columns = grid_shape(grid)
    cells = mask.reshape(-1, 1, rows, 1, columns, 1).expand(-1, -1, -1, patch, -1, patch)
    return cells.reshape(-1, 1, rows * patch, columns * patch)
