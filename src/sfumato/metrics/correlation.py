"""How alike pictures are: correlation of every one with every other, and with the nearest of a set.

    corr(a, b) = <a - ā, b - b̄> / (|a - ā| |b - b̄|)

Two samplers that agree draw pairs that correlate near 1; samples that correlate near 1 with a training picture are copies.

Source: the measurements of Kadkhodaie, Guth, Simoncelli, Mallat, ICLR 2024, figure 2 and appendix.

>>> import torch
>>> from sfumato.metrics import closest_correlation, correlation
>>> a = torch.rand(3, 1, 8, 8)
>>> torch.allclose(correlation(a, 2 * a + 1).diagonal(), torch.ones(3)), bool((closest_correlation(a, a) > 0.999).all())
(True, True)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData

SMALLEST = 1e-12
"""Length below which a picture counts as blank: it correlates with nothing."""


def correlation(a: Tensor, b: Tensor, *, centre: bool = True) -> Tensor:
    """Correlation of all pictures of `a` with all of `b`.

    Args:
        a: `[N, ...]`.
        b: `[M, ...]`, with as many numbers a picture.
        centre: take each picture's mean off first; False: the cosine.

    Returns:
        `[N, M]` from -1 to 1; 0 for a blank picture.

    Raises:
        BadData: pictures of other sizes.
    """
    if a[:1].numel() != b[:1].numel():
        raise BadData(f"pictures of {list(a.shape[1:])} and {list(b.shape[1:])} cannot be compared: bring them to one size")
    return _unit(a.flatten(1), centre) @ _unit(b.flatten(1), centre).T


def closest_correlation(a: Tensor, b: Tensor, *, patch: int | None = None, centre: bool = True, chunk: int = 4096) -> Tensor:
    """The largest correlation of each picture with any picture of a set.

    Args:
        a: `[N, C, H, W]`.
        b: `[M, C, H, W]`, the set, M at least 1.
        patch: compare patches of this side in pixels instead, side by side and each with those at the same place; what is left
            over at the right and below is not looked at.
        centre: take means off first.
        chunk: pictures of the set worked on at once.

    Returns:
        `[N]`, or of patches `[N, P]`.

    Raises:
        BadData: pictures of other sizes, an empty set, or patches that are larger than the pictures.
    """
    if a.shape[1:] != b.shape[1:] or not len(b):
        raise BadData(f"{list(a.shape)} and {list(b.shape)} cannot be compared: give pictures of one size, and at least one")
    if patch is not None and not 1 <= patch <= min(a.shape[-2:]):
        raise BadData(f"patches of {patch} pixels do not fit into pictures of {tuple(a.shape[-2:])}")

    def rows(x: Tensor) -> Tensor:
        """`[P, N, d]`."""
        parts = x.flatten(1)[None] if patch is None else F.unfold(x, patch, stride=patch).permute(2, 0, 1)
        return _unit(parts, centre)

    mine = rows(a)
    best = torch.stack([(mine @ rows(part).mT).amax(2) for part in b.split(chunk)]).amax(0).T
    return best[:, 0] if patch is None else best


def distinct(x: Tensor, *, size: int = 20, threshold: float = 0.95, chunk: int = 1024) -> Tensor:
    """Which pictures have no near double before them, so that disjoint halves of the rest share none.

    Args:
        x: `[N, C, H, W]`.
        size: side to which they are reduced first, where they are larger.
        threshold: correlation, of either sign, above which two are doubles.
        chunk: pictures compared at once.

    Returns:
        `[N]` bool.
    """
    small = F.interpolate(x, (size, size), mode="area") if min(x.shape[-2:]) > size else x
    rows = _unit(small.flatten(1), centre=True)
    doubled = [
        (part @ rows[: i * chunk + len(part)].T).abs().tril(i * chunk - 1).gt(threshold).any(1)
        for i, part in enumerate(rows.split(chunk))
    ]
    return ~torch.cat(doubled)


def _unit(rows: Tensor, centre: bool) -> Tensor:
    rows = rows - rows.mean(-1, keepdim=True) if centre else rows
    length = rows.norm(dim=-1, keepdim=True)
    return torch.where(length > SMALLEST, rows / length.clamp_min(SMALLEST), 0.0)
