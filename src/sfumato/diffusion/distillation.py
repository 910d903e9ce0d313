"""A diffusion model distilled to a few steps: one pass of the encoder for all of them, and what such a student learns from.

    (h, skips) = encode(z, t_1),    ε_k = decode(h, skips, e(t_k)),  k = 1 ... K, all in one batch
    z_0 = A z + Σ_k B_k ε_k,        A = √(abar_end / abar_1),    B_k = √abar_end (sigma_{k+1} - sigma_k)       (DDIM's updates)
    VSD:  ∂L / ∂z_0 ∝ (1 - abar_t) (ε_teacher - ε_fake) at noisy z_0;    fake score:  L = mean abar_t |ε_fake - ε|²

No decoder waits for another, since none sees the picture that the one before it made: K steps take little longer than one
where the device is not busy with one. Networks are diffusers' UNet2DModel and UNet2DConditionModel, a person's own too.

Sources: Li et al., "One-Way Ticket: Time-Independent Unified Encoder for Distilling Text-to-Image Diffusion Models", CVPR 2025
(shared encoder, KL of the noise maps); Wang et al., "ProlificDreamer", NeurIPS 2023 (VSD); Nguyen, Tran, "SwiftBrush", CVPR 2024
(VSD for a student); Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021.

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule, noise_kl, shared_encoder_sample
>>> from sfumato.nn import small_unet
>>> net, z = small_unet(8, 1, width=8, mults=(1, 2)).eval(), torch.randn(3, 1, 8, 8)
>>> with torch.no_grad():
...     drawn = shared_encoder_sample(net, z, None, Schedule(beta_schedule()), steps=4)
>>> drawn.x0.shape, drawn.eps.shape  # the pictures, and four noise maps for each
(torch.Size([3, 1, 8, 8]), torch.Size([4, 3, 1, 8, 8]))
>>> bool(noise_kl(drawn.eps.flatten(0, 1)) > 0)
True
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.diffusion.finite import FiniteTrajectory
from sfumato.diffusion.guidance import classifier_free_guidance, drop_condition
from sfumato.diffusion.predictions import as_denoiser, convert, read_schedule
from sfumato.diffusion.samplers import ddim_mean, ddim_times
from sfumato.diffusion.schedules import Schedule, expand
from sfumato.diffusion.training import denoising_loss
from sfumato.errors import BadData, BadSetting
from sfumato.losses.divergences import gaussian_kl
from sfumato.nn.unet import unet_decode, unet_embed, unet_encode

Model = Callable[..., Any]
"""`model(x_t, t)`, or `model(x_t, t, cond)` where there is a condition; gives a tensor, or one as `.sample`, as diffusers do."""


class SharedEncoderSample(NamedTuple):
    """The pictures `[B, ...]`, and the noise that each decoder found, `[K, B, ...]`."""

    x0: Tensor
    eps: Tensor


def shared_encoder_sample(
    unet: Any,
    z: Tensor,
    cond: Tensor | None,
    schedule: Schedule | Any,
    steps: int = 4,
    *,
    parallel: bool = True,
    times: Sequence[int] | None = None,
    predict: str | None = None,
) -> SharedEncoderSample:
    """Pictures from K decoders over one pass of the encoder, put together as DDIM would.

    Gradients flow through all of it, for training; to draw pictures call it in eval mode and without gradients.

    Args:
        unet: diffusers' UNet2DModel or UNet2DConditionModel, trained to be used so.
        z: standard normal, `[B, C, H, W]`.
        cond: class numbers `[B]` or states to attend to `[B, L, D]` (see `sfumato.nn.unet_encode`); None: neither.
        schedule: the tables that it was trained with: then the last step goes to the clean picture. Or a scheduler of diffusers:
            then its spacing, its last step and its kind of prediction hold.
        steps: decoders (K).
        parallel: all decoders in one batch; False: one after the other, the same pictures with less memory.
        times: the K times instead, noisiest first; `steps` is not looked at. The paper's first one keeps a quarter of the
            signal: the less it keeps, the more every error of the network counts in the picture.
        predict: what the network gives; None: what the scheduler says, else "eps".

    Returns:
        Pictures and noise maps.

    Raises:
        BadSetting: times that do not fall, or are not the schedule's; a network that cannot be cut, or that lacks its condition.
        Diverged: samples are not finite (looked at only where no gradient is taken).
    """
    tables, kind = read_schedule(schedule, predict)
    found, end = _times(schedule, tables, steps, times)
    count, batch = len(found), len(z)
    h, skips, _ = unet_encode(unet, z, torch.tensor(found[0], device=z.device), cond=cond)
    t = torch.tensor(found, device=z.device).repeat_interleave(batch)  # [t_1] * B, [t_2] * B, ...
    states = None if cond is None else _repeat(cond, count)
    temb = unet_embed(unet, t, cond=states, dtype=z.dtype)
    if parallel:
        out = unet_decode(unet, _repeat(h, count), tuple(_repeat(s, count) for s in skips), temb, cond=states)
    else:
        out = torch.cat([unet_decode(unet, h, skips, e, cond=cond) for e in temb.split(batch)])
    x, maps, watch = z, list[Tensor](), FiniteTrajectory(z, count)
    for k, (answer, here) in enumerate(zip(out.split(batch), found, strict=True)):
        x0, eps = (convert(watch(k, answer), x, here, tables, source=kind, target=target) for target in ("x0", "eps"))
        x, _ = ddim_mean(x0, eps, here, found[k + 1] if k + 1 < count else end, tables)
        maps.append(eps)
    if not torch.is_grad_enabled():  # a training looks at its loss, and waits for no device here
        x = watch.end(x)
    return SharedEncoderSample(x, torch.stack(maps))


def ddim_coefficients(schedule: Schedule, timesteps: Sequence[int] | Tensor, *, end: int | None = None) -> tuple[Tensor, Tensor]:
    """What DDIM without added noise makes of given noise predictions: z_0 = A z + Σ B_k ε_k.

    Args:
        schedule: its tables.
        timesteps: `[K]`, noisiest first.
        end: the time that the last step leads to; None: the clean picture (Stable Diffusion: 0).

    Returns:
        A, a scalar, and B `[K]`, float64.

    Raises:
        BadSetting: times that do not fall, or are not the schedule's.
    """
    times = [int(t) for t in timesteps]
    _check_times(times, schedule)
    last = schedule.abar.new_ones(()) if end is None else schedule.abar[end]
    sigma = torch.cat([schedule.sigma[times], (1 / last - 1).sqrt()[None]])
    return (last / schedule.abar[times[0]]).sqrt(), last.sqrt() * sigma.diff()


def vsd_loss(
    x0: Tensor,
    teacher: Model,
    fake: Model,
    schedule: Schedule | Any,
    t: Tensor,
    noise: Tensor,
    *,
    cond: Tensor | None = None,
    null: Tensor | None = None,
    guidance: float = 4.5,
    predict: str | None = None,
) -> Tensor:
    """Variational score distillation: moves a student's pictures from where it draws too many to where the teacher would.

    Args:
        x0: the student's pictures `[B, ...]`, with gradient.
        teacher: knows the score of the data; neither it nor `fake` gets a gradient.
        fake: knows the score of the student's pictures (see `fake_score_loss`).
        schedule: their tables, or a scheduler of diffusers.
        t: `[B]` int64, the times at which scores are compared.
        noise: standard normal, like `x0`.
        cond: what the pictures are of, `[B, ...]`.
        null: the condition that says nothing, like `cond` or `[1, ...]`; None: no guidance.
        guidance: scale of classifier-free guidance of both networks, where `null` is given; 1: none.
        predict: what they give; None: what the scheduler says, else "eps".

    Returns:
        A scalar: half the mean square of g = (1 - abar_t) (ε_teacher - ε_fake); its gradient with respect to `x0` is g over the
        number of values in `x0`. Where g is no number it counts as 0.

    Raises:
        BadSetting: a `null` without a `cond`.
    """
    if null is not None and cond is None:
        raise BadSetting("null is what guidance leads away from: give cond too, what it leads to")
    tables, kind = read_schedule(schedule, predict)
    x = x0.detach()
    with torch.no_grad():
        x_t = tables.q_sample(x, t, noise)
        wanted, there = (_eps(net, tables, kind, cond, null, guidance)(x_t, t) for net in (teacher, fake))
        g = torch.nan_to_num((1 - expand(tables.abar, t, x)) * (wanted - there))
    return (x0 - (x - g)).square().mean() / 2


def fake_score_loss(
    x0: Tensor,
    fake: Model,
    schedule: Schedule | Any,
    t: Tensor,
    noise: Tensor,
    *,
    cond: Tensor | None = None,
    null: Tensor | None = None,
    drop: float = 0.1,
    weighted: bool = True,
    predict: str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Denoising of the student's own pictures: what keeps the fake score at what the student draws now.

    Args:
        x0: the student's pictures `[B, ...]`; no gradient goes to them.
        fake, schedule, cond, predict: as for `vsd_loss`.
        t: `[B]` int64.
        noise: standard normal, like `x0`.
        null: as for `vsd_loss`; None: `cond` is never dropped.
        drop: share of the conditions that `null` takes the place of.
        weighted: times abar_t, as the authors have it; False: the plain error (ProlificDreamer), with which a small fake score
            follows sooner at noisy times.
        generator: source of which.

    Returns:
        A scalar: the mean of abar_t |ε_fake - ε|², or of |ε_fake - ε|².
    """
    tables, kind = read_schedule(schedule, predict)
    if null is not None and cond is not None:
        cond = drop_condition(cond, null, drop, generator=generator)
    errors = denoising_loss(_eps(fake, tables, kind, cond), x0.detach(), t, noise, tables, reduction="none")
    return (expand(tables.abar, t, errors) * errors if weighted else errors).mean()


def noise_kl(eps: Tensor, *, reduction: str = "sum") -> Tensor:
    """How far the numbers of each predicted noise map are from N(0, 1), by their mean and variance alone.

    Args:
        eps: `[N, ...]`, N maps; those of `shared_encoder_sample` as `eps.flatten(0, 1)`.
        reduction: over the maps: "sum" (as the paper weighs it: by 0.1), "mean" or "none".

    Returns:
        A scalar, or `[N]`, in float32 at least; near 1 / n for true noise of n numbers a map.

    Raises:
        BadData: maps of a single number, which have no variance.
    """
    rows = eps.flatten(1).to(torch.promote_types(eps.dtype, torch.float32))
    if rows.shape[1] < 2:
        raise BadData(f"noise maps need two numbers or more each, these are {list(eps.shape)}: the first dimension counts maps")
    return gaussian_kl(rows.mean(1), rows.var(1), reduction=reduction)


def _eps(
    model: Model, tables: Schedule, kind: str, cond: Tensor | None, null: Tensor | None = None, guidance: float = 1.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """A network as a predictor of noise, its condition filled in."""
    if cond is None:
        return as_denoiser(model, tables, predict=kind, face="eps")
    return as_denoiser(classifier_free_guidance(model, cond, null, scale=guidance), tables, predict=kind, face="eps")


def _times(schedule: Schedule | Any, tables: Schedule, steps: int, times: Sequence[int] | None) -> tuple[list[int], int | None]:
    """The decoders' times, and the time that the last of them leads to."""
    end: int | None = None
    if isinstance(schedule, Schedule):
        found = ddim_times(tables, steps) if times is None else [int(t) for t in times]
    else:
        scheduler = copy.deepcopy(schedule)  # its own times are a person's
        if times is None:
            scheduler.set_timesteps(steps)
        found = [int(t) for t in (scheduler.timesteps if times is None else times)]
        end = None if scheduler.config.get("set_alpha_to_one", True) else 0
    _check_times(found, tables)
    return found, end


def _check_times(times: Sequence[int], schedule: Schedule) -> None:
    falling = all(a > b for a, b in itertools.pairwise(times))
    if not times or not falling or not 0 <= times[-1] <= times[0] < len(schedule):
        raise BadSetting(f"the times of the decoders must fall within {len(schedule) - 1} to 0, not be {list(times)}")


def _repeat(x: Tensor, count: int) -> Tensor:
    """`[count * B, ...]`: the whole batch, then again."""
    return x.expand(count, *x.shape).flatten(0, 1)
