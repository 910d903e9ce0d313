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
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.schedules import Schedule, expand
from sfumato.errors import BadSetting

Model = Callable[[Tensor, Tensor], Any]
"""`model(x, t or sigma)`: a tensor, or a result of diffusers that holds one as `.sample`."""

KINDS = ("eps", "x0", "v", "score")
_DIFFUSERS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


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
    signal, noise = expand(schedule.sqrt_abar, t, x_t), expand(schedule.sqrt_1m_abar, t, x_t)
    if source == "x0":
        x0, eps = value, (x_t - signal * value) / noise
    elif source == "v":
        x0, eps = signal * x_t - noise * value, noise * x_t + signal * value
    else:
        eps = value if source == "eps" else -noise * value
        x0 = (x_t - noise * eps) / signal
    return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0, "score": -eps / noise}[target]


def read_schedule(schedule: Schedule | Any, predict: str | None = None) -> tuple[Schedule, str]:
    """The tables, and what a network of theirs predicts: `predict`, else what a scheduler of diffusers says, else "eps"."""
    if isinstance(schedule, Schedule):
        return schedule, predict or "eps"
    named = schedule.config.prediction_type
    return Schedule.from_diffusers(schedule), predict or _DIFFUSERS.get(named, named)


def as_denoiser(
    model: Model, schedule: Schedule | Any, *, predict: str | None = None, face: str = "D"
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser called and answering in another way: any of the kinds of `convert`, or "D", in and out.

    Between a discrete time t and a noise level sigma stands the table: `x_t = sqrt(abar_t) x`, and sigma finds the time whose
    level is nearest.

    Args:
        model: `model(x_t, t)` with t `[B]` int64, or, where `predict` is "D", `model(x, sigma)` with sigma `[B]`. A network of
            diffusers will do, its `.sample` is taken.
        schedule: the tables that it was trained with, or a scheduler of diffusers.
        predict: what the model gives; None: what a diffusers scheduler says, else "eps".
        face: what is wanted.

    Returns:
        For "D", `D(x, sigma)`: x is a clean picture plus noise of standard deviation sigma (a scalar or `[B]`); gives the clean
        picture. Else `f(x_t, t)` with t `[B]` int64 or one time for all; gives what `face` says.

    Raises:
        BadSetting: an unknown kind, or a scheduler that predicts none of them.
    """
    tables, source = read_schedule(schedule, predict)
    for kind in (source, face):
        if kind not in (*KINDS, "D"):
            raise BadSetting(f"there is no denoiser of kind {kind!r}: use {', '.join(KINDS)} or D")

    def at_time(x_t: Tensor, t: Tensor | int) -> Tensor:
        """The model's answer at a discrete time, as `face` wants it ("D": the clean picture)."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        if source == "D":
            levels = expand(tables.sigma, t, x_t).flatten()
            out = model(x_t / expand(tables.sqrt_abar, t, x_t), levels)
        else:
            out = model(x_t, t)
        out = out if isinstance(out, Tensor) else out.sample
        given, wanted = ("x0" if kind == "D" else kind for kind in (source, face))
        return convert(out, x_t, t, tables, source=given, target=wanted)

    def at_level(x: Tensor, sigma: Tensor) -> Tensor:
        levels = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        t = (levels[:, None] - tables.sigma.to(x.device)).abs().argmin(1)
        return at_time(expand(tables.sqrt_abar, t, x) * x, t)

    if face == "D":
        return model if source == "D" else at_level
    return at_time
