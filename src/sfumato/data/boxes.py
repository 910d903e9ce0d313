"""Boxes around objects: ragged boxes in a rectangular tensor, crops of one size, noise on boxes, a map of their centres.

    padded:  [B, n, 4] xyxy in pixels, rows of NaN where an image has fewer than n objects
    rows:    [N, 5] (image, x1, y1, x2, y2), the real boxes of all images, as `torchvision.ops.roi_align` takes them
    IoU jitter:  each side moves by side · U(-e, e),  e = min((1 - √q) / 2, (1 / √q - 1) / 2):  IoU with the old box is at least q

Source: Panariello et al. 2024, "Monocular per-object distance estimation with Masked Object Modeling", arXiv 2401.03191 (noise on
boxes and the map of centres; official code `utils/bboxes.py`).

>>> import torch
>>> from sfumato.data import box_rows, center_heatmap, jitter_boxes, pad_boxes, resized_crops
>>> padded = pad_boxes([torch.tensor([[0.0, 0.0, 8.0, 4.0], [2.0, 2.0, 6.0, 6.0]]), torch.empty(0, 4)])
>>> padded.shape, box_rows(padded)[:, 0].tolist()
(torch.Size([2, 2, 4]), [0.0, 0.0])
>>> images = torch.rand(2, 3, 16, 16)
>>> resized_crops(images, padded, (10, 5)).shape, center_heatmap(padded, (16, 16)).shape
(torch.Size([2, 3, 10, 5]), torch.Size([2, 1, 16, 16]))
>>> jitter_boxes(padded, (16, 16), mode="iou").shape
torch.Size([2, 2, 4])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting

Boxes = Tensor | Sequence[Tensor]
"""Padded boxes `[B, n, 4]`, rows `[N, 5]`, or a list with `[n, 4]` for each image; xyxy in pixels of the image."""


def pad_boxes(boxes: Sequence[Tensor], *, length: int | None = None) -> Tensor:
    """Ragged rows in one tensor; what is missing is NaN.

    Args:
        boxes: `[n, D]` for each image (D = 4 for boxes; any D for what belongs to them).
        length: rows an image; None: as many as the fullest image has.

    Returns:
        `[B, length, D]`.

    Raises:
        BadData: no images, or an image with more rows than `length`.
    """
    if not len(boxes):
        raise BadData("boxes of no image: give a list with one tensor [n, 4] an image")
    padded = torch.nn.utils.rnn.pad_sequence(list(boxes), batch_first=True, padding_value=torch.nan)
    most = padded.shape[1]
    if length is None or length == most:
        return padded
    if length < most:
        raise BadData(f"an image has {most} boxes, more than length={length}")
    return torch.cat((padded, padded.new_full((len(padded), length - most, padded.shape[2]), torch.nan)), 1)


def box_rows(boxes: Boxes) -> Tensor:
    """The real boxes of all images below each other.

    Args:
        boxes: padded, a list, or rows already (returned as they are).

    Returns:
        `[N, 5]`: number of the image, x1, y1, x2, y2; in the order of images, then of boxes.

    Raises:
        BadData: another shape.
    """
    padded = boxes if isinstance(boxes, Tensor) else pad_boxes(boxes)
    if padded.ndim == 2 and padded.shape[1] == 5:
        return padded
    if padded.ndim != 3 or padded.shape[2] != 4:
        raise BadData(f"boxes are {list(padded.shape)}: give [B, n, 4], xyxy in pixels, or a list with [n, 4] for each image")
    there = padded.isfinite().all(-1)
    return torch.cat((there.nonzero()[:, :1].to(padded.dtype), padded[there]), 1)


def resized_crops(images: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """What is inside each box, resized to one size.

    A pixel of the result is the mean of bilinear samples over its area (`roi_align` with as many samples as pixels): antialiased
    where the box shrinks, bilinear where it grows.

    Args:
        images: `[B, C, H, W]`.
        boxes: see `Boxes`; sides shorter than a pixel are taken as one pixel.
        size: (height, width) of the crops.

    Returns:
        `[N, C, height, width]`.
    """
    from torchvision.ops import roi_align

    rows = box_rows(boxes).to(images)
    first, last = rows[:, :3], torch.maximum(rows[:, 3:], rows[:, 1:3] + 1)
    crops: Tensor = roi_align(images, torch.cat((first, last), 1), size, aligned=True)
    return crops


def jitter_boxes(
    boxes: Tensor,
    size: tuple[int, int],
    *,
    mode: str = "scale",
    offset: float = 0.01,
    scale: tuple[float, float] = (0.9, 1.1),
    iou: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sloppy boxes, as a detector would give them.

    Args:
        boxes: `[..., 4]` xyxy in pixels; rows of NaN stay.
        size: (H, W) of the image; boxes are cut at its border.
        mode: "scale": both axes are scaled about the centre and the box is moved by up to `offset` of the image; "iou": each
            side moves on its own, so that the box keeps at least `iou` in common with the old one (before it is cut).
        offset: largest shift to the right and down, share of the image's sides.
        scale: smallest and largest factor of each axis.
        iou: least intersection over union, above 0 to 1.
        generator: source of the draws.

    Returns:
        Like `boxes`.

    Raises:
        BadSetting: an unknown mode, or an `iou` out of its range.
    """
    if mode not in ("scale", "iou") or not 0 < iou <= 1:
        raise BadSetting(f"mode={mode!r}, iou={iou}: the mode is 'scale' or 'iou', iou is above 0 and at most 1")
    device = boxes.device if generator is None else generator.device
    u = torch.rand(boxes.shape, generator=generator, device=device).to(boxes)
    first, last = boxes[..., :2], boxes[..., 2:]
    side = last - first
    frame = boxes.new_tensor([size[1], size[0]])
    if mode == "scale":
        centre = (first + last) / 2 + frame * offset * u[..., :2]
        half = side / 2 * (scale[0] + (scale[1] - scale[0]) * u[..., 2:])
        moved = torch.cat((centre - half, centre + half), -1)
    else:
        e = min((1 - iou**0.5) / 2, (iou**-0.5 - 1) / 2)
        moved = boxes + torch.cat((side, side), -1) * e * (2 * u - 1)
    return torch.minimum(moved.clamp(min=0), torch.cat((frame, frame)))


def center_heatmap(boxes: Boxes, size: tuple[int, int], *, sigma: float = 2.0) -> Tensor:
    """A map with a Gaussian bump at the centre of each box; where bumps overlap, the larger value counts.

    Args:
        boxes: padded or a list, see `Boxes`.
        size: (H, W) of the map.
        sigma: width of a bump, pixels; it is cut off at a square of ⌊6.25 σ⌋ pixels (made odd).

    Returns:
        `[B, 1, H, W]` in [0, 1], 1 at the pixel that holds a centre.
    """
    padded = boxes if isinstance(boxes, Tensor) else pad_boxes(boxes)
    rows, (height, width) = box_rows(padded), size
    reach = (int(6.25 * sigma) | 1) // 2
    d = torch.arange(-reach, reach + 1, device=rows.device)
    bump = torch.exp(-d.square() / (2 * sigma**2)).to(rows.dtype)
    x, y = ((rows[:, k] + rows[:, k + 2]).div(2).floor().long()[:, None] + d for k in (1, 2))  # [N, side]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    place = (rows[:, 0].long()[:, None, None] * height + y[:, :, None]) * width + x[:, None]
    values = (bump[:, None] * bump).expand_as(inside)
    flat = rows.new_zeros(len(padded) * height * width)
    return flat.scatter_reduce(0, place[inside], values[inside], "amax").view(-1, 1, height, width)
