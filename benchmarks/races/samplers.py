"""Sampling loops around one network: what a loop costs is what it takes beyond the bare network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built
from sfumato.diffusion import Schedule, beta_schedule, sample_ddim
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


def diffusers_ddim(model: Model, x: Tensor, steps: int) -> Run:
    """The loop of its documentation."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, clip_sample=False, set_alpha_to_one=True)

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
