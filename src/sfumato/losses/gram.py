"""Distances and Gaussian kernels between the rows of two sets.

    d²_ij = |a_i - b_j|²,      k_ij = exp(-d²_ij / (2 sigma²))

The rows of a are independent of each other: large sets are taken a block of rows at a time.

Source: the median heuristic, Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, section 8.

>>> import torch
>>> from sfumato.losses import gaussian_gram, median_bandwidth
>>> a = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 5.0]])
>>> median_bandwidth(a)
tensor(5.)
>>> gaussian_gram(a, sigma=5.0)[0]
tensor([1.0000, 0.6065, 0.6065])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData, BadSetting


def squared_distances(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances between all rows, by one matrix product.

    Args:
        a: `[N, ...]`, flattened to rows; `[N]` is N numbers.
        b: `[M, ...]`; None: `a`.

    Returns:
        `[N, M]`, not negative, at least float32 (under autocast, too). The rounding error is that of the squared norms, counted
        from the mean of `b`.

    Raises:
        BadData: rows of different lengths.
    """
    with torch.autocast(a.device.type, enabled=False):
        a = _rows(a)
        b = a if b is None else _rows(b)
        if a.shape[1] != b.shape[1]:
            raise BadData(f"rows of {a.shape[1]} and of {b.shape[1]} numbers have no distance")
        centre = b.detach().mean(0)
        a, b = a - centre, b - centre
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return squares.clamp(min=0)


def gaussian_gram(a: Tensor, b: Tensor | None = None, *, sigma: float | Tensor = 1.0, log: bool = False) -> Tensor:
    """Gaussian kernel between all rows; 1 at distance 0, no normalising factor.

    Args:
        a: `[N, ...]`, flattened to rows; `[N]` is N numbers.
        b: `[M, ...]`; None: `a`.
        sigma: width, positive, in units of the distance.
        log: the logarithm instead, for sums far from everything (`logsumexp`).

    Returns:
        `[N, M]`, at least float32.

    Raises:
        BadSetting: a width that is not positive.
        BadData: rows of different lengths.
    """
    if not isinstance(sigma, Tensor) and not sigma > 0:
        raise BadSetting(f"sigma={sigma}: the width of a kernel must be positive")
    exponent = squared_distances(a, b) / (-2 * sigma**2)
    return exponent if log else exponent.exp()


@torch.no_grad()
def median_bandwidth(a: Tensor, *, rows: int = 2000) -> Tensor:
    """The median distance between two rows, a width for `gaussian_gram`.

    Args:
        a: `[N, ...]`, N at least 2.
        rows: of a larger set only this many rows, evenly spaced, are looked at.

    Returns:
        A scalar without gradient; the lower of two medians.

    Raises:
        BadData: fewer than two rows.
    """
    if len(a) < 2:
        raise BadData(f"a median distance needs two rows, here is {len(a)}")
    a = _rows(a)
    if len(a) > rows:
        a = a[torch.linspace(0, len(a) - 1, rows, device=a.device).long()]
    return F.pdist(a).median()


def _rows(a: Tensor) -> Tensor:
    a = a.reshape(len(a), -1)
    return a if a.dtype == torch.float64 else a.float()
