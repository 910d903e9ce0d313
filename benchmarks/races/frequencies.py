"""Masked frequencies: the corruption of a batch of pictures, and the loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from sfumato.losses import frequency_loss
from sfumato.masks import frequency_disc, random_frequency_mask
from sfumato.physics import apply_frequency_mask


def low_passed(batch: int) -> Tensor:
    """Every other picture."""
    return torch.arange(batch) % 2 == 0


def masks(batch: int, size: int, radius: float) -> Tensor:
    """The masks that all lanes use: made once, or picture by picture in the loop."""
    return frequency_disc(size, radius) ^ ~low_passed(batch)[:, None, None]


def ours(x: Tensor, radius: float) -> Run:
    """The mask is part of the work, as in training; which picture is low-passed is given."""

    def run() -> Tensor:
        return apply_frequency_mask(x, masks(len(x), x.shape[-1], radius))

    return run


def whole_plane(x: Tensor, radius: float) -> Run:
    """One transform of the whole batch, over the whole plane."""

    def run() -> Tensor:
        kept = ~masks(len(x), x.shape[-1], radius)[:, None]
        spectrum = torch.fft.fftshift(torch.fft.fft2(x), (-2, -1)) * kept
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum, (-2, -1))).real.clamp(0, 1)

    return run


def picture_by_picture(x: Tensor, radius: float) -> Run:
    """A transform of a data loader: a mask and two transforms for each picture."""
    low = low_passed(len(x)).tolist()

    def run() -> Tensor:
        out = []
        for picture, is_low in zip(x, low):
            side = picture.shape[-1]
            v, u = torch.meshgrid(torch.arange(side) - side // 2, torch.arange(side) - side // 2, indexing="ij")
            kept = (v**2 + u**2 < radius**2) == is_low
            spectrum = torch.fft.fftshift(torch.fft.fft2(picture), (-2, -1)) * kept
            out.append(torch.fft.ifft2(torch.fft.ifftshift(spectrum, (-2, -1))).real.clamp(0, 1))
        return torch.stack(out)

    return run


def with_gradient(loss: str, pred: Tensor, target: Tensor, hidden: Tensor) -> Run:
    """Value and gradient of MFM's loss, by ours or by its formula on the whole plane."""
    pred = pred.clone().requires_grad_()

    def formula() -> Tensor:
        a, b = (torch.fft.fftshift(torch.fft.fft2(t, norm="ortho"), (-2, -1)) for t in (pred, target))
        d = a - b
        distance = (d.real**2 + d.imag**2 + 1e-12).sqrt()
        return (distance * hidden[:, None]).sum() / hidden.sum() / pred.shape[1]

    def run() -> list[Tensor]:
        value = frequency_loss(pred, target, hidden) if loss == "ours" else formula()
        return [value.detach(), torch.autograd.grad(value, pred)[0]]

    return run


@race(
    "Masked frequencies: the filter of a batch, and the loss of its spectrum",
    "A real picture's spectrum says everything twice: half of the plane is transformed, without shifting it, and the loss needs "
    "one transform of the difference instead of two. Picture by picture costs a mask and a dozen calls each.",
)
def frequencies(quick: bool) -> Iterator[Heat]:
    """Half of the pictures low-passed, the others high-passed, at the paper's size and radius."""
    batch, side, radius = (4, 64, 5) if quick else (32, 224, 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, side, side, generator=generator)
    yield Heat(
        f"filter {batch} pictures of {side} pixels",
        {
            "sfumato": lambda: ours(x, radius),
            "torch, whole plane": lambda: whole_plane(x, radius),
            "torch, picture by picture": lambda: picture_by_picture(x, radius),
        },
    )
    pred, target = torch.randn(2, batch, 3, side, side, generator=generator)
    hidden = random_frequency_mask(batch, side, radius, generator=generator)
    yield Heat(
        f"loss and gradient of {batch} pictures of {side} pixels",
        {
            "sfumato": lambda: with_gradient("ours", pred, target, hidden),
            "torch, whole plane": lambda: with_gradient("formula", pred, target, hidden),
        },
    )
