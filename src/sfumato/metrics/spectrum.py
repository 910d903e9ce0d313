"""How much an image varies at each scale: power averaged over rings of equal frequency.

    P(r) = mean over ring r of |F(x - x̄)|² / (H W),   f = sqrt(f_y² + f_x²) in cycles a pixel, up to 0.5

The mean, f = 0, and whatever lies beyond 0.5 (the corners of the Fourier plane) belong to no ring.

>>> import torch
>>> from sfumato.metrics import band_energy, radial_spectrum
>>> noise = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
>>> power = radial_spectrum(noise, bins=4)
>>> power.shape, bool((power.mean(0) - 1).abs().max() < 0.1)
(torch.Size([64, 4]), True)
>>> band_energy(0.5 * noise, noise, 0.25).mean()
tensor(0.2500)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting


def radial_spectrum(x: Tensor, *, bins: int) -> Tensor:
    """Mean power in rings of equal width between 0 and 0.5 cycles a pixel.

    White noise of variance s² has power s² in every ring.

    Args:
        x: `[B, C, H, W]` or `[B, H, W]`, real or bool (such as a mask: True = 1).
        bins: number of rings; ring r covers `[r, r + 1) * 0.5 / bins`, the last one closed above.

    Returns:
        `[B, bins]`, averaged over channels; 0 for a ring that holds no frequency of this size.

    Raises:
        BadSetting: fewer than one ring.
    """
    if bins < 1:
        raise BadSetting(f"a spectrum needs at least one ring, not bins={bins}")
    power, frequency = _power(x)
    ring = (frequency * (2 * bins)).long().clamp_(max=bins - 1)
    inside = ((frequency > 0) & (frequency <= 0.5)).to(power.dtype)
    empty = power.new_zeros(bins)
    count = empty.scatter_add(0, ring, inside)
    total = power.new_zeros(len(power), bins).scatter_add(1, ring.expand(len(power), -1), power * inside)
    return total / count.clamp(min=1)


def band_energy(x: Tensor, ref: Tensor, low: float, *, high: float = 0.5) -> Tensor:
    """Energy of `x` in a band of frequencies, as a multiple of the reference's.

    Args:
        x: `[B, C, H, W]` or `[B, H, W]`.
        ref: of the same shape: what it should be.
        low: from this frequency on, cycles a pixel.
        high: up to and without this one (0.5 includes itself).

    Returns:
        `[B]`: 1 as much as the reference, 0 nothing left.

    Raises:
        BadSetting: not `0 <= low < high`.
        BadData: unlike shapes, or a band that holds no frequency of this size.
    """
    if not 0 <= low < high:
        raise BadSetting(f"a band needs 0 <= low < high, not {low} and {high}")
    if x.shape != ref.shape:
        raise BadData(f"shapes {list(x.shape)} and {list(ref.shape)} differ")
    power, frequency = _power(x)
    band = (frequency >= low) & ((frequency < high) | (frequency == high) & (high == 0.5))
    if not band.any():
        raise BadData(f"an image of {x.shape[-2]} x {x.shape[-1]} has no frequency from {low} to {high} cycles a pixel")
    of_ref = (_power(ref)[0] * band).sum(1)
    return (power * band).sum(1) / of_ref.clamp(min=torch.finfo(power.dtype).tiny)


def _power(x: Tensor) -> tuple[Tensor, Tensor]:
    """Power of each frequency `[B, H * W]`, mean over channels, and its distance from 0 `[H * W]` in cycles a pixel."""
    if x.ndim == 3:
        x = x[:, None]
    height, width = x.shape[-2:]
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    x = x - x.mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(1).flatten(1)
    fy = torch.fft.fftfreq(height, device=x.device, dtype=power.dtype)[:, None]
    fx = torch.fft.fftfreq(width, device=x.device, dtype=power.dtype)
    return power, (fy.square() + fx.square()).sqrt().flatten()
