"""Which times, or noise levels, a training batch is made at.

    t ~ U{0, ..., T - 1}    or    ln(sigma) ~ N(m, s²)

Sources: Ho, Jain, Abbeel 2020, algorithm 1; Karras et al. 2022, table 1.

>>> import torch
>>> from sfumato.diffusion import lognormal_sigma, uniform_t
>>> uniform_t(3, 1000, generator=torch.Generator().manual_seed(0)).shape
torch.Size([3])
>>> bool((lognormal_sigma(5) > 0).all())
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadSetting


def uniform_t(batch: int, T: int, *, generator: torch.Generator | None = None) -> Tensor:
    """`[batch]` int64, uniform on 0 to T - 1, on the generator's device."""
    return range_t(batch, 0, T, generator=generator)


def range_t(batch: int, low: int, high: int, *, generator: torch.Generator | None = None) -> Tensor:
    """`[batch]` int64, uniform on low to high - 1, on the generator's device.

    Raises:
        BadSetting: an empty range.
    """
    if low >= high:
        raise BadSetting(f"low={low} and high={high} hold no time: high must be larger")
    device = generator.device if generator is not None else None
    return torch.randint(low, high, (batch,), generator=generator, device=device)


def lognormal_sigma(batch: int, *, mean: float = -1.2, std: float = 1.2, generator: torch.Generator | None = None) -> Tensor:
    """`[batch]` noise levels whose logarithm is normal with this mean and deviation, on the generator's device."""
    device = generator.device if generator is not None else None
    return (mean + std * torch.randn(batch, generator=generator, device=device)).exp()
