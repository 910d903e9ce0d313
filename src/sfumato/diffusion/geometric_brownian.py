"""Diffusion by geometric Brownian motion: noise that multiplies, for numbers that keep their sign.

    dX = μ X dt + σ X dW,    x_k = x_0 exp((μ - σ²/2) τ_k + σ √τ_k z),    τ_k = k / N,  z ~ N(0, I)

From any x_0 it reaches a log-normal law. What is learned is the Stein score s = ∇ log p(x_k); what is used is x s, the Hyvärinen
score, which for a known x_0 is -1 - (log x_k - log x_0 - (μ - σ²/2) τ) / (σ² τ). The reverse equation is solved in two ways:

    DLS:  x <- x exp(δ σ² x s - δ (μ - 3σ²/2) + a √δ σ z)            on log x: no step can change a sign
    UMS:  x <- x (1 + δ σ² x s - δ (μ - 2σ²) + a √δ σ z)             on x: long steps can

DLS is exponentiated gradient with noise. Time 0 is clean.

Source: Nishanth Shetty, Madhava Prasath, Chandra Sekhar Seelamantula, "Dale meets Langevin: A Multiplicative Denoising Diffusion
Model", 2025 (arXiv 2510.02730).

>>> import torch
>>> from sfumato.diffusion import GBMSchedule, sample_gbm
>>> schedule = GBMSchedule(100)
>>> ones = lambda x, k: (-1 - x.log() / schedule.std[k.clamp(min=1)].view(-1, 1).float() ** 2) / x  # x_0 is 1 everywhere
>>> x = sample_gbm(ones, 500, schedule, shape=(2,), start=schedule.start(0.0, 0.0), generator=torch.Generator().manual_seed(0))
>>> bool((x > 0).all()), bool((x.log().mean().abs() < 0.02) & (x.log().std() < 0.1))
(True, True)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from sfumato.diffusion.finite import FiniteTrajectory
from sfumato.diffusion.samplers import Callback, SamplerStep, draw_step
from sfumato.diffusion.schedules import expand
from sfumato.errors import BadSetting

LIMIT = 20.0
"""Largest exponent of one step, up or down: e^20 is half a billion, no step of a score that was learned comes near."""

_T = TypeVar("_T")


class GBMSchedule:
    """How far the motion is at each of N times.

    Args:
        N: number of times, k = 0 (clean) to N - 1.
        sigma: volatility σ, above 0: deviation of log x after unit time.
        mu: drift μ; None: σ²/2, with which the logarithm does not drift.

    Attributes:
        tau: `[N + 1]` float64, k / N.
        drift: `[N + 1]`, mean of log(x_k / x_0).
        std: `[N + 1]`, deviation of log(x_k / x_0).

    Raises:
        BadSetting: fewer than two times, or a volatility that is not positive.
    """

    def __init__(self, N: int = 1000, *, sigma: float = 0.8, mu: float | None = None) -> None:
        if N < 2 or not sigma > 0:
            raise BadSetting(f"N={N} and sigma={sigma}: a motion needs two times or more and a volatility above 0")
        self.N, self.sigma, self.mu = N, sigma, sigma**2 / 2 if mu is None else mu
        self.tau = torch.arange(N + 1, dtype=torch.float64) / N
        self.drift = (self.mu - sigma**2 / 2) * self.tau
        self.std = sigma * self.tau.sqrt()

    def __len__(self) -> int:
        return self.N

    def q_sample(self, x0: Tensor, k: Tensor | int, noise: Tensor) -> Tensor:
        """x_k from x_0.

        Args:
            x0: `[B, ...]`, not 0.
            k: `[B]` int64, or one time for all.
            noise: standard normal, like `x0`.

        Returns:
            Like `x0`, with its signs.
        """
        return x0 * (expand(self.drift, k, x0) + expand(self.std, k, x0) * noise).exp()

    def hyvarinen_score(self, x_k: Tensor, x0: Tensor, k: Tensor | int) -> Tensor:
        """x ∇ log p(x_k | x_0), the Hyvärinen score where the clean picture is known.

        Args:
            x_k, x0: `[B, ...]`, of equal signs.
            k: `[B]` int64, or one time for all; 1 or more.

        Returns:
            Like `x_k`.
        """
        distance = (x_k / x0).log() - expand(self.drift, k, x_k)
        return -1 - distance / expand(self.std.square(), k, x_k)

    def posterior_x0(self, x_k: Tensor, score: Tensor, k: Tensor | int) -> Tensor:
        """The clean picture as the score has it: exp of the posterior mean of log x_0 (Tweedie's formula on log x).

        Args:
            x_k: `[B, ...]`, not 0.
            score: Stein score, like `x_k`.
            k: `[B]` int64, or one time for all.

        Returns:
            Like `x_k`, with its signs.
        """
        return x_k * (expand(self.std.square(), k, x_k) * (1 + x_k * score) - expand(self.drift, k, x_k)).exp()

    def start(self, mean: float | Tensor, variance: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Mean and deviation of log x at the last time, N - 1: where to begin.

        Args:
            mean, variance: of log x_0, numbers or tensors (one a channel, say).

        Returns:
            `(m, v)`; the log-normal law exp(m + v z) has the first two moments of log x_{N-1}.
        """
        last = self.std[-2].item() ** 2
        return mean + self.drift[-2].item(), (variance + last) ** 0.5


def multiplicative_dsm(
    score: Tensor,
    x_k: Tensor,
    x0: Tensor,
    k: Tensor | int,
    schedule: GBMSchedule,
    *,
    weight: Literal["paper", "unit"] = "paper",
    tau_shift: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Denoising score matching for multiplicative noise.

        r = σ²τ x_k s + log(x_k / x_0) - μτ + 3σ²τ/2,    L = sum of r²

    r is 0 at the conditional score. On average L is σ⁴τ² |x s - x ∇ log p(x_k)|² plus what does not depend on s.

    Args:
        score: the network's Stein score at `x_k`, `[B, ...]`.
        x_k: `schedule.q_sample(x0, k, noise)`; in float32 or wider.
        x0: clean, of the same signs.
        k: `[B]` int64, or one time for all; 1 or more.
        schedule: the motion.
        weight: "paper", or "unit": r over σ√τ, so that all times count alike (r is the error of the noise).
        tau_shift: added to k in r alone; the released code has 1 there.
        reduction: "mean" over the batch (a picture's pixels are summed), or "none": `[B]`.

    Returns:
        A scalar, or `[B]`.

    Raises:
        BadSetting: an unknown weight or reduction.
    """
    if weight not in ("paper", "unit") or reduction not in ("mean", "none"):
        raise BadSetting(f"weight={weight!r}, reduction={reduction!r}: weights are paper or unit, reductions mean or none")
    tau = expand(schedule.tau, k + tau_shift, x_k)
    variance = schedule.sigma**2 * tau
    r = variance * (x_k * score + 1.5) + (x_k / x0).log() - schedule.mu * tau
    if weight == "unit":
        r = r / variance.sqrt()
    losses = r.square().flatten(1).sum(1)
    return losses.mean() if reduction == "mean" else losses


def dls_step(
    x: Tensor, score: Tensor, schedule: GBMSchedule, *, delta: float, noise: Tensor | None = None, anneal: float = 1.0
) -> Tensor:
    """One step back in log space (Dale-Langevin): no sign changes, whatever the score.

    Args:
        x: `[B, ...]`, not 0.
        score: Stein score at `x`.
        schedule: its σ and μ.
        delta: length of the step, δ; 1 is the whole way.
        noise: standard normal, like `x`; None: a step without noise.
        anneal: factor a on the noise.

    Returns:
        Like `x`, with its signs: the exponent is held within ±20, the result within what its type can hold.
    """
    return _multiplied(x, _exponent(x, score, schedule, delta, noise, anneal))


def ums_step(
    x: Tensor, score: Tensor, schedule: GBMSchedule, *, delta: float, noise: Tensor | None = None, anneal: float = 1.0
) -> Tensor:
    """One step back on x itself (unconstrained multiplicative): signs can change. Arguments as `dls_step`."""
    variance = delta * schedule.sigma**2
    factor = 1 + variance * (x * score + 2) - delta * schedule.mu
    if noise is not None:
        factor = factor + anneal * variance**0.5 * noise
    return x * factor


def _exponent(x: Tensor, score: Tensor, schedule: GBMSchedule, delta: float, noise: Tensor | None, anneal: float) -> Tensor:
    variance = delta * schedule.sigma**2
    exponent = variance * (x * score + 1.5) - delta * schedule.mu
    return exponent if noise is None else exponent + anneal * variance**0.5 * noise


def _multiplied(x: Tensor, exponent: Tensor) -> Tensor:
    """x exp(exponent), neither 0 nor infinite: many wild steps in a row would leave what the type holds, and lose the sign."""
    span = torch.finfo(x.dtype)
    size = (x * exponent.clamp(-LIMIT, LIMIT).exp()).abs().clamp(span.tiny, span.max)
    return torch.copysign(size, x)


@torch.no_grad()
def sample_gbm(
    model: Callable[[Tensor, Tensor], Tensor],
    n: int,
    schedule: GBMSchedule,
    *,
    shape: Sequence[int],
    start: tuple[float | Tensor, float | Tensor] | None = None,
    x: Tensor | None = None,
    sampler: Literal["dls", "ums"] = "dls",
    steps: int | None = None,
    delta: float | Sequence[float] | None = None,
    inner: int | Sequence[int] = 1,
    anneal: float | Sequence[float] = 1.0,
    denoise_steps: int = 0,
    denoise_delta: float | None = None,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw samples by the reverse motion, from time N - 1 down.

    Args:
        model: the Stein score, `model(x, k)` with k `[n]` int64; it is asked at 0 too, which M-DSM does not train.
        n: how many.
        schedule: the motion that the model was trained with.
        shape: of a sample.
        start: mean and deviation of log x at the beginning (`schedule.start`), broadcastable to `shape`.
        x: `[n, *shape]`, where to begin instead: pictures pushed through `q_sample`, say.
        sampler: "dls" or "ums".
        steps: times that are visited, evenly spaced; None: all N.
        delta: length of a step, one for all or one a time visited; None: the distance to the next time, shared by the inner
            steps (the reverse equation itself; time 0 is left out).
        inner: steps at each time, one for all or one a time.
        anneal: what the factor on the noise, 1 at first, is multiplied by after each time; below 1: sharper samples.
        denoise_steps: steps without noise at time 0, in the end.
        denoise_delta: their length; None: `delta` where that is one number, else 1 / N.
        noise: `[all steps, n, *shape]`, the z of each step instead of drawing them.
        callback: told of every step before its update, the denoising ones too; `sigma` is the deviation of log x.
        generator: source of the draws.

    Returns:
        `[n, *shape]`.

    Raises:
        BadSetting: a number of times out of range, lists of another length, an unknown sampler, or nowhere to begin.
        Diverged: a sample is not finite; the message names the step and the samples.

    Warns:
        UserWarning: exponents of DLS were held at ±20.
    """
    if sampler not in ("dls", "ums"):
        raise BadSetting(f"there is no sampler {sampler!r}: use dls or ums")
    plan = _plan(schedule, steps, delta, inner, anneal)
    if denoise_delta is None:
        denoise_delta = delta if isinstance(delta, (int, float)) else 1 / len(schedule)
    plan += [(0, float(denoise_delta), 0.0)] * denoise_steps
    x = _beginning(n, tuple(shape), start, generator) if x is None else x
    other = ", or the dls sampler" if sampler == "ums" else ""
    watch = FiniteTrajectory(x, len(plan), what="the sample", advice=f"train for longer, or take shorter steps (delta){other}")
    clamped = torch.zeros((), dtype=torch.bool, device=x.device)
    for i, (k, length, factor) in enumerate(plan):
        score = model(x, torch.full((len(x),), k, device=x.device))
        if callback is not None:
            callback(SamplerStep(i, x, schedule.posterior_x0(x, score, k), schedule.std[k]))
        z = draw_step(x, noise, i, generator) if factor else None
        if sampler == "ums":
            x = ums_step(x, score, schedule, delta=length, noise=z, anneal=factor)
        else:
            exponent = _exponent(x, score, schedule, length, z, factor)
            clamped |= (exponent.abs() > LIMIT).any()
            x = _multiplied(x, exponent)
        watch(i, x)  # not the score, which may leave its type where x s does not
    x = watch.end(x)
    if clamped:
        warnings.warn(f"scores were so large that exponents were held at ±{LIMIT:g}: take shorter steps (delta)", stacklevel=2)
    return x


def _plan(
    schedule: GBMSchedule,
    steps: int | None,
    delta: float | Sequence[float] | None,
    inner: int | Sequence[int],
    anneal: float | Sequence[float],
) -> list[tuple[int, float, float]]:
    """Time, length and noise factor of every step."""
    N = len(schedule)
    count = N if steps is None else steps
    if not 1 <= count <= N:
        raise BadSetting(f"steps={steps} is not between 1 and the schedule's {N}")
    times = [N - 1 - i * (N // count) for i in range(count)]
    repeats = _each(inner, count, "inner")
    gaps = [(here - there) / N / max(1, some) for here, there, some in zip(times, [*times[1:], 0], repeats)]
    lengths = gaps if delta is None else _each(delta, count, "delta")
    plan: list[tuple[int, float, float]] = []
    factor = 1.0
    for k, length, some, shrink in zip(times, lengths, repeats, _each(anneal, count, "anneal")):
        plan += [(k, float(length), factor)] * (some if length else 0)
        factor *= shrink
    return plan


def _each(value: _T | Sequence[_T], count: int, name: str) -> Sequence[_T]:
    """One a time visited."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise BadSetting(f"{name} has {len(value)} entries, {count} times are visited: give as many, or one number")
    return value


def _beginning(
    n: int, shape: tuple[int, ...], start: tuple[float | Tensor, float | Tensor] | None, generator: torch.Generator | None
) -> Tensor:
    """Log-normal numbers."""
    if start is None:
        raise BadSetting("sampling has nowhere to begin: give start=schedule.start(mean, variance) of log x_0, or x")
    mean, deviation = start
    z = torch.randn((n, *shape), generator=generator, device=generator.device if generator is not None else None)
    z = z.to(mean) if isinstance(mean, Tensor) else z
    return (mean + deviation * z).exp()
