"""Are two sets of samples from one distribution? Four answers that need no trained network.

    MMD² = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) - 2 mean k(a_i, b_j)          0 on average for equal distributions
    SW   = sqrt(mean over directions u of W2²(u·a, u·b))                                 sorted projections
    precision = share of a inside the k-neighbour balls of b;  recall = share of b inside those of a

All go over the rows in blocks, so that no N x M matrix is ever whole.

Sources: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 3; Rabin et al., "Wasserstein Barycenter and its
Application to Texture Mixing", 2011; Kynkäänniemi et al., "Improved Precision and Recall Metric", NeurIPS 2019.

>>> import torch
>>> from sfumato.metrics import mmd2, precision_recall, sliced_wasserstein
>>> g = torch.Generator().manual_seed(0)
>>> data, narrow = torch.randn(500, 2, generator=g), 0.3 * torch.randn(500, 2, generator=g)
>>> bool(mmd2(narrow, data) > 0.05), bool(sliced_wasserstein(narrow, data, generator=g) > 0.5)
(True, True)
>>> precision, recall = precision_recall(narrow, data)  # all of it is plausible, most is missing
>>> bool(precision > 0.95), bool(recall < 0.5)
(True, True)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData
from sfumato.losses.gram import gaussian_gram, median_bandwidth, squared_distances


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: how much of the samples is plausible, how much of the reference is covered."""

    precision: Tensor
    recall: Tensor


def mmd2(a: Tensor, b: Tensor, *, sigma: float | Tensor | None = None, chunk: int = 2048) -> Tensor:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel.

    Args:
        a: samples `[N, D]`, N at least 2.
        b: reference `[M, D]`.
        sigma: width of the kernel; None: `median_bandwidth` of both sets together.
        chunk: rows at a time.

    Returns:
        A scalar, of mean 0 for equal distributions, so possibly negative; differentiable.

    Raises:
        BadData: fewer than two rows, or rows of different lengths.
    """
    _check(a, b, 1)
    if sigma is None:
        sigma = median_bandwidth(torch.cat([a, b])).clamp(min=1e-12)

    def total(x: Tensor, y: Tensor) -> Tensor:
        sums = [gaussian_gram(rows, y, sigma=sigma).sum(dtype=torch.float64) for rows in x.split(chunk)]
        return torch.stack(sums).sum()

    n, m = len(a), len(b)
    within = (total(a, a) - n) / (n * (n - 1)) + (total(b, b) - m) / (m * (m - 1))
    return (within - 2 * total(a, b) / (n * m)).to(a.dtype)


def sliced_wasserstein(
    a: Tensor,
    b: Tensor,
    *,
    projections: int = 256,
    directions: Tensor | None = None,
    chunk: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sliced Wasserstein-2 distance; exact along each direction, for sets of different sizes too.

    Args:
        a: samples `[N, D]`.
        b: reference `[M, D]`.
        projections: number of random directions.
        directions: `[P, D]` unit vectors to use instead of drawing them.
        chunk: directions at a time.
        generator: source of the draws.

    Returns:
        A scalar, the root of the mean squared distance, in units of the data; differentiable.

    Raises:
        BadData: empty sets, or rows of different lengths.
    """
    _check(a, b, 0)
    if directions is None:
        device = generator.device if generator is not None else a.device
        drawn = torch.randn(projections, a.shape[1], generator=generator, device=device, dtype=a.dtype)
        directions = torch.nn.functional.normalize(drawn, dim=1)
    n, m = len(a), len(b)
    # where either of the two quantile functions steps, in units of 1 / (n m)
    ends = torch.cat([torch.arange(1, n + 1, device=a.device) * m, torch.arange(1, m + 1, device=a.device) * n]).unique()
    width = torch.diff(ends, prepend=ends.new_zeros(1)).to(a.dtype) / (n * m)
    of_a, of_b = (ends - 1) // m, (ends - 1) // n
    squares = []
    for part in directions.to(a).split(chunk):
        gap = (a @ part.T).sort(0).values[of_a] - (b @ part.T).sort(0).values[of_b]
        squares.append(width @ gap.square())
    return torch.cat(squares).mean().sqrt()


@torch.no_grad()
def precision_recall(a: Tensor, b: Tensor, *, k: int = 3, chunk: int = 2048) -> PrecisionRecall:
    """Share of samples that look like the reference, and share of the reference that the samples reach.

    The support of a set is the union of balls around its members, each out to its k-th neighbour.

    Args:
        a: samples `[N, D]`, more than k.
        b: reference `[M, D]`, more than k; customarily M = N.
        k: which neighbour, 3 to 5.
        chunk: rows at a time.

    Returns:
        Two scalars in [0, 1].

    Raises:
        BadData: no more than k rows, or rows of different lengths.
    """
    _check(a, b, k)
    a, b = a.double(), b.double()
    return PrecisionRecall(_share_inside(a, b, k, chunk), _share_inside(b, a, k, chunk))


def _share_inside(x: Tensor, support: Tensor, k: int, chunk: int) -> Tensor:
    # k + 1: every row is its own nearest
    radius = torch.cat([squared_distances(rows, support).kthvalue(k + 1, 1).values for rows in support.split(chunk)])
    inside = torch.cat([(squared_distances(rows, support) <= radius).any(1) for rows in x.split(chunk)])
    return inside.double().mean()


def _check(a: Tensor, b: Tensor, more_than: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise BadData(f"two sets must be [N, D] and [M, D], not {list(a.shape)} and {list(b.shape)}")
    if min(len(a), len(b)) <= more_than:
        raise BadData(f"sets of {len(a)} and {len(b)} rows: each needs more than {more_than}")
