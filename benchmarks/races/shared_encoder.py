"""One pass of a U-Net's encoder for all steps of a sampler, against the loop that goes through the whole network at each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built
from benchmarks.races.samplers import diffusers_ddim
from sfumato.diffusion import Schedule, beta_schedule, sample_ddim, shared_encoder_sample
from sfumato.nn import small_unet


def shared(net: Any, x: Tensor, steps: int, *, parallel: bool = True) -> Run:
    """One encoder and `steps` decoders, at once or one after the other."""
    schedule = Schedule(beta_schedule("linear"))

    @torch.no_grad()
    def run() -> Tensor:
        return shared_encoder_sample(net, x, None, schedule, steps, parallel=parallel).x0

    return run


def loop(net: Any, x: Tensor, steps: int) -> Run:
    """Our ordinary DDIM."""
    schedule = Schedule(beta_schedule("linear"))
    return lambda: sample_ddim(lambda y, t: net(y, t).sample, x, schedule, steps=steps)


def peer_loop(net: Any, x: Tensor, steps: int) -> Run:
    """diffusers' DDIM."""
    return diffusers_ddim(lambda y, t: net(y, t).sample, x, steps)


@race(
    "One encoder pass for four decoders, against the ordinary loop of four whole steps",
    "Decoders at once and one after the other give the same pictures. The ordinary loop gives others, as its encoder sees what "
    "each step made: a student is trained to do without. One pass saves three encoders of four; what the decoders cost in one "
    "batch depends on what is idle. For one picture a small network is mostly the cost of its calls, which one batch pays once; "
    "with many pictures or a large network every decoder costs what it computes, and the gain is the encoders'.",
)
def encoder_once(quick: bool) -> Iterator[Heat]:
    """Four steps and, to compare, one; times are those of a batch of pictures."""
    for size, width, count in ((8, 8, 1),) if quick else ((8, 16, 1), (8, 16, 64), (32, 32, 1), (32, 32, 8)):
        net: Any = built(partial(small_unet, size, 3, width=width)).eval()
        x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        lanes = {
            "sfumato": partial(shared, net, x, 4),
            "one after the other": partial(shared, net, x, 4, parallel=False),
            "ordinary loop": partial(loop, net, x, 4),
            "diffusers": partial(peer_loop, net, x, 4),
            "one step": partial(loop, net, x, 1),
        }
        free = ("ordinary loop", "diffusers", "one step")
        yield Heat(f"4 steps, {count} x {size} pixels, width {width}", lanes, free=free, memory=False)
