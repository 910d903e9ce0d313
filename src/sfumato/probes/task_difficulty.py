"""How long each part of a diffusion's times takes to learn: networks that are trained on one part alone, all alike but for it.

    f_i = argmin mean |f(x_t, t) - y|²,  t in part i;    l_i(k) = (L_i(k) - L_i(K)) / (L_i(0) - L_i(K)) after k of K steps

Every network starts at the same weights and sees the same samples and noise. Beside its loss a judge may follow it, such as the
distance of samples that are drawn with it in its part of the times and with a trained model elsewhere
(`sfumato.diffusion.ExpertDenoiser`).

Source: Kim, Go, Kwon, Kim, "Denoising Task Difficulty-based Curriculum for Training Diffusion Models", ICLR 2025, the studies of
section 3.

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule
>>> from sfumato.nn import ToyDenoiser
>>> from sfumato.probes import task_difficulty
>>> net, schedule = ToyDenoiser(2, width=8, layers=1), Schedule(beta_schedule("linear"))
>>> found = task_difficulty(net, torch.randn(100, 2), schedule, intervals=4, steps=10, judge=lambda net, low, high: low)
>>> found.losses.shape, found.judged.tolist(), found.judgements[:, -1].tolist()
(torch.Size([4, 11]), [10], [0.0, 250.0, 500.0, 750.0])
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.diffusion.curriculum import uniform_clusters
from sfumato.diffusion.schedules import Schedule
from sfumato.diffusion.time_samplers import range_t
from sfumato.diffusion.training import denoising_loss

TaskLoss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""`loss(net, x0, t, noise)`: the mean error of a network at times `[B]`, a scalar."""
Judge = Callable[[nn.Module, int, int], float]
"""`judge(net, low, high)`: a figure of a network, in eval mode, that was trained at times low to high - 1."""

HELD = 512
"""Samples at most whose loss is measured, again and again with the same times and noise."""


class TaskDifficulty(NamedTuple):
    """What separate trainings of the parts of the times tell.

    Args:
        edges: `[n + 1]`, times at which the parts begin; T at the end.
        steps: `[k]`, training steps at which the loss was measured, from 0 on.
        losses: `[n, k]`, of fixed samples, times and noise.
        judged: `[m]`, training steps at which the judge was asked.
        judgements: `[n, m]`, what it said; m = 0 without one.
    """

    edges: Tensor
    steps: Tensor
    losses: Tensor
    judged: Tensor
    judgements: Tensor

    @property
    def normalised(self) -> Tensor:
        """`[n, k]`: the loss from its first value (1) to its last (0)."""
        first, last = self.losses[:, :1], self.losses[:, -1:]
        return (self.losses - last) / (first - last)

    def steps_to(self, left: float = 0.1) -> Tensor:
        """`[n]`: steps until the normalised loss stays below `left`: how slowly each part is learned."""
        above = self.normalised > left
        last = above.shape[1] - 1 - above.flip(1).int().argmax(1)  # the first measurement is 1, so there is one above
        return self.steps[(last + 1).clamp(max=len(self.steps) - 1)]


class Expert(NamedTuple):
    """A network of one part of the times: its losses `[k]` and judgements `[m]`, as in `TaskDifficulty`."""

    net: nn.Module
    losses: Tensor
    judgements: Tensor


def task_difficulty(
    model: nn.Module, data: Tensor, schedule: Schedule, *, intervals: int = 10, steps: int = 300, batch_size: int = 64,
    lr: float = 1e-3, predict: str = "eps", measure: int = 30, judge: Judge | None = None, judgements: int = 1,
    generator: torch.Generator | None = None,
) -> TaskDifficulty:  # fmt: skip
    """Train a copy of a network on each part of the times alone, all with the same budget, and follow their losses.

    Args:
        model: `model(x_t, t)`, untrained; copies of it are trained, from the same weights.
        data: clean samples `[n, ...]`, in the range that they are diffused in.
        schedule: its tables.
        intervals: parts of equal length.
        steps: training steps of each copy.
        batch_size: samples a step.
        lr: Adam's learning rate.
        predict: "eps", "x0" or "v".
        measure: how often the loss is measured, apart from the start.
        judge: asked of each copy in training.
        judgements: how often, at equal distances; the last time at the end.
        generator: source of samples, times and noise, on the data's device; the parts see the same samples and noise.

    Raises:
        BadSetting: more intervals than times, or an unknown prediction.
    """
    edges = uniform_clusters(len(schedule), intervals)
    if generator is None:
        generator = torch.Generator(data.device).manual_seed(int(torch.randint(1 << 62, ())))
    start, experts = generator.get_state(), []

    def loss(net: nn.Module, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return denoising_loss(net, x0, t, noise, schedule, predict=predict)

    for low, high in pairwise(edges.tolist()):
        generator.set_state(start)
        experts.append(
            train_expert(
                model, data, low, high, loss, steps=steps, batch_size=batch_size, lr=lr, measure=measure, judge=judge,
                judgements=judgements, generator=generator,
            )
        )  # fmt: skip
    return gathered(edges, experts, steps=steps, measure=measure, judgements=judgements)


def train_expert(
    model: nn.Module, data: Tensor, low: int, high: int, loss: TaskLoss, *, steps: int = 300, batch_size: int = 64,
    lr: float = 1e-3, measure: int = 30, judge: Judge | None = None, judgements: int = 1,
    watch: Callable[[], None] | None = None, generator: torch.Generator | None = None,
) -> Expert:  # fmt: skip
    """Train a copy of a network at times `low` to `high - 1` alone; arguments as `task_difficulty`.

    Args:
        loss: what it is trained on.
        watch: called before every training step.
    """
    if generator is None:
        generator = torch.Generator(data.device).manual_seed(int(torch.randint(1 << 62, ())))
    net, device = copy.deepcopy(model).train(), data.device
    optimizer = torch.optim.Adam(net.parameters(), lr)
    held = data[torch.randperm(len(data), generator=generator, device=device)[:HELD]]
    noise = torch.randn(held.shape, generator=generator, device=device, dtype=data.dtype)
    spread = low + torch.arange(len(held), device=device) * (high - low) // len(held)
    marks, asked = loss_marks(steps, measure), judge_marks(steps, judgements) if judge is not None else []
    losses, said = [], []
    for step in range(steps + 1):
        if step in marks:
            with torch.no_grad():
                losses.append(loss(net.eval(), held, spread, noise).double())
        if judge is not None and step in asked:
            with torch.no_grad():
                said.append(judge(net.eval(), low, high))
        if step == steps:
            break
        if watch is not None:
            watch()
        rows = torch.randint(len(data), (batch_size,), generator=generator, device=device)
        t = range_t(batch_size, low, high, generator=generator)
        fresh = torch.randn(data[rows].shape, generator=generator, device=device, dtype=data.dtype)
        optimizer.zero_grad()
        loss(net.train(), data[rows], t, fresh).backward()
        optimizer.step()
    return Expert(net.eval(), torch.stack(losses).cpu(), torch.tensor(said, dtype=torch.float64))


def gathered(edges: Tensor, experts: list[Expert], *, steps: int, measure: int = 30, judgements: int = 1) -> TaskDifficulty:
    """What experts of the first parts of the times, trained alike, tell together."""
    said = torch.stack([e.judgements for e in experts])
    asked = judge_marks(steps, judgements) if said.shape[1] else []
    losses = torch.stack([e.losses for e in experts])
    return TaskDifficulty(edges[: len(experts) + 1], torch.tensor(loss_marks(steps, measure)), losses, torch.tensor(asked), said)


def loss_marks(steps: int, measure: int) -> list[int]:
    """Steps at which the loss is measured: 0, and `measure` more at equal distances where there are so many."""
    return sorted({i * steps // measure for i in range(measure + 1)})


def judge_marks(steps: int, judgements: int) -> list[int]:
    """Steps at which the judge is asked: `judgements` at equal distances, the last at the end."""
    return sorted({i * steps // judgements for i in range(1, judgements + 1)})
