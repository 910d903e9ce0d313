"""One prediction said in another's terms: noise, clean picture, velocity, score.

    x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar),    v = sqrt(abar) eps - sqrt(1 - abar) x_0,    s = -eps / sqrt(1 - abar)

and a network that predicts any of them as a denoiser D(x, sigma) of pictures with noise of standard deviation sigma.

Sources: Ho, Jain, Abbeel 2020 (eps); Salimans, Ho, "Progressive Distillation for Fast Sampling", ICLR 2022 (v); Karras et al.
2022 (D).

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule, convert
>>> schedule, t = Schedule(beta_schedule("linear")), torch.tensor([500])
>>> x0, eps = torch.rand(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
>>> x_t = schedule.q_sample(x0, t, eps)
>>> torch.allclose(convert(eps, x_t, t, schedule, source="eps", target="x0"), x0, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.diffusion.schedules import Schedule, expand
from sfumato.errors import BadSetting

KINDS = ("eps", "x0", "v", "score")


def convert(value: Tensor, x_t: Tensor, t: Tensor | int, schedule: Schedule, *, source: str, target: str) -> Tensor:
    """A prediction in other terms.

    Args:
        value: the prediction, `[B, ...]`.
        x_t: what it was made from, like `value`.
        t: `[B]` int64, or one time for all.
        schedule: its tables.
        source, target: "eps", "x0", "v" or "score".

    Returns:
        Like `value`.

    Raises:
        BadSetting: an unknown kind.
    """
    for kind in (source, target):
        if kind not in KINDS:
            raise BadSetting(f"there is no prediction {kind!r}: use {', '.join(KINDS)}")
    if source == target:
        return value
    signal, noise = expand(schedule.abar.sqrt(), t, x_t), expand((1 - schedule.abar).sqrt(), t, x_t)
    if source == "x0":
        x0, eps = value, (x_t - signal * value) / noise
    elif source == "v":
        x0, eps = signal * x_t - noise * value, noise * x_t + signal * value
    else:
        eps = value if source == "eps" else -noise * value
        x0 = (x_t - noise * eps) / signal
    return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0, "score": -eps / noise}[target]


def as_denoiser(
    model: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, *, predict: str = "eps"
) -> Callable[[Tensor, Tensor], Tensor]:
    """A network of discrete times as D(x, sigma), at the time whose noise level is nearest.

    Args:
        model: `model(x_t, t)` with t `[B]` int64.
        schedule: the tables that it was trained with.
        predict: what it predicts.

    Returns:
        `D(x, sigma)`: x is a clean picture plus noise of standard deviation sigma (a scalar or `[B]`); gives the clean picture.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        levels = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        t = (levels[:, None] - schedule.sigma.to(x.device)).abs().argmin(1)
        x_t = expand(schedule.abar.sqrt(), t, x) * x
        return convert(model(x_t, t), x_t, t, schedule, source=predict, target="x0")

    return denoise
