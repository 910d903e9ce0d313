"""Sampling loops around one network: what a loop costs is what it takes beyond the bare network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built
from sfumato.diffusion import (
    ResidualSchedule,
    Schedule,
    beta_schedule,
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_heun,
    sample_residual,
)
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


def our_ddpm(model: Model, x: Tensor, steps: int) -> Run:
    schedule = Schedule(beta_schedule("linear"))
    return lambda: sample_ddpm(model, x, schedule, steps=steps, generator=torch.Generator().manual_seed(0))


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


def diffusers_ddpm(model: Model, x: Tensor, steps: int) -> Run:
    """The loop of its documentation; it draws the same noise."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, clip_sample=False)

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        sample, generator = x, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            sample = scheduler.step(model(sample, t.expand(len(x))), t, sample, generator=generator).prev_sample
        return sample

    return run


def diffusers_sigmas(kind: str, model: Model, x: Tensor, steps: int) -> Run:
    """The loop of its documentation over noise levels: `kind` is Euler or Heun."""
    import diffusers

    kind = f"{kind}DiscreteScheduler"
    scheduler = getattr(diffusers, kind)(1000, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        sample = x * scheduler.sigmas[0]
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t)
            sample = scheduler.step(model(scaled, t.expand(len(x))), t, sample).prev_sample
        return sample

    return run


def levels(model: Model, x: Tensor, steps: int) -> tuple[Model, Tensor, Tensor]:
    """The network as a denoiser of pictures with noise of a level, the levels of diffusers' loop, and where to begin."""
    times = torch.linspace(1000, 0, steps + 1)[:-1].round().long() - 1
    table = Schedule(beta_schedule("linear")).sigma.float()[times]
    time_of = {float(s): t.expand(len(x)) for s, t in zip(table, times)}

    def denoiser(y: Tensor, sigma: Tensor) -> Tensor:
        return y - sigma * model(y / (sigma**2 + 1).sqrt(), time_of[float(sigma)])

    return denoiser, torch.cat([table, table.new_zeros(1)]), x * table[0]


def our_sigmas(sampler: Callable[..., Tensor], model: Model, x: Tensor, steps: int) -> Run:
    denoiser, sigmas, start = levels(model, x, steps)
    return lambda: sampler(denoiser, start, sigmas)


def plain_loop(heun: bool, model: Model, x: Tensor, steps: int) -> Run:
    """What one writes by hand: a slope, a step, for Heun a second slope."""
    denoiser, sigmas, start = levels(model, x, steps)

    @torch.no_grad()
    def run() -> Tensor:
        y = start
        for i in range(steps):
            slope = (y - denoiser(y, sigmas[i])) / sigmas[i]
            moved = y + slope * (sigmas[i + 1] - sigmas[i])
            if heun and sigmas[i + 1] > 0:
                slope = (slope + (moved - denoiser(moved, sigmas[i + 1])) / sigmas[i + 1]) / 2
                moved = y + slope * (sigmas[i + 1] - sigmas[i])
            y = moved
        return y

    return run


def k_diffusion(name: str, model: Model, x: Tensor, steps: int) -> Run:
    """Its sampler, without a progress bar; it hands a level for every picture to the denoiser."""
    from k_diffusion import sampling as loops

    denoiser, sigmas, start = levels(model, x, steps)
    sampler = getattr(loops, name)
    return lambda: sampler(lambda y, sigma: denoiser(y, sigma[0]), start, sigmas, disable=True)


Loop = Callable[[Model, Tensor, int], Run]
LOOPS: dict[str, tuple[Loop, dict[str, Loop]]] = {
    "DDIM": (our_ddim, {"diffusers": diffusers_ddim}),
    "DDPM": (our_ddpm, {"diffusers": diffusers_ddpm}),
    "Euler": (
        partial(our_sigmas, sample_euler),
        {
            "diffusers": partial(diffusers_sigmas, "Euler"),
            "k-diffusion": partial(k_diffusion, "sample_euler"),
            "plain loop": partial(plain_loop, False),
        },
    ),
    "Heun": (
        partial(our_sigmas, sample_heun),
        {
            "diffusers": partial(diffusers_sigmas, "Heun"),
            "k-diffusion": partial(k_diffusion, "sample_heun"),
            "plain loop": partial(plain_loop, True),
        },
    ),
    "RDDM": (our_residual, {"diffusers": partial(diffusers_ddim, spacing="trailing")}),
}
"""A sampler's name, our loop, and its peers' loops: `(model, noise, steps) -> run` that gives the pictures."""


@race(
    "Sampling loops: the same network, the same noise, the same times",
    "Nearly all of the time is the network's, so all loops are close to its bare calls; what is left of ours is a few "
    "multiplications of the picture and of numbers a step, and a look whether the answer is finite, which shows on the small "
    "network only.",
)
def sampling(quick: bool) -> Iterator[Heat]:
    """Equal pictures to 1e-5 of the largest value; times are those of one network call."""
    for name, ours, peers, model, x, steps, calls, told in _loops(quick):
        loops = {"sfumato": ours, **peers}
        yield Heat(
            f"{name}, {told}", {key: partial(loop, model, x, steps) for key, loop in loops.items()}, per=calls, memory=False
        )


@race(
    "Sampling loops over the bare network: what a loop of ours costs beyond the calls that it cannot do without",
    "A few multiplications of the picture and of numbers a step, and a look whether the answer is finite. The limit is the 3 % "
    "that we aim at for a network of a usual size; the small one, 1 ms a call and less, has none.",
)
def sampling_overhead(quick: bool) -> Iterator[Heat]:
    """The bare calls give no picture, so the lanes are free to differ."""
    for name, ours, _, model, x, steps, calls, told in _loops(quick):
        lanes = {"sfumato": partial(ours, model, x, steps), "network alone": partial(bare_calls, model, x, calls)}
        limit = 1.03 if x.shape[-1] >= 32 else None
        yield Heat(f"{name}, {told}", lanes, per=calls, free=("network alone",), limit=limit, memory=False)


def _loops(quick: bool) -> Iterator[tuple[str, Loop, dict[str, Loop], Model, Tensor, int, int, str]]:
    """Every loop on a network of a usual size and on a small one, with its steps and network calls."""
    steps = 5 if quick else 20
    for size, width in ((8, 8),) if quick else ((32, 32), (8, 8)):
        model, x = network(size, width)
        for name, (ours, peers) in LOOPS.items():
            calls = 2 * steps - 1 if name == "Heun" else steps
            yield name, ours, peers, model, x, steps, calls, f"{calls} calls, 4 pictures of {size} pixels, width {width}"
