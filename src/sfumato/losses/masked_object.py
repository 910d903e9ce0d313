"""Errors of objects' pixels where cells of theirs were hidden, with weights that leave out what shows nothing.

    loss = Σ_i w_i Σ_cells hidden · mean_pixels (x̂ - x)² / Σ_i w_i Σ_cells hidden,     w = 0 for dark and for small objects

Source: Panariello et al. 2024, "Monocular Per-Object Distance Estimation with Masked Object Modeling", arXiv 2401.03191.

>>> import torch
>>> from sfumato.losses import masked_object_mse, object_cells
>>> crops, hidden = torch.rand(2, 3, 8, 8), torch.rand(2, 16) < 0.5
>>> cells = object_cells(crops, 4)
>>> cells.shape, masked_object_mse(cells, crops, hidden, 4).item()
(torch.Size([2, 16, 12]), 0.0)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadData
from sfumato.losses.frequency import focal_frequency_loss
from sfumato.losses.masked import masked_mean, normalize_patches
from sfumato.masks.random_masks import Grid, grid_shape
from sfumato.masks.token_index import take_tokens, to_ids


def object_cells(crops: Tensor, grid: Grid) -> Tensor:
    """Crops cut into the cells that tokens stand for: `[N, C, h, w]` to `[N, L, C · h/rows · w/columns]`, channel first.

    Raises:
        BadData: the cells do not fill the crops.
    """
    (rows, columns), (count, channels, height, width) = grid_shape(grid), crops.shape
    if height % rows or width % columns:
        raise BadData(f"crops of {height} x {width} pixels cannot be cut into {rows} x {columns} cells: both must be multiples")
    cells = crops.reshape(count, channels, rows, height // rows, columns, width // columns).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(count, rows * columns, channels * (height // rows) * (width // columns))


def object_pixels(cells: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """The inverse of `object_cells`: `[N, L, P]` to `[N, C, *size]`."""
    (rows, columns), channels = grid_shape(grid), cells[0].numel() // (size[0] * size[1])
    parts = cells.reshape(len(cells), rows, columns, channels, size[0] // rows, size[1] // columns).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(len(cells), channels, *size)


def masked_object_mse(
    pred: Tensor, crops: Tensor, hidden: Tensor, grid: Grid, *, weights: Tensor | None = None, norm_pix: bool = False
) -> Tensor:
    """Mean squared error per pixel of the hidden cells, objects weighted.

    Args:
        pred: `[N, L, P]`, pixels of every cell, channel first.
        crops: `[N, C, h, w]`, clean.
        hidden: `[N, L]` bool, True = counted.
        grid: cells along each side.
        weights: `[N]`, not negative; None: equal.
        norm_pix: compare with each cell's pixels at mean 0 and (unbiased) variance 1.

    Returns:
        A scalar; 0 where nothing counts.
    """
    target = object_cells(crops, grid)
    if norm_pix:
        target = normalize_patches(target)
    return masked_mean((pred - target).square().mean(-1), hidden, weight=None if weights is None else weights[:, None])


def masked_object_focal(
    pred: Tensor, crops: Tensor, hidden: Tensor, grid: Grid, *, weights: Tensor | None = None, norm_pix: bool = False
) -> Tensor:
    """Focal frequency loss of the hidden cells, objects weighted: an object's cells are the rows of one plane, as officially.

    The focal weight is divided by the batch's maximum, so that micro-batches do not add up exactly.

    Args:
        pred: as for `masked_object_mse`.
        crops: likewise.
        hidden: `[N, L]` bool, equally many in each row.
        grid: cells along each side.
        weights: `[N]`, not negative; None: equal.
        norm_pix: as for `masked_object_mse`.

    Returns:
        A scalar; 0 where nothing counts.

    Raises:
        BadData: rows hide unlike numbers of cells.
    """
    target = object_cells(crops, grid)
    if norm_pix:
        target = normalize_patches(target)
    ids, _ = to_ids(~hidden)
    if not ids.numel():
        return 0 * pred.sum()
    planes = (take_tokens(cells, ids)[:, None] for cells in (pred, target))
    error = focal_frequency_loss(*planes, batch_max=True, reduction="none").flatten(1).mean(1)
    return masked_mean(error, torch.ones_like(error, dtype=torch.bool), weight=weights)


def object_weights(
    crops: Tensor,
    rows: Tensor,
    *,
    min_brightness: float = 1e-2,
    min_box: float = 25.0,
    weight_dark: float = 0.0,
    weight_small: float = 0.0,
) -> Tensor:
    """What each object counts in the loss.

    Args:
        crops: `[N, C, h, w]` in [0, 1].
        rows: `[N, 5]`, see `sfumato.nn.box_rows`.
        min_brightness: mean over pixels of the largest channel below which an object is dark.
        min_box: width or height below which it is small, pixels.
        weight_dark: of dark objects.
        weight_small: of small ones.

    Returns:
        `[N]`: 1, or the weight (for both: the product); 0 for boxes of less than a pixel.
    """
    dark = crops.amax(1).mean((1, 2)) < min_brightness
    side = (rows[:, 3:] - rows[:, 1:3]).amin(1)
    weights = torch.where(dark, weight_dark, 1.0) * torch.where(side < min_box, weight_small, 1.0)
    return torch.where(side < 1, 0.0, weights).to(crops)
