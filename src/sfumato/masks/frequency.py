"""Hide frequencies of a picture instead of places: all that lies outside a disc of its spectrum, or the disc.

    low-pass:   hidden where  radius² ≤ u² + v² < outer²         u, v in cycles a picture
    high-pass:  hidden elsewhere

Masks of frequencies are centred, as `torch.fft.fftshift` leaves a spectrum: frequency 0 stands at (H // 2, W // 2). Bool,
True = hidden. Real pictures have F(-k) = conj F(k), so half of the plane says everything: `half_plane` brings a map there.

Source: "Masked Frequency Modeling for Self-Supervised Visual Pre-Training", ICLR 2023, arXiv 2206.07706, section 3.

>>> import torch
>>> from sfumato.masks import frequency_disc, random_frequency_mask
>>> frequency_disc(5, 2).int()  # the low-pass keeps what is nearer to the centre than 2
tensor([[1, 1, 1, 1, 1],
        [1, 0, 0, 0, 1],
        [1, 0, 0, 0, 1],
        [1, 0, 0, 0, 1],
        [1, 1, 1, 1, 1]], dtype=torch.int32)
>>> hidden = random_frequency_mask(64, (32, 48), 5, generator=torch.Generator().manual_seed(0))
>>> hidden.shape, int(hidden[:, 16, 24].sum())  # high-passes hide frequency 0
(torch.Size([64, 32, 48]), 29)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadSetting
from sfumato.masks.random_masks import Grid, grid_shape, uniform


def frequency_disc(size: Grid, radius: float, outer: float | None = None, *, device: torch.device | str | None = None) -> Tensor:
    """What a low-pass removes: the frequencies at `radius` and beyond, up to `outer`.

    Args:
        size: pixels along each side of the picture.
        radius: in cycles a picture, along both sides alike; 0 hides everything.
        outer: frequencies from here on are kept again; None: none.
        device: of the mask.

    Returns:
        `[H, W]` bool, centred, True = hidden.

    Raises:
        BadSetting: a negative radius, or an outer one that is not larger.
    """
    if radius < 0 or (outer is not None and outer <= radius):
        raise BadSetting(f"a low-pass hides from a radius of 0 or more up to a larger one, not from {radius:g} to {outer}")
    height, width = grid_shape(size)
    v, u = (torch.arange(n, device=device) - n // 2 for n in (height, width))
    distance = v[:, None].square() + u.square()
    hidden = distance >= radius**2
    return hidden if outer is None else hidden & (distance < outer**2)


def random_frequency_mask(
    batch: int,
    size: Grid,
    radius: float,
    low_pass_share: float = 0.5,
    *,
    outer: float | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide the high frequencies of some pictures and the low ones of the others, each drawn by itself.

    Args:
        batch: number of masks.
        size: pixels along each side of the picture.
        radius: as for `frequency_disc`.
        low_pass_share: probability of a low-pass, 0 to 1.
        outer: as for `frequency_disc`.
        device: of the mask; None: the generator's.
        generator: source of the draw.

    Returns:
        `[B, H, W]` bool, centred, True = hidden.

    Raises:
        BadSetting: a share outside of [0, 1], or radii that do not fit.

    Reference:
        MFM, section 3.2; official `data_mfm`.
    """
    if not 0 <= low_pass_share <= 1:
        raise BadSetting(f"low_pass_share={low_pass_share} must lie between 0 (only high-passes) and 1 (only low-passes)")
    high_pass = uniform((batch, 1, 1), device=device, generator=generator) >= low_pass_share
    return frequency_disc(size, radius, outer, device=high_pass.device) ^ high_pass


def half_plane(centred: Tensor) -> Tensor:
    """A centred map of all frequencies at those that `torch.fft.rfft2` gives, averaged over k and -k.

    For a real picture x with spectrum F and any map m: `Re ifft2(m F) = irfft2(half_plane(m) rfft2(x))`, exactly, because
    F(-k) is the conjugate of F(k). The average is m itself where m is symmetric, as discs are.

    Args:
        centred: `[..., H, W]`, numbers or bool (True = 1).

    Returns:
        `[..., H, W // 2 + 1]`, float.
    """
    plain = torch.fft.ifftshift(centred, (-2, -1))
    mirrored = plain.flip(-2, -1).roll((1, 1), (-2, -1))
    columns = centred.shape[-1] // 2 + 1
    kind = centred.dtype if centred.is_floating_point() else torch.get_default_dtype()
    return (plain[..., :columns].to(kind) + mirrored[..., :columns].to(kind)) / 2


def whole_plane(half: Tensor, width: int) -> Tensor:
    """The centred map of all frequencies from the half that `torch.fft.rfft2` gives, with equal values at k and -k.

    Args:
        half: `[..., H, W // 2 + 1]`.
        width: W of the picture, which the half does not tell.

    Returns:
        `[..., H, W]`; where values at k and -k are equal, `whole_plane(half_plane(m), W)` is m.
    """
    right = half[..., 1 : width - half.shape[-1] + 1].flip(-2, -1).roll(1, -2)
    return torch.fft.fftshift(torch.cat((half, right), -1), (-2, -1))
