"""Blurs and noises as cameras, lenses and sloppy software make them, drawn at random: the pieces of a blind degradation.

    Gaussian  exp(-½ q^β)      plateau  1 / (1 + q^β)      sinc  ω J₁(ω r) / (2 π r)        each divided by its sum
    q = (x' / σ₁)² + (y' / σ₂)²,   (x', y') the place turned by a random angle;  r² = x² + y²

An isotropic kernel has σ₁ = σ₂, a plain Gaussian β = 1. The sinc filter is an ideal low-pass: it rings.

Source: Wang et al. 2021, "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data", ICCV Workshops,
sections 3.1 and 3.3. The ranges are those of its released settings.

>>> import torch
>>> from sfumato.physics import gaussian_or_poisson_noise, random_blur_kernel
>>> g = torch.Generator().manual_seed(0)
>>> kernel = random_blur_kernel("plateau_aniso", 11, generator=g)
>>> kernel.shape, round(kernel.sum().item(), 5)
(torch.Size([11, 11]), 1.0)
>>> gaussian_or_poisson_noise(torch.rand(4, 3, 8, 8, generator=g), generator=g).shape
torch.Size([4, 3, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sfumato.errors import BadSetting
from sfumato.masks.random_masks import uniform

BLUR_KINDS = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso", "sinc")
REAL_ESRGAN_BLURS: dict[str, float] = dict(zip(BLUR_KINDS, (0.405, 0.225, 0.108, 0.027, 0.108, 0.027, 0.1)))
"""Probabilities of the kinds: 0.45, 0.25, 0.12, 0.03, 0.12, 0.03, and one kernel in ten a sinc."""

Range = tuple[float, float]
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def random_blur_kernels(
    batch: int,
    *,
    kinds: Mapping[str, float] = REAL_ESRGAN_BLURS,
    sizes: Sequence[int] = range(7, 22, 2),
    sigma: Range = (0.2, 3.0),
    beta: Range = (0.5, 4.0),
    plateau_beta: Range = (1.0, 2.0),
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Blur kernels, each of a kind, size and shape of its own, padded with zeros to the largest size.

    Args:
        batch: number of kernels.
        kinds: how likely each kind is, out of `BLUR_KINDS`.
        sizes: odd sides in pixels, equally likely.
        sigma: widths in pixels, uniform.
        beta: exponents of generalised Gaussians; half of them lie below 1 and half above.
        plateau_beta: exponents of plateaus, likewise.
        device: of the kernels; None: the generator's.
        generator: source of the draws.

    Returns:
        `[B, s, s]` with s the largest size; each sums to 1, is centred, and equal to itself turned by half a turn.

    Raises:
        BadSetting: an unknown kind, or an even size.

    Reference:
        Wang et al. 2021, sections 3.1 and 3.3.
    """
    if unknown := set(kinds) - set(BLUR_KINDS):
        raise BadSetting(f"blur {sorted(unknown)[0]!r} is not known: {', '.join(BLUR_KINDS)}")
    if not sizes or any(s < 1 or s % 2 == 0 for s in sizes):
        raise BadSetting(f"kernels need odd sizes, not {list(sizes)}: their middle is a pixel")
    u = uniform((9, batch), device=device, generator=generator)
    names, shares = list(kinds), u.new_tensor(list(kinds.values())).cumsum(0)
    which = torch.searchsorted(shares, u[0] * shares[-1], right=True).clamp(max=len(names) - 1)
    size = u.new_tensor(list(sizes))[(u[1] * len(sizes)).long()]
    width = sigma[0] + u[2:4] * (sigma[1] - sigma[0])
    angle = (2 * u[4] - 1) * math.pi
    cutoff = _between(torch.where(size < 13, math.pi / 3, math.pi / 5), math.pi, u[5])

    def of_kind(wanted: str) -> Tensor:
        return u.new_tensor([wanted in name for name in names], dtype=torch.bool)[which]

    plateau, sinc = of_kind("plateau"), of_kind("sinc")
    width = torch.stack((width[0], torch.where(of_kind("aniso"), width[1], width[0])))
    exponent = torch.where(of_kind("generalised"), _around_one(beta, u[6], u[7]), 1.0)
    exponent = torch.where(plateau, _around_one(plateau_beta, u[6], u[7]), exponent)[:, None, None]
    line = torch.arange(max(sizes), device=u.device, dtype=u.dtype) - max(sizes) // 2
    q = _mahalanobis(line, width, angle).pow(exponent)
    kernel = torch.where(plateau[:, None, None], 1 / (1 + q), torch.exp(-q / 2))
    kernel = torch.where(sinc[:, None, None], _sinc(line, cutoff), kernel)
    inside = line.abs() <= (size[:, None] - 1) / 2
    kernel = kernel * inside[:, :, None] * inside[:, None, :]
    return kernel / kernel.sum((1, 2), keepdim=True)


def random_blur_kernel(
    kind: str,
    size: int,
    *,
    sigma: Range = (0.2, 3.0),
    beta: Range = (0.5, 4.0),
    plateau_beta: Range = (1.0, 2.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """One blur kernel of a kind, `[size, size]`; arguments as for `random_blur_kernels`."""
    return random_blur_kernels(
        1, kinds={kind: 1.0}, sizes=(size,), sigma=sigma, beta=beta, plateau_beta=plateau_beta, generator=generator
    )[0]


def gaussian_or_poisson_noise(
    x: Tensor,
    *,
    gaussian_share: float = 0.5,
    sigma: Range = (1 / 255, 30 / 255),
    poisson_scale: Range = (0.05, 3.0),
    gray_share: float = 0.4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise of a kind, strength and colour of its own on every picture, clamped to [0, 1].

    Shot noise counts photons: a picture of n different 8-bit values is taken as 2^ceil(log2 n) photons at full brightness, and
    its noise is multiplied by the scale.

    Args:
        x: `[B, C, H, W]` in [0, 1], C 1 or 3.
        gaussian_share: probability of Gaussian noise, else Poisson's.
        sigma: standard deviation of the Gaussian, uniform.
        poisson_scale: factor of the shot noise, uniform.
        gray_share: probability that all channels get the same noise.
        generator: source of the draws, on the pictures' device.

    Returns:
        Like `x`.

    Reference:
        Wang et al. 2021, section 3.1.
    """
    gaussian, strength, gray = uniform((3, len(x), 1, 1, 1), device=x.device, generator=generator).to(x.dtype)
    one_for_all = gray < gray_share
    white = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    white = torch.where(one_for_all, white[:, :1], white)
    shot = torch.where(one_for_all, _shot_noise(_gray(x), generator), _shot_noise(x, generator))
    noise = torch.where(gaussian < gaussian_share, _between(*sigma, strength) * white, _between(*poisson_scale, strength) * shot)
    return (x + noise).clamp(0, 1)


def _shot_noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """`Poisson(x n) / n - x` of the picture rounded to 8 bits."""
    level = (x.clamp(0, 1) * 255).round()
    seen = level.new_zeros(len(x), 256).scatter_(1, level.flatten(1).long(), 1.0).sum(1)
    photons = seen.log2().ceil().exp2().view(-1, 1, 1, 1)
    rounded = level / 255
    return torch.poisson(rounded * photons, generator=generator) / photons - rounded


def _gray(x: Tensor) -> Tensor:
    return torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMA)).unsqueeze(1) if x.shape[1] == 3 else x.mean(1, keepdim=True)


def _between(low: Tensor | float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u


def _around_one(limits: Range, side: Tensor, u: Tensor) -> Tensor:
    """Uniform below 1 or uniform above 1, equally likely."""
    return torch.where(side < 0.5, _between(limits[0], 1.0, u), _between(1.0, limits[1], u))


def _mahalanobis(line: Tensor, width: Tensor, angle: Tensor) -> Tensor:
    """q at every place, `[B, s, s]`."""
    y, x = line[:, None], line
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return ((cos * x + sin * y) / width[0, :, None, None]).square() + ((cos * y - sin * x) / width[1, :, None, None]).square()


def _sinc(line: Tensor, cutoff: Tensor) -> Tensor:
    """The impulse response of a circular low-pass, `[B, s, s]`; `ω² / 4π` in the middle."""
    r = (line[:, None].square() + line.square()).sqrt()
    w = cutoff[:, None, None]
    away = w * torch.special.bessel_j1(w * r) / (2 * math.pi * r.clamp(min=1e-6))
    return torch.where(r == 0, w.square() / (4 * math.pi), away)
