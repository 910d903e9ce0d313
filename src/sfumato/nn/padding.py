"""Pictures of any size through networks that want a certain size, or that need more memory than there is.

`pad_to_multiple` mirrors the border until the sides divide; `tiled_apply` cuts a picture into overlapping tiles and keeps only
the middle of each, so that a network N whose output depends on at most `overlap` pixels to each side gives

    tiled_apply(N, x) = N(x)    exactly, seams included, with the memory of one tile.

Source: mirror padding and overlap-tile as in Ronneberger et al., "U-Net", MICCAI 2015, figure 2.

>>> import torch
>>> from sfumato.nn import pad_to_multiple, tiled_apply
>>> x = torch.rand(1, 3, 50, 70)
>>> padded, crop = pad_to_multiple(x, 16)
>>> padded.shape, torch.equal(padded[crop], x)
(torch.Size([1, 3, 64, 80]), True)
>>> blur = torch.nn.AvgPool2d(9, stride=1, padding=4)
>>> torch.allclose(tiled_apply(blur, x, tile=32, overlap=4), blur(x))
True
"""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadSetting

Crop = tuple[EllipsisType, slice, slice]


def reflect_pad(x: Tensor, pad: tuple[int, int, int, int]) -> Tensor:
    """Mirror the border (the edge pixel is not repeated), as often as it takes: any padding of any size.

    Args:
        x: `[..., H, W]`, H and W at least 1.
        pad: pixels (left, right, top, bottom), not negative.

    Returns:
        `[..., top + H + bottom, left + W + right]`.
    """
    left, right, top, bottom = pad
    h, w = x.shape[-2:]
    if x.ndim in (3, 4) and max(left, right) < w and max(top, bottom) < h:
        return F.pad(x, pad, mode="reflect")
    rows, columns = _mirrored(h, top, bottom, x.device), _mirrored(w, left, right, x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


def pad_to_multiple(x: Tensor, m: int, *, mode: str = "reflect") -> tuple[Tensor, Crop]:
    """Pad on the right and below until both sides are multiples of `m`.

    Args:
        x: `[B, C, H, W]`.
        m: both sides of the result are multiples of it.
        mode: "reflect" (any size), or another mode of `F.pad`.

    Returns:
        The padded pictures, and the index that undoes it: `padded[crop]` is `x`.
    """
    h, w = x.shape[-2:]
    pad = (0, -w % m, 0, -h % m)
    padded = reflect_pad(x, pad) if mode == "reflect" else F.pad(x, pad, mode=mode)
    return padded, (..., slice(0, h), slice(0, w))


def tiled_apply(net: Callable[[Tensor], Tensor], x: Tensor, *, tile: int = 512, overlap: int = 64, scale: int = 1) -> Tensor:
    """Apply a network tile by tile; equal to `net(x)` when its output sees at most `overlap` pixels to each side.

    Tiles begin at multiples of `tile - 2 overlap`, so that a network with strides sees the same phases when that is a multiple
    of its total stride (384 by default). A picture that fits into one tile is handed over whole.

    Args:
        net: `[B, C, h, w]` to `[B, C', scale h, scale w]`, for any h and w up to `tile`.
        x: `[B, C, H, W]`, H and W at least 1.
        tile: largest side of what the network sees, in input pixels.
        overlap: pixels that a tile sees beyond the part that is kept, on each inner side; less than half of `tile`.
        scale: output pixels per input pixel.

    Returns:
        `[B, C', scale H, scale W]`.

    Raises:
        BadSetting: `overlap` leaves nothing of a tile.
    """
    if not 0 <= 2 * overlap < tile:
        raise BadSetting(f"overlap={overlap} leaves nothing of tiles of {tile} pixels: make it less than {(tile + 1) // 2}")
    h, w = x.shape[-2:]
    if h <= tile and w <= tile:
        return net(x)
    out: Tensor | None = None
    for top, bottom, y0, y1 in _tiles(h, tile, overlap):
        for left, right, x0, x1 in _tiles(w, tile, overlap):
            y = net(x[..., y0:y1, x0:x1])
            if out is None:
                out = y.new_empty(*y.shape[:-2], h * scale, w * scale)
            kept = y[..., (top - y0) * scale : (bottom - y0) * scale, (left - x0) * scale : (right - x0) * scale]
            out[..., top * scale : bottom * scale, left * scale : right * scale] = kept
    assert out is not None
    return out


def _tiles(n: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """(kept from, kept to, read from, read to) along one side; what is kept covers it once."""
    if n <= tile:
        return [(0, n, 0, n)]
    step, tiles, start = tile - 2 * overlap, [], 0
    while start + tile < n:
        tiles.append((start + overlap if start else 0, start + tile - overlap, start, start + tile))
        start += step
    return [*tiles, (start + overlap, n, start, n)]


def _mirrored(n: int, before: int, after: int, device: torch.device) -> Tensor:
    """Which of n pixels each place of a mirrored line shows: a triangle wave."""
    at = torch.arange(-before, n + after, device=device).abs() % max(1, 2 * (n - 1))
    return torch.where(at < n, at, 2 * (n - 1) - at)
