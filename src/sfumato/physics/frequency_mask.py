"""Take frequencies out of a picture.

    y = clamp( Re F⁻¹( (1 - m) F(x) ), 0, 1 )        m = 1 at hidden frequencies

Computed on the half of the plane that a real picture needs. Without the clamp it is a projection and its own adjoint for every
mask that hides k and -k together, and what two complementary masks leave adds up to the picture.

Source: "Masked Frequency Modeling for Self-Supervised Visual Pre-Training", ICLR 2023, arXiv 2206.07706, section 3.2.

>>> import torch
>>> from sfumato.masks import frequency_disc
>>> from sfumato.physics import apply_frequency_mask
>>> x, hidden = torch.rand(2, 3, 32, 32), frequency_disc(32, 5)
>>> low, high = (apply_frequency_mask(x, m, clamp=None) for m in (hidden, ~hidden))
>>> torch.allclose(low + high, x, atol=1e-6)
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadData
from sfumato.masks.frequency import half_plane


def apply_frequency_mask(x: Tensor, hidden: Tensor, clamp: tuple[float, float] | None = (0.0, 1.0)) -> Tensor:
    """Remove the hidden frequencies.

    Args:
        x: `[B, C, H, W]`, real; less than single precision is computed in single.
        hidden: `[H, W]` or `[B, H, W]` bool, centred, True = removed. If only one of k and -k is hidden, half of both goes: the
            real part of the filtered picture.
        clamp: smallest and largest value of the result; None: as it comes.

    Returns:
        Like `x`.

    Raises:
        BadData: a mask of another size.

    Reference:
        MFM, section 3.2.
    """
    if hidden.shape[-2:] != x.shape[-2:] or hidden.ndim not in (2, 3) or (hidden.ndim == 3 and len(hidden) not in (1, len(x))):
        raise BadData(
            f"a mask of frequencies {tuple(hidden.shape)} does not fit pictures {tuple(x.shape)}: say [H, W] or [B, H, W]"
        )
    kept = half_plane(~hidden)
    picture = x if x.dtype == torch.float64 else x.float()
    spectrum = torch.fft.rfft2(picture) * (kept if hidden.ndim == 2 else kept[:, None])
    filtered: Tensor = torch.fft.irfft2(spectrum, s=x.shape[-2:])
    return (filtered if clamp is None else filtered.clamp(*clamp)).to(x.dtype)
