"""Phases of a picture as samples of a batch, and random sub-sampling of cells.

`space_to_batch` deals every s x s cell out to s² small pictures: phase (i, j) of sample b becomes sample `(i s + j) B + b`,

    y[(i s + j) B + b, c, u, v] = x[b, c, s u + i, s v + j].

All channels of a pixel stay together, unlike in `F.pixel_unshuffle`, which makes phases channels. Spatially correlated noise is
nearly white in the small pictures. `subsample` keeps one random pixel of every cell instead, the same one in all channels.

Sources: TensorFlow's `space_to_batch`; random sub-sampling as in Huang et al., "Neighbor2Neighbor", CVPR 2021, and Jang et al.,
"Self-supervised Image Denoising with Downsampled Invariance Loss and Conditional Blind-Spot Network", ICCV 2023, section 3.

>>> import torch
>>> from sfumato.nn import batch_to_space, random_subsample_index, space_to_batch, subsample
>>> x = torch.arange(16.0).view(1, 1, 4, 4)
>>> space_to_batch(x, 2)[1, 0]
tensor([[ 1.,  3.],
        [ 9., 11.]])
>>> torch.equal(batch_to_space(space_to_batch(x, 2), 2), x)
True
>>> subsample(x, random_subsample_index(1, (4, 4), 2), 2).shape
torch.Size([1, 1, 2, 2])
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadSetting


def space_to_batch(x: Tensor, s: int) -> Tensor:
    """The s² phases of every picture as pictures of their own.

    Args:
        x: `[B, C, H, W]`, sides divisible by `s`.
        s: stride of the phases.

    Returns:
        `[s² B, C, H/s, W/s]`; phase (i, j) of sample b at `(i s + j) B + b`.

    Raises:
        BadSetting: a side is not divisible by `s`.
    """
    b, c, h, w = x.shape
    _check_divisible(h, w, s)
    cells = x.reshape(b, c, h // s, s, w // s, s)
    return cells.permute(3, 5, 0, 1, 2, 4).reshape(s * s * b, c, h // s, w // s)


def batch_to_space(x: Tensor, s: int) -> Tensor:
    """The inverse of `space_to_batch`.

    Args:
        x: `[s² B, C, h, w]`.
        s: stride of the phases.

    Returns:
        `[B, C, s h, s w]`.

    Raises:
        BadSetting: the batch is not a multiple of s².
    """
    n, c, h, w = x.shape
    if s < 1 or n % (s * s):
        raise BadSetting(f"{n} pictures are not whole sets of {s} x {s} phases")
    phases = x.reshape(s, s, n // (s * s), c, h, w)
    return phases.permute(2, 3, 4, 0, 5, 1).reshape(n // (s * s), c, s * h, s * w)


def random_subsample_index(
    batch: int,
    size: tuple[int, int],
    s: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """For every s x s cell, which of its pixels to keep: uniform and independent.

    Args:
        batch: number of pictures.
        size: `(H, W)` in pixels, divisible by `s`.
        s: side of a cell.
        device: of the result; None: the generator's, else the CPU.
        generator: source of the draws.

    Returns:
        Long `[batch, H/s, W/s]` in [0, s²): `s · row + column` in the cell.

    Raises:
        BadSetting: a side is not divisible by `s`.
    """
    h, w = size
    _check_divisible(h, w, s)
    if device is None and generator is not None:
        device = generator.device
    return torch.randint(s * s, (batch, h // s, w // s), generator=generator, device=device)


def subsample(x: Tensor, index: Tensor, s: int) -> Tensor:
    """Keep one pixel of every s x s cell, the same one in all channels.

    Args:
        x: `[B, C, H, W]`, sides divisible by `s`.
        index: `[B, H/s, W/s]`, long, `s · row + column` in the cell (`random_subsample_index`).
        s: side of a cell.

    Returns:
        `[B, C, H/s, W/s]`.

    Raises:
        BadSetting: a side is not divisible by `s`.
    """
    b, c, h, w = x.shape
    _check_divisible(h, w, s)
    row = torch.arange(h // s, device=x.device)[:, None] * s + index // s
    column = torch.arange(w // s, device=x.device) * s + index % s
    flat = (row * w + column).flatten(1)[:, None].expand(b, c, -1)
    return x.flatten(2).gather(2, flat).view(b, c, h // s, w // s)


def _check_divisible(h: int, w: int, s: int) -> None:
    if s < 1 or h % s or w % s:
        raise BadSetting(f"pictures of {h} x {w} pixels have no whole cells of {s} x {s}: pad them (`pad_to_multiple`)")
