"""From noise to pictures, with explicit noise and a callback that sees every step.

    DDIM:  x_p = sqrt(abar_p) x̂_0 + sqrt(1 - abar_p - s²) ε̂ + s z,    s² = eta² (1 - abar_p) / (1 - abar_t) (1 - abar_t / abar_p)
    EDM:   dx / dsigma = (x - D(x, sigma)) / sigma,    by Euler's or Heun's rule

eta = 0 is deterministic; eta = 1 over all times is DDPM's ancestral sampling. EDM's churn first lifts the noise from sigma to
(1 + gamma) sigma by fresh noise. All samplers are called alike; one whose samples are no numbers raises `Diverged`.

Sources: Ho, Jain, Abbeel 2020, algorithm 2; Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, equation 12;
Karras et al. 2022, algorithm 1.

>>> import torch
>>> from sfumato.diffusion import edm_sigmas, sample_heun
>>> at_zero = lambda x, sigma: x / (1 + sigma**2)  # the exact denoiser of a standard normal
>>> x = sample_heun(at_zero, torch.full((1, 1), 80.0, dtype=torch.float64), edm_sigmas(40))
>>> bool((x - 80 / (1 + 80**2) ** 0.5).abs() < 0.02)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.diffusion.finite import FiniteTrajectory
from sfumato.diffusion.predictions import convert
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadSetting

Model = Callable[[Tensor, Tensor], Tensor]


class SamplerStep(NamedTuple):
    """What a callback sees before each update."""

    step: int
    x_t: Tensor
    x0: Tensor
    sigma: Tensor


Callback = Callable[[SamplerStep], None]


def sample_ddpm(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    *,
    steps: int | None = None,
    predict: str = "eps",
    clip: bool = False,
    variance: str = "small",
    noise: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ancestral sampling over all times: `sample_ddim` with `eta=1`; see there."""
    return sample_ddim(
        model, x, schedule, steps=steps or len(schedule), eta=1.0, predict=predict,
        clip=clip, variance=variance, noise=noise, callback=callback, generator=generator,
    )  # fmt: skip


@torch.no_grad()
def sample_ddim(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    *,
    steps: int = 50,
    eta: float = 0.0,
    predict: str = "eps",
    clip: bool = False,
    variance: str = "small",
    direction: Model | None = None,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DDIM with leading spacing; the last step goes to the clean picture.

    Args:
        model: `model(x_t, t)` with t `[B]` int64.
        x: standard normal, `[B, ...]`: where to begin.
        schedule: the tables that the model was trained with.
        steps: network calls, 1 to T.
        eta: share of the ancestral noise, 0 (none) to 1.
        predict: what the model predicts.
        clip: clamp every x̂_0 to [-1, 1].
        variance: of the added noise, times eta²: "small" is the posterior's, "large" is 1 - abar_t / abar_p (DDPM's beta_t).
        direction: called after the model, with the same; its ε̂ takes the place of the model's in the update, beside the model's
            x̂_0 (asymmetric editing: Kwon, Jeong, Uh, "Diffusion Models Already Have a Semantic Latent Space", ICLR 2023).
        noise: `[steps, B, ...]`, the z of each step instead of drawing them.
        callback: told of every step before its update.
        generator: source of the draws.

    Returns:
        Like `x`.

    Raises:
        BadSetting: more steps than times, or none; an unknown variance.
        Diverged: the model's answer, or a sample, is not finite.
    """
    if variance not in ("small", "large"):
        raise BadSetting(f"there is no variance {variance!r}: use small (the posterior's) or large (beta_t)")
    times, watch = ddim_times(schedule, steps), FiniteTrajectory(x, steps)
    for i, t in enumerate(times):
        here = torch.full((len(x),), t, device=x.device)
        x0, eps = _guesses(watch(i, model(x, here)), x, t, schedule, predict, clip)
        if direction is not None:
            eps = _guesses(direction(x, here), x, t, schedule, predict, clip)[1]
        if callback is not None:
            callback(SamplerStep(i, x, x0, schedule.sigma[t]))
        following = times[i + 1] if i + 1 < steps else None
        mean, small = ddim_mean(x0, eps, t, following, schedule, eta=eta)
        if eta and following is not None:
            var = small if variance == "small" else eta**2 * (1 - schedule.abar[t] / schedule.abar[following])
            mean = mean + var.sqrt().to(x.dtype) * draw_step(x, noise, i, generator)
        x = mean
    return watch.end(x)


def ddim_times(schedule: Schedule, steps: int) -> list[int]:
    """The times of DDIM's network calls, noisiest first, by leading spacing: (steps - 1) T // steps, ..., T // steps, 0.

    Raises:
        BadSetting: more steps than times, or none.
    """
    if not 1 <= steps <= len(schedule):
        raise BadSetting(f"steps={steps} is not between 1 and the schedule's {len(schedule)}")
    stride = len(schedule) // steps
    return [stride * i for i in reversed(range(steps))]


def ddim_mean(
    x0: Tensor, eps: Tensor, t: int, following: int | None, schedule: Schedule, *, eta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Where one step of DDIM leads before noise is added.

    Args:
        x0, eps: what the network guesses at time `t`, `[B, ...]`.
        t: where the step begins.
        following: the time that it leads to; None: the clean picture.
        schedule: the tables.
        eta: share of the ancestral noise, 0 (none) to 1.

    Returns:
        The mean like `x0`, and the posterior's variance times eta², a float64 scalar.
    """
    before = schedule.abar.new_ones(()) if following is None else schedule.abar[following]
    var = eta**2 * (1 - schedule.abar[t] / before) * (1 - before) / (1 - schedule.abar[t])
    return before.sqrt().to(x0.dtype) * x0 + (1 - before - var).clamp(min=0).sqrt().to(x0.dtype) * eps, var


def _guesses(out: Tensor, x: Tensor, t: int, schedule: Schedule, predict: str, clip: bool) -> tuple[Tensor, Tensor]:
    """x̂_0 and ε̂ from what the network gave."""
    x0 = convert(out, x, t, schedule, source=predict, target="x0")
    if clip:
        x0 = x0.clamp(-1, 1)
        return x0, convert(x0, x, t, schedule, source="x0", target="eps")
    return x0, convert(out, x, t, schedule, source=predict, target="eps")


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    *,
    steps: int | None = None,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Euler's rule on the probability flow, one network call a step; arguments as `sample_heun`."""
    return _integrate(model, x, sigmas, steps, churn, churn_range, churn_noise, noise, callback, generator, heun=False)


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    *,
    steps: int | None = None,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Heun's rule on the probability flow (second order), two network calls a step but one in the last.

    Args:
        model: D, called as `model(x, sigma)` with a scalar sigma; gives the clean picture.
        x: `[B, ...]`, noise of standard deviation `sigmas[0]`.
        sigmas: `[n + 1]`, falling, ends with 0 (see `edm_sigmas`, and `Schedule.levels`).
        steps: how many of the n steps to take; None: all.
        churn: noise that is added again on the way (S_churn); 0: deterministic. Karras et al. use 40 for ImageNet,
            with `churn_range=(0.05, 50)` and `churn_noise=1.003`.
        churn_range: smallest and largest level at which noise is added (S_min, S_max).
        churn_noise: standard deviation of the added noise, in units of what the level asks for (S_noise).
        noise: `[n, B, ...]`, the added noise of each step instead of drawing it.
        callback: told of every step before its update.
        generator: source of the draws.

    Returns:
        Like `x`.

    Raises:
        BadSetting: levels that rise, or of no noise before the last.
        Diverged: the model's answer, or a sample, is not finite.
    """
    return _integrate(model, x, sigmas, steps, churn, churn_range, churn_noise, noise, callback, generator, heun=True)


@torch.no_grad()
def _integrate(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    steps: int | None,
    churn: float,
    churn_range: tuple[float, float],
    churn_noise: float,
    noise: Tensor | None,
    callback: Callback | None,
    generator: torch.Generator | None,
    *,
    heun: bool,
) -> Tensor:
    n = len(sigmas) - 1
    if n < 1 or (sigmas.diff() > 0).any() or (sigmas[:-1] <= 0).any() or sigmas[-1] < 0:
        raise BadSetting("the noise levels must fall, from one above 0 to 0 at the end, as those of edm_sigmas do")
    levels, sigmas = sigmas.tolist(), sigmas.to(x)
    taken = n if steps is None else min(steps, n)
    watch = FiniteTrajectory(x, taken)
    for i in range(taken):
        sigma, following = sigmas[i], sigmas[i + 1]
        if churn and churn_range[0] <= levels[i] <= churn_range[1]:
            raised = sigma * (1 + min(churn / n, 2**0.5 - 1))
            x = x + (raised.square() - sigma.square()).sqrt() * churn_noise * draw_step(x, noise, i, generator)
            sigma = raised
        x0 = watch(i, model(x, sigma))
        if callback is not None:
            callback(SamplerStep(i, x, x0, sigma))
        slope = (x - x0) / sigma
        moved = x + (following - sigma) * slope
        if heun and i < n - 1:
            slope = (slope + (moved - model(moved, following)) / following) / 2
            moved = x + (following - sigma) * slope
        x = moved
    return watch.end(x)


def draw_step(x: Tensor, noise: Tensor | None, i: int, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers like `x`: `noise[i]`, or drawn where there is none."""
    if noise is not None:
        return noise[i].to(x)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
