"""Powers of covariance matrices: roots, inverses, inverse roots.

    C = U diag(l) Uᵀ,      C^p = U diag(l^p) Uᵀ,      with 0 where l is 0, for negative p too (the pseudo-inverse)

Source: textbook; the eigenvalues of what is singular come out as noise around 0, which is cut off as in `torch.linalg.pinv`.

>>> import torch
>>> from sfumato.nn import psd_power
>>> root = psd_power(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
>>> (root @ root).round(decimals=5)
tensor([[2., 1.],
        [1., 2.]])
>>> psd_power(torch.diag(torch.tensor([4.0, 0.0])), power=-0.5)
tensor([[0.5000, 0.0000],
        [0.0000, 0.0000]])
"""

from __future__ import annotations

import torch
from torch import Tensor


def psd_power(c: Tensor, *, power: float = 0.5, eps: float = 0.0) -> Tensor:
    """A power of symmetric positive semi-definite matrices.

    Args:
        c: `[..., d, d]`; the lower triangle is read.
        power: any real.
        eps: eigenvalues at most this count as 0, as do those lost in rounding (d times the machine's epsilon times the largest).

    Returns:
        Like `c`, computed in float64. Its gradient is finite where no two eigenvalues are equal.
    """
    values, vectors = torch.linalg.eigh(c.double())
    noise = c.shape[-1] * torch.finfo(c.dtype).eps * values[..., -1:].detach()
    live = values > noise.clamp(min=eps)
    powers = torch.where(live, torch.where(live, values, 1.0) ** power, 0.0)
    return ((vectors * powers[..., None, :]) @ vectors.mT).to(c.dtype)
