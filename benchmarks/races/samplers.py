"""Sampling loops around one network: what a loop costs is what it takes beyond the bare network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built
from sfumato.diffusion import ResidualSchedule, Schedule, beta_schedule, sample_ddim, sample_residual
from sfumato.nn import small_unet

Model = Callable[[Tensor, Tensor], Tensor]


def network(size: int, width: int) -> tuple[Model, Tensor]:
    """A network of pictures and times, and the noise to begin with: 4 pictures."""
    net: Any = built(partial(small_unet, size, 3, width=width)).eval()
    return lambda x, t: net(x, t).sample, torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def bare_calls(model: Model, x: Tensor, steps: int) -> Run:
    """The network alone, as often as a sampler calls it."""
    times = [torch.full((len(x),), t) for t in range(steps)]

    @torch.no_grad()
    def run() -> Tensor:
        out = x
        for t in times:
            out = model(x, t)
        return out

    return run


def our_ddim(model: Model, x: Tensor, steps: int) -> Run:
    schedule = Schedule(beta_schedule("linear"))
    return lambda: sample_ddim(model, x, schedule, steps=steps)


def our_residual(model: Model, x: Tensor, steps: int) -> Run:
    """RDDM's sampler with nothing to restore and DDIM's tables: then it must be DDIM, at times that begin with the last."""
    schedule = ResidualSchedule.from_ddim(Schedule(beta_schedule("linear")))
    start = x / schedule.beta_bar[-1].to(x)

    @torch.no_grad()
    def run() -> Tensor:
        settings: dict[str, Any] = {"objective": "pred_noise", "clip": False, "clip_res": None}
        return sample_residual(model, torch.zeros_like(x), schedule, steps=steps, start=start, **settings)

    return run


def diffusers_ddim(model: Model, x: Tensor, steps: int, spacing: str = "leading") -> Run:
    """The loop of its documentation."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing)

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        sample = x
        for t in scheduler.timesteps:
            sample = scheduler.step(model(sample, t.expand(len(x))), t, sample).prev_sample
        return sample

    return run


LOOPS: dict[str, tuple[Callable[[Model, Tensor, int], Run], dict[str, Callable[[Model, Tensor, int], Run]]]] = {
    "DDIM": (our_ddim, {"diffusers": diffusers_ddim}),
    "RDDM": (our_residual, {"diffusers": partial(diffusers_ddim, spacing="trailing")}),
}
"""A sampler's name, our loop, and its peers' loops: `(model, noise, steps) -> run` that gives the pictures."""


@race(
    "Sampling loops: the same network, the same noise, the same times",
    "Nearly all of the time is the network's, so both loops are close to its bare calls; what is left of ours is a few "
    "multiplications of the picture and of numbers a step, which shows on the small network only.",
)
def sampling(quick: bool) -> Iterator[Heat]:
    """Equal pictures to 1e-5; `network alone` has no schedule, so its result is its own."""
    steps = 5 if quick else 20
    for size, width in ((8, 8),) if quick else ((32, 32), (8, 8)):
        model, x = network(size, width)
        for name, (ours, peers) in LOOPS.items():
            loops = {"sfumato": ours, **peers, "network alone": bare_calls}
            yield Heat(
                f"{name}, {steps} steps, 4 pictures of {size} pixels, width {width}",
                {key: partial(loop, model, x, steps) for key, loop in loops.items()},
                per=steps,
                free=("network alone",),
                memory=False,
            )
