"""Principal components of samples that come in batches, in the memory of a few dozen of them.

    A = [R; X - x̄; sqrt(n m / (n + m)) (x̄ - μ)],    A Aᵀ = W Λ Wᵀ,    R ← W_rᵀ A

The rows of R are singular values times right vectors of what was seen, so only an (r + m) × (r + m) matrix is decomposed,
however long a sample is. With n - 1 <= r the result is exact; else small components are lost as they come.

Sources: Ross, Lim, Lin, Yang, "Incremental Learning for Robust Visual Tracking", IJCV 2008; the Gram matrix: Sirovich 1987.

>>> import torch
>>> from sfumato.probes import StreamingPCA
>>> x = torch.randn(60, 5, dtype=torch.float64)
>>> pca = StreamingPCA((5,), keep=5, dtype=torch.float64)
>>> for batch in x.split(20):
...     pca.update(batch)
>>> vectors, variances = pca.components(2)
>>> torch.allclose(variances, torch.linalg.eigvalsh(x.T.cov()).flip(0)[:2])
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting


class StreamingPCA(nn.Module):
    """Mean and principal components, one batch after another; the whole state is in `state_dict()`.

    Args:
        shape: of a sample.
        keep: rows of R (r), at most as many components can be asked for; a few times as many keep them accurate.
        apart: leave entries along the first dimension of a sample apart: one analysis for each of them.
        dtype: of the state.

    Attributes:
        count: samples seen.
        mean: of the samples, flat.
        rows: R, `[groups, keep, length]`; the unused ones are 0.

    Raises:
        BadSetting: nothing to keep.
    """

    count: Tensor
    mean: Tensor
    rows: Tensor

    def __init__(self, shape: Sequence[int], *, keep: int = 100, apart: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if keep < 1:
            raise BadSetting(f"keep={keep} must be 1 or more")
        self.shape = tuple(shape)
        groups = self.shape[0] if apart else 1
        length = math.prod(self.shape) // groups
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(groups, length, dtype=dtype))
        self.register_buffer("rows", torch.zeros(groups, min(keep, length), length, dtype=dtype))

    @torch.no_grad()
    def update(self, samples: Tensor) -> None:
        """See a batch.

        Args:
            samples: `[m, *shape]`.

        Raises:
            BadData: samples of another shape, or none.
        """
        if samples.shape[1:] != self.shape or not len(samples):
            raise BadData(f"samples are [m, {', '.join(map(str, self.shape))}], not {list(samples.shape)}")
        groups, keep, length = self.rows.shape
        x = samples.detach().to(self.rows).reshape(-1, groups, length).transpose(0, 1)
        n, m = self.count.to(x), len(samples)
        centre = x.mean(1)
        shift = (n * m / (n + m)).sqrt() * (centre - self.mean)
        used = self.rows[:, : min(keep, int(self.count))]  # zero rows would only disturb the solver
        a = torch.cat([used, x - centre[:, None], shift[:, None]], 1)
        most = min(keep, a.shape[1])
        wide = a.shape[1] <= length  # of the two squares the smaller
        square = a @ a.mT if wide else a.mT @ a
        precise = square if a.device.type == "mps" else square.double()
        values, vectors = (part[..., -most:].flip(-1).to(a) for part in torch.linalg.eigh(precise))  # the largest come last
        self.rows[:, :most] = vectors.mT @ a if wide else (vectors * values.clamp_min(0).sqrt()[..., None, :]).mT
        self.mean += (centre - self.mean) * (m / (n + m))
        self.count += m

    def components(self, k: int) -> tuple[Tensor, Tensor]:
        """The first components, the largest first.

        Args:
            k: how many.

        Returns:
            Unit vectors `[k, *shape]` and their variances (unbiased) `[k]`; apart: unit for each entry, and `[k, groups]`. The
            first number of each vector that is not 0 is positive.

        Raises:
            BadSetting: more than `keep`, or than samples less one can tell.
        """
        limit = min(self.rows.shape[1], int(self.count) - 1)
        if not 1 <= k <= limit:
            raise BadSetting(f"k={k}: {int(self.count)} samples of this length give 1 to {max(0, limit)} components")
        rows = self.rows[:, :k]
        norms = rows.norm(dim=-1)
        unit = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)[..., None]
        first = unit.gather(-1, (unit != 0).int().argmax(-1, keepdim=True))
        unit = unit * torch.where(first < 0, -1, 1)
        variances = norms.square() / (self.count - 1)
        apart = unit.shape[0] > 1
        return unit.transpose(0, 1).reshape(k, *self.shape), variances.T if apart else variances[0]
