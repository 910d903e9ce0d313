"""Errors counted in the Fourier plane: over all frequencies or the hidden ones, alike or with the largest counting most.

    loss = mean_k  w(k) · |F(pred) - F(target)|(k) ^ power,      F orthonormal, over each channel
    focal:  w = |ΔF|^α / max_k |ΔF|^α,   a constant for the gradient

MFM counts the modulus (power 1) over the hidden frequencies; the focal frequency loss weighs its square (power 2). Power 2
without a weight is the mean squared error of the pixels (Parseval). F is linear: one transform, of the difference, does, and
half of the plane.

Sources: "Masked Frequency Modeling for Self-Supervised Visual Pre-Training", ICLR 2023, arXiv 2206.07706, section 3.3; Jiang et
al. 2021, "Focal Frequency Loss for Image Reconstruction and Synthesis", ICCV, equation 8.

>>> import torch
>>> from sfumato.losses import frequency_loss
>>> from sfumato.masks import frequency_disc
>>> pred, target = torch.rand(2, 2, 3, 16, 16)
>>> torch.isclose(frequency_loss(pred, target, power=2), (pred - target).square().mean())
tensor(True)
>>> round(frequency_loss(pred, pred + 1, frequency_disc(16, 1)).item(), 5)  # they differ at frequency 0, which is not hidden
0.0
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.masks.frequency import half_plane, whole_plane

FLOOR = 1e-12
"""Added to |ΔF|² inside the root, whose slope is infinite at 0."""


def frequency_loss(
    pred: Tensor,
    target: Tensor,
    hidden: Tensor | None = None,
    *,
    power: float = 1.0,
    weight: str | None = None,
    alpha: float = 1.0,
    log: bool = False,
    patch_factor: int = 1,
    average: bool = False,
    batch_max: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Distance of two pictures' spectra.

    Args:
        pred: `[B, C, H, W]`, real; less than single precision is computed in single.
        target: like `pred`.
        hidden: `[h, w]` or `[B, h, w]` bool, centred, True = counted, for the size of a tile; None: all frequencies count.
        power: of |ΔF|, positive; below 2 a floor of 1e-6 under |ΔF| keeps the slope finite.
        weight: "focal", or None.
        alpha: of the focal weight; 0: none, larger: only the worst frequencies count.
        log: the focal weight from `log(1 + |ΔF|^alpha)`.
        patch_factor: cut pictures into so many tiles along each side, each with a spectrum of its own.
        average: average the spectra over the batch first.
        batch_max: divide the focal weight by the batch's maximum instead of each tile's and channel's own.
        reduction: "mean" over the (hidden) frequencies, channels and tiles, or "none".

    Returns:
        A scalar, 0 where nothing is hidden; with "none" `[B, tiles, C, h, w]`, centred, 0 where not hidden.

    Raises:
        BadSetting: an unknown weight or reduction, or a power that is not positive.
        BadData: shapes that do not fit.

    Reference:
        MFM, section 3.3; official `frequency_loss`.
    """
    if weight not in (None, "focal") or reduction not in ("mean", "none") or power <= 0:
        raise BadSetting(
            f"weight={weight!r} must be 'focal' or None, reduction={reduction!r} mean or none, power={power} above 0"
        )
    tiles = _tiles(_difference(pred, target), patch_factor)
    squared = _squared_modulus(tiles, average)
    error = squared if power == 2 else (squared + FLOOR).pow(power / 2)
    if weight == "focal":
        error = error * _focal_weight(squared.detach(), alpha, log, batch_max)
    size = tiles.shape[-2:]
    if hidden is not None:
        if hidden.shape[-2:] != size or hidden.ndim not in (2, 3):
            raise BadData(f"a mask of frequencies {tuple(hidden.shape)} does not fit spectra of {size[0]} x {size[1]}")
        hidden = hidden if hidden.ndim == 2 else hidden[:, None, None]
    if reduction == "none":
        whole = whole_plane(error, size[1])
        return whole if hidden is None else torch.where(hidden, whole, 0.0)
    counts = _columns(size[1], error).expand(error.shape[-2:])
    if hidden is not None:
        counts = counts * half_plane(hidden)
    total = error * counts
    entries = counts.sum() * (total.numel() // counts.numel())
    return total.sum() / entries.clamp(min=1.0)


def focal_frequency_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    log: bool = False,
    patch_factor: int = 1,
    average: bool = False,
    batch_max: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Squared distance of spectra, weighed by the distance itself: what a network finds hard counts most.

    Args:
        pred: `[B, C, H, W]`, real.
        target: like `pred`.
        alpha: see `frequency_loss`, as for all that follows.
        log: of the weight.
        patch_factor: tiles along each side.
        average: spectra over the batch.
        batch_max: one maximum for the batch.
        reduction: "mean" or "none".

    Returns:
        A scalar; with "none" `[B, tiles, C, h, w]`, centred.

    Reference:
        Jiang et al. 2021, equation 8; official `FocalFrequencyLoss`.
    """
    return frequency_loss(
        pred, target, power=2.0, weight="focal", alpha=alpha, log=log, patch_factor=patch_factor, average=average,
        batch_max=batch_max, reduction=reduction,
    )  # fmt: skip


def spectrum_l1(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the real and imaginary parts: `mean_k ½ (|Re ΔF| + |Im ΔF|)`.

    Args:
        pred: `[B, C, H, W]`, real.
        target: like `pred`.

    Returns:
        A scalar.
    """
    spectrum = torch.fft.rfft2(_difference(pred, target), norm="ortho")
    parts = torch.view_as_real(spectrum).abs().mean(-1)
    return (parts * _columns(pred.shape[-1], parts)).sum() / pred.numel()


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    """At least in single precision: half precision has too few digits for a spectrum."""
    if pred.shape != target.shape or pred.ndim != 4:
        raise BadData(
            f"a spectrum compares pictures [B, C, H, W] of one shape, not {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (pred, target))
    return a - b


def _tiles(x: Tensor, factor: int) -> Tensor:
    """`[B, factor², C, H / factor, W / factor]`, in raster order."""
    batch, channels, height, width = x.shape
    if factor < 1 or height % factor or width % factor:
        raise BadData(
            f"pictures of {height} x {width} cannot be cut into {factor} x {factor} equal tiles: patch_factor must divide both"
        )
    tiles = x.view(batch, channels, factor, height // factor, factor, width // factor).permute(0, 2, 4, 1, 3, 5)
    return tiles.flatten(1, 2)


def _squared_modulus(x: Tensor, average: bool) -> Tensor:
    spectrum = torch.fft.rfft2(x, norm="ortho")
    if average:
        spectrum = spectrum.mean(0, keepdim=True)
    return spectrum.real.square() + spectrum.imag.square()


def _focal_weight(squared: Tensor, alpha: float, log: bool, batch_max: bool) -> Tensor:
    """Between 0 and 1; 0 everywhere for equal spectra."""
    weight = squared.pow(alpha / 2)
    if log:
        weight = weight.log1p()
    largest = weight.max() if batch_max else weight.amax((-2, -1), keepdim=True)
    return weight / largest.clamp(min=torch.finfo(weight.dtype).tiny)


def _columns(width: int, like: Tensor) -> Tensor:
    """How many columns of the whole plane each column of the half stands for: 2, but 1 where k and -k share it."""
    counts = like.new_full((width // 2 + 1,), 2.0)
    counts[0] = 1.0
    if width % 2 == 0:
        counts[-1] = 1.0
    return counts
