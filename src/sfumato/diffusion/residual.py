"""Diffusion from a clean picture to a degraded one: the residual between them and noise, each on a schedule of its own.

    I_t = I_0 + abar_t I_res + bbar_t eps,  I_res = I_in - I_0,  abar_t = sum_{s <= t} alpha_s,  bbar_t² = sum_{s <= t} beta_s²

abar is a sum that grows from 0 to 1 (not the product of DDPM): the chain ends at the degraded picture with noise on it. Sampling
goes from time t to an earlier time p by

    I_p = I_t - (abar_t - abar_p) Î_res - (bbar_t - sqrt(bbar_p² - s²)) ε̂ + s z,    s² = eta (bbar_t² - bbar_p²) bbar_p² / bbar_t²

and returns Î_0 at the end. With I_in = 0 and `ResidualSchedule.from_ddim` this is DDIM.

Source: Jiawei Liu, Qiang Wang, Huijie Fan, Yinong Wang, Yandong Tang, Liangqiong Qu, "Residual Denoising Diffusion Models",
CVPR 2024 (arXiv 2308.13712), sections 3 and 4.

>>> import torch
>>> from sfumato.diffusion import ResidualSchedule, power_schedule, sample_residual
>>> schedule = ResidualSchedule(power_schedule("decreased", 100), power_schedule("increased", 100))
>>> clean, degraded = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
>>> exact = lambda x, t: degraded - clean  # a network that knows the residual
>>> torch.allclose(sample_residual(exact, degraded, schedule, steps=5, objective="pred_res"), clean, atol=1e-5)
True
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from sfumato.diffusion.finite import FiniteTrajectory
from sfumato.diffusion.samplers import Callback, Model, SamplerStep, draw_step
from sfumato.diffusion.schedules import Schedule, expand
from sfumato.errors import BadSetting

ResidualObjective = Literal[
    "pred_res_noise", "pred_x0_noise", "pred_res_add_noise", "pred_x0_add_noise", "pred_res", "pred_noise"
]
"""What a network predicts; with two outputs they stand one after the other in its channels. `add_noise`: the second one is the
first plus the noise."""


def power_schedule(kind: str, T: int = 1000, power: float = 1.0, total: float = 1.0, *, zero: bool = False) -> Tensor:
    """A share for each of T times, proportional to a power of the time.

    Args:
        kind: "increased" (x^power), "decreased" (the same backwards), "average" (equal), or "normal" (a bell over three
            standard deviations to each side).
        T: number of times.
        power: exponent of the first two kinds.
        total: the sum.
        zero: whether x runs from 0 to 1, so that one share is 0 (the paper's generation), or from 1/T (its restoration).

    Returns:
        `[T]`, float64.

    Raises:
        BadSetting: an unknown kind, or fewer than two times.
    """
    if T < 2:
        raise BadSetting(f"T={T} times are too few: give 2 or more")
    x = torch.linspace(0 if zero else 1 / T, 1, T, dtype=torch.float64)
    shapes = {
        "increased": x**power,
        "decreased": x.flip(0) ** power,
        "average": torch.ones_like(x),
        "normal": torch.exp(-torch.linspace(-3, 3, T, dtype=torch.float64).square() / 2),
    }
    if kind not in shapes:
        raise BadSetting(f"there is no schedule {kind!r}: use {', '.join(shapes)}")
    return total * shapes[kind] / shapes[kind].sum()


class ResidualPrediction(NamedTuple):
    """What a network's output says of the residual, of the noise and of the clean picture; each `[B, C, ...]`."""

    res: Tensor
    noise: Tensor
    x0: Tensor


class ResidualSchedule:
    """The tables of a residual diffusion.

    Args:
        alpha: `[T]`, share of the residual that is added at each time; at least 0, sums to at most 1.
        beta2: `[T]`, variance of the noise that is added at each time; at least 0, sums to at most 1.

    Attributes:
        alpha_bar: `[T]`, share of the residual.
        beta_bar: `[T]`, standard deviation of the noise.

    Raises:
        BadSetting: tables of unlike lengths, negative shares, or a sum above 1.
    """

    def __init__(self, alpha: Tensor, beta2: Tensor) -> None:
        if alpha.ndim != 1 or alpha.shape != beta2.shape:
            raise BadSetting(f"alpha {list(alpha.shape)} and beta2 {list(beta2.shape)} must be vectors of one length")
        for name, shares in (("alpha", alpha), ("beta2", beta2)):
            if not (shares >= 0).all() or shares.double().sum() > 1 + 1e-5:
                raise BadSetting(f"{name} must be at least 0 everywhere and sum to at most 1")
        self.alpha, self.beta2 = alpha.double(), beta2.double()
        self.alpha_bar = self.alpha.cumsum(0).clamp(max=1)
        self.beta_bar = self.beta2.cumsum(0).clamp(max=1).sqrt()
        self._preserving = False

    def __len__(self) -> int:
        return len(self.alpha)

    @classmethod
    def from_ddim(cls, schedule: Schedule) -> Self:
        """The tables that make residual diffusion with I_in = 0 the same as DDIM with `schedule`.

        abar(R) = 1 - sqrt(abar(D)), bbar(R) = sqrt(1 - abar(D)); `step_variance` is then DDIM's (for any eta in {0, 1}).
        """
        before = schedule.abar.new_zeros(1)
        mine = cls((1 - schedule.abar.sqrt()).diff(prepend=before), (1 - schedule.abar).diff(prepend=before))
        mine._preserving = True
        return mine

    def q_sample(self, x0: Tensor, x_in: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """I_t.

        Args:
            x0, x_in: the clean and the degraded picture, `[B, ...]`.
            t: `[B]` int64, or one time for all.
            noise: standard normal, like `x0`.

        Returns:
            Like `x0`.
        """
        return x0 + expand(self.alpha_bar, t, x0) * (x_in - x0) + expand(self.beta_bar, t, x0) * noise

    def posterior(self, x0: Tensor, x_in: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(I_{t-1} | I_t, I_0, I_in); at time 0 they are I_0 and 0.

        Args:
            x0, x_in, x_t: `[B, ...]`.
            t: `[B]` int64, or one time for all.

        Returns:
            The mean like `x0`, the variance broadcastable to it.
        """
        now, before = self.beta_bar.square(), self.beta_bar.square() - self.beta2
        before = torch.cat([before.new_zeros(1), before[1:].clamp(min=0)])
        share = torch.cat([now.new_ones(1), (self.beta2 / now)[1:]])  # of the noise that the last step brought
        mean = expand(1 - share, t, x0) * x_t + expand(share, t, x0) * x0
        of_residual = share * (self.alpha_bar - self.alpha) - (1 - share) * self.alpha
        return mean + expand(of_residual, t, x0) * (x_in - x0), expand(share * before, t, x0)

    def step_variance(self, t: int, p: int) -> Tensor:
        """s² at eta = 1 of a step from time `t` to an earlier time `p`: a float64 scalar; at p = t - 1 the posterior's."""
        now, before = self.beta_bar[t].square(), self.beta_bar[p].square()
        kept = ((1 - self.alpha_bar[t]) / (1 - self.alpha_bar[p])).square() if self._preserving else 1.0
        return (now - kept * before) * before / now

    def predictions(
        self,
        outputs: Tensor,
        x_t: Tensor,
        x_in: Tensor,
        t: Tensor | int,
        *,
        objective: str = "pred_res_noise",
        clip: bool = True,
        clip_res: float | None = 1.0,
    ) -> ResidualPrediction:
        """A network's outputs as residual, noise and clean picture.

        Args:
            outputs: `[B, 2C, ...]` of an objective with two outputs, `[B, C, ...]` of one with one.
            x_t, x_in: `[B, C, ...]`.
            t: `[B]` int64, or one time for all.
            objective: what the network predicts, a `ResidualObjective`.
            clip: clamp the clean picture to [-1, 1].
            clip_res: clamp the residual to plus and minus this (the authors' 1 cuts strong residuals, which reach 2); None: not.

        Returns:
            residual, noise and clean picture, each like `x_t`.

        Raises:
            BadSetting: an unknown objective, or another number of channels than it has.
        """
        heads = _split(outputs, x_t, objective)
        abar, bbar = expand(self.alpha_bar, t, x_t), expand(self.beta_bar, t, x_t)

        def cut(res: Tensor) -> Tensor:
            return res if clip_res is None else res.clamp(-clip_res, clip_res)

        def kept(x0: Tensor) -> Tensor:
            return x0.clamp(-1, 1) if clip else x0

        if objective == "pred_noise":
            noise = heads[0]
            x0 = kept((x_t - abar * x_in - bbar * noise) / (1 - abar).clamp(min=1e-6))
            return ResidualPrediction(cut(x_in - x0), noise, x0)
        if objective == "pred_res":
            res = cut(heads[0])
            noise = (x_t - x_in - (abar - 1) * res) / bbar.clamp(min=1e-6)
            return ResidualPrediction(res, noise, kept(x_in - res))
        noise = heads[1] - heads[0] if objective.endswith("add_noise") else heads[1]
        if objective.startswith("pred_x0"):
            x0 = kept(heads[0])
            return ResidualPrediction(cut(x_in - x0), noise, x0)
        res = cut(heads[0])
        return ResidualPrediction(res, noise, kept(x_t - abar * res - bbar * noise))


def residual_loss(
    model: Model,
    x0: Tensor,
    x_in: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: ResidualSchedule,
    *,
    objective: str = "pred_res_noise",
    reduction: str = "mean",
) -> Tensor:
    """Mean absolute error of each output of a network, summed over its outputs.

    Args:
        model: `model(x_t, t)`, gives `[B, C, ...]` or `[B, 2C, ...]`, see `ResidualObjective`.
        x0, x_in: the clean and the degraded picture, `[B, C, ...]`, customarily in [-1, 1].
        t: `[B]` int64.
        noise: standard normal, like `x0`.
        schedule: its tables.
        objective: what the network predicts.
        reduction: "mean", or "none" for `[B]`.

    Returns:
        A scalar, or `[B]`.

    Raises:
        BadSetting: an unknown objective, or another number of channels than it has.
    """
    heads = _split(model(schedule.q_sample(x0, x_in, t, noise), t), x0, objective)
    first = {"pred_noise": noise, "pred_res": x_in - x0}.get(objective, x0 if objective.startswith("pred_x0") else x_in - x0)
    targets = (first, noise + first if objective.endswith("add_noise") else noise)
    errors = torch.stack([(y - target).abs().flatten(1).mean(1) for y, target in zip(heads, targets)]).sum(0)
    return errors.mean() if reduction == "mean" else errors


@torch.no_grad()
def sample_residual(
    model: Model,
    x_in: Tensor,
    schedule: ResidualSchedule,
    *,
    steps: int = 10,
    eta: float = 0.0,
    objective: str = "pred_res_noise",
    clip: bool = True,
    clip_res: float | None = 1.0,
    start: Tensor | None = None,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """From degraded pictures (zeros: from nothing) to clean ones.

    Args:
        model: `model(x_t, t)` with t `[B]` int64; it knows `x_in` by itself.
        x_in: degraded pictures in [-1, 1], or zeros for generation, `[B, C, ...]`.
        schedule: the tables that the model was trained with.
        steps: network calls, 1 to T, at evenly spaced times that begin at T - 1.
        eta: share of the posterior's variance that is drawn anew in each step, 0 to 1; 1 over all times is ancestral sampling.
        objective: what the model predicts, a `ResidualObjective`.
        clip, clip_res: see `ResidualSchedule.predictions`.
        start: standard normal, like `x_in`: the noise of the beginning instead of drawing it.
        noise: `[steps, B, C, ...]`, the z of each step instead of drawing them.
        callback: told of every step before its update.
        generator: source of the draws.

    Returns:
        Like `x_in`.

    Raises:
        BadSetting: more steps than times, or none; an unknown objective, or another number of channels than it has.
        Diverged: the model's answer is not finite.
    """
    T = len(schedule)
    if not 1 <= steps <= T:
        raise BadSetting(f"steps={steps} is not between 1 and the schedule's {T}")
    if start is None:
        start = torch.randn(x_in.shape, generator=generator, device=x_in.device, dtype=x_in.dtype)
    x = x_in + schedule.beta_bar[-1].to(x_in.dtype) * start
    times, watch = [k * T // steps - 1 for k in range(steps, -1, -1)], FiniteTrajectory(x, steps)
    for i, (t, p) in enumerate(pairwise(times)):
        out = watch(i, model(x, torch.full((len(x),), t, device=x.device)))
        said = schedule.predictions(out, x, x_in, t, objective=objective, clip=clip, clip_res=clip_res)
        if callback is not None:
            callback(SamplerStep(i, x, said.x0, schedule.beta_bar[t]))
        if p < 0:
            break
        variance = eta * schedule.step_variance(t, p)
        of_res = schedule.alpha_bar[t] - schedule.alpha_bar[p]
        of_noise = schedule.beta_bar[t] - (schedule.beta_bar[p].square() - variance).clamp(min=0).sqrt()
        x = x - of_res.to(x.dtype) * said.res - of_noise.to(x.dtype) * said.noise
        if eta:
            x = x + variance.sqrt().to(x.dtype) * draw_step(x, noise, i, generator)
    return watch.end(said.x0)


def _split(outputs: Tensor, like: Tensor, objective: str) -> tuple[Tensor, ...]:
    """The outputs of a network apart."""
    if objective not in get_args(ResidualObjective):
        raise BadSetting(f"there is no objective {objective!r}: use {', '.join(get_args(ResidualObjective))}")
    count = 1 if objective in ("pred_res", "pred_noise") else 2
    if outputs.shape[1] != count * like.shape[1]:
        wanted, given = count * like.shape[1], outputs.shape[1]
        raise BadSetting(f"the network gives {given} channels; {objective} of pictures of {like.shape[1]} channels has {wanted}")
    return outputs.chunk(count, 1)
