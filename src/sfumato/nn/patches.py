"""Cut images into patches and put them together again; both ways are exact inverses.

    tokens:       patches[b, i·w + j, (a·p + c)·C + ch] = x[b, ch, i·p + a, j·p + c]       order "hwc", MAE's
    overlapping:  x = fold(window · patches) / fold(window)                                stride 1

Sources: He et al. 2021 (official `patchify`); overlapping patches: Adrai et al. 2023, "Deep Optimal Transport".

>>> import torch
>>> from sfumato.nn import fold_patches, patchify, unfold_patches, unpatchify
>>> x = torch.rand(2, 3, 8, 12)
>>> tokens = patchify(x, 4)
>>> tokens.shape, torch.equal(unpatchify(tokens, 4, (2, 3), 3), x)
(torch.Size([2, 6, 48]), True)
>>> windows = unfold_patches(x, 3)
>>> windows.shape, torch.allclose(fold_patches(windows, (8, 12)), x)
(torch.Size([2, 60, 3, 3, 3]), True)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.masks.random_masks import Grid, grid_shape


def patchify(x: Tensor, p: int, *, order: str = "hwc") -> Tensor:
    """Cut images into square patches, one row of numbers each, in raster order.

    Args:
        x: `[B, C, H, W]`, H and W multiples of `p`.
        p: side of a patch in pixels.
        order: "hwc" (channel last: MAE, SparK) or "chw" (channel first: the weights of a convolution).

    Returns:
        `[B, L, p * p * C]`, L = (H / p) * (W / p).

    Raises:
        BadData: the patches do not fill the image.
    """
    batch, channels, height, width = x.shape
    if height % p or width % p:
        raise BadData(f"an image of {height} x {width} pixels cannot be cut into patches of {p}: both must be multiples of it")
    cells = x.reshape(batch, channels, height // p, p, width // p, p)
    cells = cells.permute(0, 2, 4, 3, 5, 1) if _channel_last(order) else cells.permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(t: Tensor, p: int, grid: Grid, channels: int, *, order: str = "hwc") -> Tensor:
    """Put patches back: the exact inverse of `patchify`.

    Args:
        t: `[B, L, p * p * C]`.
        p: side of a patch in pixels.
        grid: patches along each side, rows x columns = L.
        channels: C.
        order: as for `patchify`.

    Returns:
        `[B, C, rows * p, columns * p]`.

    Raises:
        BadData: the numbers do not fit the grid.
    """
    rows, columns = grid_shape(grid)
    if t.shape[1:] != (rows * columns, p * p * channels):
        wanted = f"[B, {rows * columns}, {p * p * channels}]"
        raise BadData(f"patches of shape {list(t.shape)} do not fit: a grid of {rows} x {columns} takes {wanted}")
    if _channel_last(order):
        cells = t.reshape(-1, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    else:
        cells = t.reshape(-1, rows, columns, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(-1, channels, rows * p, columns * p)


def unfold_patches(x: Tensor, k: int, *, pad: bool = False) -> Tensor:
    """All overlapping windows, one for each position of their corner.

    Args:
        x: `[B, C, H, W]`.
        k: side of a window in pixels, at most H and W; odd when padding.
        pad: repeat the border, so that every pixel is the centre of a window.

    Returns:
        `[B, N, C, k, k]` in raster order; N = (H - k + 1) * (W - k + 1), or H * W when padded. `flatten(2)` gives rows in the
        order of `torch.nn.functional.unfold`.

    Raises:
        BadSetting: an even window with padding.
        BadData: the window is larger than the image.
    """
    if pad:
        if k % 2 == 0:
            raise BadSetting(f"a window of {k} pixels has no centre: padding needs an odd one")
        x = F.pad(x, [k // 2] * 4, mode="replicate")
    if k > min(x.shape[-2:]):
        raise BadData(f"windows of {k} pixels do not fit into an image of {x.shape[-2]} x {x.shape[-1]}")
    windows = x.unfold(2, k, 1).unfold(3, k, 1)  # [B, C, rows, columns, k, k]
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def fold_patches(p: Tensor, size: tuple[int, int], *, window: Tensor | None = None) -> Tensor:
    """Overlapping windows averaged into an image: the exact inverse of `unfold_patches`, padded or not.

    `fold(window · p) / fold(window)`: constants stay constant, up to the border.

    Args:
        p: `[B, N, C, k, k]` with N as from `unfold_patches`.
        size: `(H, W)` of the image.
        window: `[k, k]` weights, not negative; None: flat.

    Returns:
        `[B, C, H, W]`.

    Raises:
        BadData: N fits neither a padded nor an unpadded image of this size.
    """
    height, width = size
    count, k = p.shape[1], p.shape[3]
    padding = {(height - k + 1) * (width - k + 1): 0, height * width: k // 2}.get(count)
    if padding is None:
        raise BadData(f"{count} windows of {k} pixels do not come from an image of {height} x {width}")
    weight = (p.new_ones(k, k) if window is None else window.to(p)).expand(1, 1, k, k)
    columns = (p * weight).flatten(2).transpose(1, 2)  # [B, C k k, N]
    total = F.fold(columns, size, k, padding=padding)
    shares = F.fold(weight.reshape(1, k * k, 1).expand(-1, -1, count), size, k, padding=padding)
    return total / shares


def _channel_last(order: str) -> bool:
    if order not in ("hwc", "chw"):
        raise BadSetting(f"order {order!r} is not known: hwc (channel last) or chw (channel first)")
    return order == "hwc"
