"""How far apart two sets are, each seen as one Gaussian: the Fréchet distance, the number in "FID".

    W2² = |m_1 - m_2|² + tr(C_1 + C_2 - 2 (C_1^½ C_2 C_1^½)^½)

It is SQUARED, as in FID. In the features of a small classifier it serves where Inception's weights are not at hand (FID itself:
torchmetrics); on patches of pictures it compares their texture.

Sources: Dowson, Landau, "The Fréchet distance between multivariate normal distributions", 1982; Heusel et al., "GANs Trained by a
Two Time-Scale Update Rule", NeurIPS 2017 (FID).

>>> import torch
>>> from sfumato.metrics import GaussianStats, frechet_distance, frechet_features
>>> eye = torch.eye(2)
>>> frechet_distance(torch.zeros(2), eye, torch.tensor([3.0, 0.0]), 4 * eye)  # 9 + 2 (2 - 1)²
tensor(11.)
>>> a = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
>>> stats = GaussianStats()
>>> for part in a.split(100):
...     stats.update(part)
>>> stats.compute().n, round(frechet_features(a, a + 1).item(), 4)
(1000, 2.0)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from sfumato.errors import BadData
from sfumato.nn.patches import unfold_patches
from sfumato.nn.psd_sqrt import psd_power

_PATCHES = 1 << 16  # patches taken at once: 75 numbers each in float64 are 40 MB


class Moments(NamedTuple):
    """Mean `[D]` and covariance `[D, D]` (unbiased) in float64, of n rows."""

    mean: Tensor
    cov: Tensor
    n: int


class GaussianStats:
    """Mean and covariance of rows that come a batch at a time.

    Sums are kept, in float64 and on the rows' device: `merge` joins what several processes or files have seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.outer: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in rows `[N, D]` (or `[N, ...]`, flattened)."""
        rows = x.reshape(len(x), -1).double()
        self._add(len(rows), rows.sum(0), rows.T @ rows)

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        if other.total is not None and other.outer is not None:
            self._add(other.count, other.total, other.outer)

    def compute(self) -> Moments:
        """The moments of all rows so far.

        Raises:
            BadData: fewer than two rows.
        """
        if self.count < 2 or self.total is None or self.outer is None:
            raise BadData(f"a covariance needs two rows or more, {self.count} came")
        mean = self.total / self.count
        cov = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Moments(mean, cov, self.count)

    def _add(self, count: int, total: Tensor, outer: Tensor) -> None:
        if self.total is None or self.outer is None:
            self.total, self.outer = total.clone(), outer.clone()
        elif len(total) != len(self.total):
            raise BadData(f"rows of {len(total)} numbers after rows of {len(self.total)}: one covariance takes one length")
        else:
            self.total, self.outer = self.total + total.to(self.total), self.outer + outer.to(self.outer)
        self.count += count


class PatchGaussian(GaussianStats):
    """Mean and covariance of all overlapping patches of pictures, without padding.

    Args:
        patch: side in pixels. A patch is a row of C * patch * patch numbers, channel first, as `torch.nn.functional.unfold` has
            it.
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def update(self, x: Tensor) -> None:
        """Take in pictures `[B, C, H, W]`.

        Raises:
            BadData: a patch is larger than the pictures.
        """
        height, width = x.shape[-2:]
        strip = max(1, _PATCHES // width)  # of one picture
        for some in x.split(max(1, strip // height)):
            for top in range(0, max(1, height - self.patch + 1), strip):
                windows = unfold_patches(some[:, :, top : top + strip + self.patch - 1], self.patch)
                super().update(windows.flatten(2).flatten(0, 1))


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance of two Gaussians.

    Args:
        mu1, mu2: `[..., D]`.
        cov1, cov2: `[..., D, D]`, symmetric positive semi-definite, possibly singular.

    Returns:
        `[...]`, at least 0, like `mu1`; computed in float64.
    """
    cov1, cov2 = cov1.double(), cov2.double()
    spread = cov1.diagonal(dim1=-2, dim2=-1).sum(-1) + cov2.diagonal(dim1=-2, dim2=-1).sum(-1)
    # tr (C1^½ C2 C1^½)^½ is the sum of the singular values of C1^½ C2^½: no root of an already rounded product
    shared = torch.linalg.matrix_norm(psd_power(cov1) @ psd_power(cov2), "nuc")
    shift = (mu1.double() - mu2.double()).square().sum(-1)
    return (shift + (spread - 2 * shared).clamp(min=0)).to(mu1.dtype)


def frechet_features(a: Tensor, b: Tensor) -> Tensor:
    """`frechet_distance` between the Gaussians of two sets of features.

    Args:
        a: `[N, D]`, N at least 2.
        b: `[M, D]`.

    Returns:
        A scalar like `a`. Compare values of equal N and M only: it grows as sets get smaller.

    Raises:
        BadData: fewer than two rows, or rows of different lengths.
    """
    if a.shape[1:] != b.shape[1:]:
        raise BadData(f"features of shapes {list(a.shape[1:])} and {list(b.shape[1:])} cannot be compared")
    first, second = GaussianStats(), GaussianStats()
    first.update(a)
    second.update(b)
    return frechet_distance(*first.compute()[:2], *second.compute()[:2]).to(a.dtype)
