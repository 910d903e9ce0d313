"""How much noise there is at each time, and the closed forms that follow.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    abar_t = prod_{s <= t} (1 - beta_s),    sigma_t = sqrt(1 / abar_t - 1)

Time 0 is the least noisy; before it, abar = 1. Tables are float64 and are cast where they are used.

Sources: Ho, Jain, Abbeel 2020 (linear); Nichol, Dhariwal 2021 (cosine); Rombach et al. 2022 (scaled linear); Karras, Aittala,
Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, equation 5 (`edm_sigmas`).

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule, edm_sigmas
>>> schedule = Schedule(beta_schedule("linear"))
>>> x_t = schedule.q_sample(torch.zeros(2, 1, 4, 4), torch.tensor([0, 999]), torch.ones(2, 1, 4, 4))
>>> [round(v, 4) for v in x_t[:, 0, 0, 0].tolist()]
[0.01, 1.0]
>>> edm_sigmas(2)
tensor([8.0000e+01, 2.0000e-03, 0.0000e+00], dtype=torch.float64)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from sfumato.errors import BadSetting

_RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (0.0, 0.999)}


def beta_schedule(kind: str = "linear", T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> Tensor:
    """Variance added at each of T times.

    Args:
        kind: "linear", "scaled_linear" (linear in the square root) or "cosine".
        T: number of times.
        beta_start: first value; None: the customary one. Not used by cosine.
        beta_end: last value; for cosine the largest allowed.

    Returns:
        `[T]`, float64, in [0, 1).

    Raises:
        BadSetting: an unknown kind.
    """
    if kind not in _RANGES:
        raise BadSetting(f"there is no schedule {kind!r}: use {', '.join(_RANGES)}")
    low, high = _RANGES[kind]
    low, high = (low if beta_start is None else beta_start), (high if beta_end is None else beta_end)
    if kind == "linear":
        return torch.linspace(low, high, T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(low**0.5, high**0.5, T, dtype=torch.float64).square()
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=high)


def edm_sigmas(n: int, *, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels from `high` to `low`, dense where it is quiet, then 0.

    Args:
        n: number of positive levels, at least 1.
        low, high: smallest and largest level.
        rho: bend; 1 is linear.

    Returns:
        `[n + 1]`, float64, falling.
    """
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def expand(table: Tensor, t: Tensor | int, x: Tensor) -> Tensor:
    """`table[t]` with the type and device of `x`, shaped to multiply it; t may be a number or one a sample."""
    if not isinstance(t, Tensor):
        return table[t].to(x.dtype)  # a number on the CPU multiplies on any device, without a copy that waits for it
    value = table.to(x.dtype).to(x.device, non_blocking=True)[t]
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value


class Schedule:
    """The tables of a variance-preserving diffusion.

    Args:
        betas: `[T]`, each in [0, 1).

    Attributes:
        abar: `[T]`, share of the signal's power that is left.
        abar_prev: `[T]`, the same one time earlier (1 before time 0).
        sqrt_abar: `[T]`, factor of the signal.
        sqrt_1m_abar: `[T]`, standard deviation of the noise.
        sigma: `[T]`, noise over signal: the level at which x_t / sqrt(abar_t) has unit signal.
        snr: `[T]`, signal over noise in power.
        posterior_var: `[T]`, variance of q(x_{t-1} | x_t, x_0); 0 at time 0.

    Raises:
        BadSetting: values outside [0, 1).
    """

    def __init__(self, betas: Tensor) -> None:
        if betas.ndim != 1 or not ((betas >= 0) & (betas < 1)).all():
            raise BadSetting("betas must be a vector of numbers in [0, 1)")
        self.betas = betas.double()
        self.abar = torch.cumprod(1 - self.betas, 0)
        self.abar_prev = torch.cat([self.abar.new_ones(1), self.abar[:-1]])
        self.sqrt_abar, self.sqrt_1m_abar = self.abar.sqrt(), (1 - self.abar).sqrt()
        self.sigma = (1 / self.abar - 1).sqrt()
        self.snr = self.abar / (1 - self.abar)
        self.posterior_var = self.betas * (1 - self.abar_prev) / (1 - self.abar)

    def __len__(self) -> int:
        return len(self.betas)

    def levels(self, n: int) -> Tensor:
        """`[n + 1]` noise levels for `sample_euler` and `sample_heun`: `edm_sigmas`, each at the nearest in the table, then 0.

        A network that was trained at these times is asked for nothing between them; where many levels lie closer than the times
        do, at the quiet end, some repeat.
        """
        low, high = (self.sigma[i].clamp(0.002, 80.0).item() for i in (0, -1))
        wanted = edm_sigmas(n, low=low, high=high)[:-1]
        near = (wanted[:, None] - self.sigma).abs().argmin(1)
        return torch.cat([self.sigma[near], self.sigma.new_zeros(1)])

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor, *, abar: Tensor | None = None) -> Tensor:
        """x_t from x_0.

        Args:
            x0: `[B, ...]`.
            t: `[B]` int64, or one time for all.
            noise: standard normal, like `x0`.
            abar: `[B]`, signal power to use instead of the table's (continuous time).

        Returns:
            Like `x0`.
        """
        if abar is None:
            return expand(self.sqrt_abar, t, x0) * x0 + expand(self.sqrt_1m_abar, t, x0) * noise
        signal, level = (v.to(x0).reshape(-1, *[1] * (x0.ndim - 1)) for v in (abar.sqrt(), (1 - abar).sqrt()))
        return signal * x0 + level * noise

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x_0).

        Args:
            x0, x_t: `[B, ...]`.
            t: `[B]` int64, or one time for all.

        Returns:
            The mean like `x0`, the variance broadcastable to it.
        """
        first = self.betas * self.abar_prev.sqrt() / (1 - self.abar)
        second = (1 - self.betas).sqrt() * (1 - self.abar_prev) / (1 - self.abar)
        mean = expand(first, t, x0) * x0 + expand(second, t, x0) * x_t
        return mean, expand(self.posterior_var, t, x0)

    @classmethod
    def from_sigmas(cls, sigmas: Tensor) -> Self:
        """The tables whose `sigma`, noise over signal, is `sigmas` `[T]`: positive and not falling.

        Raises:
            BadSetting: levels that fall, or are not positive.
        """
        levels = sigmas.double()
        if levels.ndim != 1 or not (levels > 0).all() or (levels.diff() < 0).any():
            raise BadSetting("the noise levels of a schedule must be a vector of positive numbers that do not fall")
        power = levels.square()
        before = torch.cat([power.new_zeros(1), power[:-1]])
        return cls((power - before) / (1 + power))  # 1 - abar_t / abar_{t-1}

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> Self:
        """The tables of a diffusers scheduler (anything with `.betas`)."""
        return cls(scheduler.betas.double())

    def to_ddim(self, **settings: Any) -> Any:
        """A diffusers DDIMScheduler with these betas; by default without clipping."""
        from diffusers import DDIMScheduler

        return DDIMScheduler(len(self), trained_betas=self.betas.tolist(), **{"clip_sample": False, **settings})
