"""Several masks of one image that hide other places each: together they cover more of it, and none hides more than before.

    view 1:      n = L - floor(L (1 - ratio)) tokens
    view 2:      floor(min(predict - ratio, ratio) L) of those that view 1 left visible, the other ones among those it hid
    view k > 2:  as many as no view has hidden yet, up to floor(predict L) in all, the other ones among those already hidden

Each view is uniformly random by itself and hides as many tokens as `random_mask`. At a ratio of one half or more, two such views
hide every token once; two independent ones hide 1 - (1 - ratio)² of them.

Sources: "Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling" 2022, arXiv 2301.00230, with more than
two views added here; partition of the pixels: Zavrtanik, Kristan, Skočaj 2021, "Reconstruction by inpainting for visual anomaly
detection" (RIAD).

>>> import torch
>>> from sfumato.masks import disjoint_masks, grid_partition
>>> hidden = disjoint_masks(1, (14, 14), 0.6, generator=torch.Generator().manual_seed(0))
>>> hidden.shape, hidden.sum(-1).flatten().tolist(), hidden.any(0).all().item()
(torch.Size([2, 1, 196]), [118, 118], True)
>>> grid_partition(64, 3, 8, generator=torch.Generator().manual_seed(0)).sum(0).unique()
tensor([1])
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadSetting
from sfumato.masks.random_masks import Grid, count_hidden, grid_shape, mask_from_scores, uniform
from sfumato.masks.token_index import upsample_mask


def disjoint_masks(
    batch: int,
    grid: Grid,
    ratio: float,
    *,
    views: int = 2,
    predict: float = 1.0,
    unit: int = 1,
    noise: Tensor | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks of several views of each sample whose hidden sets overlap as little as `predict` allows.

    Args:
        batch: number of samples.
        grid: tokens along each side, a multiple of `unit`.
        ratio: hidden share of a view, 0 to 1.
        views: masks of a sample; ceil(predict / ratio) of them reach the share `predict`.
        predict: share of the tokens that some view hides, `ratio` to 1; `ratio`: all views hide the same tokens.
        unit: side of what is hidden as a whole, in tokens; counts are of units.
        noise: `[views, B, units]`; given, nothing is drawn: of the tokens that a view may hide, those with the largest are taken.
        device: of the masks; None: the generator's.
        generator: source of the noise.

    Returns:
        `[views, B, L]` bool, True = hidden; every row hides equally many.

    Raises:
        BadSetting: units do not fill the grid, no view, or shares that contradict each other.

    Reference:
        arXiv 2301.00230, disjoint masking. The official code orders the second view alike for a whole batch; here each sample
        is drawn by itself.
    """
    rows, columns = grid_shape(grid)
    if unit < 1 or rows % unit or columns % unit:
        raise BadSetting(f"units of {unit} tokens do not fill a grid of {rows} x {columns}: take a divisor of both")
    units = (rows // unit, columns // unit)
    length = units[0] * units[1]
    new = _newly_hidden(length, ratio, predict, views)
    if noise is None:
        noise = uniform((views, batch, length), device=device, generator=generator)
    covered = torch.zeros_like(noise[0], dtype=torch.bool)
    masks: list[Tensor] = []
    for scores, count in zip(noise, new, strict=True):
        fresh = mask_from_scores(scores.masked_fill(covered, -torch.inf), n_hidden=count)
        again = mask_from_scores(scores.masked_fill(~covered, -torch.inf), n_hidden=new[0] - count)
        masks.append(fresh | again)
        covered = covered | fresh
    return upsample_mask(torch.cat(masks), units, unit).view(views, -1, rows * columns)


def _newly_hidden(length: int, ratio: float, predict: float, views: int) -> list[int]:
    """How many tokens each view is the first to hide."""
    if views < 1 or not ratio <= predict <= 1:
        raise BadSetting(f"views={views}, ratio={ratio}, predict={predict}: take at least one view, and ratio <= predict <= 1")
    n = count_hidden(length, ratio)
    new = [n]
    for view in range(1, views):
        if view == 1:
            count = int(min(predict - ratio, ratio) * length)
        else:
            count = min(n, max(0, int(predict * length) - sum(new)))
        new.append(count)
    return new


def grid_partition(
    size: Grid,
    parts: int,
    cell: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks that hide square cells of an image; each pixel is hidden in exactly one.

    Args:
        size: side of the image in pixels, or (height, width); cells at the far borders are cut where they do not fit.
        parts: number of masks; they hide equally many cells, up to one.
        cell: side of a cell in pixels.
        device: of the masks; None: the generator's.
        generator: source of the draw.

    Returns:
        `[parts, 1, H, W]` bool, True = hidden.

    Raises:
        BadSetting: more parts than cells, or sizes below 1.

    Reference:
        Zavrtanik et al. 2021, section 3.1.
    """
    height, width = grid_shape(size)
    if cell < 1:
        raise BadSetting(f"cell={cell}: a cell has at least 1 pixel along a side")
    rows, columns = -(-height // cell), -(-width // cell)
    if not 1 <= parts <= rows * columns:
        raise BadSetting(f"{rows * columns} cells of {cell} pixels cannot be shared by {parts} masks: take 1 to {rows * columns}")
    part = uniform((rows * columns,), device=device, generator=generator).argsort() % parts
    masks = part == torch.arange(parts, device=part.device)[:, None]
    return upsample_mask(masks, (rows, columns), cell)[..., :height, :width]
