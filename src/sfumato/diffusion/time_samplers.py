"""Which times, or noise levels, a training batch is made at.

    t ~ U{0, ..., T - 1},    ln(sigma) ~ N(m, s²),    sqrt(sigma) ~ U(sqrt(low), sqrt(high)),    gamma ~ U(gamma_t, gamma_{t-1})

Sources: Ho, Jain, Abbeel 2020, algorithm 1; Karras et al. 2022, table 1; Kadkhodaie, Guth, Simoncelli, Mallat,
"Generalization in diffusion models arises from geometry-adaptive harmonic representations", ICLR 2024 (square root); Chen et
al., "WaveGrad", ICLR 2021, algorithm 1, and Saharia et al., "Image Super-Resolution via Iterative Refinement", 2021 (gamma).

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


def sqrt_uniform_sigma(
    batch: int, *, low: float = 0.0, high: float = 1.0, u: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Noise levels whose square root is uniform: many quiet ones.

    Args:
        batch: how many.
        low, high: smallest and largest level.
        u: `[batch]`, uniform on [0, 1), instead of drawing it.
        generator: source of the draws; the result is on its device.

    Returns:
        `[batch]`, from `low` to `high`.

    Raises:
        BadSetting: not `0 <= low <= high`.
    """
    if not 0 <= low <= high:
        raise BadSetting(f"low={low} and high={high} hold no noise level: use 0 <= low <= high")
    if u is None:
        u = torch.rand(batch, generator=generator, device=generator.device if generator is not None else None)
    return (low**0.5 + u * (high**0.5 - low**0.5)).square()


def interpolated_gamma(gammas: Tensor, t: Tensor, *, u: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Signal power between two neighbouring times, for networks that are told the power instead of the time.

    Use it as `schedule.q_sample(x0, t, noise, abar=gamma)`.

    Args:
        gammas: `[T]`, falling: a `Schedule`'s `abar`.
        t: `[B]` int64, 0 to T - 1; before time 0 the power is 1.
        u: `[B]`, uniform on [0, 1), instead of drawing it.
        generator: source of the draws, on the device of `t`.

    Returns:
        `[B]` like `gammas`, on the device of `t`: `gamma_{t-1} + u (gamma_t - gamma_{t-1})`.
    """
    gammas = gammas.to(t.device)
    if u is None:
        u = torch.rand(t.shape, generator=generator, device=t.device, dtype=gammas.dtype)
    before = torch.cat([gammas.new_ones(1), gammas[:-1]])
    return torch.lerp(before[t], gammas[t], u.to(gammas))
