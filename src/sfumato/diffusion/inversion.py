"""From a picture back to the noise that it is drawn from.

    DDIM:  x_t = sqrt(abar_t) x̂_0 + sqrt(1 - abar_t) ε̂,    x̂_0 and ε̂ from x_p, one step less noisy
    DDPM:  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) ε_t with independent ε_t,    z_t = (x_p - mean(x_t)) / s_t

The first gives one x_T and is close; the second gives x_T and the noise of every step, and draws the picture again exactly.

Sources: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, section 4.3; Huberman-Spiegelglas, Kulikov,
Michaeli, "An Edit Friendly DDPM Noise Space: Inversion and Manipulations", CVPR 2024.

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule, ddpm_invert, sample_ddim
>>> schedule, model = Schedule(beta_schedule("linear")), lambda x, t: 0.5 * x
>>> x0 = torch.rand(2, 1, 4, 4)
>>> x_T, z = ddpm_invert(model, x0, schedule, steps=10)
>>> again = sample_ddim(model, x_T, schedule, steps=10, eta=1.0, noise=z)
>>> torch.allclose(again, x0, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.diffusion.predictions import convert
from sfumato.diffusion.samplers import ddim_mean, ddim_times
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadSetting

Model = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def ddim_invert(
    model: Model, x0: Tensor, schedule: Schedule, *, steps: int = 50, predict: str = "eps", corrections: int = 0
) -> Tensor:
    """The x_T from which `sample_ddim` with `eta=0` and as many steps draws nearly `x0`.

    Args:
        model: `model(x_t, t)` with t `[B]` int64.
        x0: pictures in the range of the model, `[B, ...]`.
        schedule: the tables that the model was trained with.
        steps: steps of the sampler.
        predict: what the model predicts.
        corrections: network calls more a step, each at the x_t that was found last: a fixed-point iteration towards the exact
            inverse. 0: the usual inversion, one call a step.

    Returns:
        Like `x0`.

    Raises:
        BadSetting: more steps than times, or none; less than no corrections.
    """
    if corrections < 0:
        raise BadSetting(f"corrections={corrections} must be 0 or more")
    x, following = x0, None
    for t in reversed(ddim_times(schedule, steps)):
        x = _undo(model, x, t, following, schedule, predict, corrections + 1)
        following = t
    return x


@torch.no_grad()
def ddpm_invert(
    model: Model,
    x0: Tensor,
    schedule: Schedule,
    *,
    steps: int = 50,
    eta: float = 1.0,
    predict: str = "eps",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The x_T and the noise of every step from which `sample_ddim` with this `eta` draws `x0` again.

    Args:
        model, x0, schedule, steps, predict: as for `ddim_invert`.
        eta: of the sampler, above 0.
        noise: `[steps, B, ...]`, ε at every time, the noisiest first, instead of drawing it.
        generator: for the draws.

    Returns:
        x_T like `x0`, and z `[steps, B, ...]`, which is not white: it holds the picture. The last z is 0, the sampler adds none
        there; so the least noisy x is where the last step leads to `x0`, found by a fixed-point iteration. (Not with
        `predict="x0"`, where it does not converge: what is drawn then is the network's last guess.)

    Raises:
        BadSetting: more steps than times, or none; eta outside (0, 1].
    """
    if not 0 < eta <= 1:
        raise BadSetting(f"eta={eta} must be above 0 and at most 1: without noise there is none to solve for (use ddim_invert)")
    times = ddim_times(schedule, steps)
    if noise is None:
        device = x0.device if generator is None else generator.device
        noise = torch.randn((steps, *x0.shape), generator=generator, device=device, dtype=x0.dtype)
    noise = noise.to(x0)
    states = [schedule.q_sample(x0, t, e) for t, e in zip(times, noise, strict=True)]
    if predict != "x0":
        states[-1] = _undo(model, x0, times[-1], None, schedule, predict, FIXED_POINT)
    z = torch.zeros_like(noise)
    for i, (t, following) in enumerate(pairwise(times)):
        out = model(states[i], torch.full((len(x0),), t, device=x0.device))
        guess, eps = (convert(out, states[i], t, schedule, source=predict, target=kind) for kind in ("x0", "eps"))
        mean, var = ddim_mean(guess, eps, t, following, schedule, eta=eta)
        z[i] = (states[i + 1] - mean) / var.sqrt().to(x0.dtype)
    return states[0], z


FIXED_POINT = 8
"""Iterations for the least noisy state: each shrinks the error by about sqrt(1 - abar), a hundredth at time 0 of DDPM."""


def _undo(model: Model, x: Tensor, t: int, following: int | None, schedule: Schedule, predict: str, iterations: int) -> Tensor:
    """The x_t that a noiseless step from `t` takes to `x`, with ε̂ at the last guess of it (the first: `x` itself)."""
    signal = schedule.abar[t].sqrt().to(x.dtype)
    level = (1 - schedule.abar[t]).sqrt().to(x.dtype)
    before = schedule.abar.new_ones(()) if following is None else schedule.abar[following]
    x_t = x
    for _ in range(iterations):
        out = model(x_t, torch.full((len(x),), t, device=x.device))
        eps = convert(out, x_t, t, schedule, source=predict, target="eps")
        x0 = (x - (1 - before).sqrt().to(x.dtype) * eps) / before.sqrt().to(x.dtype)
        x_t = signal * x0 + level * eps
    return x_t
