"""Pictures from a denoiser that is never told the noise level: a stochastic climb towards what it thinks is clean.

    d = y - D(y),   s = |d| / sqrt(n),   y <- y - h_t d + gamma_t z,   h_t = h0 t / (1 + h0 (t - 1)),
    gamma_t² = s² ((1 - beta h_t)² - (1 - h_t)²)

until s, the noise that the denoiser itself sees, is at most sigma_end; then D(y). With beta = 1 nothing is added. Measurements
m = A x with orthonormal rows turn it into a solver: inside their span the step goes to the measurement, outside it to D(y).

Source: Kadkhodaie, Simoncelli, "Stochastic Solutions for Linear Inverse Problems using the Prior Implicit in a Denoiser",
NeurIPS 2021, algorithms 1 and 2.

>>> import torch
>>> from sfumato.diffusion import sample_blind
>>> wiener = lambda y: y / (1 + (y.square().mean(1, keepdim=True) - 1).clamp(min=0))  # shrinks towards unit power
>>> x = sample_blind(wiener, 3 * torch.randn(2, 500, generator=torch.Generator().manual_seed(0)), beta=0.5, sigma_max=3.0)
>>> x.square().mean(1).round()
tensor([1., 1.])
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.finite import FiniteTrajectory
from sfumato.diffusion.samplers import Callback, SamplerStep, draw_step
from sfumato.errors import BadSetting


@torch.no_grad()
def sample_blind(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    steps: int = 1000,
    h0: float = 0.01,
    beta: float = 0.01,
    sigma_end: float = 0.01,
    sigma_max: float = 2.0,
    physics: Any = None,
    measured: Tensor | None = None,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample from the prior inside a blind denoiser, freely or given a measurement.

    Every sample goes its own way and rests where it has stopped; all of them take the network calls of the slowest.

    Args:
        model: D, called as `model(y)`; gives the clean picture (for a network r of the noise: `lambda y: y - r(y)`).
        x: `[B, ...]`, where to begin: the data's mean plus noise of deviation 1, say.
        steps: most network calls before the last one.
        h0: first step size, above 0 to 1; later ones grow towards 1.
        beta: 0 to 1, share of the step that reduces noise; the rest is injected again. 1: deterministic.
        sigma_end: a sample stops once its noise is at most this.
        sigma_max: a sample stops, diverged, once its noise is larger than this; a warning says how many.
        physics: linear, with `.A` and `.A_adjoint`, such as deepinv's, and `A A^T = I`; None: unconditional.
        measured: the measurement, like `physics.A(x)`.
        noise: `[steps, B, ...]`, the z of each step instead of drawing them.
        callback: told of every step before its update; `sigma` is `[B]`.
        generator: source of the draws.

    Returns:
        Like `x`: D at the end.

    Raises:
        BadSetting: h0 or beta out of range, or only one of physics and measurement.
        Diverged: the model's answer is not finite.
    """
    if not 0 < h0 <= 1 or not 0 <= beta <= 1:
        raise BadSetting(f"blind sampling needs h0 in (0, 1] and beta in [0, 1], not h0={h0} and beta={beta}")
    if (physics is None) != (measured is None):
        raise BadSetting("a measurement needs its physics, and the physics its measurement: give both, or none")
    ones = [1] * (x.ndim - 1)
    moving = torch.ones(len(x), *ones, dtype=torch.bool, device=x.device)
    lost = ~moving
    watch = FiniteTrajectory(x, steps)
    for i in range(steps):
        x0 = watch(i, model(x))
        d = x - x0
        if physics is not None:
            d = d + physics.A_adjoint(physics.A(x0) - measured)
        sigma = d.flatten(1).square().mean(1).sqrt().reshape(-1, *ones)
        if callback is not None:
            callback(SamplerStep(i, x, x0, sigma.flatten()))
        h = h0 * (i + 1) / (1 + h0 * i)
        change = -h * d
        if beta < 1:
            z = draw_step(x, noise, i, generator)
            change = change + sigma * ((1 - beta * h) ** 2 - (1 - h) ** 2) ** 0.5 * z
        x = torch.where(moving, x + change, x)
        lost |= sigma > sigma_max
        moving &= (sigma > sigma_end) & ~lost
        if not moving.any():
            break
    if lost.any():
        warnings.warn(
            f"{int(lost.sum())} of {len(x)} samples diverged, their noise grew beyond sigma_max={sigma_max:g}: take a smaller h0,"
            " or a denoiser trained at more noise",
            stacklevel=2,
        )
    return watch.end(model(x))
