"""Frames of digits that stand at known distances before a pinhole camera: a scene for estimating the distance of boxed objects.

    height in pixels = focal · H_class / distance,     H_class = 1.2, 1.7, 2.2, 0.9, 2.8, 1.45, 2.5, 0.75, 3.2, 1.95 m for 0 ... 9

The size of a box alone does not tell a distance: the digit must be recognised. Near objects stand before far ones.

>>> import torch
>>> from sfumato.data import perspective_scenes
>>> frames = perspective_scenes(4, generator=torch.Generator().manual_seed(0))
>>> frames.x.shape, frames.boxes.shape, frames.target.shape
(torch.Size([4, 3, 64, 64]), torch.Size([4, 5, 4]), torch.Size([4, 5, 2]))
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.batch import Batch
from sfumato.data.samples import Split, digits
from sfumato.errors import BadSetting

HEIGHTS = (1.2, 1.7, 2.2, 0.9, 2.8, 1.45, 2.5, 0.75, 3.2, 1.95)
"""True heights of the digits 0 to 9, metres."""


def perspective_scenes(
    n: int,
    size: int = 64,
    *,
    split: Split = "train",
    objects: tuple[int, int] = (3, 5),
    distance: tuple[float, float] = (4.0, 20.0),
    focal: float = 72.0,
    pixels: tuple[float, float] = (6.0, 30.0),
    noise: float = 0.1,
    seen: float = 0.2,
    generator: torch.Generator | None = None,
) -> Batch:
    """Frames with boxes, distances and visible shares.

    Class, colour and place are uniform; the logarithm of the distance is, where the object's height lies in `pixels`. Objects are
    brighter than the ground.

    Args:
        n: number of frames.
        size: side in pixels.
        split: the digits that stand in it; "train" and "test" share none.
        objects: fewest and most objects a frame.
        distance: nearest and farthest, metres.
        focal: focal length, pixels.
        pixels: least and largest height of an object, pixels; it is as wide as high.
        noise: deviation of the noise of a pixel.
        seen: visible share below which an object has no box.
        generator: source of the draws.

    Returns:
        `x` `[n, 3, size, size]` in [0, 1]; `boxes` `[n, most, 4]` from far to near, NaN where there is none; `target`
        `[n, most, 2]`: distance in metres and visible share.

    Raises:
        BadSetting: heights that no distance gives, or objects larger than the frame.
    """
    few, most = objects
    if not 1 <= few <= most or not 0 < pixels[0] < pixels[1] <= size:
        raise BadSetting(f"objects={objects}, pixels={pixels}: give 1 <= fewest <= most, and heights up to size={size}")
    if focal * min(HEIGHTS) / distance[0] < pixels[0] or focal * max(HEIGHTS) / distance[1] > pixels[1]:
        raise BadSetting(f"between {distance[0]} and {distance[1]} m no height of an object lies in {pixels}: change one of them")
    bank = digits()[split == "test"]
    assert bank.label is not None
    u = _uniform((n, most, 8), generator)
    which = (u[..., 0] * len(bank)).long().clamp_(max=len(bank) - 1)
    tall = torch.tensor(HEIGHTS)[bank.label[which]]
    near, far = (focal * tall / pixels[1]).clamp(min=distance[0]), (focal * tall / pixels[0]).clamp(max=distance[1])
    z = (near.log() + u[..., 1] * (far / near).log()).exp()
    there = torch.arange(most) < few + (_uniform((n, 1), generator) * (most - few + 1)).long().clamp_(max=most - few)
    order = torch.where(there, z, -math.inf).argsort(1, descending=True)  # far to near, what is not there last
    z, which, tall = (v.gather(1, order) for v in (z, which, tall))
    side = focal * tall / z
    corner = u[..., 2:4] * (size - side)[..., None]
    ink = _drawn(bank.x[which.flatten()], corner.flatten(0, 1), side.flatten(), size).view(n, most, size, size)
    ink = ink * there[..., None, None]
    through = (1 - ink).flip(1).cumprod(1).flip(1)  # light that passes an object and all before it
    passed = torch.cat((through[:, 1:], torch.ones_like(ink[:, :1])), 1)
    visible = (ink * passed).sum((2, 3)) / ink.sum((2, 3)).clamp(min=1e-6)
    ground = F.interpolate(_uniform((n, 3, 4, 4), generator), (size, size), mode="bicubic", align_corners=True)
    colour = 0.5 + 0.5 * u[..., 4:7]
    x = (0.1 + 0.3 * ground) * through[:, :1] + torch.einsum("nkhw,nkc->nchw", ink * passed, colour)
    draws = torch.randn(x.shape, generator=generator, device=generator.device if generator else "cpu").cpu()
    boxes = torch.cat((corner, corner + side[..., None]), -1)
    boxed = (there & (visible >= seen))[..., None]
    return Batch(
        x=(x + noise * draws).clamp_(0, 1),
        index=torch.arange(n),
        target=torch.where(boxed, torch.stack((z, visible), -1), torch.nan),
        boxes=torch.where(boxed, boxes, torch.nan),
    )


def _drawn(digit: Tensor, corner: Tensor, side: Tensor, size: int) -> Tensor:
    """Digits `[N, 1, 8, 8]` as ink `[N, size, size]` in squares at `corner` (x, y)."""
    pixel = torch.arange(size) + 0.5
    x, y = (((pixel - corner[:, k, None]) / side[:, None]) * 2 - 1 for k in (0, 1))  # [N, size], -1 to 1 inside the square
    grid = torch.stack((x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)), -1)
    return F.grid_sample(digit, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device if generator else "cpu").cpu()
